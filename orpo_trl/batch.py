"""Pairs to one batch: the packed row that shares prompts, or padded rows; and sums over its responses."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orpo_trl.flops import visible
from orpo_trl.pairs.load import SOURCE_COLUMN

# Entries of a batch that are plain counts, not tensors: the trainer sums them without waiting for the device.
COUNTS = ("num_nll_units", "num_pairs", "num_micro_batches")
# Entries that the model's forward takes, where a batch has them.
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "segments", "shift_labels")

_IGNORED = -100


@dataclass
class PairCollator:
    """Pairs to one batch, in one of two layouts.

    'padded': a row for each response with its prompt before it, filled up on the right.

    'shared_prefix': one row without padding, in which each prompt runs once. A pair's segments are its prompt with the
    chosen response, and a branch that begins with the last prompt token again, so that it predicts the first rejected
    token as its first copy predicts the first chosen one. The branch's attention also reads the prompt's keys:

        input_ids       p0 p1 … pP-1 c0 … cC-1  |  pP-1 r0 … rR-1
        position_ids     0  1 …  P-1  P …       |   P-1  P …
        shift_labels    p1 p2 …   c0 c1 …    –  |    r0 r1 …    –

    In both, chosen responses come first, those of pairs before those of rows without a rejected response, then the
    rejected ones in pair order. Everything that the loss needs to know about the layout is in the batch. All tensors
    are integers (DeepSpeed casts floating-point inputs to the model's dtype), int64 and of shape `[rows, seq]` unless
    said otherwise:

    - `input_ids`: for the model.
    - `attention_mask`: how many of the padded layout's tokens a token stands for: 0 for filling, 2 for a shared one,
      else 1. Models read it as a mask; the load-balancing loss of mixtures of experts weighs its means with it.
    - `position_ids`, `segments`: in the shared_prefix layout alone. `segments` is a dict of `key_index` (`[keys]`:
      where in the row each segment's keys are, segment after segment), `query_ends` and `key_ends` (`[segments + 1]`,
      int32, from 0), and as Python ints `query_lengths`, `key_lengths` (lists), `longest_query`, `longest_key`.
    - `shift_labels`: the token that each position predicts, -100 where it is not scored.
    - `nll_divisors`: what the token's negative log-likelihood is divided by in the NLL term, 0 where the token is not
      part of it. The NLL term is the sum of the quotients over the optimiser step / `num_nll_units` of the step.
    - `completion_index`: which response the scored token belongs to; `num_completions` for none.
    - `completion_lengths`: `[completions]`, scored tokens of each response.
    - `num_nll_units` (int): tokens, rows or micro-batches, whatever the reduction averages over.
    - `num_pairs` (int).
    - `num_micro_batches` (int): 1, or 0 for a batch without rows.
    - `work`: a dict of ints, what the batch costs: `pairs`; `tokens` of all responses, each with its prompt, and
      `unique_tokens`, each prompt once; `positions` of the batch, filling included, and `padded_positions` that the
      padded layout takes; `scored` tokens; and `attended`, pairs of a token and a token that it sees, each prompt once.
    - `pair_sources`, `pair_lengths` (lists): where each pair is from, and the tokens of its longer response.

    Attributes:
        pad_token_id: fills rows.
        nll_scope: 'sequence' or 'completion' (`ORPOConfig.nll_scope`).
        nll_reduction: see `ORPOConfig.nll_reduction`.
        max_length: the divisor + 1 of the reduction 'max_length'; not used by the others.
        pad_to_multiple_of: rounds the length of rows up.
        layout: 'padded' or 'shared_prefix'.
    """

    pad_token_id: int
    nll_scope: str = "sequence"
    nll_reduction: str = "token_mean"
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    layout: str = "padded"

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate prepared pairs (columns `prompt_ids`, `chosen_ids`, `rejected_ids`).

        With no examples, the batch is one row that nothing scores: a rank that has run out of pairs must still take
        part in the collectives of ZeRO-3 and FSDP.
        """
        pairs = [example for example in examples if example.get("rejected_ids") is not None]
        chosen = pairs + [example for example in examples if example.get("rejected_ids") is None]
        rows = [(example["prompt_ids"], example["chosen_ids"]) for example in chosen]
        rows += [(example["prompt_ids"], example["rejected_ids"]) for example in pairs]

        lengths = self._nll_lengths(rows[: len(chosen)])
        divisors = self._nll_divisors(lengths)
        segments = []
        for index, (prompt, response) in enumerate(rows):
            is_chosen = index < len(chosen)
            segment = self._segment(prompt, response, index, len(rows), divisors[index] if is_chosen else 0)
            if not is_chosen and self.layout == "shared_prefix":
                segment = {name: values[len(prompt) - 1 :] for name, values in segment.items()}
            segments.append(segment)
        if self.layout == "shared_prefix":
            shared = [len(example["prompt_ids"]) - 1 for example in pairs]
            batch = self._packed(segments, shared)
        else:
            batch = self._padded(segments)
        batch["completion_lengths"] = torch.tensor([len(response) for _, response in rows], dtype=torch.int64)
        units = {"token_mean": sum(lengths), "micro_batch_mean": int(bool(lengths))}
        batch["num_nll_units"] = units.get(self.nll_reduction, len(lengths))
        batch["num_pairs"] = len(pairs)
        batch["num_micro_batches"] = int(bool(rows))
        batch["work"] = {
            **_work(chosen),
            "scored": sum(lengths) + sum(len(response) for _, response in rows[len(chosen) :]),
            "positions": batch["input_ids"].numel() if rows else 0,
        }
        batch["pair_sources"] = [pair.get(SOURCE_COLUMN) for pair in pairs]
        batch["pair_lengths"] = [max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) for pair in pairs]
        return batch

    def positions(self, examples: Sequence[dict[str, Any]]) -> int:
        """Positions of the batch of these examples, filling included."""
        lengths = []
        for example in examples:
            prompt = len(example["prompt_ids"])
            lengths.append(prompt + len(example["chosen_ids"]))
            if example.get("rejected_ids") is not None:
                shared = prompt - 1 if self.layout == "shared_prefix" else 0
                lengths.append(prompt + len(example["rejected_ids"]) - shared)
        if self.layout == "shared_prefix":
            return _round_up(sum(lengths), self.pad_to_multiple_of)
        return len(lengths) * _round_up(max(lengths, default=0), self.pad_to_multiple_of)

    def _segment(self, prompt: list[int], response: list[int], index: int, completions: int, divisor: int):
        """Tensors `[prompt + response]` of one response; a `divisor` of 0 keeps it out of the NLL term."""
        ids = torch.tensor([*prompt, *response])
        # Position p predicts token p + 1, so the response is scored from the last prompt position on.
        first = len(prompt) - 1
        labels = torch.full_like(ids, _IGNORED)
        labels[:-1] = ids[1:]
        if not divisor or self.nll_scope == "completion":
            labels[:first] = _IGNORED
        completion = torch.full_like(ids, completions)
        completion[first:-1] = index
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(len(ids)),
            "shift_labels": labels,
            "nll_divisors": torch.where(labels == _IGNORED, 0, divisor),
            "completion_index": completion,
        }

    def _filling(self, size: int, completions: int) -> dict[str, torch.Tensor]:
        values = {
            "input_ids": self.pad_token_id,
            # In a batch without rows something must be seen: a mean over no token would be NaN.
            "attention_mask": int(not completions),
            "position_ids": 0,
            "shift_labels": _IGNORED,
            "nll_divisors": 0,
            "completion_index": completions,
        }
        return {name: torch.full((size,), value) for name, value in values.items()}

    def _padded(self, segments: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        longest = max((len(segment["input_ids"]) for segment in segments), default=1)
        longest = _round_up(longest, self.pad_to_multiple_of)
        rows = []
        for segment in segments or [{}]:
            filling = self._filling(longest - len(segment.get("input_ids", ())), len(segments))
            rows.append({name: torch.cat([segment.get(name, values[:0]), values]) for name, values in filling.items()})
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "position_ids"}

    def _packed(self, segments: list[dict[str, torch.Tensor]], shared: list[int]) -> dict[str, Any]:
        """One row. `shared[i]` tokens of the i-th segment's prompt are read by the i-th branch from the end."""
        completions = len(segments)
        tokens = sum(len(segment["input_ids"]) for segment in segments)
        missing = _round_up(max(tokens, 1), self.pad_to_multiple_of) - tokens
        if missing:
            segments = [*segments, self._filling(missing, completions)]
        batch: dict[str, Any] = {name: torch.cat([s[name] for s in segments])[None] for name in segments[0]}

        query_lengths = [len(segment["input_ids"]) for segment in segments]
        starts = [0, *itertools.accumulate(query_lengths)]
        keys = [torch.arange(start, end) for start, end in itertools.pairwise(starts)]
        for pair, size in enumerate(shared):
            branch = completions - len(shared) + pair
            keys[branch] = torch.cat([keys[pair][:size], keys[branch]])
            batch["attention_mask"][0, keys[pair][:size]] = 2
        key_lengths = [len(index) for index in keys]
        batch["segments"] = {
            "key_index": torch.cat(keys),
            "query_ends": torch.tensor(starts, dtype=torch.int32),
            "key_ends": torch.tensor([0, *itertools.accumulate(key_lengths)], dtype=torch.int32),
            "query_lengths": query_lengths,
            "key_lengths": key_lengths,
            "longest_query": max(query_lengths),
            "longest_key": max(key_lengths),
        }
        return batch

    def _nll_lengths(self, rows: list[tuple[list[int], list[int]]]) -> list[int]:
        """Tokens of each chosen row that the NLL term covers; a row's first token is predicted by nothing."""
        if self.nll_scope == "completion":
            return [len(response) for _, response in rows]
        return [len(prompt) + len(response) - 1 for prompt, response in rows]

    def _nll_divisors(self, lengths: list[int]) -> list[int]:
        return {
            "token_mean": [1] * len(lengths),
            "micro_batch_mean": [sum(lengths)] * len(lengths),
            "sequence_mean": lengths,
            "max_length": [(self.max_length or 0) - 1] * len(lengths),
        }[self.nll_reduction]


def _work(examples: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What a batch of these examples costs in either layout (`PairCollator`)."""
    work = dict.fromkeys(("pairs", "tokens", "unique_tokens", "attended"), 0)
    rows = longest = 0
    for example in examples:
        prompt, chosen, rejected = (len(example.get(f"{part}_ids") or ()) for part in ("prompt", "chosen", "rejected"))
        is_pair = int(rejected > 0)
        work["pairs"] += is_pair
        work["tokens"] += prompt + chosen + is_pair * (prompt + rejected)
        work["unique_tokens"] += prompt + chosen + rejected
        work["attended"] += visible(prompt + chosen, prompt + chosen) + visible(rejected, prompt + rejected)
        rows, longest = rows + 1 + is_pair, max(longest, prompt + chosen, prompt + rejected)
    return {**work, "padded_positions": rows * longest}


def _round_up(size: int, multiple: int | None) -> int:
    return -(-size // multiple) * multiple if multiple else size


@dataclass
class TokenBudget:
    """Collates the rows of a micro-batch into several, each of at most so many tokens, to bound the memory of a step.

    Attributes:
        collator: makes each of them.
        max_tokens: positions of a batch, filling included. A pair with more makes a micro-batch of its own.
    """

    collator: PairCollator
    max_tokens: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        """As few batches as first-fit by falling length makes, one at least, under `micro_batches`."""
        parts: list[list[dict[str, Any]]] = []
        for example in sorted(examples, key=lambda example: self.collator.positions([example]), reverse=True):
            fits = (part for part in parts if self.collator.positions([*part, example]) <= self.max_tokens)
            part = next(fits, None)
            if part is None:
                parts.append([example])
            else:
                part.append(example)
        return {"micro_batches": [self.collator(part) for part in parts or [[]]]}


def micro_batches(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a batch of `TokenBudget`; a batch of `PairCollator` is one by itself."""
    return batch.get("micro_batches", [batch])


def nll_sum(token_logps: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """Sum over the batch of each NLL token's negative log-likelihood / its divisor.

    Args:
        token_logps: `[rows, seq]`, fp32, log-probability of each of `shift_labels`.
        batch: from `PairCollator`.

    Returns:
        Scalar, fp32; to be divided by the `num_nll_units` of the optimiser step.
    """
    divisors = batch["nll_divisors"]
    weights = torch.where(divisors > 0, 1 / divisors.clamp(min=1).to(token_logps.dtype), 0)
    return -(token_logps * weights).sum()


def response_sums(token_logps: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """Sum of the token log-probabilities of each response, in the order of the batch's `completion_lengths`.

    Args:
        token_logps: `[rows, seq]`, log-probability of each of `shift_labels`.
        batch: from `PairCollator`.

    Returns:
        `[completions]`, of the dtype of `token_logps`.
    """
    # One slot more than there are responses takes the tokens that belong to none.
    sums = token_logps.new_zeros(len(batch["completion_lengths"]) + 1)
    return sums.index_add(0, batch["completion_index"].flatten(), token_logps.flatten())[:-1]


def pair_logps(token_logps: torch.Tensor, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean token log-probability of both responses of each pair (log p of losses.py).

    Args:
        token_logps: `[rows, seq]`, fp32, log-probability of each of `shift_labels`.
        batch: from `PairCollator`.

    Returns:
        `[pairs]` chosen and `[pairs]` rejected, fp32.
    """
    means = response_sums(token_logps, batch) / batch["completion_lengths"]
    pairs = batch["num_pairs"]
    return means[:pairs], means[len(means) - pairs :]
