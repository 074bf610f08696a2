"""The shipped recipes and what their headers say.

A header is the comment that a recipe begins with: its title on the first line, the commands that run it, indented by
three spaces, and paragraphs that begin with a word of `FIELDS`. An empty comment line ends each of these.
"""

from dataclasses import dataclass
from pathlib import Path

from orpo_trl.paths import RECIPES

REQUIRED = ("Reproduces", "Source", "Hardware", "Expect", "Inferred")
FIELDS = ("Reproduces", "Source", "Hardware", "Memory", "Expect", "Inferred", "Conflicts", "Needs")


@dataclass(frozen=True)
class RecipeHeader:
    """The header of a recipe.

    Attributes:
        name: of the file, without its ending.
        title: the first line.
        commands: those that run the recipe.
        fields: the paragraphs, by the word of `FIELDS` that they begin with.
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
        ValueError: with the file and the wrong line, or with what is missing.
    """
    title, commands, fields = "", [], {}
    current = None  # the field of the paragraph that the next line may continue
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
