"""What a run prints: in a log file, and on a real terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest
from support.processes import TRAIN_ENVIRONMENT
from support.small import REPOSITORY

from orpo_trl.callbacks import terminal
from orpo_trl.callbacks.terminal import LINES_PER_HEADER, TerminalProgress

ARGS = SimpleNamespace(disable_tqdm=True)


def state(step: int = 10, **kwargs) -> SimpleNamespace:
    defaults = {"global_step": step, "max_steps": 100, "epoch": step / 50, "is_world_process_zero": True}
    return SimpleNamespace(**{**defaults, **kwargs})


TRAIN = {
    "loss": 1.23456, "nll_loss": 1.2, "log_odds_chosen": 0.5, "rewards/accuracies": 0.75, "rewards/margins": 0.0123,
    "logps/chosen": -1.5, "logps/rejected": -2.0, "learning_rate": 5e-6, "grad_norm": 3.0,
    "throughput/unique_tokens_per_second": 12345.6, "epoch": 0.2,
}  # fmt: skip
EVAL = {f"eval_{name}": value for name, value in TRAIN.items() if name not in ("learning_rate", "grad_norm", "epoch")}


@pytest.fixture
def progress():
    callback = TerminalProgress()
    callback.on_train_begin(ARGS, state(0), None)
    return callback


def test_columns_are_aligned_under_their_titles(progress, capsys):
    progress.on_log(ARGS, state(), None, TRAIN)
    progress.on_log(ARGS, state(), None, EVAL)
    progress.on_log(ARGS, state(90, epoch=12.25), None, {**TRAIN, "loss": 123.4, "grad_norm": None})
    header, train, held_out, later = capsys.readouterr().out.splitlines()
    ends = [match.end() for match in re.finditer(r"\S+( odds)?", header)][:-1]
    cells = [[line[:end].split(" ")[-1] for end in ends] for line in (train, held_out, later)]
    assert header.split() == "step epoch loss NLL log odds accuracy margin chosen rejected lr grad tok/s left".split()
    values = "10 0.20 1.2346 1.2000 +0.500 0.750 +0.0123 -1.500 -2.000 5.00e-06 3.00 12,346".split()
    assert cells[0] == values
    assert cells[1][:9] == values[:9]
    assert cells[1][9:11] == ["", ""]
    assert (cells[2][0], cells[2][2], cells[2][10]) == ("90", "123.4000", "")
    assert (train.split()[0], held_out.split()[0]) == ("train", "eval")
    assert re.search(r" \d+:\d\d:\d\d$", train)


def test_header_comes_back(progress, capsys):
    for _ in range(2 * LINES_PER_HEADER + 1):
        progress.on_log(ARGS, state(), None, TRAIN)
    lines = capsys.readouterr().out.splitlines()
    headers = [i for i, line in enumerate(lines) if "accuracy" in line]
    assert headers == [0, LINES_PER_HEADER + 1, 2 * LINES_PER_HEADER + 2]


def test_each_set_of_an_evaluation_has_a_line_of_its_label(progress, capsys):
    progress.on_log(ARGS, state(), None, {"eval_big_farm_loss": 2.0, "eval_big_farm_runtime": 3.0})
    progress.on_log(ARGS, state(), None, {"eval_loss": 2.0, "eval_runtime": 3.0})
    _, labelled, plain = capsys.readouterr().out.splitlines()
    assert labelled.endswith(" big_farm")
    assert labelled.startswith(plain)


def test_other_logs_and_the_end_are_lines_of_words(progress, capsys):
    progress.on_log(ARGS, state(), None, {"tokens_seen": 5, "epoch": 1})
    progress.on_log(ARGS, state(100), None, {"train_runtime": 3723.4, "train_loss": 1.5, "total_flos": 1e9})
    assert capsys.readouterr().out.splitlines() == [
        "step 10: tokens_seen 5", "Trained to step 100 in 1:02:03, mean loss 1.5000"
    ]  # fmt: skip


def test_other_processes_are_silent(progress, capsys):
    progress.on_log(ARGS, state(is_world_process_zero=False), None, TRAIN)
    assert capsys.readouterr().out == ""


def test_bar_moves_within_an_optimiser_step(monkeypatch, capsys):
    """Which takes minutes where it has many micro-batches."""
    monkeypatch.setattr(terminal, "_PAUSE", -1.0)
    callback, args = TerminalProgress(), SimpleNamespace(disable_tqdm=False, gradient_accumulation_steps=3)
    callback.on_train_begin(args, state(0), None)
    callback.training_bar.disable = False  # as on a terminal
    said = []
    monkeypatch.setattr(callback.training_bar, "set_description", lambda text, refresh=True: said.append(text))
    monkeypatch.setattr(callback.training_bar, "update", lambda steps: said.append(steps))
    for step in (1, 2):
        callback.on_substep_end(args, state(step - 1), None)
        callback.on_substep_end(args, state(step - 1), None)
        callback.on_step_end(args, state(step), None)
    assert said == ["train, micro-batch 1 of 3", "train, micro-batch 2 of 3", "train", 1] * 2


@pytest.mark.slow
def test_bar_on_a_real_terminal_shows_loss_margin_and_accuracy(tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    command = [sys.executable, "scripts/run_orpo.py", "recipes/quickstart.yaml", "--max_steps", "3", "--logging_steps",
               "1", "--output_dir", str(tmp_path)]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL, cwd=REPOSITORY,
        env={**TRAIN_ENVIRONMENT, "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    while True:
        try:
            seen += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    assert process.wait() == 0
    text = seen.decode(errors="replace")
    assert re.search(r"train: +100%.*3/3.*loss=\d\.\d{4}, accuracy=\d\.\d{3}, margin=[+-]\d\.\d{4}", text)
    assert text.count("train       ") >= 3
