"""Both layouts compared with sums written out row by row."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orpo_trl.batch import COUNTS, PairCollator
from orpo_trl.budget import TokenBudget
from orpo_trl.losses import nll_sum, pair_logps

IDS = st.lists(st.integers(0, 99), min_size=1, max_size=12)
EXAMPLES = st.lists(
    st.fixed_dictionaries({"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": st.none() | IDS}), max_size=6
)
REDUCTIONS = ["token_mean", "micro_batch_mean", "sequence_mean", "max_length"]
MAX_LENGTH = 40
LAYOUTS = st.sampled_from(["padded", "shared_prefix"])


def pair_logps_of(logps: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return pair_logps(logps, batch["completion_index"], batch["completion_lengths"], batch["num_pairs"])


def token_logp(context: int, token: int) -> float:
    """A made-up log-probability, different for each pair of tokens."""
    return -(1 + context * 0.37 + token * 0.011) % 7 - 0.1


def fake_logps(batch: dict) -> torch.Tensor:
    ids, labels = batch["input_ids"], batch["shift_labels"]
    rows = [
        [token_logp(c, y) if y != -100 else 0.0 for c, y in zip(row, targets, strict=True)]
        for row, targets in zip(ids.tolist(), labels.tolist(), strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def row_logps(prompt: list[int], response: list[int], scope: str) -> list[float]:
    ids = prompt + response
    first = len(prompt) if scope == "completion" else 1
    return [token_logp(ids[k - 1], ids[k]) for k in range(first, len(ids))]


@given(
    EXAMPLES,
    st.sampled_from(["sequence", "completion"]),
    st.sampled_from(REDUCTIONS),
    st.sampled_from([None, 8]),
    LAYOUTS,
)
def test_nll_equals_its_definition(examples, scope, reduction, multiple, layout):
    batch = PairCollator(0, scope, reduction, MAX_LENGTH, multiple, layout)(examples)
    rows = [row_logps(e["prompt_ids"], e["chosen_ids"], scope) for e in examples]
    expected = {
        "token_mean": -sum(map(sum, rows)),
        "micro_batch_mean": -sum(map(sum, rows)) / max(sum(map(len, rows)), 1),
        "sequence_mean": -sum(sum(row) / len(row) for row in rows),
        "max_length": -sum(sum(row) / (MAX_LENGTH - 1) for row in rows),
    }[reduction]
    units = {"token_mean": sum(map(len, rows)), "micro_batch_mean": int(bool(rows))}.get(reduction, len(rows))
    assert nll_sum(fake_logps(batch), batch["nll_divisors"]).item() == pytest.approx(expected, abs=1e-9)
    assert batch["num_nll_units"] == units


@given(EXAMPLES, st.sampled_from(["sequence", "completion"]), LAYOUTS)
def test_pair_logps_are_the_means_over_the_responses(examples, scope, layout):
    batch = PairCollator(0, scope, layout=layout)(examples)
    chosen, rejected = pair_logps_of(fake_logps(batch), batch)
    pairs = [e for e in examples if e["rejected_ids"] is not None]
    for logps, name in ((chosen, "chosen_ids"), (rejected, "rejected_ids")):
        rows = [row_logps(e["prompt_ids"], e[name], "completion") for e in pairs]
        assert logps.tolist() == pytest.approx([sum(row) / len(row) for row in rows], abs=1e-9)
    assert batch["num_pairs"] == len(pairs)


@given(EXAMPLES)
def test_rows_hold_the_texts_and_nothing_else(examples):
    batch = PairCollator(99)(examples)
    expected = sorted(
        e["prompt_ids"] + e[name] for e in examples for name in ("chosen_ids", "rejected_ids") if e[name] is not None
    )
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert (sorted(rows) if examples else []) == expected
    assert batch["work"]["tokens"] == sum(map(len, expected))


@given(EXAMPLES, st.sampled_from([None, 8]))
def test_packed_row_computes_each_prompt_once_and_lets_both_responses_see_it(examples, multiple):
    """From the segments alone: the keys that a query reads are the tokens of its row, up to the query itself."""
    batch = PairCollator(99, pad_to_multiple_of=multiple, layout="shared_prefix")(examples)
    segments, ids, positions = batch["segments"], batch["input_ids"][0].tolist(), batch["position_ids"][0].tolist()
    queries, keys = (torch.tensor(range(len(ids))).split(segments["query_lengths"]), segments["key_index"])
    read = [[(ids[key], positions[key]) for key in part.tolist()] for part in keys.split(segments["key_lengths"])]
    pairs = [e for e in examples if e["rejected_ids"] is not None]
    chosen = pairs + [e for e in examples if e["rejected_ids"] is None]
    expected = [e["prompt_ids"] + e["chosen_ids"] for e in chosen] + [
        e["prompt_ids"] + e["rejected_ids"] for e in pairs
    ]
    assert read[: len(expected)] == [[(token, k) for k, token in enumerate(row)] for row in expected]
    for part, row in zip(queries, read, strict=True):  # a segment's queries are its last keys
        assert [(ids[query], positions[query]) for query in part] == row[len(row) - len(part) :]

    shared = sum(len(e["prompt_ids"]) - 1 for e in pairs)
    tokens = sum(map(len, expected)) - shared
    assert len(ids) - tokens == (-tokens % (multiple or 1) if tokens else multiple or 1)
    if examples:
        assert batch["attention_mask"].sum() == sum(map(len, expected))
    for name, lengths in (("query", segments["query_lengths"]), ("key", segments["key_lengths"])):
        assert segments[f"{name}_ends"].tolist() == [0, *itertools.accumulate(lengths)]
        assert segments[f"longest_{name}"] == max(lengths)


@given(EXAMPLES.filter(len), st.sampled_from([None, 8]), LAYOUTS)
def test_positions_are_counted_without_making_the_batch(examples, multiple, layout):
    collator = PairCollator(0, pad_to_multiple_of=multiple, layout=layout)
    assert collator.positions(examples) == collator(examples)["input_ids"].numel()


@given(EXAMPLES, st.integers(1, 80), LAYOUTS)
def test_budget_splits_the_rows_and_nothing_else(examples, budget, layout):
    collator = PairCollator(0, layout=layout)
    whole, parts = collator(examples), TokenBudget(collator, budget)(examples)["passes"]
    for name in COUNTS[:-1]:
        assert sum(part[name] for part in parts) == whole[name]
    for name in set(whole["work"]) - {"positions", "padded_positions"}:
        assert sum(part["work"][name] for part in parts) == whole["work"][name]
    assert sum(nll_sum(fake_logps(part), part["nll_divisors"]).item() for part in parts) == pytest.approx(
        nll_sum(fake_logps(whole), whole["nll_divisors"]).item(), abs=1e-9
    )
    for part in parts:
        rows = len(part["completion_lengths"]) - part["num_pairs"]
        assert part["input_ids"].numel() <= budget or rows <= 1
    # No two parts would have fitted into one.
    sizes = sorted(part["input_ids"].numel() for part in parts)
    if layout == "shared_prefix" and len(parts) > 1:
        assert sizes[0] + sizes[1] > budget


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_no_floating_point_tensor_is_handed_to_deepspeed(layout):
    """DeepSpeed would cast it to the model's dtype: 1/347 in bf16 is wrong by 0.2 %."""
    batch = PairCollator(0, layout=layout)([{"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]}])
    values = [*batch.values(), *batch.get("segments", {}).values()]
    assert not any(value.is_floating_point() for value in values if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_batch_of_a_rank_without_rows_has_no_scored_token(layout):
    batch = PairCollator(7, layout=layout)([])
    assert (batch["shift_labels"] == -100).all()
    assert (batch["attention_mask"] == 1).all()
    assert [batch[name] for name in COUNTS] == [0, 0, 0]
    assert set(batch["work"].values()) == {0}
    logps = torch.zeros(batch["input_ids"].shape, requires_grad=True)
    chosen, rejected = pair_logps_of(logps, batch)
    (nll_sum(logps, batch["nll_divisors"]) + chosen.sum() + rejected.sum()).backward()
    assert logps.grad.tolist() == [[0.0]]
