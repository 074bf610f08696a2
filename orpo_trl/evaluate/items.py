"""Items of a benchmark from files, in place of the Hub's: rows by split, as lm-eval's tasks read them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from orpo_trl.plain_files import MAX_RECORDS, read_text
from orpo_trl.run_folder import read_lines

ENDINGS = (".jsonl", ".json", ".parquet")


def split_files(data: Path, benchmark: str, split: str) -> dict[str, list[Path]]:
    """The files of each split.

    Args:
        data: `--data`. A file holds the items that are scored. A folder holds `SPLIT.jsonl`, or as datasets of the Hub
            do `SPLIT-00000-of-00001.parquet`; or, for each benchmark, such a folder or file of its name.
        split: of the items that are scored.

    Raises:
        ValueError: where there is no file.
    """
    if not data.exists():
        raise ValueError(f"--data: {data} does not exist")
    if data.is_dir():
        named = [path for path in sorted(data.iterdir()) if path.name == benchmark or _is_of(path, benchmark)]
        data = named[0] if named else data
    if data.is_file():
        return {split: [data]}
    found: dict[str, list[Path]] = {}
    for path in sorted(data.iterdir()):
        if path.suffix in ENDINGS:
            found.setdefault(path.stem.partition("-")[0], []).append(path)
    if split not in found:
        raise ValueError(f"--data: expected {split}.jsonl of {benchmark} in {data}, found {', '.join(found) or 'none'}")
    return found


def read_items(paths: list[Path]) -> Dataset:
    """Rows of .jsonl, .json (a list) and .parquet files. A key that a dictionary of a column lacks is None in it.

    Raises:
        ValueError, OSError: naming the file that cannot be read.
    """
    tables = []
    for path in paths:
        try:
            tables.append(pq.read_table(path) if path.suffix == ".parquet" else pa.Table.from_pylist(_rows(path)))
        except (pa.ArrowException, RecursionError) as error:
            raise ValueError(f"{path}: expected rows with the same columns, received: {error}") from error
    return Dataset(pa.concat_tables(tables, promote_options="default"))


def digest(paths: list[Path]) -> str:
    """SHA-256 of the contents of files."""
    found = hashlib.sha256()
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = read_lines(path) if path.suffix != ".json" else json.loads(read_text(path, MAX_RECORDS))
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected rows as JSON objects, received none")
    return rows


def _is_of(path: Path, benchmark: str) -> bool:
    return path.stem == benchmark and path.suffix in ENDINGS
