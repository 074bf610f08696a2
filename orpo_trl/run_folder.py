"""What a run leaves in its output folder beside the model: names of the files, and how they are read and written."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# The recipe with its parents and overrides in one; a recipe again.
RECIPE = "recipe.yaml"
# Versions, seed, git revision, device, datasets: see `record.py`.
RUN = "run.json"
# What became of each dataset's rows: `PreparationReport.to_dict()` by name of the dataset.
PREPARATION = "preparation.json"
# A line for each log: step, epoch, and the metrics under the names of the log.
METRICS = "metrics.jsonl"
# A line for each answer to a held-out prompt: step, dataset, prompt, completion, chosen, rejected.
SAMPLES = "samples.jsonl"


def append_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Add records to a .jsonl file; a number that is not finite becomes null, since JSON has no word for it."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(
            json.dumps({key: finite(value) for key, value in record.items()}, ensure_ascii=False) + "\n"
            for record in records
        )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a .jsonl file; none where it does not exist.

    The last line of a run that was killed may be half written, and is left out.

    Raises:
        ValueError: naming the file and line that is no JSON object.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines, which also splits at U+2028
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line else None
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: expected a JSON object, received {line[:60]!r}") from error
        if isinstance(record, dict):
            records.append(record)
        elif line:
            raise ValueError(f"{path}:{number}: expected a JSON object, received {line[:60]!r}")
    return records


def keep_until(path: Path, step: int) -> None:
    """Leave out the records after a step, which a run that resumes at it writes anew."""
    records = read_lines(path)
    path.unlink(missing_ok=True)
    kept = [record for record in records if record.get("step", 0) <= step]
    if kept:
        append_lines(path, kept)


def finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
