"""One dataset row, of any accepted shape, to one pair. The shapes are listed in README.md, "Data formats"."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from orpo_trl.upstream import remove_none_values

Messages: TypeAlias = list[dict[str, Any]]

# The columns that a row may use; every other column is ignored.
ROW_COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "instruction",
    "question",
    "input",
    "tools",
    "chat_template_kwargs",
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
)

_LOOKS_LIKE_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""").match
_HUMAN = "\n\nHuman:"
_ASSISTANT = "\n\nAssistant:"


class RowError(ValueError):
    """A row that has none of the accepted shapes.

    Attributes:
        column: the column at fault.
        expected: what it should hold.
        received: what it holds.
    """

    def __init__(self, column: str, expected: str, received: str):
        super().__init__(f"column `{column}`: expected {expected}, received {received}")
        self.column, self.expected, self.received = column, expected, received


@dataclass(frozen=True)
class TextPair:
    """A prompt and its responses as text, trained on as it stands. A row of the NLL term alone has no `rejected`."""

    prompt: str
    chosen: str
    rejected: str | None


@dataclass(frozen=True)
class ChatPair:
    """A conversation and its answers, assistant turns that the chat template renders."""

    prompt: Messages
    chosen: dict[str, Any]
    rejected: dict[str, Any] | None


Pair: TypeAlias = TextPair | ChatPair


def is_empty(response: str | dict[str, Any]) -> bool:
    """Whether a response has nothing to learn from: no text but white space, and no tool call."""
    if isinstance(response, str):
        return not response.strip()
    content = response.get("content")
    text = content if isinstance(content, str) else "".join(str(part.get("text", "")) for part in content or [])
    return not text.strip() and not response.get("tool_calls")


def row_to_pair(row: Mapping[str, Any], strings_as_messages: bool = False) -> Pair:
    """Read one row.

    Args:
        row: column name to value; columns that are missing or None count as absent.
        strings_as_messages: read string prompts and responses as turns of a conversation.

    Raises:
        RowError: naming the column, what was expected, and what was received.
    """
    row = {name: _parse_messages(name, value) for name, value in row.items()}
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if chosen is None:
        raise RowError("chosen", "a string or a list of messages", f"nothing (the row has {_present(row)})")
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if response is not None and not isinstance(response, (str, list)):
            raise RowError(name, "a string or a list of messages", _describe(response))
    if rejected is not None and isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError("rejected", f"the type of `chosen`, {_describe(chosen)}", _describe(rejected))
    if isinstance(chosen, list):
        return _pair_from_messages(row.get("prompt"), chosen, rejected)
    return _pair_from_strings(row, chosen, rejected, strings_as_messages)


def _parse_messages(name: str, value: Any) -> Any:
    """CSV holds messages as text: the JSON of them is read, and anything else that looks like them is refused."""
    if name not in ("prompt", "chosen", "rejected") or not isinstance(value, str) or not _LOOKS_LIKE_MESSAGES(value):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RowError(name, "messages as a list or as JSON", f"{value!r:.60} ({error.msg})") from error


def _pair_from_messages(prompt: Any, chosen: list, rejected: list | None) -> Pair:
    chosen = _conversation("chosen", prompt, chosen)
    if rejected is None:
        return ChatPair(chosen[:-1], chosen[-1], None)
    rejected = _conversation("rejected", prompt, rejected)
    if chosen[:-1] != rejected[:-1]:
        turn = next(
            (k for k, (a, b) in enumerate(zip(chosen[:-1], rejected[:-1], strict=False)) if a != b),
            min(len(chosen), len(rejected)) - 1,
        )
        raise RowError("rejected", "the turns of `chosen` up to the last", f"another turn at position {turn}")
    return ChatPair(chosen[:-1], chosen[-1], rejected[-1])


def _conversation(name: str, prompt: Any, response: list) -> Messages:
    """The whole conversation that `prompt` and the messages of column `name` stand for, ending with its answer."""
    messages = _messages(name, response)
    if not messages or messages[-1]["role"] != "assistant":
        received = f"a last turn of role {messages[-1]['role']!r}" if messages else "an empty list"
        raise RowError(name, "messages that end with an assistant turn", received)
    if prompt is not None and not isinstance(prompt, (str, list)):
        raise RowError("prompt", "a string or a list of messages", _describe(prompt))
    if prompt:
        messages = _with_prompt(name, prompt, messages)
    if len(messages) < 2:
        raise RowError("prompt", "a prompt, here or as the first turns of `chosen`", f"`{name}` with one turn")
    return messages


def _with_prompt(name: str, prompt: str | list, messages: Messages) -> Messages:
    """The messages of column `name` behind their prompt, unless they begin with it themselves."""
    roles = [message["role"] for message in messages]
    # UltraFeedback and others repeat the user's text as `prompt` beside the full conversation.
    is_whole = "user" in roles[: roles.index("assistant")]
    if isinstance(prompt, str):
        system = next((k for k, role in enumerate(roles) if role != "system"), 0)
        turn = {"role": "user", "content": prompt}
        return messages if is_whole else [*messages[:system], turn, *messages[system:]]
    prompt = _messages("prompt", prompt)
    if messages[: len(prompt)] == prompt:
        return messages
    if is_whole and any(message["role"] == "user" for message in prompt):
        raise RowError("prompt", f"the first turns of `{name}`, or the turns before it", "other turns than both")
    return prompt + messages


def _messages(name: str, value: list) -> Messages:
    # Arrow gives every message of a column the same keys and fills the absent ones with None.
    messages = remove_none_values(value)
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowError(name, "messages with `role` and `content`", f"{_describe(message)} at position {position}")
        content = message.get("content")
        parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
        if not (isinstance(content, str) or parts or (content is None and message.get("tool_calls"))):
            raise RowError(name, "`content` of text in each message", f"{_describe(content)} at position {position}")
    return messages


def _pair_from_strings(row: Mapping, chosen: str, rejected: str | None, strings_as_messages: bool) -> Pair:
    prompt = row.get("prompt")
    if prompt is None:
        question = next((name for name in ("instruction", "question") if row.get(name) is not None), None)
        if question is None:
            return _pair_from_transcripts(row, chosen, rejected, strings_as_messages)
        for name in (question, "input"):
            if not isinstance(row.get(name), (str, type(None))):
                raise RowError(name, "a string", _describe(row[name]))
        prompt = [{"role": "user", "content": "\n\n".join(filter(None, (row[question], row.get("input"))))}]
    elif isinstance(prompt, list):
        prompt = _messages("prompt", prompt)
        if not prompt:
            raise RowError("prompt", "at least one message", "an empty list")
    elif not isinstance(prompt, str):
        raise RowError("prompt", "a string or a list of messages", _describe(prompt))
    elif strings_as_messages:
        is_transcript = prompt.rstrip().endswith(_ASSISTANT) and _is_transcript(prompt)
        prompt = _transcript_turns(prompt.rstrip()) if is_transcript else [{"role": "user", "content": prompt}]
    return _pair(prompt, chosen, rejected)


def _pair_from_transcripts(row: Mapping, chosen: str, rejected: str | None, strings_as_messages: bool) -> Pair:
    """Anthropic HH-RLHF: each side is a whole dialogue as one string, with no column for the prompt."""
    prompt, answer = _split_transcript("chosen", chosen, row)
    if rejected is not None:
        other_prompt, rejected = _split_transcript("rejected", rejected, row)
        if other_prompt != prompt:
            raise RowError("rejected", "the turns of `chosen` up to the last", "another dialogue")
    if strings_as_messages:
        prompt, answer = _transcript_turns(prompt), answer.strip()
        rejected = None if rejected is None else rejected.strip()
    return _pair(prompt, answer, rejected)


def _split_transcript(name: str, text: str, row: Mapping) -> tuple[str, str]:
    head, marker, answer = text.rpartition(_ASSISTANT)
    if not marker or not _is_transcript(head):
        raise RowError(
            "prompt",
            f"a prompt: `prompt`, `instruction` or `question`, or `{name}` from {_HUMAN!r} to {_ASSISTANT!r}",
            f"nothing (the row has {_present(row)})",
        )
    if _HUMAN in answer:
        raise RowError(name, "a dialogue that ends with the assistant's answer", "one that ends with the human's")
    return head + marker, answer


def _is_transcript(text: str) -> bool:
    return ("\n\n" + text.lstrip("\n")).startswith(_HUMAN)


def _transcript_turns(prompt: str) -> Messages:
    turns = []
    for block in ("\n\n" + prompt.removesuffix(_ASSISTANT).lstrip("\n")).split(_HUMAN)[1:]:
        user, *answers = block.split(_ASSISTANT)
        turns.append({"role": "user", "content": user.strip()})
        turns.extend({"role": "assistant", "content": answer.strip()} for answer in answers)
    return turns


def _pair(prompt: str | Messages, chosen: str, rejected: str | None) -> Pair:
    if isinstance(prompt, str):
        return TextPair(prompt, chosen, rejected)
    turn = None if rejected is None else {"role": "assistant", "content": rejected}
    return ChatPair(prompt, {"role": "assistant", "content": chosen}, turn)


def _present(row: Mapping) -> str:
    names = [name for name, value in row.items() if value is not None]
    return ", ".join(f"`{name}`" for name in names) or "no columns"


def _describe(value: Any) -> str:
    if isinstance(value, str):
        return "a string" if value else "an empty string"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "nothing" if value is None else f"{type(value).__name__} {value!r:.60}"
