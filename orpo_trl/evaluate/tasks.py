"""Which tasks lm-eval has, and where their items come from: the Hub, or files."""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import DatasetDict

from orpo_trl.evaluate.items import digest, read_items, split_files
from orpo_trl.evaluate.options import DataUnreachable, Options

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class KnownTask:
    """A task whose place in lm-eval is known: reading all 14,000 files of tasks takes half a minute.

    Attributes:
        folder: below lm-eval's folder of tasks.
        shots: examples before each question; None: the task's own.
        metric: the one that the leaderboard shows.
        split: of the items that are scored.
    """

    folder: str
    shots: int | None
    metric: str
    split: str


# Shots and metrics: "About" of the Open LLM Leaderboard, version 1. `exact_match`: of the answer behind `####`.
LEADERBOARD = {
    "arc_challenge": KnownTask("arc", 25, "acc_norm", "test"),
    "hellaswag": KnownTask("hellaswag", 10, "acc_norm", "validation"),
    "mmlu": KnownTask("mmlu/default", 5, "acc", "test"),
    "truthfulqa_mc2": KnownTask("truthfulqa", 0, "acc", "validation"),
    "winogrande": KnownTask("winogrande", 5, "acc", "validation"),
    "gsm8k": KnownTask("gsm8k", 5, "exact_match", "test"),
}
KNOWN = {**LEADERBOARD, "ifeval": KnownTask("ifeval", None, "prompt_level_strict_acc", "train")}


@lru_cache(1)
def task_names() -> list[str]:
    """All tasks of lm-eval; takes half a minute.

    Raises:
        ValueError: where lm-eval is not installed.
    """
    print("Looking through the tasks of lm-eval …", file=sys.stderr)
    return list(task_manager(None).all_tasks)


@lru_cache(2)
def task_manager(folder: str | None) -> "TaskManager":
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"lm-eval is needed ({error}): pip install 'orpo-trl[eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if folder is None:
        return TaskManager()
    return TaskManager(include_path=str(Path(lm_eval.__file__).parent / "tasks" / folder), include_defaults=False)


def load_tasks(name: str, options: Options) -> tuple[list[Any], dict[str, Any]]:
    """Tasks of lm-eval or its group of them, with their items, and what to record of where these come from.

    Raises:
        DataUnreachable: where the Hub does not give them.
        ValueError, OSError: where files do not have them.
    """
    known = KNOWN.get(name)
    manager = task_manager(known.folder if known else None)
    if options.data is None:
        try:
            loaded = manager.load([name])
        except ImportError as error:
            raise ValueError(f"{name} needs another package ({error}): pip install 'orpo-trl[eval]'") from error
        except (OSError, ValueError) as error:
            raise DataUnreachable(name, "which comes from the Hub", _first_line(error)) from error
        groups = loaded.get("groups", {})
        return [groups[name]] if name in groups else [*loaded["tasks"].values()], {"data": "the Hub"}
    if known is None:
        raise ValueError(f"{name}: its data comes from the Hub alone; --data is for {', '.join(KNOWN)}")
    files = split_files(options.data, name, known.split)
    splits = {split: read_items(paths) for split, paths in files.items()}
    try:
        loaded = manager.load([{"group": f"{name}_of_files", "task": _specifications(name, splits)}])
    except ImportError as error:
        raise ValueError(f"{name} needs another package ({error}): pip install 'orpo-trl[eval]'") from error
    except Exception as error:  # a template or function of the task meets other rows than the Hub's
        raise ValueError(
            f"{name}: {options.data} does not have the rows of the Hub's dataset, or not its splits "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from error
    names = {split: [path.name for path in paths] for split, paths in files.items()}
    return [*loaded["tasks"].values()], {
        "data": names, "data_sha256": {split: digest(paths) for split, paths in files.items()}
    }  # fmt: skip


def _specifications(name: str, splits: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tasks as lm-eval has them, but for the rows."""
    if name != "mmlu":
        return [{"task": name, "custom_dataset": lambda **_: DatasetDict(**splits)}]
    subjects = dict.fromkeys(splits["test"]["subject"])

    def of(subject: str):
        rows = {split: found.filter(lambda row: row["subject"] == subject) for split, found in splits.items()}
        return lambda **_: DatasetDict(**rows)

    return [{"task": f"mmlu_{subject}", "custom_dataset": of(subject)} for subject in subjects]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
