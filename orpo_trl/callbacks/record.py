"""Writes to the output folder what a run was made of and what it measured."""

import hashlib
import json
import logging
import platform
import subprocess
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback

from orpo_trl import run_folder
from orpo_trl.callbacks.trackers import current_run_id
from orpo_trl.config import ORPOConfig
from orpo_trl.hidden import hide
from orpo_trl.resume import BEGAN_AT, OF_ONE_START
from orpo_trl.upstream import full_shape, is_remote_code
from orpo_trl.versions import installed_versions
from orpo_trl.yaml_text import to_yaml, to_yaml_line

logger = logging.getLogger(__name__)


class RunRecord(TrainerCallback):
    """Writes the files of `run_folder.py`, on the main process only.

    A new run replaces the files of an earlier run in the same folder. A run that goes on continues them from its step:
    `started` stays, `history` gains an entry, and recipe.yaml is only written again where a setting has changed.

    Args:
        trainer: its datasets, preparation reports and recipe are written.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self._record: dict[str, Any] | None = None
        self._has_trained = False

    @property
    def _folder(self) -> Path:
        return self.trainer.run_folder

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        # What this process wrote before training, such as an evaluation of the untrained model, belongs to this run.
        if state.global_step or self._record is None or self._has_trained:
            known = sum(log.get("step") == state.global_step for log in state.log_history)
            run_folder.keep_until(self._folder, state.global_step or -1, known)
        self._begin(state)

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs):
        if not state.is_world_process_zero:
            return
        if not (self._folder / run_folder.RUN).is_file():
            if self._record is not None:
                logger.warning("%s was removed while the run writes there. Its files so far are gone.", self._folder)
            self._begin(state)
        self._has_trained |= "loss" in (logs or {})
        # `epoch` is among the logs of training. `total_flos` is an estimate that does not know of shared prompts.
        log = {name: value for name, value in (logs or {}).items() if name != "total_flos"}
        run_folder.append_log(self._folder, {"step": state.global_step, **log})

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.trainer.interruption is None:
            record = {**(self._record or {}), "finished": run_folder.now(), "last_step": state.global_step}
            run_folder.write_record(self._folder, record)
        self._has_trained = False
        self._record = None  # the next call of `train` begins another run

    def _begin(self, state) -> None:
        trainer = self.trainer
        start = trainer.start
        preparation = {name: report.to_dict() for name, report in trainer.preparation_reports.items()}
        self._record = {"id": start.run_id, **describe_run(trainer, state), "inputs": dict(start.inputs)}
        recipe = trainer.recipe
        if start.is_continued:
            history, recipe = self._history(state.global_step)
            kept = {name: start.record[name] for name in ("started", BEGAN_AT) if name in start.record}
            self._record |= {**kept, "history": history}
        elif start.checkpoint:
            self._record[BEGAN_AT] = str(Path(start.checkpoint).resolve())
        run_folder.write_origin(self._folder, recipe, preparation, self._record)

    def _history(self, step: int) -> tuple[list[dict[str, Any]], str | None]:
        """What each start of a run that went on has changed, and the recipe with that as comments; None as it was."""
        start = self.trainer.start
        history = [*start.record.get("history", [])]
        changed = {change.name: [change.old, change.new] for change in start.changes}
        history.append({"time": run_folder.now(), "from_step": step, "changed": changed})
        if not changed:
            return history, None
        told = [
            f"# {entry['time']}, from step {entry['from_step']}: {name}: {to_yaml_line(old)} -> {to_yaml_line(new)}\n"
            for entry in history
            for name, (old, new) in entry["changed"].items()
        ]
        return history, f"# Changed when the run went on:\n{''.join(told)}{self.trainer.recipe}"


def describe_run(trainer, state) -> dict[str, Any]:
    """What a run is made of, as plain values: versions, seed, git revision, devices, model and data."""
    args = trainer.args
    decides = what_decides(trainer)
    datasets = {**decides["datasets"], **evaluated_data(trainer)}
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "started": run_folder.now(),
        "resumed_from_step": state.global_step or None,
        "seed": args.seed,
        "beta": args.beta,
        "max_steps": state.max_steps,
        "warmup_steps": args.get_warmup_steps(state.max_steps) if state.max_steps else 0,
        "processes": trainer.accelerator.num_processes,
        "engine": trainer.accelerator.distributed_type.value.lower().replace("no", "none"),
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type,
        "layout": trainer.layout,
        "remote_code": remote_code_of(trainer),
        "model": {"name": model.config.name_or_path or model.config.model_type, "parameters": _parameters(model)},
        **decides,
        "datasets": datasets,
        "sharding": trainer.sharding,
        "wandb_run_id": current_run_id(),
        "git": git_revision(),
        "python": platform.python_version(),
        "versions": installed_versions(),
    }


def evaluated_data(trainer) -> dict[str, dict[str, Any]]:
    """Rows and SHA-256 of each evaluation set, by its name."""
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    return {name: _describe_data(dataset) for name, dataset in sets.items() if dataset is not None}


def what_decides(trainer) -> dict[str, Any]:
    """What must stay when a run goes on, beside its settings: see `resume_rules.facts_changes`."""
    train = trainer.train_dataset
    return {
        "datasets": {} if train is None else {"train": _describe_data(train)},
        "tokenizer": tokenizer_digest(trainer.text_tokenizer),
        "adapter": adapter_digest(trainer.accelerator.unwrap_model(trainer.model)),
    }


def remote_code_of(trainer) -> list[str]:
    """What code from a model's folder or the Hub has made: `model` and `tokenizer`, with their names."""
    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.text_tokenizer
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    parts = {"model": (model, model.config.name_or_path), "tokenizer": (tokenizer, tokenizer.name_or_path)}
    return [f"{part} {hide(name or '')}".strip() for part, (made, name) in parts.items() if is_remote_code(made)]


def settings_as_recipe(args: ORPOConfig, model_name: str) -> str:
    """The settings that are not the default, as a recipe, for a run without a recipe; tokens are left out."""
    values: dict[str, Any] = {"model_name_or_path": model_name} if model_name else {}
    plain = args.to_dict()
    if plain.get("model_init_kwargs"):  # the trainer adds this where there are several processes
        plain["model_init_kwargs"] = {
            k: v for k, v in plain["model_init_kwargs"].items() if (k, v) != ("device_map", None)
        }
    for field in fields(args):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        is_kept = field.init and field.name not in OF_ONE_START and not field.name.endswith("_token")
        value = args.asked.get(field.name, getattr(args, field.name))
        if is_kept and value != default:
            values[field.name] = value if field.name in args.asked else plain.get(field.name)
    if args.global_batch_size is not None:
        # What follows from it holds for these processes alone.
        values["per_device_train_batch_size"], asked = args.asked_split
    else:
        asked = None if args.gradient_accumulation_steps == 1 else args.gradient_accumulation_steps
    values["gradient_accumulation_steps"] = asked
    if asked is None:
        del values["gradient_accumulation_steps"]
    return f"# The settings of a run without a recipe\n{to_yaml(values)}"


def _parameters(model: torch.nn.Module) -> int:
    return sum(full_shape(weight).numel() for weight in model.parameters())


def _describe_data(dataset: Dataset | IterableDataset) -> dict[str, Any]:
    if isinstance(dataset, IterableDataset):
        return {"rows": None, "sha256": None}
    return {"rows": len(dataset), "sha256": token_digest(dataset)}


def token_digest(pairs: Dataset) -> str:
    """SHA-256 of the token ids of all pairs in their order: equal wherever the same pairs were prepared."""
    digest = hashlib.sha256()
    pairs = pairs.with_format("arrow")
    for start in range(0, len(pairs), 1000):
        rows = pairs[start : start + 1000]
        for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
            lengths = pc.call_function("list_value_length", [rows[column]]).fill_null(-1)
            for part in (lengths, pc.call_function("list_flatten", [rows[column]])):
                digest.update(part.to_numpy().astype("<i4").tobytes())
    return digest.hexdigest()


def adapter_digest(model) -> str | None:
    """SHA-256 of an adapter's settings, which `ORPOTrainer` takes as an object; None for a model without one."""
    if not is_peft_model(model):
        return None
    of_file = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")
    settings = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in model.peft_config[model.active_adapter].to_dict().items()
        if name not in of_file
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_digest(tokenizer) -> str:
    """SHA-256 of what decides how texts become ids: vocabulary, added tokens, chat template."""
    digest = hashlib.sha256(str(tokenizer.chat_template).encode())
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0])):
        digest.update(f"{number} {token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def git_revision() -> dict[str, Any] | None:
    """Commit of the repository in which the run was started, and whether files differ from it; None outside of one."""
    try:
        revision = _git("rev-parse", "HEAD")
        return {"revision": revision, "changed": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
