"""The figures of a report: what each shows, and how it is read."""

from dataclasses import dataclass

from orpo_trl.report.history import MARGIN


@dataclass(frozen=True)
class Curve:
    metric: str
    label: str = ""
    line: str = "-"


@dataclass(frozen=True)
class Sketch:
    """What a figure shows: title, unit of its values, curves of each run, and how to read it."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    caption: str
    chance: float | None = None
    is_logarithmic: bool = False
    is_smoothed: bool = True


_PAIR = (Curve("logps/chosen", "chosen"), Curve("logps/rejected", "rejected", "--"))
FIGURES = {
    "logps": Sketch(
        "Log-probability of the responses", "mean log p of a token (nats)", _PAIR,
        "Both rise together where only the NLL teaches (SFT, λ of 0); at 0.1 chosen rises and rejected stays behind, "
        "at 0.5 rejected falls, at 1.0 both fall and part fastest.",
    ),
    "log_odds": Sketch(
        "Log odds ratio", "log odds ratio (nats)", (Curve("log_odds_chosen"),),
        "Log odds of chosen less those of rejected, mean over pairs: it should rise from the first steps.",
        chance=0,
    ),
    "odds_ratio_delta": Sketch(
        "δ(d): weight of the odds-ratio gradient", "δ(d), mean over pairs", (Curve("odds_ratio_delta"),),
        "The paper's 1 / (1 + odds ratio): 0.5 where the model does not tell the two responses apart, and near 0 where "
        "it does and the term has nothing more to teach.",
        chance=0.5,
    ),
    "accuracy": Sketch(
        "Accuracy", "share of pairs", (Curve("rewards/accuracies"),),
        "Share of pairs whose chosen response has the higher mean log-probability; dotted: by chance.",
        chance=0.5,
    ),
    "margin": Sketch(
        "Log-probability margin", "chosen − rejected (nats a token)", (Curve(MARGIN),),
        "Compares across λ, as TRL's rewards/margins (λ times this) does not; it should widen and then level off, and "
        "goes on widening in training alone where the run over-fits.",
        chance=0,
    ),
    "loss": Sketch(
        "Loss", "loss, NLL (nats a token)", (Curve("loss", "loss"), Curve("nll_loss", "NLL", "--")),
        "Loss is NLL plus λ times the odds-ratio term, so only the NLL compares across λ; held-out values that turn up "
        "while training falls tell of over-fitting.",
    ),
    "grad_norm": Sketch(
        "Gradient norm", "L2 norm before clipping", (Curve("grad_norm"),),
        "Single spikes are clipped and do no harm; a level that keeps rising calls for a lower learning rate.",
        is_logarithmic=True,
    ),
    "learning_rate": Sketch(
        "Learning rate", "learning rate", (Curve("learning_rate"),),
        "What the schedule set: the warm-up, then the decay.",
        is_smoothed=False,
    ),
    "throughput": Sketch(
        "Throughput", "tokens a second", (Curve("throughput/unique_tokens_per_second"),),
        "Tokens trained on a second on all processes together, each prompt counted once; evaluation and saving take no "
        "time of it, so dips are slow data or a busy machine.",
    ),
}  # fmt: skip
