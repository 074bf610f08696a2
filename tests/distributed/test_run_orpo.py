"""scripts/run_orpo.py in real processes: the quickstart, a recipe of the paper, and wrong input."""

import json
import logging
import os
import runpy
import subprocess

import pytest
import torch
from support.processes import ENGINES, ORPO_TRL, TRAIN_ENVIRONMENT, cpu_engine, launch
from support.runs import QUIET, ZERO3
from support.small import REPOSITORY, TOKENIZER, make_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_trl import run_folder

SCRIPT = REPOSITORY / "scripts" / "run_orpo.py"
LOCAL = ["--model_name_or_path", str(TOKENIZER), "--from_scratch", "true", "--bf16", "false", "--optim", "adamw_torch"]


def run_and_fail(arguments: list[str], capsys) -> str:
    """Runs the script in this process and returns its message. Any exception but `SystemExit` is a failure."""
    main = runpy.run_path(str(SCRIPT))["main"]
    logger = logging.getLogger("orpo_trl")
    level, handlers = logger.level, list(logger.handlers)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    logger.setLevel(level)
    logger.handlers = handlers
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    chats = [
        {
            "prompt": row["prompt"],
            "chosen": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["rejected"]}],
        }
        for row in make_rows(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in chats))
    return path


@pytest.mark.slow
def test_paper_recipe_trains_under_zero3_by_overrides_alone(rows, tmp_path):
    overrides = [
        *LOCAL, "--dataset_name", str(rows), "--dataset_train_split", "train", "--test_split_size", "4",
        "--eval_strategy", "steps", "--max_steps", "3", "--logging_steps", "1", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    done = launch(SCRIPT, "recipes/mistral_beta.yaml", *overrides, engine=ENGINES / "cpu_zero3.yaml")
    # One process tokenises; the other reads its cache.
    assert done.stderr.count("Tokenizing the train dataset:   0%") == 1
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 3
    assert all(0 < loss < 20 for loss in losses)
    assert "56 rows read, 56 kept" in done.stdout
    assert "4 rows read, 4 kept" in done.stdout
    assert "Held-out pairs" in done.stdout
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_strategy_of_the_recipe_shards_without_an_accelerate_config(rows, tmp_path, strategy):
    """`deepspeed` in the recipe, started by a launcher that sets no strategy."""
    overrides = [*LOCAL, "--dataset_name", str(rows), "--max_steps", "1", "--output_dir", str(tmp_path / "out")]
    overrides += ["--deepspeed", strategy]
    launch(SCRIPT, "recipes/mistral_beta.yaml", *overrides, engine="ddp")
    assert next((tmp_path / "out").glob("checkpoint-*/global_step1")).is_dir()


@pytest.mark.slow
def test_quickstart_learns_and_answers_as_the_chosen_side(tmp_path):
    done = launch(SCRIPT, "recipes/quickstart.yaml", "--output_dir", str(tmp_path))
    assert "accuracy: chosen more likely than rejected" in done.stdout
    assert "100%|" in done.stderr
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    test = REPOSITORY / "recipes" / "quickstart" / "data" / "test.jsonl"
    rows = [json.loads(line) for line in test.read_text().splitlines()]
    right = 0
    for row in rows:
        ids = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            answer = model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
        right += tokenizer.decode(answer, skip_special_tokens=True).strip() == row["chosen"][0]["content"]
    assert right >= 0.95 * len(rows)


def test_quickstart_command_runs(tmp_path):
    done = launch(SCRIPT, "recipes/quickstart.yaml", "--max_steps", "3", "--output_dir", str(tmp_path))
    assert "521 rows read, 521 kept" in done.stdout
    assert "Held-out pairs (eval)" in done.stdout
    assert "Trained to step 3 in " in done.stdout
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.use_cache


@pytest.mark.slow
def test_lora_recipe_trains_and_saves_an_adapter(rows, tmp_path):
    base = tmp_path / "base"
    launch(SCRIPT, "recipes/quickstart.yaml", "--max_steps", "1", "--output_dir", str(base))
    launch(
        SCRIPT, "recipes/quickstart.yaml", "--model_name_or_path", str(base), "--from_scratch", "false", "--use_peft",
        "true", "--lora_target_modules", "all-linear", "--max_steps", "1", "--output_dir", str(tmp_path / "lora"),
        "--model_revision", "v2",
    )  # fmt: skip
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
    # Whoever loads the adapter loads this revision of its base.
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["revision"] == "v2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["recipes/quickstrat.yaml"],
            "recipes/quickstrat.yaml: there is no such recipe; did you mean the shipped",
        ),
        (["recipes/quickstart.yaml", "--dataset_name", "./absent.jsonl"], "absent.jsonl"),
        (["recipes/quickstart.yaml", "--beta", "-1"], "`beta` must be a finite number >= 0, got -1.0"),
        (
            ["recipes/quickstart.yaml", "--learnin_rate", "1"],
            "command line: unknown key `learnin_rate`; did you mean `learning_rate`?",
        ),
        (["recipes/quickstart.yaml", "--model_name_or_path", "./absent"], "absent"),
        (["recipes/quickstart.yaml", "--resume_from_checkpoint", "true"], "expected a checkpoint-… folder in"),
        (["recipes/quickstart.yaml", "--resume_from_checkpoint", "./absent"], "or true, received './absent'"),
    ],
)
def test_wrong_input_ends_with_a_message_and_no_traceback(arguments, message, tmp_path, capsys):
    assert message in run_and_fail([*arguments, "--output_dir", str(tmp_path)], capsys)


@pytest.mark.parametrize("wrong", [["--dataset_name", "./absent.jsonl"], ["--model_name_or_path", "./absent"]])
def test_wrong_input_leaves_a_finished_run_where_it_is(wrong, tmp_path, capsys):
    folder = tmp_path / "out"
    run_folder.write_origin(folder, "beta: 0.3\n", {}, {"id": "first", "saved": "2026-01-01", "inputs": {}})
    before = {path: path.read_bytes() for path in folder.iterdir()}
    message = run_and_fail(["recipes/quickstart.yaml", *wrong, "--output_dir", str(folder)], capsys)
    assert "absent" in message
    assert list(tmp_path.iterdir()) == [folder]
    assert {path: path.read_bytes() for path in before} == before


def test_malformed_row_ends_with_a_message_and_no_traceback(rows, tmp_path, capsys):
    rows.write_text(rows.read_text() + json.dumps({"prompt": "q", "chosen": None, "rejected": None}) + "\n")
    overrides = ["--dataset_name", str(rows), "--eval_strategy", "no", "--output_dir", str(tmp_path / "out")]
    message = run_and_fail(["recipes/quickstart.yaml", *overrides], capsys)
    assert f"{rows}, row 60: column `chosen`: expected a string or a list of messages" in message


@pytest.mark.parametrize("workers", ["0", pytest.param("1", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("row", "template", "words"),
    [
        ({"chosen": None}, "quickstart", "row 60: column `chosen`: expected a string or a list of messages"),
        (
            {"system": "Speak as a pirate does."},
            "{% for m in messages %}{{ m.content if m.role != 'system' }} {% endfor %}",
            "row 60: system text lost",
        ),
        ({}, "{% for %}", "The chat template is not valid Jinja"),
    ],
)
def test_row_of_a_stream_ends_with_a_message_and_no_traceback(rows, tmp_path, capsys, row, template, words, workers):
    asked = {"question": "Who?", "chosen": "I.", "rejected": "You."}
    rows.write_text("".join(json.dumps(asked) + "\n" for _ in range(60)) + json.dumps({**asked, **row}) + "\n")
    overrides = [
        *("--dataset_name", str(rows), "--dataset_streaming", "--max_steps", "9", "--on_unrendered", "error"),
        *("--eval_strategy", "no", "--output_dir", str(tmp_path / "out"), "--dataloader_num_workers", workers),
    ]
    if template != "quickstart":
        (tmp_path / "template.jinja").write_text(template)
        overrides += ["--chat_template_path", str(tmp_path / "template.jinja")]
    message = run_and_fail(["recipes/quickstart.yaml", *overrides], capsys)
    assert words in message
    assert "Traceback" not in message
    assert "Caught" not in message


def in_rank(rank, code, folder):
    """The environment in which one rank runs `code` before anything else."""
    (folder / "sitecustomize.py").write_text(f"import os\nif os.environ.get('RANK') == {rank!r}:\n    {code}\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), TRAIN_ENVIRONMENT["PYTHONPATH"]])}


@pytest.mark.slow
@pytest.mark.parametrize("late", ["0", "1"])
def test_launched_run_reports_an_error_once(late, tmp_path):
    """The launcher ends the rank that is late as soon as the other one has ended."""
    done = launch(
        SCRIPT, "recipes/absent.yaml", engine=cpu_engine("zero3", tmp_path), check=False,
        environment=in_rank(late, "import time; time.sleep(5)", tmp_path),
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("run_orpo.py: recipes/absent.yaml: there is no such recipe") == 1


@pytest.mark.slow
def test_problem_that_one_rank_alone_has_is_told(tmp_path):
    """As of a file that only one of two machines has."""
    done = subprocess.run(
        [ORPO_TRL, "train", "quickstart", *QUIET, *ZERO3, "--output_dir", str(tmp_path / "out")],
        env=TRAIN_ENVIRONMENT | in_rank("1", "import sys; sys.argv += ['--dataset_name', './absent.jsonl']", tmp_path),
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("run_orpo.py: ") == 1
    assert "run_orpo.py: The dataset './absent.jsonl' does not exist" in done.stderr
    assert "Traceback" not in done.stderr
