"""One pair as text: each token with the terms of the loss that score it."""

import itertools
from typing import Any

import click
from transformers import PreTrainedTokenizerBase

from orpo_trl.batch import PairCollator
from orpo_trl.config import ORPOConfig
from orpo_trl.metrics import METRICS

_NLL = METRICS["nll_loss"].label
# Scored by the NLL, scored by the odds ratio.
LABELS = {
    (False, False): "not scored",
    (True, False): _NLL,
    (False, True): "odds ratio",
    (True, True): f"{_NLL}, odds ratio",
}
_WIDTH = 88
_COLORS = {(False, False): "bright_black", (True, False): "blue", (False, True): "yellow", (True, True): "green"}


def scores(pair: dict[str, Any], training: ORPOConfig) -> list[list[tuple[int, bool, bool]]]:
    """Each token of the chosen and the rejected row: its id, and whether the NLL and the odds ratio score it.

    The answers are read from the batch that the trainer would make of the pair, in the padded layout.

    Args:
        pair: a prepared pair, with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        training: its `nll_scope` decides.
    """
    batch = PairCollator(0, training.nll_scope)([pair])
    rows = []
    for row, response in enumerate(("chosen_ids", "rejected_ids")):
        ids = [*pair["prompt_ids"], *pair[response]]
        # A position scores the token that follows it; nothing scores the first.
        in_nll = [False, *(batch["nll_divisors"][row] > 0).tolist()]
        in_odds = [False, *(batch["completion_index"][row] < len(batch["completion_lengths"])).tolist()]
        rows.append(list(zip(ids, in_nll, in_odds, strict=False)))
    return rows


def show_pair(pair: dict[str, Any], training: ORPOConfig, tokenizer: PreTrainedTokenizerBase, color: bool) -> list[str]:
    """Lines of text: runs of tokens with a middle dot between tokens; before each run, the terms that score it."""
    lines = []
    for title, row in zip(("chosen", "rejected"), scores(pair, training), strict=True):
        lines.append(f"{title}: {len(row):,} tokens")
        for scored, run in itertools.groupby(row, key=lambda token: token[1:]):
            tokens = tokenizer.convert_ids_to_tokens([token for token, _, _ in run])
            label = f"{LABELS[scored]} ({len(tokens):,})"
            for number, part in enumerate(_lines([_visible(token) for token in tokens])):
                shown = click.style(part, fg=_COLORS[scored]) if color else part
                lines.append(f"  {label if not number else '':<22} {shown}")
    return lines


def _lines(tokens: list[str]) -> list[str]:
    """Tokens with a middle dot between them, on lines that end between tokens."""
    lines = [""]
    for position, token in enumerate(tokens):
        if lines[-1] and len(lines[-1]) + len(token) > _WIDTH:
            lines.append("")
        lines[-1] += token + ("·" if position + 1 < len(tokens) else "")
    return lines


def _visible(token: str | bytes | None) -> str:
    """A token with signs for its spaces and line ends, which tokenizers like GPT-2's write as Ġ and Ċ."""
    text = token.decode("utf-8", "replace") if isinstance(token, bytes) else str(token)
    for sign, meaning in (("Ġ", "▁"), ("Ċ", "⏎"), ("\n", "⏎"), ("<0x0A>", "⏎"), (" ", "▁")):
        text = text.replace(sign, meaning)
    return text
