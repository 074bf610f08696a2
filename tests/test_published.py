"""Published figures: against the headers of the recipes, and what may stand beside them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.evaluations import MADE, evaluation

from orpo_trl.evaluations import OWN_TEMPLATE, UNKNOWN_TEMPLATE
from orpo_trl.paths import RECIPES as FOLDER
from orpo_trl.published import differences, published_figures
from orpo_trl.recipe.library import read_header

RECIPES = {
    "mistral_alpha": "Mistral-ORPO-α",
    "mistral_alpha_released": "Mistral-ORPO-α",
    "mistral_beta": "Mistral-ORPO-β",
    "mistral_beta_released": "Mistral-ORPO-β",
    "mistral_capybara": "Mistral-ORPO-Capybara-7k",
    "mistral_capybara_released": "Mistral-ORPO-Capybara-7k",
    "llama2_7b_ultrafeedback": "Llama-2-7B ORPO",
    "phi2_ultrafeedback": "Phi-2 ORPO",
}
# How a header names a figure: the words before the number.
NAMES = {
    ("alpaca_eval_1", "win_rate"): r"AlpacaEval 1 ",
    ("alpaca_eval_2", "win_rate"): r"AlpacaEval 2 ",
    ("alpaca_eval_2", "lc_win_rate"): r"length-controlled ",
    ("mt_bench", "score"): r"MT-Bench ",
    ("ifeval", "prompt_strict"): r"IFEval prompt-strict ",
}


def value(benchmark, figure, model, at=""):
    found = [
        one.value for one in published_figures(benchmark, model) if one.figure == figure and one.at == at
    ]  # fmt: skip
    assert len(found) <= 1
    return found[0] if found else None


@pytest.mark.parametrize("recipe", RECIPES)
def test_headers_of_recipes_state_the_published_figures(recipe):
    text = read_header(FOLDER / f"{recipe}.yaml").fields["Expect"].split("Curves:")[0]
    stated = {}
    for key, words in NAMES.items():
        found = re.search(rf"{words}(\d*\.\d+)", text)
        if found:
            stated[key] = float(found[1])
    assert stated == {key: expected for key in NAMES if (expected := value(*key, RECIPES[recipe])) is not None}
    assert len(re.findall(r"\d*\.\d+", text)) == len(stated)  # the header has no other figure


@pytest.mark.parametrize("recipe", ["qwen3_8b", "llama31_8b"])
def test_headers_of_todays_models_state_a_published_run_of_trl(recipe):
    text = read_header(FOLDER / f"{recipe}.yaml").fields["Expect"]
    stated = re.search(r"(-\.\d+) \(chosen\) and (-\.\d+) \(rejected\), log odds (\.\d+), accuracy (\.\d+)", text)
    assert [float(number) for number in stated.groups()] == [
        value("preferences", figure, "TRL on UltraFeedback", "the end")
        for figure in ("chosen", "rejected", "log_odds", "accuracy")
    ]


def test_header_of_beta_states_published_runs_on_mixed_data():
    text = read_header(FOLDER / "mistral_beta.yaml").fields["Expect"]
    for figure, words in (("chosen", "chosen"), ("rejected", "rejected"), ("accuracy", "held-out accuracy")):
        stated = re.search(rf"{words} (-?\.?[\d.]+) / (-?[\d.]+) / (-?[\d.]+[0-9])", text)
        expected = [value("preferences", figure, "TRL on mixed data", f"epoch {epoch}") for epoch in (1, 2, 3)]
        assert [float(number) for number in stated.groups()] == pytest.approx(expected, abs=0.0051)


# ---- Whether a figure may stand beside a published one ---------------------------------------------------------------


def published(benchmark, model="Mistral-ORPO-β"):
    return next(one for one in published_figures(benchmark, model) if not one.at)


@pytest.mark.parametrize("benchmark", MADE)
def test_evaluation_made_like_the_published_one_stands_beside_it(benchmark):
    assert differences(evaluation(benchmark), published(benchmark)) == []


@pytest.mark.parametrize(
    ("benchmark", "changes", "words"),
    [
        # alpaca_eval#310: another judge gave 31 instead of 12 to 15 for the same answers.
        (
            "alpaca_eval_2",
            {"judge": "alpaca_eval_gpt4_turbo_fn"},
            "judged by alpaca_eval_gpt4_turbo_fn, not by weighted_alpaca_eval_gpt4_turbo",
        ),
        ("alpaca_eval_2", {"answered": 800}, "800 items answered, not 805"),
        ("alpaca_eval_2", {"template": UNKNOWN_TEMPLATE}, "the template of the answers is not recorded"),
        ("alpaca_eval_1", {"judge": None}, "judged by nobody, not by alpaca_eval_gpt4"),
        ("mt_bench", {"settings": {"judge_prompts": "own"}}, "judge prompts: own, not FastChat"),
        ("mt_bench", {"settings": {}}, "judge prompts: not recorded, not FastChat"),
        ("mt_bench", {"answered": 80}, "80 items answered, not 160"),
        ("ifeval", {"template": None}, "without a chat template, not with one"),
        ("ifeval", {"template": "zep.jinja"}, "template: zep.jinja, not the chat template of the model"),
        ("ifeval", {"shots": 5}, "5 examples in the prompt, not 0"),
        ("ifeval", {"answered": 60, "limit": 60}, "60 items answered, not 541"),
        ("ifeval", {"settings": {"max_new_tokens": 256}}, "max new tokens: 256, not 1280"),
        ("arc_challenge", {"shots": 0}, "0 examples in the prompt, not 25"),
        ("arc_challenge", {"template": OWN_TEMPLATE}, "with a chat template, not without one"),
    ],
)
def test_what_differs_is_said_in_words(benchmark, changes, words):
    assert differences(evaluation(benchmark, **changes), published(benchmark)) == [words]


def test_alpaca_eval_1_is_another_benchmark_than_2():
    words = ["alpaca_eval_1 is another benchmark than alpaca_eval_2"]
    assert differences(evaluation("alpaca_eval_1"), published("alpaca_eval_2")) == words


def test_what_nobody_recorded_is_a_difference():
    assert differences(evaluation("ifeval"), published("ifeval", "Zephyr-β 7B")) == [
        "the template of the published figure is not recorded"
    ]
    held_out = published_figures("preferences")[0]
    assert "how many items the published figure has is not recorded" in differences(evaluation("preferences"), held_out)


@given(
    benchmark=st.sampled_from(list(MADE)),
    judge=st.none() | st.sampled_from([made["judge"] for made in MADE.values() if "judge" in made]) | st.text(),
    template=st.none() | st.just(OWN_TEMPLATE) | st.text(),
    shots=st.none() | st.integers(0, 30),
    answered=st.integers(0, 20_000) | st.sampled_from([made["answered"] for made in MADE.values()]),
)
def test_a_figure_stands_beside_a_published_one_only_if_judge_template_shots_and_items_agree(benchmark, **changes):
    made = {"judge": None, "template": None, "shots": 0, **MADE[benchmark]}
    agrees = all(changes[key] == made[key] for key in ("judge", "template", "answered"))
    agrees = agrees and (changes["shots"] or 0) == made["shots"]
    assert (differences(evaluation(benchmark, **changes), published(benchmark)) == []) == agrees


def test_every_published_figure_has_a_source_and_stands_once():
    places = [(one.model, one.benchmark, one.figure, one.at) for one in published_figures()]
    assert len(places) == len(set(places)) > 60
    for one in published_figures():
        assert one.source
        low, high = {"preferences": (-2, 1), "mt_bench": (1, 10)}.get(one.benchmark, (0, 1))
        assert low < one.value < (100 if one.figure.endswith("win_rate") else high)
