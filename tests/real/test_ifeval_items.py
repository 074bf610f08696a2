"""IFEval's own items, and the answers of GPT-4 that Google has stored."""

import json

import pytest
from click.testing import CliRunner

from orpo_trl.cli import main
from orpo_trl.evaluations import read_evaluations

# lm-eval and alpaca_eval take long to import, and slow down all tests after them in their process.
pytestmark = pytest.mark.slow

# google-research/instruction_following_eval/data; not among the project's data.
STORED = "input_response_data_gpt4_20231107_145030.jsonl"


@pytest.fixture
def items(data, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(data / "nltk_data"), *nltk.data.path])
    return data / "ifeval" / "ifeval.jsonl"


def evaluate(*arguments):
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


def test_stored_answers_of_gpt_4_have_the_figures_that_google_stored(items, tmp_path):
    """All four. The loose ones of lm-eval differ from call to call: it guesses languages without a seed."""
    stored = items.with_name(STORED)
    if not stored.is_file():
        pytest.skip(f"{stored} is not there: it is Google's file of that name")
    result = evaluate(stored, "ifeval", "--data", items, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    (found,) = read_evaluations(tmp_path)
    assert found.answered == 540
    assert {name: round(figure.value, 4) for name, figure in found.figures.items()} == {
        "prompt_strict": 0.7722, "instruction_strict": 0.8377, "prompt_loose": 0.7963, "instruction_loose": 0.8558
    }  # fmt: skip


def test_every_item_is_scored_and_the_same_answers_give_the_same_figures(items, tmp_path):
    rows = [json.loads(line) for line in items.read_text(encoding="utf-8").splitlines()]
    answers = tmp_path / "answers.jsonl"
    with open(answers, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": row["prompt"], "response": row["prompt"]}) + "\n" for row in rows)
    found = []
    for _ in range(2):
        assert evaluate(answers, "ifeval", "--data", items).exit_code == 0
        found += read_evaluations(tmp_path)
    assert found[0].answered == found[0].asked == len(rows) == 541
    assert found[0].figures == found[1].figures
    assert found[0].figures["instruction_strict"].n == sum(len(row["instruction_id_list"]) for row in rows) == 834
