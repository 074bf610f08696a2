"""Rows as other tools write them: those that are converted, and those that are refused with what to do."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from orpo_trl.pairs.row_errors import RowError, describe

MEDIA_COLUMNS = ("image", "images", "audio", "audios", "video", "videos")

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}

_NOT_PAIRS = {
    ("completion", "label"): "Rows of `completion` and `label` (KTO) are single answers, no pairs. Join two answers to "
    "one prompt, the wanted one as `chosen` and the other as `rejected`.",
    ("responses", "scores"): "Rows of scored lists are no pairs. Write the answer with the highest score as `chosen` "
    "and one with a lower score as `rejected`.",
    ("completions",): "Rows of scored lists are no pairs. Write the answer with the highest score as `chosen` and one "
    "with a lower score as `rejected`.",
    ("response_0", "response_1"): "Which of the two answers is the better one stands in another column. Write that one "
    "as `chosen` and the other as `rejected`.",
}
_OTHER_NAMES = (
    ("response_w", "response_l"),
    ("win", "lose"),
    ("positive", "negative"),
    ("accepted", "rejected"),
    ("response", "rejected_response"),
    ("chosen_response", "rejected_response"),
    ("preferred", "dispreferred"),
)

_TURN_KEYS = frozenset(("content", "value", "tool_calls"))
_STARTS_LIKE_TURNS = re.compile(r"""\s*(array\(|\()?\s*(\[\s*)?\{\s*["']""").match
_HAS_ROLE = re.compile(r"""["'](role|from)["']\s*:\s*["']""").search
_HAS_CONTENT = re.compile(r"""["'](content|value|tool_calls)["']\s*:""").search


def check_columns(columns: Sequence[str]) -> None:
    """Refuse a dataset whose columns are another tool's and are not converted.

    Raises:
        ValueError: listing the columns found, and the `columns` to write where there is one.
    """
    if "chosen" in columns or {"chosen_ids"} & set(columns) or ("messages" in columns and _swift(columns)):
        return
    found = ", ".join(f"`{name}`" for name in columns)
    for good, bad in _OTHER_NAMES:
        if good in columns and bad in columns:
            names = [f"chosen: {good}", f"rejected: {bad}"]
            raise ValueError(
                f"The rows have no `chosen`; they have {found}. Name their columns in the recipe with `columns: "
                f"{{{', '.join(names)}, prompt: …}}`, or rename them in Python."
            )
    for names, advice in _NOT_PAIRS.items():
        if all(name in columns for name in names):
            raise ValueError(f"The rows have no `chosen`; they have {found}. {advice}")


def refuse_media(row: Mapping[str, Any]) -> None:
    """Raise RowError where a column of images, audio or video holds something: the models here read text."""
    for name in MEDIA_COLUMNS:
        value = row.get(name)
        if value is not None and _has_content(value):
            raise RowError(name, "no content, as only text is trained", describe(value))


def converted(row: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A row of ShareGPT or ms-swift as a row of `prompt`, `chosen` and `rejected`, and the columns that it was from.

    Any other row is returned as it is, with no columns.
    """
    if "conversations" in row and "chosen" in row:
        if "prompt" in row:
            raise RowError("conversations", "no `prompt` beside it", "both")
        turns = row["conversations"]
        if not isinstance(turns, list) or not turns:
            raise RowError("conversations", "a list of turns", describe(turns))
        row = {name: value for name, value in row.items() if name != "conversations"}
        return {**row, "prompt": turns}, ("conversations", "chosen", *(("rejected",) if "rejected" in row else ()))
    other = _swift(row)
    if "messages" not in row or "chosen" in row or other is None:
        return row, ()
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        raise RowError("messages", "a list of turns that ends with the answer", describe(turns))
    if "rejected" in row or "prompt" in row:
        raise RowError("messages", f"no `prompt` and no `rejected` beside `{other}`", "both")
    rejected = row[other]
    if other == "rejected_response":
        if not isinstance(rejected, str):
            raise RowError(other, "a string", describe(rejected))
        rejected = [*turns[:-1], {"role": "assistant", "content": rejected}]
    rest = {name: value for name, value in row.items() if name not in ("messages", other)}
    return {**rest, "chosen": turns, "rejected": rejected}, ("messages", other)


def parse_turns(name: str, value: Any) -> Any:
    """Turns that stand in a string as JSON, or in a mapping of one turn, as a list; anything else as it is.

    Raises:
        RowError: where a string is the text of turns but not JSON, such as Python's own.
    """
    if isinstance(value, Mapping) and _is_turn(value):
        return [value]
    if not isinstance(value, str) or not _STARTS_LIKE_TURNS(value):
        return value
    if not _HAS_ROLE(value) or not _HAS_CONTENT(value):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", type(error).__name__)
        raise RowError(name, "messages as a list or as JSON", f"{value!r:.60} ({reason})") from error
    turns = parsed if isinstance(parsed, list) else [parsed]
    return turns if turns and all(_is_turn(turn) for turn in turns) else value


def turn_of_sharegpt(name: str, turn: Mapping[str, Any], position: int) -> dict[str, Any]:
    """`{"from": …, "value": …}` as `{"role": …, "content": …}`."""
    sender, value = turn.get("from"), turn.get("value")
    role = _ROLES.get(sender) if isinstance(sender, str) else None
    rest = {key: item for key, item in turn.items() if key not in ("from", "value")}
    if sender == "function_call":
        return {**rest, "role": "assistant", "tool_calls": _tool_calls(name, value, position)}
    if role is None:
        raise RowError(name, f"`from` to be one of {', '.join(_ROLES)}", f"{sender!r:.60} at position {position}")
    return {**rest, "role": role, "content": value}


def _tool_calls(name: str, value: Any, position: int) -> list[dict[str, Any]]:
    try:
        calls = json.loads(value)
    except (TypeError, ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RowError(name, "a call with `name` and `arguments` as JSON", f"{value!r:.60} at position {position}")
    return [{"type": "function", "function": call} for call in calls]


def _swift(columns: Mapping[str, Any] | Sequence[str]) -> str | None:
    return next((name for name in ("rejected_messages", "rejected_response") if name in columns), None)


def _is_turn(value: Any) -> bool:
    if not isinstance(value, Mapping) or not any(isinstance(value.get(key), str) for key in ("role", "from")):
        return False
    return any(key in value for key in _TURN_KEYS)


def _has_content(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_content(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_has_content(item) for item in value)
    return value is not None and not (isinstance(value, (str, bytes)) and not value)
