"""Which pairs meet in a micro-batch: of a dataset (`GlobalBatchSampler`), of a stream (`StreamedBatches`)."""

import heapq
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader

from orpo_trl.upstream import RankAwareSampler, get_length_grouped_indices


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

    def loader(self, collator: Callable[[list[dict[str, Any]]], Any], workers: int) -> DataLoader:
        """Reads the micro-batches, in this process (`workers` 0) or in one worker process (any other number).

        `datasets` gives each worker other shards of the stream, and none to those that are too many. Each worker would
        then start again at the end of its own shards, so that the rows of short shards come more often.
        """
        return DataLoader(self, batch_size=None, collate_fn=collator, num_workers=min(workers, 1))

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


class GlobalBatchSampler(RankAwareSampler):
    """Deals the rows of each optimiser step to ranks and accumulation steps, each row once.

    Distributed samplers repeat rows to fill the last batch, which trains on them twice and counts them twice in
    evaluation. Here the last optimiser step holds exactly the rows that are left: a rank may get fewer than the others,
    or none (`PairCollator` makes a batch of that too). A step's rows depend on seed and epoch alone, not on how many
    ranks and accumulation steps share them.

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
        is_padded: rows of a micro-batch cost as much as the longest, which 'batch_rebalance' takes into account.
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
        is_padded: bool = True,
    ):
        super().__init__(
            list(lengths),
            batch_size * ranks * accumulation,
            ranks,
            accumulation,
            seed=seed,
            rank=rank,
            drop_last=drop_last,
        )
        self.rows_per_micro_batch = batch_size
        self.strategy = strategy
        self.is_padded = is_padded

    def __len__(self) -> int:
        """Micro-batches of each rank in an epoch."""
        full = self.num_full_batches * self.grad_accum
        return full + (self._micro_batches(self.remainder) if self.has_tail else 0)

    def __iter__(self) -> Generator[list[int]]:
        order = self._order()
        for step in range(self.num_global_batches):
            rows = order[step * self.effective_batch_size : (step + 1) * self.effective_batch_size]
            if self.strategy == "batch_rebalance" and len(rows) == self.effective_batch_size:
                yield from self.balanced(rows)
                continue
            size = self.rows_per_micro_batch
            for slot in range(self._micro_batches(len(rows))):
                start = (slot * self.dp_size + self.rank) * size
                yield rows[start : start + size]

    def assign(self, rows: list[int], lengths: list[int]) -> list[list[list[int]]]:
        """Rows of each rank's micro-batches; those that run at the same time are of like cost."""
        if self.is_padded:
            return super().assign(rows, lengths)
        # Longest first, each to the micro-batch with the fewest tokens so far.
        groups: list[tuple[int, int, list[int]]] = [(0, slot, []) for slot in range(self.dp_size * self.grad_accum)]
        for length, row in sorted(zip(lengths, rows, strict=True), reverse=True):
            tokens, slot, group = groups[0]
            heapq.heapreplace(groups, (tokens + length, slot, [*group, row]))
        ranked = [group for _, _, group in sorted(groups, reverse=True)]
        return [ranked[rank :: self.dp_size] for rank in range(self.dp_size)]

    def _micro_batches(self, rows: int) -> int:
        return -(-rows // (self.rows_per_micro_batch * self.dp_size))

    def _order(self) -> list[int]:
        if self.strategy == "sequential":
            return list(range(len(self.lengths)))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.strategy == "group_by_length":
            return get_length_grouped_indices(self.lengths, self.effective_batch_size, generator=generator)
        return torch.randperm(len(self.lengths), generator=generator).tolist()
