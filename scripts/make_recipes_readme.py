"""Makes `Memory:` in the headers of the recipes, and recipes/README.md from the headers.

    python scripts/make_recipes_readme.py

Run it after a change of a recipe; tests compare what it makes with the files.
"""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedConfig

from orpo_trl.activations import MicroBatch
from orpo_trl.memory import MemoryEstimate, Sharding, estimate_memory
from orpo_trl.paths import RECIPES
from orpo_trl.recipe.library import FIELDS, RecipeHeader, shipped_recipes
from orpo_trl.recipe.parse import build_settings, load_recipe

# Sections of recipes/README.md, in its order.
GROUPS = {
    "Quickstart": ("quickstart", "smollm2_135m", "smollm2_135m_lora", "smollm2_135m_ultrafeedback"),
    "The paper's checkpoints": ("mistral_alpha", "mistral_beta", "mistral_capybara"),
    "The checkpoints as they were released": (
        "mistral_alpha_released",
        "mistral_beta_released",
        "mistral_capybara_released",
    ),
    "Other published experiments": (
        "opt_350m_hh_rlhf",
        "phi2_ultrafeedback",
        "llama2_7b_ultrafeedback",
        "zephyr_141b",
    ),
    "Today's models": ("qwen_0.5b", "qwen3_8b", "qwen3_8b_qlora", "llama31_8b", "llama31_8b_qlora"),
}

GIB = 2**30
# What the estimates need of the models' config.json. Written by hand: the Hub was not read. Each gives the number of
# weights that is published of the model.
MODELS = {
    "mistralai/Mistral-7B-v0.1": {
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "facebook/opt-350m": {
        "model_type": "opt", "vocab_size": 50272, "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "word_embed_proj_dim": 512, "do_layer_norm_before": False,
    },
    "microsoft/phi-2": {
        "model_type": "phi", "vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240,
        "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "meta-llama/Llama-2-7b-hf": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "mistral-community/Mixtral-8x22B-v0.1": {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 6144, "intermediate_size": 16384,
        "num_hidden_layers": 56, "num_attention_heads": 48, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "Qwen/Qwen2.5-0.5B": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-8B-Base": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "meta-llama/Llama-3.1-8B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip

_INTRODUCTION = """\
# Recipes

A recipe is a flat YAML file of settings. Either command runs it from the top of a clone of this repository, and
`--key value` overrides a setting:

    orpo-trl train recipes/mistral_beta.yaml
    accelerate launch scripts/run_orpo.py recipes/mistral_beta.yaml --learning_rate 1e-5

Your own recipe can extend another one. The path of the parent is relative to the file, and the values of the file
replace those of the parent:

    extends: mistral_beta.yaml
    learning_rate: 1.0e-5
    output_dir: outputs/mine

Before you rent GPUs, `orpo-trl check recipes/mine.yaml` shows what is wrong with it.

The comment on a value says where the value comes from. Stated: a source gives it. Inferred: no source gives it, and the
header says why it is likely. Chosen here: it is ours. `python scripts/make_recipes_readme.py` makes this file from the
headers of the recipes.
"""


def readme(recipes: Sequence[RecipeHeader]) -> str:
    """The text of recipes/README.md.

    Raises:
        ValueError: with the recipes that `GROUPS` does not list, and those that it lists and do not exist.
    """
    by_name = {recipe.name: recipe for recipe in recipes}
    listed = [name for names in GROUPS.values() for name in names]
    odd = sorted(by_name.keys() ^ set(listed))
    if odd:
        raise ValueError(f"recipes and `GROUPS` of {Path(__file__).name} differ in {', '.join(odd)}")
    table = ["| recipe | reproduces | hardware |", "| --- | --- | --- |"]
    for name in listed:
        fields = by_name[name].fields
        cells = [f"[{name}]({name}.yaml)", *(_first_clause(fields[word]) for word in ("Reproduces", "Hardware"))]
        table.append(f"| {' | '.join(cells)} |")
    sections = []
    for group, names in GROUPS.items():
        sections += [f"## {group}", *(_section(by_name[name]) for name in names)]
    return "\n\n".join([_INTRODUCTION.rstrip(), "\n".join(table), *sections]) + "\n"


def _first_clause(text: str) -> str:
    return re.split(r"[.;:](?=\s|$)", text, maxsplit=1)[0]


def _section(recipe: RecipeHeader) -> str:
    commands = "\n".join(f"    {command}" for command in recipe.commands)
    points = "\n".join(f"- **{word}:** {recipe.fields[word]}" for word in FIELDS if word in recipe.fields)
    return f"### [{recipe.title}]({recipe.name}.yaml)\n\n{commands}\n\n{points}"


def estimate(recipe: RecipeHeader) -> tuple[MemoryEstimate, Sharding] | None:
    """Peak memory of a GPU of the recipe's hardware, as `orpo-trl check` calculates it.

    Each forward pass counts as full: two responses of `max_length` tokens for each pair, and nothing that they share,
    as far as the token budget allows.

    Returns:
        None for a recipe without GPUs.
    """
    count = re.match(r"(\d+|one)\b", recipe.fields["Hardware"])
    # The machine that makes this file may have no GPU for bf16, which the settings would refuse.
    loaded = load_recipe([recipe.name, "--bf16", "false"])
    model_args, _, training = build_settings(loaded, with_engine=False)
    shape = MODELS.get(model_args.model_name_or_path or "")
    if count is None or shape is None:
        return None
    training.bf16 = True
    gpus = 1 if count[1] == "one" else int(count[1])
    sharding = Sharding("single") if gpus == 1 else Sharding(loaded.settings["deepspeed"], gpus, auto_buckets=True)
    pairs, longest = training.per_device_train_batch_size, training.max_length or 0
    budget = training.max_tokens_per_micro_batch
    if budget is not None:
        pairs = min(pairs, max(budget // (2 * longest), 1))
    batch = MicroBatch(rows=2 * pairs, tokens=2 * pairs * longest, longest=longest, is_packed=True)
    config: PreTrainedConfig = CONFIG_MAPPING[shape["model_type"]](**shape, dtype="bfloat16")
    return estimate_memory(config, model_args, training, sharding, batch, "cuda"), sharding


def memory_text(recipe: RecipeHeader) -> str | None:
    """`Memory:` of a recipe's header; None for a recipe without GPUs."""
    made = estimate(recipe)
    if made is None:
        return None
    result, sharding = made
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in result.parts.items() if size >= 0.05 * GIB)
    of_each = "the GPU" if sharding.processes == 1 else f"each of {sharding.processes} GPUs ({sharding.strategy})"
    return (
        f"at most {result.total / GIB:.1f} GiB of {of_each}: {parts}. The estimate of `orpo-trl check` for "
        "micro-batches of the longest pairs, not compared with a GPU yet."
    )


def with_memory(text: str, memory: str | None) -> str:
    """The text of a recipe, whose header says `memory` after its hardware."""
    text = re.sub(r"# Memory: .*?\n#\n", "", text, flags=re.DOTALL)
    if memory is None:
        return text
    lines = textwrap.fill(f"Memory: {memory}", 120, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
    return re.sub(r"(# Hardware: .*?\n#\n)", lambda found: f"{found[0]}{lines}\n#\n", text, count=1, flags=re.DOTALL)


def main() -> None:
    for recipe in shipped_recipes():
        path = RECIPES / f"{recipe.name}.yaml"
        path.write_text(with_memory(path.read_text(encoding="utf-8"), memory_text(recipe)), encoding="utf-8")
    (RECIPES / "README.md").write_text(readme(shipped_recipes()), encoding="utf-8")


if __name__ == "__main__":
    main()
