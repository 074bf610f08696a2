"""What the processes of a run owe each other: the launcher's death ends a rank, and a rank tells how it ended.

Imports no torch: a rank calls this before anything else.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

# Environment variables that `orpo-trl train` sets for its ranks.
# Its process id.
LAUNCHER = "ORPO_TRL_LAUNCHER"
# The private folder in which the ranks leave their reports.
REPORTS = "ORPO_TRL_REPORTS"
# The command line that the user has given, in words of a shell.
COMMAND = "ORPO_TRL_COMMAND"
# Processes of all machines together.
NUM_PROCESSES = "ORPO_TRL_NUM_PROCESSES"

# Variables of `accelerate launch`. A user may set the second one alone.
_OF_ACCELERATE = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_DEEPSPEED")

# Of prctl(2): the signal that this process gets when the thread that has started it ends.
_PR_SET_PDEATHSIG = 1


# ---- The launcher's death --------------------------------------------------------------------------------------------


def is_launched() -> bool:
    """Whether a launcher has started this process, not a shell or a notebook: torchrun, accelerate, DeepSpeed's own."""
    return any(name in os.environ for name in (REPORTS, "LOCAL_RANK", *_OF_ACCELERATE))


def launched_precision() -> str | None:
    """The `mixed_precision` of the accelerate config that has started this process: "no", "bf16", "fp16" or "fp8"."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION")


def end_with_launcher() -> None:
    """Let this process end when its launcher dies. Otherwise it would live on and hold its GPU.

    Under `orpo-trl train` it is killed at once. Under a bare `accelerate launch`, of one process, a SIGTERM ends the
    launcher and does not reach the process, so it gets the signal itself: it stops with a checkpoint.
    """
    if not is_launched() or not sys.platform.startswith("linux"):
        return
    set_death_signal(signal.SIGKILL if REPORTS in os.environ else signal.SIGTERM)
    if LAUNCHER in os.environ and not psutil.pid_exists(int(os.environ[LAUNCHER])):  # it died before the call
        os._exit(1)


def set_death_signal(number: int) -> None:
    """The signal that this process gets when its launcher dies; 0 for none."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


# ---- What a rank reports ---------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What a rank tells the process that has started it.

    Attributes:
        rank: its number among those of all machines.
        pid: of the process.
        host: name of its machine.
        status: how it ended (`exit_codes.py`); None while it runs.
        ended: when it ended, seconds of the system's clock.
    """

    rank: int
    pid: int
    host: str
    status: int | None = None
    ended: float | None = None

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Reporter:
    """Writes the report of this rank, and the optimiser step that it is at. Does nothing where nobody asked for it."""

    def __init__(self):
        folder = os.environ.get(REPORTS)
        self.report = Report(rank(), os.getpid(), socket.gethostname())
        self._path = Path(folder) / f"{self.report.rank}.json" if folder else None
        self._step: int | None = None
        if self._path is not None:
            self._write()
            self._step = os.open(self._path.with_suffix(".step"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def at_step(self, step: int) -> None:
        if self._step is not None:
            os.pwrite(self._step, b"%20d" % step, 0)

    def end(self, status: int) -> None:
        """Tell how this process ends. The first word counts."""
        if self.report.status is None:
            self.report.status, self.report.ended = status, time.time()
            if self._path is not None:
                self._write()

    def _write(self) -> None:
        assert self._path is not None
        # Renamed when it is whole: the reader may look at any moment.
        descriptor, name = tempfile.mkstemp(dir=self._path.parent, suffix=".part")
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(self.report), file)
        os.replace(name, self._path)


def read_reports(folder: Path) -> list[Report]:
    """The reports of this machine's ranks, in their order."""
    return sorted((Report(**json.loads(path.read_text())) for path in folder.glob("*.json")), key=lambda r: r.rank)


def another_has_failed() -> bool:
    """Whether another rank of this machine has told that it failed."""
    folder = os.environ.get(REPORTS)
    reports = read_reports(Path(folder)) if folder else []
    return any(report.status for report in reports if report.rank != rank())


def read_step(folder: Path) -> int | None:
    """The optimiser step that the ranks of this machine are at, from 1; None before the first."""
    steps = [int(text) for path in folder.glob("*.step") if (text := path.read_text().strip())]
    return max(steps, default=None)


def rank() -> int:
    """The number of this process among those of all machines, as launchers name it."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


# ---- How many there should be ----------------------------------------------------------------------------------------


def launch_words() -> list[str]:
    """The command line of the `accelerate launch` that has started this process; empty where none has."""
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent is not None else []
    except psutil.Error:
        return []
    names = [Path(word).name for word in words[:3]]
    is_accelerate = "accelerate" in names or "accelerate-launch" in names or "accelerate.commands.launch" in words
    return words if is_accelerate else []


def asked_processes(words: Sequence[str]) -> int | None:
    """Processes of all machines that an `accelerate launch` command line asks for.

    Args:
        words: of the command line, up to the script's own arguments or with them.

    Returns:
        The number of the flag, or of the config file; None where accelerate takes all GPUs.
    """
    from orpo_trl.yaml_text import from_yaml_of_others

    own = words[: next((i for i, word in enumerate(words) if i and word.endswith("run_orpo.py")), len(words))]
    flags: dict[str, str] = {}
    for position, word in enumerate(own):
        name, separator, value = word.partition("=")
        if name.startswith("--"):
            flags[name[2:].replace("-", "_")] = value if separator else (*own[position + 1 : position + 2], "")[0]
    if flags.get("num_processes", "").isdigit():
        return int(flags["num_processes"])
    if "config_file" not in flags:
        return None
    try:
        config = from_yaml_of_others(Path(flags["config_file"]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    number = config.get("num_processes") if isinstance(config, dict) else None
    return number if isinstance(number, int) and number > 0 else None


def world_problem(processes: int) -> str | None:
    """Why the number of processes of this run is not the one that was asked for; None where it is.

    Args:
        processes: as accelerate counts them.
    """
    asked: dict[str, int | None] = {}
    if NUM_PROCESSES in os.environ:
        asked["`--num_processes`"] = int(os.environ[NUM_PROCESSES])
    else:
        asked["`accelerate launch`"] = asked_processes(launch_words())
    asked["WORLD_SIZE"] = int(os.environ.get("WORLD_SIZE") or 0) or None
    for name, number in asked.items():
        if number is not None and number != processes:
            return (
                f"expected {number} processes, as {name} says, received {processes}: each would train a run of its "
                "own. On CPUs, and for several machines, start with `orpo-trl train --engine zero3 (or zero2, fsdp2)`, "
                "or with a config of recipes/accelerate/; a DeepSpeed config for several machines needs "
                "`deepspeed_multinode_launcher: standard`"
            )
    return None
