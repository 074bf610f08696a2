"""Tasks of lm-eval on a few rows, shaped as the Hub's, with a tiny model: shots and metrics of the leaderboard."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner
from support.small import TOKENIZER, WORDS, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_trl.cli import main
from orpo_trl.evaluate.tasks import LEADERBOARD, task_manager
from orpo_trl.evaluations import read_evaluations

# lm-eval and alpaca_eval take long to import, and slow down all tests after them in their process.
pytestmark = pytest.mark.slow

# "About" of the Open LLM Leaderboard, version 1.
SHOTS = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5}
METRIC = {
    "arc_challenge": "acc_norm", "hellaswag": "acc_norm", "mmlu": "acc", "truthfulqa_mc2": "acc", "winogrande": "acc",
    "gsm8k": "exact_match",
}  # fmt: skip
SUBJECTS = ("anatomy", "virology")


def word(number: int) -> str:
    return WORDS[number % len(WORDS)]


def arc(i: int) -> dict:
    choices = {"text": [word(i + k) for k in range(4)], "label": ["A", "B", "C", "D"]}
    return {"id": f"q{i}", "question": f"Which {word(i)}?", "choices": choices, "answerKey": "ABCD"[i % 4]}


def hellaswag(i: int) -> dict:
    return {
        "ind": i, "activity_label": word(i), "ctx_a": f"The {word(i)} is here.", "ctx_b": "it", "ctx": word(i),
        "endings": [f"{word(i + k)} ends" for k in range(4)], "source_id": "s", "split": "train",
        "split_type": "indomain", "label": str(i % 4),
    }  # fmt: skip


def mmlu(i: int, subject: str) -> dict:
    choices = [word(i + k) for k in range(4)]
    return {"question": f"Which {word(3 * i)}?", "subject": subject, "choices": choices, "answer": i % 4}


def truthfulqa(i: int) -> dict:
    targets = {"choices": [f"{word(i + k)}." for k in range(4)], "labels": [1, i % 2, 0, 0]}
    return {"question": f"Is {word(i)} so?", "mc1_targets": targets, "mc2_targets": targets}


def winogrande(i: int) -> dict:
    return {
        "sentence": f"The {word(i)} met the {word(i + 1)}, and _ was late.", "option1": word(i), "option2": word(i + 1),
        "answer": "12"[i % 2],
    }  # fmt: skip


def gsm8k(i: int) -> dict:
    return {"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"}


def write(folder, **splits):
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def leaderboard(tmp_path_factory):
    """A folder for each task, with the splits of the Hub's dataset."""
    folder = tmp_path_factory.mktemp("leaderboard")
    write(folder / "arc_challenge", train=map(arc, range(30)), test=map(arc, range(30, 36)))
    write(folder / "hellaswag", train=map(hellaswag, range(12)), validation=map(hellaswag, range(12, 18)))
    dev, test = ([mmlu(i, name) for name in SUBJECTS for i in range(n)] for n in (5, 6))
    write(folder / "mmlu", dev=dev, test=test[:-2])  # six questions of one subject, four of the other
    write(folder / "truthfulqa_mc2", validation=map(truthfulqa, range(6)))
    write(folder / "winogrande", train=map(winogrande, range(8)), validation=map(winogrande, range(8, 14)))
    write(folder / "gsm8k", train=map(gsm8k, range(8)), test=map(gsm8k, range(8, 12)))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(folder)
    tiny_model(len(tokenizer), max_position_embeddings=4096).save_pretrained(folder)
    return folder


def evaluate(*arguments):
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def measured(model, leaderboard, tmp_path_factory):
    output = tmp_path_factory.mktemp("out")
    result = evaluate(model, "open_llm", "--data", leaderboard, "--max_new_tokens", 16, "--output", output)
    assert result.exit_code == 0, result.output
    return {found.benchmark: found for found in read_evaluations(output)}, result.stdout


def test_the_six_tasks_have_the_shots_and_metrics_of_the_leaderboard(measured):
    found, shown = measured
    assert {name: evaluation.shots for name, evaluation in found.items()} == SHOTS
    assert {name: next(iter(evaluation.figures)) for name, evaluation in found.items()} == METRIC
    assert {name: evaluation.answered for name, evaluation in found.items()} == {
        "arc_challenge": 6, "hellaswag": 6, "mmlu": 10, "truthfulqa_mc2": 6, "winogrande": 6, "gsm8k": 4
    }  # fmt: skip
    assert {evaluation.template for evaluation in found.values()} == {None}
    assert "6 items answered, not 1,172" in shown


def test_every_file_of_figures_has_settings_and_versions(measured):
    for evaluation in measured[0].values():
        assert {"lm_eval", "torch", "transformers", "datasets", "orpo-trl"} <= set(evaluation.versions)
        assert {"data", "data_sha256", "dtype", "device", "batch_size", "seed", "task_versions"} <= set(
            evaluation.settings
        )
        assert evaluation.settings["dtype"] == "float32"
    assert measured[0]["gsm8k"].settings["generation"]["max_gen_toks"] == 16


def log_probability(model, tokenizer, context: str, continuation: str) -> float:
    whole = tokenizer(context + continuation, return_tensors="pt").input_ids
    start = tokenizer(context, return_tensors="pt").input_ids.shape[1]
    with torch.no_grad():
        scores = model(whole).logits.log_softmax(-1)
    return sum(scores[0, place - 1, whole[0, place]].item() for place in range(start, whole.shape[1]))


def test_mmlu_is_what_five_examples_and_a_question_give_by_hand(measured, model):
    """lm-eval takes MMLU's first five examples in order, behind a line that names the subject."""
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()

    def question(row: dict) -> str:
        options = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True))
        return f"{row['question']}{options}\nAnswer:"

    shares = {}
    for subject, count in zip(SUBJECTS, (6, 4), strict=True):
        examples = "".join(
            f"{question(row)} {'ABCD'[row['answer']]}\n\n" for row in (mmlu(i, subject) for i in range(5))
        )
        right = 0
        for row in (mmlu(i, subject) for i in range(count)):
            head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
            scores = [log_probability(network, tokenizer, head + examples + question(row), f" {a}") for a in "ABCD"]
            right += scores.index(max(scores)) == row["answer"]
        shares[subject] = right / count
    found = measured[0]["mmlu"]
    assert {name: group["acc"].value for name, group in found.groups["subject"].items()} == pytest.approx(shares)
    # The leaderboard's mean is over subjects, lm-eval's over questions.
    assert found.figures["acc"].value == pytest.approx(sum(shares.values()) / 2)
    assert found.figures["acc_by_question"].value == pytest.approx(0.6 * shares["anatomy"] + 0.4 * shares["virology"])


def test_of_several_benchmarks_the_ones_without_data_are_told_and_the_others_go_on(model, leaderboard, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    (few / "truthfulqa_mc2").symlink_to(leaderboard / "truthfulqa_mc2")
    result = evaluate(model, "open_llm", "--data", few, "--output", tmp_path, "--limit", 3)
    assert result.exit_code == 2
    (found,) = read_evaluations(tmp_path)
    assert (found.benchmark, found.answered, found.limit, found.name) == (
        "truthfulqa_mc2", 3, 3, "truthfulqa_mc2-first-3"
    )  # fmt: skip
    assert "not evaluated: arc_challenge, hellaswag, mmlu, winogrande, gsm8k" in result.stderr
    for name in set(LEADERBOARD) - {"truthfulqa_mc2"}:
        assert f"{name}" in result.stderr


def test_without_the_hub_every_benchmark_is_told_in_one_line_that_names_data(model):
    result = evaluate(model, "open_llm")
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert [line.partition(":")[0] for line in lines] == [*LEADERBOARD, "Error"]
    assert all("--data" in line for line in lines[:-1])


def test_a_name_that_is_no_benchmark_is_answered_with_suggestions(model):
    for name, suggestion in (("ifevel", "ifeval"), ("hellaswga", "hellaswag"), ("opn_llm", "open_llm")):
        result = evaluate(model, name)
        assert result.exit_code == 2
        assert f"There is no benchmark {name!r}. Did you mean {suggestion}" in result.stderr


def test_any_other_task_is_known_by_its_name_and_comes_from_the_hub(model):
    result = evaluate(model, "arc_easy")
    assert result.exit_code == 2
    assert "arc_easy: its data, which comes from the Hub, cannot be reached" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("absent/model/of/mine", "ifeval"), "there is no such file or folder"),
        (("MODEL", "open_llm", "--data", "FILE"), "expected a folder with a file per benchmark"),
        (("FILE", "gsm8k"), "stored answers cannot be scored"),
        (("FILE",), "name the benchmark that these answers are of"),
        (("MODEL", "gsm8k", "--data", "/absent"), "/absent does not exist"),
        (("FOLDER", "gsm8k"), "expected the folder of a model"),
        (("MODEL", "gsm8k", "--chat_template_path", "a.jinja"), "its questions are no conversations"),
    ],
    ids=["target", "file-of-many", "answers-of-task", "answers-of-what", "data", "no-model", "template"],
)
def test_wrong_arguments_are_told_in_one_line(arguments, said, model, tmp_path):
    (tmp_path / "answers.jsonl").write_text("{}\n", encoding="utf-8")
    places = {"MODEL": model, "FILE": tmp_path / "answers.jsonl", "FOLDER": tmp_path}
    result = evaluate(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_more_new_tokens_than_the_model_reads_are_refused_with_the_flag(model, leaderboard, tmp_path):
    result = evaluate(model, "gsm8k", "--data", leaderboard, "--max_new_tokens", 5000, "--output", tmp_path)
    assert result.exit_code == 2
    assert "--max_new_tokens" in result.stderr.strip().splitlines()[-1]


def test_a_missing_lm_eval_is_told_in_one_line(model, monkeypatch):
    task_manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # an import of it fails
    result = evaluate(model, "gsm8k")
    assert result.exit_code == 2
    assert "pip install 'orpo-trl[eval]'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_adapter_is_measured_with_its_weights(model, leaderboard, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(model)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    values = []
    for folder in (model, tmp_path / "merged", tmp_path / "adapter"):
        result = evaluate(folder, "truthfulqa_mc2", "--data", leaderboard, "--output", tmp_path)
        assert result.exit_code == 0, result.output
        values.append(read_evaluations(tmp_path)[0].figures["acc"].value)
    plain, merged, adapter = values
    assert adapter == pytest.approx(merged, abs=1e-5)
    assert abs(adapter - plain) > 1e-3


def test_outside_of_a_git_repository_nothing_is_fatal(model, leaderboard, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    result = evaluate(model, "truthfulqa_mc2", "--data", leaderboard, "--output", tmp_path, "--limit", 2)
    assert result.exit_code == 0, result.output
    assert "fatal" not in capfd.readouterr().err  # of git, which would write it


def test_a_model_of_pickles_is_refused(model, leaderboard, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save({}, folder / "pytorch_model.bin")
    result = evaluate(folder, "truthfulqa_mc2", "--data", leaderboard)
    assert result.exit_code == 2
    assert "safetensors" in result.stderr
