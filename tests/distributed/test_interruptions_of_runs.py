"""Two processes under ZeRO-3 that are interrupted, killed and stopped: real processes, and what the user sees."""

import json
import signal
import time

import psutil
import pytest
from support.runs import ZERO3, Run, last_step

pytestmark = pytest.mark.slow
LONG = ["--max_steps", "400", "--save_strategy", "no"]


def assert_gone(processes: list[psutil.Process], seconds: float) -> None:
    _, alive = psutil.wait_procs(processes, seconds)
    assert alive == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_signal_stops_all_ranks_at_the_same_step_with_a_checkpoint(name, tmp_path):
    run = Run(tmp_path / "out", *LONG, *ZERO3)
    run.wait_for_step(2)
    run.send(getattr(signal, name))
    at = run.steps()[-1]
    assert run.wait(60) == 75
    step = last_step(run.output)
    assert at <= step <= at + 3  # the one that runs, the one that agrees, and one that was not written yet
    assert run.steps() == list(range(1, step + 1))
    log = run.log()
    assert f"{name}: the run stops at the end of this optimiser step, with a checkpoint." in log
    assert f"Stopped after step {step} ({name}). Checkpoint: {run.output / f'checkpoint-{step}'}" in log
    assert "The same command goes on: orpo-trl train quickstart --report_to none" in log
    assert "Traceback" not in log
    assert "Saved the model" not in log
    assert "finished" not in json.loads((run.output / "run.json").read_text())


def test_second_ctrl_c_stops_at_once(tmp_path):
    run = Run(tmp_path / "out", *LONG, *ZERO3)
    run.wait_for_step(1)
    ranks = run.ranks()
    for rank in ranks:  # so that no checkpoint can be written before the second
        rank.suspend()
    run.send(signal.SIGINT)
    time.sleep(0.5)
    assert run.process.poll() is None
    run.send(signal.SIGINT)
    assert run.wait(10) == 130
    assert_gone(ranks, 10)
    assert "Ctrl-C a second time: stopped without a checkpoint." in run.log()
    assert "Traceback" not in run.log()


def test_stop_after_stops_all_ranks(tmp_path):
    run = Run(tmp_path / "out", *LONG, *ZERO3, "--stop_after", "25s")
    assert run.wait(90) == 75
    assert "(`stop_after: 25s`). Checkpoint: " in run.log()
    assert last_step(run.output) == run.steps()[-1]


def test_killed_rank_ends_the_run_and_is_named(tmp_path):
    run = Run(tmp_path / "out", *LONG, *ZERO3)
    run.wait_for_step(1)
    ranks = run.ranks()
    victim = next(rank for rank in ranks if rank.environ()["RANK"] == "1")
    victim.kill()
    assert run.wait(60) == 1
    assert_gone(ranks, 5)
    log = run.log()
    assert f"rank 1 (process {victim.pid} on " in log
    assert "was ended by SIGKILL" in log
    assert "orpo-trl train: the run failed in optimiser step " in log
    assert "ChildFailedError" not in log


def test_stopped_rank_ends_the_run_within_a_minute_and_is_named(tmp_path):
    run = Run(tmp_path / "out", *LONG, *ZERO3)
    run.wait_for_step(1)
    ranks = run.ranks()
    ranks[1].suspend()
    assert run.wait(60) == 1
    assert_gone(ranks, 5)
    assert f"(process {ranks[1].pid} on " in run.log()
    assert "has been stopped (SIGSTOP) for 40 seconds." in run.log()


def test_ranks_end_with_their_launcher(tmp_path):
    run = Run(tmp_path / "out", *LONG, *ZERO3)
    run.wait_for_step(1)
    ranks = run.ranks()
    assert len(ranks) == 2
    run.process.kill()
    assert_gone(ranks, 5)


def test_a_data_worker_that_is_killed_ends_the_run_and_the_same_command_goes_on(tmp_path):
    words = ["--dataloader_num_workers", "1", "--max_steps", "60", "--save_strategy", "steps", "--save_steps", "2"]
    run = Run(tmp_path / "out", *words)
    run.wait_for_step(4)
    (worker,) = psutil.Process(run.process.pid).children()  # a fork
    worker.kill()
    assert run.wait(60) == 1
    assert "DataLoader worker" in run.log()
    assert "The same command goes on from the latest checkpoint." in run.log()
    assert "Traceback" not in run.log()
    again = Run(tmp_path / "out", *words)
    assert again.wait() == 0, again.log()
    assert "Going on with the run in" in again.log()
