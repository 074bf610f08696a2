"""Files with one JSON object in each line, from others."""

import json
from pathlib import Path
from typing import Any

from orpo_trl.plain_files import MAX_RECORDS, read_text


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file.

    Raises:
        ValueError: where a line is none, or there is no line.
        OSError: where the file cannot be read.
    """
    rows = []
    # `splitlines` would also cut at separators that JSON may have inside a text.
    for number, line in enumerate(read_text(path, MAX_RECORDS).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: expected a JSON object: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, received {line!r:.60}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: expected a JSON object in each line; the file is empty")
    return rows
