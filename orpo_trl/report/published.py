"""Published values, drawn behind the curves of runs that start from the same model."""

from collections.abc import Sequence
from dataclasses import dataclass

from orpo_trl.report.run import Run

MODEL = "Mistral-7B-v0.1"
SOURCE = (
    f"Grey: held-out values of two published runs of {MODEL} in TRL: UltraFeedback, λ 0.05, learning rate 7e-6, batch "
    "64, steps 100 to the end of 1 epoch; and mixed data, λ 0.1, learning rate 5e-6, batch 32, after epochs 1, 2 and 3."
)


@dataclass(frozen=True)
class Anchor:
    """Lowest and highest value of the published runs, and the text beside one of them."""

    low: float
    high: float
    label: str
    is_named_at_top: bool = True


# By figure. UltraFeedback: chosen −.773 → −.728, rejected −.945 → −.998, log odds .446, accuracy .659 at the end. Mixed
# data: chosen −.831, −.894, −1.113, rejected −1.055, −1.184, −1.461, accuracy .630, .662, .656.
ANCHORS = {
    "logps": (
        Anchor(-1.113, -0.728, "published: chosen"),
        Anchor(-1.461, -0.945, "published: rejected", is_named_at_top=False),
    ),
    "log_odds": (Anchor(0.446, 0.446, "published"),),
    "accuracy": (Anchor(0.630, 0.662, "published"),),
}


def anchors(figure: str, runs: Sequence[Run]) -> tuple[Anchor, ...]:
    """What to draw in a figure; empty where no run starts from that model."""
    fits = any(run.model_name.rstrip("/").endswith(MODEL) for run in runs)
    return ANCHORS.get(figure, ()) if fits else ()
