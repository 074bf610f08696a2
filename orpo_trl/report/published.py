"""Published values, drawn behind the curves of runs that start from the same model."""

from collections.abc import Sequence
from dataclasses import dataclass

from orpo_trl.published import published_figures
from orpo_trl.report.run import Run

MODEL = "Mistral-7B-v0.1"
# What is drawn behind a figure: the published figure on held-out pairs, what its label adds, and whether that stands at
# the top.
_BEHIND = {
    "logps": (("chosen", ": chosen", True), ("rejected", ": rejected", False)),
    "log_odds": (("log_odds", "", True),),
    "accuracy": (("accuracy", "", True),),
}


@dataclass(frozen=True)
class Anchor:
    """Lowest and highest value of the published runs, and the text beside one of them."""

    low: float
    high: float
    label: str
    is_named_at_top: bool = True


def anchors(figure: str, runs: Sequence[Run]) -> list[Anchor]:
    """What to draw in a figure; empty where no run starts from that model."""
    if not any(run.model_name.rstrip("/").endswith(MODEL) for run in runs):
        return []
    found = []
    for name, label, is_named_at_top in _BEHIND.get(figure, ()):
        values = [one.value for one in published_figures("preferences") if one.figure == name and one.base == MODEL]
        found.append(Anchor(min(values), max(values), f"published{label}", is_named_at_top))
    return found


def source() -> str:
    """What the published values are."""
    places: dict[str, list[str]] = {}
    for one in published_figures("preferences"):
        if one.base == MODEL and one.at not in places.setdefault(one.setting, []):
            places[one.setting].append(one.at)
    runs = [f"{setting} ({', '.join(at)})" for setting, at in places.items()]
    return f"Grey: held-out values of published runs of {MODEL} in TRL: {'; and '.join(runs)}."
