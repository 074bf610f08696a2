"""Judging over real HTTP: what is sent, what is asked again, and what is said."""

import os
import pty
import subprocess
import sys

import pytest
from support.judges import JudgeServer

from orpo_trl.commands import Unfinished
from orpo_trl.endpoint import Endpoint, EndpointError
from orpo_trl.evaluate.judge import Judge, judge_all
from orpo_trl.evaluate.judge_cost import Tokens, estimate, price_of

pytest.importorskip("openai")


def conversations(count: int) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": f"grade {number}"}] for number in range(count)]


def read(choice) -> float:
    return float(choice["text"])


def judge(server, **changes) -> Judge:
    endpoint = changes.pop("endpoint", None) or Endpoint(server.url, "my-judge", timeout=5)
    return Judge(
        **{"endpoint": endpoint, "sampling": {"max_tokens": 5}, "read": read, "usual_tokens": 1, "yes": True} | changes
    )


def grade(body) -> str:
    return body["messages"][-1]["content"].split()[-1]


def test_each_content_is_judged_once_and_nothing_is_sent_again(tmp_path, capsys):
    asked = conversations(20) + conversations(3)
    with JudgeServer(grade) as server:
        first = judge_all(asked, judge(server), tmp_path / "kept.jsonl")
        # Nothing is left to send, so nothing is asked, though there is no terminal.
        second = judge_all(asked, judge(server, yes=False), tmp_path / "kept.jsonl")
    assert first.verdicts == second.verdicts == [float(number) for number in [*range(20), *range(3)]]
    assert set(server.asked.values()) == {1}
    assert first.problems == {}
    assert first.tokens == second.tokens == Tokens(2 * 20, 20)  # the server counts words
    said = capsys.readouterr().err
    assert said.count("20 judgements by my-judge") == 1
    assert "Used: 40 tokens of prompts, 20 of replies. Estimated:" in said


def test_another_sampling_or_judge_is_another_judgement(tmp_path):
    with JudgeServer(grade) as server:
        for changes in ({}, {"sampling": {"max_tokens": 6}}, {"endpoint": Endpoint(server.url, "other")}):
            judge_all(conversations(2), judge(server, **changes), tmp_path / "kept.jsonl")
    assert set(server.asked.values()) == {3}


def test_a_verdict_that_cannot_be_read_is_asked_for_again(tmp_path):
    with JudgeServer(grade, wrong="no number", wrong_first=2) as server:
        judged = judge_all(conversations(4), judge(server), tmp_path / "kept.jsonl")
    assert judged.verdicts == [0, 1, 2, 3]
    assert set(server.answered.values()) == {3}
    assert judged.tokens == Tokens(2 * 4 * 3, (2 + 2 + 1) * 4)  # the replies that could not be read cost as well


def test_a_verdict_that_never_comes_is_named_and_asked_for_at_the_next_start(tmp_path):
    def some(body) -> str:
        return "none" if grade(body) in ("1", "3") else grade(body)

    with JudgeServer(some) as server:
        judged = judge_all(conversations(5), judge(server), tmp_path / "kept.jsonl")
        assert judged.verdicts == [0, None, 2, None, 4]
        assert set(judged.problems) == {1, 3}
        assert sorted(server.asked.values()) == [1, 1, 1, 3, 3]
        server.verdict = grade
        judged = judge_all(conversations(5), judge(server), tmp_path / "kept.jsonl")
    assert judged.verdicts == [0, 1, 2, 3, 4]
    assert sorted(server.asked.values()) == [1, 1, 1, 4, 4]


def test_without_a_terminal_nothing_is_sent_unless_it_is_said(tmp_path, capsys):
    with JudgeServer(grade) as server, pytest.raises(ValueError, match=r"Nothing was sent: .* --yes"):
        judge_all(conversations(3), judge(server, yes=False, price=(1000.0, 0.0)), tmp_path / "kept.jsonl")
    assert not server.asked
    assert "3 judgements by my-judge: about 23 tokens of prompts, 3 of replies, 0.02 USD." in capsys.readouterr().err


@pytest.mark.parametrize(("typed", "status"), [("y\n", 0), ("n\n", 1), ("\n", 1)])
def test_on_a_terminal_the_question_decides(typed, status):
    code = (
        "from orpo_trl.evaluate.judge_cost import Tokens, ask_leave, price_of\n"
        "ask_leave(5, 'gpt-4', Tokens(1000000, 500000), price_of('gpt-4', None), False)"
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.write(ours, typed.encode())
        assert process.wait(60) == status
    os.close(theirs)
    said = os.read(ours, 10000).decode()
    os.close(ours)
    assert "5 judgements by gpt-4: about 1,000,000 tokens of prompts, 500,000 of replies, 60.00 USD." in said
    assert "Send them? [y/N]" in said


def test_a_server_that_refuses_the_key_is_asked_no_more(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    with JudgeServer(grade, faults=["401"], share=1.0, most=9) as server:
        one = judge(server, endpoint=Endpoint(server.url, "my-judge", workers=2))
        with pytest.raises(EndpointError) as error:
            judge_all(conversations(50), one, tmp_path / "kept.jsonl")
    assert "secret" not in str(error.value)
    assert sum(server.asked.values()) < 10
    assert "secret" not in (tmp_path / "kept.jsonl").read_text()


def test_a_server_that_is_gone_ends_the_work_and_the_same_call_goes_on(tmp_path):
    with JudgeServer(grade, faults=["500"], share=1.0, most=1) as server:
        without_retries = judge(server, endpoint=Endpoint(server.url, "my-judge", workers=2, retries=0))
        with pytest.raises(Unfinished, match=r"20 requests in a row got no answer\. The same command goes on"):
            judge_all(conversations(60), without_retries, tmp_path / "kept.jsonl")
        assert sum(server.asked.values()) < 30
        server.faults, server.share = [], 0.0
        assert None not in judge_all(conversations(60), without_retries, tmp_path / "kept.jsonl").verdicts


def test_costs_by_hand():
    assert price_of("gpt-4-1106-preview", None) == (10.0, 30.0)
    assert price_of("gpt-4-1106-preview", (1.0, 2.0)) == (1.0, 2.0)
    assert price_of("my-judge", None) is None
    # A message of 40 characters is 10 tokens; 3 for each of the two messages, and 3 for the reply's start.
    two = [{"role": "system", "content": "x" * 40}, {"role": "user", "content": "y" * 80}]
    own = Endpoint("http://localhost:1/v1", "my-judge")
    assert estimate([two, two], own, 7) == Tokens(2 * (10 + 20 + 3 + 3 + 3), 14)


def test_openai_without_a_key_is_refused_before_the_question(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match=r"gpt-4 at OpenAI needs a key in OPENAI_API_KEY\. Another server: --endpoint"):
        judge_all(conversations(1), judge(None, endpoint=Endpoint(None, "gpt-4")), tmp_path / "kept.jsonl")
