"""Each shipped recipe against the figures in the paper, the authors' code and the model cards."""

import json
import re
from typing import NamedTuple

import pytest
import yaml
from jinja2 import Environment, TemplateError
from support.recipes import parse_recipe
from support.small import REPOSITORY

from orpo_trl.recipe.library import read_header
from orpo_trl.recipe.parse import load_recipe

RECIPES = REPOSITORY / "recipes"
PATHS = sorted(RECIPES.glob("*.yaml"))
H4, ARGILLA = "HuggingFaceH4/ultrafeedback_binarized", "argilla/ultrafeedback-binarized-preferences-cleaned"
CAPYBARA, TRL_LIB = "argilla/distilabel-capybara-dpo-7k-binarized", "trl-lib/ultrafeedback_binarized"


class Figures(NamedTuple):
    """`splits` are those to train and to evaluate on; `batch` is GPUs, pairs per GPU, accumulation steps."""

    model: str
    dataset: str
    splits: tuple[str, str | None]
    beta: float
    learning_rate: float
    schedule: str
    warmup: float
    epochs: float
    lengths: tuple[int | None, int | None]
    batch: tuple[int, int, int]
    optim: str
    nll: str
    deepspeed: str | None


MISTRAL, LLAMA, QWEN = "mistralai/Mistral-7B-v0.1", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-8B-Base"
PREFS, NO_TEST, TEST, HELD_OUT = ("train_prefs", "test_prefs"), ("train", None), ("train", "test"), ("train", "rows")
ALPHA = Figures(
    MISTRAL, H4, PREFS, 0.1, 5e-6, "inverse_sqrt", 200, 5, (1792, 2048), (4, 8, 1), "adamw_torch_fused",
    "micro_batch_mean", "zero3",
)  # fmt: skip
BETA = ALPHA._replace(dataset=ARGILLA, splits=NO_TEST)
CAPYBARA_7K = BETA._replace(dataset=CAPYBARA, beta=0.05, warmup=100, epochs=3, optim="adamw_bnb_8bit")
# Appendix C of the paper: AdamW, 8e-6, cosine, 10 epochs, prompts over 1,024 tokens dropped, that is from 1,025 on.
LLAMA_2 = ALPHA._replace(
    model="meta-llama/Llama-2-7b-hf", beta=0.2, learning_rate=8e-6, schedule="cosine", epochs=10, lengths=(1025, 2048)
)
PHI_2 = LLAMA_2._replace(model="microsoft/phi-2", beta=0.25, warmup=100, batch=(2, 4, 1), deepspeed="zero2")
# Not published; beta and learning rate are within what the authors advise, 0.05 to 0.1 and 5e-6 to 2e-5.
LLAMA_8B = Figures(
    LLAMA, ARGILLA, HELD_OUT, 0.1, 1e-5, "cosine", 0.1, 1, (1792, 2048), (1, 4, 8), "adamw_bnb_8bit",
    "token_mean", "zero3",
)  # fmt: skip
QWEN_8B = LLAMA_8B._replace(model=QWEN, dataset=TRL_LIB, splits=TEST)
# The authors advise 0.5 to 1.0 for small models, and 5e-6 to 2e-5.
FRIENDLY = Figures(
    "HuggingFaceTB/SmolLM2-135M-Instruct", "recipes/friendly/data", TEST, 0.5, 2e-5, "cosine", 5, 1, (None, 256),
    (1, 8, 1), "adamw_torch_fused", "token_mean", None,
)  # fmt: skip
FIGURES = {
    "mistral_alpha": ALPHA,
    "mistral_beta": BETA,
    "mistral_capybara": CAPYBARA_7K,
    "mistral_alpha_released": ALPHA._replace(nll="max_length"),
    "mistral_beta_released": BETA._replace(nll="max_length"),
    "mistral_capybara_released": CAPYBARA_7K._replace(nll="max_length"),
    "opt_350m_hh_rlhf": PHI_2._replace(
        model="facebook/opt-350m", dataset="Anthropic/hh-rlhf", splits=TEST, beta=1.0, lengths=(1024, 1024)
    ),
    "phi2_ultrafeedback": PHI_2,
    "llama2_7b_ultrafeedback": LLAMA_2,
    "zephyr_141b": CAPYBARA_7K._replace(model="mistral-community/Mixtral-8x22B-v0.1", batch=(32, 1, 1)),
    "llama31_8b": LLAMA_8B,
    "qwen3_8b": QWEN_8B,
    # The Llama-3 tutorial.
    "llama31_8b_qlora": Figures(
        LLAMA, "mlabonne/orpo-dpo-mix-40k", HELD_OUT, 0.1, 8e-6, "linear", 10, 1, (512, 1024), (1, 8, 1),
        "paged_adamw_8bit", "token_mean", None,
    ),
    # axolotl's example, as the tutorial above in micro-batches of 2: the step is the same.
    "qwen3_8b_qlora": QWEN_8B._replace(learning_rate=2e-4, batch=(1, 8, 1), deepspeed=None),
    # The authors advise 0.5 to 1.0 for small models.
    "qwen_0.5b": QWEN_8B._replace(
        model="Qwen/Qwen2.5-0.5B", beta=0.5, learning_rate=2e-5, lengths=(512, 1024), batch=(1, 8, 4),
        optim="adamw_torch_fused", deepspeed="zero2",
    ),
    "quickstart": Figures(
        "recipes/quickstart/model", "recipes/quickstart/data", TEST, 0.5, 3e-3, "cosine", 10, 15,
        (None, 128), (1, 16, 1), "adamw_torch_fused", "token_mean", None,
    ),
    "smollm2_135m": FRIENDLY,
    "smollm2_135m_lora": FRIENDLY._replace(learning_rate=5e-4),
    "smollm2_135m_ultrafeedback": FRIENDLY._replace(dataset=TRL_LIB, lengths=(192, 384)),
}  # fmt: skip
BEST_EPOCH = ["mistral_alpha", "opt_350m_hh_rlhf", "phi2_ultrafeedback", "llama2_7b_ultrafeedback"]
ON_CPU = ["quickstart", "smollm2_135m", "smollm2_135m_lora", "smollm2_135m_ultrafeedback"]
OWN_GPU = ["llama31_8b", "llama31_8b_qlora", "qwen3_8b", "qwen3_8b_qlora", "qwen_0.5b"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)


def parsed(name, tmp_path):
    return parse_recipe([str(RECIPES / f"{name}.yaml"), "--output_dir", str(tmp_path)])


def load_own(name):
    """The file's own values, without its parent's."""
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))


def test_every_recipe_has_its_figures_in_this_file():
    assert set(FIGURES) == {path.stem for path in PATHS}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_recipe_is_read_whole_and_headed_by_its_commands(path, tmp_path):
    parsed(path.stem, tmp_path)
    text = path.read_text(encoding="utf-8")
    assert read_header(path).commands == (
        f"orpo-trl train recipes/{path.name}",
        f"accelerate launch scripts/run_orpo.py recipes/{path.name}",
    )
    keys = list(yaml.safe_load(text))
    assert (
        len(keys)
        == len(set(keys))
        == text.count("\n") - sum(line.startswith("#") or not line.strip() for line in text.splitlines())
    )
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", FIGURES)
def test_recipe_has_the_figures_of_its_sources(name, tmp_path):
    _, data, training = parsed(name, tmp_path)
    settings = load_recipe([str(RECIPES / f"{name}.yaml")]).settings
    test_split = data.dataset_test_split if data.test_split_size is None else "rows"
    gpus = FIGURES[name].batch[0]
    training.split_for(gpus)
    assert FIGURES[name] == Figures(
        settings["model_name_or_path"],
        settings["dataset_name"],
        (data.dataset_train_split, test_split if training.eval_strategy != "no" else None),
        training.beta,
        training.learning_rate,
        training.lr_scheduler_type,
        training.warmup_steps,
        training.num_train_epochs,
        (training.max_prompt_length, training.max_length),
        (gpus, training.per_device_train_batch_size, training.gradient_accumulation_steps),
        training.optim,
        training.nll_reduction,
        settings.get("deepspeed"),
    )
    assert training.nll_scope == "sequence"
    assert training.seed == 42


@pytest.mark.parametrize("name", [name for name in FIGURES if name not in ON_CPU])
def test_comment_on_the_batch_multiplies_out(name):
    gpus, per_gpu, accumulation = FIGURES[name].batch
    text = (RECIPES / (load_own(name).get("extends") or f"{name}.yaml")).read_text(encoding="utf-8")
    unit = "GPU" if gpus == 1 else "GPUs"
    whole = f"global_batch_size: {gpus * per_gpu * accumulation} "
    assert any(
        line.startswith(whole) and f": {per_gpu} x {gpus} {unit} x {accumulation};" in line
        for line in text.splitlines()
    )


@pytest.mark.parametrize("name", [name for name in FIGURES if name not in (*OWN_GPU, *ON_CPU)])
def test_published_experiments_share_the_optimiser_and_the_precision(name, tmp_path):
    _, _, training = parsed(name, tmp_path)
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (training.weight_decay, training.max_grad_norm) == (0.0, 1.0)
    assert (training.bf16, training.gradient_checkpointing) == (True, True)
    assert str(training.chat_template_path).endswith("recipes/templates/orpo.jinja")
    gpus, per_gpu, accumulation = FIGURES[name].batch
    assert gpus * per_gpu * accumulation == (8 if FIGURES[name].deepspeed == "zero2" else 32)


@pytest.mark.parametrize("name", ["mistral_alpha", "mistral_beta", "mistral_capybara"])
def test_as_released_differs_in_nothing_but_what_the_released_weights_differ_in(name):
    expected = {
        "extends": f"{name}.yaml",
        "nll_reduction": "max_length",
        "output_dir": f"outputs/{name}_released",
    }
    if name == "mistral_capybara":  # the multi-turn one
        expected["prompt_turns"] = "first"
    assert load_own(f"{name}_released") == expected
    assert "prompt_turns" not in load_own(name)


@pytest.mark.parametrize("name", BEST_EPOCH)
def test_epoch_of_lowest_evaluation_loss_is_kept(name, tmp_path):
    _, _, training = parsed(name, tmp_path)
    assert (training.eval_strategy, training.save_strategy) == ("epoch", "epoch")
    assert (training.load_best_model_at_end, training.metric_for_best_model) == (True, "eval_loss")
    assert training.greater_is_better is False


def test_paper_trains_opt_on_rendered_dialogues_and_with_dropout(tmp_path):
    _, _, training = parsed("opt_350m_hh_rlhf", tmp_path)
    assert training.strings_as_messages
    assert not training.disable_dropout
    assert not parsed("phi2_ultrafeedback", tmp_path)[2].disable_dropout
    assert parsed("mistral_beta", tmp_path)[2].disable_dropout


@pytest.mark.parametrize(("name", "rank", "alpha"), [("llama31_8b_qlora", 16, 32), ("qwen3_8b_qlora", 32, 16)])
def test_qlora_has_the_adapter_of_its_source_and_computes_in_16_bits(name, rank, alpha, tmp_path):
    model, _, _ = parsed(name, tmp_path)
    assert (model.use_peft, model.load_in_4bit, model.dtype) == (True, True, "bfloat16")
    assert (model.lora_r, model.lora_alpha, model.lora_target_modules) == (rank, alpha, "all-linear")


@pytest.mark.parametrize("name", [name for name in FIGURES if name not in ON_CPU])
def test_every_value_says_where_it_comes_from(name):
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    words = ("stated", "chosen here") if name in OWN_GPU else ("stated", "inferred", "chosen here")
    own = {"extends"} if name in OWN_GPU else {"extends", "dtype", "dataset_test_split"}
    for line in text.split("# ---- Logs")[0].splitlines():
        if line and not line.startswith("#") and line.split(":")[0] not in own:
            assert any(word in line for word in words), line


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
def test_accelerate_config_is_one_that_accelerate_reads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.distributed_type in ("DEEPSPEED", "FSDP", "MULTI_GPU", "NO")
    assert f"--config_file recipes/accelerate/{path.name}" in path.read_text()


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_config(stage):
    config = json.loads((RECIPES / "deepspeed" / f"zero{stage}.json").read_text())
    assert config["zero_optimization"]["stage"] == stage


def test_friendly_pairs_are_what_the_script_makes(tmp_path):
    import runpy
    import shutil

    script = tmp_path / "make.py"
    shutil.copy(RECIPES / "friendly" / "make.py", script)
    runpy.run_path(str(script), run_name="__main__")
    rows = {}
    for name in ("train.jsonl", "test.jsonl"):
        kept, anew = ((folder / "data" / name).read_text() for folder in (RECIPES / "friendly", tmp_path))
        assert kept == anew
        rows[name] = [json.loads(line) for line in anew.splitlines()]
    prompts = [{row["prompt"][0]["content"] for row in part} for part in rows.values()]
    assert not prompts[0] & prompts[1]


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
    version = re.compile(rb'"transformers_version": "[^"]*"')  # of whoever ran the script
    for name in made:
        kept, anew = (
            version.sub(b"", (folder / name).read_bytes()) for folder in (RECIPES / "quickstart", script.parent)
        )
        assert kept == anew, name
