"""The arguments of the chat template that a row brings: `tools`, `documents` and `chat_template_kwargs`."""

import json
from collections.abc import Mapping
from typing import Any

from orpo_trl.pairs.row_errors import RowError
from orpo_trl.upstream import remove_none_values


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the chat template, by name.

    Raises:
        RowError: naming the column whose value no template takes.
    """
    options = _json_column(row, "chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise RowError("chat_template_kwargs", "a mapping", f"{options!r:.60}")
    named = {name: _json_column(row, name) for name in ("tools", "documents")}
    tools = named["tools"]
    if tools is not None and not (isinstance(tools, list) and all(_is_tool(tool) for tool in tools)):
        raise RowError("tools", "a list of mappings with a `name`", f"{tools!r:.60}")
    return {**{name: value for name, value in named.items() if value is not None}, **options}


def _is_tool(tool: Any) -> bool:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _json_column(row: Mapping[str, Any], name: str) -> Any:
    """A column that may hold its value as a JSON string, which Arrow stores where the rows' values differ in type."""
    value = row.get(name)
    if not isinstance(value, str):
        return remove_none_values(value) if value else None
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(name, "JSON", f"{value!r:.60} ({error})") from error
