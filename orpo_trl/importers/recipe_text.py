"""An imported recipe as the text of a recipe file."""

import textwrap
from typing import Any

from orpo_trl.importers.draft import Imported, Note
from orpo_trl.sections import SECTIONS
from orpo_trl.yaml_text import to_yaml

_WIDTH = 118


def recipe_text(imported: Imported, source_name: str) -> str:
    """The recipe's text: a header with its origin and the notes, then the settings by section.

    Args:
        imported: what `import_recipe` returns.
        source_name: the imported file, as the header names it.
    """
    lines = [
        f"# Imported from {_plain(source_name)} ({imported.tool})",
        "#",
        "#   orpo-trl train FILE",
        *_listed("Left out, because there is no equal here:", imported.no_equal),
        *_listed("What differs in the objective and in the data:", imported.differences),
    ]
    for title, keys in SECTIONS.items():
        present = [key for key in keys if key in imported.settings]
        if present:
            lines += ["", f"# ---- {title} ----"]
        for key in present:
            lines += _setting(key, imported.settings[key], imported.origins.get(key))
    return "\n".join(lines) + "\n"


def _setting(key: str, value: Any, origin: str | None) -> list[str]:
    first, *rest = to_yaml({key: value}).rstrip("\n").split("\n")
    if origin:
        first = f"{first:<37} # {_plain(origin)}" if len(first) < 38 else f"{first}   # {_plain(origin)}"
    return [first, *rest]


def _listed(title: str, notes: list[Note]) -> list[str]:
    if not notes:
        return []
    lines = ["#", f"# {title}"]
    for note in notes:
        text = _plain(note.text if note.line is None else f"{note.text} (line {note.line})")
        lines += textwrap.wrap(text, _WIDTH, initial_indent="# - ", subsequent_indent="#   ", break_on_hyphens=False)
    return lines


def _plain(text: str) -> str:
    """One line of printable characters: keys of a file may hold other characters, a comment may not."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))
