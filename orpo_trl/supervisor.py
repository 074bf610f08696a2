"""`orpo-trl train` as the parent of its ranks: it starts them as `accelerate launch` does, passes signals on to them,
and ends with their exit status and one message.

accelerate's launcher runs in this process, so the ranks are its children: they end when it does (`processes.py`), and
each leaves a report in a private folder. What accelerate itself would do is in the way of a checkpoint: its agent kills
ranks 30 seconds after a SIGTERM, and turns every exit status into 1.
"""

import importlib.metadata
import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from orpo_trl import exit_codes, processes
from orpo_trl.interruptions import SIGNALS, STOPS
from orpo_trl.network import set_interface, wait_for_main_machine
from orpo_trl.paths import RUN_SCRIPT
from orpo_trl.watch import Machines, Watch


class Supervisor:
    """Runs one `accelerate launch` command line in this process.

    Args:
        command: the command line, from `launch_command`.
        given: what the user has typed, to say how to go on.
        machines: of the run.
    """

    def __init__(self, command: Sequence[str], given: Sequence[str], machines: Machines):
        self._command = list(command)
        self._given = shlex.join(given)
        self._folder = Path(tempfile.mkdtemp(prefix="orpo-trl-"))
        self._asked: str | None = None
        self._presses = 0
        self._lost: str | None = None
        self._machines = machines
        self._watch = Watch(self._folder, machines, self._lose)

    def run(self) -> int:
        """Start the ranks, wait for them, and return the run's exit status. Call this in the main thread."""
        self._set_environment()
        before = {
            number: signal.signal(number, self._on_signal)
            for number in SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            self._reach_main_machine()
            self._watch.start()
            return self._conclude(self._launch())
        except ConnectionError as error:
            _say(f"orpo-trl train: {error}")
            return exit_codes.FAILED
        finally:
            self._watch.close()
            for number, handler in before.items():
                signal.signal(number, handler)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _set_environment(self) -> None:
        asked = processes.asked_processes(self._command)
        os.environ[processes.LAUNCHER] = str(os.getpid())
        os.environ[processes.REPORTS] = str(self._folder)
        if asked is not None:
            os.environ[processes.NUM_PROCESSES] = str(asked)
        # torch's agent must leave the signals of `SIGNALS` to this process. It cannot be told to handle none.
        os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"

    def _reach_main_machine(self) -> None:
        """Find the way to machine 0. Raises ConnectionError where there is none."""
        own = self._machines
        if own.number > 1:
            set_interface(own.address)
            if own.rank:
                wait_for_main_machine(own.address, own.port, _say)

    def _launch(self) -> BaseException | None:
        """Run accelerate's console script; returns what it raised."""
        # What the agent logs of lost ranks, and accelerate's traceback of it, say less than `_conclude`.
        logging.getLogger("torch.distributed.elastic").addHandler(logging.NullHandler())
        logging.getLogger("torch.distributed.elastic").propagate = False
        (script,) = importlib.metadata.entry_points(group="console_scripts", name="accelerate")
        arguments, sys.argv = sys.argv, self._command
        try:
            script.load()()
        except (Exception, SystemExit) as error:
            is_fine = isinstance(error, SystemExit) and not error.code
            return None if is_fine else error
        finally:
            sys.argv = arguments
        return None

    # ---- Signals -----------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int, frame: object) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        self._presses += number == signal.SIGINT
        if self._presses > 1:
            self._kill()
            _say("Ctrl-C a second time: stopped without a checkpoint.")
            self._leave(exit_codes.INTERRUPTED)
        ranks = self._ranks()
        if self._asked is None:
            self._asked = name
            is_training = processes.read_step(self._folder) is not None
            again = " Ctrl-C again stops it at once." if number == signal.SIGINT else ""
            _say(f"{name}: {STOPS}{again}" if is_training else f"{name}: stopped outside of training.")
        if not ranks:  # the ranks do not exist yet
            _say(self._how_to_go_on())
            self._leave(exit_codes.TRY_AGAIN)
        for rank in ranks:
            _send(rank, number)

    def _ranks(self) -> list[psutil.Process]:
        """The processes that run the script, of this machine."""
        return [child for child in psutil.Process().children() if _runs_script(child)]

    def _kill(self) -> None:
        for child in psutil.Process().children(recursive=True):
            _send(child, signal.SIGKILL)

    def _lose(self, text: str) -> None:
        """A rank or a machine is lost: the ranks that wait for it are killed, and torch's agent sees that."""
        self._lost = text
        for rank in self._ranks():
            _send(rank, signal.SIGKILL)

    def _leave(self, status: int) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(status)

    # ---- The end -----------------------------------------------------------------------------------------------------

    def _conclude(self, error: BaseException | None) -> int:
        """The exit status of the run, and a message for the user where it did not end well."""
        reports = processes.read_reports(self._folder)
        if error is None:
            return exit_codes.DONE
        if self._lost is None:
            self._watch.end()
        ended = [report for report in reports if report.status]
        first = min(ended, key=lambda report: report.ended or 0, default=None)
        status = first.status if first is not None and first.status and self._lost is None else exit_codes.FAILED
        if self._asked is not None and not ended and self._lost is None:
            status = exit_codes.TRY_AGAIN  # before the ranks could hear of it
        if status == exit_codes.TRY_AGAIN:
            _say(self._how_to_go_on())
        elif status == exit_codes.FAILED:
            text = self._failure(error, reports)
            _say(text)
            if self._lost is None:
                self._watch.tell(text)
        elif first is not None:
            # The other machines wait for these ranks. The signal that ends them there would call for another try.
            self._watch.tell(f"{first} ended with status {status}. Its error is in the log of its machine.")
        return status

    def _how_to_go_on(self) -> str:
        return f"The same command goes on: {self._given}"

    def _failure(self, error: BaseException, reports: list[processes.Report]) -> str:
        if not reports:
            return f"orpo-trl train: the processes could not be started: {error or type(error).__name__}"
        step = processes.read_step(self._folder)
        where = "before the first optimiser step" if step is None else f"in optimiser step {step}"
        return f"orpo-trl train: the run failed {where}: {self._lost or _first_lost(error, reports)}"


def _first_lost(error: BaseException, reports: list[processes.Report]) -> str:
    """Which rank ended first, and how."""
    killed = {report.rank: report for report in reports if report.status is None}
    failures: dict[int, Any] = getattr(error, "failures", {})  # of torch's ChildFailedError
    for number, failure in sorted(failures.items(), key=lambda item: item[1].timestamp):
        if number in killed and failure.exitcode < 0:
            return f"{killed[number]} was ended by {signal.Signals(-failure.exitcode).name}."
    if killed:
        advice = "Was the machine out of memory? `dmesg` tells."
        return f"{next(iter(killed.values()))} ended without a word. {advice}"
    first = min(reports, key=lambda report: report.ended or 0)
    return f"{first} ended with status {first.status}. Its error is above."


def _runs_script(process: psutil.Process) -> bool:
    try:
        return any(Path(word).name == RUN_SCRIPT.name for word in process.cmdline())
    except psutil.Error:  # it has ended
        return False


def _send(process: psutil.Process, number: int) -> None:
    with suppress(psutil.Error):  # it has ended
        process.send_signal(number)


def _say(text: str) -> None:
    os.write(2, f"\n{text}\n".encode())  # from a signal handler too
