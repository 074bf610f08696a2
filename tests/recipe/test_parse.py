import re
from dataclasses import replace

import pytest
from support.recipes import parse_recipe

from orpo_trl import ORPOConfig
from orpo_trl.paths import RECIPES
from orpo_trl.recipe.files import COMMAND_LINE, Place, RecipeError
from orpo_trl.recipe.parse import build_settings, load_recipe
from orpo_trl.recipe.show import expanded


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)


BASE = "model_name_or_path: m\ndataset_name: rows.jsonl\noutput_dir: out\nbf16: false\n"


def problems_of(*arguments):
    with pytest.raises(RecipeError) as error:
        parse_recipe(list(arguments))
    return [re.sub(r"^/\S*/", "", str(problem)) for problem in error.value.problems]


def test_override_wins_over_recipe_wins_over_default(tmp_path):
    recipe = write(tmp_path, BASE + "beta: 0.3\nmax_length: 99\n")
    model, data, training = parse_recipe([recipe, "--max_length", "77", "--dataset_name=other.jsonl"])
    assert (training.beta, training.max_length, training.learning_rate) == (0.3, 77, 5e-6)
    assert data.dataset_name == "other.jsonl"
    assert model.from_scratch is False


@pytest.mark.parametrize(("value", "expected"), [("true", True), ("false", False), ("out/checkpoint-3",) * 2])
def test_resume_finds_the_latest_checkpoint_or_takes_a_folder(tmp_path, value, expected):
    recipe = write(tmp_path, BASE)
    assert parse_recipe([recipe, "--resume_from_checkpoint", value])[2].resume_from_checkpoint == expected


def test_overrides_in_all_their_forms(tmp_path):
    recipe = write(tmp_path, BASE + "datasets: [{path: a}, {path: b}]\n")
    model, data, training = parse_recipe([
        recipe, "--learning-rate=1e-5", "--use_peft", "--run_name", "7",
        "--lora_modules_to_save", "lm_head", "embed_tokens", "--lora_target_modules", "[q_proj, v_proj]",
        "--max_steps", "-1", "--dataset_name", "null", "--datasets.1.path", "c", "--datasets.0.weight=2",
        "--lr_scheduler_kwargs", "{num_cycles: 2}", "--model_revision", "123", "--report_to", "none",
    ])  # fmt: skip
    assert (training.learning_rate, training.run_name, training.max_steps) == (1e-5, "7", -1)
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert (model.use_peft, model.model_revision) == (True, "123")
    assert (model.lora_modules_to_save, model.lora_target_modules) == (
        ["lm_head", "embed_tokens"],
        ["q_proj", "v_proj"],
    )
    assert data.datasets == [{"path": "a", "weight": 2}, {"path": "c"}]


def test_mixture(tmp_path):
    text = BASE.replace("dataset_name: rows.jsonl", "datasets:\n- path: a\n  fraction: 0.5\n- path: b\n  fraction: 0.5")
    _, data, _ = parse_recipe([write(tmp_path, text)])
    assert data.datasets == [{"path": "a", "fraction": 0.5}, {"path": "b", "fraction": 0.5}]


def test_all_problems_are_reported_at_once_with_their_lines(tmp_path):
    (tmp_path / "base.yaml").write_text("lerning_rate: 1\nbeta: true\nmax_prompt_length: 0\n")
    text = "extends: base.yaml\nnll_scope: all\nbf16: false\nbf16: false\ndatasets:\n- pat: a\nextend: x\n"
    text += "num_train_epochs: -1\n"
    assert problems_of(write(tmp_path, text), "stray", "--betta", "1") == [
        "recipe.yaml: set `model_name_or_path` to a Hub id or a folder",
        "recipe.yaml:2: `nll_scope`: expected one of sequence, completion, received 'all'",
        "recipe.yaml:4: `bf16` stands here and in line 3; keep one of them",
        "recipe.yaml:6: `datasets.0`: `path` is missing; it has `pat`",
        "recipe.yaml:6: `datasets.0.pat`: unknown key; did you mean `path`?",
        "recipe.yaml:7: unknown key `extend`; did you mean `extends`?",
        "recipe.yaml:8: `num_train_epochs` must be above 0, got -1.0",
        "base.yaml:1: unknown key `lerning_rate`; did you mean `learning_rate`?",
        "base.yaml:2: `beta`: expected a finite number, received true",
        "base.yaml:3: `max_prompt_length` must be 1 or more tokens, or None for no limit, got 0",
        "command line: expected `--key value`, received 'stray'",
        "command line: unknown key `betta`; did you mean `beta`?",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("beta: -1\n", "recipe.yaml:5: `beta` must be a finite number >= 0, got -1"),
        ("load_best_model_at_end: true\n", "recipe.yaml:5: --load_best_model_at_end requires"),
        ("eval_strategy: steps\ntest_split_size: 0\n", "recipe.yaml:6: `test_split_size` must be above 0, got 0"),
        ("datasets: [{path: a}]\n", "recipe.yaml:2: Set one of `dataset_name` and `datasets`; received both"),
        ("deepspeed: zero33\n", "recipe.yaml:5: `deepspeed`: did you mean zero3? expected zero2, zero3 or"),
        ("hub_token: hf_secret\n", "recipe.yaml:5: `hub_token`: this is no place for a token"),
        ("seed: 99999999999\n", "recipe.yaml:5: `seed` must be from 0 to 2^32 - 1, got 99999999999"),
        ('"5": 1\n', "recipe.yaml:5: unknown key `5`"),
        (
            "eval_strategy: epoch\nsave_strategy: epoch\nload_best_model_at_end: true\neval_datasets: {a: {path: b}}\n",
            "recipe.yaml:8: `metric_for_best_model`: with `eval_datasets`, expected a metric of one",
        ),
        ("packing: true\n", "recipe.yaml:5: `packing` has no meaning for preference pairs"),
        # The line is that of the key, not of a key whose name stands in the sentence.
        ("max_length: 9\nmax_prompt_length: 0\n", "recipe.yaml:6: `max_prompt_length` must be 1 or more tokens"),
        ("test_split_size: 0.1\neval_strategy: epoch\neval_datasets: {a: {path: b}}\n", "recipe.yaml:5: Set one of"),
        ("lora_r: 64\n", "recipe.yaml:5: `lora_r` is for adapters: set `use_peft: true`, or"),
        ("lora_r: 16\n", "recipe.yaml:5: `lora_r` is for adapters"),  # the default
        ("use_dora: true\n", "recipe.yaml:5: `use_dora` is for adapters"),
        ("bnb_4bit_quant_type: fp4\n", "recipe.yaml:5: `bnb_4bit_quant_type` is for weights of 4 bits: set `load_in"),
        ("eval_steps: 50\n", "recipe.yaml:5: `eval_steps` is read with `eval_strategy: steps`, and that is no"),
        (
            "generate_during_eval: true\n",
            "recipe.yaml:5: `generate_during_eval` is read with `eval_strategy: steps or",
        ),
        ("model_init_kwargs: {torch_dtype: float16}\n", "recipe.yaml:5: `model_init_kwargs`: set `dtype` in place of"),
        ("model_init_kwargs: {revision: a}\n", "recipe.yaml:5: `model_init_kwargs`: set `model_revision` in place of"),
    ],
)
def test_values_that_do_not_fit_are_named_with_their_line(tmp_path, text, found):
    assert problems_of(write(tmp_path, BASE + text))[0].startswith(found)


@pytest.mark.parametrize("line", ["model_nam_or_path: m", "base_model: m", "model_name_or_path: [m]"])
def test_model_under_a_wrong_key_or_of_a_wrong_type_is_not_reported_as_missing(tmp_path, line):
    (problem,) = problems_of(write(tmp_path, BASE.replace("model_name_or_path: m", line)))
    assert "model_name_or_path" in problem


def test_problems_carry_their_keys_and_places(tmp_path):
    recipe = write(tmp_path, BASE + "beta: -1\ndatasets: [{pat: a}]\n")
    with pytest.raises(RecipeError) as error:
        parse_recipe([recipe, "--betta", "1"])
    assert {problem.path: problem.place for problem in error.value.problems} == {
        ("beta",): Place(recipe, 5),
        ("datasets", 0): Place(recipe, 6),
        ("datasets", 0, "pat"): Place(recipe, 6),
        ("betta",): COMMAND_LINE,
    }


def test_whole_numbers_stay_whole_in_the_recipe_of_a_run(tmp_path):
    """The config classes take 5.0 for 5 where they want a float."""
    text = "logging_steps: 5\nnum_train_epochs: 3\nwarmup_steps: 0.1\nmax_length: 1e3\nbeta: 1\n"
    text += "datasets: [{path: a, weight: 2}, {path: b, weight: 0.5}]\n"
    recipe = load_recipe([write(tmp_path, BASE.replace("dataset_name: rows.jsonl\n", "") + text), "--save_steps", "7"])
    shown = expanded(recipe)
    for line in ("logging_steps: 5 ", "num_train_epochs: 3 ", "warmup_steps: 0.1 ", "max_length: 1000 ", "beta: 1 ",
                 "save_steps: 7 ", "  weight: 2\n", "  weight: 0.5\n"):  # fmt: skip
        assert f"\n{line}" in shown
    training = build_settings(recipe)[2]
    assert type(training.num_train_epochs) is float


def test_token_comes_from_the_environment_and_is_in_no_message(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hf_secret")
    recipe = write(tmp_path, BASE + "hub_token: ${SOME_TOKEN}\n")
    assert parse_recipe([recipe])[2].hub_token == "hf_secret"
    for text in ("hub_token: hf_secret\n", "hub_token: ${SOME_TOKEN}\nbeta: -1\n", "hub_token: [hf_secret]\n"):
        assert "hf_secret" not in str(problems_of(write(tmp_path, BASE + text)))
    assert "hf_secret" not in str(problems_of(write(tmp_path, BASE), "--hub_token", "hf_secret"))


@pytest.mark.parametrize("arguments", [[], ["--beta", "1"]])
def test_recipe_comes_first(arguments):
    assert problems_of(*arguments) == ["command line: name a recipe first, such as recipes/quickstart.yaml"]


def test_environment_variable_is_named_and_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hf_secret")
    text = "learning_rate: ${SOME_TOKEN}\ndeepspeed: ${SOME_TOKEN}\ndatasets: [{path: a, weight: '${SOME_TOKEN}'}]\n"
    reported = str(problems_of(write(tmp_path, BASE + text)))
    assert "hf_secret" not in reported
    assert reported.count("${SOME_TOKEN}") == 3


def test_labels_with_dashes_keep_them(tmp_path):
    recipe = write(tmp_path, BASE + "eval_strategy: epoch\neval_datasets: {a-b: {path: x}}\n")
    assert parse_recipe([recipe, "--eval-datasets.a-b.path", "y"])[1].eval_datasets == {"a-b": {"path": "y"}}


@pytest.mark.parametrize("text", ["", "- a\n", "a: [\n", "extends: absent.yaml\n", "extends: recipe.yaml\n"])
def test_key_that_an_unread_file_may_set_is_not_reported_as_missing(tmp_path, text):
    assert len(problems_of(write(tmp_path, text))) == 1


def test_abbreviated_override_is_unknown(tmp_path):
    assert problems_of(write(tmp_path, BASE), "--bet", "1") == ["command line: unknown key `bet`; did you mean `beta`?"]


def test_shipped_files_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, data, _ = parse_recipe(["quickstart"])
    for path in (model.model_name_or_path, data.dataset_name):
        assert str(path).startswith(str(RECIPES))


def test_deepspeed_override(tmp_path):
    recipe = write(tmp_path, BASE + "deepspeed: zero3\n")
    for arguments in (["--deepspeed", "zero2"], ["--deepspeed=zero2"], ["--deepspeed", "null"], []):
        assert not parse_recipe([recipe, *arguments])[2].deepspeed  # one process has nothing to shard


@pytest.mark.parametrize(
    ("lines", "strategy"),
    [
        ("test_split_size: 10\n", "epoch"),
        ("eval_datasets: {a: {path: rows.jsonl}}\n", "epoch"),
        ("test_split_size: 10\neval_strategy: steps\neval_steps: 5\n", "steps"),
        ('test_split_size: 10\neval_strategy: "no"\n', "no"),
        ('eval_strategy: "no"\ntest_split_size: 10\n', "no"),
        ("test_split_size: 10\neval_steps: 5\n", "steps"),
        ("test_split_size: 10\nload_best_model_at_end: true\n", "steps"),
        ("test_split_size: 10\nload_best_model_at_end: true\nsave_strategy: epoch\n", "epoch"),
        ("", "no"),
    ],
)
def test_rows_to_evaluate_on_are_evaluated(tmp_path, lines, strategy):
    (tmp_path / "recipe.yaml").write_text(f"model_name_or_path: m\ndataset_name: rows.jsonl\n{lines}")
    _, data, training = parse_recipe([str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path)])
    assert training.eval_strategy == strategy
    assert bool(data.test_split_size or data.eval_datasets) == bool(lines)


def test_rows_named_later_turn_evaluation_on_over_a_recipe_that_has_none(tmp_path):
    """All recipes of the paper's checkpoints have none."""
    output = ["--output_dir", str(tmp_path)]
    assert parse_recipe(["mistral_beta", *output])[2].eval_strategy == "no"
    assert parse_recipe(["mistral_beta", "--test_split_size", "0.02", *output])[2].eval_strategy == "epoch"
    both = ["--test_split_size", "0.02", "--eval_strategy", "no"]
    assert parse_recipe(["mistral_beta", *both, *output])[2].eval_strategy == "no"
    (tmp_path / "child.yaml").write_text("extends: mistral_beta.yaml\neval_datasets: {a: {path: rows.jsonl}}\n")
    assert parse_recipe([str(tmp_path / "child.yaml"), *output])[2].eval_strategy == "epoch"
    assert parse_recipe([str(tmp_path / "child.yaml"), "--eval_strategy", "no", *output])[2].eval_strategy == "no"


def test_keys_of_a_parent_that_a_child_has_no_use_for_are_left_alone(tmp_path):
    lora = "use_peft: true\nlora_r: 64\nsave_strategy: 'no'\nsave_steps: 5\nload_best_model_at_end: false\n"
    recipe = write(tmp_path, BASE + lora)
    assert not parse_recipe([recipe, "--use_peft", "false"])[0].use_peft
    child = tmp_path / "child.yaml"
    child.write_text("extends: recipe.yaml\nuse_peft: false\nlora_dropout: 0.1\n")
    assert not parse_recipe([str(child)])[0].use_peft
    assert "`lora_alpha` is for adapters" in problems_of(str(child), "--lora_alpha", "8")[0]
    for strategy in ("logging", "eval", "save"):
        given = [f"--{strategy}_strategy", "epoch", f"--{strategy}_steps", "5"]
        assert f"`{strategy}_steps` is read with `{strategy}_strategy: steps`, and that is epoch" in " ".join(
            problems_of(recipe, *given)
        )
    assert problems_of(recipe, "--save_steps", "10") == [
        "command line: `save_steps` is read with `save_strategy: steps`, and that is no"
    ]
    assert "`load_best_model_at_end` is read with `save_strategy: steps or epoch`, and that is no" in " ".join(
        problems_of(recipe, "--load_best_model_at_end")
    )


@pytest.mark.parametrize(
    ("asked", "line", "is_refused"),
    [
        ("bf16", "bf16: false", True), ("bf16", "bf16: true", False), ("bf16", "fp16: true", True),
        ("bf16", "fp16: false", False), ("fp16", "bf16: true", True), ("fp16", "bf16: false", True),
        ("fp16", "fp16: true", False),
        ("fp8", "bf16: true", True), ("fp8", "bf16: false", False), ("no", "bf16: true", False), ("bf16", "", False),
    ],
)  # fmt: skip
def test_precision_of_accelerates_config_must_be_that_of_the_recipe(tmp_path, monkeypatch, asked, line, is_refused):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    recipe = write(tmp_path, BASE.replace("bf16: false", line) + "use_cpu: true\n")
    if is_refused:
        (problem,) = problems_of(recipe)
        assert f"accelerate's config asks for `mixed_precision: {asked}`, and the recipe for `{line}`" in problem
    else:
        parse_recipe([recipe])


@pytest.mark.skipif(not hasattr(ORPOConfig, "activation_checkpointing"), reason="this transformers has one name for it")
def test_two_names_of_one_setting_that_differ_are_refused(tmp_path):
    recipe = write(tmp_path, BASE + "activation_checkpointing: true\n")
    (problem,) = problems_of(recipe, "--gradient_checkpointing", "false")
    assert "`gradient_checkpointing` and `activation_checkpointing` are two names of one setting" in problem
    parse_recipe([recipe, "--gradient_checkpointing", "true"])
    # In Python, a copy with one of them changed has both.
    assert not replace(ORPOConfig("out", use_cpu=True), activation_checkpointing=False).gradient_checkpointing
