"""Answers as they are made, in a file beside the one that is wanted: a process that is killed loses few of them."""

import fcntl
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from orpo_trl.plain_files import MAX_RECORDS, appending, check_readable
from orpo_trl.run_folder import read_lines


@dataclass(frozen=True)
class Answer:
    """An answer to one turn.

    Attributes:
        index: of the conversation.
        turn: from 0.
        text: of the answer.
        tokens: of the answer; None where a server did not count them.
        seconds: when it was there, since 1970.
    """

    index: int
    turn: int
    text: str
    tokens: int | None
    seconds: float


class Journal:
    """The answers that there are so far, each a line that is on the disk before the next is made.

    Each process of several appends to a file of its own and reads those of all. The first line of a file holds what
    decided the answers; a half line at the end, of a process that was killed, is dropped.

    Args:
        output: the file that is wanted in the end.
        identity: what decides the answers, as plain values of JSON.
        rank, ranks: of this process, and how many there are.

    Raises:
        ValueError: where an answer was made otherwise, or another process is writing.
        OSError: where the folder cannot be written to.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], rank: int = 0):
        self.output, self.identity = output, dict(identity)
        self.path = output.with_name(f"{output.name}.partial{rank or ''}")
        self.answers: dict[tuple[int, int], Answer] = {}
        self._descriptor = self._lock()
        try:
            self.read_all()
            if not self.path.exists() or not self.path.stat().st_size:
                self._append([{"identity": self.identity}])
            else:
                self._drop_half_line()
                self.answers.clear()  # a whole answer without its end of line was dropped, too
                self.read_all()
        except BaseException:
            self.close()
            raise

    def read_all(self) -> None:
        """Read what all processes have written."""
        for path in journal_files(self.output):
            check_readable(path, MAX_RECORDS)
            lines = read_lines(path)
            if lines:
                self._check(path, lines[0].get("identity"))
            for line in lines[1:]:
                answer = _read_answer(path, line)
                self.answers.setdefault((answer.index, answer.turn), answer)

    def add(self, answers: Iterable[Answer]) -> None:
        """Keep answers; on return, they outlive the process and the machine."""
        answers = list(answers)
        self._append([vars(answer) for answer in answers])
        self.answers.update({(answer.index, answer.turn): answer for answer in answers})

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self) -> int | None:
        with appending(self.path) as file:
            descriptor = os.dup(file.fileno())
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(f"{self.path}: another process is writing it; wait for it, or stop it") from None
        except OSError:  # a file system without locks
            pass
        return descriptor

    def _append(self, lines: list[dict[str, Any]]) -> None:
        with appending(self.path) as file:
            _write_durably(file, "".join(json.dumps(line) + "\n" for line in lines))

    def _drop_half_line(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)
        if not whole:
            self._append([{"identity": self.identity}])

    def _check(self, path: Path, found: Any) -> None:
        changed = differences(found, self.identity)
        if changed:
            raise ValueError(
                f"{path} holds answers that were made otherwise: {changed}. Go on with the settings that it was begun "
                "with, write to another file, or delete it."
            )


def journal_files(output: Path) -> list[Path]:
    """The files of all processes."""
    begin = f"{output.name}.partial"
    found = output.parent.glob("*.partial*")
    return sorted(path for path in found if path.name.startswith(begin) and not path.is_symlink())


def remove_journals(output: Path) -> None:
    """Delete the files of all processes: the wanted file is there."""
    for path in journal_files(output):
        path.unlink(missing_ok=True)


def differences(before: Any, now: Mapping[str, Any]) -> str:
    """What has changed, in words: `temperature was 0.7 and is 0.0`; empty where nothing has."""
    if not isinstance(before, dict):
        return f"expected what decided them, received {before!r:.60}"
    return ", ".join(
        f"{name} was {before.get(name)!s:.40} and is {now.get(name)!s:.40}"
        for name in dict.fromkeys([*now, *before])
        if before.get(name) != now.get(name)
    )


def now() -> float:
    """Seconds since 1970, to the microsecond, as FastChat has them."""
    return round(time.time(), 6)


def _write_durably(file: TextIO, text: str) -> None:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def _read_answer(path: Path, line: dict[str, Any]) -> Answer:
    try:
        return Answer(**line)
    except TypeError:
        raise ValueError(f"{path}: expected an answer, received {line!r:.60}") from None
