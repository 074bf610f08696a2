"""What becomes of the keys that several tools have: those of transformers and TRL, and those of the authors' code."""

from orpo_trl.sections import MEANINGLESS, SECTIONS

OURS = {key for keys in SECTIONS.values() for key in keys}

# Older names of transformers and TRL, which every tool here passes on.
RENAMED = {
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
}
# Keys that `convert_shared` reads: what they become, and a phrase on how.
CONVERTED = {
    "warmup_ratio": ("warmup_steps", "below 1 it is a share of the steps"),
    "group_by_length": ("train_sampling_strategy", "`group_by_length` is one of its values"),
    "deepspeed": ("deepspeed", "zero2 or zero3 in place of a file"),
    "fsdp": ("deepspeed", "zero3 shards the same"),
    "fsdp_config": ("deepspeed", "zero3 shards the same"),
}
_TRAINS = "`orpo-trl train` trains, and evaluates as `eval_strategy` says"
# Keys of ours that no other tool's config sets: those without meaning, and those that the trainer or launcher decides.
REFUSED = {
    **MEANINGLESS,
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _TRAINS),
    **dict.fromkeys(("local_rank", "parallelism_config"), "the launcher sets it"),
    "remove_unused_columns": "the trainer chooses the columns itself",
    "hub_token": "a recipe is no place for a token: run `hf auth login`",
    "is_encoder_decoder": "models are decoder-only",
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "an evaluation computes as training does"),
}
# Keys without an equal, which every tool here passes on to transformers or TRL.
DROPPED = {
    **REFUSED,
    "overwrite_output_dir": "it belongs to one start: give `--overwrite_output_dir` on the command line",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "save_safetensors": "weights are always saved as safetensors",
    "include_tokens_per_second": "the log has `num_tokens`",
    "label_pad_token_id": MEANINGLESS["label_names"],
    "use_ipex": "transformers no longer has it",
    "half_precision_backend": "transformers no longer has it",
    "fp16_opt_level": "transformers no longer has it",
}

# Arguments of the authors' main.py that have another name here.
AUTHORS_NAMES = {
    "model_name": "model_name_or_path",
    "data_name": "dataset_name",
    "prompt_max_length": "max_prompt_length",
    "response_max_length": "max_length",
    "num_proc": "dataset_num_proc",
    "alpha": "beta",
    "lr": "learning_rate",
    "enable_lora": "use_peft",
    "wandb_project_name": "project",
}
