"""Each shipped recipe against the figures that the paper, the authors' code and the model cards state."""

import json

import pytest
import yaml
from helpers import REPOSITORY
from jinja2 import Environment, TemplateError

from orpo_trl.recipe import parse_recipe

RECIPES = REPOSITORY / "recipes"

# beta, epochs, warm-up steps, optimizer, dataset, train split
PAPER = {
    "mistral_alpha": (0.1, 5, 200, "adamw_torch", "HuggingFaceH4/ultrafeedback_binarized", "train_prefs"),
    "mistral_beta": (0.1, 5, 200, "adamw_torch", "argilla/ultrafeedback-binarized-preferences-cleaned", "train"),
    "mistral_capybara": (0.05, 3, 100, "adamw_bnb_8bit", "argilla/distilabel-capybara-dpo-7k-binarized", "train"),
}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_is_read_whole_and_headed_by_its_command(path, monkeypatch, tmp_path):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    parse_recipe([str(path), "--output_dir", str(tmp_path)])
    text = path.read_text(encoding="utf-8")
    assert f"accelerate launch scripts/run_orpo.py recipes/{path.name}" in text
    for word in ("Hardware:", "Expect:"):
        assert word in text
    keys = list(yaml.safe_load(text))
    assert (
        len(keys)
        == len(set(keys))
        == text.count("\n") - sum(line.startswith("#") or not line.strip() for line in text.splitlines())
    )


@pytest.mark.parametrize("name", PAPER)
def test_figures_of_the_published_checkpoints(name, tmp_path):
    beta, epochs, warmup, optimizer, dataset, split = PAPER[name]
    model, data, training = parse_recipe([str(RECIPES / f"{name}.yaml"), "--output_dir", str(tmp_path)])
    assert model.model_name_or_path == "mistralai/Mistral-7B-v0.1"
    assert (data.dataset_name, data.dataset_train_split) == (dataset, split)
    assert (training.beta, training.num_train_epochs, training.warmup_steps) == (beta, epochs, warmup)
    assert (training.learning_rate, training.lr_scheduler_type) == (5e-6, "inverse_sqrt")
    assert (training.max_prompt_length, training.max_length) == (1792, 2048)
    assert training.per_device_train_batch_size * 4 * training.gradient_accumulation_steps == 32
    assert training.optim == optimizer
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (training.weight_decay, training.max_grad_norm, training.seed) == (0.0, 1.0, 42)
    assert (training.bf16, training.gradient_checkpointing) == (True, True)
    assert (training.nll_scope, training.nll_reduction) == ("sequence", "micro_batch_mean")
    assert yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["deepspeed"] == "zero3"


@pytest.mark.parametrize("name", PAPER)
def test_every_value_says_where_it_comes_from(name):
    lines = (RECIPES / f"{name}.yaml").read_text().split("# ---- Logs")[0].splitlines()
    own = {"dtype", "gradient_accumulation_steps", "dataset_test_split"}
    for line in lines:
        if line and not line.startswith("#") and line.split(":")[0] not in own:
            assert "stated" in line or "inferred" in line, line


def test_template_is_the_papers():
    environment = Environment()
    environment.globals["raise_exception"] = raise_exception
    template = environment.from_string((RECIPES / "templates" / "orpo.jinja").read_text())
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    text = template.render(messages=messages, eos_token="</s>")
    assert text == "<|system|>\ns</s>\n<|user|>\nq</s>\n<|assistant|>\na</s>\n"
    prompt = template.render(messages=messages[:2], eos_token="</s>", add_generation_prompt=True)
    assert prompt == "<|system|>\ns</s>\n<|user|>\nq</s>\n<|assistant|>\n"
    assert text.startswith(prompt)
    with pytest.raises(TemplateError, match="not human"):
        template.render(messages=[{"role": "human", "content": "q"}], eos_token="</s>")


def raise_exception(message):
    raise TemplateError(message)


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_engine_config_is_one_that_accelerate_reads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.distributed_type in ("DEEPSPEED", "FSDP")
    assert f"--config_file recipes/accelerate/{path.name}" in path.read_text()


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_config(stage):
    config = json.loads((RECIPES / "deepspeed" / f"zero{stage}.json").read_text())
    assert config["zero_optimization"]["stage"] == stage


def test_quickstart_files_are_what_the_script_makes(tmp_path):
    """So that nobody edits one and not the other."""
    import runpy
    import shutil

    script = tmp_path / "recipes" / "quickstart" / "make.py"
    shutil.copytree(RECIPES / "templates", tmp_path / "recipes" / "templates")
    script.parent.mkdir()
    shutil.copy(RECIPES / "quickstart" / "make.py", script)
    runpy.run_path(str(script), run_name="__main__")
    made = [path.relative_to(script.parent) for path in script.parent.rglob("*") if path.is_file()]
    assert len(made) == 7
    for name in made:
        assert (RECIPES / "quickstart" / name).read_bytes() == (script.parent / name).read_bytes(), name
