"""A held-out prompt as the page shows it: the last turn of the user, and the rest, which is folded."""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from orpo_trl.report.text import NOTHING

# Characters shown of one text, so that a page stays small.
MAX_TEXT = 10_000
# Texts of special tokens that are looked for, and the longest of them; a prompt has a handful.
_MAX_SPECIAL, _LONGEST_SPECIAL = 64, 100


class Piece(NamedTuple):
    """A part of a text, and whether it is a special token of the tokenizer."""

    text: str
    is_special: bool = False


@dataclass(frozen=True)
class Prompt:
    """A prompt in three parts.

    Attributes:
        turn: the last turn of the user; of what is no conversation, and of records that do not say, the whole prompt.
        before: the system prompt and the earlier turns, with the template's own texts.
        after: what the template puts before the answer.
    """

    turn: tuple[Piece, ...]
    before: tuple[Piece, ...] = ()
    after: tuple[Piece, ...] = ()

    @property
    def is_folded(self) -> bool:
        return bool(self.before or self.after)


def read_prompt(sample: dict[str, Any]) -> Prompt:
    """The prompt of a record of samples.jsonl; earlier versions recorded its text alone."""
    prompt, found = sample.get("prompt"), sample.get("special_tokens")
    special = [text for text in found if isinstance(text, str) and text] if isinstance(found, list) else []
    place = _place(sample.get("last_turn"), prompt)
    if place is None:
        return Prompt(_pieces(shorten_text(prompt), special))
    text, (begin, end) = str(prompt), place
    before, turn, after = (_pieces(shorten_text(part), special) for part in (text[:begin], text[begin:end], text[end:]))
    return Prompt(turn, before, after)


def shorten_text(value: Any) -> str:
    """A text of at most `MAX_TEXT` characters, which says how many it lacks."""
    if value is None:
        return NOTHING
    text = str(value)
    left = len(text) - MAX_TEXT
    return text if left <= 0 else f"{text[:MAX_TEXT]}… ({left:,} more characters)"


def _place(value: Any, prompt: Any) -> tuple[int, int] | None:
    """Begin and end of the last turn; None where the record has none, or no such one."""
    if not isinstance(prompt, str) or not isinstance(value, list) or [type(part) for part in value] != [int, int]:
        return None
    begin, end = value
    return (begin, end) if 0 <= begin < end <= len(prompt) else None


def _pieces(text: str, special: list[str]) -> tuple[Piece, ...]:
    """A text cut at its special tokens; nothing of an empty one."""
    known = sorted({name for name in special if len(name) <= _LONGEST_SPECIAL}, key=len, reverse=True)[:_MAX_SPECIAL]
    if not known:
        return (Piece(text),) if text else ()
    parts = re.split(f"({'|'.join(map(re.escape, known))})", text)
    return tuple(Piece(part, is_special=index % 2 == 1) for index, part in enumerate(parts) if part)
