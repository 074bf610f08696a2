"""Configs of other tools, with the keys and figures that each tool documents, become recipes."""

import dataclasses
import subprocess
import sys

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.foreign_configs import AUTHORS_SCRIPT, AXOLOTL, CONFIGS, HANDBOOK, LLAMA_FACTORY, TRL

from orpo_trl.config import DataArguments, ModelArguments, ORPOConfig
from orpo_trl.importers import FOREIGN_KEYS, TOOLS, Imported, ImportProblem, import_recipe, recipe_text
from orpo_trl.importers.conversions import FLASH
from orpo_trl.importers.draft import is_empty
from orpo_trl.importers.foreign_keys import OURS, REFUSED
from orpo_trl.importers.read import read_yaml
from orpo_trl.pairs.columns import ROW_COLUMNS
from orpo_trl.sections import MEANINGLESS, SECTIONS

TRL_OF_A_MODEL = "model_name_or_path: a\ndataset_name: x\nbeta: 0.1\noutput_dir: out\n"
FIELDS = {field.name for owner in (ModelArguments, DataArguments, ORPOConfig) for field in dataclasses.fields(owner)}


@pytest.fixture
def read(tmp_path):
    def read(text: str, name: str = "config.yaml", tool: str | None = None) -> Imported:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return import_recipe(path, tool)

    return read


def contains(imported: Imported, expected: dict) -> None:
    assert {key: imported.settings.get(key) for key in expected} == expected


def noted(notes, word: str):
    return [note for note in notes if word in note.text]


# ---- The figures of each tool's example ----


def test_axolotl_example_keeps_its_figures(read):
    imported = read(AXOLOTL)
    assert imported.tool == "axolotl"
    contains(
        imported,
        {
            "model_name_or_path": "mistralai/Mistral-7B-v0.1",
            "dataset_name": "argilla/ultrafeedback-binarized-preferences-cleaned",
            "beta": 0.1, "nll_scope": "sequence", "nll_reduction": "micro_batch_mean",
            "learning_rate": 2e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "optim": "adamw_bnb_8bit",
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 1,
            "max_length": 4096, "use_peft": True, "lora_r": 32, "lora_alpha": 16, "lora_target_modules": "all-linear",
            "load_in_4bit": True, "bf16": True, "dtype": "bfloat16", "test_split_size": 0.1,
            "eval_strategy": "steps", "eval_steps": 0.25, "save_strategy": "epoch",
        },
    )  # fmt: skip
    assert {note.key: note.line for note in imported.no_equal} == {
        "model_type": 2, "tokenizer_type": 3, "chat_template": 9,
    }  # fmt: skip
    assert noted(imported.differences, "TRL's ORPOTrainer")
    assert noted(imported.differences, "drops a pair")[0].line == 17


def test_llama_factory_example_keeps_its_figures_and_its_objective(read):
    imported = read(LLAMA_FACTORY)
    assert imported.tool == "LLaMA-Factory"
    contains(
        imported,
        {
            "beta": 0.1, "nll_scope": "completion", "nll_reduction": "sequence_mean",
            "use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0,
            "lora_target_modules": ["q_proj", "v_proj"], "max_length": 2048, "dataset_num_proc": 16,
            "learning_rate": 5e-6, "warmup_steps": 0.1, "num_train_epochs": 3.0, "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 8, "dataset_name": "dpo_en_demo", "test_split_size": 0.1,
            "eval_steps": 500, "dtype": "bfloat16", "gradient_checkpointing": True,
        },
    )  # fmt: skip
    dropped = "do_train dataset template overwrite_cache plot_loss"
    assert [note.key for note in imported.no_equal] == dropped.split()
    assert "dataset_info.json" in noted(imported.no_equal, "dpo_en_demo")[0].text
    assert noted(imported.differences, "another objective")


@pytest.mark.parametrize(
    ("lines", "beta"),
    [
        ("pref_ftx: 1.0", 0.05), ("pref_beta: 0.3\npref_ftx: 0.5", 0.2), ("pref_ftx: 0", 0.1),
        ("pref_ftx: 1.0e-7", 0.1), ("pref_ftx: null", 0.1),
    ],
)  # fmt: skip
def test_nll_weight_of_llama_factory_scales_beta(read, lines, beta):
    """(1 + ftx) · NLL + pref_beta · L_OR is 1 + ftx times NLL + pref_beta / (1 + ftx) · L_OR."""
    base = "model_name_or_path: a\nstage: dpo\npref_loss: orpo\ndataset: x\n"
    imported = read(base + lines + "\n")
    assert imported.settings["beta"] == pytest.approx(beta)
    assert not noted(imported.no_equal, "pref_ftx")
    notes = noted(imported.differences, "pref_ftx")
    assert len(notes) == (beta != 0.1)
    for note in notes:
        assert note.line == base.count("\n") + lines.count("\n") + 1
        assert f"pref_beta / (1 + pref_ftx) = {beta}" in note.text
        assert "`max_grad_norm`" in note.text


def test_older_llama_factory_stage_is_read_with_its_defaults(read):
    imported = read("model_name_or_path: a\nstage: orpo\ndataset: x, y\nevaluation_strategy: steps\n")
    contains(imported, {"beta": 0.1, "datasets": [{"path": "x"}, {"path": "y"}], "learning_rate": 5e-5, "bf16": False})
    contains(imported, {"eval_strategy": "steps", "lora_target_modules": "all-linear", "dtype": "float32"})


def test_zephyr_141b_keeps_its_figures(read):
    imported = read(HANDBOOK)
    assert imported.tool == "alignment-handbook"
    contains(
        imported,
        {
            "model_name_or_path": "mistral-community/Mixtral-8x22B-v0.1", "dtype": "bfloat16",
            "dataset_name": "argilla/distilabel-capybara-dpo-7k-binarized", "beta": 0.05, "learning_rate": 5e-6,
            "lr_scheduler_type": "inverse_sqrt", "warmup_steps": 100, "optim": "adamw_bnb_8bit", "num_train_epochs": 3,
            "max_length": 2048, "max_prompt_length": 1792, "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1, "chat_template_path": "recipes/templates/orpo.jinja",
            "save_strategy": "no", "nll_scope": "sequence", "nll_reduction": "micro_batch_mean",
        },
    )  # fmt: skip
    assert not imported.no_equal
    assert noted(imported.differences, "max_prompt_length: TRL cut")
    assert noted(imported.differences, "HumanEval")


def test_shipped_zephyr_recipe_and_import_agree(read):
    """The shipped recipe was written by hand, from the same config."""
    from orpo_trl.paths import RECIPES
    from orpo_trl.recipe.files import read_recipe

    shipped = read_recipe(RECIPES / "zephyr_141b.yaml").settings
    imported = read(HANDBOOK).settings
    shared = (set(shipped) & set(imported)) - {"output_dir"}
    assert {"beta", "warmup_steps", "nll_reduction", "optim", "dtype", "max_prompt_length"} <= shared
    assert {key: imported[key] for key in shared} == {key: shipped[key] for key in shared}


def test_trl_config_keeps_its_keys(read):
    imported = read(TRL)
    assert imported.tool == "TRL"
    theirs = {**yaml.safe_load(TRL), "eval_strategy": "no"}
    contains(imported, {**theirs, "nll_reduction": "micro_batch_mean"})
    assert imported.no_equal == []


# ---- What holds for every config ----


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_are_keys_of_ours_in_the_order_of_sections_and_survive_their_text(read, name):
    imported = read(CONFIGS[name], name)
    order = [key for keys in SECTIONS.values() for key in keys]
    assert list(imported.settings) == [key for key in order if key in imported.settings]
    assert set(imported.settings) <= FIELDS
    text = recipe_text(imported, name)
    assert yaml.safe_load(text) == imported.settings
    titles = [line[7:-5] for line in text.splitlines() if line.startswith("# ---- ")]
    assert titles == [title for title in SECTIONS if title in titles]
    assert f"# Imported from {name}" in text
    assert "orpo-trl train FILE" in text
    assert all(len(line) <= 120 for line in text.splitlines() if line.startswith("#"))
    flat = " ".join(text.replace("\n#   ", " ").split())
    assert all(" ".join(note.text.split()) in flat for note in imported.no_equal + imported.differences)


@pytest.mark.parametrize("name", CONFIGS)
def test_recipe_of_every_config_is_accepted(read, tmp_path, name):
    """By the reader of recipes, which checks every key and type."""
    from orpo_trl.recipe.parse import load_recipe

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_text(read(CONFIGS[name], name), name), encoding="utf-8")
    assert load_recipe([str(recipe)]).problems == []


def accounted(imported: Imported, keys) -> None:
    """Each of their keys is in exactly one of settings (unless it changes nothing) and notes."""
    dropped = {note.key for note in imported.no_equal}
    for key in keys:
        assert (key in imported.became) != (key in dropped), key
    became = {ours for keys in imported.became.values() for ours in keys}
    assert became <= set(imported.settings)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_key_becomes_settings_or_a_note(read, name):
    accounted(read(CONFIGS[name], name), yaml.safe_load(CONFIGS[name]))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, width=32) | st.text(max_size=8)
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=4), SCALARS, max_size=2)
KNOWN = {key for tool in TOOLS.values() for key in (*tool.renamed, *tool.converted, *tool.dropped)} | OURS


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(extra=st.dictionaries(st.text(min_size=1, max_size=12).filter(lambda key: key not in KNOWN), VALUES, max_size=3))
def test_unknown_keys_are_noted_with_their_lines(read, name, extra):
    extra = {key: value for key, value in extra.items() if key not in ("nll_scope", "nll_reduction", "extends")}
    text = CONFIGS[name] + yaml.safe_dump(extra, sort_keys=False) * bool(extra)
    before, after = read(CONFIGS[name], name), read(text, name)
    accounted(after, [*yaml.safe_load(CONFIGS[name]), *extra])
    assert after.settings == before.settings
    new = {note.key: note.line for note in after.no_equal if note.key in extra}
    assert set(new) == {key for key, value in extra.items() if not is_empty(value)}
    assert all(line > CONFIGS[name].count("\n") for line in new.values())
    written = recipe_text(after, name)
    assert yaml.safe_load(written) == after.settings


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_of_a_known_key_is_imported_or_refused_by_name(read, name, data):
    config = yaml.safe_load(CONFIGS[name])
    converted = sorted({key for tool in TOOLS.values() for key in tool.converted} | set(config))
    for key in data.draw(st.lists(st.sampled_from(converted), min_size=1, max_size=3, unique=True)):
        config[key] = data.draw(VALUES, label=key)
    try:
        imported = read(yaml.safe_dump(config), name)
    except ImportProblem as error:
        assert name in str(error)
    else:
        accounted(imported, config)
        assert yaml.safe_load(recipe_text(imported, name)) == imported.settings


@settings(max_examples=100, deadline=None)
@given(value=VALUES)
def test_any_plain_value_survives_the_text_of_a_recipe(tmp_path_factory, value):
    imported = Imported("TRL", {"run_name": value}, [], [], {}, {"run_name": "somewhere"})
    text = recipe_text(imported, "a\nb: c")
    assert yaml.safe_load(text) == {"run_name": value}
    from orpo_trl.recipe.files import Recipe, read_recipe

    if "${" not in text and not isinstance(value, dict):  # variables and keys that are numbers
        path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        recipe: Recipe = read_recipe(path)
        assert (recipe.problems, recipe.settings) == ([], {"run_name": value})


def test_floats_and_strings_are_written_as_yaml_needs_them(read):
    text = recipe_text(read(TRL.replace("8.0e-6", "5e-6") + "run_name: '5e-6'\nsave_strategy: 'no'\n"), "trl.yaml")
    assert "\nlearning_rate: 5.0e-6\n" in text
    assert "\nrun_name: '5e-6'\n" in text
    assert "\nsave_strategy: 'no'\n" in text
    assert "\noutput_dir: Qwen2-0.5B-ORPO\n" in text


# ---- Single keys ----


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rl_beta: 0.3", {"beta": 0.3}),
        ("trl: {beta: 0.4}", {"beta": 0.4}),
        ("deepspeed: deepspeed_configs/zero3_bf16.json", {"deepspeed": "zero3"}),
        ("deepspeed: deepspeed_configs/zero2.json", {"deepspeed": "zero2"}),
        ("deepspeed: {zero_optimization: {stage: 3}}", {"deepspeed": "zero3"}),
        ("fsdp: [full_shard, auto_wrap]", {"deepspeed": "zero3"}),
        ("sdp_attention: true", {"attn_implementation": "sdpa"}),
        ("use_tensorboard: true", {"report_to": ["tensorboard"]}),
        ("hub_model_id: me/model", {"push_to_hub": True, "hub_private_repo": True}),
        ("group_by_length: true", {"train_sampling_strategy": "group_by_length"}),
    ],
)
def test_axolotl_key_becomes_ours(read, line, expected):
    imported = read(AXOLOTL + line + "\n")
    contains(imported, expected)
    accounted(imported, yaml.safe_load(AXOLOTL + line))


def test_axolotl_weight_of_older_versions_yields_to_the_newer_key(read):
    imported = read(AXOLOTL + "rl_beta: 0.3\n")
    assert "already, by rl_beta" in noted(imported.no_equal, "orpo_alpha")[0].text


def test_axolotl_test_sets_are_evaluated_by_label(read):
    tests = "test_datasets:\n- {path: org/pairs, split: test}\n- {path: rows.jsonl, ds_type: json, shards: 2}\n"
    imported = read(AXOLOTL + tests)
    contains(
        imported,
        {"eval_datasets": {"pairs": {"path": "org/pairs", "split": "test"}, "rows_jsonl": {"path": "rows.jsonl"}}},
    )
    assert "test_split_size" not in imported.settings
    note = noted(imported.no_equal, "test_datasets.1.shards")[0]
    assert note.line == AXOLOTL.count("\n") + 3


def test_axolotl_columns_leave_the_system_column_to_be_read(read):
    """A mapping would read nothing but its own columns; the type reads `system` beside chosen and rejected."""
    kind = "    type: chat_template.argilla\n"
    imported = read(AXOLOTL.replace(kind, kind + "    field_chosen: good\n"))
    assert imported.settings["dataset_name"] == "argilla/ultrafeedback-binarized-preferences-cleaned"
    assert "datasets" not in imported.settings
    (note,) = noted(imported.no_equal, "field_chosen")
    assert "reads chosen, rejected and system" in note.text
    assert note.line == AXOLOTL[: AXOLOTL.index(kind)].count("\n") + 2

    imported = read(AXOLOTL.replace(kind, "    field_chosen: good\n"))
    (entry,) = imported.settings["datasets"]
    assert entry["columns"] == {"chosen": "good", "rejected": "rejected"}


def test_axolotl_without_anything_to_evaluate_on_does_not_evaluate(read):
    imported = read(AXOLOTL.replace("val_set_size: 0.1", "val_set_size: 0"))
    contains(imported, {"eval_strategy": "no"})
    assert not {"eval_steps", "test_split_size"} & set(imported.settings)


def test_axolotl_first_orpo_is_distinguished_from_the_later_one(read):
    text = AXOLOTL.replace("rl: orpo\n", "").replace("type: chat_template.argilla", "type: orpo.chat_template")
    imported = read(text)
    contains(imported, {"nll_reduction": "sequence_mean", "beta": 0.1})
    assert noted(imported.differences, "padding included")


def test_dataset_mixer_shares_become_weights(read):
    mixer = (
        "dataset_mixer:\n  org/a: 0.5\n  org/b: 1.0\ndataset_splits: [train_prefs, test_prefs]\neval_strategy: epoch\n"
    )
    imported = read(f"model_name_or_path: m\nbeta: 0.1\n{mixer}")
    contains(
        imported,
        {
            "datasets": [
                {"path": "org/a", "split": "train_prefs", "weight": 0.5}, {"path": "org/b", "split": "train_prefs"},
            ],
            "eval_datasets": {
                "a": {"path": "org/a", "split": "test_prefs"}, "b": {"path": "org/b", "split": "test_prefs"},
            },
        },
    )  # fmt: skip
    assert noted(imported.differences, "first rows")


def test_dataset_mixture_becomes_datasets(read):
    mixture = """\
dataset_mixture:
  datasets:
  - {id: org/a, config: main, split: train, columns: [chosen, score, rejected], weight: 0.25}
  seed: 0
  test_split_size: 50
eval_strategy: steps
"""
    imported = read(f"model_name_or_path: m\nbeta: 0.1\n{mixture}")
    entry = {"path": "org/a", "name": "main", "split": "train", "columns": ["chosen", "rejected"], "weight": 0.25}
    contains(imported, {"datasets": [entry], "test_split_size": 50})
    assert noted(imported.no_equal, "dataset_mixture.seed")[0].line == 6
    assert "no pair is read from `score`" in noted(imported.no_equal, "dataset_mixture.datasets.0.columns")[0].text


def test_columns_of_a_trl_config_are_those_that_a_pair_is_read_from(read):
    """TRL keeps the others for a step of the user's own; here a recipe that names them would be refused."""
    sources = "datasets:\n- {path: a}\n- {path: b, columns: [prompt, chosen, rejected, score]}\n"
    imported = read(f"model_name_or_path: m\nbeta: 0.1\n{sources}")
    kept = ["prompt", "chosen", "rejected"]
    contains(imported, {"datasets": [{"path": "a"}, {"path": "b", "columns": kept}]})
    (note,) = noted(imported.no_equal, "no pair is read from `score`")
    assert (note.key, note.line) == ("datasets.1.columns", 5)


NAMES = st.sampled_from([*ROW_COLUMNS, "score", "source", "good"])
FIELDS_OF_AXOLOTL = [f"field_{name}" for name in "chosen rejected prompt system messages input output tools".split()]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.dictionaries(st.sampled_from(FIELDS_OF_AXOLOTL), NAMES),
    kind=st.sampled_from([None, "chat_template.argilla", "chat_template.default", "orpo.chat_template"]),
    columns=st.lists(NAMES, unique=True),
)
def test_columns_of_an_imported_recipe_are_those_of_a_row(read, fields, kind, columns):
    entry = {"path": "a", **fields, **({"type": kind} if kind else {})}
    axolotl = {**yaml.safe_load(AXOLOTL), "datasets": [entry], "test_datasets": [dict(entry)]}  # no alias of YAML
    trl = {"model_name_or_path": "m", "beta": 0.1}
    source = {"columns": columns, "split": "train"}
    configs = {
        "axolotl": axolotl,
        "trl": {**trl, "datasets": [{"path": "a", **source}]},
        "alignment_handbook": {**trl, "dataset_mixture": {"datasets": [{"id": "a", **source}]}},
        "llama_factory": {**yaml.safe_load(LLAMA_FACTORY), "eval_dataset": "b", "eval_strategy": "epoch"},
    }
    assert set(configs) == set(TOOLS)
    for tool, config in configs.items():
        found = read(yaml.safe_dump(config), tool=tool).settings
        sources = [*found.get("datasets", []), *found.get("eval_datasets", {}).values()]
        assert sources or "dataset_name" in found
        for source in sources:
            assert set(source.get("columns") or ()) <= set(ROW_COLUMNS), tool


@pytest.mark.parametrize(
    ("tool", "line"),
    [
        ("axolotl", "flash_attention: true"), ("axolotl", "attn_implementation: flash_attention_2"),
        ("llama_factory", "flash_attn: fa2"), ("llama_factory", "flash_attn: true"),
        ("alignment_handbook", "use_flash_attention_2: true"), ("trl", "attn_implementation: flash_attention_2"),
    ],
)  # fmt: skip
def test_flash_attention_ends_alike_under_all_its_names(read, tool, line):
    text = {"axolotl": AXOLOTL, "llama_factory": LLAMA_FACTORY, "alignment_handbook": HANDBOOK, "trl": TRL}[tool]
    names = ("flash_attention:", "flash_attn:", "use_flash_attention_2:", "attn_implementation:")
    kept = [old for old in text.splitlines() if not old.startswith(names)]
    imported = read("\n".join([*kept, line, ""]), tool=tool)
    key = line.split(":")[0]
    contains(imported, {"attn_implementation": "flash_attention_2"})
    assert imported.became[key] == ("attn_implementation",)
    (note,) = noted(imported.differences, "attention")
    assert (note.text, note.key, note.line) == (FLASH, key, len(kept) + 1)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TRL_OF_A_MODEL + "lora_r: 16\nbnb_4bit_quant_type: fp4\n", {"use_peft": False, "load_in_4bit": False}),
        (TRL_OF_A_MODEL + "eval_steps: 500\n", {"eval_strategy": "no", "eval_steps": 500}),
        (
            TRL_OF_A_MODEL + "model_init_kwargs: {torch_dtype: bfloat16, revision: v2, subfolder: a}\n",
            {"dtype": "bfloat16", "model_revision": "v2", "model_init_kwargs": {"subfolder": "a"}},
        ),
        (TRL_OF_A_MODEL + "model_init_kwargs: {torch_dtype: bfloat16}\n", {"model_init_kwargs": None}),
        (TRL_OF_A_MODEL + "bf16_full_eval: true\n", {"bf16_full_eval": None}),
        (
            "model_name_or_path: a\nstage: orpo\ndataset: x\nfinetuning_type: full\nlora_rank: 8\n",
            {"use_peft": False, "lora_r": 8},
        ),
        ("base_model: a\nrl: orpo\ndatasets: [{path: x}]\nadapter:\nlora_r: 8\nlora_alpha: 16\n", {"use_peft": False}),
    ],
)
def test_settings_that_the_tool_does_not_read_do_not_refuse_the_recipe(read, tmp_path, config, expected):
    from orpo_trl.recipe.parse import build_settings, load_recipe

    imported = read(config)
    contains(imported, expected)
    (tmp_path / "recipe.yaml").write_text(recipe_text(imported, "config.yaml"), encoding="utf-8")
    build_settings(load_recipe([str(tmp_path / "recipe.yaml")]))


def test_other_templates_are_noted(read):
    imported = read("model_name_or_path: m\ndataset_name: d\nbeta: 0.1\nchat_template: '{{ messages }}'\n")
    assert "chat_template_path" not in imported.settings
    assert noted(imported.no_equal, "`chat_template`")


def test_quantisation_of_llama_factory(read):
    contains(
        read(LLAMA_FACTORY + "quantization_bit: 4\n"),
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True},
    )
    contains(read(LLAMA_FACTORY + "quantization_bit: 8\n"), {"load_in_8bit": True})
    contains(read(LLAMA_FACTORY.replace("lora\n", "full\n", 1)), {"dtype": "float32", "lora_r": 8})


# ---- The scripts of ORPO's authors ----


@pytest.mark.parametrize(
    ("script", "recipe"),
    [("run_mistral_orpo_beta.sh", "mistral_beta"), ("run_mistral_orpo_capybara.sh", "mistral_capybara")],
)
def test_name_of_an_authors_script_is_answered_with_its_recipe(tmp_path, script, recipe):
    with pytest.raises(ImportProblem, match=f"{script} is a script of ORPO's authors; .*: orpo-trl recipes {recipe}$"):
        import_recipe(tmp_path / script)


H4, ARGILLA = "HuggingFaceH4/ultrafeedback_binarized", "argilla/ultrafeedback-binarized-preferences-cleaned"
CAPYBARA = "argilla/distilabel-capybara-dpo-7k-binarized"


@pytest.mark.parametrize("name", ["mine.sh", "mine"])
@pytest.mark.parametrize(
    ("model", "dataset", "recipe"),
    [
        ("mistralai/Mistral-7B-v0.1", ARGILLA, "mistral_beta"),
        ("mistralai/Mistral-7B-v0.1", H4, "mistral_alpha"),
        ("mistralai/Mistral-7B-v0.1", CAPYBARA, "mistral_capybara"),
        ("facebook/opt-350m", "Anthropic/hh-rlhf", "opt_350m_hh_rlhf"),
        ("microsoft/phi-2", H4, "phi2_ultrafeedback"),
        ("meta-llama/Llama-2-7b-hf", H4, "llama2_7b_ultrafeedback"),
    ],
)
def test_authors_script_of_any_name_is_answered_by_its_model_and_dataset(read, name, model, dataset, recipe):
    text = AUTHORS_SCRIPT.replace("mistralai/Mistral-7B-v0.1", model).replace(ARGILLA, dataset)
    with pytest.raises(ImportProblem, match=f"{name} is a script of ORPO's authors; .*: orpo-trl recipes {recipe}$"):
        read(text, name)
    with pytest.raises(ImportProblem, match=f"orpo-trl recipes {recipe}$"):
        read(
            text.replace("#!/bin/bash", f"MODEL='{model}'").replace(f"--model_name {model}", '--model_name "$MODEL"'),
            name,
        )


def test_authors_script_without_a_recipe_names_none(read):
    """Their script for OPT-1.3B, whose dataset, lengths and epochs are those of no recipe."""
    text = AUTHORS_SCRIPT.replace("mistralai/Mistral-7B-v0.1", "facebook/opt-1.3b")
    with pytest.raises(ImportProblem, match="no shipped recipe trains its model on its dataset; take the nearest"):
        read(text, "run_orpo.sh")


def test_script_of_something_else_is_no_authors_script(read):
    with pytest.raises(ImportProblem, match=r"run\.sh: a config is a mapping of keys to values, received text"):
        read("python train.py\n", "run.sh")


# ---- Refusals ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "received nothing"),
        ("- rl: orpo\n", "received a list"),
        ("rl: [\n", "not YAML"),
        ("rl: orpo\nrl: orpo\n", ":2: `rl` stands here and in line 1"),
        ("rl: orpo\ntrl:\n  beta: 1\n  beta: 2\n", ":4: `beta` stands here and in line 3"),
        ("rl: !!python/name:os.system\n", ":1: the tag tag:yaml.org,2002:python/name:os.system is not read"),
        ("a: &x 1\nb: *x\n", ":2: not YAML: aliases"),
        ("colour: red\n", "no tool is recognised"),
        ("colour: red\n", "axolotl: rl, base_model"),
        ("nll_scope: sequence\nmodel_name_or_path: m\n", "already a recipe of orpo-trl"),
        ("base_model: m\nrl: dpo\n", "not an ORPO config of axolotl: expected `rl: orpo`, found `rl: dpo`"),
        ("base_model: m\n", "found no `rl`"),
        (
            "stage: dpo\npref_loss: simpo\n",
            "expected `stage: dpo` with `pref_loss: orpo`, found `stage: dpo` and `pref_loss: simpo`",
        ),
        ("stage: sft\n", "found `stage: sft` and no `pref_loss`"),
        ("model_name_or_path: m\n", "expected `beta`"),
        ("model_name_or_path: m\nbeta: 0.1\nloss_type: sigmoid\n", "found `loss_type`, a key of DPO's"),
        (
            "base_model: m\nrl: orpo\ndatasets: rows.jsonl\n",
            ":3: `datasets`: expected a list of datasets, received 'rows.jsonl'",
        ),
        ("base_model: m\nrl: orpo\ndatasets:\n- split: train\n", "`datasets`: dataset 0 has no `path`"),
        ("stage: orpo\ndataset: d\npref_beta: high\n", ":3: `pref_beta`: expected a number, received 'high'"),
        ("stage: orpo\nmodel_name_or_path: m\n", "`dataset`: expected names of datasets, found none"),
    ],
)
def test_config_of_something_else_is_refused_by_what_was_expected_and_found(read, text, message):
    with pytest.raises(ImportProblem) as error:
        read(text)
    assert message in str(error.value)
    assert "config.yaml" in str(error.value)


def test_missing_file_and_unknown_tool_are_named(tmp_path):
    with pytest.raises(ImportProblem, match=r"absent.yaml does not exist"):
        import_recipe(tmp_path / "absent.yaml")
    with pytest.raises(ImportProblem, match="cannot be read"):
        import_recipe(tmp_path)
    with pytest.raises(ImportProblem, match="unknown tool 'unsloth'; expected one of axolotl, llama_factory"):
        import_recipe(tmp_path, "unsloth")


def test_named_tool_wins_over_the_detected_one(read):
    assert read(TRL + "use_flash_attention_2: true\n").tool == "alignment-handbook"
    assert read(TRL + "use_flash_attention_2: true\n", tool="trl").tool == "TRL"
    with pytest.raises(ImportProblem, match="not an ORPO config of axolotl"):
        read(TRL, tool="axolotl")


def test_tokens_are_never_carried_over(read):
    imported = read(TRL + "hub_token: hf_secret\nhf_hub_token: hf_secret\n")
    assert "hf_secret" not in recipe_text(imported, "trl.yaml")


# ---- Tables ----


def test_sections_and_refused_keys_are_all_keys_of_ours():
    newer = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # early transformers 5 has not these keys
    assert OURS - newer <= FIELDS
    assert set(REFUSED) == FIELDS - OURS
    assert MEANINGLESS.items() <= REFUSED.items()
    assert sum(map(len, SECTIONS.values())) == len(OURS)


def test_foreign_keys_name_ours_and_are_none_of_ours():
    assert not set(FOREIGN_KEYS) & FIELDS
    assert {ours for ours, _ in FOREIGN_KEYS.values()} - {None} <= FIELDS
    assert all(advice for _, advice in FOREIGN_KEYS.values())
    expected = {
        "pref_beta": "beta", "orpo_beta": "beta", "orpo_alpha": "beta", "rl_beta": "beta", "alpha": "beta",
        "torch_dtype": "dtype", "cutoff_len": "max_length", "sequence_len": "max_length",
        "micro_batch_size": "per_device_train_batch_size", "prompt_max_length": "max_prompt_length",
        "response_max_length": "max_length", "dataset_mixer": "datasets", "dataset_mixture": "datasets",
        "base_model": "model_name_or_path", "lora_rank": "lora_r", "lora_target": "lora_target_modules",
        "warmup_ratio": "warmup_steps", "evaluation_strategy": "eval_strategy", "sample_packing": None,
    }  # fmt: skip
    assert {key: FOREIGN_KEYS[key][0] for key in expected} == expected
    assert FOREIGN_KEYS["pref_beta"][1] == "LLaMA-Factory's name"


def test_tables_of_a_tool_do_not_overlap():
    for tool in TOOLS.values():
        tables = [set(tool.renamed), set(tool.converted), set(tool.dropped)]
        assert sum(map(len, tables)) == len(set.union(*tables)), tool.id
        assert set(tool.renamed.values()) <= OURS, tool.id
        assert tool.switches <= set(tool.dropped), tool.id


def test_importing_needs_neither_torch_nor_transformers():
    code = "import sys, orpo_trl.importers; print({'torch', 'transformers', 'trl', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_lines_of_nested_keys_are_those_of_the_file(tmp_path):
    config = read_yaml(tmp_path / "x.yaml", "a:\n- b: 1\n  c:\n    d: 2\n")
    assert config.line("a", 0, "c", "d") == 4
    assert config.line("a", 0, "nowhere") == 2
    assert config.line("nowhere") is None
