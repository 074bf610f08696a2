"""Makes recipes/README.md from the headers of the recipes.

    python scripts/make_recipes_readme.py

Run it after a change of a header; a test compares the two.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from orpo_trl.paths import RECIPES
from orpo_trl.recipe.library import FIELDS, RecipeHeader, shipped_recipes

# Sections of recipes/README.md, in its order.
GROUPS = {
    "Quickstart": ("quickstart",),
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


def main() -> None:
    (RECIPES / "README.md").write_text(readme(shipped_recipes()), encoding="utf-8")


if __name__ == "__main__":
    main()
