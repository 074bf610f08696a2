"""What the scores of pairs say in a few numbers, for people: of one model, and of a model beside its base."""

from statistics import fmean
from typing import Any

import numpy as np

from orpo_trl.metrics import METRICS
from orpo_trl.scoring.intervals import bootstrap

Record = dict[str, Any]
# The columns whose means are shown, and the metrics that these means are.
SUMMARY = {
    "is_correct": METRICS["rewards/accuracies"],
    "chosen_logp": METRICS["logps/chosen"],
    "rejected_logp": METRICS["logps/rejected"],
    "log_or": METRICS["log_odds_chosen"],
}
COMPARED = ("chosen_logp", "rejected_logp", "log_or", "is_correct")
RESAMPLES, SEED = 10_000, 0


def summary(records: list[Record]) -> str:
    """Counts, and means over the pairs (over all rows where there are no pairs), as text for people."""
    pairs = _pairs(records)
    lines = [f"rows: {len(records):,}, of which pairs: {len(pairs):,}"]
    for name, metric in SUMMARY.items():
        values = [record[name] for record in pairs or records if record[name] is not None]
        if values:
            lines.append(f"{metric.heading}: {fmean(values):.4f}")
    lost = sum(
        record["chosen_logp"] is None or (record["rejected_logp"] is None and record["rejected_tokens"] is not None)
        for record in records
    )
    if lost:
        lines.append(f"not finite, and left out of the means: {lost:,} rows")
    return "\n".join(lines)


def comparison(records: list[Record], base: str) -> str:
    """Means of the base and of the model, and their difference with its interval of 95 %, as a table for people.

    The means are over the pairs whose values are finite under both models. Where there are no pairs, they are those of
    chosen responses over all rows.

    Args:
        records: with the keys of `RECORD_AGAINST`.
        base: what to call the base.
    """
    pairs = _pairs(records)
    names, rows = (COMPARED, pairs) if pairs else (COMPARED[:1], records)
    finite = [row for row in rows if all(row[prefix + name] is not None for name in names for prefix in ("", "base_"))]
    what = "pairs" if pairs else "rows"
    title = f"against {base}, over {len(finite):,} {what}; 95 % interval: paired bootstrap, {RESAMPLES:,} resamples"
    lines = [title]
    if finite:
        lines += _table(names, finite)
    if len(finite) < len(rows):
        lines.append(f"not finite under one of the models, and left out: {len(rows) - len(finite):,} {what}")
    return "\n".join(lines)


def _table(names: tuple[str, ...], rows: list[Record]) -> list[str]:
    model, base = (
        np.array([[row[prefix + name] for name in names] for row in rows], dtype=np.float64) for prefix in ("", "base_")
    )
    differences = bootstrap(model - base, names, SEED, RESAMPLES)
    width = max(len(SUMMARY[name].heading) for name in names)
    lines = [f"{'':<{width}}{'base':>10}{'model':>10}{'difference':>12}  95 % interval"]
    for index, name in enumerate(names):
        found = differences[name]
        interval = "–" if found.low is None else f"{found.low:+.4f} to {found.high:+.4f}"
        means = f"{base[:, index].mean():>10.4f}{model[:, index].mean():>10.4f}{found.value:>+12.4f}"
        lines.append(f"{SUMMARY[name].heading:<{width}}{means}  {interval}")
    return lines


def _pairs(records: list[Record]) -> list[Record]:
    return [record for record in records if record["rejected_tokens"] is not None]
