"""Figures of evaluations, after the authors' two: AlpacaEval 2 by alignment method, and MT-Bench by category."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from orpo_trl.published import Published, differences
from orpo_trl.report.draw import SIZE, add_legend, add_title, look
from orpo_trl.report.evaluations import comparable, table_figures
from orpo_trl.report.run import Run
from orpo_trl.report.text import shorten

METHODS, CATEGORIES = "alpaca_eval_methods", "mt_bench_categories"
_TITLES = {METHODS: "AlpacaEval 2 by alignment method", CATEGORIES: "MT-Bench by category"}
# Greys of the published methods, dark enough to be told from each other and from the page.
_GREYS = {"RLHF": "0.8", "DPO": "0.65", "ORPO": "0.45"}
_WIN_RATE = "win_rate"
# Inches that a bar takes, and those of a radar, which is a circle.
_BAR, _RADAR_HEIGHT = 0.2, 3.6
# FastChat's order of the questions.
_CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
_HIGHEST = 10


@dataclass(frozen=True)
class _Bar:
    """One model's win rate: a published one, or that of the run of a number."""

    name: str
    method: str
    value: float
    stderr: float = 0
    run: int | None = None

    @property
    def color(self) -> str:
        return _GREYS.get(self.method, "0.65") if self.run is None else look(self.run)[0]


def drawable(runs: Sequence[Run]) -> list[str]:
    """Names of the figures for which some run has values that may be shown."""
    return [name for name, found in ((METHODS, _bars(runs)), (CATEGORIES, _scores(runs))) if found]


def draw(name: str, runs: Sequence[Run]) -> Figure:
    """One figure of all runs that have values; a run has the colour that it has in the other figures."""
    if name == METHODS:
        return _draw_bars(_bars(runs))
    return _draw_radar(_scores(runs), runs)


def caption(name: str, runs: Sequence[Run]) -> str:
    """How to read a figure."""
    if name == METHODS:
        judge = table_figures("alpaca_eval_2")[0].judge
        return (
            f"Win rate against GPT-4 Turbo in percent, judged by {judge}, not controlled for length. Grey: published "
            "models. Black lines: one standard error."
        )
    judges = {evaluation.judge or "nobody" for _, evaluation in comparable(runs, "mt_bench")}
    judge = shorten(", ".join(sorted(judges)), 100)
    return f"Scores from 1 to 10, judged by {judge}; the rings are 2 apart. The authors give no values by category."


def description(name: str, runs: Sequence[Run]) -> str:
    """A figure in words, for readers who do not see it."""
    if name == METHODS:
        said = [f"{bar.name} ({bar.method}) {bar.value:.2f}" for bar in _bars(runs)]
        return f"{_TITLES[name]}, win rates in percent: {', '.join(said)}."
    said = []
    for index, scores in _scores(runs).items():
        values = ", ".join(f"{category} {score:.2f}" for category, score in scores.items())
        said.append(f"{runs[index].name}: {values}")
    return f"{_TITLES[name]}, scores from 1 to 10. {'; '.join(said)}."


# ---- AlpacaEval 2 ----------------------------------------------------------------------------------------------------


def _bars(runs: Sequence[Run]) -> list[_Bar]:
    """By method and then by value; empty where no run stands beside the published models."""
    published = [figure for figure in table_figures("alpaca_eval_2") if figure.figure == _WIN_RATE]
    own = [
        _Bar(runs[index].name, "", rate.value, rate.stderr or 0, index)
        for index, evaluation in comparable(runs, "alpaca_eval_2")
        if (rate := evaluation.figures.get(_WIN_RATE))
        and not any(differences(evaluation, figure) for figure in published)
    ]
    return [*sorted(map(_published_bar, published), key=_by_method), *own] if own else []


def _published_bar(figure: Published) -> _Bar:
    return _Bar(figure.model, figure.method, figure.value)


def _by_method(bar: _Bar) -> tuple[int, float]:
    return list(_GREYS).index(bar.method), bar.value


def _draw_bars(bars: Sequence[_Bar]) -> Figure:
    figure = Figure(figsize=(SIZE[0], max(SIZE[1], 1 + _BAR * len(bars))), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(bars))[::-1]  # the first at the top
    errors = [bar.stderr for bar in bars]
    axes.barh(
        places, [bar.value for bar in bars], xerr=errors if any(errors) else None, color=[bar.color for bar in bars],
        error_kw={"linewidth": 1}, height=0.75,
    )  # fmt: skip
    for height, bar in zip(places, bars, strict=True):
        axes.text(bar.value + bar.stderr, height, f" {bar.value:.2f}", va="center", fontsize=8)
    names = [", ".join(filter(None, [shorten(bar.name, 24), bar.method])) for bar in bars]
    axes.set_yticks(places, names, parse_math=False)  # a name is no formula
    axes.set_xlabel("win rate (%)", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1, y=0.01)
    add_title(figure, _TITLES[METHODS])
    return figure


# ---- MT-Bench --------------------------------------------------------------------------------------------------------


def _scores(runs: Sequence[Run]) -> dict[int, dict[str, float]]:
    """Score by category, for each run that has all of them."""
    found = {}
    for index, evaluation in comparable(runs, "mt_bench"):
        groups = evaluation.groups.get("category", {})
        scores = {name: groups[name]["score"].value for name in _CATEGORIES if "score" in groups.get(name, {})}
        if len(scores) == len(_CATEGORIES):
            found[index] = scores
    return found


def _draw_radar(by_run: dict[int, dict[str, float]], runs: Sequence[Run]) -> Figure:
    figure = Figure(figsize=(SIZE[0], _RADAR_HEIGHT), layout="constrained")
    axes: Axes = figure.add_subplot(projection="polar")
    angles = np.linspace(0, 2 * math.pi, len(_CATEGORIES), endpoint=False)
    entries = []
    for index, scores in by_run.items():
        color, marker = look(index)
        values = np.clip([scores[name] for name in _CATEGORIES], 0, _HIGHEST)
        style = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.4}
        axes.plot(np.append(angles, angles[0]), np.append(values, values[0]), **style)
        if len(by_run) == 1:
            axes.fill(angles, values, color=color, alpha=0.12)
        entries.append((shorten(runs[index].name), Line2D([], [], **style)))
    axes.set_theta_offset(math.pi / 2)  # type: ignore[attr-defined] # polar axes
    axes.set_theta_direction(-1)  # type: ignore[attr-defined]
    axes.set_xticks(angles, [name.upper() if name == "stem" else name for name in _CATEGORIES])
    axes.set_ylim(0, _HIGHEST)
    axes.set_yticks(range(2, _HIGHEST + 1, 2))
    axes.tick_params(labelsize=8)
    for angle, word in zip(angles, axes.get_xticklabels(), strict=True):  # beside the circle, not on it
        side = round(math.sin(angle), 6)
        word.set_horizontalalignment("left" if side > 0 else "right" if side < 0 else "center")
    axes.grid(color="0.85", linewidth=0.6)
    add_title(figure, _TITLES[CATEGORIES])
    add_legend(figure, entries)
    return figure
