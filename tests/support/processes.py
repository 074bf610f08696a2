"""Starts real processes on the CPU: one, or two under a distributed strategy."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import yaml

from support.small import REPOSITORY

ENGINES = REPOSITORY / "recipes" / "accelerate"
ORPO_TRL = str(Path(sys.executable).with_name("orpo-trl"))
TRAIN_ENVIRONMENT = {
    **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
}  # fmt: skip


def cpu_engine(name: str, folder: Path) -> Path:
    """The shipped accelerate config `name`, for two processes on a CPU."""
    config = yaml.safe_load((ENGINES / f"{name}.yaml").read_text())
    config |= {"use_cpu": True, "num_processes": 2, "num_machines": 1, "mixed_precision": "no"}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def launch(
    script: Path | str, *arguments: str, engine: Path | str | None = None, check: bool = True, processes: int = 2,
    environment: dict | None = None,
):  # fmt: skip
    """Runs a script in one process, under `accelerate launch` with a config, or, for "ddp", under torchrun.

    Args:
        processes: under torchrun.
        environment: variables of all processes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable]
    if engine == "ddp":
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
    elif engine is not None:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(engine), "--main_process_port", port]
    done = subprocess.run(
        [*command, str(script), *arguments],
        cwd=REPOSITORY,
        env={**TRAIN_ENVIRONMENT, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=900,
    )
    if check and done.returncode:
        raise AssertionError(f"{command} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def train(job: dict, engine: Path | str | None = None, processes: int = 2) -> dict:
    """Runs tests/support/run_job.py and returns its result, with all that it printed."""
    output = Path(job["output_dir"])
    script = REPOSITORY / "tests" / "support" / "run_job.py"
    done = launch(script, json.dumps(job, default=str), engine=engine, processes=processes)
    return {**json.loads((output / "result.json").read_text()), "stdout": done.stdout + done.stderr}


def end_rank(trainer) -> NoReturn:
    """Ends a process of several as scripts/run_orpo.py does: a thread of gloo may abort Python's own end."""
    trainer.accelerator.end_training()
    sys.stdout.flush()
    os._exit(0)
