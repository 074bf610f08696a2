"""Means of pairs with bootstrap intervals of 95 %."""

from collections.abc import Sequence

import numpy as np

from orpo_trl.evaluations import Figure

# Numbers of one resampling step in memory.
_CHUNK = 1 << 22


def bootstrap(values: np.ndarray, names: Sequence[str], seed: int, resamples: int) -> dict[str, Figure]:
    """Means with their standard errors and percentile intervals of 95 %, from resamples of the pairs.

    Of differences between two models on the same pairs, the intervals are paired.

    Args:
        values: `[pairs, figures]`, fp64; a resample takes whole rows.
        names: of the figures.
        seed: of the resamples, which do not depend on the values.
        resamples: how many.

    Returns:
        A figure of each name; of a single pair without error and interval.
    """
    count = len(values)
    generator = np.random.default_rng(seed)
    means = []
    step = max(1, _CHUNK // count)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = generator.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        often = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        means.append(often @ values / count)
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975], axis=0)
    errors = values.std(axis=0, ddof=1) / np.sqrt(count) if count > 1 else [None] * values.shape[1]
    return {
        name: Figure(
            value=values[:, index].mean(),
            stderr=errors[index],
            n=count,
            low=low[index] if count > 1 else None,
            high=high[index] if count > 1 else None,
        )
        for index, name in enumerate(names)
    }
