"""Answers that outlive their process."""

import json
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.processes import TRAIN_ENVIRONMENT

from orpo_trl.generate.journal import Answer, Journal, remove_journals


def answers(count, start=0):
    return [Answer(index, 0, f"answer {index} é\u2028", index, 1.5) for index in range(start, start + count)]


def begun(output, identity=None) -> Journal:
    return Journal(output, identity or {"seed": 1})


def test_answers_are_there_again(tmp_path):
    journal = begun(tmp_path / "a.json")
    journal.add(answers(3))
    journal.close()
    again = begun(tmp_path / "a.json")
    assert list(again.answers.values()) == answers(3)
    again.close()


def test_answers_made_otherwise_are_refused_with_what_differs(tmp_path):
    journal = begun(tmp_path / "a.json", {"temperature": 0.7, "seed": 1})
    journal.add(answers(1))
    journal.close()
    with pytest.raises(ValueError, match=r"temperature was 0.7 and is 0.0\. Go on with") as error:
        begun(tmp_path / "a.json", {"temperature": 0.0, "seed": 1})
    assert "a.json.partial" in str(error.value)
    assert "seed" not in str(error.value)


@given(cut=st.integers(0, 400))
def test_a_file_that_was_cut_anywhere_goes_on(cut, tmp_path_factory):
    output = tmp_path_factory.mktemp("cut") / "a.json"
    journal = begun(output)
    journal.add(answers(4))
    journal.close()
    content = journal.path.read_bytes()
    journal.path.write_bytes(content[: min(cut, len(content))])
    again = begun(output)
    kept = list(again.answers.values())
    assert kept == answers(4)[: len(kept)]
    assert len(kept) >= content[:cut].count(b"\n") - 1
    again.add([answer for answer in answers(4) if (answer.index, 0) not in again.answers])
    again.close()
    last = begun(output)
    assert sorted(last.answers.values(), key=lambda answer: answer.index) == answers(4)
    last.close()


def test_two_processes_do_not_write_one_file(tmp_path):
    journal = begun(tmp_path / "a.json")
    with pytest.raises(ValueError, match="another process is writing it"):
        begun(tmp_path / "a.json")
    journal.close()
    begun(tmp_path / "a.json").close()


@pytest.mark.slow
def test_the_lock_ends_with_its_process(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from generate.test_journal import answers, begun\n"
        "begun(Path(sys.argv[1])).add(answers(1)); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.json")], env=TRAIN_ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL
    again = begun(tmp_path / "a.json")
    assert len(again.answers) == 1
    again.close()


def test_each_process_of_several_reads_the_answers_of_all(tmp_path):
    output = tmp_path / "a.json"
    first, second = Journal(output, {}, rank=0), Journal(output, {}, rank=1)
    first.add(answers(2))
    second.add(answers(2, start=2))
    first.read_all()
    assert len(first.answers) == 4
    first.close()
    second.close()
    remove_journals(output)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["[1]", "{}", '{"identity": 3}', '{"a": 1}\n{"b"'])
def test_a_file_of_something_else_is_refused(line, tmp_path):
    (tmp_path / "a.json.partial").write_text(line + "\n" + json.dumps({"index": 0}) + "\n")
    with pytest.raises(ValueError, match=r"a\.json\.partial"):
        begun(tmp_path / "a.json")


def test_a_link_is_not_written_through(tmp_path):
    target = tmp_path / "precious"
    target.write_text("mine")
    (tmp_path / "a.json.partial").symlink_to(target)
    begun(tmp_path / "a.json").close()
    assert target.read_text() == "mine"
