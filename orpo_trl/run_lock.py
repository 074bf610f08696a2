"""A lock on a run's folder, which ends with the process that holds it."""

import errno
import fcntl
import json
import os
import socket
from pathlib import Path

import psutil

# Uploads to the Hub leave out names that begin with an underscore.
LOCK = "_lock"


class LockedError(ValueError):
    """Another process trains in the folder."""


class RunLock:
    """Holds a folder for this process until `release` or the end of the process, however it ends.

    The system's record lock does this, also over NFS. Where a file system has no such locks, the host, process id and
    start time that stand in the file decide.

    Args:
        folder: exists.

    Raises:
        LockedError: naming the process that holds it.
        OSError: where the folder cannot be written to.
    """

    def __init__(self, folder: Path):
        path = folder / LOCK
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.unlink()  # a link would be written through, and a FIFO waits for a reader
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        holder = _read(self._descriptor)
        try:
            # Not flock: that lock would live on in the workers of a data loader after their parent was killed.
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = False
        except OSError as error:
            is_held = _is_alive(holder) if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP) else True
        if is_held:
            os.close(self._descriptor)
            self._descriptor = None
            raise LockedError(
                f"{folder}: another run is in this folder: process {holder.get('pid', '?')} on "
                f"{holder.get('host', 'an unknown host')}. Wait for it, stop it, or set another `output_dir`. "
                f"If it is gone, remove {path}."
            )
        os.truncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(_this_process()).encode(), 0)

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _this_process() -> dict[str, str | int | float]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _read(descriptor: int) -> dict:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive(holder: dict) -> bool:
    if holder.get("host") != socket.gethostname():
        return bool(holder)  # this machine cannot tell
    try:
        return psutil.Process(holder["pid"]).create_time() == holder["started"]
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False
