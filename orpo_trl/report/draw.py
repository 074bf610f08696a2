"""Curves of runs: one small figure for each thing to look at."""

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from io import BytesIO

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from orpo_trl.report.figures import FIGURES, Curve, FigureSpec
from orpo_trl.report.published import Anchor, anchors
from orpo_trl.report.run import Run
from orpo_trl.report.text import shorten, show

# Okabe and Ito's palette, which the common kinds of colour blindness tell apart, without its yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Inches, and dots of an inch; at the width of a phone the letters stay legible.
SIZE = (4.6, 3.1)
DPI = 200
# Points drawn of one series and markers on it, at most.
MAX_POINTS = 200
MAX_MARKERS = 20
# Longer series of training are drawn as the running mean over this share of them.
MANY_POINTS = 80
WINDOW = 1 / 40
# Beyond it matplotlib's own arithmetic overflows.
_LARGEST = 1e30


def drawable(runs: Sequence[Run]) -> list[str]:
    """Names of the figures for which some run has a value."""
    curves = {name: [(run, curve) for run in runs for curve in spec.curves] for name, spec in FIGURES.items()}
    return [name for name, pairs in curves.items() if any(_last(*pair) for pair in pairs)]


def draw(name: str, runs: Sequence[Run]) -> Figure:
    """One figure of all runs: training as thin lines, held-out values as markers on a line.

    Args:
        name: a key of `FIGURES`.
        runs: each has a colour and a marker. Where there is one run only, each of its curves has them.
    """
    spec = FIGURES[name]
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    for anchor in anchors(name, runs):
        _draw_anchor(axes, anchor)
    if spec.chance is not None:
        axes.axhline(spec.chance, color="0.55", linewidth=1, linestyle=":", zorder=0)
    drawn: list[float] = []
    for index, run in enumerate(runs):
        for number, curve in enumerate(spec.curves):
            style = _style(curve, number if len(runs) == 1 else index)
            drawn += _draw_curve(axes, run, curve.metric, style, spec.is_smoothed, (index, len(runs)))
    if spec.is_logarithmic and drawn and 0 < min(drawn) < max(drawn) / 100:
        axes.set_yscale("log")
    _label(figure, axes, spec)
    add_legend(figure, list(_legend(spec, runs)))
    return figure


def caption(name: str, runs: Sequence[Run]) -> str:
    """How to read a figure."""
    return FIGURES[name].caption + (" Grey: published runs." if anchors(name, runs) else "")


def description(name: str, runs: Sequence[Run]) -> str:
    """A figure in words, for readers who do not see it: the last value of each curve."""
    spec, parts = FIGURES[name], []
    for run in runs:
        for curve in spec.curves:
            last = _last(run, curve)
            if last:
                step, value, where = last
                what = ", ".join(filter(None, [run.name, spec.legend(curve)]))
                parts.append(f"{what}: {show(value)} ({where}, step {show(int(step))})")
    return f"{spec.title} over optimiser steps. Last values: {'; '.join(parts)}."


def to_bytes(figure: Figure, kind: str) -> bytes:
    """The figure as a file of a kind, `svg` or `png`, the same for the same values."""
    file = BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "orpo-trl"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names in scripts that the font lacks
        metadata = {"Date": None, "Creator": None} if kind == "svg" else None
        figure.savefig(file, format=kind, dpi=DPI, metadata=metadata)
    if kind != "svg":
        return file.getvalue()
    # A hundredth of a point is as good as a millionth, and makes a smaller page.
    return re.sub(rb' d="[^"]*"', lambda path: re.sub(rb"(\.\d\d)\d+", rb"\1", path[0]), file.getvalue())


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about `MAX_POINTS` of a series: the lowest, the highest and a gap of each stretch."""
    if len(values) <= MAX_POINTS:
        return steps, values
    kept: set[int] = set()
    for part in np.array_split(np.arange(len(values)), MAX_POINTS // 2):
        known = part[np.isfinite(values[part])]
        if len(known):
            kept |= {int(known[values[known].argmin()]), int(known[values[known].argmax()])}
        if len(known) < len(part):
            kept.add(int(np.setdiff1d(part, known)[0]))
    index = sorted(kept)
    return steps[index], values[index]


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a window around each point, over its finite values; gaps stay gaps. Shape `[points]`, as given."""
    window = np.ones(max(1, int(len(values) * WINDOW)))
    known = np.isfinite(values)
    sums = np.convolve(np.where(known, values, 0), window, "same")
    counts = np.convolve(known, window, "same")
    return np.where(known, sums / np.maximum(counts, 1), np.nan)


def look(index: int) -> tuple[str, str]:
    """Colour and marker, different for 49 runs."""
    return COLORS[index % len(COLORS)], MARKERS[(index + index // len(COLORS)) % len(MARKERS)]


def _style(curve: Curve, index: int) -> dict:
    """Style of a curve; its markers are hollow where its line is dashed."""
    color, marker = look(index)
    edge = {"markeredgewidth": 0.5, "markeredgecolor": "white"}
    if curve.line == "--":
        edge = {"markeredgewidth": 1.1, "markeredgecolor": color, "markerfacecolor": "white"}
    return {"color": color, "marker": marker, "markersize": 4.5, "linestyle": curve.line, **edge}


def _draw_anchor(axes: Axes, anchor: Anchor) -> None:
    axes.axhspan(anchor.low, anchor.high, color="0.5", alpha=0.16, linewidth=0, zorder=0)
    for level in {anchor.low, anchor.high}:
        axes.axhline(level, color="0.7", linewidth=1.2, zorder=0)
    level, vertical = (anchor.high, "top") if anchor.is_named_at_top else (anchor.low, "bottom")
    axes.text(
        0.995, level, anchor.label, transform=axes.get_yaxis_transform(),
        ha="right", va="bottom" if anchor.low == anchor.high else vertical, fontsize=8, color="0.3", zorder=6,
        path_effects=[withStroke(linewidth=2, foreground="white")],
    )  # fmt: skip


def _draw_curve(
    axes: Axes, run: Run, metric: str, style: dict, is_smoothed: bool, place: tuple[int, int]
) -> list[float]:
    """Draw the training and held-out values of a run, and return those that are finite.

    Args:
        place: number of the run, and how many runs there are.
    """
    index, count = place
    steps, values = _bounded(run.training(metric))
    evaluated, scores = _bounded(run.held_out(metric))
    is_long = is_smoothed and len(values) > MANY_POINTS
    if is_long and count == 1:
        axes.plot(*thin(steps, values), color=style["color"], linewidth=0.5, alpha=0.3, zorder=2)
    if len(values):
        points = thin(steps, running_mean(values) if is_long else values)
        size = len(points[0])
        if np.isfinite(scores).any():
            dots = {"marker": "." if np.isfinite(values).sum() < 3 else "", "linewidth": 1, "alpha": 0.7}
        elif count == 1:
            dots = {"marker": "." if size < 3 else "", "linewidth": 1.3}
        else:  # where curves lie on each other, the markers of each are seen
            dots = {"markevery": (size * index // (6 * count), math.ceil(size / 6)), "linewidth": 1.3}
        axes.plot(*points, **{**style, **dots}, zorder=3)
    if len(scores):
        points = thin(evaluated, scores)
        axes.plot(*points, **style, markevery=math.ceil(len(points[0]) / MAX_MARKERS), linewidth=1.6, zorder=4)
    drawn = np.concatenate([values, scores])
    return drawn[np.isfinite(drawn)].tolist()


def _bounded(series: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    steps, values = series
    return np.clip(steps, -_LARGEST, _LARGEST), np.where(np.abs(values) < _LARGEST, values, np.nan)


def _last(run: Run, curve: Curve) -> tuple[float, float, str] | None:
    """Last step, its value, and where the value is from: held-out data where it has one, else training."""
    for where, (steps, values) in (
        ("held out", run.held_out(curve.metric)),
        ("training", run.training(curve.metric)),
    ):
        known = np.flatnonzero(np.isfinite(values))
        if len(known):
            return float(steps[known[-1]]), float(values[known[-1]]), where
    return None


def _legend(spec: FigureSpec, runs: Sequence[Run]) -> Iterator[tuple[str, Line2D]]:
    """Labels and lines of the legend: for one run its curves, for several the runs and then the curves in grey."""
    if len(runs) > 1:
        for index, run in enumerate(runs):
            yield shorten(run.name), Line2D([], [], **_style(spec.curves[0], index))
    for index, curve in enumerate(spec.curves if len(spec.curves) > 1 else ()):
        color = "0.3" if len(runs) > 1 else look(index)[0]
        yield spec.legend(curve), Line2D([], [], color=color, linestyle=curve.line)


def _label(figure: Figure, axes: Axes, spec: FigureSpec) -> None:
    add_title(figure, spec.title)
    axes.set_xlabel("optimiser step", fontsize=9)
    axes.set_ylabel(spec.unit, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)


def add_title(figure: Figure, title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")


def add_legend(figure: Figure, entries: list[tuple[str, Line2D]]) -> None:
    """Put the legend below the axes, in as many columns as have room; more lines make a taller figure."""
    if not entries:
        return
    widest = 34 + 4.8 * max(len(label) for label, _ in entries)  # points
    columns = min(4, max(1, int(SIZE[0] * 72 // widest)))
    figure.set_figheight(figure.get_figheight() + 0.18 * (math.ceil(len(entries) / columns) - 1))
    legend = figure.legend(
        [handle for _, handle in entries], ["-"] * len(entries), loc="outside lower left", ncols=columns, fontsize=8.5,
        frameon=False, handlelength=2.2, columnspacing=1.2,
    )  # fmt: skip
    for text, (label, _) in zip(legend.get_texts(), entries, strict=True):
        text.set_parse_math(False)  # a name is no formula, and may begin with `_`
        text.set_text(label)
