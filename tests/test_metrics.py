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
    sums = MetricSums()
    for value, weight in parts:
        sums.add("m", torch.tensor(value * weight, dtype=torch.float64), weight)
    means, non_finite = sums.reduce(accelerator)
    total = sum(weight for _, weight in parts)
    expected = {"m": pytest.approx(sum(v * w for v, w in parts) / total, abs=1e-6)} if total else {}
    assert means == expected
    assert non_finite == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_part_is_left_out_and_counted(accelerator, bad):
    """In TRL one NaN makes the whole logging window NaN (known failure 10)."""
    sums = MetricSums()
    for value in (6.0, bad, 2.0):
        sums.add("nll_loss", torch.tensor(value), 2)
    assert sums.reduce(accelerator) == ({"nll_loss": 2.0}, {"nll_loss": 1})


def test_reduce_starts_a_new_window(accelerator):
    sums = MetricSums()
    sums.add("m", torch.tensor(4.0), 1)
    sums.reduce(accelerator)
    assert sums.reduce(accelerator) == ({}, {})
    sums.add("m", torch.tensor(1.0), 1)
    assert sums.reduce(accelerator)[0] == {"m": 1.0}


def test_one_collective_for_all_metrics(accelerator, monkeypatch):
    """TRL gathers eleven times per micro-batch (known failure 9)."""
    calls = []
    reduce = accelerator.reduce
    monkeypatch.setattr(accelerator, "reduce", lambda *args, **kwargs: calls.append(args) or reduce(*args, **kwargs))
    sums = MetricSums()
    for _ in range(5):
        for name in ("a", "b", "c"):
            sums.add(name, torch.tensor(1.0), 1)
    assert calls == []
    sums.reduce(accelerator)
    assert len(calls) == 1


def test_large_counts_keep_their_digits(accelerator):
    sums = MetricSums()
    for _ in range(3):
        sums.add("m", torch.tensor(2.0**25 + 1, dtype=torch.float64), 1)
    assert sums.reduce(accelerator)[0] == {"m": 2.0**25 + 1}
