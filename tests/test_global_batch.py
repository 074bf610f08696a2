"""The pairs of an optimiser step, shared by any number of processes."""

import dataclasses

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.small import REPOSITORY

from orpo_trl import ORPOConfig
from orpo_trl.callbacks.record import settings_as_recipe
from orpo_trl.config import SettingsError
from orpo_trl.global_batch import split_global_batch
from orpo_trl.paths import RECIPES
from orpo_trl.recipe.parse import build_settings, load_recipe
from orpo_trl.trainer_checks import check_global_batch


@given(st.integers(1, 512), st.integers(1, 64), st.integers(1, 64), st.booleans())
def test_each_process_gets_its_share_or_the_answer_names_those_that_can(pairs, micro_batch, processes, is_fixed):
    fits = pairs % processes == 0 and (not is_fixed or (pairs // processes) % micro_batch == 0)
    if not fits:
        with pytest.raises(ValueError, match=f"`global_batch_size: {pairs}` cannot be shared by {processes} process"):
            split_global_batch(pairs, micro_batch, None, processes, is_fixed)
        return
    split = split_global_batch(pairs, micro_batch, None, processes, is_fixed)
    assert split.micro_batch * split.accumulation * processes == pairs
    assert split.micro_batch <= micro_batch
    larger = range(split.micro_batch + 1, micro_batch + 1)
    assert all((pairs // processes) % size for size in larger), "a larger micro-batch would do"
    assert bool(split.note) == (split.micro_batch != micro_batch)


def test_lowered_micro_batch_is_told_with_both_values():
    split = split_global_batch(32, 8, None, 16)
    assert (split.micro_batch, split.accumulation) == (2, 1)
    assert "`per_device_train_batch_size` is 2, not 8" in split.note


def test_processes_that_fit_are_listed():
    with pytest.raises(ValueError, match=r"by 3 processes; it can be by 1, 2, 4, 8, 16, 32$"):
        split_global_batch(32, 8, None, 3)
    with pytest.raises(ValueError, match=r"micro-batches of 8, on which .* depends; it can be by 1, 2, 4$"):
        split_global_batch(32, 8, None, 8, is_micro_batch_fixed=True)


def test_config_takes_processes_from_the_launcher(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "1")
    config = ORPOConfig(str(tmp_path), global_batch_size=32, per_device_train_batch_size=8)
    assert config.gradient_accumulation_steps == 4
    assert config.split_for(8) == (
        "`per_device_train_batch_size` is 4, not 8: "
        "`global_batch_size: 32` leaves 4 pairs of an optimiser step to each of 8 processes"
    )
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (4, 1)
    assert config.split_for(2) == ""  # what was asked for is not forgotten
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (8, 2)


def test_without_it_accumulation_is_one_unless_set(tmp_path):
    assert ORPOConfig(str(tmp_path)).gradient_accumulation_steps == 1
    assert ORPOConfig(str(tmp_path), gradient_accumulation_steps=3).gradient_accumulation_steps == 3


@pytest.mark.parametrize("accumulation", [1, 8])
def test_contradiction_is_refused(accumulation, tmp_path):
    with pytest.raises(SettingsError, match=r"`global_batch_size: 32` contradicts .* leave `gradient_accumulation"):
        ORPOConfig(
            str(tmp_path),
            global_batch_size=32,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=accumulation,
        )


def test_settings_made_of_settings_are_the_same(tmp_path):
    config = ORPOConfig(str(tmp_path), global_batch_size=32, per_device_train_batch_size=8)
    again = ORPOConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init})
    assert (again.per_device_train_batch_size, again.gradient_accumulation_steps) == (8, 4)


def test_recipe_of_a_run_without_one_states_what_was_asked_for(tmp_path):
    config = ORPOConfig(str(tmp_path), global_batch_size=32, per_device_train_batch_size=8)
    config.split_for(8)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (4, 1)
    stated = yaml.safe_load(settings_as_recipe(config, "a/model"))
    assert (stated["global_batch_size"], stated["per_device_train_batch_size"]) == (32, 8)
    assert "gradient_accumulation_steps" not in stated
    assert "gradient_accumulation_steps" not in settings_as_recipe(ORPOConfig(str(tmp_path)), "a/model")
    three = ORPOConfig(str(tmp_path), gradient_accumulation_steps=3)
    assert yaml.safe_load(settings_as_recipe(three, "a/model"))["gradient_accumulation_steps"] == 3


def test_a_setting_that_was_changed_later_is_kept_or_refused(tmp_path):
    """As a search does, and programs that set fields of the config."""
    config = ORPOConfig(str(tmp_path))
    config.gradient_accumulation_steps = 4
    assert check_global_batch(config, 1) == ""
    assert config.gradient_accumulation_steps == 4
    config = ORPOConfig(str(tmp_path), global_batch_size=32, per_device_train_batch_size=8)
    config.per_device_train_batch_size = 2
    with pytest.raises(ValueError, match="an optimiser step has 8 pairs"):
        check_global_batch(config, 1)


def test_batch_size_that_transformers_seeks_is_refused_beside_it(tmp_path):
    with pytest.raises(SettingsError, match="auto_find_batch_size"):
        ORPOConfig(str(tmp_path), global_batch_size=32, auto_find_batch_size=True)


# The quickstart reproduces nothing.
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "quickstart")


@pytest.mark.parametrize("name", NAMES)
def test_recipe_stands_for_its_batch_or_refuses(name):
    recipe = load_recipe([str(REPOSITORY / "recipes" / f"{name}.yaml")])
    _, _, training = build_settings(recipe, with_engine=False)
    assert training.global_batch_size == recipe.settings["global_batch_size"]
    stood = []
    for processes in (1, 2, 3, 4, 8, 16):
        try:
            training.split_for(processes)
        except SettingsError as error:
            assert f"cannot be shared by {processes} process" in str(error)
            continue
        stood.append(processes)
        pairs = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
        assert pairs == training.global_batch_size
        if training.nll_reduction == "micro_batch_mean":
            assert training.per_device_train_batch_size == recipe.settings["per_device_train_batch_size"]
    assert {1, 2} <= set(stood)
    assert 3 not in stood


def test_what_the_device_decides_stands_in_no_recipe(tmp_path):
    """Such as fp32 on a CPU: a GPU that trains the same recipe would obey."""
    left_open = yaml.safe_load(settings_as_recipe(ORPOConfig(str(tmp_path), use_cpu=True), "a/model"))
    assert not {"bf16", "gradient_checkpointing", "activation_checkpointing"} & left_open.keys()
    asked = ORPOConfig(str(tmp_path), use_cpu=True, bf16=True, gradient_checkpointing=False)
    stated = yaml.safe_load(settings_as_recipe(asked, "a/model"))
    assert (stated["bf16"], stated["gradient_checkpointing"]) == (True, False)
