"""Checks of what a trainer is given, each as early as it can be known."""

import copy
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers.integrations import is_tensorboard_available, is_trackio_available

from orpo_trl.config import ORPOConfig
from orpo_trl.model import load_template_source, read_template
from orpo_trl.output_folder import folder_problem
from orpo_trl.pairs.columns import MEDIA_COLUMNS
from orpo_trl.pairs.foreign_rows import refuse_media
from orpo_trl.pairs.preparation import PreparationReport
from orpo_trl.pairs.prepare import NO_END_OF_SEQUENCE, column_names, pair_lengths
from orpo_trl.pairs.row_errors import RowError
from orpo_trl.pairs.tokenize import PairRules
from orpo_trl.sampling import GlobalBatchSampler

logger = logging.getLogger(__name__)

# Methods of `trl.experimental.orpo.ORPOTrainer` that nothing calls here, with what to do instead.
TRL_HOOKS = {
    "build_tokenized_answer": "override `prepare_dataset`, or pass rows of `prompt_ids`, `chosen_ids`, `rejected_ids`",
    "tokenize_row": "override `prepare_dataset`, or pass rows of `prompt_ids`, `chosen_ids`, `rejected_ids`",
    "concatenated_inputs": "pass a `data_collator`",
    "odds_ratio_loss": "override `compute_loss`",
    "get_batch_logps": "override `compute_loss`",
    "concatenated_forward": "override `compute_loss`",
    "get_batch_loss_metrics": "override `compute_loss` for the loss, `log` for the metrics",
    "generate_from_model": "set `generate_during_eval`, or pass a callback that generates",
    "store_metrics": "override `log`",
}

# Settings that are read when the trainer is made, beside those that decide the tokens of a pair.
_FIXED = (
    *(rule.name for rule in fields(PairRules)),
    "activation_offloading", "chat_template_path", "disable_dropout", "eos_token", "generate_during_eval",
    "gradient_checkpointing", "neftune_noise_alpha", "on_malformed", "on_unrendered", "output_dir", "pad_token",
    "router_aux_loss_coef", "shuffle_dataset", "use_cache",
)  # fmt: skip

# The highest learning rate that the authors use for all weights.
_FULL_RATE = 2e-5
_TRACKERS = {"tensorboard": is_tensorboard_available, "trackio": is_trackio_available}


def check_source(model, model_init, optimizers) -> None:
    """One of the two must say what is trained."""
    if (model is None) == (model_init is None):
        raise ValueError("Pass either `model` or `model_init`" + (", not both." if model is not None else "."))
    if model_init is not None and any(optimizers):
        raise ValueError(
            "`optimizers` would hold the weights of one model, and `model_init` makes several: pass "
            "`optimizer_cls_and_kwargs`, or set `optim`."
        )


def adapter_note(learning_rate: float) -> str:
    """What to say of the learning rate of an adapter; empty where it is high enough."""
    if learning_rate > _FULL_RATE:
        return ""
    return (
        f"`learning_rate: {learning_rate:g}` is a rate for full fine-tuning, and an adapter learns little at it. The "
        "authors of ORPO advise 5e-5 or 5e-4 for LoRA (xfactlab/orpo#28)."
    )


def fixed_settings(args: ORPOConfig) -> dict[str, Any]:
    """The settings that no trial of a search can change."""
    return {name: copy.deepcopy(getattr(args, name)) for name in _FIXED}


def check_searched(fixed: dict[str, Any], args: ORPOConfig) -> None:
    """Refuse a trial that sets what was read when the trainer was made, and would change nothing."""
    changed = [f"`{name}`" for name, value in fixed.items() if getattr(args, name) != value]
    if changed:
        raise ValueError(
            f"A search cannot change {', '.join(changed)}, which the trainer has read at its construction. Make a "
            "trainer for each value."
        )


def evaluation_loss(metrics: dict[str, float]) -> float:
    """The objective of a search.

    Raises:
        ValueError: where the metrics are those of several evaluation sets.
    """
    if "eval_loss" not in metrics:
        found = ", ".join(name for name in metrics if name.endswith("_loss"))
        raise ValueError(f"`compute_objective` is needed, as there is no `eval_loss`. The losses are {found}.")
    return metrics["eval_loss"]


def check_arguments(
    args, train_dataset, eval_dataset, compute_metrics, preprocess_logits_for_metrics, peft_config
) -> None:
    if compute_metrics is not None or preprocess_logits_for_metrics is not None:
        raise ValueError(
            "`compute_metrics` and `preprocess_logits_for_metrics` need logits, which ORPOTrainer never builds. "
            "Losses, log-probabilities, margins and accuracy of the pairs are logged without them."
        )
    _check_adapter("peft_config", peft_config)
    problem = folder_problem(Path(args.output_dir))
    if problem:
        raise ValueError(problem)
    if args.chat_template_path is not None:
        _check_template_source(args.chat_template_path)
    if train_dataset is None:
        raise ValueError("`train_dataset` is required.")
    check_dataset("train", train_dataset)
    if eval_dataset is not None:
        for name, dataset in (eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}).items():
            check_dataset(name, dataset)
    first = next(iter(train_dataset), None)
    if first is None:
        raise ValueError("The train dataset has no rows.")
    if isinstance(train_dataset, IterableDataset) and args.train_sampling_strategy not in (
        "auto",
        "random",
        "sequential",
    ):
        strategy = args.train_sampling_strategy
        raise ValueError(f"`train_sampling_strategy: {strategy}` needs all lengths; a stream is read in its order.")
    is_random = args.train_sampling_strategy == "random" and not args.shuffle_dataset
    if isinstance(train_dataset, IterableDataset) and is_random:
        logger.warning(
            "`train_sampling_strategy: random`: a stream is read in its order. `shuffle_dataset: true` shuffles it."
        )
    if args.on_malformed == "error":
        try:
            refuse_media(first)
        except RowError as error:
            raise ValueError(f"The train dataset, row 0: {error}") from error


def _check_template_source(name: str) -> None:
    """SFTTrainer reads a file of any kind and size, and asks on the terminal whether to run a tokenizer's code."""
    if not name.endswith((".jinja", ".j2")):
        load_template_source(name)
    else:
        read_template(name)


def without_media(dataset):
    """The rows without their columns of images, audio and video."""
    columns = [name for name in column_names(dataset) if name in MEDIA_COLUMNS]
    return dataset.remove_columns(columns) if columns else dataset


def check_dataset(name: str, dataset) -> None:
    """Refuse rows that are not a Dataset or a stream.

    Args:
        name: `train`, `eval`, or that of one of several evaluation sets.
        dataset: what the user gave.
    """
    if isinstance(dataset, (list, tuple)):
        raise TypeError(f"The {name} dataset is a {type(dataset).__name__} of rows; pass `Dataset.from_list(rows)`.")
    if not isinstance(dataset, (Dataset, IterableDataset)):
        splits = f" Pass one of its splits: {', '.join(map(str, dataset))}." if isinstance(dataset, dict) else ""
        raise TypeError(
            f"The {name} dataset must be a `Dataset` or `IterableDataset`, got {type(dataset).__name__}.{splits}"
        )


def _check_adapter(argument: str, config) -> None:
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(
            f"`{argument}`: {type(config).__name__} puts virtual tokens before the prompt, which pairs do not support. "
            "Use an adapter on the weights, such as LoRA."
        )


def check_hooks(trainer_class: type, our_class: type) -> None:
    """A subclass written for TRL's ORPOTrainer would train without what it overrides."""
    names = [name for name in TRL_HOOKS if hasattr(trainer_class, name) and not hasattr(our_class, name)]
    if names:
        lines = [f"  - `{name}`: {TRL_HOOKS[name]}" for name in names]
        raise TypeError(
            f"{trainer_class.__name__} has methods of TRL's ORPOTrainer that are never called here:\n"
            + "\n".join(lines)
        )


def check_model(model, peft_config) -> None:
    """Check a model that is given as an object, before its rows are prepared."""
    if not hasattr(model, "config"):
        raise TypeError(f"`model`, or what `model_init` returns, must be a model of transformers, got {model!r:.60}.")
    check_decoder(model.config)
    causal = model.get_base_model() if is_peft_model(model) else model
    if causal.get_output_embeddings() is None:
        raise ValueError(
            f"`model` is a {type(causal).__name__}, which has no language-model head. Load it with "
            "`AutoModelForCausalLM`."
        )
    for config in getattr(model, "peft_config", {}).values():
        _check_adapter("model", config)
    if peft_config is None:
        check_trainable(model)


def check_no_adapter(name: str) -> None:
    """SFTTrainer would look for a model's config in the adapter's folder."""
    if (Path(name) / "adapter_config.json").is_file():
        raise ValueError(
            f"`model`: {name!r} is an adapter. To train it further, pass "
            f"`AutoPeftModelForCausalLM.from_pretrained({name!r}, is_trainable=True)`. For a new adapter, name the "
            "base model and pass a `peft_config`."
        )


def check_decoder(config) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"`model`: encoder-decoder models such as {config.model_type} are not supported.")


def check_positions(model, dataset, name: str, args: ORPOConfig) -> None:
    """Compare the longest row of a prepared dataset with the positions that the model knows."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None or dataset is None:
        return
    if isinstance(dataset, Dataset):
        longest = int(pair_lengths(dataset).longest_row.max())
        problem = f"The longest row of the {name} dataset has {longest:,} tokens"
    else:
        longest = args.max_length or positions + 1
        problem = f"`max_length: {args.max_length}` lets rows of a stream be longer"
    if longest <= positions:
        return
    text = f"{problem}, and the model has {positions:,} positions. Set `max_length: {positions}`"
    # A table of learned positions has one more row or two in some models, such as OPT.
    words = model.get_input_embeddings()
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding) and module is not words]
    if any(positions <= table.num_embeddings <= positions + 2 for table in tables):
        raise ValueError(f"{text}.")
    logger.warning("%s, or extend them with `rope_scaling`: beyond them a model usually degrades.", text)


def check_trainable(model) -> None:
    if any(weight.requires_grad for weight in model.parameters()):
        return
    if is_peft_model(model):
        what_to_do = (
            "A loaded adapter is frozen: pass `is_trainable=True` to `PeftModel.from_pretrained`. A new one is frozen "
            "where its config says so: set `inference_mode=False`."
        )
    else:
        what_to_do = "Call `requires_grad_(True)` on those to train, or pass a `peft_config` to train an adapter."
    raise ValueError(f"Every weight of `model` is frozen, so nothing would be trained. {what_to_do}")


def check_trackers(args: ORPOConfig) -> None:
    """transformers looks for their packages when the model is loaded."""
    for name, is_installed in _TRACKERS.items():
        if name in (args.report_to or []) and not is_installed():
            raise ImportError(f"`report_to: {name}` needs the package {name}: pip install 'orpo-trl[trackers]'")


def check_tokenizer(processing_class, args: ORPOConfig) -> None:
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if args.eos_token is None and tokenizer.eos_token is None:
        raise ValueError(NO_END_OF_SEQUENCE)


def check_parallelism(parallelism) -> None:
    for name in ("cp", "sp", "tp"):
        if parallelism is not None and (getattr(parallelism, f"{name}_size", None) or 1) > 1:
            raise ValueError(f"`parallelism_config`: `{name}_size` > 1 is not supported for pairs.")


def check_vocabulary(tokenizer, config, args: ORPOConfig) -> None:
    vocabulary = config.get_text_config().vocab_size
    if args.padding_value is not None and not 0 <= args.padding_value < vocabulary:
        raise ValueError(f"`padding_value` must be a token id from 0 to {vocabulary - 1}, got {args.padding_value}.")
    if len(tokenizer) > vocabulary:
        logger.warning(
            "The tokenizer has %d tokens and the model embeds %d: a row with one of the others will fail.",
            len(tokenizer), vocabulary,
        )  # fmt: skip


def check_collator(data_collator, args: ORPOConfig) -> None:
    if args.max_tokens_per_micro_batch is not None and not hasattr(data_collator, "positions"):
        raise ValueError("`max_tokens_per_micro_batch` needs a `data_collator` that counts `positions`.")


def check_pairs(report: PreparationReport, dataset, args: ORPOConfig) -> None:
    if args.beta and not report.pairs:
        raise ValueError(
            "No row of the train dataset has a rejected response, so there is no odds-ratio term. Is its column named "
            f"`rejected`? Columns: {', '.join(column_names(dataset))}. Set `beta: 0` to train the NLL term alone."
        )


def check_sampler(sampler: GlobalBatchSampler, rows: int) -> None:
    if not len(sampler):
        raise ValueError(
            f"The train dataset has {rows:,} rows, fewer than the {sampler.effective_batch_size:,} of one optimiser "
            "step, and `dataloader_drop_last` leaves them out."
        )


def check_global_batch(args: ORPOConfig, processes: int) -> str:
    """That an optimiser step has the pairs of `global_batch_size`, whoever has started the processes.

    Returns:
        What the user should know of how the processes share it, or an empty string.

    Raises:
        ValueError: if it has others: where a launcher does not set WORLD_SIZE, or a search tries batch sizes.
    """
    pairs = args.per_device_train_batch_size * (args.gradient_accumulation_steps or 1) * processes
    if args.global_batch_size not in (None, pairs):
        raise ValueError(
            f"`global_batch_size: {args.global_batch_size}`, but an optimiser step has {pairs} pairs: "
            f"{args.per_device_train_batch_size} (micro-batch) x {args.gradient_accumulation_steps} (accumulation) x "
            f"{processes} (processes). Start the processes by `accelerate launch` or `orpo-trl train`."
        )
    return args.split_note
