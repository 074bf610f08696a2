"""What is wrong with a data file: where, and what to do about it.

Readers of files name a position among bytes, or nothing; some move or drop the cells of a row that is too long or too
short.
"""

import csv
import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Json

NO_ROW = "it has no rows"

_LIMIT = 2**63
# Brackets of JSON inside each other. From 64 on Arrow has no type for them, and from some thousands on its reader of
# JSON ends the process.
_MAX_DEPTH = 60
_HAS_LARGE_NUMBER = re.compile(rb"\d{19}").search
_NO_MARKS = bytes(set(range(256)) - set(b'[]{}"\n'))
_HAS_SURROGATE = re.compile("[\ud800-\udfff]").search
_LARGE = "a number beyond 64 bits"
_SURROGATE = "half a character (a lone surrogate)"
_CHUNK = 1 << 24


class _Fault(Exception):
    """The first fault of a file, in words."""


class _Large(int):
    """A whole number beyond 64 bits, whose digits readers of JSON cut."""


def fault_of(
    path: Path, columns: Collection[str] | None = None, features: Mapping[str, Any] | None = None
) -> str | None:
    """The first fault of a .json, .jsonl, .csv or .parquet file: its line, what is there, and what to do.

    Args:
        path: of the file.
        columns: those in which numbers beyond 64 bits are a fault; None: all.
        features: of the columns of a JSON file, as its reader has found them, where they are known.

    Returns:
        Words, or None where the file cannot be opened or nothing wrong is found in it.
    """
    try:
        if path.suffix in (".json", ".jsonl"):
            _read_json(path, columns, features or {})
        elif path.suffix == ".csv":
            _read_csv(path)
        elif path.suffix == ".parquet":
            _read_parquet(path)
    except _Fault as fault:
        return str(fault)
    except (OSError, RecursionError):
        pass
    return None


def may_be_misread(path: Path) -> bool:
    """Whether a JSON file has what its reader changes or dies of: 19 digits in a row, or brackets nested deep."""
    depth = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK) + file.readline():
            depths = depth + _depths(chunk)
            if _HAS_LARGE_NUMBER(chunk) or depths.max(initial=0) > _MAX_DEPTH:
                return True
            depth = depths[-1] if len(depths) else depth
    return False


def _depths(text: bytes) -> np.ndarray:
    """How deep JSON is nested behind each of its brackets `[brackets]`, int64. Those within strings are none."""
    marks = np.frombuffer(text.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _NO_MARKS), np.uint8)
    quotes = np.cumsum(marks == ord('"'))
    quotes -= np.maximum.accumulate(np.where(marks == ord("\n"), quotes, 0))  # no string is longer than its line
    opens, closes = (np.isin(marks, [*map(ord, pair)]) & (quotes % 2 == 0) for pair in ("[{", "]}"))
    return np.cumsum(opens.astype(int) - closes)[opens | closes]


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _Fault(
                    f"line {number} is not UTF-8 text (byte 0x{line[error.start]:02x}). Write the file in UTF-8, or "
                    "remove that line."
                ) from error


def _read_json(path: Path, columns: Collection[str] | None, features: Mapping[str, Any]) -> None:
    first = next((line for line in _lines(path) if line.strip()), None)
    if first is None:
        raise _Fault(NO_ROW)
    if first.lstrip().startswith("[") or first.strip() == "{":  # over several lines
        lines = list(_lines(path))
        _refuse_deep(lines)
        value = _parse("".join(lines), "")
        rows = [(f"element {number}", row) for number, row in enumerate(value if isinstance(value, list) else [value])]
        if not rows:
            raise _Fault(NO_ROW)
        for place, row in rows:
            _check_row(row, place, columns, features)
        return
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            _refuse_deep([line], number)
            _check_row(_parse(line, f"line {number}"), f"line {number}", columns, features)


def _refuse_deep(lines: list[str], first: int = 1) -> None:
    depth = 0
    for number, line in enumerate(lines, start=first):
        if "[" in line or "{" in line or "]" in line or "}" in line:
            depths = depth + _depths(line.encode())
            depth = depths[-1] if len(depths) else depth
            if depths.max(initial=0) > _MAX_DEPTH:
                raise _Fault(
                    f"line {number} has values nested more than {_MAX_DEPTH} deep. Remove it, or write them as a "
                    "string of JSON."
                )


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text, parse_int=_number)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise _Fault(
            f"{place or f'line {line}'} is not JSON ({reason}). Repair or remove it: a file holds one row a line, or a "
            "list of rows."
        ) from error


def _number(digits: str) -> int:
    if len(digits) < 19:
        return int(digits)
    if len(digits) > 40:
        return _Large(0)
    number = int(digits)
    return number if -_LIMIT <= number < _LIMIT else _Large(number)


def _check_row(row: Any, place: str, columns: Collection[str] | None, features: Mapping[str, Any]) -> None:
    if not isinstance(row, dict):
        raise _Fault(f"{place} is {row!r:.60}, and not a row. Write a JSON mapping of columns to values, or remove it.")
    for name, value in row.items():
        found = {problem for part in _leaves(value) if (problem := _problem(part))}
        if _LARGE in found and (columns is None or name in columns):
            raise _Fault(f"{place} has {_LARGE} in the column `{name}`. Write it as a string.")
        if _SURROGATE in found:
            raise _Fault(f"{place} has {_SURROGATE} in the column `{name}`. Repair or remove it.")
        for text in _texts_of_json(features.get(name), value):
            if _is_json_value(text):
                raise _Fault(
                    f"{place} has the text {text!r:.60} in the column `{name}`, where other rows have no text: it "
                    "would be read as a value of JSON. Write the column alike in all rows: as texts, or as lists of "
                    "turns."
                )


def has_json(feature: Any) -> bool:
    """Whether a feature of `datasets` stores a part of its values as JSON, as it does where rows differ in type."""
    if feature is None:
        return False
    if isinstance(feature, Mapping):
        return any(map(has_json, feature.values()))
    return isinstance(feature, Json) or has_json(getattr(feature, "feature", None))


def _texts_of_json(feature: Any, value: Any) -> Iterator[str]:
    """The texts that stand where a feature stores JSON. Those inside a list or mapping there are stored with it."""
    if isinstance(feature, Json):
        if isinstance(value, str):
            yield value
    elif isinstance(feature, Mapping) and isinstance(value, dict):
        for name, part in value.items():
            yield from _texts_of_json(feature.get(name), part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts_of_json(getattr(feature, "feature", None), part)


def _is_json_value(text: str) -> bool:
    """Whether `datasets` takes a text for JSON of something else than turns, which are read from a text too."""
    try:
        return not isinstance(Json().decode_example(text), (dict, list))
    except (ValueError, RecursionError):
        return False


def _leaves(value: Any) -> Iterator[Any]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if parts is None:
        yield value
    else:
        for part in parts:
            yield from _leaves(part)


def _problem(value: Any) -> str | None:
    if isinstance(value, _Large):
        return _LARGE
    if isinstance(value, str) and not value.isascii() and _HAS_SURROGATE(value):
        return _SURROGATE
    return None


def _read_csv(path: Path) -> None:
    limit = csv.field_size_limit(sys.maxsize)
    rows, line = csv.reader(_lines(path)), 1
    try:
        header = next(rows, [])
        if not header:
            raise _Fault(NO_ROW)
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise _Fault(f"line 1 names the column `{twice[0]}` twice. Rename one of them.")
        count, line = 0, rows.line_num + 1
        for row in rows:
            if row and len(row) != len(header):
                raise _Fault(
                    f"line {line} has {len(row)} cells, and the header {len(header)}. Repair that row: a cell with "
                    "commas, quotes or line breaks stands in double quotes."
                )
            if any("\0" in cell for cell in row):
                raise _Fault(f"line {line} has a NUL character, which ends a cell for many readers. Remove it.")
            count, line = count + bool(row), rows.line_num + 1
        if not count:
            raise _Fault(NO_ROW)
    except csv.Error as error:
        raise _Fault(f"the row from line {line} on is not CSV ({error}). Repair or remove it.") from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> None:
    try:
        with pq.ParquetFile(path) as file:
            if not file.metadata.num_rows:
                raise _Fault(NO_ROW)
            for group in range(file.num_row_groups):
                file.read_row_group(group)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise _Fault(f"it is no whole Parquet file ({reason}). Write or download it again.") from error
