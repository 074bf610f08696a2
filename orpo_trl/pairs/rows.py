"""One dataset row, of any accepted shape, to one pair. The shapes are listed in docs/data_formats.md."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from orpo_trl.pairs.arrow_nulls import without_filling
from orpo_trl.pairs.columns import ROW_COLUMNS
from orpo_trl.pairs.foreign_rows import converted, parse_turns, refuse_media, turn_of_sharegpt
from orpo_trl.pairs.row_errors import RowError, check_values, describe, own_words
from orpo_trl.pairs.template_options import template_options
from orpo_trl.pairs.transcripts import (
    ASSISTANT,
    COMMON_PROMPT,
    HUMAN,
    common_length,
    is_transcript,
    is_transcript_with_answer,
    refuse_rendered_answer,
    refuse_rendered_prompt,
    split_at_prompt,
    split_common,
    split_transcripts,
    transcript_turns,
    without_prompt,
)

Messages: TypeAlias = list[dict[str, Any]]

_TURN_COLUMNS = ("prompt", "chosen", "rejected", "conversations", "messages", "rejected_messages")
# Columns of nested values, whose nulls may be Arrow's.
_NESTED_COLUMNS = (*_TURN_COLUMNS, "tools", "documents", "chat_template_kwargs")
_QUESTIONS = ("instruction", "question", "input")
_PROMPTS = ("prompt", *_QUESTIONS)
_MARKERS = ("<image>", "<video>", "<audio>")
# Where templates and data sets keep the reasoning of an answer.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class TextPair:
    """A prompt and its responses as text, trained on as it stands. A row of the NLL term alone has no `rejected`.

    Attributes:
        read: the row's columns that the pair was read from.
        notes: what is worth a warning and no error, as short phrases.
    """

    prompt: str
    chosen: str
    rejected: str | None
    read: tuple[str, ...] = field(default=(), compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class ChatPair:
    """The turns of a conversation and its responses, which the chat template renders. All contents are strings.

    Attributes:
        prompt: the turns before the response.
        chosen: the response, one or more turns, the last one of role assistant. `rejected` likewise, or None.
        options: arguments of the chat template: `tools`, `documents` and those of `chat_template_kwargs`.
        read: the row's columns that the pair was read from.
        notes: what is worth a warning and no error, as short phrases.
        names: of a row that was converted, our names of its columns to its own.
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages | None
    options: dict[str, Any] = field(default_factory=dict)
    read: tuple[str, ...] = field(default=(), compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    names: dict[str, str] = field(default_factory=dict, compare=False)


Pair: TypeAlias = TextPair | ChatPair


def is_empty(response: str | Messages) -> bool:
    """Whether a response has nothing to learn from: its last turn has no text, no reasoning and no tool call."""
    if isinstance(response, str):
        return not response.strip()
    last = response[-1]
    texts = (last.get(name) for name in ("content", *REASONING_KEYS))
    return not last.get("tool_calls") and not any(isinstance(text, str) and text.strip() for text in texts)


def row_to_pair(
    row: Mapping[str, Any],
    strings_as_messages: bool = False,
    prompt_turns: str = "auto",
    features: Mapping[str, Any] | None = None,
) -> Pair:
    """Read one row.

    Args:
        row: column name to value; columns that are missing or None count as absent.
        strings_as_messages: read string prompts and responses as turns of a conversation.
        prompt_turns: which turns of a conversation are its prompt: 'all' but the last answer, those before the
            'first' answer, or 'auto': those of `prompt` where it holds messages, else all but the last answer.
        features: types of the columns, such as `Dataset.features`, which tell the row's nulls from Arrow's.

    Raises:
        RowError: naming the column, what was expected, and what was received.
    """
    of_arrow = {name for name in _NESTED_COLUMNS if not isinstance(row.get(name), str)}  # strings are JSON
    row = {name: parse_turns(name, value) if name in _TURN_COLUMNS else value for name, value in row.items()}
    # An empty column of prompts stays, as it says that the prompt is not in the responses.
    row = {name: value for name, value in row.items() if value is not None or name in _PROMPTS}
    for name in ROW_COLUMNS:
        check_values(name, row.get(name))
    for name in of_arrow & row.keys():
        row[name] = without_filling(row[name], (features or {}).get(name))
    refuse_media(row)
    row, names = converted(row)
    with own_words(names):
        pair = _pair(row, strings_as_messages, prompt_turns)
    pair = replace(pair, read=tuple(dict.fromkeys(names.get(name, name) for name in _read(row, pair))))
    return replace(pair, names=names) if isinstance(pair, ChatPair) else pair


def _pair(row: Mapping[str, Any], strings_as_messages: bool, prompt_turns: str) -> Pair:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if chosen is None:
        raise RowError("chosen", "a string or a list of messages", f"nothing (the row has {_present(row)})")
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if response is not None and not isinstance(response, (str, list)):
            raise RowError(name, "a string or a list of messages", describe(response))
    if rejected is not None and isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError("rejected", f"the type of `chosen`, {describe(chosen)}", describe(rejected))
    if isinstance(chosen, list):
        pair = _pair_from_messages(row.get("prompt"), chosen, rejected, prompt_turns)
    else:
        pair = _pair_from_strings(row, chosen, rejected, strings_as_messages, prompt_turns)
    if isinstance(pair, TextPair):
        _refuse_turn_columns(row)
        return replace(pair, notes=(*pair.notes, *_notes((pair.prompt, pair.chosen, pair.rejected or ""))))
    _refuse_dialogues(row, pair)
    pair = _with_earlier_turns(row, pair, prompt_turns)
    texts = [turn.get("content") or "" for turn in (*pair.prompt, *pair.chosen, *(pair.rejected or ()))]
    notes = (*pair.notes, *_notes(texts))
    prompt = row.get("prompt")
    if isinstance(prompt, str) and not any(prompt.strip() in text for text in texts):
        notes += ("`prompt` is not read: it stands nowhere in the turns beside it",)
    return replace(pair, notes=notes, options=template_options(row))


def _refuse_dialogues(row: Mapping[str, Any], pair: ChatPair) -> None:
    """Refuse answers that hold a whole dialogue, rendered before. The template would render it as one turn."""
    asked = [turn.get("content") or "" for turn in pair.prompt if turn["role"] == "user"]
    first = "prompt" if isinstance(row.get("prompt"), list) else "chosen"
    for name, turns in ((first, pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected or ())):
        for turn in turns:
            if turn["role"] == "assistant":
                refuse_rendered_answer(name, turn.get("content") or "", asked)


def _notes(texts: Iterable[str]) -> tuple[str, ...]:
    found = {marker for text in texts if "<" in text for marker in _MARKERS if marker in text}
    return tuple(f"literal `{marker}` in a text row" for marker in sorted(found))


def _system_turns(row: Mapping[str, Any]) -> Messages:
    text = row.get("system")
    if text is not None and not isinstance(text, str):
        raise RowError("system", "a string", describe(text))
    return [{"role": "system", "content": text}] if text else []


def _history_turns(row: Mapping[str, Any]) -> Messages:
    history = row.get("history")
    if history is not None and not isinstance(history, list):
        raise RowError("history", "a list of pairs of earlier user and assistant texts", describe(history))
    turns = []
    for pair in history or []:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowError("history", "a list of pairs of earlier user and assistant texts", f"{pair!r:.60}")
        refuse_rendered_answer("history", pair[1], pair[:1])
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _refuse_turn_columns(row: Mapping[str, Any]) -> None:
    """A prompt that is used as it stands has no place for turns."""
    for name, turns in (("system", _system_turns(row)), ("history", _history_turns(row))):
        if turns:
            raise RowError(
                name, "nothing beside text rows: set `strings_as_messages: true`, or put it into the prompt", "text"
            )


def _with_earlier_turns(row: Mapping[str, Any], pair: ChatPair, prompt_turns: str) -> ChatPair:
    """`pair` behind the turns of the columns `system` and `history`."""
    system, history = _system_turns(row), _history_turns(row)
    if not system and not history:
        return pair
    turns = (*pair.prompt, *pair.chosen, *(pair.rejected or ()))
    if system and any(turn["role"] == "system" for turn in turns):
        raise RowError("system", "no system turn in the messages beside it", "both")
    own = next((k for k, turn in enumerate(pair.prompt) if turn["role"] != "system"), len(pair.prompt))
    prompt = [*system, *pair.prompt[:own], *history, *pair.prompt[own:]]
    if not history or prompt_turns != "first":
        return replace(pair, prompt=prompt)
    size = next(k for k, turn in enumerate(prompt) if turn["role"] == "assistant")
    rejected = None if pair.rejected is None else [*prompt[size:], *pair.rejected]
    return replace(pair, prompt=prompt[:size], chosen=[*prompt[size:], *pair.chosen], rejected=rejected)


def _pair_from_messages(prompt: Any, chosen: list, rejected: list | None, prompt_turns: str) -> ChatPair:
    given = _messages("prompt", prompt) if isinstance(prompt, list) else None
    chosen = _conversation("chosen", prompt if given is None else given, chosen)
    rejected = None if rejected is None else _conversation("rejected", prompt if given is None else given, rejected)
    return _split_turns(chosen, rejected, len(given) if given else None, prompt_turns)


def _split_turns(chosen: Messages, rejected: Messages | None, given: int | None, prompt_turns: str) -> ChatPair:
    """Divide two whole conversations into the turns of their prompt, `given` of them in `prompt`, and the responses."""
    answer = len(chosen) - 1
    common = answer if rejected is None else common_length(chosen[:-1], rejected[:-1])
    if prompt_turns == "auto" and given:
        # Turns of others before the first answer, as behind a system prompt, are no response.
        size = next(k for k in range(min(given, answer), len(chosen)) if chosen[k]["role"] == "assistant")
    else:
        is_alike = rejected is None or common == answer == len(rejected) - 1
        size = answer if is_alike else _parting(chosen, rejected or [], common)
        if prompt_turns == "first":
            size = next(k for k, turn in enumerate(chosen) if turn["role"] == "assistant") or size
    if size > common:
        raise RowError("rejected", "the turns of `chosen` up to the last", f"another turn at position {common}")
    return ChatPair(chosen[:size], chosen[size:], None if rejected is None else rejected[size:])


def _parting(chosen: Messages, rejected: Messages, common: int) -> int:
    """Where responses of several turns begin: turns that differ must be the assistant's and its tools'."""
    if any(turn["role"] in ("user", "system") for turn in (*chosen[common:], *rejected[common:])):
        raise RowError("rejected", "the turns of `chosen` up to the last", f"another turn at position {common}")
    return common


def _conversation(name: str, prompt: Any, response: list) -> Messages:
    """The whole conversation that `prompt` and the messages of column `name` stand for, ending with its answer."""
    messages = _messages(name, response)
    if not messages or messages[-1]["role"] != "assistant":
        received = f"a last turn of role {messages[-1]['role']!r}" if messages else "an empty list"
        raise RowError(name, "messages that end with an assistant turn", received)
    if prompt is not None and not isinstance(prompt, (str, list)):
        raise RowError("prompt", "a string or a list of messages", describe(prompt))
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
    if messages[: len(prompt)] == prompt:
        return messages
    if is_whole and any(message["role"] == "user" for message in prompt):
        raise RowError("prompt", f"the first turns of `{name}`, or the turns before it", "other turns than both")
    return prompt + messages


def _messages(name: str, value: list) -> Messages:
    messages = _without_absent_keys(value)
    for position, message in enumerate(messages):
        if isinstance(message, dict) and "role" not in message and "from" in message:
            messages[position] = message = turn_of_sharegpt(name, message, position)
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowError(name, "messages with `role` and `content`", f"{describe(message)} at position {position}")
        calls = message.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise RowError(name, "`tool_calls` to be a list of mappings", f"{describe(calls)} at position {position}")
        content = message.get("content")
        if isinstance(content, str):
            continue
        if isinstance(content, list):
            message["content"] = _joined_parts(name, content, position)
        elif content is not None or not (message.get("tool_calls") or any(message.get(key) for key in REASONING_KEYS)):
            raise RowError(name, "`content` of text in each message", f"{describe(content)} at position {position}")
    return messages


def _without_absent_keys(value: Any, is_call: bool = False) -> Any:
    """A copy of messages without keys that hold None, but for the arguments of tool calls, in which None is a value."""
    if isinstance(value, Mapping):
        return {
            key: item if is_call and key == "arguments" else _without_absent_keys(item, is_call or key == "tool_calls")
            for key, item in value.items()
            if item is not None
        }
    return [_without_absent_keys(item, is_call) for item in value] if isinstance(value, list) else value


def _joined_parts(name: str, parts: list, position: int) -> str:
    """Text of a content that is given as parts, which a template written for strings would print as Python code."""
    for part in parts:
        is_text = isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
        if not is_text:
            kind = part.get("type") if isinstance(part, dict) else None
            received = f"a part of type {kind!r:.60}" if kind else describe(part)
            raise RowError(name, "`content` of text in each message", f"{received} at position {position}")
    return "".join(part["text"] for part in parts)


def _pair_from_strings(
    row: Mapping, chosen: str, rejected: str | None, strings_as_messages: bool, prompt_turns: str
) -> Pair:
    prompt = row.get("prompt")
    if prompt is None:
        question = next((name for name in _QUESTIONS if row.get(name) is not None), None)
        if question is None:
            return _pair_from_responses(row, chosen, rejected, strings_as_messages, prompt_turns)
        for name in (question, "input"):
            if not isinstance(row.get(name), (str, type(None))):
                raise RowError(name, "a string", describe(row[name]))
        texts = dict.fromkeys((question, "input"))
        texts = (row.get(name) for name in texts)
        prompt = [{"role": "user", "content": "\n\n".join(filter(None, texts))}]
    elif isinstance(prompt, list):
        prompt = _messages("prompt", prompt)
        if not prompt:
            raise RowError("prompt", "at least one message", "an empty list")
    elif not isinstance(prompt, str):
        raise RowError("prompt", "a string or a list of messages", describe(prompt))
    elif strings_as_messages:
        return _pair_from_texts(prompt, chosen, rejected, prompt_turns)
    else:
        prompt, chosen, rejected, notes = split_at_prompt(prompt, chosen, rejected)
        return TextPair(prompt, chosen, rejected, notes=notes)
    return _with_answers(prompt, chosen, rejected, prompt_turns)


def _pair_from_texts(prompt: str, chosen: str, rejected: str | None, prompt_turns: str) -> ChatPair:
    """A string prompt and its responses, as turns."""
    whole, (chosen, rejected, notes) = chosen, without_prompt(prompt, chosen, rejected)
    if chosen != whole:
        chosen, rejected = chosen.strip(), rejected and rejected.strip()
    if prompt.rstrip().endswith(ASSISTANT) and is_transcript(prompt):
        turns = transcript_turns(prompt.rstrip())
    else:
        refuse_rendered_prompt(prompt)
        turns = [{"role": "user", "content": prompt}]
    return replace(_with_answers(turns, chosen, rejected, prompt_turns), notes=notes)


def _pair_from_responses(
    row: Mapping, chosen: str, rejected: str | None, strings_as_messages: bool, prompt_turns: str
) -> Pair:
    """Strings that hold their prompt themselves: dialogues of HH-RLHF, and texts that begin alike."""
    if is_transcript_with_answer(chosen):
        prompt, chosen, rejected = split_transcripts(chosen, rejected)
        if not strings_as_messages:
            return TextPair(prompt, chosen, rejected)
        rejected = None if rejected is None else rejected.strip()
        return _with_answers(transcript_turns(prompt), chosen.strip(), rejected, prompt_turns)
    expected = f"a prompt: `prompt`, `instruction` or `question`, or `chosen` from {HUMAN!r} to {ASSISTANT!r}"
    # Where the row has a column of prompts, or is to be rendered, a common beginning is chance.
    if rejected is not None and not strings_as_messages and not any(name in row for name in _PROMPTS):
        expected += ", or a common beginning of `chosen` and `rejected`"
        if is_empty(chosen) or is_empty(rejected):
            return TextPair("", chosen, rejected)
        if split := split_common(chosen, rejected):
            return TextPair(*split, notes=(COMMON_PROMPT,))
    raise RowError("prompt", expected, f"nothing (the row has {_present(row)})")


def _with_answers(prompt: Messages, chosen: str, rejected: str | None, prompt_turns: str) -> ChatPair:
    sides = [None if text is None else [*prompt, {"role": "assistant", "content": text}] for text in (chosen, rejected)]
    return _split_turns(sides[0] or [], sides[1], None, prompt_turns)


def _read(row: Mapping, pair: Pair) -> tuple[str, ...]:
    """The columns that `pair` was read from."""
    names = ["prompt", "chosen", "rejected"]
    if isinstance(row["chosen"], str) and row.get("prompt") is None:
        question = next((name for name in _QUESTIONS if row.get(name) is not None), None)
        names += dict.fromkeys((question, "input")) if question else ()
    if isinstance(pair, ChatPair):
        names += ["system", "history", "tools", "documents", "chat_template_kwargs"]
    return tuple(name for name in names if row.get(name) is not None)


def _present(row: Mapping) -> str:
    names = [name for name, value in row.items() if value is not None]
    return ", ".join(f"`{name}`" for name in names) or "no columns"
