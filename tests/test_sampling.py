"""Each row is used once, and the rows of an optimiser step do not depend on the number of ranks."""

import itertools

import pytest
from datasets import IterableDataset
from hypothesis import given
from hypothesis import strategies as st

from orpo_trl.sampling import GlobalBatchSampler, StreamedBatches

STRATEGIES = ["random", "sequential", "group_by_length", "batch_rebalance"]


@given(
    st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.sampled_from(STRATEGIES),
    st.integers(0, 2), st.booleans(),
)  # fmt: skip
def test_each_row_is_used_once_and_in_the_same_step_as_in_one_process(
    rows, batch_size, ranks, accumulation, strategy, epoch, is_padded
):
    lengths = [(7 * i) % 13 + 1 for i in range(rows)]

    def steps(ranks: int, accumulation: int, batch_size: int) -> list[list[int]]:
        micro_batches = []
        for rank in range(ranks):
            sampler = GlobalBatchSampler(
                lengths, batch_size, ranks, rank, accumulation, strategy, seed=3, is_padded=is_padded
            )
            sampler.set_epoch(epoch)
            micro_batches.append(list(sampler))
            assert len(micro_batches[-1]) == len(sampler)
        slots = [sum(slot, []) for slot in zip(*micro_batches, strict=True)]
        return [sorted(sum(slots[k : k + accumulation], [])) for k in range(0, len(slots), accumulation)]

    split = steps(ranks, accumulation, batch_size)
    assert sorted(sum(split, [])) == list(range(rows))
    assert split == steps(1, 1, batch_size * ranks * accumulation)


@given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 3))
def test_each_row_of_a_stream_is_used_once_and_ranks_get_equally_many_micro_batches(rows, batch_size, ranks):
    stream = IterableDataset.from_generator(lambda: ({"row": k} for k in range(rows)))
    parts = [list(StreamedBatches(stream, batch_size, ranks, rank)) for rank in range(ranks)]
    slots = [sum(slot, []) for slot in zip(*parts, strict=True)]
    assert [row["row"] for slot in slots for row in slot] == list(range(rows))
    assert all(len(slot) == batch_size * ranks for slot in slots[:-1])


@given(st.lists(st.integers(1, 50), min_size=72, max_size=72), st.integers(1, 4), st.integers(1, 3))
def test_rebalancing_evens_out_the_tokens_of_ranks_and_steps(lengths, ranks, accumulation):
    loads = []
    for rank in range(ranks):
        sampler = GlobalBatchSampler(
            lengths, 72 // (ranks * accumulation), ranks, rank, accumulation, "batch_rebalance", is_padded=False
        )
        loads += [sum(lengths[row] for row in rows) for rows in sampler]
    # Longest first leaves no two groups further apart than one row.
    assert max(loads) - min(loads) <= max(lengths)


def test_endless_stream_starts_again_and_is_never_short():
    stream = IterableDataset.from_generator(lambda: ({"row": k} for k in range(5)))
    batches = itertools.islice(StreamedBatches(stream, 2, endless=True), 4)
    assert [[row["row"] for row in batch] for batch in batches] == [[0, 1], [2, 3], [4, 0], [1, 2]]


def _rows_of_shards(shards):
    for shard in shards:
        yield from ({"row": 10 * shard + k} for k in range(shard + 1))  # shards of 1, 2, 3, … rows


def _visits_of_two_epochs(shards: int, workers: int, ranks: int) -> list[int]:
    stream = IterableDataset.from_generator(_rows_of_shards, gen_kwargs={"shards": list(range(shards))})
    epoch = shards * (shards + 1) // 2  # micro-batches of two epochs: one row each, or a row of each rank
    loaders = [StreamedBatches(stream, 1, ranks, rank, endless=True).loader(list, workers) for rank in range(ranks)]
    batches = [batch for loader in loaders for batch in itertools.islice(loader, 2 * epoch // ranks)]
    return sorted(row["row"] for batch in batches for row in batch)


@pytest.mark.parametrize(("shards", "workers", "ranks"), [
    *itertools.product((1, 2, 3, 5), (0,), (1, 2)),
    (1, 2, 1), (2, 4, 2), (3, 2, 1), (5, 4, 1),  # with worker processes
])  # fmt: skip
def test_each_row_of_a_sharded_stream_is_used_once_an_epoch(shards, workers, ranks):
    """More workers than shards ended in "The stream has no row", and uneven shards repeated rows."""
    rows = [row["row"] for row in _rows_of_shards(range(shards))]
    assert _visits_of_two_epochs(shards, workers, ranks) == sorted(2 * rows)


def test_full_micro_batches_hold_batch_size_rows_in_order():
    """They are those of `torch.utils.data.BatchSampler`, so `micro_batch_mean` gives TRL's loss."""
    sampler = GlobalBatchSampler([1] * 21, 4, accumulation=2)
    assert [len(batch) for batch in sampler] == [4, 4, 4, 4, 4, 1]
    assert sum(sampler, []) == list(range(21))


def test_drop_last_leaves_out_the_partial_step():
    sampler = GlobalBatchSampler([1] * 21, 4, accumulation=2, drop_last=True)
    assert sum(sampler, []) == list(range(16))
    assert len(sampler) == 4


def test_epochs_differ_and_seeds_repeat():
    def order(seed: int, epoch: int) -> list[int]:
        sampler = GlobalBatchSampler([1] * 50, 5, strategy="random", seed=seed)
        sampler.set_epoch(epoch)
        return sum(sampler, [])

    assert order(1, 0) != order(1, 1)
    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(2, 0)
