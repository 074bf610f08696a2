"""LLaMA-Factory: YAML with `stage: dpo` and `pref_loss: orpo`, or in older versions `stage: orpo`.

Keys and defaults: LLaMA-Factory's src/llamafactory/hparams; objective: train/dpo/trainer.py; cutting: data/processors.
"""

from typing import Any

from orpo_trl.importers.conversions import convert_shared, labelled, modules, set_datasets
from orpo_trl.importers.draft import Draft, Tool
from orpo_trl.importers.foreign_keys import CONVERTED, DROPPED, RENAMED

_RENAMED = {
    "preprocessing_num_workers": "dataset_num_proc",
    "streaming": "dataset_streaming",
    "cutoff_len": "max_length",
    "lora_rank": "lora_r",
    "quantization_type": "bnb_4bit_quant_type",
    "train_from_scratch": "from_scratch",
    "moe_aux_loss_coef": "router_aux_loss_coef",
}
_CONVERTED = {
    "stage": (None, "every recipe is ORPO's"),
    "pref_loss": (None, "every recipe is ORPO's"),
    "pref_beta": ("beta", ""),
    "orpo_beta": ("beta", ""),
    "pref_ftx": ("beta", "the NLL counts 1 + pref_ftx times: beta is pref_beta / (1 + pref_ftx)"),
    "finetuning_type": ("use_peft", "true for lora"),
    "lora_target": ("lora_target_modules", "all is all-linear"),
    "lora_alpha": ("lora_alpha", ""),
    "additional_target": ("lora_modules_to_save", "a list"),
    "quantization_bit": ("load_in_4bit", "or load_in_8bit"),
    "double_quantization": ("use_bnb_nested_quant", ""),
    "dataset": ("dataset_name", "a Hub id, folder or file"),
    "eval_dataset": ("eval_datasets", "a mapping of labels to sources"),
    "val_size": ("test_split_size", "with `eval_strategy`"),
    "flash_attn": ("attn_implementation", "sdpa, eager, flash_attention_2 or flash_attention_3"),
    "disable_gradient_checkpointing": ("gradient_checkpointing", "with the opposite value"),
    "disable_shuffling": ("train_sampling_strategy", "sequential"),
    "pure_bf16": ("dtype", "bfloat16, with `bf16: true`"),
    "bf16": ("bf16", ""),
}
_ATTENTION = {"disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}
_OTHER_LOSSES = "a setting of other preference losses"
_OPTIMISER = "an optimiser of LLaMA-Factory; `optim` takes those of transformers"
_SWANLAB = "set `report_to: swanlab`, and swanlab's settings by environment variables"
_GENERATION = "`generate_during_eval` generates greedy answers to held-out prompts"
_FREEZE = "all weights are trained, or those of LoRA"
_IMAGES = "images and sounds are not read"
_DATA = "rows are tokenised anew in each run"
_DROPPED = {
    **dict.fromkeys(("pref_bco_weight", "dpo_label_smoothing", "simpo_gamma", "ld_alpha", "ref_model"), _OTHER_LOSSES),
    **dict.fromkeys("use_galore use_apollo use_badam use_adam_mini use_muon loraplus_lr_ratio".split(), _OPTIMISER),
    **dict.fromkeys("use_swanlab swanlab_project swanlab_run_name swanlab_mode swanlab_api_key".split(), _SWANLAB),
    **dict.fromkeys(("predict_with_generate", "generation_max_length", "generation_num_beams"), _GENERATION),
    **dict.fromkeys(("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules"), _FREEZE),
    **dict.fromkeys(("image_max_pixels", "video_max_pixels", "media_dir", "freeze_vision_tower"), _IMAGES),
    **dict.fromkeys(("overwrite_cache", "tokenized_path", "preprocessing_batch_size"), _DATA),
    **dict.fromkeys(("hf_hub_token", "ms_hub_token", "om_hub_token"), DROPPED["hub_token"]),
    "template": "LLaMA-Factory has templates of its own; here the tokenizer's is used, or that of `chat_template_path`",
    "dataset_dir": "`dataset_name` and `datasets` name each source itself",
    "max_samples": "all rows are used; `weight` in `datasets` takes a share of a source's",
    "train_on_prompt": "`nll_scope: sequence` lets the NLL cover the prompt",
    "mask_history": "the response is the last answer alone",
    "mix_strategy": "sources are joined; `weight` in `datasets` says how often each one's rows are used",
    "interleave_probs": "sources are joined; `weight` in `datasets` says how often each one's rows are used",
    "buffer_size": "a stream is read in its own order",
    "neat_packing": DROPPED["packing"],
    "adapter_name_or_path": "an adapter to go on from; merge it into the model first",
    "create_new_adapter": "an adapter to go on from; merge it into the model first",
    "resize_vocab": "no tokens are added; add them to the tokenizer first",
    "add_tokens": "no tokens are added; add them to the tokenizer first",
    "add_special_tokens": "no tokens are added; add them to the tokenizer first",
    "pissa_init": "LoRA starts from peft's own initialisation",
    "rope_scaling": "set it in the model's config",
    "shift_attn": "attention is the model's own",
    "enable_liger_kernel": "the LM head and the loss are fused as they are",
    "use_unsloth": "the model runs as transformers has it",
    "use_unsloth_gc": "gradient checkpointing is torch's",
    "use_reentrant_gc": "`gradient_checkpointing_kwargs: {use_reentrant: …}`",
    "upcast_layernorm": "`dtype` is that of all weights",
    "upcast_lmhead_output": "log-probabilities are computed in 32 bits",
    "use_fast_tokenizer": "the tokenizer is the fast one",
    "low_cpu_mem_usage": "weights are always loaded that way",
    "cache_dir": "set the environment variable HF_HUB_CACHE",
    "plot_loss": "`report_to` sends the curves to wandb or TensorBoard",
    "compute_accuracy": "the log has `rewards/accuracies`",
    "early_stopping_steps": "the run does not stop early; `load_best_model_at_end` keeps the best checkpoint",
    "include_effective_tokens_per_second": "the log has `num_tokens`",
    "print_param_status": "the layers are not listed",
    "ray_run_name": "runs start without Ray",
    "ray_num_workers": "runs start without Ray",
}  # fmt: skip


def _check(values: dict[str, Any]) -> str | None:
    if values.get("stage") == "orpo" or (values.get("stage") == "dpo" and values.get("pref_loss") == "orpo"):
        return None
    found = [f"`{key}: {values[key]}`" for key in ("stage", "pref_loss") if values.get(key)]
    missing = [f"no `{key}`" for key in ("stage", "pref_loss") if not values.get(key)]
    return f"expected `stage: dpo` with `pref_loss: orpo`, found {' and '.join([*found, *missing])}"


def _convert(draft: Draft) -> None:
    draft.silent("stage", "pref_loss")
    _convert_weights(draft)
    draft.set("nll_scope", "completion", why="LLaMA-Factory's objective")
    draft.set("nll_reduction", "sequence_mean", why="LLaMA-Factory's objective")
    draft.differs(
        "LLaMA-Factory's NLL covers the chosen response alone, as the mean over each row, which `nll_scope: "
        "completion` and `nll_reduction: sequence_mean` do too. With the same beta this is another objective than that "
        "of the paper, TRL and the authors, whose NLL also covers the prompt: `nll_scope: sequence`, `nll_reduction: "
        "token_mean`."
    )
    _convert_lora(draft)
    _convert_precision(draft)
    _convert_data(draft)
    convert_shared(draft)
    draft.default("learning_rate", 5.0e-5)
    if draft.flag("disable_shuffling"):
        draft.set("train_sampling_strategy", "sequential", "disable_shuffling")
    draft.silent("disable_shuffling")


def _convert_weights(draft: Draft) -> None:
    """LLaMA-Factory's loss is (1 + pref_ftx) · NLL + pref_beta · L_OR; ours gives the NLL the weight 1."""
    extra = draft.number("pref_ftx") or 0.0
    weighs = extra > 1e-6  # LLaMA-Factory leaves out a weight below
    nll = 1 + extra if weighs else 1
    factor = ("pref_ftx",) if weighs else ()
    for key in ("pref_beta", "orpo_beta"):
        value = draft.number(key)
        if value is not None:
            draft.set("beta", value / nll, key, *factor)
    if weighs and "beta" not in draft.settings:
        draft.set("beta", 0.1 / nll, *factor)
    draft.default("beta", 0.1)
    if weighs:
        draft.differs(
            f"pref_ftx: LLaMA-Factory adds it to the NLL's weight, so that beta is pref_beta / (1 + pref_ftx) = "
            f"{draft.settings['beta']:.4g}. LLaMA-Factory's whole loss is {nll:g} times this one: a step of AdamW does "
            "not depend on that, but the gradient norm that `max_grad_norm` cuts does.",
            "pref_ftx",
        )
    draft.silent("pref_ftx")


def _convert_lora(draft: Draft) -> None:
    kind = draft.take("finetuning_type", str, "lora or full", "lora")
    if kind == "lora":
        draft.set("use_peft", True, "finetuning_type")
        draft.default("lora_r", 8)
        rank = draft.settings["lora_r"]
        draft.set(
            "lora_alpha",
            draft.number("lora_alpha") or (2 * rank if isinstance(rank, int) else 16),
            "lora_alpha",
            why="" if draft.has("lora_alpha") else "LLaMA-Factory's default: twice the rank",
        )
        draft.default("lora_dropout", 0.0)
        target = draft.take("lora_target", (str, list), "names between commas, or all", "all")
        draft.set("lora_target_modules", modules(target), "lora_target")
        saved = draft.take("additional_target", (str, list), "names between commas")
        if saved:
            names = modules(saved)
            draft.set("lora_modules_to_save", [names] if isinstance(names, str) else names, "additional_target")
    elif kind != "full":
        draft.drop("finetuning_type", f"{kind} has no equal; all weights would be trained")
    draft.silent("finetuning_type", "lora_target", "lora_alpha", "additional_target")
    bits = draft.number("quantization_bit")
    if bits == 4:
        draft.set("load_in_4bit", True, "quantization_bit")
        draft.default("bnb_4bit_quant_type", "nf4")
        draft.set("use_bnb_nested_quant", draft.flag("double_quantization", True), "double_quantization")
    elif bits == 8:
        draft.set("load_in_8bit", True, "quantization_bit")
    elif bits:
        draft.drop("quantization_bit", "only 4 and 8 bits have an equal; the weights are loaded as `dtype` says")
    draft.silent("double_quantization")


def _convert_precision(draft: Draft) -> None:
    pure = draft.flag("pure_bf16")
    bf16 = draft.flag("bf16") or pure
    draft.set("bf16", bf16, "bf16", "pure_bf16")
    # LLaMA-Factory loads weights in the precision that it computes in, and casts those that it trains to 32 bits.
    frozen_base = draft.settings.get("use_peft") and (bf16 or draft.settings.get("fp16") is True)
    half = "bfloat16" if bf16 else "float16"
    dtype = half if pure or frozen_base else "float32"
    draft.set("dtype", dtype, "pure_bf16", why="as LLaMA-Factory loads the weights")
    if draft.flag("disable_gradient_checkpointing"):
        draft.set("gradient_checkpointing", False, "disable_gradient_checkpointing")
    else:
        draft.default("gradient_checkpointing", True)
    attention = draft.take("flash_attn", (str, bool), "auto, disabled, sdpa, fa2 or fa3")
    attention = {True: "fa2", False: "auto"}.get(attention, attention)
    if attention in _ATTENTION:
        draft.set("attn_implementation", _ATTENTION[attention], "flash_attn")
    elif attention not in (None, "auto"):
        draft.drop("flash_attn", "expected auto, disabled, sdpa, fa2 or fa3; left out")
    else:
        draft.silent("flash_attn")
    draft.silent("bf16", "pure_bf16", "disable_gradient_checkpointing")


def _convert_data(draft: Draft) -> None:
    entries = _placeholders(draft, "dataset")
    if not entries:
        draft.config.fail("dataset", "expected names of datasets, found none")
    set_datasets(draft, entries, why="put a Hub id, folder or file here" if len(entries) == 1 else "put Hub ids here")
    tests = _placeholders(draft, "eval_dataset")
    size = draft.number("val_size", 0)
    evaluates = draft.settings.get("eval_strategy", "no") not in ("no", False)
    if tests and evaluates:
        draft.set("eval_datasets", labelled(tests), why="put Hub ids, folders or files here")
    elif size and evaluates:
        draft.set("test_split_size", size, "val_size")
    elif size:
        draft.drop("val_size", "no rows are held out, because `eval_strategy` is no")
    draft.silent("val_size")
    draft.default("max_length", 2048)
    draft.differs(
        "LLaMA-Factory also cuts prompts: prompt and responses of a pair above cutoff_len are cut in proportion to "
        "their lengths. Here responses are cut on the right, and a row whose prompt leaves no room is dropped.",
        "cutoff_len" if draft.has("cutoff_len") else None,
    )


def _placeholders(draft: Draft, key: str) -> list[dict[str, Any]]:
    """The names of a dataset_info.json, as paths to be replaced by those of the sources that it describes."""
    names = draft.take(key, (str, list), "names between commas")
    if names is None:
        return []
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
    draft.drop(
        key,
        f"{', '.join(map(str, names))}: names in LLaMA-Factory's dataset_info.json; replace each by the Hub id, folder "
        "or file of its source. `columns` maps the names of its columns",
    )
    return [{"path": str(name)} for name in names]


LLAMA_FACTORY = Tool(
    id="llama_factory",
    name="LLaMA-Factory",
    renamed={**RENAMED, **_RENAMED},
    converted={**CONVERTED, **_CONVERTED},
    dropped={**DROPPED, **_DROPPED},
    switches=frozenset(
        "overwrite_cache plot_loss overwrite_output_dir use_galore use_apollo use_badam use_adam_mini use_muon "
        "use_swanlab predict_with_generate train_on_prompt mask_history neat_packing packing create_new_adapter "
        "resize_vocab pissa_init shift_attn enable_liger_kernel use_unsloth use_unsloth_gc upcast_layernorm "
        "upcast_lmhead_output compute_accuracy include_effective_tokens_per_second print_param_status do_eval "
        "do_predict remove_unused_columns bf16_full_eval fp16_full_eval".split()
    ),
    convert=_convert,
    check=_check,
)
