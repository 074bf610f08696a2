"""What runs leave in their output folder."""

import json
import subprocess
from dataclasses import fields
from typing import cast

import pytest
from datasets import Dataset
from support.small import REPOSITORY, make_dataset, make_rows, settings, tiny_model

from orpo_trl import ORPOConfig, ORPOTrainer
from orpo_trl.callbacks.record import git_revision, token_digest
from orpo_trl.pairs.preparation import PreparationReport
from orpo_trl.pairs.prepare import prepare_pairs
from orpo_trl.pairs.tokenize import PairRules
from orpo_trl.recipe.files import read_recipe
from orpo_trl.recipe.parse import build_settings, load_recipe
from orpo_trl.run_folder import read_lines

OPTIONS = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def run(tokenizer, folder, resume=None, rows=12, **kwargs) -> ORPOTrainer:
    trainer = ORPOTrainer(
        tiny_model(), settings(folder, **{**OPTIONS, **kwargs}), train_dataset=make_dataset(rows),
        eval_dataset={"farm": make_dataset(3, seed=1), "zoo": make_dataset(3, seed=2)}, processing_class=tokenizer,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_metrics_are_the_log_history(tokenizer, tmp_path):
    trainer = run(tokenizer, tmp_path)
    history = [{k: v for k, v in log.items() if k != "total_flos"} for log in trainer.state.log_history]
    assert read_lines(tmp_path / "metrics.jsonl") == history
    assert {log["step"] for log in history if "eval_farm_loss" in log} == {2, 4}


def test_run_that_resumes_goes_on_and_a_new_one_starts_afresh(tokenizer, tmp_path):
    """The run had gone on past its checkpoint when it was cut off: those steps are logged once."""
    whole = run(tokenizer, tmp_path)
    run(tokenizer, tmp_path, resume=str(tmp_path / "checkpoint-2"))
    lines = read_lines(tmp_path / "metrics.jsonl")
    steps = [log["step"] for log in lines if "loss" in log]
    assert steps == [1, 2, 3, 4]
    losses = [log["loss"] for log in whole.state.log_history if "loss" in log]
    assert [log["loss"] for log in lines if "loss" in log] == pytest.approx(losses, rel=1e-5)
    tokens = [log["num_tokens"] for log in lines if "loss" in log]
    assert tokens == [log["num_tokens"] for log in whole.state.log_history if "loss" in log]
    assert json.loads((tmp_path / "run.json").read_text())["resumed_from_step"] == 2

    run(tokenizer, tmp_path, max_steps=1)
    assert [log["step"] for log in read_lines(tmp_path / "metrics.jsonl") if "loss" in log] == [1]


def test_evaluation_before_training_belongs_to_the_run(tokenizer, tmp_path):
    trainer = ORPOTrainer(
        tiny_model(), settings(tmp_path, max_steps=1), train_dataset=make_dataset(4), eval_dataset=make_dataset(2),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.evaluate()
    trainer.train()
    assert [log["step"] for log in read_lines(tmp_path / "metrics.jsonl")] == [0, 1, 1]


def test_run_json_and_preparation_report(tokenizer, tmp_path):
    trainer = run(tokenizer, tmp_path, seed=7, warmup_steps=1)
    about = json.loads((tmp_path / "run.json").read_text())
    assert (about["seed"], about["beta"], about["max_steps"], about["warmup_steps"], about["last_step"]) == (
        7,
        0.1,
        4,
        1,
        4,
    )
    assert about["model"] == {"name": "mistral", "parameters": sum(p.numel() for p in tiny_model().parameters())}
    assert (about["processes"], about["device"], about["layout"]) == (1, "cpu", "shared_prefix")
    assert {name: part["rows"] for name, part in about["datasets"].items()} == {"train": 12, "farm": 3, "zoo": 3}
    assert about["versions"]["trl"].startswith("1.")
    assert about["started"] <= about["finished"]
    kept = json.loads((tmp_path / "preparation.json").read_text())
    assert {name: PreparationReport.from_dict(report) for name, report in kept.items()} == trainer.preparation_reports


def test_git_revision_is_that_of_the_folder_that_the_run_started_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_revision() is None
    commit = ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c"]
    (tmp_path / "a").write_text("1")
    for command in (["init", "-q"], ["add", "a"], commit):
        subprocess.run(["git", *command], check=True)
    revision = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_revision() == {"revision": revision, "changed": False}
    (tmp_path / "a").write_text("2")
    assert git_revision() == {"revision": revision, "changed": True}


def test_fingerprint_is_of_the_tokens_and_their_order(tokenizer):
    def prepared(rows):
        return cast(Dataset, prepare_pairs(Dataset.from_list(rows), tokenizer, PairRules())[0])

    rows = make_rows(2500, nll_only_every=3)
    whole = prepared(rows)
    same = prepared([{**row, "other": 1} for row in rows])
    assert token_digest(same) == token_digest(whole) == token_digest(whole.select(range(len(whole))).flatten_indices())
    changed = [{**rows[0], "chosen": rows[0]["chosen"] + " time"}, *rows[1:]]
    others = [prepared(part) for part in (changed, rows[::-1], rows[1:])]
    assert len({token_digest(part) for part in (whole, *others)}) == 4
    # A token that moves from one response to its neighbour, or to the next row's, is a change.
    ids = {"prompt_ids": [1], "chosen_ids": [5, 6], "rejected_ids": [7]}
    moved = {"prompt_ids": [1], "chosen_ids": [5], "rejected_ids": [6, 7]}
    assert token_digest(prepared([ids])) != token_digest(prepared([moved]))


def test_settings_of_a_python_run_are_a_recipe_of_them(tokenizer, tmp_path):
    trainer = run(tokenizer, tmp_path, beta=0.3, max_length=77, run_tags=["a"], hub_token="hf_secret")
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert not recipe.problems
    assert recipe.settings["beta"] == 0.3
    again = ORPOConfig(**recipe.settings)
    for field in fields(ORPOConfig):
        if not field.name.endswith("_token"):
            assert getattr(again, field.name) == getattr(trainer.args, field.name), field.name
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"hf_secret" not in path.read_bytes(), path
    assert trainer.args.hub_token == "hf_secret"


def test_recipe_of_a_run_is_a_recipe_that_trains_the_same(tmp_path):
    """What `orpo-trl recipes expand` prints, which run_orpo.py hands to the trainer."""
    from orpo_trl.recipe.show import expanded

    overrides = ["--beta", "0.25", "--output_dir", str(tmp_path), "--run_tags", "a", "b"]
    recipe = load_recipe([str(REPOSITORY / "recipes" / "quickstart.yaml"), *overrides])
    (tmp_path / "recipe.yaml").write_text(expanded(recipe))
    again = build_settings(load_recipe([str(tmp_path / "recipe.yaml")]), with_engine=False)
    for ours, theirs in zip(again, build_settings(recipe, with_engine=False), strict=True):
        if isinstance(ours, ORPOConfig) and isinstance(theirs, ORPOConfig):
            assert ours.to_dict() == theirs.to_dict()
        else:
            assert ours == theirs
