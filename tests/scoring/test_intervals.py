"""Bootstrap intervals against a known truth, scipy, and the normal approximation of a large sample."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from orpo_trl.scoring.intervals import bootstrap

NAMES = ("accuracy", "margin", "log_odds", "chosen", "rejected")


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(3)
    truth = np.array([0.6, 0.4, 1.0, -0.8, -1.2])
    covered = []
    for trial in range(400):
        margins = generator.normal(truth[1], 1.5, size=120)
        right = generator.random(120) < truth[0]
        others = generator.exponential(size=(120, 3)) + truth[2:] - 1
        found = bootstrap(np.column_stack([right, margins, others]), NAMES, seed=trial, resamples=1000)
        covered.append([part.low <= real <= part.high for part, real in zip(found.values(), truth, strict=True)])
    # 95 % of 400, give or take 3.3 standard errors of 1.1 %; skewed means of 120 are covered a little less often.
    shares = np.mean(covered, axis=0)
    assert np.all(shares > 0.91)
    assert np.all(shares < 0.985)


def test_intervals_are_those_of_scipy_and_are_repeated_by_their_seed():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).normal(size=(60, len(NAMES)))
    found = bootstrap(values, NAMES, 1, 2000)
    assert found == bootstrap(values, NAMES, 1, 2000)
    assert found != bootstrap(values, NAMES, 2, 2000)
    for column, figure in enumerate(found.values()):
        other = stats.bootstrap((values[:, column],), np.mean, n_resamples=20_000, method="percentile", rng=0)
        assert figure.low == pytest.approx(other.confidence_interval.low, abs=0.03)
        assert figure.high == pytest.approx(other.confidence_interval.high, abs=0.03)
        assert figure.stderr == pytest.approx(other.standard_error, rel=0.05)


def test_many_pairs_are_resampled_in_parts(monkeypatch):
    values = np.random.default_rng(0).normal(size=(500, len(NAMES)))
    whole = bootstrap(values, NAMES, 1, 50)
    monkeypatch.setattr("orpo_trl.scoring.intervals._CHUNK", 1)
    for name, figure in bootstrap(values, NAMES, 1, 50).items():
        assert figure.model_dump() == pytest.approx(whole[name].model_dump(), rel=1e-9)


def test_intervals_of_many_pairs_are_those_of_the_normal_approximation():
    """Mean ± 1.96 standard errors, by the central limit theorem; of the ends of 10,000 resamples, 0.03 are noise."""
    generator = np.random.default_rng(5)
    values = np.column_stack([generator.random(4000) < 0.7, generator.exponential(2, 4000)]).astype(np.float64)
    found = bootstrap(values, ("accuracy", "margin"), seed=0, resamples=10_000)
    for column, figure in enumerate(found.values()):
        error = values[:, column].std(ddof=1) / np.sqrt(4000)
        assert figure.value == pytest.approx(values[:, column].mean())
        assert figure.low == pytest.approx(figure.value - 1.96 * error, abs=0.1 * error)
        assert figure.high == pytest.approx(figure.value + 1.96 * error, abs=0.1 * error)


@hypothesis_settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=40), st.floats(-100, 100), st.integers(0, 9))
def test_interval_lies_within_the_values_and_moves_with_them(values, shift, seed):
    column = np.array(values)[:, None]
    (one,) = bootstrap(column, ["a"], seed, 200).values()
    (moved,) = bootstrap(column + shift, ["a"], seed, 200).values()
    assert None not in (one.low, one.high, moved.low, moved.high)
    assert min(values) - 1e-9 <= one.low <= one.high <= max(values) + 1e-9
    assert (moved.low, moved.high) == pytest.approx((one.low + shift, one.high + shift), abs=1e-6)


def test_a_single_pair_has_neither_error_nor_interval():
    (figure,) = bootstrap(np.array([[0.5]]), ["a"], 0, 10_000).values()
    assert (figure.value, figure.n, figure.stderr, figure.low, figure.high) == (0.5, 1, None, None, None)
