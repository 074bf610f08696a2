"""What the curves of a run say is going wrong, in words."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from orpo_trl.metrics import METRICS, evaluation_label, evaluation_prefixes, number, split_group_metric

# The kind of finding that the trainer itself also warns of.
NON_FINITE = "non_finite"
# Rejected above chosen is normal for a while. A long time is this share of the run, and at least so many logs.
LONG_SHARE, LONG_LOGS = 0.1, 5
# The authors' picture of over-fitting (xfactlab/orpo#5): chosen near 0, rejected from -5 to -10.
OVERFIT_CHOSEN, OVERFIT_REJECTED = -0.1, -5.0
# Log odds rise from the first steps. They should have risen after this share of the run, counted from the warm-up.
FLAT_SHARE, FLAT_LOGS, FLAT_RISE = 0.2, 10, 0.05
# So many evaluations in a row are above the lowest loss, by this share of it.
RISING_EVALUATIONS, RISING_BY = 2, 0.01
# Standard errors on each side of a 95 % interval.
WILSON_Z = statistics.NormalDist().inv_cdf(0.975)


def diagnose(
    history: Sequence[dict[str, Any]],
    beta: float,
    warmup_steps: int = 0,
    max_steps: int = 0,
    held_out_pairs: Mapping[str, int] | None = None,
) -> dict[str, str]:
    """What the metrics say is going wrong, each kind of finding once.

    Args:
        history: logs in order, with `step` and metrics under their logged names (`logps/chosen`, `eval_loss`, …); a
            value that was not finite may be None.
        beta: weight of the odds-ratio term. At 0, rejected responses are not trained on and may do anything.
        warmup_steps: optimiser steps of the warm-up.
        max_steps: optimiser steps of the run.
        held_out_pairs: pairs of each evaluation set by its label, `eval` where it has none. The logs say it only where
            they have accuracies by length or by source.

    Returns:
        A sentence or two for people, by kind of finding: `non_finite`, `inverted`, `below_chance`, `overfit`, `flat`,
        and `rising PREFIX` for each evaluation set; empty where nothing is wrong.
    """
    found = {NON_FINITE: _non_finite(history)}
    prefixes = evaluation_prefixes(name for log in history for name in log)
    train = [log for log in history if _has(log, "logps/chosen", "logps/rejected", "log_odds_chosen")]
    if beta and train:
        found["inverted"] = _inverted(train, warmup_steps, max_steps)
    first_step = max(1, warmup_steps, LONG_SHARE * max_steps)
    below = _below_chance(history, prefixes, held_out_pairs or {}, first_step)
    if below:
        # The other finding asks for the same.
        advice = "" if found.get("inverted") else _advice_below_chance(history, beta)
        found["below_chance"] = f"{below}{advice}"
    if beta and train:
        found["overfit"] = _overfit(train, history, prefixes)
        found["flat"] = _flat(train, warmup_steps, max_steps)
    found |= {f"rising {prefix}": _rising(history, prefix) for prefix in prefixes}
    return {kind: text for kind, text in found.items() if text}


def _non_finite(history: Iterable[dict[str, Any]]) -> str:
    steps = [log["step"] for log in history if "loss" in log and number(log["loss"]) is None]
    if not steps:
        return ""
    return (
        f"The loss was not finite at step {steps[0]:,}{f' and in {len(steps) - 1:,} later logs' if steps[1:] else ''}. "
        "Lower the learning rate, or look at the rows of those steps."
    )


def _inverted(train: list[dict[str, Any]], warmup_steps: int, max_steps: int) -> str:
    after = [log for log in train if log["step"] >= warmup_steps]
    for is_inverted, part in groupby(after, key=lambda log: log["logps/rejected"] > log["logps/chosen"]):
        logs = list(part)
        first, last = logs[0]["step"], logs[-1]["step"]
        if is_inverted and len(logs) >= LONG_LOGS and last - first >= LONG_SHARE * max_steps:
            return (
                f"From step {first:,} to {last:,} rejected responses were more likely than chosen ones. Are the "
                "columns `chosen` and `rejected` the right way round? If so, a higher `beta` pulls harder."
            )
    return ""


def _below_chance(
    history: Sequence[dict[str, Any]], prefixes: list[str], held_out_pairs: Mapping[str, int], first_step: float
) -> str:
    """The evaluation sets whose last accuracy is below 0.5 with 95 % confidence; not before `first_step`."""
    sets = [_set_below_chance(history, prefix, held_out_pairs, first_step) for prefix in prefixes]
    sets = [words for words in sets if words]
    if not sets:
        return ""
    return (
        f"Held-out accuracy is below 0.5, by more than chance explains: {'; '.join(sets)}. The model still finds "
        "rejected responses more likely than chosen ones."
    )


def _set_below_chance(
    history: Sequence[dict[str, Any]], prefix: str, held_out_pairs: Mapping[str, int], first_step: float
) -> str:
    name, label = f"{prefix}rewards/accuracies", evaluation_label(prefix)
    logs = [log for log in history if name in log]
    if not logs or logs[-1]["step"] < first_step:
        return ""
    accuracy = number(logs[-1][name])
    pairs = _logged_pairs(logs[-1], prefix) or held_out_pairs.get(label or "eval", 0)
    # Wilson's interval is below 0.5 where this is so.
    if accuracy is None or pairs <= 0 or (0.5 - accuracy) * 2 * math.sqrt(pairs) <= WILSON_Z:
        return ""
    before = number(logs[0][name]) if logs[0]["step"] == 0 else None
    said = [f"`{label}`"] * bool(label) + [f"{pairs:,.0f} pairs"]
    said += [] if before is None else [f"{before:.3f} before training"]
    return f"{accuracy:.3f} at step {logs[-1]['step']:,} ({', '.join(said)})"


def _advice_below_chance(history: Sequence[dict[str, Any]], beta: float) -> str:
    if not beta:
        return (
            " With `beta: 0` (SFT alone) nothing is learnt from rejected responses: a `beta` above 0 teaches the "
            "preference. If the base model should prefer chosen ones by itself, are the columns `chosen` and "
            "`rejected` the right way round?"
        )
    columns = "Are the columns `chosen` and `rejected` the right way round? Look at one pair with `orpo-trl check`."
    values = [number(log.get("rewards/accuracies")) for log in history]
    trained = [value for value in values if value is not None and 0 <= value <= 1][-FLAT_LOGS:]
    if trained and statistics.fmean(trained) > 0.5:
        return (
            f" In training the accuracy is {statistics.fmean(trained):.3f}, so look at the held-out pairs first. "
            f"{columns} If they are, the pairs differ in kind from those of training."
        )
    return f" {columns} If they are, a higher `beta` pulls harder."


def _logged_pairs(log: dict[str, Any], prefix: str) -> float:
    """Pairs of an evaluation by its groups; 0 where all pairs are in one group, which is not logged."""
    totals = {"sources": 0.0, "lengths": 0.0}
    for name, value in log.items():
        group = split_group_metric(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if group and group[2] == "pairs":
            totals[group[0]] += number(value) or 0
    return max(totals.values())


def _overfit(train: list[dict[str, Any]], history: Iterable[dict[str, Any]], prefixes: list[str]) -> str:
    last = train[-2:]
    if len(last) < 2 or not all(
        log["logps/chosen"] > OVERFIT_CHOSEN and log["logps/rejected"] < OVERFIT_REJECTED for log in last
    ):
        return ""
    names = {f"{prefix}logps/chosen" for prefix in prefixes}
    held_out = [number(value) for log in history for name, value in log.items() if name in names]
    if held_out and held_out[-1] is not None and held_out[-1] > OVERFIT_CHOSEN:
        return ""  # as likely on pairs that were not trained on: learnt, not memorised
    return (
        f"At step {last[-1]['step']:,} chosen responses have a log-probability of {last[-1]['logps/chosen']:.3f} per "
        f"token, and rejected ones {last[-1]['logps/rejected']:.1f}: the model knows its training pairs by heart. "
        "Train for fewer epochs, or lower `beta` or the learning rate."
    )


def _flat(train: list[dict[str, Any]], warmup_steps: int, max_steps: int) -> str:
    recent = [log for log in train if log["step"] > warmup_steps][-FLAT_LOGS:]
    if len(recent) < FLAT_LOGS or recent[-1]["step"] < warmup_steps + FLAT_SHARE * max_steps:
        return ""
    start = [log["log_odds_chosen"] for log in train[:3]]
    now = [log["log_odds_chosen"] for log in recent]
    # Both means are over few pairs each, so less than twice the standard error is no rise.
    noise = 2 * statistics.stdev(now) * math.sqrt(1 / len(now) + 1 / len(start))
    rise = statistics.fmean(now) - statistics.fmean(start)
    if rise >= max(FLAT_RISE, min(noise, 4 * FLAT_RISE)):
        return ""
    return (
        f"The {METRICS['log_odds_chosen'].label} is {statistics.fmean(now):.3f} at step {recent[-1]['step']:,}, and "
        f"was {statistics.fmean(start):.3f} at the start: the model does not learn to tell chosen from rejected. Try a "
        "higher `beta` or learning rate, and look at one pair with `orpo-trl check`."
    )


def _rising(history: Iterable[dict[str, Any]], prefix: str) -> str:
    name = f"{prefix}loss"
    losses = {log["step"]: log[name] for log in history if _has(log, name)}
    if len(losses) <= RISING_EVALUATIONS:
        return ""
    *before, _ = steps = list(losses)
    best = min(before, key=lambda step: losses[step])
    after = steps[steps.index(best) + 1 :]
    if len(after) < RISING_EVALUATIONS or any(
        losses[step] <= losses[best] + RISING_BY * abs(losses[best]) for step in after[-RISING_EVALUATIONS:]
    ):
        return ""
    return (
        f"`{name}` has risen since step {best:,}, from {losses[best]:.4f} to {losses[after[-1]]:.4f}. That is "
        f"over-fitting, unless the margin is what you want: the checkpoint of step {best:,} may be the better one."
    )


def _has(log: dict[str, Any], *names: str) -> bool:
    return all(number(log.get(name)) is not None for name in names)
