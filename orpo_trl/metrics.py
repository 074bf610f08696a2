"""`METRICS`: what each metric is called, what it means and how it is shown, in one place. Loads no other library."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: its key in a log of training; in evaluation, `eval_` or `eval_LABEL_` stands before it.
        label: its name in tables.
        meaning: one sentence.
        unit: unit of its values; empty where they have none.
        title: its short name, for a column of the terminal and for the legend of a figure. Tables of held-out metrics
            show the metrics that have one.
        format: format specification of its values in the terminal's column.
        higher_is_better: None where neither direction is better by itself.
        is_logged: False for a metric that is computed from others, or that only other trainers log.
    """

    name: str
    label: str
    meaning: str
    unit: str = ""
    title: str = ""
    format: str = ".4f"
    higher_is_better: bool | None = None
    is_logged: bool = True

    @property
    def heading(self) -> str:
        """The label with the unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


# The margin of log p. TRL's `rewards/margins` is beta times it, so only this one compares across runs.
MARGIN = "logps/margins"

_NATS, _PER_TOKEN = "nats", "nats per token"
METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "loss", "loss", "NLL plus beta times the odds-ratio term; in evaluation over the held-out pairs.",
            _PER_TOKEN, title="loss", higher_is_better=False,
        ),
        Metric(
            "nll_loss", "NLL", "Negative log-likelihood of the chosen responses, and of their prompts with `nll_scope: "
            "sequence`.", _PER_TOKEN, title="NLL", higher_is_better=False,
        ),
        Metric(
            "log_odds_chosen", "log odds ratio", "Log odds of the chosen response minus those of the rejected one, "
            "mean over pairs.", _NATS, title="log odds", format="+.3f", higher_is_better=True,
        ),
        Metric(
            "rewards/accuracies", "accuracy: chosen more likely than rejected", "Share of pairs whose chosen response "
            "has the higher mean log-probability.", "share of pairs", title="accuracy", format=".3f",
            higher_is_better=True,
        ),
        Metric(
            "rewards/margins", "reward margin", "Difference of the two rewards; it scales with beta.", _PER_TOKEN,
            title="margin", format="+.4f", higher_is_better=True,
        ),
        Metric(
            "logps/chosen", "log-probability of chosen", "Mean log-probability of the tokens of a chosen response, "
            "mean over pairs.", _PER_TOKEN, title="chosen", format=".3f",
        ),
        Metric(
            "logps/rejected", "log-probability of rejected", "Mean log-probability of the tokens of a rejected "
            "response, mean over pairs.", _PER_TOKEN, title="rejected", format=".3f",
        ),
        Metric(
            MARGIN, "margin of log-probabilities", "Log-probability of chosen minus log-probability of rejected.",
            _PER_TOKEN, higher_is_better=True, is_logged=False,
        ),
        Metric(
            "log_odds_ratio", "log σ of the log odds ratio", "Minus the odds-ratio term, under TRL's name for it.",
            _NATS, higher_is_better=True,
        ),
        Metric(
            "odds_ratio_delta", "weight δ(d) of the odds-ratio gradient", "The paper's δ(d) = σ(−log odds ratio): 0.5 "
            "where the model has no preference, near 0 where the odds-ratio term has nothing more to teach.",
        ),
        Metric(
            "rewards/chosen", "reward of chosen", "Beta times the log-probability of chosen.", _PER_TOKEN,
        ),
        Metric(
            "rewards/rejected", "reward of rejected", "Beta times the log-probability of rejected.", _PER_TOKEN,
        ),
        Metric(
            "aux_loss", "load-balancing loss of the router", "Of mixture-of-experts models only.",
            higher_is_better=False,
        ),
        Metric(
            "mean_token_accuracy", "token accuracy", "Share of tokens that the model ranks first; TRL's SFTTrainer "
            "logs it.", "share of tokens", higher_is_better=True, is_logged=False,
        ),
        Metric(
            "learning_rate", "learning rate", "What the schedule set for the last optimiser step of the window.",
            title="lr", format=".2e",
        ),
        Metric(
            "grad_norm", "gradient norm", "Norm of the whole gradient in the last optimiser step of the window.",
            "L2, before clipping", title="grad", format=".2f",
        ),
        Metric(
            "num_tokens", "tokens so far", "Tokens trained on since the start, each response with its prompt.",
            "tokens",
        ),
        Metric(
            "throughput/unique_tokens_per_second", "training speed", "Of all processes together, each prompt counted "
            "once; time for evaluation and saving does not count.", "unique tokens/s", title="tok/s", format=",.0f",
            higher_is_better=True,
        ),
        Metric(
            "throughput/pairs_per_second", "training speed in pairs", "Pairs per second, of all processes "
            "together.", "pairs/s",
            higher_is_better=True,
        ),
        Metric(
            "throughput/padding_avoided_percent", "padding avoided", "Share of the positions of padded rows that were "
            "not computed.", "%", higher_is_better=True,
        ),
        Metric(
            "throughput/mfu_percent", "model FLOP/s utilisation (MFU)", "The model's FLOP/s over the GPU's peak, where "
            "the peak is known; recomputation and padding do not count.", "%", higher_is_better=True,
        ),
        Metric(
            "memory/peak_gib", "peak memory", "Of the largest process since its start: allocated on its GPU, or "
            "resident on a CPU.", "GiB", higher_is_better=False,
        ),
    )
}  # fmt: skip


def number(value: Any) -> float | None:
    """A finite number as a float; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


# ---- Evaluation ------------------------------------------------------------------------------------------------------

EVALUATION = "eval_"
# A prefix is what stands before one of these two. No other metric ends in their names, whatever the label of its
# evaluation set, while `eval_nll_loss` may be the NLL of `eval`, or the loss of an evaluation set named `nll`.
_MARKS = ("logps/chosen", "runtime")
# The logs of a run's end, such as `train_runtime` and `train_loss`, are no evaluation.
_END_OF_TRAINING = "train_"


def prefixes(names: Iterable[str]) -> list[str]:
    """What stands before the names of metrics: one prefix for training, and one for each evaluation set.

    Args:
        names: names of logged metrics, of one log or of many.

    Returns:
        '' where there are metrics of training, `eval_` or `eval_LABEL_` for each evaluation set (or what
        `metric_key_prefix` was given to `evaluate`); in the order of the names.
    """
    names = dict.fromkeys(names)
    found: dict[str, bool] = {}
    for name in names:
        if name in ("loss", f"{EVALUATION}loss"):
            found[name.removesuffix("loss")] = True
        for mark in _MARKS:
            prefix = name.removesuffix(mark)
            # Anybody may log a name that ends in `_runtime`; an evaluation logs its loss beside it.
            is_sure = mark != "runtime" or prefix.startswith(EVALUATION) or f"{prefix}loss" in names
            if name.endswith(mark) and is_sure and (not prefix or prefix.endswith("_")):
                found[prefix] = True
    found.pop(_END_OF_TRAINING, None)
    return list(found)


def evaluation_prefixes(names: Iterable[str]) -> list[str]:
    """The prefixes of evaluation sets among `prefixes`."""
    return [prefix for prefix in prefixes(names) if prefix.startswith(EVALUATION)]


def evaluation_label(prefix: str) -> str:
    """The label of an evaluation set by its prefix: '' for `eval_`, 'LABEL' for `eval_LABEL_`."""
    return prefix.partition("_")[2].removesuffix("_")


def held_out_table(metrics: Mapping[str, float | None], prefix: str) -> list[tuple[str, str]]:
    """Headings and values of an evaluation, for people: of the metrics with a title, those that have a value.

    Args:
        metrics: values under their logged names.
        prefix: prefix of the evaluation set.
    """
    values = {metric.heading: number(metrics.get(prefix + metric.name)) for metric in METRICS.values() if metric.title}
    return [(heading, f"{value:.4f}") for heading, value in values.items() if value is not None]


# ---- Groups of held-out pairs ----------------------------------------------------------------------------------------

_GROUP = re.compile(r"(sources|lengths)/(.*)/(accuracies|margins|pairs)", re.DOTALL)


def group_metric(kind: str, name: str, statistic: str) -> str:
    """Name of a metric of the held-out pairs of one source, or of one range of lengths.

    Args:
        kind: 'sources' or 'lengths'.
        name: the source, or the range of tokens of the longer response.
        statistic: 'accuracies', 'margins' or 'pairs'.
    """
    return f"{kind}/{name}/{statistic}"


def split_group_metric(metric: str) -> tuple[str, str, str] | None:
    """What `group_metric` was given; None for a metric of all pairs."""
    match = _GROUP.fullmatch(metric)
    return (match[1], match[2], match[3]) if match else None
