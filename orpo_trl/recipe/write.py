"""Recipes and keys as text."""

import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from orpo_trl.recipe.files import Recipe, to_yaml
from orpo_trl.recipe.keys import describe, keys
from orpo_trl.recipe.sections import SECTIONS

# Keys of no section: tokens, and what may only have the default that it has.
_REST = "Other"


def expanded(recipe: Recipe) -> str:
    """A recipe and its parents as one, in the order of the keys, each with the place that set it.

    Values that hold an environment variable show its name, not what it holds.
    """
    lines = [f"# {recipe.name}, with all that it extends"]
    for title, names in _by_section(recipe.settings):
        lines += ["", f"# ---- {title} ----"]
        for name in names:
            value = _with_names(recipe.settings[name], (name,), recipe.secrets)
            first, *rest = to_yaml({name: value}).splitlines()
            lines += [f"{first:<50}  # {recipe.place(name)}", *rest]
    return "\n".join(lines) + "\n"


def _with_names(value: Any, path: tuple, secrets: dict[tuple, str]) -> Any:
    if path in secrets:
        return secrets[path]
    if isinstance(value, dict):
        return {key: _with_names(inner, (*path, key), secrets) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_names(inner, (*path, index), secrets) for index, inner in enumerate(value)]
    return value


def schema_text(names: Iterable[str]) -> str:
    """Keys with type, default and help, by group."""
    lines: list[str] = []
    for title, chosen in _by_section(names):
        lines += [f"==== {title} ====", ""]
        for key in map(keys().get, chosen):
            default = yaml.safe_dump(key.default, default_flow_style=True).splitlines()[0]
            about = " ".join(f"{describe(key.hint)}; default {default}".split())
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
    for title, section in {**SECTIONS, _REST: [name for name in keys() if name not in known]}.items():
        found = [name for name in section if name in wanted]
        if found:
            yield title, found
