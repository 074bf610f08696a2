import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.run_folders import close, history, metrics, sample, write_lines, write_run

from orpo_trl.metrics import MARGIN, number
from orpo_trl.report.history import held_out, last_values, training
from orpo_trl.report.run import Run, read_run, read_runs


def test_run_folder_is_read_whole(tmp_path):
    recipe = "beta: 0.2   # command line\nlearning_rate: 5e-6   # base.yaml:3\nmodel_name_or_path: gpt2\n"
    folder = write_run(
        tmp_path / "first", samples=[sample()], recipe=recipe, run={"seed": 7, "beta": 0.2}, preparation={"train": {}}
    )
    run = read_run(folder)
    assert (run.name, run.beta, run.setting("seed"), run.model_name) == ("first", 0.2, 7, "gpt2")
    assert run.recipe["learning_rate"] == 5e-6
    assert run.recipe_text == recipe
    assert run.history == history()
    assert run.last_step == 6
    assert run.samples == [sample()]


def test_folder_with_metrics_alone_is_a_run(tmp_path):
    run = read_run(write_run(tmp_path / "bare"))
    assert (run.recipe, run.record, run.preparation, run.samples) == ({}, {}, {}, [])
    assert run.beta == 0.1  # from the rewards


def test_environment_variables_of_a_recipe_stay_names(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hf_secret")
    recipe = "hub_token: ${SOME_TOKEN}\nmodel_init_kwargs: {token: '${UNSET_TOKEN}'}\n"
    run = read_run(write_run(tmp_path / "run", recipe=recipe))
    assert run.recipe == {"hub_token": "${SOME_TOKEN}", "model_init_kwargs": {"token": "${UNSET_TOKEN}"}}


def test_run_from_python_has_its_settings_for_a_recipe(tmp_path):
    run = read_run(write_run(tmp_path / "run", run={"settings": {"beta": 0.3, "run_name": "mine"}}))
    assert (run.name, run.beta, run.recipe["run_name"]) == ("mine", 0.3, "mine")
    assert "beta: 0.3" in run.recipe_text


def test_half_written_last_line_is_left_out(tmp_path):
    folder = write_run(tmp_path / "killed")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    assert read_run(folder).history == history()


@pytest.mark.parametrize("where", [".", "checkpoint-8"])
def test_folder_of_another_trainer_is_read_from_its_newest_state(tmp_path, where):
    for name, steps in (("checkpoint-4", 4), (where, 8)):
        (tmp_path / name).mkdir(exist_ok=True)
        state = {"global_step": steps, "log_history": history(steps)}
        (tmp_path / name / "trainer_state.json").write_text(json.dumps(state))
    run = read_run(tmp_path)
    assert run.history == history(8)
    assert run.beta == 0.1


def test_not_a_number_of_another_trainer_is_a_gap(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": NaN}, {"step": 2, "loss": 1}]}')
    steps, values = read_run(tmp_path).training("loss")
    assert steps.tolist() == [1, 2]
    np.testing.assert_array_equal(values, [math.nan, 1])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "expected a run's folder, with metrics.jsonl or .* found nothing"),
        ({"model.safetensors": "", "a.txt": ""}, "found a.txt, model.safetensors"),
        ({"trainer_state.json": "{}"}, "found trainer_state.json"),
        ({"metrics.jsonl": "", "run.json": "[1]"}, r"run\.json: expected a JSON object, received '\[1\]'"),
        ({"metrics.jsonl": "", "run.json": "{"}, r"run\.json: expected JSON"),
        ({"metrics.jsonl": "1\n{}\n"}, r"metrics\.jsonl:1: expected a JSON object"),
    ],
)
def test_what_is_no_run_is_an_error_that_names_it(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_run(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="absent: expected a run's folder, received no folder"):
        read_run(tmp_path / "absent")


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path):
    folders = [write_run(tmp_path / path) for path in ("a/x/run", "b/x/run", "b/y/run", "other")]
    assert [run.name for run in read_runs(folders)] == ["a/x/run", "b/x/run", "y/run", "other"]
    assert [run.name for run in read_runs([folders[0], folders[0], tmp_path / "a/../a/x/run"])] == ["run"]


def test_several_evaluation_sets_are_averaged_and_named(tmp_path):
    logs = [
        {"step": 5, **metrics(5, prefix="eval_a_"), "eval_a_runtime": 1.0},
        {"step": 5, **metrics(5, prefix="eval_a_b_"), "eval_a_b_runtime": 1.0},
    ]
    logs[1]["eval_a_b_loss"] = 3.495
    assert Run(tmp_path, "run", logs).prefixes == ["eval_a_", "eval_a_b_"]
    steps, values = held_out(logs, "loss")
    assert steps.tolist() == [5]
    assert close(values[0], (1.495 + 3.495) / 2)


def test_set_whose_name_ends_like_a_metric_is_not_mistaken():
    logs = [{"step": 1, "eval_nll_loss": 2.0, "eval_nll_nll_loss": 1.0, "eval_nll_logps/chosen": -1.0}]
    assert Run(Path(), "run", logs).prefixes == ["eval_nll_"]
    assert held_out(logs, "loss")[1].tolist() == [2.0]
    assert held_out(logs, "nll_loss")[1].tolist() == [1.0]


def test_last_evaluation_counts_and_what_was_not_finite_in_it_is_left_out():
    logs = [{"step": 1, "eval_loss": 1.0, "eval_nll_loss": 0.5}, {"step": 2, "eval_loss": 2.0, "eval_nll_loss": None}]
    assert last_values(logs) == {"eval_loss": 2.0}


def test_margin_is_that_of_log_probabilities():
    logs = [{"step": 1, "logps/chosen": -1.0, "logps/rejected": -1.5}, {"step": 2, "logps/chosen": None}]
    np.testing.assert_array_equal(training(logs, MARGIN)[1], [0.5, math.nan])


_VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers())
_NAMES = st.sampled_from([*metrics(1), *metrics(1, prefix="eval_"), "eval_x_logps/chosen", "eval_runtime", "epoch"])


@given(st.lists(st.dictionaries(_NAMES | st.just("step"), _VALUES)))
def test_any_logs_can_be_read(logs):
    run = Run(Path(), "any", logs)
    for metric in metrics(1):
        for steps, values in (run.training(metric), run.held_out(metric)):
            assert len(steps) == len(values)
            assert np.isfinite(steps).all()
    assert all(number(value) == value for value in run.final_metrics().values())


def test_logs_out_of_order_are_drawn_in_order(tmp_path):
    folder = write_run(tmp_path / "run", [])
    write_lines(folder / "metrics.jsonl", [{"step": step, "loss": float(step)} for step in (3, 1, 2)])
    assert read_run(folder).training("loss")[0].tolist() == [1, 2, 3]
