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


def held_out(
    accuracy: float | None, step: int = 400, prefix: str = "eval_", groups: dict[str, float] | None = None
) -> dict:
    pairs = {f"{prefix}{name}/pairs": count for name, count in (groups or {}).items()}
    return {"step": step, f"{prefix}logps/chosen": -1.2, f"{prefix}rewards/accuracies": accuracy, **pairs}


@pytest.mark.parametrize("pairs", [5, 20, 67, 400, 10_000])
def test_held_out_accuracy_is_below_chance_where_wilsons_interval_is(pairs):
    stats = pytest.importorskip("scipy.stats")
    for right in {0, pairs // 3, *range(max(0, pairs // 2 - 110), pairs // 2 + 2)}:
        interval = stats.binomtest(right, pairs).proportion_ci(0.95, method="wilson")
        found = diagnose([*curve(), held_out(right / pairs)], 0.1, WARMUP, MAX_STEPS, {"eval": pairs})
        assert (set(found) == {"below_chance"}) == (interval.high < 0.5), right
        assert not found or found["below_chance"].startswith(
            f"Held-out accuracy is below 0.5, by more than chance explains: {right / pairs:.3f} at step 400 ({pairs:,} "
        )


def test_pairs_are_counted_by_the_groups_of_the_evaluation():
    groups = {"lengths/1-64": 30.0, "lengths/65-128": 70.0, "sources/a": 60.0}
    found = findings([*curve(), held_out(0.39, groups=groups)])
    assert "0.390 at step 400 (100 pairs)" in found["below_chance"]
    assert findings([*curve(), held_out(0.41, groups=groups)]) == {}
    assert findings([*curve(), held_out(0.1)]) == {}  # of how many pairs, nothing says


def test_each_evaluation_set_is_judged_by_its_own_pairs_and_told_in_one_finding():
    history = [
        *curve(), held_out(0.30, 0, "eval_a_"), held_out(0.40, 0, "eval_b_"),
        held_out(0.35, 400, "eval_a_"), held_out(0.45, 400, "eval_b_"), held_out(0.2, 400, "eval_c_"),
    ]  # fmt: skip
    found = diagnose(history, 0.1, WARMUP, MAX_STEPS, {"a": 200, "b": 200, "c": 1000})
    assert list(found) == ["below_chance"]
    assert (
        "0.350 at step 400 (`a`, 200 pairs, 0.300 before training); 0.200 at step 400 (`c`, 1,000 pairs)."
        in (found["below_chance"])
    )
    assert "`b`" not in found["below_chance"]


def test_what_to_look_at_where_accuracy_is_below_chance():
    def text(logs, beta=0.1):
        return diagnose([*logs, held_out(0.3)], beta, WARMUP, MAX_STEPS, {"eval": 100}).get("below_chance", "")

    assert "the right way round? Look at one pair" in text(curve())
    assert "a higher `beta` pulls harder" in text(curve())
    trained = [{**log, "rewards/accuracies": 0.8} for log in curve()]
    assert "In training the accuracy is 0.800, so look at the held-out pairs first." in text(trained)
    assert "`beta: 0` (SFT alone)" in text(curve(), beta=0)
    # Where training says the same, the question is asked once.
    both = diagnose(
        [*curve(logps_rejected=lambda step: -0.5), held_out(0.3)], 0.1, WARMUP, MAX_STEPS, {"eval": 100}
    )  # fmt: skip
    assert sum(text.count("the right way round?") for text in both.values()) == 1


@pytest.mark.parametrize("step", [0, WARMUP - 1])
def test_accuracy_before_the_warm_up_has_ended_is_the_base_models(step):
    assert diagnose([held_out(0.2, step)], 0.1, WARMUP, MAX_STEPS, {"eval": 1000}) == {}


def test_last_evaluation_alone_counts():
    history = [held_out(0.2, 100), held_out(0.55, 200), held_out(0.2, 300), held_out(None, 400)]
    for end in (2, 4):
        assert diagnose(history[:end], 0.1, WARMUP, MAX_STEPS, {"eval": 1000}) == {}


VALUES = st.one_of(st.none(), st.floats(), st.integers(-5, 5))
NAMES = ("loss", "nll_loss", "logps/chosen", "logps/rejected", "log_odds_chosen", "eval_loss", "eval_nll_loss",
         "eval_logps/chosen", "eval_rewards/accuracies", "rewards/accuracies", "eval_sources/a/pairs")  # fmt: skip


@given(
    st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES)), st.floats(0, 2), st.integers(0, 9), st.integers(0, 50)
)
def test_any_history_gets_sentences(logs, beta, warmup, steps):
    found = diagnose([{"step": i, **log} for i, log in enumerate(logs, 1)], beta, warmup, steps, {"eval": steps})
    assert all(isinstance(text, str) and text for text in found.values())
