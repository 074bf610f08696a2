"""A run of `orpo-trl train`, or of the bare script, that a test interrupts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from support.processes import ORPO_TRL, TRAIN_ENVIRONMENT
from support.small import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "run_orpo.py"
QUIET = "--report_to none --logging_steps 1 --disable_tqdm true --eval_strategy no".split()
ZERO3 = ["--engine", "zero3", "--num_processes", "2"]


def as_in_a_terminal() -> None:
    """For `preexec_fn`: a shell's job in the background ignores Ctrl-C, and so would what a test starts from there."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


class Run:
    """A started run of the quickstart.

    Args:
        output: its output folder.
        arguments: flags and overrides.
        bare: start the script alone, without a launcher.
    """

    def __init__(self, output: Path, *arguments: str, bare: bool = False):
        self.output = output
        start = [sys.executable, str(SCRIPT), "recipes/quickstart.yaml"] if bare else [ORPO_TRL, "train", "quickstart"]
        self._log = open(output.parent / f"{output.name}.log", "a+")  # noqa: SIM115 (closed in `wait`)
        self.process = subprocess.Popen(
            [*start, *QUIET, "--output_dir", str(output), *arguments],
            cwd=REPOSITORY, env=TRAIN_ENVIRONMENT, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=as_in_a_terminal,
        )  # fmt: skip

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, in the order of their start."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in family if any(word.endswith("run_orpo.py") for word in p.cmdline())]

    def steps(self) -> list[int]:
        """The optimiser steps that metrics.jsonl has, in its order."""
        path = self.output / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [log["step"] for log in map(json.loads, lines) if "loss" in log]

    def wait_until(self, is_true: Callable[[], object], seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not is_true():
            assert self.process.poll() is None, f"ended with status {self.process.returncode}: {self.log()[-4000:]}"
            assert time.monotonic() < end, self.log()[-4000:]
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: self.steps()[-1:] >= [step])

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = 240) -> int:
        """Its exit status; fails where it does not end in time."""
        try:
            return self.process.wait(seconds)
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL to all of its processes that are left."""
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        for process in family:
            process.kill()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)

    def log(self) -> str:
        self._log.flush()
        return Path(self._log.name).read_text()


def last_step(output: Path) -> int:
    """The step of the newest checkpoint."""
    return max(int(path.name.partition("-")[2]) for path in output.glob("checkpoint-*") if path.is_dir())


def same_weights(one: Path, other: Path) -> bool:
    """Whether two folders hold the same final weights, bit for bit."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
