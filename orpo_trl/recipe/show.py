"""What the commands show: a recipe with its parents as one text, and keys with their help."""

import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from orpo_trl.recipe.files import Recipe
from orpo_trl.recipe.keys import describe, recipe_keys
from orpo_trl.sections import SECTIONS
from orpo_trl.yaml_text import ValuePath, to_yaml, to_yaml_line

# Keys of no section: tokens, and those that may only keep their default.
_REST = "Other"


def expanded(recipe: Recipe) -> str:
    """A recipe, its parents and its overrides as one recipe, by section; each key with the place that set it.

    Values from an environment variable show its name, not its content.
    """
    lines = [f"# {recipe.name}, with all that it extends"]
    for title, names in _by_section(recipe.settings):
        lines += ["", f"# ---- {title} ----"]
        for name in names:
            value = _with_names(recipe.settings[name], (name,), recipe.secrets)
            first, *rest = to_yaml({name: value}).splitlines()
            lines += [f"{first:<50}  # {recipe.place(name)}", *rest]
    return "\n".join(lines) + "\n"


def _with_names(value: Any, path: ValuePath, secrets: dict[ValuePath, str]) -> Any:
    if path in secrets:
        return secrets[path]
    if isinstance(value, dict):
        return {key: _with_names(inner, (*path, key), secrets) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_names(inner, (*path, index), secrets) for index, inner in enumerate(value)]
    return value


def schema_text(names: Iterable[str]) -> str:
    """Keys with type, default and help, by section."""
    lines: list[str] = []
    for title, chosen in _by_section(names):
        lines += [f"==== {title} ====", ""]
        for key in (recipe_keys()[name] for name in chosen):
            about = " ".join(f"{describe(key.hint)}; default {to_yaml_line(key.default)}".split())
            text = " ".join(key.help.split())
            lines += [
                key.name,
                *(textwrap.fill(part, 100, initial_indent="    ", subsequent_indent="    ") for part in (about, text)),
                "",
            ]
    return "\n".join(lines)


def _by_section(names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    wanted = set(names)
    known = {name for section in SECTIONS.values() for name in section}
    for title, section in {**SECTIONS, _REST: [name for name in recipe_keys() if name not in known]}.items():
        found = [name for name in section if name in wanted]
        if found:
            yield title, found
