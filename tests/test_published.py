"""Published figures: the one file of them against what the headers of the recipes say."""

import re

import pytest

from orpo_trl.paths import RECIPES as FOLDER
from orpo_trl.published import published_figures
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
