"""`orpo-trl train` as the parent of its ranks, and how many processes there should be."""

import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
from support.processes import TRAIN_ENVIRONMENT, launch
from support.runs import QUIET, SCRIPT, Run, as_in_a_terminal
from torch.distributed import TCPStore

from orpo_trl import processes
from orpo_trl.processes import Report, asked_processes, world_problem
from orpo_trl.supervisor import _first_lost

# A launcher whose "accelerate" is a program of this test: it starts processes that end as they are told.
LAUNCHER = """
import importlib.metadata, os, subprocess, sys
from orpo_trl.supervisor import Supervisor
from orpo_trl.watch import Machines

class Accelerate:
    def load(self):
        def run():
            code = "import sys; from orpo_trl import interruptions as i; i.listen(); i.training(True)\\n"
            code += "with i.reported():\\n    exec(sys.argv[2])"
            ranks = [
                subprocess.Popen([sys.executable, "-c", code, "run_orpo.py", text], env={**os.environ, "RANK": str(n)})
                for n, text in enumerate(sys.argv[1:])
            ]
            sys.exit(any([rank.wait() for rank in ranks]))
        return run

# torch looks for its backends in the same way
importlib.metadata.entry_points = lambda group, **kwargs: [Accelerate()] if group == "console_scripts" else []
machines = Machines(2, 0, "127.0.0.1", int(os.environ["PORT"])) if "PORT" in os.environ else Machines()
sys.exit(Supervisor(["accelerate", *sys.argv[1:]], ["orpo-trl", "train", "my recipe"], machines).run())
"""


def supervise(*ranks: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *ranks], env=TRAIN_ENVIRONMENT | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=as_in_a_terminal,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "status"),
    [
        (["pass", "pass"], 0),
        (["sys.exit(2)", "import time; time.sleep(0.5); sys.exit(1)"], 2),  # the first is the cause of the others
        (["sys.exit(75)", "sys.exit(75)"], 75),
        (["sys.exit(1)"], 1),
        (["raise ValueError('of a library')"], 1),
        (["import os; os.kill(os.getpid(), 9)"], 1),
    ],
    ids=["done", "wrong input", "try again", "failed", "exception", "killed"],
)
def test_exit_status_is_that_of_the_rank_that_ended_first(ranks, status):
    process = supervise(*ranks)
    _, log = process.communicate(timeout=20)
    assert process.returncode == status, log
    assert ("The same command goes on: orpo-trl train 'my recipe'" in log) == (status == 75)
    assert ("orpo-trl train: the run failed before the first optimiser step: rank 0 (process " in log) == (status == 1)


def test_signal_is_passed_on_and_a_second_ctrl_c_kills():
    wait = "import time; print('ready', flush=True)\nwhile not i.asked(): time.sleep(0.01)\nsys.exit(75)"
    process = supervise(wait)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    _, log = process.communicate(timeout=10)
    assert process.returncode == 75, log
    deaf = "import time; print('ready', flush=True); time.sleep(60)"
    process = supervise(deaf)
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    _, log = process.communicate(timeout=10)
    assert process.returncode == 130, log


@pytest.mark.slow
def test_wrong_input_is_told_to_the_other_machines(tmp_path):
    """Else SLURM ends them with a signal, they return 75, and it queues the job again without end."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    wait = f"import os, time\nwhile not os.path.exists({str(tmp_path / 'end')!r}): time.sleep(0.05)\nsys.exit(2)"
    process = supervise(wait, PORT=str(store.port))
    store.wait(["orpo_trl/beat/0"], timedelta(seconds=60))
    (tmp_path / "end").touch()
    _, log = process.communicate(timeout=60)
    assert process.returncode == 2, log
    assert b"rank 0 (process " in store.get("orpo_trl/lost")
    assert b" ended with status 2. Its error is in the log of its machine." in store.get("orpo_trl/lost")


def test_lost_rank_is_named_before_those_that_it_took_along():
    class Failure:
        def __init__(self, exitcode, timestamp):
            self.exitcode, self.timestamp = exitcode, timestamp

    class ChildFailedError(Exception):
        failures = {0: Failure(-9, 40), 1: Failure(-11, 10)}  # noqa: RUF012

    reports = [Report(0, 70, "a"), Report(1, 71, "a")]
    assert _first_lost(ChildFailedError(), reports) == "rank 1 (process 71 on a) was ended by SIGSEGV."


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ("accelerate launch --num_processes 4 run_orpo.py r.yaml", 4),
        ("accelerate launch --num-processes=4 --cpu run_orpo.py r.yaml", 4),
        ("accelerate launch run_orpo.py r.yaml --num_processes 4", None),  # an override of the recipe
        ("accelerate launch --config_file recipes/accelerate/cpu_zero3.yaml run_orpo.py r.yaml", 2),
        ("accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 3 run_orpo.py r.yaml", 3),
        ("accelerate launch --config_file absent.yaml run_orpo.py", None),
    ],
)
def test_number_of_processes_that_accelerate_was_asked_for(words, number):
    assert asked_processes(words.split()) == number


@pytest.mark.parametrize(
    ("name", "asked"), [(processes.NUM_PROCESSES, "`--num_processes`"), ("WORLD_SIZE", "WORLD_SIZE")]
)
def test_other_number_of_processes_than_asked_for_is_refused(name, asked, monkeypatch):
    for variable in (processes.NUM_PROCESSES, "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    assert world_problem(1) is None
    monkeypatch.setenv(name, "2")
    assert world_problem(2) is None
    problem = world_problem(1)
    assert problem is not None
    assert f"expected 2 processes, as {asked} says, received 1" in problem


@pytest.mark.slow
def test_accelerate_that_starts_one_process_in_place_of_two_is_refused(tmp_path):
    """On a CPU, accelerate starts several processes under some configs only, and says nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", str(SCRIPT),
         "recipes/quickstart.yaml", *QUIET, "--output_dir", str(tmp_path)],
        env=TRAIN_ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1  # accelerate's word for every failure
    assert "run_orpo.py: expected 2 processes, as `accelerate launch` says, received 1: each would train" in done.stderr
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
def test_wrong_input_has_its_status_and_one_message(tmp_path):
    run = Run(tmp_path / "out", "--dataset_name", "./absent.jsonl", "--engine", "zero3", "--num_processes", "2")
    assert run.wait() == 2
    assert run.log().count("run_orpo.py: The dataset './absent.jsonl' does not exist") == 1
    assert "Traceback" not in run.log()


@pytest.mark.slow
def test_bare_script_under_torchrun_stops_all_ranks(tmp_path):
    done = launch(
        SCRIPT, "recipes/quickstart.yaml", *QUIET, "--max_steps", "500", "--stop_after", "20s", "--save_strategy", "no",
        "--output_dir", str(tmp_path), engine="ddp", check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Stopped after step " in done.stderr
    assert "The same command goes on: " in done.stderr
