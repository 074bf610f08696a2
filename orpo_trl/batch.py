"""Pairs to batches: which meet in a micro-batch (`GlobalBatchSampler`, `StreamedBatches`), and its tensors."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import IterableDataset
from transformers.trainer_pt_utils import BatchRebalanceSampler, get_length_grouped_indices
from trl.trainer.utils import pad

# Entries of a batch that are plain counts, not tensors: the trainer sums them without waiting for the device.
COUNTS = ("num_nll_units", "num_nll_tokens", "num_pairs", "num_tokens", "num_micro_batches")
# Entries that the model's forward takes.
MODEL_INPUTS = ("input_ids", "attention_mask", "shift_labels")

_IGNORED = -100


@dataclass
class PairCollator:
    """Pairs to one padded batch: a row for each chosen response, then a row for each rejected one.

    Everything that the loss needs to know about the layout is in the batch, so another layout needs another collator
    and nothing else. All tensors are int64 (DeepSpeed casts floating-point inputs to the model's dtype), of shape
    `[rows, seq]` unless said otherwise:

    - `input_ids`, `attention_mask`: for the model. Rows are padded on the right.
    - `shift_labels`: the token that each position predicts, -100 where it is not scored.
    - `nll_divisors`: what the token's negative log-likelihood is divided by in the NLL term, 0 where the token is not
      part of it. The NLL term is the sum of the quotients over the optimiser step / `num_nll_units` of the step.
    - `completion_index`: which response the scored token belongs to; `num_completions` for none. Chosen responses come
      first, those of pairs before those of rows without a rejected response, then the rejected ones in pair order.
    - `completion_lengths`: `[completions]`, scored tokens of each response.
    - `num_nll_units` (int): tokens, rows or micro-batches, whatever the reduction averages over.
    - `num_nll_tokens`, `num_pairs`, `num_tokens` (ints): tokens in the NLL term; pairs; real tokens of all rows.
    - `num_micro_batches` (int): 1, or 0 for a batch without rows.

    Attributes:
        pad_token_id: fills short rows.
        nll_scope: 'sequence' or 'completion' (`ORPOConfig.nll_scope`).
        nll_reduction: see `ORPOConfig.nll_reduction`.
        max_length: the divisor + 1 of the reduction 'max_length'; not used by the others.
        pad_to_multiple_of: rounds the length of rows up.
    """

    pad_token_id: int
    nll_scope: str = "sequence"
    nll_reduction: str = "token_mean"
    max_length: int | None = None
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate prepared pairs (columns `prompt_ids`, `chosen_ids`, `rejected_ids`).

        With no examples, the batch is one row that nothing scores: a rank that has run out of pairs must still take
        part in the collectives of ZeRO-3 and FSDP.
        """
        pairs = [example for example in examples if example.get("rejected_ids") is not None]
        chosen = pairs + [example for example in examples if example.get("rejected_ids") is None]
        rows = [(example["prompt_ids"], example["chosen_ids"]) for example in chosen]
        rows += [(example["prompt_ids"], example["rejected_ids"]) for example in pairs]
        completions = len(rows)

        lengths = self._nll_lengths(rows[: len(chosen)])
        divisors = self._nll_divisors(lengths)
        tensors: dict[str, list[torch.Tensor]] = {name: [] for name in _PADDING}
        for index, (prompt, response) in enumerate(rows or [([self.pad_token_id], [])]):
            ids = torch.tensor([*prompt, *response])
            scores_prompt = index < len(chosen) and self.nll_scope == "sequence"
            # Position p predicts token p + 1, so the response is scored from the last prompt position on.
            first = len(prompt) - 1
            labels = torch.full_like(ids, _IGNORED)
            labels[:-1] = ids[1:]
            if not scores_prompt:
                labels[:first] = _IGNORED
            divisor = torch.zeros_like(ids)
            if index < len(chosen):
                divisor[labels != _IGNORED] = divisors[index]
            completion = torch.full_like(ids, completions)
            completion[first:-1] = index
            tensors["input_ids"].append(ids)
            tensors["attention_mask"].append(torch.ones_like(ids))
            tensors["shift_labels"].append(labels)
            tensors["nll_divisors"].append(divisor)
            tensors["completion_index"].append(completion)
        padding = {**_PADDING, "input_ids": self.pad_token_id, "completion_index": completions}
        batch: dict[str, Any] = {
            name: pad(values, padding_value=padding[name], pad_to_multiple_of=self.pad_to_multiple_of)
            for name, values in tensors.items()
        }
        batch["completion_lengths"] = torch.tensor([len(response) for _, response in rows], dtype=torch.int64)
        units = {"token_mean": sum(lengths), "micro_batch_mean": int(bool(lengths))}
        batch["num_nll_units"] = units.get(self.nll_reduction, len(lengths))
        batch["num_nll_tokens"] = sum(lengths)
        batch["num_pairs"] = len(pairs)
        batch["num_tokens"] = sum(len(prompt) + len(response) for prompt, response in rows)
        batch["num_micro_batches"] = int(bool(rows))
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


_PADDING = {
    "input_ids": 0,
    "attention_mask": 0,
    "shift_labels": _IGNORED,
    "nll_divisors": 0,
    "completion_index": 0,
}


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


def pair_logps(token_logps: torch.Tensor, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean token log-probability of both responses of each pair (log p of losses.py).

    Args:
        token_logps: `[rows, seq]`, fp32, log-probability of each of `shift_labels`.
        batch: from `PairCollator`.

    Returns:
        `[pairs]` chosen and `[pairs]` rejected, fp32.
    """
    lengths = batch["completion_lengths"]
    # One slot more than there are responses takes the tokens that belong to none.
    sums = token_logps.new_zeros(len(lengths) + 1)
    sums = sums.index_add(0, batch["completion_index"].flatten(), token_logps.flatten())[:-1]
    means = sums / lengths
    pairs = batch["num_pairs"]
    return means[:pairs], means[len(lengths) - pairs :]


class StreamedBatches(torch.utils.data.IterableDataset):
    """Micro-batches of one rank from a stream of pairs, each row once, as `GlobalBatchSampler` deals a dataset's.

    Every rank reads the whole stream and takes its own rows, so that all have as many micro-batches.

    Args:
        rows: a stream of prepared pairs.
        batch_size: rows of a full micro-batch, per rank.
        ranks: number of processes.
        rank: index of this process.
        endless: start again where the stream ends, as training until `max_steps` needs: optimiser steps are then always
            full, and a stream without a row is an error. Otherwise the last micro-batch has the rows that are left, and
            may have none.
    """

    def __init__(self, rows: IterableDataset, batch_size: int, ranks: int = 1, rank: int = 0, endless: bool = False):
        self.rows, self.batch_size, self.ranks, self.rank, self.endless = rows, batch_size, ranks, rank, endless

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        pending: list[dict[str, Any]] = []
        for epoch in itertools.count():
            self.rows.set_epoch(epoch)
            found = False
            for row in self.rows:
                found = True
                pending.append(row)
                if len(pending) == self.batch_size * self.ranks:
                    yield pending[mine]
                    pending = []
            if self.endless and not found:
                raise ValueError("The stream has no row that can be trained on.")
            if not self.endless:
                break
        if pending:
            yield pending[mine]


class GlobalBatchSampler(BatchRebalanceSampler):
    """Deals the rows of each optimiser step to ranks and accumulation steps, each row once.

    Distributed samplers repeat rows to fill the last batch, which trains on them twice and counts them twice in
    evaluation. Here the last optimiser step holds exactly the rows that are left: a rank may get fewer than the others,
    or none (`PairCollator` makes a batch of that too). A step's rows depend on seed and epoch alone, not on how many
    ranks and accumulation steps share them.

    `transformers.Trainer` hands a sampler of this base class over rank-aware, without sharding it again.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a full micro-batch, per rank.
        ranks: number of processes.
        rank: index of this process.
        accumulation: micro-batches of an optimiser step, per rank.
        strategy: 'random', 'sequential', 'group_by_length' or 'batch_rebalance'
            (`TrainingArguments.train_sampling_strategy`).
        seed: of the order of rows; the epoch is added to it.
        drop_last: leave out the last optimiser step where it is not full.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        ranks: int = 1,
        rank: int = 0,
        accumulation: int = 1,
        strategy: str = "sequential",
        seed: int = 42,
        drop_last: bool = False,
    ):
        super().__init__(
            lengths, batch_size * ranks * accumulation, ranks, accumulation, seed=seed, rank=rank, drop_last=drop_last
        )
        self.rows_per_micro_batch = batch_size
        self.strategy = strategy

    def __len__(self) -> int:
        """Micro-batches of each rank in an epoch."""
        full = self.num_full_batches * self.grad_accum
        return full + (self._micro_batches(self.remainder) if self.has_tail else 0)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for step in range(self.num_global_batches):
            rows = order[step * self.effective_batch_size : (step + 1) * self.effective_batch_size]
            if self.strategy == "batch_rebalance" and len(rows) == self.effective_batch_size:
                yield from self._yield_global_batch(rows)
                continue
            size = self.rows_per_micro_batch
            for slot in range(self._micro_batches(len(rows))):
                start = (slot * self.dp_size + self.rank) * size
                yield rows[start : start + size]

    def _micro_batches(self, rows: int) -> int:
        return -(-rows // (self.rows_per_micro_batch * self.dp_size))

    def _order(self) -> list[int]:
        if self.strategy == "sequential":
            return list(range(len(self.lengths)))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.strategy == "group_by_length":
            return get_length_grouped_indices(self.lengths, self.effective_batch_size, generator=generator)
        return torch.randperm(len(self.lengths), generator=generator).tolist()
