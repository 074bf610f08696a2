"""What is asked: the conversations of a benchmark, or of a file of one's own."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from orpo_trl.pairs.row_errors import RowError
from orpo_trl.pairs.rows import ChatPair, row_to_pair
from orpo_trl.plain_files import MAX_RECORDS, read_text

# Columns of a row that make a prompt; `row_to_pair` reads them as it does for training.
_COLUMNS = ("prompt", "instruction", "question", "input", "system", "history")
_NOT_ASKED = "-"


@dataclass(frozen=True)
class Conversation:
    """A prompt, and what is asked after its answer.

    Attributes:
        messages: the turns up to the first answer.
        follow_ups: user turns, each of which follows the answer to the one before.
        fields: of the row, what the file of answers repeats.
        temperature: of this prompt, where its benchmark sets one.
    """

    messages: list[dict[str, Any]]
    follow_ups: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    temperature: float | None = None

    @property
    def turns(self) -> int:
        """Answers that it needs."""
        return 1 + len(self.follow_ups)

    def before(self, answers: list[str]) -> list[dict[str, Any]]:
        """The turns that the next answer follows, given all answers before it."""
        turns = list(self.messages)
        for answer, question in zip(answers, self.follow_ups, strict=False):
            turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        return turns


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Rows of a .json or .jsonl file, each with its place in words, such as `prompts.jsonl, line 3`.

    Raises:
        ValueError, OSError: naming file and place of what cannot be read.
    """
    text = _text(path)
    if path.suffix == ".json":
        found = _parsed(text, str(path))
        if not isinstance(found, list):
            raise ValueError(f"{path}: expected a list of rows, received {found!r:.60}")
        rows = [(f"{path}, element {number}", row) for number, row in enumerate(found)]
    else:
        lines = enumerate(text.split("\n"), start=1)
        places = [(f"{path}, line {number}", line) for number, line in lines if line.strip()]
        rows = [(place, _parsed(line, place)) for place, line in places]
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f'{place}: expected a row, such as {{"prompt": "…"}}, received {row!r:.60}')
    if not rows:
        raise ValueError(f"{path}: expected rows, and it has none")
    return rows


def read_prompts(path: Path) -> list[Conversation]:
    """The prompts of a file: .txt with one a line; .json or .jsonl with `prompt`, `instruction` or `messages`.

    A row of `messages` ends with a user turn. A row may have `system`, and `input` beside `instruction`.

    Raises:
        ValueError, OSError: naming file, row and column.
    """
    if path.suffix in (".json", ".jsonl"):
        return [_conversation(place, row) for place, row in read_rows(path)]
    if path.suffix != ".txt":
        raise ValueError(f"PROMPTS: expected a benchmark, or a .txt, .json or .jsonl file, received {str(path)!r}")
    found = [user_turn(line, {"prompt": line}) for line in _text(path).split("\n") if line.strip()]
    if not found:
        raise ValueError(f"{path}: expected a prompt a line, and it has none")
    return found


def user_turn(text: str, fields: Mapping[str, Any], **more: Any) -> Conversation:
    return Conversation([{"role": "user", "content": text}], fields=fields, **more)


def text_of(place: str, row: Mapping[str, Any], name: str) -> str:
    """A text of a row.

    Raises:
        ValueError: where the row does not have it.
    """
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}: expected a text in `{name}`, received {value!r:.60}")
    return value


def _conversation(place: str, row: dict[str, Any]) -> Conversation:
    columns = {name: row[name] for name in _COLUMNS if row.get(name) is not None}
    if row.get("messages") is not None:
        columns["prompt"] = row["messages"]
    try:
        if not columns:
            raise RowError("prompt", "`prompt`, `instruction` or `messages`", ", ".join(row) or "an empty row")
        pair = cast(ChatPair, row_to_pair({**columns, "chosen": _NOT_ASKED}, strings_as_messages=True))
        if pair.prompt[-1]["role"] == "assistant":
            raise RowError("messages", "a user turn at the end", "one of the assistant, which needs no answer")
    except RowError as error:
        raise ValueError(f"{place}: {error}") from error
    repeated = {"prompt": row["prompt"]} if isinstance(row.get("prompt"), str) else {"messages": pair.prompt}
    if isinstance(row.get("instruction"), str) and len(columns) == 1:
        repeated = {"prompt": row["instruction"]}
    return Conversation(pair.prompt, fields=repeated)


def _text(path: Path) -> str:
    try:
        return read_text(path, MAX_RECORDS, errors="strict").removeprefix("\ufeff")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, received: {error}") from error


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: expected JSON, received: {error}") from error


def questions(conversation: Conversation) -> Iterator[str]:
    """The user's texts of a conversation, in order, for people."""
    yield "\n\n".join(str(turn["content"]) for turn in conversation.messages)
    yield from conversation.follow_ups
