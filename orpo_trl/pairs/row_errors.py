"""The error of a row that has none of the accepted shapes."""

from typing import Any


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


def describe(value: Any) -> str:
    """A value in a few words, for errors."""
    if isinstance(value, str):
        return "a string" if value else "an empty string"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "nothing" if value is None else f"{type(value).__name__} {value!r:.60}"
