"""Keys that the importers share: what becomes of those of transformers and TRL."""

from orpo_trl.recipe.sections import SECTIONS

OURS = {key for keys in SECTIONS.values() for key in keys}

# Keys of transformers and TRL that every tool here passes on under other names than today's.
RENAMED = {
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
}
# Keys that are read in `convert_shared`: what they become, and a phrase on how.
CONVERTED = {
    "warmup_ratio": ("warmup_steps", "below 1 it is a share of the steps"),
    "group_by_length": ("train_sampling_strategy", "`group_by_length` is one of its values"),
    "deepspeed": ("deepspeed", "zero2 or zero3 in place of a file"),
    "fsdp": ("deepspeed", "zero3 shards the same"),
    "fsdp_config": ("deepspeed", "zero3 shards the same"),
}
_LAYOUT = "pairs have their own layout, without filling"
_COLUMNS = "the trainer chooses the columns and labels itself"
_NO_LOGITS = "there are no logits to compute it from"
_TRAINS = "`orpo-trl train` trains, and evaluates as `eval_strategy` says"
# Keys of ours that no other tool's config sets: what the trainer refuses or decides itself.
REFUSED = {
    **dict.fromkeys(("packing", "packing_strategy", "padding_free", "eval_packing"), _LAYOUT),
    **dict.fromkeys(("remove_unused_columns", "label_names", "dataset_text_field", "length_column_name"), _COLUMNS),
    **dict.fromkeys(("include_for_metrics", "batch_eval_metrics", "eval_do_concat_batches"), _NO_LOGITS),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _TRAINS),
    **dict.fromkeys(("local_rank", "parallelism_config"), "the launcher sets it"),
    "completion_only_loss": "`nll_scope` says which tokens the NLL covers",
    "assistant_only_loss": "`nll_scope` says which tokens the NLL covers",
    "loss_type": "the loss is ORPO's",
    "label_smoothing_factor": "ORPO's loss has no smoothed form",
    "dataset_kwargs": "rows with `prompt_ids`, `chosen_ids` and `rejected_ids` skip tokenisation",
    "truncation_mode": "responses are cut on the right, and prompts are never cut",
    "average_tokens_across_devices": "`nll_reduction` says how tokens are averaged",
    "logging_nan_inf_filter": "a non-finite loss is logged as such",
    "hub_token": "a recipe is no place for a token: run `hf auth login`",
    "is_encoder_decoder": "models are decoder-only",
}
# What every tool here passes on to transformers or TRL and has no equal.
DROPPED = {
    **REFUSED,
    "overwrite_output_dir": "checkpoints in the folder stay, and training starts anew unless resumed",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "save_safetensors": "weights are always saved as safetensors",
    "include_tokens_per_second": "the log has `num_tokens`",
    "label_pad_token_id": _COLUMNS,
    "use_ipex": "transformers has it no more",
    "half_precision_backend": "transformers has it no more",
    "fp16_opt_level": "transformers has it no more",
}

FLASH = (
    "not needed: on CUDA, attention is one call of torch's variable-length kernel; `attn_implementation: "
    "flash_attention_2` takes the flash-attn package instead"
)
