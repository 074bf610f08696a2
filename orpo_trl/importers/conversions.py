"""Conversions that several tools need: distributed strategy, warm-up, truth values, datasets, LoRA targets."""

import re
from typing import Any

from orpo_trl.importers.draft import Draft, is_empty

TRL_OBJECTIVE = "TRL's objective"
FLASH = (
    "attn_implementation: a flash attention needs its package. Without this key, attention on CUDA is one call of "
    "torch's own variable-length kernel, which is as exact and needs none."
)
ROWS_DROPPED = (
    "Rows whose chosen response equals the rejected one, or where either side is empty, are dropped here and counted."
)


def convert_shared(draft: Draft) -> None:
    """What every tool takes from transformers: the keys of `CONVERTED`, and truth values that stand for a strategy."""
    draft.differs(ROWS_DROPPED)
    if draft.flag("group_by_length"):
        draft.set("train_sampling_strategy", "group_by_length", "group_by_length")
    draft.silent("group_by_length")
    if draft.has("warmup_ratio"):
        share = draft.number("warmup_ratio")
        if draft.settings.get("warmup_steps") == 0:  # transformers takes the share then
            del draft.settings["warmup_steps"]
        if share:
            draft.set("warmup_steps", share, "warmup_ratio")
        draft.silent("warmup_ratio")
    for key in ("eval_strategy", "save_strategy", "logging_strategy"):
        if draft.settings.get(key) is False:  # `no` in YAML 1.1
            draft.settings[key] = "no"
    _convert_sharding(draft)
    if str(draft.settings.get("attn_implementation")).startswith("flash_attention"):
        draft.differs(FLASH, draft.origins.get("attn_implementation", "attn_implementation"))


def _convert_sharding(draft: Draft) -> None:
    theirs = draft.config.values.get("deepspeed")
    if draft.has("deepspeed"):
        stage = theirs.get("zero_optimization", {}) if isinstance(theirs, dict) else _stage_in(str(theirs))
        stage = stage.get("stage") if isinstance(stage, dict) else stage
        if stage in (1, 2, 3):
            strategy = f"zero{max(stage, 2)}"
            draft.set("deepspeed", strategy, "deepspeed")
            draft.differs(
                f"The run shards by this project's {strategy}; other settings of the DeepSpeed config are not read.",
                "deepspeed",
            )
        else:
            draft.drop("deepspeed", "it names no ZeRO stage; write `deepspeed: zero2` or `zero3`")
    if draft.has("fsdp") or draft.has("fsdp_config"):
        strategy = "zero2" if "shard_grad_op" in str(draft.config.values.get("fsdp")) else "zero3"
        draft.set("deepspeed", strategy, "fsdp", "fsdp_config")
        draft.differs(
            f"The run shards by {strategy}, as the FSDP config does; other settings of that config are not read. For "
            "FSDP2 itself: `orpo-trl train FILE --engine fsdp2`.",
            "fsdp" if draft.has("fsdp") else "fsdp_config",
        )


def _stage_in(name: str) -> int | None:
    """The ZeRO stage in the name of a file: zero3_bf16.json, ds_z2_config.json, stage_3.json, ds2.yaml."""
    found = re.search(r"(?:zero|stage|ds|z)[-_]?([123])", name.lower())
    return int(found[1]) if found else None


def set_datasets(draft: Draft, entries: list[dict[str, Any]], *theirs: str, why: str = "") -> None:
    """Sources of training rows: as `dataset_name` where its keys suffice for the one source, else as `datasets`."""
    if len(entries) == 1 and set(entries[0]) <= {"path", "name", "split"}:
        entry = entries[0]
        for ours, part in (("dataset_name", "path"), ("dataset_config", "name"), ("dataset_train_split", "split")):
            if part in entry:
                draft.set(ours, entry[part], *theirs, why=why)
    else:
        draft.set("datasets", entries, *theirs, why=why)


def labelled(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Evaluation sets by label: the last part of the path, numbered where two are the same."""
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        name = re.sub(r"\W+", "_", str(entry["path"]).rstrip("/").split("/")[-1]).strip("_") or "test"
        label = name
        while label in found:
            label = f"{name}_{len(found) + 1}"
        found[label] = entry
    return found


def entries_of(draft: Draft, key: str, kept: dict[str, str], dropped: dict[str, str]) -> list[dict[str, Any]]:
    """A list of dataset entries with our names.

    Args:
        draft: its config holds the list at `key`.
        kept: their names to ours.
        dropped: their names to the reason why they are left out.
    """
    entries = []
    for index, theirs in enumerate(draft.take(key, list, "a list of datasets", [])):
        if not isinstance(theirs, dict):
            draft.config.fail(key, f"expected a mapping for each dataset, received {theirs!r:.60}")
        entry = {}
        for name, value in theirs.items():
            if not is_empty(value) and name in kept:
                entry[kept[name]] = value
            elif not is_empty(value):
                draft.drop(key, dropped.get(str(name), "left out"), (index, name))
        if "path" not in entry:
            path = next(name for name, ours in kept.items() if ours == "path")
            draft.config.fail(key, f"dataset {index} has no `{path}`")
        entries.append(entry)
    return entries


def modules(value: str | list) -> str | list[str]:
    """LoRA's target modules: names in a list or between commas; `all` is every linear layer."""
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value)
    return "all-linear" if names in (["all"], ["all-linear"]) else names
