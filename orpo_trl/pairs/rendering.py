"""A conversation to text by the chat template, and which of its words the template left out."""

import html
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from orpo_trl.pairs.remarks import (
    ANSWER,
    CHANGED,
    DOCUMENTS,
    EARLIER_THOUGHTS,
    LOST_OTHER,
    LOST_TURN,
    REASONING,
    TOOL_CALL,
    TOOLS,
)
from orpo_trl.pairs.rows import REASONING_KEYS, ChatPair, Messages, RowError
from orpo_trl.pairs.template_limits import TemplateLimit, check_length, template_limits

_MAX_QUOTE = 60
# Thoughts inside the text of an answer, which some templates strip and others render anew.
_THOUGHTS = re.compile(r"(?:<think>)?(.*?)</think>(.*)", re.DOTALL)


class Loss(NamedTuple):
    """A text of a row that its rendering lacks: the kind of fault, and the lost words."""

    kind: str
    words: str


@dataclass
class Rendering:
    """Texts of one conversation.

    Attributes:
        prompt: with the header of the answer behind it, as the model sees it when it generates.
        dialogues: prompt and response, for the chosen and, where there is one, the rejected response.
        losses: what the template left out.
        is_empty: for each response, whether nothing of it is left.
    """

    prompt: str
    dialogues: list[str]
    losses: list[Loss]
    is_empty: list[bool]


def render(pair: ChatPair, tokenizer: PreTrainedTokenizerBase) -> Rendering:
    """Render a conversation with each of its responses, and look for every text of its turns in the result.

    Raises:
        RowError: where the template refuses the turns, or trips over them.
        ValueError: where there is no template, or it is no valid one.
        TemplateLimit: where this takes too much time or memory.
    """
    with _limits(tokenizer):
        return _render(pair, tokenizer)


def render_turns(messages: Messages, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False) -> str:
    """The text of a conversation.

    Args:
        messages: its turns.
        add_generation_prompt: puts the header of the next answer behind it.

    Raises:
        RowError, ValueError, TemplateLimit: as `render`.
    """
    with _limits(tokenizer):
        return _apply(tokenizer, messages, {}, add_generation_prompt=add_generation_prompt)


@contextmanager
def _limits(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """`template_limits`, and a tokenizer's name in their errors."""
    try:
        with template_limits(str(tokenizer.chat_template)):
            yield
    except TemplateLimit as error:
        begin = f"{tokenizer.chat_template!r:.60}"
        name = tokenizer.name_or_path
        raise TemplateLimit(f"The chat template of {name!r}, which begins with {begin}, {error}") from None


def _render(pair: ChatPair, tokenizer: PreTrainedTokenizerBase) -> Rendering:
    responses = [pair.chosen] if pair.rejected is None else [pair.chosen, pair.rejected]
    prompt = _apply(tokenizer, pair.prompt, pair.options, add_generation_prompt=True)
    dialogues = [_apply(tokenizer, [*pair.prompt, *turns], pair.options) for turns in responses]
    texts = [*_texts_of_options(pair.options), *_texts_of_turns(pair.prompt)]
    end = _end_of(texts, prompt)
    found: set[Loss] = set()
    is_empty = []
    for dialogue, turns in zip(dialogues, responses, strict=True):
        own = _texts_of_turns(turns, is_response=True)
        common = _common_length(prompt, dialogue)
        if common == len(prompt):
            found.update(_missing(texts, prompt))
        else:
            # A text may stand in the response alone by chance, which its own texts then lack.
            left_out = set(_missing([*texts, *own], dialogue)) & set(map(_quoted, texts))
            moved = set(_missing(texts, prompt[:common])) - left_out
            found |= left_out
            if moved:
                found.add(_changed_turn(pair.prompt, moved))
        lost = _missing(own, dialogue[min(common, end) :])
        found.update(lost)
        is_empty.append(bool(own) and len(lost) == len(own) and _is_bare(pair, dialogue, tokenizer))
    return Rendering(prompt, dialogues, sorted(found), is_empty)


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Messages, options: dict[str, Any], **kwargs: Any) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "The rows hold conversations, but the tokenizer has no chat template. Set `chat_template_path` to a Jinja "
            "file or to a tokenizer that has one."
        )
    from jinja2 import TemplateSyntaxError
    from jinja2.exceptions import SecurityError

    try:
        return check_length(str(tokenizer.apply_chat_template(messages, tokenize=False, **kwargs, **options)))
    except (TemplateLimit, MemoryError):
        raise
    except SecurityError as error:
        raise TemplateLimit(f"asks for what Jinja's sandbox refuses: {error}") from error
    except RecursionError as error:
        raise TemplateLimit("calls itself without end.") from error
    except OverflowError as error:
        raise TemplateLimit(f"asks for too large a number: {error}") from error
    except TemplateSyntaxError as error:
        raise ValueError(f"The chat template is not valid Jinja: {error} (line {error.lineno})") from error
    except Exception as error:
        # Templates refuse by `raise_exception`, or trip over a turn that they were not written for, in any way.
        raise RowError("chosen", "turns that the chat template accepts", f"{type(error).__name__}: {error}") from error


def _texts_of_turns(turns: Messages, is_response: bool = False) -> list[Loss]:
    """The texts that a rendering of these turns must hold, each with the kind of fault where it does not."""
    # Thoughts belong to the answer that is trained where no user turn follows them.
    last_user = max((k for k, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    texts = []
    for position, turn in enumerate(turns):
        is_answer = is_response and turn["role"] == "assistant"
        thoughts = REASONING if is_answer and position > last_user else EARLIER_THOUGHTS
        content = turn.get("content") or ""
        if turn["role"] == "assistant" and "</think>" in content:
            match = _THOUGHTS.fullmatch(content)
            if match:
                texts.append(Loss(thoughts, match[1]))
                content = match[2]
        # Some data sets give the same thoughts under two names.
        named = dict.fromkeys(turn[key] for key in REASONING_KEYS if _is_text(turn.get(key)))
        texts += [Loss(thoughts, text) for text in named]
        kind = ANSWER if is_answer else LOST_TURN.get(turn["role"], LOST_OTHER)
        texts.append(Loss(kind, content))
        for call in turn.get("tool_calls") or ():
            texts += [Loss(TOOL_CALL, text) for text in _texts_of_call(call)]
    return [Loss(kind, text.strip()) for kind, text in texts if text.strip()]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _texts_of_call(call: Any) -> Iterator[str]:
    function = _function(call)
    name, arguments = function.get("name"), function.get("arguments")
    if isinstance(name, str):
        yield name
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments)
    yield from _leaves(arguments)


def _function(value: Any) -> dict[str, Any]:
    """The function of a tool or of a call, which some write without the mapping around it."""
    inner = value.get("function", value) if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) else {}


def _leaves(value: Any) -> Iterator[str]:
    """Texts and whole numbers of a nested value. How templates write other values differs too much to look for them."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield str(key)
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        yield str(value)


def _texts_of_options(options: dict[str, Any]) -> Iterator[Loss]:
    for tool in options.get("tools") or ():
        function = _function(tool)
        # Templates may indent the further lines of a description.
        texts = [function.get("name"), *str(function.get("description") or "").splitlines()[:1]]
        yield from (Loss(TOOLS, text.strip()) for text in texts if _is_text(text) and text.strip())
    for document in options.get("documents") or ():
        if isinstance(document, dict):
            yield from (Loss(DOCUMENTS, text) for text in document.values() if isinstance(text, str) and text.strip())


def _missing(texts: Iterable[Loss], rendered: str) -> list[Loss]:
    """The texts that a rendering lacks, each part of it used once."""
    texts = list(texts)
    position = 0
    for _, text in texts:
        position = rendered.find(text, position)
        if position < 0:
            break
        position += len(text)
    else:
        return []
    # In another order, with other white space, or escaped: compare without either, the longest texts first.
    left = _squeezed(rendered)
    lost = []
    for loss in sorted(texts, key=lambda loss: -len(loss.words)):
        text = _squeezed(loss.words)
        position = left.find(text)
        if position < 0:
            lost.append(_quoted(loss))
        else:
            left = left[:position] + "\0" + left[position + len(text) :]
    return lost


def _quoted(loss: Loss) -> Loss:
    return loss._replace(words=loss.words[:_MAX_QUOTE])


def _squeezed(text: str) -> str:
    """A text without white space, and without the escapes of JSON and XML."""
    text = html.unescape(text) if "&" in text else text
    if "\\" in text:
        text = re.sub(r"\\+u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
        text = re.sub(r"\\+[nrtbf]|\\", "", text)
    return "".join(text.split())


def _end_of(texts: list[Loss], prompt: str) -> int:
    """Where the last text of the prompt that its rendering holds as it stands ends; 0 where it holds none."""
    for text in reversed(texts):
        position = prompt.rfind(text.words)
        if position >= 0:
            return position + len(text.words)
    return 0


def _changed_turn(turns: Messages, moved: set[Loss]) -> Loss:
    """The first turn that is rendered otherwise once a response follows, and counts to the response.

    `moved`: the texts of the prompt that are left out of what prompt and dialogue have in common, and are not lost.
    """
    for turn in turns:
        for text in _texts_of_turns([turn]):
            if (short := _quoted(text)) in moved:
                return Loss(f"{turn['role']} turn {CHANGED}", short.words)
    return Loss(f"prompt {CHANGED}", min(moved).words)


def _common_length(a: str, b: str) -> int:
    if b.startswith(a):
        return len(a)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _is_bare(pair: ChatPair, dialogue: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a dialogue is rendered as one with an empty answer."""
    try:
        empty = _apply(tokenizer, [*pair.prompt, {"role": "assistant", "content": ""}], pair.options)
    except RowError:
        return False
    return empty.split() == dialogue.split()
