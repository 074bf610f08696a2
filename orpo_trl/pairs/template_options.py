"""The arguments of the chat template that a row brings: `tools`, `documents` and `chat_template_kwargs`."""

import json
from collections.abc import Mapping
from typing import Any

from orpo_trl.pairs.row_errors import RowError, check_values


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the chat template, by name.

    Raises:
        RowError: naming the column whose value no template takes.
    """
    options = _json_column(row, "chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise RowError("chat_template_kwargs", "a mapping", f"{options!r:.60}")
    named = {name: _json_column(row, name) for name in ("tools", "documents")}
    found = {**{name: value for name, value in named.items() if value is not None}, **options}
    for name, is_one, expected in (
        ("tools", _is_tool, "a list of mappings with a `name`"),
        ("documents", _is_document, "a list of mappings or texts"),
    ):
        value = found.get(name)
        if value is not None and not (isinstance(value, list) and all(map(is_one, value))):
            raise RowError(name, expected, f"{value!r:.60}")
    return found


def _is_document(value: Any) -> bool:
    return isinstance(value, (dict, str))


def _is_tool(tool: Any) -> bool:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _json_column(row: Mapping[str, Any], name: str) -> Any:
    """A column that may hold its value as a JSON string."""
    value = row.get(name)
    if not isinstance(value, str):
        return value or None
    if not value.strip():
        return None
    try:
        value = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(name, "JSON", f"{value!r:.60} ({error})") from error
    check_values(name, value)
    return value
