"""Files that others may have prepared: writing that follows no link, and reading that always ends.

Where a file is to be written, a symbolic link would send the text to another file, and a named pipe (FIFO) would wait
for a reader for ever. A file that is read may be a pipe, a device that never ends, or larger than memory.
"""

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

# Bytes. A recipe has a few thousand, a chat template some ten thousand.
MAX_SETTINGS = 1 << 20
# The logs of a run of a million steps, or the answers of a hundred evaluations, have less.
MAX_RECORDS = 1 << 30


class UnsafeFile(ValueError):
    """A file that is not read or written; the message names it."""


# ---- Writing ---------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a whole file as UTF-8, in one step: at no time is a part of it there under its name.

    Args:
        path: a link or a pipe of this name is replaced, and what it leads to stays as it is.
        text: line ends are written as they are.
        errors: what becomes of lone surrogates, as in `str.encode`.

    Raises:
        OSError: where the folder cannot be written to, or `path` is a folder.
    """
    write_bytes(path, text.encode("utf-8", errors))


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`."""
    replace_whole(path, lambda file: file.write_bytes(content))


def replace_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Put a new file in the place of `path`, after `write` has written it beside it.

    Args:
        path: as in `write_text`.
        write: is called with the new file, which exists and is empty; it has the ending of `path`.
    """
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    beside.unlink(missing_ok=True)
    os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # never through a link
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `path` where the block ends without an error, and else is deleted.

    Args:
        path: must not exist, not even as a link; the folder above it must.

    Raises:
        FileExistsError, FileNotFoundError: naming `path`, or the folder above it.
        OSError: where the folder above cannot be written to.
    """
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist")
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.mkdir()  # fails where there is anything of that name
    try:
        yield beside
        if os.path.lexists(path):  # `rename` would take the place of an empty folder
            raise FileExistsError(f"{path} exists already")
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def appending(path: Path) -> Iterator[TextIO]:
    """The file to add lines to, as UTF-8; a link or a pipe of this name is removed first."""
    if not _is_regular(path):
        path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
        yield file


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


# ---- Reading ---------------------------------------------------------------------------------------------------------


def read_text(path: Path, most: int = MAX_SETTINGS, errors: str = "strict") -> str:
    """The text of a file, with every kind of line end as `\\n`.

    Args:
        path: may be a link to a file.
        most: bytes that the file may have.
        errors: as in `bytes.decode`.

    Raises:
        UnsafeFile: where it is a folder, a pipe or a device, or too large.
        OSError: where it cannot be read.
        UnicodeDecodeError: where it is not UTF-8.
    """
    check_readable(path, most)
    with open(path, encoding="utf-8", errors=errors) as file:
        return file.read(most + 1)


def check_readable(path: Path, most: int) -> None:
    """As `read_text`, without reading.

    Raises:
        UnsafeFile, OSError: as `read_text`.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise UnsafeFile(f"{path}: expected a file, received {kind}")
    if found.st_size > most:
        raise UnsafeFile(f"{path}: expected a file of at most {most:,} bytes, received {found.st_size:,}")
