"""The figures of a report: what each shows, and how to read it."""

from dataclasses import dataclass
from typing import Literal

from orpo_trl.metrics import MARGIN, METRICS


@dataclass(frozen=True)
class Curve:
    """One metric over optimiser steps, and matplotlib's style of its line."""

    metric: str
    line: Literal["-", "--"] = "-"


@dataclass(frozen=True)
class FigureSpec:
    """What a figure shows.

    Attributes:
        curves: for each run; the values of all have one unit.
        caption: how to read the figure.
        name: title of the figure; by default the label of its only metric.
        chance: value of a model that has learnt nothing.
        is_logarithmic: whether values of very different size have a logarithmic axis.
        is_smoothed: whether long series are drawn as a running mean.
    """

    curves: tuple[Curve, ...]
    caption: str
    name: str = ""
    chance: float | None = None
    is_logarithmic: bool = False
    is_smoothed: bool = True

    @property
    def title(self) -> str:
        label = self.name or METRICS[self.curves[0].metric].label
        return label[0].upper() + label[1:]

    @property
    def unit(self) -> str:
        """Text of the vertical axis."""
        metric = METRICS[self.curves[0].metric]
        return metric.unit or metric.label

    def legend(self, curve: Curve) -> str:
        """Text that tells a curve from the others; empty where there is one curve only."""
        return METRICS[curve.metric].title if len(self.curves) > 1 else ""


FIGURES = {
    "logps": FigureSpec(
        (Curve("logps/chosen"), Curve("logps/rejected", "--")),
        "Both rise together where only the NLL teaches (SFT, λ of 0); at 0.1 chosen rises and rejected stays behind, "
        "at 0.5 rejected falls, at 1.0 both fall and part fastest.",
        name="log-probability of the responses",
    ),
    "log_odds": FigureSpec(
        (Curve("log_odds_chosen"),),
        "Log odds of chosen minus those of rejected, mean over pairs: it should rise from the first steps.",
        chance=0,
    ),
    "odds_ratio_delta": FigureSpec(
        (Curve("odds_ratio_delta"),),
        "The paper's 1 / (1 + odds ratio): 0.5 where the model does not tell the two responses apart, and near 0 where "
        "it does and the term has nothing more to teach.",
        chance=0.5,
    ),
    "accuracy": FigureSpec(
        (Curve("rewards/accuracies"),),
        "Share of pairs whose chosen response has the higher mean log-probability; dotted: by chance.",
        chance=0.5,
    ),
    "margin": FigureSpec(
        (Curve(MARGIN),),
        "Compares across λ, as TRL's rewards/margins (λ times this) does not. It should widen and then level off. In a "
        "run that over-fits it goes on widening in training only.",
        chance=0,
    ),
    "loss": FigureSpec(
        (Curve("loss"), Curve("nll_loss", "--")),
        "Loss is NLL plus λ times the odds-ratio term, so only the NLL compares across λ. Held-out values that turn up "
        "while training values fall are over-fitting.",
        name="loss and NLL",
    ),
    "grad_norm": FigureSpec(
        (Curve("grad_norm"),),
        "Single spikes are clipped and do no harm; a level that keeps rising calls for a lower learning rate.",
        is_logarithmic=True,
    ),
    "learning_rate": FigureSpec(
        (Curve("learning_rate"),),
        "What the schedule set: the warm-up, then the decay.",
        is_smoothed=False,
    ),
    "throughput": FigureSpec(
        (Curve("throughput/unique_tokens_per_second"),),
        "Tokens trained on per second on all processes together, each prompt counted once. Evaluation and saving take "
        "no time of it, so dips are slow data or a busy machine.",
    ),
}
