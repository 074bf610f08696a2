"""Figures that others published (`published.yaml`), and whether one of ours may stand beside them."""

from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from orpo_trl.evaluations import OWN_TEMPLATE, UNKNOWN_TEMPLATE, Evaluation

_FILE = Path(__file__).with_suffix(".yaml")


class Published(BaseModel):
    """One published figure, and how it was measured.

    Attributes:
        model: name of the model, as the report shows it.
        base: name of the model that its training started from.
        method: how it was aligned: ORPO, DPO, RLHF.
        setting: data and settings of its training, where these tell it from another; else ''.
        benchmark: as in `Evaluation`.
        figure: its name among the benchmark's figures.
        value: in the benchmark's unit, as in `Evaluation`.
        source: where it was published.
        at: which of several values it is, such as `epoch 1`; else ''.
        judge: name of the judge; None for a benchmark without one.
        template: `own`, the model's own chat template, or `none`; `unknown` where nobody recorded it.
        shots: examples in the prompt; None for a benchmark that has none.
        answered: items that were answered and judged; `unknown` where nobody recorded it.
        settings: further settings that an evaluation must share, by their key in `Evaluation.settings`.
        assumed: a sentence on what of this nobody recorded; '' where all is stated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    base: str
    method: str
    setting: str = ""
    benchmark: str
    figure: str
    value: float
    source: str
    at: str = ""
    judge: str | None = None
    template: Literal["own", "none", "unknown"]
    shots: int | None = None
    answered: int | Literal["unknown"]
    settings: dict[str, Any] = {}
    assumed: str = ""


def published_figures(benchmark: str | None = None, model: str | None = None) -> list[Published]:
    """The published figures of a benchmark, of a model, or all, in the order of the models in the file."""
    return [
        figure
        for figure in _all_figures()
        if benchmark in (None, figure.benchmark) and model in (None, figure.model)
    ]  # fmt: skip


def differences(evaluation: Evaluation, published: Published) -> list[str]:
    """What keeps a figure of an evaluation from standing beside a published one, in words; empty where nothing does.

    What nobody recorded of the published figure counts as a difference. What is merely assumed does not: the sentence
    `published.assumed` then belongs beside the two.
    """
    if evaluation.benchmark != published.benchmark:
        return [f"{evaluation.benchmark} is another benchmark than {published.benchmark}"]
    found = []
    if evaluation.judge != published.judge:
        found.append(f"judged by {evaluation.judge or 'nobody'}, not by {published.judge or 'nobody'}")
    found += _template_differences(evaluation, published)
    if (evaluation.shots or 0) != (published.shots or 0):
        found.append(f"{evaluation.shots or 0} examples in the prompt, not {published.shots or 0}")
    if published.answered == "unknown":
        found.append("how many items the published figure has is not recorded")
    elif evaluation.answered != published.answered:
        found.append(f"{evaluation.answered:,} items answered, not {published.answered:,}")
    for key, value in published.settings.items():
        ours = evaluation.settings.get(key)
        if ours != value:
            found.append(f"{key.replace('_', ' ')}: {'not recorded' if ours is None else ours}, not {value}")
    return found


def _template_differences(evaluation: Evaluation, published: Published) -> list[str]:
    ours = evaluation.template
    if published.template == "unknown":
        return ["the template of the published figure is not recorded"]
    if ours == UNKNOWN_TEMPLATE:
        return ["the template of the answers is not recorded"]
    if published.template == "none":
        return [] if ours is None else ["with a chat template, not without one"]
    if ours == OWN_TEMPLATE:
        return []
    if ours is not None:
        return [f"template: {ours}, not the {OWN_TEMPLATE}"]
    return ["without a chat template, not with one"]


@cache
def _all_figures() -> tuple[Published, ...]:
    content = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    fields = Published.model_fields.keys()
    found = []
    for entry in content["figures"]:
        common = {**content["models"][entry["model"]], **content["benchmarks"][entry["benchmark"]]}
        common.update({key: value for key, value in entry.items() if key in fields})
        common["source"] = "; ".join(content["sources"][letter] for letter in entry["source"].split())
        values = {key: value for key, value in entry.items() if key not in fields}
        found += [Published(figure=figure, value=value, **common) for figure, value in values.items()]
    order = list(content["models"])
    return tuple(sorted(found, key=lambda one: order.index(one.model)))
