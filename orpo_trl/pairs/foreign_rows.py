"""Rows as other tools write them: those that are converted, and those that are refused with what to do."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from orpo_trl.pairs.columns import MEDIA_COLUMNS
from orpo_trl.pairs.row_errors import RowError, describe

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}

# A turn of ShareGPT in which the assistant calls a tool.
_CALL = "function_call"

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
# Strings of JSON or Python, also one that is cut off.
_QUOTED = re.compile(r"""(["'])(?:\\.|(?!\1)[^\\])*(?:\1|\\?\Z)""", re.DOTALL)
_NO_WORDS = re.compile(
    r"(?:[\s\[\](){}:,=\d.+-]|[Nn]one|[Nn]ull|[Tt]rue|[Ff]alse|array|dtype|object|NaN|nan)*"
).fullmatch


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


def own_names(row: Mapping[str, Any]) -> dict[str, str]:
    """What the columns are called in a row that `converted` converts: our name to the row's. Empty for other rows."""
    has = [name for name, value in row.items() if value is not None]
    if "conversations" in has and "chosen" in has:
        return {"prompt": "conversations"}
    other = _swift(has)
    if "messages" in has and "chosen" not in has and other:
        return {"chosen": "messages", "rejected": other, "prompt": "messages"}
    return {}


def converted(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A row of ShareGPT or ms-swift as a row of `prompt`, `chosen` and `rejected`, and its `own_names`.

    Any other row is returned as it is, with no names.
    """
    names = own_names(row)
    if names.get("prompt") == "conversations":
        row = _from_sharegpt(row)
    elif names:
        row = _from_swift(row, names["rejected"])
    return row, names


def _from_sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    if row.get("prompt") is not None:
        raise RowError("conversations", "no `prompt` beside it", "both")
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise RowError("conversations", "a list of turns", describe(turns))
    last = turns[-1] if isinstance(turns[-1], Mapping) else {}
    role = last.get("role") or last.get("from")
    # An answer behind an answer is none that a model gives: such rows repeat `chosen`, or lack the user's last turn.
    if isinstance(role, str) and (_ROLES.get(role) == "assistant" or role == _CALL):
        raise RowError("conversations", "turns that end before the answer in `chosen`", f"a last turn of role {role!r}")
    return {**{name: value for name, value in row.items() if name != "conversations"}, "prompt": turns}


def _from_swift(row: dict[str, Any], other: str) -> dict[str, Any]:
    """`other`: the column of the rejected answer."""
    turns, rejected = row["messages"], row[other]
    if not isinstance(turns, list) or not turns:
        raise RowError("messages", "a list of turns that ends with the answer", describe(turns))
    if row.get("rejected") is not None or row.get("prompt") is not None:
        raise RowError("messages", f"no `prompt` and no `rejected` beside `{other}`", "both")
    if other == "rejected_response":
        if not isinstance(rejected, str):
            raise RowError(other, "a string", describe(rejected))
        rejected = [*turns[:-1], {"role": "assistant", "content": rejected}]
    rest = {name: value for name, value in row.items() if name not in ("messages", other, "prompt")}
    return {**rest, "chosen": turns, "rejected": rejected}


def parse_turns(name: str, value: Any) -> Any:
    """Turns that stand in a string as JSON, or in a mapping of one turn, as a list; anything else as it is.

    Raises:
        RowError: where a string is the text of turns and of nothing else, but not JSON, such as Python's own.
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
        if not _is_data(value):
            return value
        reason = getattr(error, "msg", type(error).__name__)
        raise RowError(name, "messages as a list or as JSON", f"{value!r:.60} ({reason})") from error
    turns = parsed if isinstance(parsed, list) else [parsed]
    return turns if turns and all(_is_turn(turn) for turn in turns) else value


def _is_data(text: str) -> bool:
    """Whether nothing but strings, numbers and brackets stands in a text, as Python and numpy print lists of turns.

    An answer that shows such a list has other words around it, or names of variables in it.
    """
    return _NO_WORDS(_QUOTED.sub("", text)) is not None


def turn_of_sharegpt(name: str, turn: Mapping[str, Any], position: int) -> dict[str, Any]:
    """`{"from": …, "value": …}` as `{"role": …, "content": …}`."""
    sender, value = turn.get("from"), turn.get("value")
    role = _ROLES.get(sender) if isinstance(sender, str) else None
    rest = {key: item for key, item in turn.items() if key not in ("from", "value")}
    if sender == _CALL:
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
