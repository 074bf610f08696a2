"""Tables of the page: runs side by side, what their recipes differ in, evaluation by source and length."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np

from orpo_trl.metrics import MARGIN, METRICS, evaluation_label, number, split_group_metric
from orpo_trl.report.history import difference, mean
from orpo_trl.report.run import Run
from orpo_trl.report.text import NOTHING, duration, show

# Keys that only name a run, and so always differ.
_NAMING = {"output_dir", "run_name", "logging_dir"}
_KINDS = {"sources": "By source", "lengths": "By length of the longer response, in tokens"}
# Statistics of a group of held-out pairs, and the names of their columns.
_STATISTICS = {
    "accuracies": METRICS["rewards/accuracies"].title,
    "margins": METRICS["rewards/margins"].title,
    "pairs": "pairs",
}
# Not the rewards, which scale with λ and so do not compare across runs.
_HELD_OUT = (
    "loss", "nll_loss", "logps/chosen", "logps/rejected", MARGIN, "log_odds_chosen", "odds_ratio_delta",
    "rewards/accuracies", "mean_token_accuracy",
)  # fmt: skip
# Metrics of training whose median over the logs tells the cost of a run, and the significant digits of each.
_MEDIANS = {
    "throughput/unique_tokens_per_second": None,
    "throughput/pairs_per_second": None,
    "throughput/padding_avoided_percent": 3,
    "throughput/mfu_percent": 3,
}


@dataclass(frozen=True)
class Table:
    """Rows of a name and values: for each of `runs`, one value for each of `columns`, or one value without columns."""

    title: str
    runs: list[str]
    rows: list[tuple[str, list[str]]]
    columns: tuple[str, ...] = ()


def summary(runs: Sequence[Run]) -> list[Table]:
    """Settings, held-out metrics and cost, with a column for each run, without rows for which no run has a value."""
    settings: dict[str, Callable[[Run], str]] = {
        "λ (beta)": lambda run: show(run.beta),
        METRICS["learning_rate"].label: lambda run: show(_learning_rate(run)),
        "optimiser steps": _steps,
        "seed": lambda run: show(run.setting("seed")),
    }
    cost: dict[str, Callable[[Run], str]] = {
        "time": lambda run: duration(_seconds(run)),
        **{METRICS[name].heading: partial(_median, metric=name, digits=digits) for name, digits in _MEDIANS.items()},
        METRICS["memory/peak_gib"].heading: lambda run: show(
            max(_known(run.training("memory/peak_gib")), default=None)
        ),
    }
    names = [run.name for run in runs]
    tables = [
        Table("Settings", names, [(label, [of(run) for run in runs]) for label, of in settings.items()]),
        _held_out(runs),
        Table("Speed and memory", names, [(label, [of(run) for run in runs]) for label, of in cost.items()]),
    ]
    known = [replace(table, rows=[row for row in table.rows if set(row[1]) != {NOTHING}]) for table in tables]
    return [table for table in known if table.rows]


def _held_out(runs: Sequence[Run]) -> Table:
    """Metrics of the last evaluation, beside those of the model before training where a run has both."""
    names = [run.name for run in runs]
    pairs = [(run.metrics_before(), run.metrics_after()) for run in runs]
    if any(before and after for before, after in pairs):
        title, columns = "Held out, before training and after (last evaluation)", ("before", "after")
        measured = [[_of_sets(run, values) for values in pair] for run, pair in zip(runs, pairs, strict=True)]
    else:
        is_untrained = any(before for before, _ in pairs) and not any(after for _, after in pairs)
        title, columns = f"Held out, {'before training' if is_untrained else 'last evaluation'}", ()
        measured = [[_of_sets(run, run.final_metrics())] for run in runs]
    rows = [
        (METRICS[name].heading, [_measured(values[name]) for of_run in measured for values in of_run])
        for name in _HELD_OUT
    ]
    return Table(title, names, rows, columns)


def differences(runs: Sequence[Run]) -> Table:
    """Keys of the recipes whose values differ. A dash: the recipe leaves the key to its default."""
    with_recipe = [run for run in runs if run.recipe]
    keys = dict.fromkeys(key for run in with_recipe for key in run.recipe if key not in _NAMING)
    rows = [(key, [_value(run.recipe[key]) if key in run.recipe else NOTHING for run in with_recipe]) for key in keys]
    return Table("", [run.name for run in with_recipe], [row for row in rows if len(set(row[1])) > 1])


def groups(runs: Sequence[Run]) -> list[Table]:
    """The last evaluation by source and by length, of each evaluation set."""
    found: dict[tuple[str, str], dict[str, dict[tuple[int, str], float]]] = {}
    for index, run in enumerate(runs):
        for label, metric, value in _split(run):
            group = split_group_metric(metric)
            if group:
                kind, name, statistic = group
                found.setdefault((label, kind), {}).setdefault(name, {})[index, statistic] = value
    return [
        _group_table(f"{_KINDS[kind]}: {label}" if label else _KINDS[kind], kind, rows, runs)
        for (label, kind), rows in sorted(found.items(), key=lambda item: list(_KINDS).index(item[0][1]))
    ]


def _group_table(title: str, kind: str, rows: dict[str, dict[tuple[int, str], float]], runs: Sequence[Run]) -> Table:
    logged = {statistic for row in rows.values() for _, statistic in row}
    statistics = [name for name in _STATISTICS if name in logged]
    places = [(index, statistic) for index in range(len(runs)) for statistic in statistics]
    return Table(
        title,
        [run.name for run in runs],
        [
            (name, [_statistic(place[1], rows[name].get(place)) for place in places])
            for name in (sorted(rows, key=_by_length) if kind == "lengths" else rows)
        ],
        tuple(_STATISTICS[name] for name in statistics),
    )


def facts(run: Run) -> list[tuple[str, str]]:
    """How a run was made, as far as it is recorded."""
    record = run.record
    model, git, versions = (_mapping(record.get(key)) for key in ("model", "git", "versions"))
    parameters = number(model.get("parameters"))
    times = {key: _time(record.get(key)) for key in ("started", "finished")}
    found = {
        **{key: f"{time:%Y-%m-%d %H:%M:%S %Z}" for key, time in times.items() if time},
        "device": " × ".join(str(part) for part in (record.get("processes"), record.get("device")) if part),
        "model": run.model_name + (f", {show(parameters / 1e6)} million parameters" if parameters else ""),
        "distributed strategy": record.get("engine"),
        "layout": record.get("layout"),
        "resumed from step": record.get("resumed_from_step"),
        "seed": run.setting("seed"),
        "warm-up steps": run.setting("warmup_steps"),
    }
    remote = record.get("remote_code")
    if isinstance(remote, list) and remote:
        found["remote code"] = f"was run: {', '.join(map(str, remote))} (trust_remote_code: true)"
    if git.get("revision"):
        found["git"] = f"{git['revision']}{', with uncommitted changes' if git.get('changed') else ''}"
    for name, dataset in _mapping(record.get("datasets")).items():
        dataset = _mapping(dataset)
        digest = dataset.get("sha256")
        found[f"dataset {name}"] = f"{show(dataset.get('rows'))} rows" + (f", SHA-256 {digest}" if digest else "")
    packages = {"python": record.get("python"), **versions}
    found["versions"] = ", ".join(f"{package} {version}" for package, version in packages.items() if version)
    return [(name, show(value)) for name, value in found.items() if value not in (None, "")]


def _of_sets(run: Run, values: dict[str, float]) -> dict[str, float | None]:
    """Metrics of an evaluation, the mean over the evaluation sets, without `eval_`."""
    found = {name: mean([values.get(prefix + name) for prefix in run.prefixes]) for name in _HELD_OUT}
    return {**found, MARGIN: mean([difference(values, prefix) for prefix in run.prefixes])}


def _split(run: Run) -> Iterator[tuple[str, str, float]]:
    """Label of the evaluation set, metric and value, of the last evaluation."""
    longest_first = sorted(run.prefixes, key=len, reverse=True)
    for name, value in run.final_metrics().items():
        prefix = next((prefix for prefix in longest_first if name.startswith(prefix)), None)
        if prefix is not None:
            yield evaluation_label(prefix), name.removeprefix(prefix), value


def _learning_rate(run: Run) -> Any:
    """The setting, or else the highest value in the logs."""
    stated = run.setting("learning_rate")
    return max(_known(run.training("learning_rate")), default=None) if stated is None else stated


def _steps(run: Run) -> str:
    planned = number(run.record.get("max_steps"))
    is_short = planned is not None and 0 < run.last_step < planned
    return f"{run.last_step:,} of {planned:,.0f}" if is_short else f"{run.last_step:,}"


def _seconds(run: Run) -> float | None:
    logged = [number(log["train_runtime"]) for log in run.history if "train_runtime" in log]
    if logged:
        return logged[-1]
    started, finished = (_time(run.record.get(key)) for key in ("started", "finished"))
    return (finished - started).total_seconds() if started and finished else None


def _median(run: Run, metric: str, digits: int | None) -> str:
    known = _known(run.training(metric))
    value = float(np.median(known)) if known else None
    return _measured(value) if digits is None else show(value, digits)


def _known(series: tuple[np.ndarray, np.ndarray]) -> list[float]:
    return series[1][np.isfinite(series[1])].tolist()


def _by_length(name: str) -> tuple[int, str]:
    first = re.search(r"[0-9]{1,12}", name)
    return (int(first[0]) if first else 0, name)


def _statistic(name: str, value: float | None) -> str:
    return show(int(value)) if name == "pairs" and value is not None else _measured(value)


def _measured(value: float | None) -> str:
    return show(value, is_measured=True)


def _value(value: Any) -> str:
    """A recipe's value in one line: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _time(value: Any) -> datetime | None:
    """A time of `run.json`; one without a time zone is UTC."""
    try:
        time = datetime.fromisoformat(str(value).replace("Z", "+00:00"))
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
