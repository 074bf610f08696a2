"""What a run leaves in its output folder beside the model: the only place that writes these files and reads them."""

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orpo_trl.hidden import hide_all
from orpo_trl.metrics import number
from orpo_trl.plain_files import MAX_RECORDS, MAX_SETTINGS, UnsafeFile, appending, read_text, write_text
from orpo_trl.yaml_text import YamlReader, to_yaml

# The recipe with its parents and overrides in one file; it is a recipe again.
RECIPE = "recipe.yaml"
# Versions, seed, git revision, device, datasets: see `callbacks/record.py`.
RUN = "run.json"
# What became of each dataset's rows: `PreparationReport.to_dict()` by name of the dataset.
PREPARATION = "preparation.json"
# One line per log: step, epoch, and the metrics under their logged names.
LOGS = "metrics.jsonl"
# One line per answer to a held-out prompt: step, dataset, prompt, completion, chosen, rejected; where the prompt's last
# user turn begins and ends, in characters, null in what is no conversation; texts of its special tokens.
SAMPLES = "samples.jsonl"
# One line per row of an optimiser step that was not finite: step, rank, source, row, tokens, log-probabilities.
TROUBLE = "trouble.jsonl"
# Written by every trainer of transformers, beside each checkpoint.
TRAINER_STATE = "trainer_state.json"


# ---- Writing ---------------------------------------------------------------------------------------------------------


def write_origin(folder: Path, recipe: str | None, preparation: dict[str, Any], record: dict[str, Any]) -> None:
    """Write what a run was made of.

    Args:
        folder: the run's output folder, made where it does not exist.
        recipe: text of the recipe; None keeps the one that is there.
        preparation: `PreparationReport.to_dict()` by name of the dataset.
        record: what `read_record` returns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if recipe is not None:
        write_text(folder / RECIPE, recipe)
    _write_object(folder / PREPARATION, preparation)
    write_record(folder, record)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    _write_object(folder / RUN, record)


def mark_saved(folder: Path) -> None:
    """Note that the model of a finished run is in its folder: `resume: auto` takes it for done from then on."""
    record = read_record(folder)
    if "finished" in record:
        write_record(folder, {**record, "saved": now()})


def now() -> str:
    """The time as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def append_log(folder: Path, log: dict[str, Any]) -> None:
    append_lines(folder / LOGS, [log])


def append_samples(folder: Path, samples: Iterable[dict[str, Any]]) -> None:
    append_lines(folder / SAMPLES, samples)


def append_trouble(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    append_lines(folder / TROUBLE, rows)


def keep_until(folder: Path, step: int, logs_at_step: int | None = None) -> None:
    """Remove the logs, samples and trouble after a step, because a run that resumes at that step writes them again.

    Args:
        folder: the run's.
        step: of the checkpoint; -1 to remove all.
        logs_at_step: logs of the step itself that were written before the checkpoint; None for all. At the end of a
            run, more of them follow.
    """
    for path in (folder / LOGS, folder / SAMPLES, folder / TROUBLE):
        kept = [record for record in read_lines(path) if record.get("step", 0) <= step]
        if path.name == LOGS and logs_at_step is not None:
            before = sum(record.get("step", 0) < step for record in kept)
            kept = kept[: before + logs_at_step]
        if kept:
            write_text(path, "".join(_lines(kept)))  # whole: a run that is cut off meanwhile would have lost them
        else:
            path.unlink(missing_ok=True)


def append_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Add records to a .jsonl file. A number that is not finite becomes null, since JSON has no word for it."""
    with appending(path) as file:
        file.writelines(_lines(records))


def _lines(records: Iterable[dict[str, Any]]) -> Iterator[str]:
    for record in records:
        yield json.dumps({key: _finite(value) for key, value in hide_all(record).items()}, ensure_ascii=False) + "\n"


def _write_object(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(hide_all(value), indent=2, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    return number(value) if isinstance(value, float) else value


# ---- Reading ---------------------------------------------------------------------------------------------------------
# A file that does not exist is empty: each run writes some of them only. Readers raise a ValueError that names the file
# where its content is not what it should be.


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Logs of a run in order, with `step`; those of another trainer of transformers from its newest checkpoint.

    Raises:
        ValueError: where the folder has neither.
    """
    return read_lines(folder / LOGS) if (folder / LOGS).is_file() else _trainer_history(folder)


def read_samples(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / SAMPLES)


def read_trouble(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / TROUBLE)


def read_record(folder: Path) -> dict[str, Any]:
    """Versions, seed, git revision, device and datasets of a run."""
    return _read_object(folder / RUN)


def read_preparation(folder: Path) -> dict[str, Any]:
    """`PreparationReport.to_dict()` by name of the dataset."""
    return _read_object(folder / PREPARATION)


def read_settings(folder: Path) -> tuple[dict[str, Any], str]:
    """Settings of a run's recipe, and the text of the recipe; environment variables stay names, as in the file.

    Runs that earlier versions started from Python have no recipe, but `settings` in their record.
    """
    recipe, text = _read_recipe(folder / RECIPE)
    settings = read_record(folder).get("settings")
    if not recipe and isinstance(settings, dict):
        return settings, to_yaml(settings)
    return recipe, text


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a .jsonl file.

    The last line of a run that was killed may be half written, and is left out.

    Raises:
        ValueError: naming the file and the line that is no JSON object.
    """
    text = _text(path)
    if text is None:
        return []
    lines = text.split("\n")  # not splitlines, which also splits at U+2028
    records = []
    for line_number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line else None
        except (ValueError, RecursionError) as error:  # RecursionError: nested too deep
            if line_number == len(lines) and isinstance(error, json.JSONDecodeError):
                break
            raise ValueError(f"{path}:{line_number}: expected a JSON object, received {line[:60]!r}") from error
        if isinstance(record, dict):
            records.append(record)
        elif line:
            raise ValueError(f"{path}:{line_number}: expected a JSON object, received {line[:60]!r}")
    return records


def _read_recipe(path: Path) -> tuple[dict[str, Any], str]:
    """Without the parents that a recipe of somebody else may name, and with environment variables by name."""
    text = _text(path, MAX_SETTINGS, errors="replace")
    if text is None:
        return {}, ""
    recipe = YamlReader().read(text)
    return recipe if isinstance(recipe, dict) else {}, text


def _trainer_history(folder: Path) -> list[dict[str, Any]]:
    own = [path for path in folder.glob(f"checkpoint-*/{TRAINER_STATE}") if not path.parent.is_symlink()]
    states = [_read_object(path) for path in (*own, folder / TRAINER_STATE)]
    states = [state for state in states if isinstance(state.get("log_history"), list)]
    if not states:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{folder}: expected a run's folder, with {LOGS} or a `log_history` in {TRAINER_STATE} or "
            f"checkpoint-*/{TRAINER_STATE}; found {found}"
        )
    newest = max(states, key=lambda state: number(state.get("global_step")) or 0)
    return [log for log in newest["log_history"] if isinstance(log, dict)]


def _read_object(path: Path) -> dict[str, Any]:
    text = _text(path)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, received: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, received {str(found)[:60]!r}")
    return found


def _text(path: Path, most: int = MAX_RECORDS, errors: str = "strict") -> str | None:
    """The text of a file of a run, of at most so many bytes; None where there is none.

    A link to a file outside of the folder is refused: a report would show to others what only its maker may read.

    Raises:
        ValueError: naming the file that is not read.
    """
    if not path.is_symlink() and not path.exists():
        return None
    target = path.resolve()
    if path.is_symlink() and not target.is_relative_to(path.parent.resolve()):
        raise UnsafeFile(f"{path}: this is a link to {target}, outside of the run's folder; it is not read")
    try:
        return read_text(path, most, errors)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected JSON, received: {error}") from error
