"""What pairs cost, against batches that are made and tokens that are counted one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_trl.batch import PairCollator
from orpo_trl.lengths import PairLengths

SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=6)


def pairs_of(sizes: list[tuple[int, int, int]]) -> list[dict]:
    return [
        {"prompt_ids": [1] * prompt, "chosen_ids": [2] * chosen, "rejected_ids": [3] * rejected or None}
        for prompt, chosen, rejected in sizes
    ]


@given(SIZES)
def test_a_packed_pair_costs_the_positions_of_its_batch(sizes):
    lengths = PairLengths.of(pairs_of(sizes))
    collator = PairCollator(0, layout="shared_prefix")
    for pair, packed, unique in zip(pairs_of(sizes), lengths.packed, lengths.unique, strict=True):
        batch = collator([pair])
        assert packed == batch["input_ids"].numel()
        assert unique == sum(len(ids or ()) for ids in pair.values())


@given(SIZES, st.sampled_from([None, 8]), st.sampled_from(["padded", "shared_prefix"]))
def test_a_batch_costs_its_positions_whatever_the_shape_of_the_lengths(sizes, multiple, layout):
    lengths = PairLengths.of(pairs_of(sizes))
    is_packed = layout == "shared_prefix"
    whole = PairCollator(0, pad_to_multiple_of=multiple, layout=layout)(pairs_of(sizes))["input_ids"].numel()
    assert lengths.batch(is_packed, multiple) == whole
    drawn = lengths[np.array([list(range(len(sizes)))] * 3)]
    assert drawn.batch(is_packed, multiple).tolist() == [whole] * 3


@given(SIZES)
def test_attended_tokens_are_counted_one_by_one(sizes):
    """A token sees itself and all before it; a rejected response sees its prompt, and not the chosen response."""
    lengths = PairLengths.of(pairs_of(sizes))
    for index, (prompt, chosen, rejected) in enumerate(sizes):
        first = sum(range(1, prompt + chosen + 1))
        branch = sum(prompt + position for position in range(1, rejected + 1))
        assert lengths.attended[index] == first + branch
        repeated = prompt if rejected else 0  # the last prompt token, which the branch begins with, sees the prompt
        assert lengths.attended_packed[index] == first + branch + repeated
        longest = prompt + max(chosen, rejected)
        assert lengths.attended_padded[index] == sum(range(1, longest + 1)) * (2 if rejected else 1)


@given(SIZES)
def test_the_attended_tokens_of_a_packed_pair_are_those_of_its_segments(sizes):
    lengths = PairLengths.of(pairs_of(sizes))
    collator = PairCollator(0, layout="shared_prefix")
    for pair, attended in zip(pairs_of(sizes), lengths.attended_packed, strict=True):
        segments = collator([pair])["segments"]
        seen = 0
        for queries, keys in zip(segments["query_lengths"], segments["key_lengths"], strict=True):
            seen += sum(keys - queries + position for position in range(1, queries + 1))
        assert attended == seen


def test_worked_example():
    """Prompt 4, chosen 3, rejected 2: two rows of 7, or one of 4 + 3 + 1 + 2."""
    lengths = PairLengths.of(pairs_of([(4, 3, 2)]))
    assert (lengths.longest_row, lengths.rows, lengths.batch(is_packed=False)) == (7, 2, 14)
    assert (lengths.packed, lengths.unique, lengths.total) == (10, 9, 13)


@pytest.mark.parametrize("is_packed", [True, False])
def test_no_pairs_cost_nothing(is_packed):
    assert PairLengths.of([]).batch(is_packed) == 0
