"""Signals that ask a run to stop: SIGTERM, SIGHUP, SIGUSR1, and Ctrl-C.

For the process of scripts/run_orpo.py alone: `ORPOTrainer` installs no handler, and a program that wants these calls
`listen` itself. A handler only takes a note; `callbacks/stop.py` acts on it at the end of an optimiser step, when all
ranks have heard of it. Outside of training there is nothing to save, and the process ends at once.

Imports no torch: a rank calls `listen` before anything else.
"""

import atexit
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

from orpo_trl import exit_codes, processes

STOPS = "the run stops at the end of this optimiser step, with a checkpoint."
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
# A launcher passes Ctrl-C on to processes that have got it from the terminal already.
_SAME_PRESS = 1.0  # seconds
# How far the main process may be behind another rank.
_MAIN_IS_BEHIND = 30.0  # seconds


class _Process:
    """The state of this process; signals are a matter of processes."""

    def __init__(self):
        self.asked: str | None = None
        self.is_training = False
        self.problem: int | None = None
        self.started = time.monotonic()
        self.reporter: processes.Reporter | None = None
        self.first_press: float | None = None
        self.previous: dict[int, object] = {}
        self.given: list[str] = []


_this = _Process()


def listen(given: Sequence[str] = ()) -> None:
    """Handle the signals in this process, and tell its launcher how it ends. Call this in the main thread.

    A signal that is ignored when the process starts stays ignored, as under nohup.

    Args:
        given: what the user has typed, to say how to go on. Default: the command line of this process, or of the
            launcher that has started it.
    """
    if _this.reporter is not None:
        return
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("`listen` must be called in the main thread: only there can Python handle signals.")
    _this.started = time.monotonic()
    _this.given = list(given)
    _this.reporter = processes.Reporter()
    for number in SIGNALS:
        if _is_supervised() or signal.getsignal(number) is not signal.SIG_IGN:
            _this.previous[number] = signal.signal(number, _on_signal)
    os.register_at_fork(after_in_child=_forget)
    if processes.is_launched():
        atexit.register(_leave_at_once)  # the first to be registered is the last to be called
    processes.end_with_launcher()


@contextmanager
def reported() -> Iterator[None]:
    """Tells the launcher how this process ends: `orpo-trl train` returns it, where accelerate knows only 1.

    The last thing of a program: a rank ends with the status that is told here.
    """
    status = exit_codes.FAILED
    try:
        yield
        status = exit_codes.DONE
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else exit_codes.FAILED if ended.code else exit_codes.DONE
        raise
    except Exception:
        if not processes.another_has_failed():
            raise
        # It waited for the other one, whose message is there. A traceback of every rank would hide it.
        sys.exit(status)
    finally:
        if _this.reporter is not None:
            _this.reporter.end(status)


def asked() -> str | None:
    """The name of the first signal that has asked this process to stop."""
    return _this.asked


def seconds() -> float | None:
    """How long this process has run, from `listen`; None where it does not listen."""
    return None if _this.reporter is None else time.monotonic() - _this.started


def training(is_training: bool) -> None:
    """Say whether there are steps to save. Where not, a signal ends this process at once."""
    _this.is_training = is_training


def at_step(step: int) -> None:
    """Tell the launcher the optimiser step that begins, from 1."""
    if _this.reporter is not None:
        _this.reporter.at_step(step)


def stop_if_asked() -> None:
    """End this process where a signal came too late for training to hear of it."""
    if _this.asked is not None:
        _end(exit_codes.TRY_AGAIN, f"{_this.asked}: stopped before the model was saved.")


def leave(text: str) -> NoReturn:
    """End this process after its checkpoint is written; all ranks call this at the same time."""
    for number in _this.previous:  # the launcher ends all ranks as soon as the first has ended
        signal.signal(number, signal.SIG_IGN)
    say(f"{text}{_how_to_go_on()}")
    sys.exit(exit_codes.TRY_AGAIN)


def let_main_tell(status: int) -> None:
    """Wait for the main process to tell the problem that all ranks have. Returns where only this rank has it.

    The launcher ends all ranks as soon as one has ended. So this rank must not end before the main process, which may
    still import, has told the problem. When it has, the launcher ends this rank while it waits.

    Args:
        status: with which a signal now ends this process at once. It is not one to try again.
    """
    if processes.rank() == 0:
        return
    _this.problem = status
    if _this.asked is None:
        # Where the main one is on another machine, the first rank of this machine tells it, and alone.
        time.sleep(_MAIN_IS_BEHIND + processes.local_rank())


def say(text: str) -> None:
    """Write a line of the main process to standard error, from a signal handler too."""
    if processes.rank() == 0:
        os.write(2, f"\n{text}\n".encode())  # `print` may be in the middle of a line of its own


def _is_supervised() -> bool:
    """Whether `orpo-trl train` runs this process. It says itself which signal came, and how to go on."""
    return processes.REPORTS in os.environ


def _how_to_go_on() -> str:
    if _is_supervised():
        return ""
    words = _this.given or processes.launch_words() or [sys.executable, *sys.argv]
    return f"\nThe same command goes on: {shlex.join(words[1:] if _is_python(words[0]) else words)}"


def _is_python(word: str) -> bool:
    return os.path.basename(word).startswith("python")


def _on_signal(number: int, frame: object) -> None:
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    if number == signal.SIGINT and not _is_supervised():
        if _this.first_press is not None and time.monotonic() - _this.first_press > _SAME_PRESS:
            _end(exit_codes.INTERRUPTED, "Ctrl-C a second time: stopped without a checkpoint.")
        _this.first_press = _this.first_press or time.monotonic()
    if _this.problem is not None:
        _end(_this.problem, f"{name}: stopped.")
    if not _this.is_training:
        _end(exit_codes.TRY_AGAIN, f"{name}: stopped outside of training.")
    if _this.asked is None:
        _this.asked = name
        if not _is_supervised():
            say(f"{name}: {STOPS}")
    if processes.is_launched() and not _is_supervised():
        # The launcher may be gone before the checkpoint is written.
        processes.set_death_signal(0)


def _forget() -> None:
    """In a forked process, such as a data worker: SIGTERM ends it, and the others are its parent's affair."""
    for number in _this.previous:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


def _leave_at_once() -> None:
    """End a rank once its threads and exit handlers are done, before Python takes its objects apart.

    A thread of gloo may still hold a tensor then. It waits for Python's lock to let go of it, and Python ends such a
    thread in a way that aborts the process: a run that has saved its model would be reported as failed.
    """
    status = _this.reporter.report.status if _this.reporter is not None else None
    if status is not None:
        _exit(status)


def _exit(status: int) -> NoReturn:
    """End this process without Python's own end."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # closed, or nobody reads it
            stream.flush()
    os._exit(status)


def _end(status: int, text: str) -> NoReturn:
    # Not `sys.exit`: from a handler, any `except` or `finally` of a library could swallow it or wait.
    if not _is_supervised():
        say(f"{text}{_how_to_go_on() if status == exit_codes.TRY_AGAIN else ''}")
    if _this.reporter is not None:
        _this.reporter.end(status)
    _exit(status)
