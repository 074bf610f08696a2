"""Whether a start begins a run, goes on with one, or finds it finished; and what may change when a run goes on.

The rules are those of docs/resuming.md. They are about settings, as recipes have them, and about what run.json says of
the data, the tokenizer and the sharding.
"""

import hashlib
import logging
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from orpo_trl import checkpoints, run_folder
from orpo_trl.checkpoints import Checkpoint
from orpo_trl.config import DataArguments, ModelArguments, ORPOConfig
from orpo_trl.recipe.keys import recipe_keys
from orpo_trl.run_lock import RunLock
from orpo_trl.sections import SECTIONS
from orpo_trl.yaml_text import from_yaml, to_yaml_line

logger = logging.getLogger(__name__)

# A run that goes on may change these without a word: they do not touch the weights.
FREE = frozenset(
    f"""{" ".join(SECTIONS["Logs and output"])} {" ".join(SECTIONS["Interruptions"])}
    dataset_test_split eval_datasets dataset_num_proc max_tokens_per_micro_batch auto_find_batch_size
    restore_callback_states_from_checkpoint dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order bf16_full_eval fp16_full_eval
    gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs
    activation_offloading deepspeed fsdp fsdp_config pair_layout pad_to_multiple_of torch_empty_cache_steps use_cpu
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    hub_token max_nonfinite_steps""".split()
)
# These are applied from the checkpoint on, and named in the log.
REPORTED = frozenset(
    """learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps adam_beta1 adam_beta2 adam_epsilon weight_decay
    max_grad_norm bf16 fp16 tf32 attn_implementation torch_compile torch_compile_backend torch_compile_mode
    use_liger_kernel liger_kernel_config""".split()
)
# Of these, only their product with the number of processes counts: the rows of an optimiser step.
_GLOBAL_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
# These belong to one start, not to the run.
OF_ONE_START = ("resume_from_checkpoint", "resume_anyway", "overwrite_output_dir")
# These may grow.
_LENGTH = ("max_steps", "num_train_epochs")
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
_MIB = 2**20


class ResumeError(ValueError):
    """A start that does not fit what is in its output folder."""


@dataclass(frozen=True)
class Change:
    """A setting, or a fact about the run, that is not what it was.

    Attributes:
        name: the key, or words for what it is.
        old, new: values.
        is_refused: whether the run may only go on with `resume_anyway`.
        is_silent: whether nobody needs to be told.
    """

    name: str
    old: Any
    new: Any
    is_refused: bool = False
    is_silent: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {to_yaml_line(self.old)} -> {to_yaml_line(self.new)}"


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
        notes: what to tell the user.
    """

    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    record: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    changes: tuple[Change, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    is_anyway: bool = False
    finished: str = ""
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


# ---- What a start does -----------------------------------------------------------------------------------------------


def claim(asked: Asked) -> tuple[Start, RunLock]:
    """Lock the output folder for this process and say what the start does. Only the main process calls this.

    A run that is in the way is set aside: the folder gets the date as part of its name, and a new one takes its place.

    Raises:
        ResumeError: where the start does not fit what is in the folder.
        LockedError: where another process trains in it.
        OSError: where it cannot be written to.
    """
    asked.folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(asked.folder)
    try:
        start, in_the_way = decide(asked)
        if not in_the_way:
            return start, lock
        note = f"{in_the_way} It is now in {_set_aside(asked.folder)}."
        lock.release()
        asked.folder.mkdir(parents=True)
        return Start(inputs=start.inputs, notes=(*start.notes, note)), RunLock(asked.folder)
    except BaseException:
        lock.release()
        raise


def claim_on_all(asked: Asked) -> tuple[Start, RunLock | None]:
    """`claim`, on the main process; all processes get the start, or the same error.

    Returns:
        The start, and on the main process the lock.

    Raises:
        ResumeError: also in place of the other errors of `claim`.
    """
    state, lock = PartialState(), None
    answer: list[Start | str] = [""]
    if state.is_main_process:
        try:
            answer[0], lock = claim(asked)
        except (ValueError, OSError) as error:
            answer[0] = f"`output_dir`: {error}" if isinstance(error, OSError) else str(error)
    broadcast_object_list(answer)
    start = answer[0]
    if isinstance(start, str):
        raise ResumeError(start)
    if state.is_main_process:
        for note in start.notes:
            logger.info(note)
    return start, lock


def by_hand(asked: Asked) -> Start:
    """The start of a trainer in Python that is given a checkpoint: what has changed is named, and nothing is refused.

    Raises:
        ResumeError: where there is no such checkpoint, or it is not whole.
    """
    found = checkpoints.checkpoints_of(asked.folder)
    chosen = _asked_checkpoint(asked, found)
    record = run_folder.read_record(asked.folder)
    if Path(chosen).resolve().parent != asked.folder.resolve() or "id" not in record:
        return Start(checkpoint=chosen)
    changes = tuple(_changes(asked.folder, record, asked))
    for change in changes:
        if not change.is_silent:
            logger.warning("Changed: %s", change)
    return Start(record["id"], record, chosen, changes, is_anyway=True)


def decide(asked: Asked) -> tuple[Start, str]:
    """What the start does, and a sentence about a run that must be set aside first; that is empty where there is none.

    Raises:
        ResumeError, ValueError: as `claim`.
    """
    folder, inputs = asked.folder, digests_of(asked.inputs)
    new = Start(inputs=inputs)
    if isinstance(asked.checkpoint, str) and Path(asked.checkpoint).resolve().parent != folder.resolve():
        return _from_elsewhere(asked, new)
    found = checkpoints.checkpoints_of(folder)
    record = run_folder.read_record(folder)
    if not record:
        if not found:
            if asked.checkpoint:
                raise ResumeError(f"`resume_from_checkpoint`: expected a checkpoint-… folder in {folder}, found none")
            return new, ""
        if asked.checkpoint:  # of another trainer, or an earlier version: the user has asked for it by hand
            return Start(checkpoint=_asked_checkpoint(asked, found), inputs=inputs), ""
        if asked.is_overwritten:
            return new, f"{folder} had checkpoints of another program."
        raise ResumeError(
            f"{folder} has checkpoints of another program, or of an earlier version (no {run_folder.RUN}). "
            + _ways_out("`resume_from_checkpoint: true` to go on from them")
        )
    changes = tuple(_changes(folder, record, asked))
    touched = tuple(_touched(record.get("inputs"), inputs))
    if asked.checkpoint:
        return _go_on(asked, record, found, changes, touched, inputs), ""
    differs = [change for change in changes if not change.is_silent or change.name in _GLOBAL_BATCH] + list(touched)
    if "saved" in record or ("finished" in record and "id" not in record):
        if asked.resume == "auto" and not differs:
            return Start(record["id"], record, finished=_finished(folder, record)), ""
        return new, _of_others(f"{folder} has a finished run", differs)
    if asked.resume == "auto" and not [change for change in differs if change.is_refused]:
        return _go_on(asked, record, found, changes, touched, inputs), ""
    if asked.is_overwritten or not found:
        return new, _of_others(f"{folder} has a run that did not finish", differs)
    if asked.resume == "auto":
        return _go_on(asked, record, found, changes, touched, inputs), ""
    raise ResumeError(
        f"{folder} has a run that did not finish (its latest checkpoint: {found[0].path.name}). "
        + _ways_out("`--resume auto` to go on with it")
    )


def _from_elsewhere(asked: Asked, new: Start) -> tuple[Start, str]:
    """A run that begins at a checkpoint of another folder, which the user has asked for by its path."""
    path = Path(str(asked.checkpoint))
    if not path.is_dir():
        raise ResumeError(
            f"`resume_from_checkpoint`: expected the folder of a checkpoint or true, received {asked.checkpoint!r}"
        )
    record = run_folder.read_record(asked.folder)
    if "saved" in record or not record:
        in_the_way = f"{asked.folder} has a finished run." if record else ""
        note = f"This run begins at {path}, a checkpoint of another folder."
        return Start(checkpoint=str(path), inputs=new.inputs, notes=(note,)), in_the_way
    raise ResumeError(
        f"`resume_from_checkpoint`: {path} is of another folder, and {asked.folder} has a run that did not finish. "
        + _ways_out("`--resume auto` to go on with it")
    )


def _go_on(asked: Asked, record, found: list[Checkpoint], changes, touched, inputs) -> Start:
    """The start that goes on with the run of the record.

    Raises:
        ResumeError: where something has changed that must not.
    """
    folder = asked.folder
    refused = [change for change in (*changes, *touched) if change.is_refused]
    if refused and not asked.is_anyway:
        raise ResumeError(refusal(folder, refused))
    notes = [f"{path} was written whole, and cut off before its rename: it is used." for path in
             checkpoints.recover(folder)]  # fmt: skip
    if notes:
        found = checkpoints.checkpoints_of(folder)
    chosen = _asked_checkpoint(asked, found) if asked.checkpoint else None
    if chosen is None:
        for checkpoint in found:
            if checkpoint.problem is None and checkpoint.facts.get("run") not in (None, record.get("id")):
                raise ResumeError(
                    f"{checkpoint.path} is a checkpoint of another run ({checkpoint.facts['run']}; this folder's is "
                    f"{record.get('id')}). " + _ways_out("move it away")
                )
            if checkpoint.facts.get("model_only"):
                notes.append(f"{checkpoint.path} has no optimizer state (`save_only_model`): it is not used.")
                continue
            if checkpoint.problem is None:
                chosen = str(checkpoint.path)
                break
            place = checkpoints.set_aside(checkpoint.path)
            notes.append(f"{checkpoint.path} is not whole ({checkpoint.problem}). It is now in {place}.")
    told = [change for change in (*changes, *touched) if not change.is_silent]
    where = Path(chosen).name if chosen else "the beginning: there is no whole checkpoint"
    notes.append(f"Going on with the run in {folder} from {where}.")
    notes += [f"Changed: {change}" for change in told]
    return Start(
        record.get("id") or Start().run_id, record, chosen, changes, inputs, asked.is_anyway, notes=tuple(notes)
    )


def _asked_checkpoint(asked: Asked, found: list[Checkpoint]) -> str:
    if isinstance(asked.checkpoint, str):
        path = Path(asked.checkpoint)
        if not path.is_dir():
            raise ResumeError(
                f"`resume_from_checkpoint`: expected the folder of a checkpoint or true, received {asked.checkpoint!r}"
            )
        problem = checkpoints.read(path).problem
        # One of an earlier version has no list of its files.
        if problem and (path / checkpoints.COMPLETE).exists():
            raise ResumeError(f"`resume_from_checkpoint`: {path} is not whole: {problem}")
        return str(path)
    usable = [checkpoint for checkpoint in found if checkpoint.problem is None or not checkpoint.facts]
    if not usable:
        raise ResumeError(f"`resume_from_checkpoint`: expected a checkpoint-… folder in {asked.folder}, found none")
    return str(usable[0].path)


def refusal(folder: Path | str, refused: list[Change]) -> str:
    """The message for changes with which a run does not go on."""
    lines = "\n".join(f"  - {change}" for change in refused)
    return (
        f"{folder} has a run that did not finish, and this start would train something else:\n{lines}\n"
        "Take the changes back to go on with it, or "
        + _ways_out("`--resume_anyway` to go on all the same", "set").replace("Set ", "", 1)
    )


def _ways_out(first: str, verb: str = "Set") -> str:
    return (
        f"{verb} {first}, another `output_dir` to begin another run, or `--overwrite_output_dir` to set this run aside "
        "and begin anew."
    )


def _of_others(start: str, differs: list[Change]) -> str:
    return start + (f" of other settings ({'; '.join(map(str, differs[:3]))})." if differs else ".")


def _finished(folder: Path, record: Mapping[str, Any]) -> str:
    return (
        f"The run in {folder} is finished: step {record.get('last_step')}, saved {record['saved']}. Nothing to do. "
        "To train again, change a setting, or set another `output_dir`."
    )


def _set_aside(folder: Path) -> Path:
    folder = folder.resolve()
    if Path.cwd().is_relative_to(folder):
        raise ResumeError(f"`output_dir`: {folder} holds the current folder, so its run cannot be set aside")
    place = folder.with_name(f"{folder.name}_{datetime.now():%Y-%m-%d_%H-%M-%S}")
    try:
        folder.rename(place)
    except OSError as error:
        raise ResumeError(f"`output_dir`: the earlier run cannot be set aside: {error}. Set another one.") from error
    return place


# ---- What differs ----------------------------------------------------------------------------------------------------


def _changes(folder: Path, record: Mapping[str, Any], asked: Asked) -> Iterator[Change]:
    path = folder / run_folder.RECIPE
    if not path.is_file():
        raise ResumeError(f"{folder} has {run_folder.RUN} but no {run_folder.RECIPE}. " + _ways_out("it back in place"))
    before = from_yaml(path.read_text(encoding="utf-8")) or {}
    yield from settings_changes(before, from_yaml(asked.recipe) or {}, record.get("processes") or 1, asked.processes)


def settings_changes(
    before: Mapping[str, Any], after: Mapping[str, Any], processes_before: int = 1, processes_after: int = 1
) -> Iterator[Change]:
    """What a run that goes on with other settings would change.

    Args:
        before, after: settings of a recipe; keys that are missing have their defaults.
        processes_before, processes_after: that train.
    """
    defaults = {name: key.default for name, key in recipe_keys().items()}

    def value(settings: Mapping[str, Any], name: str) -> Any:
        return settings.get(name, defaults.get(name))

    for name in sorted({*before, *after}):
        old, new = value(before, name), value(after, name)
        if old == new:
            continue
        if name in _GLOBAL_BATCH:
            yield Change(name, old, new, is_silent=True)
        elif name in _LENGTH:
            yield Change(name, old, new, is_refused=0 < new < old)
        else:
            is_reported = name in REPORTED
            is_free = name in FREE
            yield Change(name, old, new, is_refused=not is_reported and not is_free, is_silent=is_free)
    rows = [
        value(settings, _GLOBAL_BATCH[0]) * value(settings, _GLOBAL_BATCH[1]) * processes
        for settings, processes in ((before, processes_before), (after, processes_after))
    ]
    if rows[0] != rows[1]:
        yield Change("pairs of an optimiser step (batch size x accumulation x processes)", *rows, is_refused=True)
    elif processes_before != processes_after:
        yield Change("processes", processes_before, processes_after)


def facts_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    """What differs in the data, the tokenizer and the sharding of a run that goes on.

    Args:
        before, after: run.json, or of `after` the same keys as they are now.
    """
    data = [(record.get("datasets") or {}).get("train") or {} for record in (before, after)]
    if None not in (old_new := [part.get("sha256") for part in data]) and old_new[0] != old_new[1]:
        rows = [f"{part.get('rows')} pairs, SHA-256 {part['sha256'][:12]}" for part in data]
        yield Change("the training pairs", *rows, is_refused=True)
    tokenizers = [record.get("tokenizer") for record in (before, after)]
    if None not in tokenizers and tokenizers[0] != tokenizers[1]:
        yield Change("the tokenizer or its chat template", *[str(sha)[:12] for sha in tokenizers], is_refused=True)


def sharding_problem(facts: Mapping[str, Any], sharding: str, processes: int) -> str | None:
    """Why a checkpoint cannot be loaded by these processes; None where it can.

    Args:
        facts: of the checkpoint.
        sharding: 'none', 'zero1', 'zero2', 'zero3' or 'fsdp'.
        processes: that train.
    """
    old, count = facts.get("sharding", sharding), facts.get("processes", processes)
    if old != sharding:
        return f"it was written under {old}, and this start is under {sharding}"
    if sharding.startswith("zero") and count != processes:
        return f"under {sharding}, DeepSpeed reads it with {count} processes only, and this start has {processes}"
    return None


# ---- Local files that the settings name ------------------------------------------------------------------------------


def named_files(model: ModelArguments, data: DataArguments, training: ORPOConfig) -> dict[str, str]:
    """Names, by key, of the models and the data that settings name; some are local files, the others of the Hub."""
    named = {
        "model_name_or_path": model.model_name_or_path,
        "tokenizer_name_or_path": model.tokenizer_name_or_path,
        "chat_template_path": training.chat_template_path,
        "dataset_name": data.dataset_name,
        **{f"datasets.{number}.path": entry["path"] for number, entry in enumerate(data.datasets)},
    }
    return {key: name for key, name in named.items() if name}


def digests_of(inputs: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of local files and folders by key. Of weights, the size and the first MiB stand for the whole."""
    return {key: _digest(Path(path)) for key, path in inputs.items() if path and Path(path).exists()}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        name = file.name if file == path else str(file.relative_to(path))
        if any(part.startswith((".", "_")) for part in Path(name).parts):
            continue
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        with open(file, "rb") as content:
            if file.suffix in _WEIGHTS:
                digest.update(content.read(_MIB))
            else:
                while block := content.read(_MIB):
                    digest.update(block)
    return digest.hexdigest()


def _touched(before: Mapping[str, str] | None, after: Mapping[str, str]) -> Iterator[Change]:
    for key in sorted({*(before or {})} & {*after}):
        if before and before[key] != after[key]:
            # Of data, the pairs decide that are made of it, later.
            is_model = key.startswith("model")
            yield Change(f"the files of `{key}`", before[key][:12], after[key][:12], is_refused=is_model)
