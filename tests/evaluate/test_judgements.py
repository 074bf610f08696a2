"""The file of kept replies: whole lines, one process at a time, no key in it."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_trl.endpoint import Reply
from orpo_trl.evaluate.judgements import key_of, open_judgements


def reply(text: str = "[[7]]") -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return Reply(text, {"choices": [choice], "usage": {}}, 12, 3)


@given(texts=st.lists(st.text(), min_size=1, max_size=5))
def test_what_is_kept_is_read_again(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("kept") / "judgements.jsonl"
    with open_judgements(path) as kept:
        for text in texts:
            kept.add("key", "judge", reply(text))
    with open_judgements(path) as kept:
        found = kept.replies("key")
    assert [one["choice"]["text"] for one in found] == texts
    assert {(one["prompt_tokens"], one["completion_tokens"]) for one in found} == {(12, 3)}


def test_the_name_of_a_request_is_its_content():
    hello = [{"role": "user", "content": "hello"}]
    names = {
        key_of("a", hello, {"max_tokens": 1}),
        key_of("b", hello, {"max_tokens": 1}),
        key_of("a", hello, {"max_tokens": 2}),
        key_of("a", [{"role": "user", "content": "hello "}], {"max_tokens": 1}),
    }
    assert len(names) == 4
    assert key_of("a", [{"content": "hello", "role": "user"}], {"max_tokens": 1}) in names


def test_a_half_line_of_a_killed_process_costs_that_line_alone(tmp_path, capsys):
    path = tmp_path / "judgements.jsonl"
    with open_judgements(path) as kept:
        kept.add("first", "judge", reply())
        kept.add("second", "judge", reply())
    path.write_bytes(path.read_bytes()[:-40])
    with open_judgements(path) as kept:
        assert not kept.replies("second")
        kept.add("third", "judge", reply())
    with open_judgements(path) as kept:
        assert [len(kept.replies(key)) for key in ("first", "second", "third")] == [1, 0, 1]
    assert f"{path}: 1 damaged lines are left out." in capsys.readouterr().err


@pytest.mark.parametrize("line", ["[]", "{}", "null", '{"key": 1, "choice": {"text": ""}}', '{"key": "a"}', "\x00"])
def test_lines_of_another_form_are_left_out(tmp_path, line):
    path = tmp_path / "judgements.jsonl"
    path.write_text(f"{line}\n")
    with open_judgements(path) as kept:
        assert not kept.replies("a")


def test_a_second_process_is_refused_and_harms_nothing(tmp_path):
    path = tmp_path / "judgements.jsonl"
    code = f"from orpo_trl.evaluate.judgements import *\nwith open_judgements(Path({str(path)!r})):\n    pass"
    with open_judgements(path) as kept:
        kept.add("key", "judge", reply())
        before = path.read_bytes()
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "another process is judging with this file" in second.stderr
        assert path.read_bytes() == before
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_key_that_the_server_repeats_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", 'sk-"secret"-123')
    path = tmp_path / "judgements.jsonl"
    with open_judgements(path) as kept:
        kept.add("key", "judge", reply('You sent sk-"secret"-123'))
    [line] = path.read_text().splitlines()
    assert "secret" not in line
    assert json.loads(line)["choice"]["text"] == "You sent ${OPENAI_API_KEY}"


def test_nothing_is_written_through_a_link(tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("mine")
    path = tmp_path / "judgements.jsonl"
    path.symlink_to(other)
    with open_judgements(path) as kept:
        kept.add("key", "judge", reply())
    assert other.read_text() == "mine"
    assert not path.is_symlink()
