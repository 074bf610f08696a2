"""IFEval: stored answers through lm-eval's scorer, errors of its figures, and what is missing told before it starts."""

import json
import math
import random
import sys
from statistics import pstdev

import pytest
from click.testing import CliRunner

from orpo_trl.cli import main
from orpo_trl.evaluate.ifeval import figures
from orpo_trl.evaluate.tasks import task_manager
from orpo_trl.evaluations import UNKNOWN_TEMPLATE, read_evaluations

# lm-eval and alpaca_eval take long to import, and slow down all tests after them in their process.
pytestmark = pytest.mark.slow

ITEMS = [
    {"key": 1, "prompt": "Say it without commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {
        "key": 2,
        "prompt": "Write in capitals, and name a cat twice.",
        "instruction_id_list": ["change_case:english_capital", "keywords:frequency"],
        "kwargs": [{}, {"keyword": "cat", "frequency": 2, "relation": "at least"}],
    },
    {
        "key": 3,
        "prompt": "End with: Over.",
        "instruction_id_list": ["startend:end_checker", "punctuation:no_comma"],
        "kwargs": [{"end_phrase": "Over."}, {}],
    },
]
ANSWERS = [
    "Fine without any.",
    "THE CAT SAW A DOG AND THE DOG SAW THE SUN AND ALL OF THEM WERE HAPPY",  # one cat: one of two instructions
    "Here it comes.\nOver.\nI hope, this helps!",  # loose: without its last line it ends as asked, and has no comma
]
# By hand: prompts (1, 0, 0), loose (1, 0, 1); instructions 1/1, 1/2, 0/2, loose 1/1, 1/2, 2/2.
BY_HAND = {"prompt_strict": 1 / 3, "instruction_strict": 2 / 5, "prompt_loose": 2 / 3, "instruction_loose": 4 / 5}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def punkt(tmp_path, monkeypatch):
    """A folder in the place of NLTK's sentence splitter, which these instructions do not use."""
    import nltk

    (tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english").mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])


def evaluate(*arguments):
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


@pytest.fixture
def files(tmp_path):
    rows = [{"prompt": item["prompt"], "response": text} for item, text in zip(ITEMS, ANSWERS, strict=True)]
    # In another order: answers are found by their prompts.
    return write(tmp_path / "answers.jsonl", rows[::-1]), write(tmp_path / "items.jsonl", ITEMS)


def test_stored_answers_are_scored_without_a_model(punkt, files, tmp_path):
    answers, items = files
    result = evaluate(answers, "ifeval", "--data", items)
    assert result.exit_code == 0, result.output
    (found,) = read_evaluations(tmp_path)
    assert {name: figure.value for name, figure in found.figures.items()} == pytest.approx(BY_HAND)
    assert {name: figure.n for name, figure in found.figures.items()} == {
        "prompt_strict": 3, "instruction_strict": 5, "prompt_loose": 3, "instruction_loose": 5
    }  # fmt: skip
    assert (found.benchmark, found.asked, found.answered, found.shots) == ("ifeval", 3, 3, 0)
    assert found.template == UNKNOWN_TEMPLATE  # nobody recorded it
    assert found.settings["data"] == {"train": ["items.jsonl"]}
    assert {"orpo-trl", "lm_eval", "langdetect", "nltk"} <= set(found.versions)
    shown = result.stdout.splitlines()
    assert shown[0].startswith("IFEval of answers (3 of 3 items")
    assert "0.4000" in "\n".join(shown)
    assert "published: " not in result.stdout
    assert "the template of the answers is not recorded; 3 items answered, not 541" in result.stdout


def test_what_generate_recorded_names_model_and_template(punkt, files, tmp_path):
    answers, items = files
    made = {"identity": {"model": "mine", "max_new_tokens": 256}, "template_of": "chat template of the model"}
    (tmp_path / "answers.jsonl.settings.json").write_text(json.dumps(made), encoding="utf-8")
    assert evaluate(answers, "ifeval", "--data", items).exit_code == 0
    (found,) = read_evaluations(tmp_path)
    assert (found.model, found.template) == ("mine", "chat template of the model")
    assert found.settings["answers"]["max_new_tokens"] == 256


def test_prompts_without_an_answer_are_counted_and_named(punkt, files, tmp_path):
    answers, items = files
    answers.write_text("".join(answers.read_text(encoding="utf-8").splitlines(keepends=True)[:2]), encoding="utf-8")
    result = evaluate(answers, "ifeval", "--data", items)
    (found,) = read_evaluations(tmp_path)
    assert (found.asked, found.answered) == (3, 2)
    assert "Without an answer, and left out: 1 of the prompts" in result.stdout


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "Something else", "response": "x"}], "none of its prompts is one of IFEval's"),
        ([{"instruction": "x", "output": "y"}], "expected the texts `prompt` and `response`"),
    ],
    ids=["others", "columns"],
)
def test_other_answers_are_refused(punkt, files, tmp_path, rows, said):
    answers = write(tmp_path / "others.jsonl", rows)
    result = evaluate(answers, "ifeval", "--data", files[1])
    assert result.exit_code == 2
    assert said in result.stderr
    assert str(answers) in result.stderr


def test_items_of_another_shape_are_refused(punkt, files, tmp_path):
    items = write(tmp_path / "bad.jsonl", [{"question": "x"}])
    result = evaluate(files[0], "ifeval", "--data", items)
    assert result.exit_code == 2
    assert "lacks the columns instruction_id_list, key, kwargs, prompt" in result.stderr


def test_a_missing_sentence_splitter_is_told_with_the_way_to_get_it(files, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    result = evaluate("quickstart-model-that-is-not-loaded", "ifeval", "--data", files[1])
    assert result.exit_code == 2
    assert "python -m nltk.downloader punkt_tab" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_data_that_cannot_be_reached_is_told_in_one_line_with_the_way_out(punkt, files):
    result = evaluate(files[0], "ifeval")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ifeval: its data")
    assert "google/IFEval" in result.stderr
    assert "--data" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("package", ["lm_eval", "langdetect"])
def test_a_missing_package_is_told_in_one_line(package, punkt, files, monkeypatch):
    task_manager.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)  # an import of it fails
    result = evaluate(files[0], "ifeval", "--data", files[1])
    assert result.exit_code == 2
    assert "pip install 'orpo-trl[eval]'" in result.stderr
    assert package in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


# ---- Standard errors -------------------------------------------------------------------------------------------------


def scores_of(prompts: list[list[bool]]) -> list[dict]:
    return [
        {
            "prompt_level_strict_acc": all(followed), "inst_level_strict_acc": followed,
            "prompt_level_loose_acc": all(followed), "inst_level_loose_acc": followed,
        }
        for followed in prompts
    ]  # fmt: skip


def test_errors_of_shares_of_prompts_are_those_of_lm_eval():
    from lm_eval.api.metrics import mean_stderr

    chance = random.Random(3)
    prompts = [[chance.random() < 0.6 for _ in range(chance.randint(1, 3))] for _ in range(50)]
    found = figures(scores_of(prompts))
    assert found["prompt_strict"].stderr == pytest.approx(mean_stderr([all(one) for one in prompts]), rel=1e-12)


def test_errors_of_shares_of_instructions_are_those_of_drawing_prompts_again():
    """Instructions of one prompt are followed together here: errors as if they were independent are too small."""
    chance = random.Random(5)
    prompts = [[chance.random() < 0.5] * chance.randint(1, 3) for _ in range(300)]
    found = figures(scores_of(prompts))["instruction_strict"]
    drawn = []
    for _ in range(4000):
        again = [flag for one in chance.choices(prompts, k=len(prompts)) for flag in one]
        drawn.append(sum(again) / len(again))
    assert found.stderr == pytest.approx(pstdev(drawn), rel=0.05)
    independent = math.sqrt(found.value * (1 - found.value) / (found.n or 0))
    assert found.stderr > 1.2 * independent


def test_one_prompt_has_no_error():
    assert figures(scores_of([[True, False]]))["instruction_strict"].stderr is None
