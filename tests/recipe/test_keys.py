import dataclasses
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_trl.config import DataArguments, ModelArguments, ORPOConfig
from orpo_trl.recipe.keys import describe, meant_by, recipe_keys, unknown_key

LETTERS = string.ascii_lowercase + string.digits + "_"


def typos(name):
    """Every word that one insertion, deletion, replacement or swap of neighbours makes of a key."""
    splits = [(name[:i], name[i:]) for i in range(len(name) + 1)]
    made = {a + letter + b for a, b in splits for letter in LETTERS}
    made |= {a + b[1:] for a, b in splits if b}
    made |= {a + letter + b[1:] for a, b in splits if b for letter in LETTERS}
    made |= {a + b[1] + b[0] + b[2:] for a, b in splits if len(b) > 1}
    return made - set(recipe_keys()) - {""}


def test_keys_are_the_fields_of_the_config_classes():
    fields = {
        field.name for owner in (ModelArguments, DataArguments, ORPOConfig) for field in dataclasses.fields(owner)
    }
    assert set(recipe_keys()) == {
        name for name in fields if name not in ("parallelism_config", "local_rank") and name[0] != "_"
    }


@pytest.mark.parametrize("every", [pytest.param(1, marks=[pytest.mark.slow, pytest.mark.long]), 200])
def test_typo_of_one_character_is_answered_with_the_right_key(every):
    asked = [(name, typo) for name in recipe_keys() for typo in typos(name)]
    asked = sorted(asked)[::every]
    right = sum(f"did you mean `{name}`?" in unknown_key(typo) for name, typo in asked)
    print(f"{right:,} of {len(asked):,} = {right / len(asked):.4f}")
    assert right >= 0.99 * len(asked)


def test_key_of_another_tool_is_answered_with_ours():
    for foreign in ("pref_beta", "orpo_alpha", "rl_beta", "alpha"):
        assert "write `beta`" in unknown_key(foreign)
    assert "write `dtype`" in unknown_key("torch_dtype")
    assert "`orpo-trl schema` lists all keys" in unknown_key("qqqqqq")


def test_everyday_name_is_answered_with_the_key():
    everyday = {
        "lambda": "beta", "lam": "beta", "alpha": "beta", "orpo_alpha": "beta", "orpo_lambda": "beta",
        "epochs": "num_train_epochs", "epoch": "num_train_epochs", "lr": "learning_rate", "warmup": "warmup_steps",
        "batch_size": "per_device_train_batch_size", "micro_batch_size": "per_device_train_batch_size",
        "train_batch_size": "per_device_train_batch_size", "grad_accum": "gradient_accumulation_steps",
        "max_len": "max_length", "max_prompt_len": "max_prompt_length", "model": "model_name_or_path",
        "dataset": "dataset_name", "tokenizer": "tokenizer_name_or_path", "output": "output_dir", "wd": "weight_decay",
        "lora": "use_peft", "rank": "lora_r",
    }  # fmt: skip
    assert {name: meant_by(name) for name in everyday} == everyday
    assert all(f"`{key}`" in unknown_key(name) and key in recipe_keys() for name, key in everyday.items())
    assert unknown_key("lambda") == "unknown key `lambda`; did you mean `beta`?"


def test_key_that_was_meant():
    assert meant_by("base_model") == meant_by("model_nam_or_path") == "model_name_or_path"
    assert meant_by("sample_packing") is None
    assert meant_by("qqqqqq") is None


def test_every_default_has_its_keys_type():
    for key in recipe_keys().values():
        assert key.check(key.default)[1] == [], key.name


@pytest.mark.parametrize(
    ("name", "value", "taken"),
    [
        ("learning_rate", 1, 1.0), ("max_length", 1e3, 1000), ("max_length", None, None), ("bf16", "yes", True),
        ("bf16", "off", False), ("eval_strategy", "no", "no"), ("lora_target_modules", "all-linear", "all-linear"),
        ("lora_modules_to_save", "lm_head", ["lm_head"]), ("report_to", ["wandb"], ["wandb"]),
        ("resume_from_checkpoint", True, True), ("resume_from_checkpoint", "out", "out"),
        ("deepspeed", {"zero_optimization": {}}, {"zero_optimization": {}}), ("warmup_steps", 0.1, 0.1),
        ("datasets", [{"path": "a", "columns": {"prompt": "q"}}], [{"path": "a", "columns": {"prompt": "q"}}]),
        ("eval_datasets", {"x": {"path": "a", "split": "test"}}, {"x": {"path": "a", "split": "test"}}),
    ],
)  # fmt: skip
def test_values_are_taken(name, value, taken):
    found, problems = recipe_keys()[name].check(value)
    assert not problems
    assert found == taken
    assert type(found) is type(taken)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("beta", True, "`beta`: expected a finite number, received true"),
        ("beta", None, "`beta`: expected a finite number, received null"),
        ("beta", float("nan"), "`beta`: expected a finite number, received nan"),
        ("learning_rate", "5e-6", "`learning_rate`: expected a finite number, received '5e-6'"),
        ("max_length", 10.5, "`max_length`: expected a whole number or null, received 10.5"),
        ("max_length", True, "`max_length`: expected a whole number or null, received true"),
        ("bf16", 1, "`bf16`: expected true or false or null, received 1"),
        ("run_name", 7, "`run_name`: expected text or null, received 7"),
        ("nll_scope", "sequnce", "`nll_scope`: did you mean sequence? expected one of sequence, completion"),
        ("eval_strategy", "never", "`eval_strategy`: expected one of no, steps, epoch, received 'never'"),
        ("optim", "adamw_tortch", "`optim`: did you mean adamw_torch? received 'adamw_tortch'"),
        ("model_init_kwargs", [1], "`model_init_kwargs`: expected a mapping or text or null, received [1]"),
        ("datasets", {"path": "a"}, "`datasets`: expected a list of mappings with `path`"),
        ("datasets", ["a"], "`datasets.0`: expected a mapping with `path`, received 'a'"),
        ("datasets", [{"path": "a"}, {"paht": "a"}], "`datasets.1`: `path` is missing; it has `paht`"),
        ("datasets", [{"path": "a", "colums": []}], "`datasets.0.colums`: unknown key; did you mean `columns`?"),
        (
            "datasets",
            [{"path": "a", "fraction": -1}],
            "`datasets.0.fraction`: expected a finite number above 0 or null",
        ),
        ("datasets", [{"path": "a", "columns": [1]}], "`datasets.0.columns"),
        ("eval_datasets", {"x": {"path": 3}}, "`eval_datasets.x.path`: expected text, received 3"),
        ("eval_datasets", [{"path": "a"}], "`eval_datasets`: expected a mapping of labels to mappings with `path`"),
    ],
)
def test_wrong_value_is_explained(name, value, text):
    problems = recipe_keys()[name].check(value)[1]
    assert text in problems[0][1]


@given(st.sampled_from(sorted(recipe_keys())), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
))  # fmt: skip
def test_any_value_is_taken_or_explained_by_its_key(name, value):
    _, problems = recipe_keys()[name].check(value)
    for path, text in problems:
        assert f"`{'.'.join(map(str, (name, *path)))}`" in text


def test_every_type_has_words():
    for key in recipe_keys().values():
        assert describe(key.hint)
