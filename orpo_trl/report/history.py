"""Logs of a run, as series over optimiser steps and as last values."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from orpo_trl.metrics import EVALUATION, MARGIN, evaluation_prefixes, number

Log = dict[str, Any]


def training(history: Sequence[Log], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric in training, `[logs]` each, NaN where a value was not finite."""
    return _series((step, _value(log, metric)) for step, log in _steps(history) if _has(log, metric))


def held_out(history: Sequence[Log], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric in evaluation, `[evaluations]` each: the mean over the evaluation sets."""
    by_step: dict[float, dict[str, float | None]] = {}
    prefixes = evaluation_prefixes(name for log in history for name in log)
    for step, log in _steps(history):
        for prefix in prefixes:
            if _has(log, metric, prefix):
                by_step.setdefault(step, {})[prefix] = _value(log, metric, prefix)
    return _series((step, mean(values.values())) for step, values in by_step.items())


def last_values(history: Sequence[Log]) -> dict[str, float]:
    """Metrics of the last evaluation of each set, under their logged names, without those that are not finite."""
    found: dict[str, Any] = {}
    for log in history:
        found.update({name: number(value) for name, value in log.items() if name.startswith(EVALUATION)})
    return {name: value for name, value in found.items() if value is not None}


def is_before_training(log: Log) -> bool:
    """Whether a log is of step 0, as the evaluation that `eval_on_start` asks for."""
    return number(log.get("step")) == 0


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    return math.fsum(value / len(known) for value in known) if known else None


def difference(values: Mapping[str, Any], prefix: str = "") -> float | None:
    """The margin of log p (`MARGIN`), from metrics under their logged names."""
    chosen, rejected = (number(values.get(f"{prefix}logps/{side}")) for side in ("chosen", "rejected"))
    return None if chosen is None or rejected is None else number(chosen - rejected)


def _has(log: Log, metric: str, prefix: str = "") -> bool:
    return prefix + ("logps/chosen" if metric == MARGIN else metric) in log


def _value(log: Log, metric: str, prefix: str = "") -> float | None:
    return difference(log, prefix) if metric == MARGIN else number(log.get(prefix + metric))


def _steps(history: Sequence[Log]) -> Iterator[tuple[float, Log]]:
    for log in history:
        step = number(log.get("step"))
        if step is not None:
            yield step, log


def _series(points: Iterable[tuple[float, float | None]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array([(step, math.nan if value is None else value) for step, value in points], dtype=float)
    table = table.reshape(-1, 2)
    table = table[np.argsort(table[:, 0], kind="stable")]
    return table[:, 0], table[:, 1]
