"""Logs of a run, as series over optimiser steps and as last values."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Log = dict[str, Any]
PREFIX = "eval_"
# A metric that is not logged: log p(chosen) − log p(rejected), which does not scale with beta as TRL's margin does.
MARGIN = "logps/margins"
# By these the labels of several evaluation sets are found: no other metric's name ends in them.
_MARKS = ("logps/chosen", "runtime")


def number(value: Any) -> float | None:
    """A finite number as a float; None for all else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def labels(history: Sequence[Log]) -> list[str]:
    """Names of the evaluation sets, as between `eval_` and the metric's name; `[""]` for one without a name."""
    found = {}
    for name in dict.fromkeys(name for log in history for name in log if name.startswith(PREFIX)):
        for mark in _MARKS:
            if name == PREFIX + mark:
                found[""] = True
            elif name.endswith(f"_{mark}"):
                found[name[len(PREFIX) : -len(mark) - 1]] = True
    return list(found) or [""]


def prefixes(names: Sequence[str]) -> dict[str, str]:
    """What stands before a metric's name in evaluation, by label; the longest first, so that it matches first."""
    return {label: f"{PREFIX}{label}_" if label else PREFIX for label in sorted(names, key=len, reverse=True)}


def training(history: Sequence[Log], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric in training, `[logs]` each, NaN where a value was not finite."""
    return _series((step, _value(log, metric)) for step, log in _steps(history) if _has(log, metric))


def held_out(history: Sequence[Log], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric in evaluation, `[evaluations]` each: the mean over the evaluation sets."""
    by_step: dict[float, dict[str, float | None]] = {}
    before = prefixes(labels(history))
    for step, log in _steps(history):
        for label, prefix in before.items():
            if _has(log, metric, prefix):
                by_step.setdefault(step, {})[label] = _value(log, metric, prefix)
    return _series((step, mean(values.values())) for step, values in by_step.items())


def last_values(history: Sequence[Log]) -> dict[str, float]:
    """Metrics of the last evaluation of each set, under their logged names; those that are not finite left out."""
    found: dict[str, Any] = {}
    for log in history:
        found.update({name: number(value) for name, value in log.items() if name.startswith(PREFIX)})
    return {name: value for name, value in found.items() if value is not None}


def mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(value / len(known) for value in known) if known else None


def difference(values: dict[str, float | None], prefix: str = "") -> float | None:
    """The margin (`MARGIN`) of metrics under their logged names."""
    chosen, rejected = (number(values.get(f"{prefix}logps/{side}")) for side in ("chosen", "rejected"))
    return None if chosen is None or rejected is None else number(chosen - rejected)


def _has(log: Log, metric: str, prefix: str = "") -> bool:
    return prefix + ("logps/chosen" if metric == MARGIN else metric) in log


def _value(log: Log, metric: str, prefix: str = "") -> float | None:
    return difference(log, prefix) if metric == MARGIN else number(log.get(prefix + metric))


def _steps(history: Sequence[Log]):
    for log in history:
        step = number(log.get("step"))
        if step is not None:
            yield step, log


def _series(points) -> tuple[np.ndarray, np.ndarray]:
    table = np.array([(step, math.nan if value is None else value) for step, value in points], dtype=float)
    table = table.reshape(-1, 2)
    table = table[np.argsort(table[:, 0], kind="stable")]
    return table[:, 0], table[:, 1]
