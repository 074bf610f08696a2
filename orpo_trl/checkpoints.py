"""The checkpoints of a run on disk: made in a folder of their own, renamed when they are whole, looked at before use.

    OUTPUT_DIR/
      checkpoint-200/          whole, with `complete.json`: whose it is, and the size of each file
      _incomplete/             what is being written, or was when the run was cut off; never loaded, deleted in time
        checkpoint-250/
        model/                 the final model, before its files move to OUTPUT_DIR
      _set_aside/              checkpoints that are damaged, or of steps that the run has gone back from; never loaded

Uploads to the Hub leave out names that begin with an underscore.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_trl.plain_files import MAX_RECORDS, read_text

INCOMPLETE = "_incomplete"
SET_ASIDE = "_set_aside"
COMPLETE = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")
# A folder with one of these is taken for a model, so they come last when a model's files move to their place.
_CONFIGS = ("adapter_config.json", "config.json")


class SaveError(RuntimeError):
    """A checkpoint or a model that could not be written."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder.

    Attributes:
        path: the folder.
        facts: what `seal` was given: run, step, sharding, processes, model_only. Empty where it cannot be read.
        problem: why it cannot be used; None where it is whole.
        is_sealed: it has a `complete.json`; else another program wrote it, or an earlier version.
    """

    path: Path
    facts: dict[str, Any]
    problem: str | None
    is_sealed: bool = True

    @property
    def step(self) -> int:
        return step_of(self.path)


def step_of(path: Path) -> int:
    """Optimiser steps of a folder called `checkpoint-STEPS`.

    Raises:
        ValueError: where it has another name.
    """
    found = _NAME.fullmatch(path.name)
    if found is None:
        raise ValueError(f"expected a folder called checkpoint-STEPS, received {path}")
    return int(found[1])


# ---- Reading ---------------------------------------------------------------------------------------------------------


def checkpoints_of(folder: Path) -> list[Checkpoint]:
    """The checkpoints in a run's folder, whole or not, the latest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path.is_dir() or path.is_symlink())]
    return [read(path) for path in sorted(found, key=step_of, reverse=True)]


def read(path: Path) -> Checkpoint:
    """A checkpoint folder and what is wrong with it."""
    if not path.is_symlink() and not (path / COMPLETE).exists():
        return Checkpoint(path, {}, f"{COMPLETE} is missing", is_sealed=False)
    if path.is_symlink():
        return Checkpoint(path, {}, "it is a symbolic link")
    facts: dict[str, Any] = {}
    try:
        facts = json.loads(read_text(path / COMPLETE, MAX_RECORDS))
        sizes = facts.pop("files")
        for name, size in sizes.items():
            found = (path / name).stat().st_size
            if found != size:
                return Checkpoint(path, facts, f"{name}: expected {size:,} bytes, found {found:,}")
    except FileNotFoundError as error:
        return Checkpoint(path, facts, f"{Path(error.filename).relative_to(path)} is missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Checkpoint(path, {}, f"{COMPLETE} cannot be read: {error}")
    return Checkpoint(path, facts, None)


# ---- Writing ---------------------------------------------------------------------------------------------------------


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write `complete.json`, after all other files are on the disk.

    Args:
        folder: with all the files of the checkpoint.
        facts: plain values to find again in `Checkpoint.facts`.
    """
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(_files(folder))}
    sizes.pop(COMPLETE, None)
    path = folder / COMPLETE
    path.write_text(json.dumps({**facts, "files": sizes}, indent=1) + "\n", encoding="utf-8")
    _sync(path)
    _sync(folder)


def sync_files(folder: Path) -> None:
    """Wait until the files that this machine has written are on the disk: a rename may otherwise overtake them."""
    for path in _files(folder):
        _sync(path)


def publish(folder: Path, target: Path) -> None:
    """Rename a sealed checkpoint to its name; one of the same step that is there already goes."""
    if target.exists():
        old = folder.with_name(f"{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(folder, target)
    _sync(target.parent)
    shutil.rmtree(folder.with_name(f"{target.name}.old"), ignore_errors=True)


def move_model(folder: Path, target: Path) -> None:
    """Move the files of a model, whole and on the disk, into the output folder, in which others stay."""
    for path in sorted(_files(folder), key=lambda path: (path.name in _CONFIGS, path)):
        place = target / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    _sync(target)
    shutil.rmtree(folder, ignore_errors=True)


def recover(folder: Path) -> list[Path]:
    """Publish the checkpoints that were sealed when the run was cut off just before the rename."""
    found = []
    for checkpoint in checkpoints_of(folder / INCOMPLETE):
        target = folder / checkpoint.path.name
        if checkpoint.problem is None and not target.exists():
            os.rename(checkpoint.path, target)
            found.append(target)
    return found


def set_aside(checkpoint: Path, folder: str = SET_ASIDE) -> Path:
    """Move a checkpoint to where it is not loaded, and return its new place."""
    place = checkpoint.parent / folder / checkpoint.name
    place.parent.mkdir(exist_ok=True)
    number = 1
    while os.path.lexists(place):
        number += 1
        place = place.with_name(f"{checkpoint.name}.{number}")
    os.rename(checkpoint, place)
    return place


def remove_incomplete(folder: Path) -> None:
    """Free the space of what was cut off."""
    shutil.rmtree(folder / INCOMPLETE, ignore_errors=True)


def remove_old(folder: Path, limit: int | None, kept: Iterable[str | None]) -> None:
    """Delete the oldest whole checkpoints beyond a limit.

    Args:
        folder: the run's.
        limit: of checkpoints that stay; None or 0 for all. The latest one and `kept` stay in any case.
        kept: paths, such as that of the best checkpoint.
    """
    if not limit or limit < 0:
        return
    whole = [checkpoint.path for checkpoint in checkpoints_of(folder) if checkpoint.problem is None]
    protected = {Path(path).name for path in kept if path}
    stays = [path for path in whole if path.name in protected or path == whole[0]]
    stays += [path for path in whole if path not in stays][: max(limit - len(stays), 0)]
    for path in whole:
        if path not in stays:
            # Deleting takes a while. A run that is cut off meanwhile must not find half of it.
            shutil.rmtree(set_aside(path, INCOMPLETE), ignore_errors=True)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # of a folder, on file systems that do not know it
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
