"""A run of one process that is asked to stop, in real processes; and `stop_after` in Python."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.processes import TRAIN_ENVIRONMENT
from support.runs import Run, as_in_a_terminal, last_step
from support.small import make_dataset, settings, tiny_model
from transformers import AutoTokenizer

from orpo_trl import ORPOConfig, ORPOTrainer
from orpo_trl.config import SettingsError

LONG = ["--max_steps", "2000", "--save_strategy", "no"]


def make_trainer(folder, **kwargs):
    tokenizer = AutoTokenizer.from_pretrained("recipes/quickstart/model")
    rows = {"train_dataset": make_dataset(16), "eval_dataset": make_dataset(4, seed=1)}
    return ORPOTrainer(tiny_model(), settings(folder, **kwargs), processing_class=tokenizer, **rows)


@pytest.mark.parametrize("bare", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_sigterm_stops_with_a_checkpoint_within_a_step(bare, tmp_path):
    """One process trains in that of `orpo-trl train`, as in that of the script."""
    run = Run(tmp_path / "out", *LONG, bare=bare)
    run.wait_for_step(3)
    at = run.steps()[-1]
    run.send(signal.SIGTERM)
    assert run.wait(30) == 75
    step = last_step(run.output)
    assert at <= step <= at + 3  # the one that runs, the one that hears of it, and one that was not written yet
    assert run.steps() == list(range(1, step + 1))
    log = run.log()
    assert "SIGTERM: the run stops at the end of this optimiser step, with a checkpoint." in log
    assert f"Stopped after step {step} (SIGTERM). Checkpoint: {run.output / f'checkpoint-{step}'}\n" in log
    again = "The same command goes on: " + ("" if bare else "orpo-trl train quickstart --report_to none")
    assert again in log
    assert not any(word in log for word in ("Traceback", "Saved the model", "Trained to step"))
    assert "finished" not in json.loads((run.output / "run.json").read_text())


def test_stop_after_stops_the_trainer_and_says_why(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=5, stop_after=1e-6, save_total_limit=1)
    trainer.train()
    assert trainer.interruption == "`stop_after: 1e-06`"
    assert trainer.state.global_step == 1
    assert last_step(tmp_path) == 1
    assert not any("train_loss" in log for log in trainer.state.log_history)
    assert "finished" not in json.loads((tmp_path / "run.json").read_text())
    trainer.args.stop_after = None
    again = make_trainer(tmp_path, max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert again.interruption is None
    assert again.state.global_step == 3
    assert "finished" in json.loads((tmp_path / "run.json").read_text())


def test_checkpoint_to_go_on_from_is_kept_where_another_is_the_best(tmp_path):
    """The Trainer deletes all but the best at the end of training, with `save_total_limit: 1`."""
    trainer = make_trainer(
        tmp_path, max_steps=6, learning_rate=10.0, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True, save_total_limit=1, logging_steps=2,
    )  # fmt: skip

    def stop_soon(args, state, control, **kwargs):
        if state.global_step == 3:
            trainer._stop._limit = 1e-9

    trainer._stop.on_step_begin = stop_soon
    trainer.train()
    assert trainer.interruption is not None
    assert last_step(tmp_path) == trainer.state.global_step == 4
    assert Path(trainer.state.best_model_checkpoint).name != "checkpoint-4"


def test_end_of_an_epoch_is_not_taken_where_training_stops_in_its_middle(tmp_path):
    trainer = make_trainer(
        tmp_path, max_steps=-1, num_train_epochs=2, stop_after=1e-6, eval_strategy="epoch", save_strategy="epoch"
    )
    trainer.train()
    assert trainer.state.global_step == 1
    assert not any("eval_loss" in log for log in trainer.state.log_history)


def test_trainer_installs_no_handlers(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)]
    seen = []
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer._stop.on_step_begin = lambda *args, **kwargs: seen.append(signal.getsignal(signal.SIGTERM))
    trainer.train()
    assert seen == before[:1]


def test_transformers_own_checkpoint_on_sigterm_is_refused_by_name(tmp_path):
    with pytest.raises(SettingsError, match=r"`enable_jit_checkpoint` .* a checkpoint on SIGTERM .* is built in"):
        ORPOConfig(str(tmp_path), enable_jit_checkpoint=True)


# Of `interruptions.py` alone: a process without torch.
LISTENER = """
import os, signal, sys, time
from orpo_trl import interruptions
interruptions.listen()
interruptions.training(sys.argv[1] == "training")
with interruptions.reported():
    print("ready", flush=True)
    while not (interruptions.asked() and sys.argv[-1] == "end"):
        time.sleep(0.01)
"""


def listener(*arguments, ignored=(), **environment):
    def ignore():
        as_in_a_terminal()
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    process = subprocess.Popen(
        [sys.executable, "-c", LISTENER, *arguments], env={**TRAIN_ENVIRONMENT, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=ignore,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT"])
def test_signal_before_training_ends_the_process_at_once(name):
    process = listener("loading")
    process.send_signal(getattr(signal, name))
    _, log = process.communicate(timeout=5)
    assert process.returncode == 75
    assert f"{name.replace('SIGINT', 'Ctrl-C')}: stopped outside of training.\nThe same command goes on: " in log


def test_second_ctrl_c_stops_at_once_and_one_that_came_twice_does_not():
    process = listener("training")
    for _ in range(2):  # as from the terminal, and from the launcher that passes it on
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=5)
    assert process.returncode == 130
    assert log.count("Ctrl-C: the run stops") == 1
    assert "Ctrl-C a second time: stopped without a checkpoint." in log


def test_signal_that_is_ignored_at_the_start_stays_ignored():
    """As under nohup."""
    process = listener("loading", ignored=[signal.SIGHUP])
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 75


# What aborts a process while Python takes its objects apart, as a thread of gloo that holds a tensor then does.
ABORTS_AT_THE_END = """
import atexit, os, sys, threading, time
from orpo_trl import interruptions
interruptions.listen()

class Aborts:
    def __del__(self):
        os.abort()

aborts = Aborts()
atexit.register(print, "exit handlers have run")
with interruptions.reported():
    threading.Thread(target=lambda: (time.sleep(0.3), print("threads are done"))).start()
    exec(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("last", "status", "message"),
    [
        ("pass", 0, ""),
        ("sys.exit(75)", 75, ""),
        ("sys.exit('wrong')", 1, "wrong\n"),
        ("raise ValueError('wrong')", 1, "Traceback"),
    ],
)
def test_rank_ends_with_its_own_status_whatever_would_abort_it_at_the_end(last, status, message):
    command = [sys.executable, "-c", ABORTS_AT_THE_END, last]
    ended = subprocess.run(command, env={**TRAIN_ENVIRONMENT, "LOCAL_RANK": "0"}, capture_output=True, text=True)
    assert ended.returncode == status
    assert ended.stderr.startswith(message) if message else ended.stderr == ""
    assert ended.stdout == "threads are done\nexit handlers have run\n"
    alone = subprocess.run(command, env=TRAIN_ENVIRONMENT, capture_output=True, text=True)
    assert alone.returncode == -signal.SIGABRT  # so the process above would have been aborted as well


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>/dev/full"])
def test_rank_ends_so_where_its_output_goes_nowhere(closed):
    command = ["bash", "-c", f'exec "$@" {closed}', "bash", sys.executable, "-c", ABORTS_AT_THE_END, "sys.exit(75)"]
    assert subprocess.run(command, env={**TRAIN_ENVIRONMENT, "LOCAL_RANK": "0"}).returncode == 75


# A rank that has found a problem, with the main process so many seconds behind it.
HAS_A_PROBLEM = """
import sys
from orpo_trl import interruptions
interruptions.listen()
interruptions.training(True)
interruptions._MAIN_IS_BEHIND = float(sys.argv[1])
with interruptions.reported():
    print("ready", flush=True)
    interruptions.let_main_tell(2)
    sys.exit("the problem")
"""


def has_a_problem(rank, seconds):
    process = subprocess.Popen(
        [sys.executable, "-c", HAS_A_PROBLEM, str(seconds)], env={**TRAIN_ENVIRONMENT, "RANK": rank}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


def test_other_rank_tells_its_problem_only_where_the_main_one_has_none():
    main, *others = (has_a_problem(rank, seconds) for rank, seconds in [("0", 60), ("1", 60), ("2", 0)])
    assert main.communicate(timeout=5)[1] == "the problem\n"
    assert others[1].communicate(timeout=5)[1] == "the problem\n"
    assert others[0].poll() is None
    others[0].send_signal(signal.SIGTERM)  # as a launcher does
    assert others[0].communicate(timeout=5)[1] == ""
    assert others[0].returncode == 2  # a job that returned 75 would be queued again


@pytest.mark.parametrize("way", ["ORPO_TRL_REPORTS", "LOCAL_RANK"])
def test_process_ends_when_its_launcher_is_killed(way, tmp_path):
    """Under `orpo-trl train` at once; under a bare launcher by SIGTERM, which outside of training ends it as well."""
    code = "import subprocess, sys; p = subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True); p.wait()"
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, sys.executable, "-c", LISTENER, "loading"], text=True, stdout=subprocess.PIPE,
        env={**TRAIN_ENVIRONMENT, way: str(tmp_path)},
    )  # fmt: skip
    rank = psutil.Process(int(launcher.stdout.readline()))
    assert launcher.stdout.readline() == "ready\n"
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    assert psutil.wait_procs([rank], 5)[1] == []
    if way == "ORPO_TRL_REPORTS":
        assert json.loads((tmp_path / "0.json").read_text())["status"] is None
