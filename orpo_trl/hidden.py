"""What `${NAME}` in a recipe holds, shown as `${NAME}` wherever a run writes or prints.

Environment variables carry tokens, names of users and paths of machines. The process of a run uses their contents and
passes on their names: in logs, errors, the run's files, the model card, and what trackers are sent.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

_ENVIRONMENT = re.compile(r"\$\{(\w+)\}")
# Shorter texts, such as `a` or `gpt`, would be found in other words.
_SHORTEST = 4
# Texts of fewer characters are replaced as whole words only.
_LONG = 8

# What is shown in place of each text; of this process, as environment variables are.
_shown: dict[str, str] = {}


def hide_contents(values: Mapping[str, str]) -> None:
    """From now on, show environment variables by their names. Those of an earlier call are forgotten.

    Args:
        values: what a recipe's values have become, with the text that each was written as:
            `{"/data/jane/rows.jsonl": "${DATA}/rows.jsonl"}`.
    """
    _shown.clear()
    contents = dict(values)
    for written in values.values():
        for name in _ENVIRONMENT.findall(written):
            contents[os.environ.get(name, "")] = f"${{{name}}}"
    # The longest first: a path before the path of a folder above it.
    for content in sorted(contents, key=len, reverse=True):
        if len(content) >= _SHORTEST:
            _shown[content] = contents[content]


def hide(text: str) -> str:
    """A text with the names of environment variables in place of their contents."""
    for content, name in _shown.items():
        if len(content) >= _LONG:
            text = text.replace(content, name)
        elif content in text:
            text = re.sub(rf"(?<!\w){re.escape(content)}(?!\w)", lambda _, name=name: name, text)
    return text


def hide_all(value: Any) -> Any:
    """A value of mappings, lists and plain values, with every text in it as `hide` returns it."""
    if not _shown:
        return value
    if type(value) is str:  # not one of an enumeration
        return hide(value)
    if type(value) is dict:
        return {hide_all(key): hide_all(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(hide_all(inner) for inner in value)
    return value
