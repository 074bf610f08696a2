"""The authors' two figures: bars of AlpacaEval 2, and the radar of MT-Bench."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from support.evaluations import CATEGORIES, evaluation, mt_bench

from orpo_trl.report.draw import COLORS, to_bytes
from orpo_trl.report.evaluation_figures import CATEGORIES as RADAR
from orpo_trl.report.evaluation_figures import METHODS, caption, description, draw, drawable
from orpo_trl.report.run import Run


def make_run(*evaluations, name="run"):
    return Run(Path(name), name, [], evaluations=list(evaluations))


def alpaca(win_rate, **changes):
    return evaluation("alpaca_eval_2", {"win_rate": win_rate, "lc_win_rate": 13.0}, **changes)


def test_bars_show_runs_after_published_models_by_method():
    runs = [make_run(name="$none_{"), make_run(alpaca({"value": 11.1, "stderr": 1.0}), name="$x_{$")]
    (axes,) = draw(METHODS, runs).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[:3] == ["Llama-2-Chat 7B, RLHF", "Llama-2-Chat 13B, RLHF", "Zephyr-β 7B, DPO"]
    assert names[-2:] == ["Mistral-ORPO-β, ORPO", "$x_{$"]
    widths = [bar.get_width() for bar in axes.patches]
    np.testing.assert_allclose(widths, [4.96, 7.70, 10.99, 6.35, 9.44, 11.33, 12.20, 11.1])
    assert to_hex(axes.patches[-1].get_facecolor()).upper() == COLORS[1]
    assert "Mistral-ORPO-β (ORPO) 12.20, $x_{$" in description(METHODS, runs)
    assert "weighted_alpaca_eval_gpt4_turbo" in caption(METHODS, runs)
    assert to_bytes(draw(METHODS, runs), "svg") == to_bytes(draw(METHODS, runs), "svg")


@pytest.mark.parametrize("changes", [{"judge": "alpaca_eval_gpt4_turbo_fn"}, {"answered": 804}, {"template": None}])
def test_run_that_was_judged_otherwise_is_no_bar(changes):
    assert drawable([make_run(alpaca(31.0, **changes))]) == []
    both = [make_run(alpaca(31.0, **changes), name="other"), make_run(alpaca(11.0), name="same")]
    assert "other" not in description(METHODS, both)
    assert "same" in description(METHODS, both)


def test_radar_shows_each_category_of_runs_that_compare_with_each_other():
    runs = [make_run(mt_bench(4.0, judge="gpt-4o"), name="other"), make_run(mt_bench(6.0), name="a"), make_run()]
    (axes,) = draw(RADAR, runs).axes
    (line,) = axes.lines
    assert line.get_color() == COLORS[1]
    np.testing.assert_allclose(line.get_ydata(), [6, 6.25, 6.5, 6.75, 7, 7.25, 7.5, 7.75, 6])
    assert [label.get_text().lower() for label in axes.get_xticklabels()] == list(CATEGORIES)
    text = description(RADAR, runs)
    assert "a: writing 6.00" in text
    assert "other" not in text
    assert "judged by gpt-4;" in caption(RADAR, runs)


def test_radar_needs_all_categories():
    found = mt_bench()
    del found.groups["category"]["math"]
    assert drawable([make_run(found)]) == []
    assert drawable([make_run(mt_bench())]) == [RADAR]
