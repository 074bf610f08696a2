import math

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from orpo_trl.metric_sums import MetricSums, PairGroups, length_bucket

PARTS = st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(0, 500)), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@given(parts=PARTS)
def test_mean_is_weighted(accelerator, parts):
    sums = MetricSums(["m"])
    for value, weight in parts:
        sums.add(torch.tensor([value * weight], dtype=torch.float64), [weight])
    means, non_finite, _ = sums.reduce(accelerator)
    total = sum(weight for _, weight in parts)
    expected = {"m": pytest.approx(sum(v * w for v, w in parts) / total, abs=1e-6)} if total else {}
    assert means == expected
    assert non_finite == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_part_is_left_out_and_counted(accelerator, bad):
    """In TRL one NaN makes the whole logging window NaN (known failure 10)."""
    sums = MetricSums(["nll_loss", "entropy"])
    for value in (6.0, bad, 2.0):
        sums.add(torch.tensor([value, 1.0]), [2, 1])
    assert sums.reduce(accelerator) == ({"nll_loss": 2.0, "entropy": 1.0}, {"nll_loss": 1}, [[]])


def test_reduce_starts_a_new_window(accelerator):
    sums = MetricSums(["m"])
    sums.add(torch.tensor([4.0]), [1])
    sums.reduce(accelerator)
    assert sums.reduce(accelerator) == ({}, {}, [])
    sums.add(torch.tensor([1.0]), [1])
    assert sums.reduce(accelerator)[0] == {"m": 1.0}


def test_one_collective_for_all_metrics(accelerator, monkeypatch):
    """TRL gathers eleven times per micro-batch (known failure 9)."""
    calls = []
    gather = accelerator.gather
    monkeypatch.setattr(accelerator, "gather", lambda *args, **kwargs: calls.append(args) or gather(*args, **kwargs))
    sums = MetricSums(["a", "b", "c"])
    for _ in range(5):
        sums.add(torch.ones(3), [1, 1, 1])
    assert calls == []
    assert sums.reduce(accelerator, [5, 6])[2] == [[5.0, 6.0]]
    assert len(calls) == 1


def test_large_counts_keep_their_digits(accelerator):
    sums = MetricSums(["m"])
    for _ in range(3):
        sums.add(torch.tensor([2.0**25 + 1], dtype=torch.float64), [1])
    assert sums.reduce(accelerator)[0] == {"m": 2.0**25 + 1}


@given(
    pairs=st.lists(
        st.tuples(st.floats(-50, -0.01), st.floats(-50, -0.01), st.sampled_from(["a/x", "b/y"]), st.integers(1, 400)),
        min_size=1, max_size=20,
    ),
    cut=st.integers(0, 20),
)  # fmt: skip
def test_groups_are_means_over_their_pairs_however_batches_are_cut(pairs, cut):
    groups = PairGroups(beta=0.5)
    for part in (pairs[:cut], pairs[cut:]):
        chosen, rejected, sources, lengths = zip(*part, strict=True) if part else ([], [], [], [])
        groups.add(torch.tensor(chosen), torch.tensor(rejected), sources, lengths)
    metrics = groups.reduce()
    expected = {}
    for kind, of_pair in (("sources", lambda p: p[2][-1]), ("lengths", lambda p: length_bucket(p[3]))):
        names = {of_pair(pair) for pair in pairs}
        for name in names if len(names) > 1 else ():
            margins = [c - r for c, r, *_ in (tuple(map(to_fp32, p[:2])) + p[2:] for p in pairs if of_pair(p) == name)]
            expected[f"{kind}/{name}/pairs"] = len(margins)
            expected[f"{kind}/{name}/accuracies"] = sum(margin > 0 for margin in margins) / len(margins)
            expected[f"{kind}/{name}/margins"] = 0.5 * sum(margins) / len(margins)
    assert metrics == pytest.approx(expected, abs=1e-4)
    assert groups.reduce() == {}


def to_fp32(value: float) -> float:
    return torch.tensor(value).item()


def test_groups_of_pairs_that_are_not_finite_and_sources_of_one_name():
    groups = PairGroups(beta=1.0)
    groups.add(torch.tensor([-1.0, -math.inf, -2.0]), torch.tensor([-3.0, -math.inf, -1.0]),
               ["org/data", "org/data", "other/data"], [10, 100, 10])  # fmt: skip
    metrics = groups.reduce()
    assert metrics == {
        "sources/org_data/accuracies": 1.0, "sources/org_data/margins": 2.0, "sources/org_data/pairs": 1,
        "sources/other_data/accuracies": 0.0, "sources/other_data/margins": -1.0, "sources/other_data/pairs": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(1, "1-64"), (64, "1-64"), (65, "65-128"), (129, "129-256"), (3000, "2049-4096")]
)
def test_length_buckets_double(tokens, bucket):
    assert length_bucket(tokens) == bucket
