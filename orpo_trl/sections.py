"""The keys of a recipe by section, and the inherited keys that mean nothing for preference pairs.

Names alone: this imports no other module of the package, so that commands that need only the names start at once.
"""

from collections.abc import Mapping, Sequence

# In the order in which a recipe shows them.
SECTIONS: Mapping[str, Sequence[str]] = {
    "Model": """model_name_or_path model_revision tokenizer_name_or_path from_scratch trust_remote_code
        model_init_kwargs dtype attn_implementation router_aux_loss_coef use_cache chat_template_path eos_token
        pad_token load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage
        use_peft lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save
        lora_task_type use_rslora use_dora""".split(),
    "Data": """dataset_name dataset_config dataset_train_split dataset_test_split datasets eval_datasets test_split_size
        dataset_streaming shuffle_dataset strings_as_messages prompt_turns on_malformed on_unrendered
        max_prompt_length max_completion_length max_length dataset_num_proc""".split(),
    "ORPO": "beta nll_scope nll_reduction disable_dropout".split(),
    "Training": """num_train_epochs max_steps global_batch_size per_device_train_batch_size
        gradient_accumulation_steps max_tokens_per_micro_batch train_sampling_strategy auto_find_batch_size
        learning_rate lr_scheduler_type
        lr_scheduler_kwargs warmup_steps optim optim_args optim_target_modules adam_beta1 adam_beta2 adam_epsilon
        weight_decay max_grad_norm max_nonfinite_steps neftune_noise_alpha seed data_seed full_determinism
        ignore_data_skip restore_callback_states_from_checkpoint dataloader_drop_last dataloader_num_workers
        dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context dataloader_in_order accelerator_config""".split(),
    "Precision and distributed strategy": """bf16 fp16 tf32 gradient_checkpointing
        gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs activation_offloading
        deepspeed fsdp fsdp_config pair_layout pad_to_multiple_of padding_value use_liger_kernel liger_kernel_config
        torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps use_cpu
        ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
        ddp_timeout""".split(),
    "Interruptions": "resume resume_from_checkpoint resume_anyway overwrite_output_dir".split(),
    "Logs and output": """logging_strategy logging_steps logging_first_step log_level log_level_replica log_on_each_node
        disable_tqdm include_num_input_tokens_seen skip_memory_metrics debug report_to run_name run_group run_tags
        project wandb_mode
        trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay eval_on_start
        per_device_eval_batch_size eval_accumulation_steps eval_use_gather_object prediction_loss_only
        generate_during_eval save_strategy save_steps save_total_limit save_only_model save_on_each_node
        stop_after load_best_model_at_end metric_for_best_model greater_is_better output_dir push_to_hub
        hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision""".split(),
}  # fmt: skip

# Arguments that SFTConfig inherits or defines and that mean nothing for preference pairs, with what to use instead.
# Each must keep its default: accepting a value and ignoring it would train something else than what was asked.
MEANINGLESS = {
    "packing": "pairs have their own layout",
    "packing_strategy": "pairs have their own layout",
    "eval_packing": "pairs have their own layout",
    "padding_free": "pairs have their own layout",
    "completion_only_loss": "set `nll_scope: completion` for an NLL over the chosen response alone",
    "assistant_only_loss": "set `nll_scope: completion` for an NLL over the chosen response alone",
    "loss_type": "the loss is ORPO's",
    "label_smoothing_factor": "ORPO's loss has no smoothed form",
    "dataset_text_field": "pairs are read from `prompt`, `chosen` and `rejected`",
    "dataset_kwargs": "pass rows with `prompt_ids`, `chosen_ids` and `rejected_ids` to skip tokenisation",
    "truncation_mode": "responses are cut on the right, as in the paper",
    "average_tokens_across_devices": "set `nll_reduction: micro_batch_mean` for means per micro-batch and device",
    "length_column_name": "lengths are those of the tokenised pairs",
    "logging_nan_inf_filter": "a non-finite loss is logged as it is, and its step is named",
    "enable_jit_checkpoint": "a checkpoint on SIGTERM and other signals is built in, with an exit status of its own",
    "label_names": "the trainer makes the labels itself",
    "include_for_metrics": "there are no logits, so `compute_metrics` cannot run",
    "batch_eval_metrics": "there are no logits, so `compute_metrics` cannot run",
    "eval_do_concat_batches": "there are no predictions to join",
}

# Arguments of `from_pretrained` that have keys of their own. The tokenizer, and `orpo-trl check`, go by these.
OF_LOADING = {
    "torch_dtype": "dtype", "dtype": "dtype", "revision": "model_revision",
    "attn_implementation": "attn_implementation",
}  # fmt: skip
