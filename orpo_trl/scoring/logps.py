"""Log-probabilities and odds of pairs under a model, row by row."""

import itertools
import logging
import math
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel

from orpo_trl.attention import choose_layout, reading_packed_row, without_adapter
from orpo_trl.batch import MODEL_INPUTS, PairCollator
from orpo_trl.losses import log_odds, log_odds_ratio, odds_ratio_delta, response_sums
from orpo_trl.pairs.load import ROW_COLUMN, SOURCE_COLUMN
from orpo_trl.pairs.prepare import pair_lengths
from orpo_trl.upstream import add_fused_lm_head, run_fused_head, use_cpu_head_tiles

logger = logging.getLogger(__name__)

# One record per row. In TRL's metrics, `log_odds_chosen` is the log odds ratio and `log_odds_ratio` its log sigmoid, so
# no column has either name. Logarithms are natural. Columns that need a rejected response are null without one.
RECORD = pa.schema(
    {
        "source": pa.string(),
        "row": pa.int64(),  # from 0, in the source
        "prompt_tokens": pa.int64(),
        "chosen_tokens": pa.int64(),  # tokens that the log-probabilities cover, end of sequence included
        "rejected_tokens": pa.int64(),
        "chosen_logp": pa.float64(),  # mean over the tokens: log p of the paper, `logps/chosen` of the metrics
        "rejected_logp": pa.float64(),
        "chosen_logp_sum": pa.float64(),  # of the whole response: log P(y|x)
        "rejected_logp_sum": pa.float64(),
        "chosen_log_odds": pa.float64(),  # log p - log(1 - p), as losses.py has it
        "rejected_log_odds": pa.float64(),
        "log_or": pa.float64(),  # log of the odds ratio: chosen_log_odds - rejected_log_odds
        "odds_ratio_delta": pa.float64(),  # sigmoid(-log_or): the paper's delta(d), which weighs the pair's gradient
        "is_correct": pa.bool_(),  # chosen_logp > rejected_logp
    }
)


def prepare_model(model: torch.nn.Module, pair_layout: str = "auto") -> str:
    """Let a model score pairs: a fused LM head that builds no logits, and attention that reads packed rows.

    Args:
        model: a causal language model of transformers, or a PEFT model around one; it is changed.
        pair_layout: 'auto', 'shared_prefix' or 'padded' (`ORPOConfig.pair_layout`).

    Returns:
        The layout for the collator: 'shared_prefix' or 'padded'.

    Raises:
        ValueError: where the model cannot read packed rows exactly and `pair_layout` demands them, or where an adapter
            is on the LM head or puts virtual tokens before the prompt.
    """
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(f"{type(config).__name__} puts virtual tokens before the prompt, which pairs do not support.")
    language_model = cast(PreTrainedModel, model)  # a PEFT model passes these attributes on
    if hasattr(language_model.get_output_embeddings(), "base_layer"):
        raise ValueError(
            "An adapter is on the model's LM head, whose weight is read without it. Merge the adapter into the model "
            "first: `orpo-trl merge`, or `model.merge_and_unload()` of peft."
        )
    layout, reason = choose_layout(language_model, pair_layout)
    if reason:
        logger.warning(reason)
    add_fused_lm_head(without_adapter(model))
    if language_model.device.type == "cpu":
        use_cpu_head_tiles()
    return layout


@torch.inference_mode()
def score_pairs(
    model: torch.nn.Module, pairs: Dataset, collator: PairCollator, max_tokens: int = 8192
) -> list[dict[str, Any]]:
    """Log-probabilities and odds of each pair.

    Args:
        model: a model that `prepare_model` or an `ORPOTrainer` has changed; scoring turns its dropout off.
        pairs: prepared pairs (`prepare_pairs`).
        collator: makes the batches, in the layout that the model reads.
        max_tokens: positions of a forward pass, padding included, which limits memory; a row with more runs alone.

    Returns:
        One record per row, in the order of the rows, with the keys of `RECORD`. Log-probabilities of the tokens are
        fp32, sums and what follows from them fp64. A value that is not finite is None, because JSON has no word for it.
    """
    was_training = model.training
    model.eval()
    records: list[dict[str, Any]] = [{}] * len(pairs)
    passes = _passes(pairs, collator, max_tokens)
    console = Console(stderr=True)
    try:
        for rows in track(passes, "Scoring", console=console, transient=True, disable=not console.is_terminal):
            found = _score(model, [pairs[row] for row in rows], collator)
            for row, record in zip(rows, found, strict=True):
                records[row] = record
    finally:
        model.train(was_training)
    return records


def _passes(pairs: Dataset, collator: PairCollator, max_tokens: int) -> list[list[int]]:
    """Row numbers of each forward pass.

    Rows of similar length are together, so that there is little padding. The longest come first, so that what does not
    fit into memory fails at once. Within a pass, pairs come before rows without a rejected response, as in a batch.
    """
    lengths = pair_lengths(pairs)
    is_packed, multiple = collator.layout == "shared_prefix", collator.pad_to_multiple_of
    passes: list[list[int]] = [[]]
    for row in np.argsort(lengths.longest_row, kind="stable")[::-1].tolist():
        if passes[-1] and lengths[[*passes[-1], row]].batch(is_packed, multiple) > max_tokens:
            passes.append([])
        passes[-1].append(row)
    is_pair = lengths.is_pair
    return [sorted(rows, key=lambda row: not is_pair[row]) for rows in passes]


def _score(model: torch.nn.Module, examples: list[dict[str, Any]], collator: PairCollator) -> list[dict[str, Any]]:
    """Records of one forward pass."""
    batch = collator(examples)
    inputs: Any = send_to_device({name: batch[name] for name in MODEL_INPUTS if name in batch}, model.device)
    with reading_packed_row() if "segments" in batch else nullcontext():
        token_logps, _ = run_fused_head(model, inputs)
    lengths = batch["completion_lengths"]
    sums = response_sums(token_logps.cpu().double(), batch["completion_index"], len(lengths))
    logps = sums / lengths
    odds = log_odds(logps)
    # Chosen responses come first, those of pairs before the others; then the rejected ones, which may be fewer.
    rows, paired = len(examples), batch["num_pairs"]
    log_or = log_odds_ratio(logps[:paired], logps[rows:])
    columns = {
        "source": [example[SOURCE_COLUMN] for example in examples],
        "row": [example[ROW_COLUMN] for example in examples],
        "prompt_tokens": [len(example["prompt_ids"]) for example in examples],
        "chosen_tokens": lengths[:rows].tolist(),
        "rejected_tokens": lengths[rows:].tolist(),
        "chosen_logp": _finite(logps[:rows]),
        "rejected_logp": _finite(logps[rows:]),
        "chosen_logp_sum": _finite(sums[:rows]),
        "rejected_logp_sum": _finite(sums[rows:]),
        "chosen_log_odds": _finite(odds[:rows]),
        "rejected_log_odds": _finite(odds[rows:]),
        "log_or": _finite(log_or),
        "odds_ratio_delta": _finite(odds_ratio_delta(log_or)),
        "is_correct": [
            None if math.isnan(ratio) else better
            for ratio, better in zip(log_or.tolist(), (logps[:paired] > logps[rows:]).tolist(), strict=True)
        ],
    }
    return [dict(zip(columns, values, strict=True)) for values in itertools.zip_longest(*columns.values())]


def _finite(values: torch.Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
