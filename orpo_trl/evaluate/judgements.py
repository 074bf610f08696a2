"""Replies of judges, kept by what was asked: a file that only grows, so that nothing is paid for twice."""

import errno
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orpo_trl.endpoint import KEY_VARIABLE, Message, Reply
from orpo_trl.plain_files import MAX_RECORDS, appending, check_readable
from orpo_trl.printable import printable


def key_of(judge: str, messages: Sequence[Message], sampling: Mapping[str, Any]) -> str:
    """The name of a request by its content: SHA-256 of judge (`Endpoint.name`), conversation and sampling."""
    content = json.dumps([judge, list(messages), dict(sampling)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


class Judgements:
    """The replies of a file. Each is on the disk when `add` returns."""

    def __init__(self, path: Path, descriptor: int):
        self.path = path
        self._descriptor = descriptor
        self._replies: dict[str, list[dict[str, Any]]] = {}
        damaged = 0
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                reply = _read_line(line)
                if reply is not None:
                    self._replies.setdefault(reply["key"], []).append(reply)
                damaged += reply is None and bool(line.strip())
        if damaged:
            print(printable(f"{path}: {damaged} damaged lines are left out."), file=sys.stderr)

    def replies(self, key: str) -> list[dict[str, Any]]:
        """What was replied to a request: `choice`, `prompt_tokens` and `completion_tokens`, the oldest first."""
        return self._replies.get(key, [])

    def add(self, key: str, model: str, reply: Reply) -> dict[str, Any]:
        """Keep a reply.

        Returns:
            It, as `replies` has it.
        """
        choice = {**reply.raw["choices"][0], "text": reply.text}
        kept = {
            "key": key,
            "model": model,
            "choice": choice,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
        }
        line = json.dumps(kept)
        secret = os.environ.get(KEY_VARIABLE)
        if secret:  # some servers repeat it
            line = line.replace(json.dumps(secret)[1:-1], f"${{{KEY_VARIABLE}}}")
        os.write(self._descriptor, f"{line}\n".encode())
        os.fsync(self._descriptor)
        self._replies.setdefault(key, []).append(kept)
        return kept


@contextmanager
def open_judgements(path: Path) -> Iterator[Judgements]:
    """The replies of a file, which is made where there is none. One process has it at a time.

    Raises:
        ValueError: where another process has it.
        OSError: where it cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with appending(path) as file:
        _lock(path, file.fileno())
        check_readable(path, MAX_RECORDS)
        if _is_torn(path):  # its writer was killed: the next line must not be glued to that one
            os.write(file.fileno(), b"\n")
        yield Judgements(path, file.fileno())


def _lock(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Without locks of the file system, two processes may pay for the same reply; lines stay whole all the same.
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return
        raise ValueError(
            f"{path}: another process is judging with this file. Wait for it, or name another folder: --output DIR"
        ) from error


def _is_torn(path: Path) -> bool:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read(1) not in (b"", b"\n")


def _read_line(line: str) -> dict[str, Any] | None:
    try:
        reply = json.loads(line)
        is_whole = isinstance(reply["key"], str) and isinstance(reply["choice"]["text"], str)
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return reply if is_whole else None
