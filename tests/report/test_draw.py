import io
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.run_folders import MISTRAL, history

from orpo_trl.report.draw import (
    COLORS,
    FIGURES,
    MAX_POINTS,
    caption,
    description,
    draw,
    drawable,
    look,
    running_mean,
    thin,
    to_bytes,
)
from orpo_trl.report.run import Run


def make_run(name="run", logs=None, **kwargs):
    return Run(Path(name), name, history() if logs is None else logs, **kwargs)


def lines(figure):
    """Points of the lines drawn over steps, by colour and dash."""
    (axes,) = figure.axes
    return [
        (line.get_color(), line.get_linestyle(), np.asarray(line.get_xydata(), dtype=float))
        for line in axes.lines
        if len(line.get_xydata()) and line.get_transform().contains_branch(axes.transData)
        and line.get_linestyle() != ":" and line.get_color() in COLORS
    ]  # fmt: skip


def test_chosen_and_rejected_are_drawn_as_logged():
    drawn = lines(draw("logps", [make_run(logs=history(6))]))
    chosen, rejected = COLORS[:2]
    assert [(color, style, len(points)) for color, style, points in drawn] == [
        (chosen, "-", 6), (chosen, "-", 2), (rejected, "--", 6), (rejected, "--", 2),
    ]  # fmt: skip
    np.testing.assert_allclose(drawn[1][2], [[3, -0.997], [6, -0.994]])


def test_runs_have_a_colour_and_a_marker_each():
    runs = [make_run(str(index)) for index in range(3)]
    assert {color for color, _, _ in lines(draw("accuracy", runs))} == set(COLORS[:3])
    assert len({look(index) for index in range(49)}) == 49


def test_colours_differ_for_the_colour_blind():
    """Lightness and hue as the three kinds of dichromacy see them (Viénot 1999; for tritanopia, Machado 2009)."""
    kinds = {
        "protanopia": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
        "deuteranopia": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
        "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
    }
    rgb = np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in COLORS])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    for matrix in kinds.values():
        seen = np.clip(linear @ np.array(matrix).T, 0, 1) @ to_xyz.T / [0.9505, 1, 1.089]
        root = np.where(seen > 0.008856, np.cbrt(seen), 7.787 * seen + 16 / 116)
        lab = np.stack(
            [116 * root[:, 1] - 16, 500 * (root[:, 0] - root[:, 1]), 200 * (root[:, 1] - root[:, 2])], axis=1
        )
        distance = np.linalg.norm(lab[:, None] - lab, axis=-1) + 1e3 * np.eye(len(lab))
        assert distance.min() > 10  # 2 can be told apart side by side


@pytest.mark.parametrize("name", list(FIGURES))
def test_axes_have_units_and_the_figure_says_how_to_read_it(name):
    (axes,) = draw(name, [make_run()]).axes
    assert axes.get_xlabel() == "optimiser step"
    assert axes.get_ylabel()
    assert caption(name, [make_run()]).endswith(".")


@pytest.mark.parametrize(
    ("model", "is_drawn"), [(MISTRAL, True), ("models/Mistral-7B-v0.1/", True), ("mistralai/Mistral-7B-v0.3", False)]
)
def test_published_figures_stand_behind_runs_of_their_model_alone(model, is_drawn):
    run = make_run(recipe={"model_name_or_path": model})
    for name in FIGURES:
        texts = [text.get_text() for text in draw(name, [make_run("other"), run]).axes[0].texts]
        labels = {"logps": ["published: chosen", "published: rejected"], "log_odds": ["published"]}
        labels["accuracy"] = ["published"]
        assert texts == (labels.get(name, []) if is_drawn else [])
        assert ("published" in caption(name, [run])) == bool(texts)


def test_figures_without_a_value_are_left_out():
    run = make_run(logs=[{"step": 1, "loss": 1.0, "grad_norm": None}, {"step": 2, "nll_loss": 0.5}])
    assert drawable([run]) == ["loss"]
    assert drawable([make_run(logs=[])]) == []


def test_gaps_are_shown():
    logs = history(6)
    for log in logs:
        if log["step"] == 4:
            log.update(dict.fromkeys(log, None), step=4)
    points = next(points for _, _, points in lines(draw("grad_norm", [make_run(logs=logs)])))
    assert np.isnan(points[:, 1]).tolist() == [False, False, False, True, False, False]


def test_long_series_keep_their_extremes_and_gaps_in_few_points():
    values = np.sin(np.arange(50_000.0))
    values[12_345], values[30_000:30_010] = 99, np.nan
    steps, kept = thin(np.arange(50_000), values)
    assert len(kept) < 2 * MAX_POINTS
    assert np.nanmax(kept) == 99
    assert np.isnan(kept).any()
    assert (np.diff(steps) > 0).all()


def test_running_mean_follows_finite_values_and_keeps_gaps():
    values = np.full(400, 2.0)
    values[[0, 200]] = math.nan
    mean = running_mean(values)
    assert np.isnan(mean[[0, 200]]).all()
    np.testing.assert_allclose(mean[np.isfinite(values)], 2)
    noise = np.random.default_rng(0).normal(size=4000)
    assert running_mean(noise).std() < 0.2


def test_learning_rate_is_not_smoothed():
    logs = [{"step": step, "learning_rate": 5e-6 * min(step, 1000) / 1000} for step in range(2000)]
    ((_, _, points),) = lines(draw("learning_rate", [make_run(logs=logs)]))
    assert points[:, 1].max() == 5e-6


def test_description_has_the_last_value_of_each_curve():
    text = description("logps", [make_run("a"), make_run("b", logs=history(2))])
    assert "a, chosen: −0.994 (held out, step 6)" in text
    assert "b, rejected: −1.2 (training, step 2)" in text


_NUMBERS = st.none() | st.floats() | st.integers(-(10**400), 10**400)


@settings(max_examples=30)
@given(
    st.lists(st.fixed_dictionaries({"step": st.integers(0, 10**9) | _NUMBERS, "grad_norm": _NUMBERS}), max_size=6),
    st.text(max_size=40),
)
def test_any_values_and_names_make_a_picture(logs, name):
    figure = draw("grad_norm", [make_run(name, logs), make_run("$x_{$", logs)])
    ElementTree.fromstring(to_bytes(figure, "svg"))


def test_pictures_are_the_same_for_the_same_values_and_hold_no_text_of_a_font():
    run = make_run("<b>&", logs=history(300))
    first, second = (to_bytes(draw("logps", [run, replace(run, name="other")]), "svg") for _ in range(2))
    assert first == second
    tree = ElementTree.fromstring(first)
    assert not [element for element in tree.iter() if element.tag.endswith("}text")]
    assert len(first) < 150_000
    image = Image.open(io.BytesIO(to_bytes(draw("logps", [run]), "png")))
    assert (image.format, image.width > 800, image.height > 500) == ("PNG", True, True)
    assert image.convert("L").getextrema() == (0, 255)
