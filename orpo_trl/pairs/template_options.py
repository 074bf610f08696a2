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
    """A column that may hold its value as a JSON string, which is kept with its nulls."""
    value = row.get(name)
    if not isinstance(value, str):
        return _without_filling([value])[0] if value else None
    if not value.strip():
        return None
    try:
        value = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(name, "JSON", f"{value!r:.60} ({error})") from error
    check_values(name, value)
    return value


def _without_filling(place: list[Any]) -> list[Any]:
    """Values that stand at one place of a column, without the nulls that Arrow fills their absent keys with.

    Arrow gives all mappings at one place the same keys. Where they differ, the mappings are not Arrow's (rows in
    Python, the type `Json` of `datasets`), and all of their nulls are meant. So are nulls inside lists. A null in
    mappings of equal keys cannot be told from a filled one, such as `default: null` of a single tool, and goes; a
    column of JSON text keeps it.
    """
    mappings = [value for value in place if isinstance(value, Mapping)]
    lists = [value for value in place if isinstance(value, list)]
    if not (mappings or lists) or any(value.keys() != mappings[0].keys() for value in mappings):
        return place
    keys = mappings[0] if mappings else ()
    columns = {key: iter(_without_filling([value[key] for value in mappings])) for key in keys}
    items = iter(_without_filling([item for value in lists for item in value]) if lists else ())

    def rebuilt(value: Any) -> Any:
        if isinstance(value, Mapping):
            filled = {key: next(column) for key, column in columns.items()}
            return {key: item for key, item in filled.items() if item is not None}
        return [next(items) for _ in value] if isinstance(value, list) else value

    return [rebuilt(value) for value in place]
