"""What may change when a run goes on: the rules of docs/resuming.md.

They are about settings, as recipes have them, about what run.json says of the data, the tokenizer and the adapter, and
about the files that settings name.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_trl.config import DataArguments, ModelArguments, ORPOConfig
from orpo_trl.recipe.keys import recipe_keys
from orpo_trl.sections import SECTIONS
from orpo_trl.yaml_text import to_yaml_line

# A run that goes on may change these without a word: they do not touch the weights.
FREE = frozenset(
    f"""{" ".join(SECTIONS["Logs and output"])} {" ".join(SECTIONS["Interruptions"])}
    dataset_test_split eval_datasets dataset_num_proc max_tokens_per_micro_batch
    restore_callback_states_from_checkpoint dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs
    activation_offloading pair_layout pad_to_multiple_of torch_empty_cache_steps use_cpu
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    hub_token max_nonfinite_steps""".split()
) - {"load_best_model_at_end", "metric_for_best_model", "greater_is_better"}
# These are applied from the checkpoint on, and named in the log.
REPORTED = frozenset(
    """learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps adam_beta1 adam_beta2 adam_epsilon weight_decay
    max_grad_norm bf16 fp16 tf32 attn_implementation torch_compile torch_compile_backend torch_compile_mode
    use_liger_kernel liger_kernel_config deepspeed fsdp fsdp_config load_best_model_at_end metric_for_best_model
    greater_is_better""".split()
)
# Of these, only the pairs of an optimiser step count.
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size")
# These may grow.
_LENGTH = ("max_steps", "num_train_epochs")
# The learning rate of these is a state of its own, which the checkpoint has. Evaluations change it.
_SCHEDULES_WITH_STATE = ("reduce_lr_on_plateau", "greedy")
_OF_THESE = frozenset(
    """learning_rate lr_scheduler_type lr_scheduler_kwargs metric_for_best_model greater_is_better eval_strategy
    eval_steps eval_delay eval_datasets dataset_test_split""".split()
)
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
_MIB = 2**20
# At which a file of weights is looked at.
_PLACES = 64


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


# ---- Settings --------------------------------------------------------------------------------------------------------


def settings_changes(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    processes: tuple[int, int] = (1, 1),
    steps_before: int | None = None,
) -> Iterator[Change]:
    """What a run that goes on with other settings would change.

    Args:
        before, after: settings of a recipe; keys that are missing have their defaults.
        processes: that train, before and after.
        steps_before: optimiser steps of the whole run, where it is known.
    """
    defaults = {name: key.default for name, key in recipe_keys().items()}

    def value(settings: Mapping[str, Any], name: str) -> Any:
        return settings.get(name, defaults.get(name))

    has_state = any(value(settings, "lr_scheduler_type") in _SCHEDULES_WITH_STATE for settings in (before, after))
    is_grouped = value(after, "train_sampling_strategy") == "group_by_length"
    for name in sorted({*before, *after}):
        old, new = value(before, name), value(after, name)
        if old == new:
            continue
        if name in BATCH:
            # With `auto_find_batch_size`, the Trainer takes the micro-batch of the checkpoint.
            is_found = bool(value(after, "auto_find_batch_size"))
            yield Change(name, old, new, is_refused=is_found, is_silent=not is_found)
        elif name in _LENGTH:
            least = steps_before if name == "max_steps" and steps_before else old
            yield Change(name, old, new, is_refused=_is_number(new, least) and 0 < new < least)
        else:
            # The lengths that rows are grouped by are those of the layout.
            is_of_order = is_grouped and name in ("pair_layout", "attn_implementation")
            may_change = not is_of_order and not (has_state and name in _OF_THESE)
            is_reported, is_free = name in REPORTED and may_change, name in FREE and may_change
            yield Change(name, old, new, is_refused=not is_reported and not is_free, is_silent=is_free)
    splits = [_split(settings, defaults) for settings in (before, after)]
    pairs = [_pairs(split, count) for split, count in zip(splits, processes, strict=True)]
    if value(after, "nll_reduction") == "micro_batch_mean" and splits[0][0] != splits[1][0]:
        # A mean of means over micro-batches is another loss for each size of these.
        pairs = [f"{pair} in micro-batches of {split[0]}" for pair, split in zip(pairs, splits, strict=True)]
    changed = pairs[0] != pairs[1]
    if changed:
        yield Change("pairs of an optimiser step", *pairs, is_refused=True)
    elif processes[0] != processes[1]:
        yield Change("processes", *processes)


def _split(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Micro-batch, accumulation and global batch; of the last two, one is None."""
    micro_batch, accumulation, whole = (settings.get(name, defaults.get(name)) for name in BATCH)
    return micro_batch, None if whole else accumulation or 1, whole


def _pairs(split: tuple[Any, Any, Any], processes: int) -> Any:
    """Pairs of an optimiser step; words where one is the name of an environment variable."""
    micro_batch, accumulation, whole = split
    if whole:
        return whole
    if not _is_number(micro_batch, accumulation):
        return f"{micro_batch} x {accumulation} x {processes}"
    return micro_batch * accumulation * processes


def _is_number(*values: Any) -> bool:
    """False for the name of an environment variable."""
    return all(isinstance(value, (int, float)) for value in values)


# ---- Facts -----------------------------------------------------------------------------------------------------------


def facts_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    """What differs in the data, the tokenizer and the adapter of a run that goes on.

    Args:
        before, after: run.json, or of `after` the same keys as they are now.
    """
    data = [(record.get("datasets") or {}).get("train") or {} for record in (before, after)]
    if None not in (old_new := [part.get("sha256") for part in data]) and old_new[0] != old_new[1]:
        rows = [f"{part.get('rows')} pairs, SHA-256 {part['sha256'][:12]}" for part in data]
        yield Change("the training pairs", *rows, is_refused=True)
    for key, name in (("tokenizer", "the tokenizer or its chat template"), ("adapter", "the settings of the adapter")):
        digests = [record.get(key) for record in (before, after)]
        if None not in digests and digests[0] != digests[1]:
            yield Change(name, *[str(digest)[:12] for digest in digests], is_refused=True)


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
    }
    for number, entry in enumerate(data.datasets):
        named[f"datasets.{number}.path"] = entry["path"]
        files = entry.get("data_files")
        files = list(files.values()) if isinstance(files, dict) else [files] if isinstance(files, str) else files or []
        for place, name in enumerate([*files, entry.get("data_dir")]):
            named[f"datasets.{number}.data_files.{place}"] = name
    return {key: name for key, name in named.items() if name}


def digests_of(inputs: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of local files and folders by key. Of a file of weights, its size and 64 places stand for the whole."""
    paths = {key: Path(name).expanduser() for key, name in inputs.items() if name}
    return {key: _digest(path) for key, path in paths.items() if path.exists()}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        name = file.name if file == path else str(file.relative_to(path))
        if file != path and any(part.startswith((".", "_")) for part in Path(name).parts):
            continue
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        with open(file, "rb") as content:
            if file.suffix in _WEIGHTS:
                for place in range(_PLACES):
                    content.seek(file.stat().st_size * place // _PLACES)
                    digest.update(content.read(_MIB // 16))
            else:
                while block := content.read(_MIB):
                    digest.update(block)
    return digest.hexdigest()


def touched_files(before: Mapping[str, str], after: Mapping[str, str], is_stream: bool) -> Iterator[Change]:
    """The files that settings name and that have changed.

    Args:
        before, after: from `digests_of`.
        is_stream: no fingerprint of the pairs will tell, so the files decide.
    """
    for key in sorted({*before} & {*after}):
        if before[key] != after[key]:
            # Else the pairs decide that are made of the data.
            is_refused = key.startswith("model") or is_stream
            yield Change(f"the files of `{key}`", before[key][:12], after[key][:12], is_refused=is_refused)
