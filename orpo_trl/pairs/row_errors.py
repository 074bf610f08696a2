"""The error of a row that has none of the accepted shapes."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_MAX_DEPTH = 100
_MAX_BITS = 14_000  # Python prints no number of more than 4,300 digits


class RowError(ValueError):
    """A row that has none of the accepted shapes.

    Attributes:
        column: the column at fault.
        expected: what it should hold.
        received: what it holds.
    """

    def __init__(self, column: str, expected: str, received: str):
        # Words of a template may be quoted, and a lone surrogate among them could be neither stored nor printed.
        received = received.encode("utf-8", "backslashreplace").decode("utf-8")
        super().__init__(f"column `{column}`: expected {expected}, received {received}")
        self.column, self.expected, self.received = column, expected, received


@contextmanager
def own_words(names: Mapping[str, str]) -> Iterator[None]:
    """Errors of a row that was converted, in the names of the user's columns: our name to the user's."""
    try:
        yield
    except RowError as error:
        if not names:
            raise

        def renamed(text: str) -> str:
            return re.sub(r"`(\w+)`", lambda match: f"`{names.get(match[1], match[1])}`", text)

        column = names.get(error.column, error.column)
        raise RowError(column, renamed(error.expected), renamed(error.received)) from error.__cause__


def describe(value: Any) -> str:
    """A value in a few words, for errors."""
    if isinstance(value, str):
        return "a string" if value else "an empty string"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "nothing" if value is None else f"{type(value).__name__} {value!r:.60}"


def check_values(column: str, value: Any, depth: int = 0) -> None:
    """Refuse what no tokenizer and no template could take: half characters, and values of absurd size.

    Raises:
        RowError: for text with a lone surrogate, values nested more than 100 deep, numbers of thousands of digits.
    """
    if isinstance(value, str):
        if not value.isascii():
            _check_text(column, value)
    elif depth > _MAX_DEPTH:
        raise RowError(column, f"values nested at most {_MAX_DEPTH} deep", "deeper ones")
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_values(column, item, depth + 1)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_values(column, key, depth + 1)
            check_values(column, item, depth + 1)
    elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise RowError(column, f"numbers of at most {_MAX_BITS:,} bits", f"one of {value.bit_length():,}")


def _check_text(column: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        part = text[max(error.start - 10, 0) : error.start + 10]
        expected = "text without lone surrogates, which are halves of characters"
        raise RowError(column, expected, f"{part!r} at character {error.start}") from error
