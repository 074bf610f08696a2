"""Requests to an OpenAI-compatible server, over real HTTP, also one that misbehaves."""

import subprocess
import sys
import time

import pytest
from support.hostile_server import FAULTS, HostileServer, echo

from orpo_trl.endpoint import Endpoint, EndpointError, Reply, Request

pytest.importorskip("openai")


def requests_for(count: int) -> list[Request]:
    return [Request([{"role": "user", "content": f"question {number}"}], {"max_tokens": 5}) for number in range(count)]


def ask_all(endpoint: Endpoint, requests: list[Request]) -> list[Reply | EndpointError]:
    found: dict[int, Reply | EndpointError] = {}

    def keep(index, reply):
        assert index not in found
        found[index] = reply

    endpoint.ask_all(requests, keep)
    return [found[index] for index in range(len(requests))]


@pytest.mark.parametrize(
    ("url", "variable", "name"),
    [
        (None, None, "gpt-4"),
        ("https://api.openai.com/v1", "http://other:1/v1", "gpt-4"),
        (None, "http://me:secret@localhost:8000/v1/", "gpt-4 at localhost:8000/v1"),
        ("http://127.0.0.1:9/v1", None, "gpt-4 at 127.0.0.1:9/v1"),
    ],
)
def test_the_name_of_an_endpoint_says_where_the_model_runs(url, variable, name, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    if variable:
        monkeypatch.setenv("OPENAI_BASE_URL", variable)
    assert Endpoint(url, "gpt-4").name == name


def test_answers_come_by_index_and_each_request_is_sent_once():
    def slowly(body):
        time.sleep(0.05)
        return echo(body)

    with HostileServer(slowly) as server:
        replies = ask_all(Endpoint(server.url, "m", workers=4), requests_for(30))
    assert [reply.text for reply in replies] == [f"answer to: question {number}" for number in range(30)]
    assert set(server.asked.values()) == {1}
    assert len(server.asked) == 30
    assert 1 < server.most_at_once <= 4
    assert replies[0].raw["choices"][0]["message"]["content"] == replies[0].text
    assert (replies[0].prompt_tokens, replies[0].completion_tokens) == (2, 4)
    assert server.bodies[0]["model"] == "m"
    assert server.bodies[0]["max_tokens"] == 5


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_retried_until_there_is_an_answer(fault):
    with HostileServer(faults=[fault], share=1.0, most=1, silence=3) as server:
        reply = Endpoint(server.url, "m", timeout=0.4, retries=2).ask([{"role": "user", "content": "hello"}])
    assert reply.text == "answer to: hello"
    assert server.failed == {fault: 1}
    assert sum(server.asked.values()) == 2


def test_a_request_is_sent_again_after_a_failure_only():
    with HostileServer(share=0.4, seed=3, most=1, silence=6) as server:
        # An answer that the machine is too slow for would be one more failure.
        replies = ask_all(Endpoint(server.url, "m", workers=16, timeout=3), requests_for(120))
    assert [reply.text for reply in replies] == [f"answer to: question {number}" for number in range(120)]
    assert set(server.failed) == set(FAULTS)
    assert set(server.answered.values()) == {1}
    assert sum(server.asked.values()) == 120 + sum(server.failed.values())


def test_the_server_says_how_long_to_wait():
    with HostileServer(faults=["429 with Retry-After"], share=1.0, most=1, retry_after=1.3) as server:
        start = time.monotonic()
        Endpoint(server.url, "m").ask([{"role": "user", "content": "hello"}])
        assert time.monotonic() - start > 1.3


@pytest.mark.parametrize(
    ("fault", "words", "status"),
    [
        ("500", "internal error", 500),
        ("no JSON", "expected JSON, received", None),
        ("no choices", "expected an answer with choices", None),
        ("reset", "Connection error", None),
        ("silence", "timed out", None),
    ],
)
def test_after_all_retries_the_error_says_what_came(fault, words, status):
    with HostileServer(faults=[fault], share=1.0, most=99, silence=3) as server:
        (error,) = ask_all(Endpoint(server.url, "the-model", timeout=0.3, retries=1), requests_for(1))
    assert isinstance(error, EndpointError)
    assert words in str(error)
    assert server.url in str(error)
    assert "'the-model'" in str(error)
    assert "\n" not in str(error)
    assert error.status == status
    assert sum(server.asked.values()) == 2


def test_a_server_that_is_not_there_is_told_before_the_last_retry(monkeypatch, caplog):
    monkeypatch.setattr("orpo_trl.endpoint._SILENCE", 0.1)
    (found,) = ask_all(Endpoint("http://127.0.0.1:9/v1", "m", retries=1), requests_for(1))
    assert isinstance(found, EndpointError)
    assert caplog.messages == [
        "No answer yet from http://127.0.0.1:9/v1 after 0 seconds. A request that fails is sent again, 1 times at most."
    ]


def test_one_failed_request_does_not_stop_the_others():
    class Once(HostileServer):
        def fault_of(self, content, tries):
            return "400" if "question 3" in content else None

    with Once() as server:
        replies = ask_all(Endpoint(server.url, "m", workers=2), requests_for(6))
    assert [isinstance(reply, EndpointError) for reply in replies] == [False, False, False, True, False, False]
    assert set(server.asked.values()) == {1}  # 400 is not tried again


def test_the_key_comes_from_the_environment_and_is_in_no_error(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-mine")
    with HostileServer(faults=["401"], share=1.0, most=9) as server:
        (error,) = ask_all(Endpoint(server.url, "m"), requests_for(1))
    assert server.keys == {"Bearer sk-secret-of-mine"}
    assert "sk-secret-of-mine" not in str(error)
    assert "${OPENAI_API_KEY}" in str(error)
    assert isinstance(error, EndpointError)
    assert error.is_of_all
    assert sum(server.asked.values()) == 1


def test_a_server_of_ones_own_needs_no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with HostileServer() as server:
        Endpoint(server.url, "m").ask([{"role": "user", "content": "hello"}])
    assert server.keys == {"Bearer none"}


def test_where_a_reply_cannot_be_kept_nothing_more_is_sent():
    def fail(index, reply):
        raise OSError("no space left")

    with HostileServer() as server:
        with pytest.raises(OSError, match="no space left"):
            Endpoint(server.url, "m", workers=2).ask_all(requests_for(200), fail)
        time.sleep(0.3)
        assert sum(server.asked.values()) < 20


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://user:password@host/v1", "http://"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="endpoint: expected an address") as error:
        Endpoint(url, "m")
    assert "password" not in str(error.value)


def test_without_the_package_one_line_says_what_to_install(tmp_path):
    (tmp_path / "openai.py").write_text("raise ImportError('not there')")
    script = "from orpo_trl.endpoint import Endpoint\ntry:\n    Endpoint('http://h/v1', 'm').ask([])\n"
    script += "except ValueError as error:\n    print(error)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{script}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "An endpoint needs openai: pip install 'orpo-trl[eval]'\n"
