"""axolotl: YAML with `rl: orpo`, which runs TRL's ORPOTrainer.

Keys and defaults: axolotl's src/axolotl/utils/schemas, core/builders, loaders/model.py and utils/data/rl.py.
"""

from typing import Any

from orpo_trl.importers.conversions import TRL_OBJECTIVE, convert_shared, entries_of, labelled, modules, set_datasets
from orpo_trl.importers.draft import Draft, Tool
from orpo_trl.importers.foreign_keys import CONVERTED, DROPPED, RENAMED

_RENAMED = {
    "base_model": "model_name_or_path",
    "revision_of_model": "model_revision",
    "tokenizer_config": "tokenizer_name_or_path",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "sequence_len": "max_length",
    "dataset_processes": "dataset_num_proc",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "wandb_name": "run_name",
    "wandb_mode": "wandb_mode",
    "mlflow_run_name": "run_name",
}
_ATTENTION = {
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
    "flex_attention": "flex_attention",
    "flash_attention": "flash_attention_2",
}
_CONVERTED = {
    **{key: ("attn_implementation", f"true is {name}") for key, name in _ATTENTION.items()},
    "rl": (None, "every recipe is ORPO's"),
    "trl": (None, "`trl.beta` is `beta`"),
    "rl_beta": ("beta", ""),
    "orpo_alpha": ("beta", ""),
    "adapter": ("use_peft", "true for lora and qlora"),
    "lora_target_linear": ("lora_target_modules", "true is all-linear"),
    "lora_target_modules": ("lora_target_modules", ""),
    "load_in_4bit": ("load_in_4bit", ""),
    "bf16": ("bf16", ""),
    "bfloat16": ("dtype", "true is bfloat16"),
    "fp16": ("fp16", ""),
    "float16": ("dtype", "true is float16"),
    "chat_template": ("chat_template_path", "a .jinja file; unset, the tokenizer's own"),
    "chat_template_jinja": ("chat_template_path", "a .jinja file"),
    "special_tokens": (None, "`pad_token` and `eos_token` are keys"),
    "datasets": ("datasets", ""),
    "test_datasets": ("eval_datasets", "a mapping of labels to sources"),
    "val_set_size": ("test_split_size", "with `eval_strategy`"),
    "evals_per_epoch": ("eval_steps", "a share of the run below 1, with `eval_strategy: steps`"),
    "saves_per_epoch": ("save_steps", "a share of the run below 1, with `save_strategy: steps`"),
    "gradient_checkpointing": ("gradient_checkpointing", ""),
    "batch_size": ("gradient_accumulation_steps", "batch_size / micro_batch_size"),
    "use_wandb": ("report_to", "wandb"),
    "wandb_project": ("project", "with `report_to: wandb`"),
    "use_tensorboard": ("report_to", "tensorboard"),
    "use_mlflow": ("report_to", "mlflow"),
    "use_comet": ("report_to", "comet_ml"),
}
_WANDB = "set the environment variable {}"
_CLASSES = "the classes are those of the model's config"
_PACKING = "pairs have their own layout: each prompt runs once, without padding"
_KERNELS = "the LM head and the loss are fused as they are"
_DROPPED = {
    **{f"wandb_{name}": _WANDB.format(f"WANDB_{name.upper()}") for name in ("entity", "watch", "log_model")},
    "wandb_run_id": _WANDB.format("WANDB_RUN_ID"),
    **dict.fromkeys(("model_type", "type_of_model", "tokenizer_type", "processor_type", "base_model_config"), _CLASSES),
    **dict.fromkeys(("sample_packing", "eval_sample_packing", "pad_to_sequence_len", "batch_flattening"), _PACKING),
    **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), _KERNELS),
    "xformers_attention": "on CUDA, attention is one call of torch's variable-length kernel",
    "dataset_prepared_path": "rows are tokenised anew in each run",
    "max_prompt_len": "axolotl drops pairs above sequence_len, so that this cuts nothing",
    "train_on_inputs": "`nll_scope` says whether the NLL covers the prompt",
    "shuffle_merged_datasets": "training rows are drawn in random order",
    "skip_prepare_dataset": "rows are always prepared",
    "dataset_exact_deduplication": "equal rows are kept; leave them out of the data",
    "lora_model_dir": "an adapter to go on from; merge it into the model first",
    "lora_fan_in_fan_out": "peft detects it from the layers",
    "loss_watchdog_threshold": "a non-finite loss is logged with its step; no loss stops the run",
    "loss_watchdog_patience": "a non-finite loss is logged with its step; no loss stops the run",
    "early_stopping_patience": "the run does not stop early; `load_best_model_at_end` keeps the best checkpoint",
    "tokens": "no tokens are added; add them to the tokenizer first",
    "default_system_message": "no turn is added; write it into the rows or the template",
    "strict": "every key is checked",
    "gptq": "no quantised weights but those of `load_in_4bit` and `load_in_8bit`",
    "relora": "there is no ReLoRA",
    "unfrozen_parameters": "all weights are trained, or those of LoRA",
    "hf_use_auth_token": "run `hf auth login`",
    "auto_resume_from_checkpoints": "`resume: auto` goes on from the latest",
    "rpo_alpha": "ORPO has no such term",
    "plugins": "axolotl's plugins do not run here",
    "cosine_min_lr_ratio": "`lr_scheduler_type: cosine_with_min_lr` with `lr_scheduler_kwargs: {min_lr_rate: …}`",
    "sequence_parallel_degree": "a row is never split over GPUs",
    "context_parallel_size": "a row is never split over GPUs",
}  # fmt: skip
_ENTRY = {
    **{key: key for key in ("path", "name", "split", "data_files")},
    "field_chosen": "chosen",
    "field_rejected": "rejected",
}
_ENTRY_DROPPED = {
    "type": "the shape of a row shows what is prompt, chosen and rejected",
    "ds_type": "the file's ending shows it",
    "revision": "the newest revision is read",
    "trust_remote_code": "datasets run no code",
    "chat_template": "`chat_template_path` names one for all rows",
    "field_messages": "name columns with `columns: {chosen: …, rejected: …}`",
}
_TEMPLATE = (
    "axolotl has templates of its own; here the tokenizer's chat template is used, or the .jinja file that "
    "`chat_template_path` names"
)
_KNOWN_TYPES = ("chat_template.argilla", "chat_template.argilla_chat", "orpo.chat_template", "chat_template")

# Types whose columns have fixed names.
_OWN_COLUMNS = ("chat_template.argilla", "orpo.chat_template")


def _check(values: dict[str, Any]) -> str | None:
    if values.get("rl") == "orpo" or (values.get("rl") is None and _is_first_version(values)):
        return None
    found = f"found `rl: {values['rl']}`" if values.get("rl") else "found no `rl`"
    return f"expected `rl: orpo`, {found}"


def _is_first_version(values: dict[str, Any]) -> bool:
    """axolotl's first ORPO had a loss of its own, switched on by `orpo_alpha`, and no `rl`."""
    sources = values.get("datasets")
    types = [entry.get("type") for entry in sources if isinstance(entry, dict)] if isinstance(sources, list) else []
    return bool(values.get("orpo_alpha")) and any(str(kind).startswith("orpo.") for kind in types)


def _convert(draft: Draft) -> None:
    first_version = draft.config.values.get("rl") is None
    draft.silent("rl")
    _convert_objective(draft, first_version)
    _convert_model(draft)
    _convert_data(draft)
    convert_shared(draft)
    _convert_schedule(draft)
    _convert_reports(draft)


def _convert_objective(draft: Draft, first_version: bool) -> None:
    trl = draft.take("trl", dict, "a mapping", {})
    for name in trl:
        if name == "beta" and trl["beta"] is not None:
            draft.set("beta", trl["beta"], "trl", why="trl.beta")
        elif trl[name] is not None:
            draft.drop("trl", "a setting of TRL's other trainers; left out", (name,))
    draft.silent("trl")
    for key in ("rl_beta", "orpo_alpha"):
        if draft.has(key):
            draft.set("beta", draft.number(key), key)
    draft.default("beta", 0.1)
    draft.set("nll_scope", "sequence", why=TRL_OBJECTIVE if not first_version else "axolotl's first ORPO")
    if first_version:
        draft.set("nll_reduction", "sequence_mean", why="nearest to axolotl's first ORPO")
        draft.differs(
            "A config without `rl` ran axolotl's first ORPO, whose NLL is the mean over all positions of the padded "
            "batch, padding included. `nll_reduction: sequence_mean` leaves the padding out, so that beta weighs less.",
            "orpo_alpha",
        )
    else:
        draft.set("nll_reduction", "micro_batch_mean", why=TRL_OBJECTIVE)
        draft.differs(
            "axolotl runs TRL's ORPOTrainer: the NLL covers prompt and chosen response, as a mean over the tokens of "
            "each micro-batch, and `nll_reduction: micro_batch_mean` keeps that. TRL also appends an end-of-sequence "
            "token to a response that does not end in one; here rows end as the template ends them."
        )


def _convert_model(draft: Draft) -> None:
    adapter = draft.take("adapter", str, "lora or qlora")
    if adapter in ("lora", "qlora"):
        draft.set("use_peft", True, "adapter")
        draft.default("lora_dropout", 0.0)
    elif adapter:
        draft.drop("adapter", "only lora and qlora have an equal; all weights would be trained")
    if draft.flag("lora_target_linear"):
        draft.set("lora_target_modules", "all-linear", "lora_target_linear", "lora_target_modules")
    elif draft.has("lora_target_modules"):
        names = draft.take("lora_target_modules", (str, list), "a name or a list of names")
        draft.set("lora_target_modules", modules(names), "lora_target_modules")
    in_4bit = draft.flag("load_in_4bit")
    if in_4bit or adapter == "qlora":
        draft.set("load_in_4bit", True, "load_in_4bit" if in_4bit else "adapter")
        draft.default("bnb_4bit_quant_type", "nf4")
        draft.default("use_bnb_nested_quant", True)
    _convert_precision(draft)
    for key, name in _ATTENTION.items():
        if draft.flag(key):
            draft.set("attn_implementation", name, key)
    tokens = draft.take("special_tokens", dict, "a mapping", {})
    for name, token in tokens.items():
        if token is not None and name in ("pad_token", "eos_token"):
            draft.set(name, token, "special_tokens", why=f"special_tokens.{name}")
        elif token is not None:
            draft.drop("special_tokens", "no tokens are added; change the tokenizer first", (name,))
    draft.silent("adapter", "lora_target_linear", "load_in_4bit", "special_tokens")
    draft.silent(*_ATTENTION)


def _convert_precision(draft: Draft) -> None:
    half = draft.flag("fp16") or draft.flag("float16")
    bf16 = draft.take("bf16", (bool, str), "true, false, auto or full", None if half else "auto")
    if bf16 == "full":
        draft.set("bf16", False, "bf16", why="weights of 16 bits need no autocast")
    elif bf16 or draft.flag("bfloat16"):
        draft.set("bf16", True, "bf16", why="axolotl's auto" if bf16 == "auto" else "")
    else:
        draft.set("bf16", False, "bf16")
    if draft.flag("fp16"):
        draft.set("fp16", True, "fp16")
    dtype = "bfloat16" if draft.settings.get("bf16") or bf16 == "full" else "float16" if half else "float32"
    draft.set("dtype", dtype, "bfloat16", "float16", why="as axolotl loads the weights")
    draft.silent("bf16", "fp16", "bfloat16", "float16")


def _convert_data(draft: Draft) -> None:
    draft.default("max_length", 512)
    draft.differs(
        "axolotl drops a pair if one of its rows is longer than sequence_len; here responses are cut on the right at "
        "max_length.",
        "sequence_len" if draft.has("sequence_len") else None,
    )
    for key in ("chat_template_jinja", "chat_template"):
        template = draft.take(key, str, "a name, a template or a .jinja file")
        if template and template.endswith((".jinja", ".jinja2", ".j2")):
            draft.set("chat_template_path", template, key)
        elif template in ("tokenizer_default", "jinja"):
            draft.silent(key)
        elif template:
            draft.drop(key, _TEMPLATE)
    sources = draft.take("datasets", list, "a list of datasets", [])
    known = [entry for entry in sources if isinstance(entry, dict) and entry.get("type") in _KNOWN_TYPES]
    entries = entries_of(draft, "datasets", {**_ENTRY, "type": "type"}, _ENTRY_DROPPED)
    for index, entry in enumerate(entries):
        _name_columns(draft, "datasets", index, entry)
        kind = entry.pop("type", None)
        if kind is not None and sources[index] not in known:
            draft.drop("datasets", _ENTRY_DROPPED["type"], (index, "type"))
    if not entries:
        draft.config.fail("datasets", "expected a list of datasets, found none")
    set_datasets(draft, entries, "datasets")
    draft.differs(
        "The prompt is every turn but the last answer, as with axolotl's type chat_template.argilla; older versions of "
        "axolotl read only the first question and answer. The tokenizer's chat template renders the rows.",
        "datasets",
    )


def _name_columns(draft: Draft, key: str, index: int, entry: dict[str, Any]) -> None:
    columns = {side: entry.pop(side) for side in ("chosen", "rejected") if side in entry}
    if entry.get("type") in _OWN_COLUMNS:  # without `columns`, every column of a pair is read, `system` among them
        for side in columns:
            text = f"axolotl's type {entry['type']} reads chosen, rejected and system, whatever this says; left out"
            draft.drop(key, text, (index, f"field_{side}"))
    elif columns:
        entry["columns"] = {"chosen": "chosen", "rejected": "rejected", **columns}


def _convert_schedule(draft: Draft) -> None:
    whole = draft.number("batch_size")
    if whole is not None:
        per_device = draft.settings.get("per_device_train_batch_size", 1)
        if "gradient_accumulation_steps" in draft.settings or not isinstance(per_device, int) or not per_device:
            draft.drop("batch_size", "per_device_train_batch_size and gradient_accumulation_steps already set it")
        else:
            draft.set("gradient_accumulation_steps", int(whole // per_device) or 1, "batch_size")
    if draft.has("gradient_checkpointing"):
        value = draft.take("gradient_checkpointing", (bool, str), "true, false or offload")
        draft.set("gradient_checkpointing", bool(value), "gradient_checkpointing")
        if isinstance(value, str):
            draft.set("activation_offloading", True, "gradient_checkpointing")
    draft.default("gradient_checkpointing", False)
    for ours, value in (("num_train_epochs", 1), ("per_device_train_batch_size", 1), ("lr_scheduler_type", "cosine")):
        draft.default(ours, value)
    draft.default("warmup_steps", 0.03, "axolotl's default: 3 % of the steps, at most 100")
    _convert_evaluation(draft)
    epochs = draft.settings["num_train_epochs"]
    per_epoch = draft.number("saves_per_epoch")
    if per_epoch:
        share = 1 / (per_epoch * epochs) if isinstance(epochs, (int, float)) and epochs else 1
        if share < 1 and "save_steps" not in draft.settings:
            draft.settings.pop("save_strategy", None)
            draft.set("save_strategy", "steps", "saves_per_epoch")
            draft.set("save_steps", share, "saves_per_epoch")
        else:
            draft.silent("saves_per_epoch")  # once in the run, at its end
    draft.default("save_strategy", "steps" if "save_steps" in draft.settings else "epoch")
    draft.default("save_total_limit", 4)


def _convert_evaluation(draft: Draft) -> None:
    tests = entries_of(draft, "test_datasets", {**_ENTRY, "type": "type"}, _ENTRY_DROPPED)
    for index, entry in enumerate(tests):
        _name_columns(draft, "test_datasets", index, entry)
        entry.pop("type", None)
    size = draft.number("val_set_size", 0)
    if tests:
        draft.set("eval_datasets", labelled(tests), "test_datasets")
    elif size:
        draft.set("test_split_size", size, "val_set_size")
        draft.differs("As many rows are held out as by axolotl, but not the same rows.", "val_set_size")
    draft.silent("val_set_size")
    per_epoch = draft.number("evals_per_epoch")
    if not tests and not size:
        for key in ("eval_strategy", "eval_steps"):
            draft.settings.pop(key, None)
        draft.set("eval_strategy", "no", "eval_strategy", "eval_steps", "evals_per_epoch", why="nothing to evaluate on")
        return
    epochs = draft.settings["num_train_epochs"]
    share = 1 / (per_epoch * epochs) if per_epoch and isinstance(epochs, (int, float)) and epochs else 1
    if share < 1:
        for key in ("eval_strategy", "eval_steps"):
            draft.settings.pop(key, None)
        draft.set("eval_strategy", "steps", "evals_per_epoch")
        draft.set("eval_steps", share, "evals_per_epoch")
    draft.silent("evals_per_epoch")
    draft.default("eval_strategy", "steps" if "eval_steps" in draft.settings else "epoch", "chosen here")
    draft.default("per_device_eval_batch_size", draft.settings["per_device_train_batch_size"])


def _convert_reports(draft: Draft) -> None:
    names = {"use_wandb": "wandb", "use_tensorboard": "tensorboard", "use_mlflow": "mlflow", "use_comet": "comet_ml"}
    on = [key for key in names if draft.flag(key)]
    if draft.has("wandb_project"):
        draft.set("project", draft.take("wandb_project", str, "text"), "wandb_project")
        if not draft.has("use_wandb"):
            on.insert(0, "wandb_project")
    if on:
        reports = list(dict.fromkeys(names.get(key, "wandb") for key in on))
        draft.set("report_to", reports, *(key for key in on if key in names), why=", ".join(on))
    if "hub_model_id" in draft.settings:
        draft.default("push_to_hub", True)
        draft.default("hub_private_repo", True)
    draft.silent(*names)


AXOLOTL = Tool(
    id="axolotl",
    name="axolotl",
    renamed={**RENAMED, **_RENAMED},
    converted={**CONVERTED, **_CONVERTED},
    dropped={**DROPPED, **_DROPPED},
    switches=frozenset(
        "sample_packing eval_sample_packing pad_to_sequence_len batch_flattening lora_mlp_kernel lora_qkv_kernel "
        "lora_o_kernel xformers_attention strict gptq relora train_on_inputs skip_prepare_dataset "
        "dataset_exact_deduplication auto_resume_from_checkpoints remove_unused_columns lora_fan_in_fan_out "
        "bf16_full_eval fp16_full_eval hf_use_auth_token do_train do_eval do_predict packing".split()
    ),
    convert=_convert,
    check=_check,
)
