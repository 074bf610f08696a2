import math

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from orpo_trl.metrics import MetricSums

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
