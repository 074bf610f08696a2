"""scripts/slurm/train.sbatch through a time limit, a requeue and a cancelled job.

SLURM's own programs are stood in for: what they are asked for, what they set and what they pass on is from its manual.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.processes import ORPO_TRL, TRAIN_ENVIRONMENT
from support.runs import QUIET, as_in_a_terminal, last_step, same_weights
from support.small import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "slurm" / "train.sbatch"
# `srun` passes signals on to the processes of its tasks.
SRUN = """
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & task=$!
trap 'kill -USR1 $task' USR1; trap 'kill -TERM $task' TERM
while :; do wait $task; status=$?; kill -0 $task 2>/dev/null || break; done
wait $task 2>/dev/null; last=$?; [ $last -ne 127 ] && status=$last
exit $status
"""
SCONTROL = 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$STAND_INS/requeued"; fi'


class Cluster:
    """A folder of stand-ins, first on PATH."""

    def __init__(self, folder: Path, **programs: str):
        self.folder = folder
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, **programs}.items():
            (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (folder / name).chmod(0o755)

    def start(self, *arguments: str) -> subprocess.Popen:
        """The job, as SLURM starts it and starts it again."""
        environment = {
            **TRAIN_ENVIRONMENT, "PATH": f"{self.folder}:{Path(ORPO_TRL).parent}:{os.environ['PATH']}",
            "STAND_INS": str(self.folder), "SLURM_NNODES": "1", "SLURM_GPUS_PER_NODE": "1", "SLURM_JOB_ID": "41234",
            "SLURM_JOB_NODELIST": "localhost",
        }  # fmt: skip
        with open(self.folder / "job.log", "a") as log:  # as with --open-mode=append
            return subprocess.Popen(
                ["bash", str(SCRIPT), *arguments], cwd=REPOSITORY, env=environment, stdout=log, stderr=log,
                preexec_fn=as_in_a_terminal,
            )  # fmt: skip

    @property
    def requeued(self) -> str:
        path = self.folder / "requeued"
        return path.read_text() if path.is_file() else ""

    def log(self) -> str:
        return (self.folder / "job.log").read_text()


def stand_in_for_a_run(status: int, on: str) -> str:
    """A program in place of `orpo-trl` that ends with `status` a moment after signal `on`."""
    return f'trap "sleep 0.3; exit {status}" {on}; echo started; while :; do sleep 0.05; done'


def wait_for(is_true, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("status", "number", "requeued"),
    [(75, signal.SIGUSR1, "requeue 41234\n"), (75, signal.SIGTERM, ""), (1, signal.SIGUSR1, "")],
    ids=["time limit", "scancel", "failure"],
)
def test_job_is_queued_again_after_a_checkpoint_and_not_after_scancel(status, number, requeued, tmp_path):
    cluster = Cluster(tmp_path, **{"orpo-trl": stand_in_for_a_run(status, number.name.removeprefix("SIG"))})
    job = cluster.start("quickstart")
    wait_for(lambda: "started" in cluster.log())
    job.send_signal(number)
    assert job.wait(10) == status
    assert cluster.requeued == requeued


def test_slurm_is_asked_for_a_signal_before_the_limit_and_may_requeue():
    lines = SCRIPT.read_text().splitlines()
    for option in ("--requeue", "--signal=B:USR1@300", "--open-mode=append"):
        assert f"#SBATCH {option}" in lines


@pytest.mark.parametrize("status", [0, 2])
def test_status_of_the_run_is_that_of_the_job(status, tmp_path):
    cluster = Cluster(tmp_path, **{"orpo-trl": f"exit {status}"})
    assert cluster.start("quickstart").wait(10) == status
    assert cluster.requeued == ""


@pytest.mark.slow
def test_job_that_is_queued_again_ends_with_the_weights_of_one_that_was_not(tmp_path):
    def words(output):
        return [*QUIET, "--max_steps", "80", "--save_strategy", "steps", "--save_steps", "50", "--output_dir", output]

    cluster, output = Cluster(tmp_path), tmp_path / "out"
    job = cluster.start("quickstart", *words(str(output)))
    wait_for(lambda: (output / "metrics.jsonl").is_file())
    job.send_signal(signal.SIGUSR1)
    assert job.wait(300) == 75, cluster.log()
    assert cluster.requeued == "requeue 41234\n"
    assert last_step(output) < 80
    assert cluster.start("quickstart", *words(str(output))).wait(300) == 0, cluster.log()
    assert cluster.requeued == "requeue 41234\n"
    assert cluster.start("quickstart", *words(str(tmp_path / "whole"))).wait(300) == 0
    assert same_weights(output, tmp_path / "whole")
