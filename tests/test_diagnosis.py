"""Curves of runs in which something goes wrong, and of healthy ones."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_trl.diagnosis import diagnose

MAX_STEPS, WARMUP = 400, 40


def curve(steps: int = 40, **of_step) -> list[dict]:
    """A healthy run logged every 10 steps; `of_step` replaces a metric by a function of the step."""
    healthy = {
        "loss": lambda step: 2 - step / 1000,
        "nll_loss": lambda step: 2 - step / 1000,
        "logps/chosen": lambda step: -1 + step / 2000,
        "logps/rejected": lambda step: -1.1 - step / 2000,
        "log_odds_chosen": lambda step: 0.1 + step / 500,
    }
    metrics = {name: of_step.get(name.replace("/", "_"), value) for name, value in healthy.items()}
    return [{"step": 10 * i, **{name: value(10 * i) for name, value in metrics.items()}} for i in range(1, steps + 1)]


def evaluations(losses: list[float], prefix: str = "eval_") -> list[dict]:
    return [
        {"step": 100 * i, f"{prefix}loss": loss, f"{prefix}nll_loss": loss, f"{prefix}runtime": 1.0}
        for i, loss in enumerate(losses, 1)
    ]


def findings(history: list[dict], beta: float = 0.1) -> dict[str, str]:
    return diagnose(history, beta, WARMUP, MAX_STEPS)


def test_healthy_run_is_left_alone():
    assert findings(curve() + evaluations([1.9, 1.8, 1.75, 1.76])) == {}
    assert findings([]) == {}


def test_rejected_above_chosen_for_long():
    found = findings(curve(logps_rejected=lambda step: -0.5 if 100 <= step <= 250 else -2))
    assert list(found) == ["inverted"]
    assert "From step 100 to 250" in found["inverted"]


@pytest.mark.parametrize(("first", "last"), [(100, 130), (10, WARMUP + 30)])
def test_rejected_above_chosen_for_a_while_or_before_the_warm_up_has_ended(first, last):
    assert findings(curve(logps_rejected=lambda step: -0.5 if first <= step <= last else -2)) == {}


def test_over_fitting_is_near_certain_chosen_and_hopeless_rejected():
    """The authors' picture: chosen near 0, rejected -5 to -10 (xfactlab/orpo#5)."""
    history = curve(logps_chosen=lambda step: -1 + step / 401, logps_rejected=lambda step: -step / 50)
    found = findings(history)
    assert list(found) == ["overfit"]
    assert "-0.002 per token, and rejected ones -8.0" in found["overfit"]
    assert findings([*history, {"step": 400, "eval_logps/chosen": -1.2}]) == found
    # As certain of pairs that it has never seen: learnt, not memorised, as in the quickstart.
    assert findings([*history, {"step": 400, "eval_logps/chosen": -0.01}]) == {}


def test_log_odds_that_do_not_rise():
    found = findings(curve(log_odds_chosen=lambda step: 0.05 + 0.1 * math.sin(step)))
    assert list(found) == ["flat"]
    assert "0.0" in found["flat"]


def test_log_odds_that_rose_in_the_warm_up_and_stay_there():
    assert findings(curve(log_odds_chosen=lambda step: min(step / 100, 0.45) + 0.02 * math.sin(step))) == {}


def test_flat_log_odds_early_in_a_run_mean_nothing_yet():
    assert findings(curve(steps=11, log_odds_chosen=lambda step: 0.05)) == {}


def test_held_out_loss_that_rises():
    found = findings(curve() + evaluations([1.9, 1.5, 1.6, 1.7]) + evaluations([1.9, 1.8, 1.7, 1.6], "eval_mine_"))
    assert list(found) == ["rising eval_"]
    assert "since step 200, from 1.5000 to 1.7000" in found["rising eval_"]


@pytest.mark.parametrize("losses", [[1.5, 1.6], [1.9, 1.5, 1.6], [1.5, 1.501, 1.502], [1.5, 1.7, 1.4], [1.5, 1.6, 1.5]])
def test_held_out_loss_that_has_not_risen_twice(losses):
    assert findings(evaluations(losses)) == {}


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_loss_that_was_not_finite(bad):
    found = findings(curve(loss=lambda step: bad if step in (50, 60) else 2.0))
    assert list(found) == ["non_finite"]
    assert "at step 50 and in 1 later logs" in found["non_finite"]


def test_sft_alone_expects_nothing_of_rejected_responses():
    history = curve(logps_rejected=lambda step: -0.5, log_odds_chosen=lambda step: -0.3)
    assert set(findings(history)) == {"inverted", "flat"}
    assert findings(history, beta=0) == {}


VALUES = st.one_of(st.none(), st.floats(), st.integers(-5, 5))
NAMES = ("loss", "nll_loss", "logps/chosen", "logps/rejected", "log_odds_chosen", "eval_loss", "eval_nll_loss",
         "eval_logps/chosen")  # fmt: skip


@given(
    st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES)), st.floats(0, 2), st.integers(0, 9), st.integers(0, 50)
)
def test_any_history_gets_sentences(logs, beta, warmup, steps):
    found = diagnose([{"step": i, **log} for i, log in enumerate(logs, 1)], beta, warmup, steps)
    assert all(isinstance(text, str) and text for text in found.values())
