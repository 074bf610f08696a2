"""Checks of what a trainer is given, each as early as it can be known."""

import logging
from pathlib import Path

from datasets import IterableDataset
from transformers.integrations import is_tensorboard_available, is_trackio_available

from orpo_trl.config import ORPOConfig
from orpo_trl.pairs.preparation import PreparationReport
from orpo_trl.pairs.prepare import NO_END_OF_SEQUENCE, column_names
from orpo_trl.sampling import GlobalBatchSampler

logger = logging.getLogger(__name__)

_TRACKERS = {"tensorboard": is_tensorboard_available, "trackio": is_trackio_available}


def check_arguments(args, train_dataset, compute_metrics, preprocess_logits_for_metrics, peft_config) -> None:
    if not isinstance(args, ORPOConfig):
        raise TypeError(f"`args` must be an ORPOConfig, got {type(args).__name__}.")
    if compute_metrics is not None or preprocess_logits_for_metrics is not None:
        raise ValueError(
            "`compute_metrics` and `preprocess_logits_for_metrics` need logits, which ORPOTrainer never builds. "
            "Losses, log-probabilities, margins and accuracy of the pairs are logged without them."
        )
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(
            f"`peft_config`: {type(peft_config).__name__} puts virtual tokens before the prompt, which pairs do not "
            "support. Use an adapter on the weights, such as LoRA."
        )
    template = args.chat_template_path
    if template is not None and template.endswith((".jinja", ".j2")) and not Path(template).is_file():
        raise FileNotFoundError(f"`chat_template_path`: the file {template!r} does not exist.")
    if train_dataset is None:
        raise ValueError("`train_dataset` is required.")
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
    if "image" in first or "images" in first:
        raise ValueError("The train dataset has images; ORPOTrainer trains on text alone. Remove the column.")


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
