"""Pairs to one batch: the packed row that shares prompts, or padded rows."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from orpo_trl.lengths import PairLengths, round_up
from orpo_trl.losses import nll_divisors, nll_tokens, nll_units
from orpo_trl.pairs.load import ROW_COLUMN, SOURCE_COLUMN

# Entries of a batch that are plain counts, not tensors: the trainer sums them without waiting for the device.
COUNTS = ("num_nll_units", "num_pairs", "num_micro_batches")
# Entries that the model's forward takes, where a batch has them.
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "segments", "shift_labels")

_IGNORED = -100


@dataclass
class PairCollator:
    """Pairs to one batch, in one of two layouts.

    'padded': a row for each response with its prompt before it, padded on the right.

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
    - `attention_mask`: 0 for padding, else 1; in the shared_prefix layout 2 for a prompt token of both responses.
      Models take it as a mask. The load-balancing loss of a mixture of experts weighs its means with it, so that they
      are those of padded rows.
    - `position_ids`, `segments`: in the shared_prefix layout alone. `segments` is a dict of `key_index` (`[keys]`:
      where in the row each segment's keys are, segment after segment), `query_ends` and `key_ends` (`[segments + 1]`,
      int32, from 0), and as Python ints `query_lengths`, `key_lengths` (lists), `longest_query`, `longest_key`.
    - `shift_labels`: the token that each position predicts, -100 where it is not scored.
    - `nll_divisors`: see `losses.nll_divisors`; 0 where a token is not part of the NLL term.
    - `completion_index`: which response the scored token belongs to; `num_completions` for none.
    - `completion_lengths`: `[completions]`, scored tokens of each response.
    - `num_nll_units` (int): see `losses.nll_units`.
    - `num_pairs` (int).
    - `num_micro_batches` (int): 1, or 0 for a batch without rows.
    - `work`: a dict of ints, what the batch costs (lengths.py): `pairs`; `tokens`, each response with its prompt, and
      `unique_tokens`, each prompt once; `positions` of the batch, padding included, and `padded_positions` of the
      same pairs in the padded layout; `scored` tokens; and `attended`, pairs of a token and a token that it sees.
    - `pair_sources`, `pair_lengths` (lists): where each pair is from, and the tokens of its longer response.
    - `rows`: a dict for each pair or row without a rejected response, in the order of the chosen responses: `source`,
      `row` (its number there), and `prompt_tokens`, `chosen_tokens`, `rejected_tokens` (None without a response).

    Attributes:
        pad_token_id: of padding.
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

        covered = [nll_tokens(len(prompt), len(response), self.nll_scope) for prompt, response in rows[: len(chosen)]]
        divisors = nll_divisors(covered, self.nll_reduction, self.max_length)
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
        batch["num_nll_units"] = nll_units(covered, self.nll_reduction)
        batch["num_pairs"] = len(pairs)
        batch["num_micro_batches"] = int(bool(rows))
        lengths = PairLengths.of(chosen)
        batch["work"] = {
            "pairs": len(pairs),
            "tokens": int(lengths.total.sum()),
            "unique_tokens": int(lengths.unique.sum()),
            "attended": int(lengths.attended.sum()),
            "scored": sum(covered) + int(lengths.rejected.sum()),
            "positions": batch["input_ids"].numel() if rows else 0,
            "padded_positions": int(lengths.batch(is_packed=False)),
        }
        batch["pair_sources"] = [pair.get(SOURCE_COLUMN) for pair in pairs]
        batch["pair_lengths"] = lengths.longer_response[: len(pairs)].tolist()
        batch["rows"] = [_describe(example) for example in chosen]
        return batch

    def positions(self, examples: Sequence[Mapping[str, Any]]) -> int:
        """Positions of the batch of these examples, padding included."""
        return int(PairLengths.of(examples).batch(self.layout == "shared_prefix", self.pad_to_multiple_of))

    def _segment(self, prompt: list[int], response: list[int], index: int, completions: int, divisor: int):
        """Arrays `[prompt + response]` of one response; a `divisor` of 0 keeps it out of the NLL term.

        Arrays of numpy: operations on small ones take a third of the time that those on tensors take.
        """
        ids = np.array([*prompt, *response], dtype=np.int64)
        # Position p predicts token p + 1, so the response is scored from the last prompt position on.
        first = len(prompt) - 1
        labels = np.full_like(ids, _IGNORED)
        labels[:-1] = ids[1:]
        if not divisor or self.nll_scope == "completion":
            labels[:first] = _IGNORED
        completion = np.full_like(ids, completions)
        completion[first:-1] = index
        return {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(len(ids)),
            "shift_labels": labels,
            "nll_divisors": np.where(labels == _IGNORED, 0, divisor),
            "completion_index": completion,
        }

    def _padding(self, size: int, completions: int) -> dict[str, np.ndarray]:
        values = {
            "input_ids": self.pad_token_id,
            # In a batch without rows something must be seen: a mean over no token would be NaN.
            "attention_mask": int(not completions),
            "position_ids": 0,
            "shift_labels": _IGNORED,
            "nll_divisors": 0,
            "completion_index": completions,
        }
        return {name: np.full(size, value, dtype=np.int64) for name, value in values.items()}

    def _padded(self, segments: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        longest = max((len(segment["input_ids"]) for segment in segments), default=1)
        longest = round_up(longest, self.pad_to_multiple_of)
        batch = {}
        for name, padding in self._padding(longest, len(segments)).items():
            if name != "position_ids":
                batch[name] = np.tile(padding, (max(len(segments), 1), 1))
                for row, segment in zip(batch[name], segments, strict=False):
                    row[: len(segment[name])] = segment[name]
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def _packed(self, segments: list[dict[str, np.ndarray]], shared: list[int]) -> dict[str, Any]:
        """One row. `shared[i]` tokens of the i-th segment's prompt are read by the i-th branch from the end."""
        completions = len(segments)
        tokens = sum(len(segment["input_ids"]) for segment in segments)
        missing = round_up(max(tokens, 1), self.pad_to_multiple_of) - tokens
        if missing:
            segments = [*segments, self._padding(missing, completions)]
        rows = {name: np.concatenate([segment[name] for segment in segments]) for name in segments[0]}

        query_lengths = [len(segment["input_ids"]) for segment in segments]
        starts = [0, *itertools.accumulate(query_lengths)]
        keys = [np.arange(start, end) for start, end in itertools.pairwise(starts)]
        for pair, size in enumerate(shared):
            branch = completions - len(shared) + pair
            keys[branch] = np.concatenate([keys[pair][:size], keys[branch]])
            rows["attention_mask"][keys[pair][:size]] = 2
        key_lengths = [len(index) for index in keys]
        batch: dict[str, Any] = {name: torch.from_numpy(values)[None] for name, values in rows.items()}
        batch["segments"] = {
            "key_index": torch.from_numpy(np.concatenate(keys)),
            "query_ends": torch.tensor(starts, dtype=torch.int32),
            "key_ends": torch.tensor([0, *itertools.accumulate(key_lengths)], dtype=torch.int32),
            "query_lengths": query_lengths,
            "key_lengths": key_lengths,
            "longest_query": max(query_lengths),
            "longest_key": max(key_lengths),
        }
        return batch


def _describe(example: Mapping[str, Any]) -> dict[str, Any]:
    rejected = example.get("rejected_ids")
    return {
        "source": example.get(SOURCE_COLUMN),
        "row": example.get(ROW_COLUMN),
        "prompt_tokens": len(example["prompt_ids"]),
        "chosen_tokens": len(example["chosen_ids"]),
        "rejected_tokens": None if rejected is None else len(rejected),
    }
