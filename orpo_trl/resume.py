"""Whether a start begins a run, goes on with one, or finds it finished: the rules of docs/resuming.md."""

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from orpo_trl import checkpoints, run_folder
from orpo_trl.checkpoints import Checkpoint
from orpo_trl.resume_rules import BATCH, Change, digests_of, settings_changes, touched_files
from orpo_trl.run_lock import RunLock
from orpo_trl.yaml_text import from_yaml

logger = logging.getLogger(__name__)

# These belong to one start, not to the run.
OF_ONE_START = ("resume_from_checkpoint", "resume_anyway", "overwrite_output_dir")
# In run.json: the checkpoint of another run that the run began at.
BEGAN_AT = "began_at"
_ELSEWHERE = "resume_from_checkpoint"


class ResumeError(ValueError):
    """A start that does not fit what is in its output folder."""


@dataclass(frozen=True)
class Start:
    """What a start does.

    Attributes:
        run_id: of the run that begins or goes on.
        record: run.json of the run that goes on; empty where a run begins.
        checkpoint: where it goes on; None where it begins, also again because there was no checkpoint yet.
        changes: settings that differ from those of the run that goes on.
        inputs: `digests_of` the files that the settings name.
        is_anyway: whether `resume_anyway` allows what would be refused.
        finished: a sentence, where there is nothing to do.
        in_the_way: a sentence about another run in the folder, which `make_room` sets aside before training.
        notes: what to tell the user.
    """

    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    record: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    changes: tuple[Change, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    is_anyway: bool = False
    finished: str = ""
    in_the_way: str = ""
    notes: tuple[str, ...] = ()

    @property
    def is_continued(self) -> bool:
        return bool(self.record)


@dataclass(frozen=True)
class Asked:
    """What the user asks of a start.

    Attributes:
        folder: output folder.
        recipe: text of the recipe, parents and overrides included.
        resume: the key `resume`.
        checkpoint: the key `resume_from_checkpoint`.
        is_anyway, is_overwritten: the keys `resume_anyway` and `overwrite_output_dir`.
        processes: that train.
        inputs: local files and folders that the settings name, by key.
    """

    folder: Path
    recipe: str
    resume: str | None = None
    checkpoint: str | bool | None = None
    is_anyway: bool = False
    is_overwritten: bool = False
    processes: int = 1
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_elsewhere(self) -> bool:
        """Whether the user names a checkpoint of another folder."""
        named = self.checkpoint
        return isinstance(named, str) and Path(named).resolve().parent != self.folder.resolve()


# ---- What a start does -----------------------------------------------------------------------------------------------


def claim(asked: Asked) -> tuple[Start, RunLock]:
    """Lock the output folder for this process and say what the start does. Only the main process calls this.

    Raises:
        ResumeError: where the start does not fit what is in the folder.
        LockedError: where another process trains in it.
        OSError: where it cannot be written to.
    """
    asked.folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(asked.folder)
    try:
        start = decide(asked)
        if start.in_the_way and Path.cwd().is_relative_to(asked.folder.resolve()):
            raise ResumeError(f"`output_dir`: {asked.folder} holds the current folder, so its run cannot be set aside")
        return start, lock
    except BaseException:
        lock.release()
        raise


def make_room(folder: Path, start: Start, lock: RunLock) -> tuple[Start, RunLock]:
    """Set aside the run that is in the way of a start. Only the main process calls this.

    Called when all else is ready to train: after a wrong dataset or model, the run is still where it was. The folder
    gets the date as part of its name, and a new one takes its place.

    Args:
        folder: output folder.
        start, lock: of `claim`.

    Raises:
        ResumeError: where the folder cannot be set aside.
        LockedError, OSError: as `claim`.
    """
    if not start.in_the_way:
        return start, lock
    try:
        real = folder.resolve()  # the output folder may be a link
        note = f"{start.in_the_way} It is now in {_set_aside(real)}."
        real.mkdir()
        return replace(start, in_the_way="", notes=(note,)), RunLock(folder)
    finally:
        lock.release()


def claim_on_all(asked: Asked) -> tuple[Start, RunLock | None]:
    """`claim`, on the main process; all processes get the start, or the same error.

    Returns:
        The start, and on the main process the lock.

    Raises:
        ResumeError: also in place of the other errors of `claim`.
    """
    return _on_all(lambda: claim(asked))


def make_room_on_all(folder: Path, start: Start, lock: RunLock | None) -> tuple[Start, RunLock | None]:
    """`make_room`, on the main process; returns and raises as `claim_on_all`."""
    return _on_all(lambda: make_room(folder, start, cast(RunLock, lock)))


def _on_all(on_main: Callable[[], tuple[Start, RunLock]]) -> tuple[Start, RunLock | None]:
    state, lock = PartialState(), None
    answer: list[Start | str] = [""]
    if state.is_main_process:
        try:
            answer[0], lock = on_main()
        except Exception as error:  # of whatever kind: the other processes wait for the answer
            answer[0] = (
                str(error) if isinstance(error, ValueError) else f"`output_dir`: {type(error).__name__}: {error}"
            )
    broadcast_object_list(answer)
    start = answer[0]
    if isinstance(start, str):
        raise ResumeError(start)
    if state.is_main_process:
        for note in start.notes:
            logger.info(note)
    return replace(start, notes=()), lock


def by_hand(asked: Asked) -> Start:
    """The start of a trainer in Python that is given a checkpoint: what has changed is named, and nothing is refused.

    Raises:
        ResumeError: where there is no such checkpoint, or it is not whole.
    """
    chosen = _asked_checkpoint(asked)
    record = run_folder.read_record(asked.folder)
    if Path(chosen).resolve().parent != asked.folder.resolve() or "id" not in record:
        return Start(checkpoint=chosen, is_anyway=True)
    changes = _changes(asked, record)
    for change in changes:
        if not change.is_silent:
            logger.warning("Changed: %s", change)
    return Start(record["id"], record, chosen, changes, is_anyway=True)


def decide(asked: Asked) -> Start:
    """What the start does.

    Raises:
        ResumeError, ValueError: as `claim`.
    """
    folder, inputs = asked.folder, digests_of(asked.inputs)
    found = checkpoints.checkpoints_of(folder)
    record = run_folder.read_record(folder)
    is_done = "saved" in record or ("finished" in record and "id" not in record)  # before runs had an id
    if not record or ("id" not in record and not is_done):
        return _without_run(asked, inputs, found)
    changes = _changes(asked, record)
    touched = tuple(touched_files(record.get("inputs") or {}, inputs, _is_stream(asked)))
    going_on = Start(record.get("id") or Start().run_id, record, None, changes, inputs, asked.is_anyway)
    if asked.checkpoint and not asked.is_elsewhere:
        return _go_on(asked, going_on, touched)
    differs = [change for change in changes if not change.is_silent or change.name in BATCH] + list(touched)
    if is_done:
        if asked.resume == "auto" and not differs:
            return replace(going_on, finished=_finished(asked, record))
        return _begin(asked, inputs, _of_others(f"{folder} has a finished run", differs))
    if asked.resume == "auto" and not any(change.is_refused for change in differs):
        return _go_on(asked, going_on, touched)
    if asked.is_overwritten or not found:
        return _begin(asked, inputs, _of_others(f"{folder} has a run that did not finish", differs))
    if asked.resume == "auto":
        return _go_on(asked, going_on, touched)
    raise ResumeError(
        f"{folder} has a run that did not finish (its latest checkpoint: {found[0].path.name}). "
        + _ways_out("Set `--resume auto` to go on with it")
    )


def _without_run(asked: Asked, inputs: Mapping[str, str], found: list[Checkpoint]) -> Start:
    """The start in a folder without a run of ours; it may have checkpoints of another program."""
    if not found or asked.checkpoint:
        return _begin(asked, inputs)
    if asked.is_overwritten:
        return _begin(asked, inputs, f"{asked.folder} had checkpoints of another program.")
    raise ResumeError(
        f"{asked.folder} has checkpoints of another program, or of an earlier version. "
        + _ways_out("Set `--resume_from_checkpoint true` to go on from them")
    )


def _begin(asked: Asked, inputs: Mapping[str, str], in_the_way: str = "") -> Start:
    """The start of a run, at a checkpoint of no run of this folder where the user asks for one."""
    start = Start(inputs=inputs, in_the_way=in_the_way)
    if not asked.checkpoint:
        return start
    path = _asked_checkpoint(asked)
    if in_the_way and Path(path).resolve().is_relative_to(asked.folder.resolve()):
        raise ResumeError(
            f"`resume_from_checkpoint`: {path} is in {asked.folder}, which must be set aside. Move it out of there, or "
            "set another `output_dir`."
        )
    note = f"This run begins at {path}, a checkpoint of another run, and goes on from its step: rows and schedule too."
    return replace(start, checkpoint=path, notes=(note,))


def _go_on(asked: Asked, start: Start, touched: tuple[Change, ...]) -> Start:
    """The start that goes on with the run of its record.

    Raises:
        ResumeError: where something has changed that must not.
    """
    folder = asked.folder
    if any(change.name == _ELSEWHERE for change in start.changes):
        raise ResumeError(
            f"`{_ELSEWHERE}`: {folder} has a run that did not finish, and it did not begin at {asked.checkpoint}. "
            + _ways_out("Leave the key out to go on with the run")
        )
    refused = [change for change in (*start.changes, *touched) if change.is_refused]
    if refused and not asked.is_anyway:
        raise ResumeError(refusal(folder, refused))
    notes = [f"{path} was whole, and cut off before its rename: it is used." for path in checkpoints.recover(folder)]
    if asked.checkpoint and not asked.is_elsewhere:
        chosen: str | None = _asked_checkpoint(asked, start.run_id)
    else:
        chosen = _latest(folder, start.run_id, notes)
        if chosen is None and (began_at := start.record.get(BEGAN_AT)):
            chosen = _asked_checkpoint(replace(asked, checkpoint=began_at))
    where = chosen if chosen else "the beginning: there is no whole checkpoint"
    notes.append(f"Going on with the run in {folder} from {Path(where).name if chosen else where}.")
    is_own = chosen is not None and Path(chosen).resolve().parent == folder.resolve()
    step = checkpoints.step_of(Path(cast(str, chosen))) if is_own else 0
    for checkpoint in checkpoints.checkpoints_of(folder):
        if checkpoint.step > step and checkpoint.is_sealed and not asked.is_elsewhere:
            # Otherwise the next start would take the latest of these, of steps that this one takes back.
            notes.append(
                f"{checkpoint.path.name} is of a later step. It is now {checkpoints.set_aside(checkpoint.path)}."
            )
    notes += [f"Changed: {change}" for change in (*start.changes, *touched) if not change.is_silent]
    return replace(start, checkpoint=chosen, notes=tuple(notes))


def _latest(folder: Path, run_id: str, notes: list[str]) -> str | None:
    """The latest checkpoint that a run can go on from. Damaged ones are set aside, and notes say so."""
    for checkpoint in checkpoints.checkpoints_of(folder):
        if checkpoint.problem is not None:
            place = checkpoints.set_aside(checkpoint.path)
            notes.append(f"{checkpoint.path} is not whole ({checkpoint.problem}). It is now {place}.")
            continue
        problem = _unfit(checkpoint, run_id)
        if problem is None:
            return str(checkpoint.path)
        if not checkpoint.facts.get("model_only"):
            raise ResumeError(f"{checkpoint.path} {problem}. " + _ways_out("Move it away"))
        notes.append(f"{checkpoint.path} {problem}: it is not used.")
    return None


def _unfit(checkpoint: Checkpoint, run_id: str | None) -> str | None:
    """Why a run cannot go on from a checkpoint; None where it can.

    Args:
        checkpoint: of this version, or of another program, which must be asked for by hand.
        run_id: of the run; None where it may be of any.
    """
    if checkpoint.is_sealed and checkpoint.problem is not None:
        return f"is not whole: {checkpoint.problem}"
    if checkpoint.path.is_symlink():
        return "is a symbolic link"
    if checkpoint.facts.get("model_only"):
        return "has no optimizer state (`save_only_model`)"
    owner = checkpoint.facts.get("run")
    return f"is a checkpoint of another run ({owner})" if run_id and owner not in (None, run_id) else None


def _asked_checkpoint(asked: Asked, run_id: str | None = None) -> str:
    """The checkpoint that the user names, or the latest one of the folder for `true`."""
    if isinstance(asked.checkpoint, str):
        path = Path(asked.checkpoint)
        if not path.is_dir():
            raise ResumeError(
                f"`resume_from_checkpoint`: expected the folder of a checkpoint or true, received {asked.checkpoint!r}"
            )
        problem = _unfit(checkpoints.read(path), run_id)
        if problem:
            raise ResumeError(f"`resume_from_checkpoint`: {path} {problem}")
        return str(path)
    for checkpoint in checkpoints.checkpoints_of(asked.folder):
        if _unfit(checkpoint, run_id) is None:
            return str(checkpoint.path)
    raise ResumeError(f"`resume_from_checkpoint`: expected a checkpoint-… folder in {asked.folder}, found none")


def refusal(folder: Path | str, refused: list[Change]) -> str:
    """The message for changes with which a run does not go on."""
    lines = "\n".join(f"  - {change}" for change in refused)
    return f"{folder} has a run that did not finish, and this start would train something else:\n{lines}\n" + _ways_out(
        "Take the changes back to go on with it, set `--resume_anyway` to go on all the same"
    )


def _ways_out(first: str) -> str:
    return (
        f"{first}, set another `output_dir` to begin another run, or `--overwrite_output_dir` to set this run aside "
        "and begin anew."
    )


def _of_others(start: str, differs: Sequence[Change]) -> str:
    return start + (f" of other settings ({'; '.join(map(str, differs[:3]))})." if differs else ".")


def _finished(asked: Asked, record: Mapping[str, Any]) -> str:
    when = record.get("saved") or record["finished"]
    sends = " `push_to_hub` sends nothing now: `hf upload` does." if _settings(asked).get("push_to_hub") else ""
    return (
        f"The run in {asked.folder} is finished: step {record.get('last_step')}, saved {when}. Nothing to do. To train "
        f"again, change a setting, or set another `output_dir`.{sends}"
    )


def _set_aside(folder: Path) -> Path:
    place = folder.with_name(f"{folder.name}_{datetime.now():%Y-%m-%d_%H-%M-%S}")
    try:
        folder.rename(place)
    except OSError as error:
        raise ResumeError(f"`output_dir`: the earlier run cannot be set aside: {error}. Set another one.") from error
    return place


def _settings(asked: Asked) -> dict[str, Any]:
    return from_yaml(asked.recipe) or {}


def _is_stream(asked: Asked) -> bool:
    return bool(_settings(asked).get("dataset_streaming"))


def _changes(asked: Asked, record: Mapping[str, Any]) -> tuple[Change, ...]:
    before, _ = run_folder.read_settings(asked.folder)
    if not before:
        raise ResumeError(
            f"{asked.folder} has {run_folder.RUN} but no {run_folder.RECIPE}. " + _ways_out("Put it back in place")
        )
    processes = (record.get("processes") or 1, asked.processes)
    changes = tuple(settings_changes(before, _settings(asked), processes, record.get("max_steps")))
    began_at = record.get(BEGAN_AT)
    if not asked.is_elsewhere or began_at == (named := str(Path(cast(str, asked.checkpoint)).resolve())):
        return changes
    return *changes, Change(_ELSEWHERE, began_at, named, is_refused=True)
