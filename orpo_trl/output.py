"""Standard output for the answers of a command alone. Whatever else is printed goes to standard error."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

import click

from orpo_trl.printable import printable

_STDOUT, _STDERR = 1, 2
# Where answers go while standard output is reserved, and what `sys.stdout` was before.
_answers: TextIO | None = None
_stdout: TextIO | None = None


@contextmanager
def reserved() -> Iterator[None]:
    """Inside, only `answer` writes to standard output: `print` of any library, C code and child processes do not.

    File descriptor 1 and `sys.stdout` are pointed at standard error, and restored at the end.
    """
    global _answers, _stdout
    stdout = _stdout = sys.stdout
    # A test, or a program that calls `main`, may have a `sys.stdout` that is no file.
    has_descriptor = _descriptor(stdout) == _STDOUT
    _answers = stream = _copy(stdout) if has_descriptor else stdout or io.StringIO()
    if has_descriptor:
        _point_at_stderr()
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        if has_descriptor:
            release()
            with suppress(BrokenPipeError):  # nobody reads the rest
                stream.close()
        sys.stdout, _answers = stdout, None


def answer(text: str, end: str = "\n", color: bool | None = None) -> None:
    """Write text to the standard output that the command was started with; a terminal obeys nothing in it but, with
    `color`, colours."""
    click.echo(printable(text, has_colors=bool(color)) + end, file=_answers, nl=False, color=color)


def is_terminal() -> bool:
    """Whether answers go to a terminal."""
    stream = _answers or sys.stdout
    return stream is not None and stream.isatty()


def release() -> None:
    """Let everything write to the real standard output again: for a program that takes this one's place."""
    if _answers is not None and _descriptor(_answers) is not None:
        os.dup2(_answers.fileno(), _STDOUT)
        sys.stdout = _stdout


def close() -> None:
    """Point standard output at standard error for good: libraries also print when Python exits."""
    if _descriptor(sys.stdout) == _STDOUT:
        sys.stdout.flush()
        _point_at_stderr()
        sys.stdout = sys.stderr


def _point_at_stderr() -> None:
    if _descriptor(sys.stderr) == _STDERR:
        os.dup2(_STDERR, _STDOUT)
    else:  # closed at the start: its number may be another file's by now
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, _STDOUT)
        os.close(nowhere)


def _descriptor(stream: TextIO | None) -> int | None:
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError):  # not a file, or closed
        return None


def _copy(stdout: TextIO) -> TextIO:
    stdout.flush()
    return os.fdopen(os.dup(_STDOUT), "w", encoding=stdout.encoding, errors=stdout.errors)
