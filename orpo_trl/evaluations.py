"""One evaluation of a model, as a file: `FOLDER/evaluations/NAME.json`."""

import re
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from orpo_trl.hidden import hide_all
from orpo_trl.plain_files import MAX_RECORDS, UnsafeFile, read_text, write_text
from orpo_trl.printable import printable

FOLDER = "evaluations"
# `Evaluation.template` where the chat template that comes with the model rendered the prompts.
OWN_TEMPLATE = "chat template of the model"
# The same where answers came without a record of it.
UNKNOWN_TEMPLATE = "unknown"


class Figure(BaseModel):
    """One measured value, in the unit that the benchmark publishes.

    Accuracies are fractions of 1, win rates of AlpacaEval are percent, scores of MT-Bench go from 1 to 10.

    Attributes:
        stderr: standard error, in the unit of `value`.
        n: items that the value is a mean over.
        low, high: ends of an interval of 95 %.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    value: float
    stderr: float | None = None
    n: int | None = None
    low: float | None = None
    high: float | None = None


class Evaluation(BaseModel):
    """What one benchmark has measured of one model.

    Attributes:
        benchmark: `ifeval`, `arc_challenge`, `hellaswag`, `mmlu`, `truthfulqa_mc2`, `winogrande`, `gsm8k`,
            `preferences`, `alpaca_eval_1`, `alpaca_eval_2`, `mt_bench`, or a task of lm-eval.
        model: Hub id, or the name of a folder.
        figures: by name. ifeval: `prompt_strict`, `instruction_strict`, `prompt_loose`, `instruction_loose`;
            alpaca_eval: `win_rate`, `lc_win_rate`; mt_bench: `score`, `turn_1`, `turn_2`; preferences: `accuracy`,
            `margin`, `log_odds`, `chosen`, `rejected`; tasks of lm-eval: its name of the metric, such as `acc_norm`.
        asked, answered: items that were to be scored, and those that were.
        template: what rendered the prompts: `OWN_TEMPLATE`, or the name of another; None where no template did;
            `UNKNOWN_TEMPLATE` of answers that came without a record.
        shots: examples before each question; None where the benchmark has no such thing.
        judge: the judge's configuration and model; None for a benchmark without a judge.
        limit: items asked for with `--limit`; None for the whole benchmark.
        settings: every other setting that decides the figures.
        versions: of the packages that decide the figures.
        date: when it ended, as `run_folder.now` writes it.
        groups: figures of parts, such as `groups["category"]["math"]["score"]`.
        notes: sentences for the reader.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    benchmark: str
    model: str
    figures: dict[str, Figure]
    asked: int
    answered: int
    template: str | None
    shots: int | None
    judge: str | None
    limit: int | None
    settings: dict[str, Any]
    versions: dict[str, str]
    date: str
    groups: dict[str, dict[str, dict[str, Figure]]] = {}
    notes: list[str] = []

    @property
    def name(self) -> str:
        """Name of its file without the ending: the benchmark, the judge, and `first-N` for a part of the items.

        Evaluations of one name replace each other. Those of another judge, or of fewer items, stay beside.
        """
        parts = [self.benchmark, self.judge or "", f"first-{self.limit}" if self.limit else ""]
        return "-".join(re.sub(r"[^A-Za-z0-9_.-]+", "_", part).strip("._-")[:80] or "_" for part in parts if part)


def write_evaluation(folder: Path, evaluation: Evaluation) -> Path:
    """Write an evaluation into a model's or a run's folder, in place of the older one of its name.

    Returns:
        The file.
    """
    path = folder / FOLDER / f"{evaluation.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = Evaluation.model_validate(hide_all(evaluation.model_dump()))
    write_text(path, hidden.model_dump_json(indent=2) + "\n")
    return path


def read_evaluations(folder: Path) -> list[Evaluation]:
    """The evaluations of a folder in the order of their names.

    A damaged file, and one that leads out of the folder by a link, is left out with a line on standard error.
    """
    found = []
    for path in sorted((folder / FOLDER).glob("*.json")):
        if ".answers." in path.name:  # what a judge was shown lies beside
            continue
        try:
            found.append(_read(path))
        except (ValueError, OSError, RecursionError) as error:
            print(printable(f"Left out: {error}"), file=sys.stderr)
    return found


def _read(path: Path) -> Evaluation:
    if not path.resolve().is_relative_to(path.parents[1].resolve()):
        raise UnsafeFile(f"{path}: this is a link to a file outside of the folder; it is not read")
    text = read_text(path, MAX_RECORDS)
    try:
        return Evaluation.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path}: {place}: {first['msg']}") from error
