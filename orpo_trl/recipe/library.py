"""The shipped recipes: what their headers say, and the overview of them in recipes/README.md.

    python -m orpo_trl.recipe.library

writes that file anew. Run it after a change of a recipe's header; a test compares the two.

A header is the comment that a recipe begins with: its title on the first line, the commands that run it indented by
three spaces, and paragraphs that begin with a word of `FIELDS`. An empty comment line ends each of these.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orpo_trl.paths import RECIPES

REQUIRED = ("Reproduces", "Source", "Hardware", "Expect", "Inferred")
FIELDS = (*REQUIRED, "Conflicts", "Needs")

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

A recipe is a flat YAML file of settings. Each runs from the top of a clone of this repository with either command; any
setting can be overridden by `--key value`:

    orpo-trl train recipes/mistral_beta.yaml
    accelerate launch scripts/run_orpo.py recipes/mistral_beta.yaml --learning_rate 1e-5

A recipe of your own can build on another one. The parent's path is relative to the file, and what the file sets
replaces the parent's values:

    extends: mistral_beta.yaml
    learning_rate: 1.0e-5
    output_dir: outputs/mine

Before renting GPUs, `orpo-trl check recipes/mine.yaml` says what is wrong with it.

Every value of a recipe says in its comment whether a source states it, whether it is inferred (nobody wrote it down,
and the header says why it is likely), or whether it is chosen here. This file is made from the headers of the recipes
by `python -m orpo_trl.recipe.library`.
"""


@dataclass(frozen=True)
class RecipeHeader:
    """What the comment at the top of a recipe says.

    Attributes:
        name: of the file, without its ending.
        title: the first line.
        commands: that run the recipe.
        fields: texts of the paragraphs by the word of `FIELDS` that they begin with.
    """

    name: str
    title: str
    commands: tuple[str, ...]
    fields: dict[str, str]


def shipped_recipes() -> list[RecipeHeader]:
    """Headers of the recipes that come with the package, by name."""
    return [read_header(path) for path in sorted(RECIPES.glob("*.yaml"))]


def read_header(path: Path) -> RecipeHeader:
    """The header of the recipe at `path`.

    Raises:
        ValueError: naming the file, and the line at fault or what is missing.
    """
    title, commands, fields = "", [], {}
    current = None  # the field whose paragraph goes on
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.startswith("#"):
            break
        text = line.removeprefix("#")
        if not text.strip():
            current = None
        elif number == 1:
            title = text.strip()
        elif text.startswith("   "):
            commands.append(text.strip())
        elif current:
            fields[current] += " " + text.strip()
        else:
            word, _, rest = text.strip().partition(":")
            if word not in FIELDS or word in fields:
                expected = ", ".join(f"`{name}:`" for name in FIELDS)
                raise ValueError(f"{path}, line {number}: expected one of {expected}, each once; got {text.strip()!r}")
            current, fields[word] = word, rest.strip()
    missing = [f"`{name}:`" for name in REQUIRED if not fields.get(name)]
    missing += [what for what, found in (("title", title), ("command", commands)) if not found]
    if missing:
        raise ValueError(f"{path}: the header has no {', '.join(missing)}")
    return RecipeHeader(Path(path).stem, title, tuple(commands), fields)


def readme(recipes: Sequence[RecipeHeader]) -> str:
    """The text of recipes/README.md.

    Raises:
        ValueError: naming recipes that `GROUPS` does not list, or lists and are not there.
    """
    by_name = {recipe.name: recipe for recipe in recipes}
    listed = [name for names in GROUPS.values() for name in names]
    odd = sorted(by_name.keys() ^ set(listed))
    if odd:
        raise ValueError(f"recipes and `GROUPS` of {__name__} differ in {', '.join(odd)}")
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
