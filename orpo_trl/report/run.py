"""A run that was read from its folder: its logs, recipe, samples and evaluations, and how it was made."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from orpo_trl import run_folder
from orpo_trl.evaluations import Evaluation, read_evaluations
from orpo_trl.metrics import evaluation_prefixes, number
from orpo_trl.pairs.preparation import PreparationReport
from orpo_trl.report import history as logs


@dataclass(frozen=True)
class Run:
    """What a run left in its folder; a field is empty if its file is missing.

    Attributes:
        folder: the run's output folder.
        name: the recipe's `run_name`, else the folder's name.
        history: logs in order, with `step`, `epoch` and metrics under their logged names.
        recipe: settings by key; for a run without a recipe, the settings that are not the default.
        recipe_text: the text of the recipe, or of those settings.
        record: versions, seed, git revision, device and datasets (`run.json`).
        preparation: preparation report of each dataset, as plain values.
        samples: answers to held-out prompts.
        evaluations: what benchmarks measured.
    """

    folder: Path
    name: str
    history: list[dict[str, Any]]
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    preparation: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    def training(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values in training, `[logs]` each, NaN where a value was not finite."""
        return self._once(logs.training, metric)

    def held_out(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values in evaluation, `[evaluations]` each: the mean over the evaluation sets."""
        return self._once(logs.held_out, metric)

    def _once(self, read: Callable, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """A series, read on its first use: a long run has tens of thousands of logs."""
        if (read, metric) not in self._series:
            self._series[read, metric] = read(self.history, metric)
        return self._series[read, metric]

    @cached_property
    def _series(self) -> dict[tuple[Callable, str], tuple[np.ndarray, np.ndarray]]:
        return {}

    def final_metrics(self) -> dict[str, float]:
        """Metrics of the last evaluation under their logged names (`eval_loss`), those that are not finite left out."""
        return logs.last_values(self.history)

    def metrics_before(self) -> dict[str, float]:
        """Metrics of the model before its first step, as `final_metrics`; empty where it was not evaluated then."""
        return logs.last_values([log for log in self.history if logs.is_before_training(log)])

    def metrics_after(self) -> dict[str, float]:
        """`final_metrics` without the evaluation before the first step."""
        return logs.last_values([log for log in self.history if not logs.is_before_training(log)])

    @cached_property
    def prefixes(self) -> list[str]:
        """What stands before a metric's name in evaluation, for each evaluation set: `eval_` or `eval_LABEL_`."""
        return evaluation_prefixes(name for log in self.history for name in log)

    def preparation_texts(self) -> list[str]:
        """The preparation report of each dataset, for people."""
        return [_preparation_text(report) for report in self.preparation.values()]

    def prepared_pairs(self) -> dict[str, int]:
        """Pairs of each dataset that the preparation kept, by name, where its report can be read."""
        reports = {name: _preparation(report) for name, report in self.preparation.items()}
        return {name: int(number(report.pairs) or 0) for name, report in reports.items() if report is not None}

    @property
    def last_step(self) -> int:
        return int(max((number(log.get("step")) or 0 for log in self.history), default=0))

    @cached_property
    def beta(self) -> float | None:
        """λ as recorded; for a run of TRL's trainer, from its rewards, which are λ times the log-probabilities."""
        stated = self.setting("beta")
        if stated is not None:
            return number(stated)
        for log in self.history:
            reward, logps = (number(log.get(name)) for name in ("rewards/chosen", "logps/chosen"))
            if reward is not None and logps:
                return float(f"{reward / logps:.3g}")
        return None

    def setting(self, key: str) -> Any:
        """A value as the run recorded it, else as the recipe states it; None where neither has it."""
        found = self.record.get(key)
        return self.recipe.get(key) if found is None else found

    @property
    def model_name(self) -> str:
        model = self.record.get("model")
        name = self.recipe.get("model_name_or_path") or (model.get("name") if isinstance(model, dict) else None)
        return str(name or "")


def _preparation(report: Any) -> PreparationReport | None:
    """A preparation report; None of one that another version has written otherwise."""
    try:
        found = PreparationReport.from_dict(report)
        str(found)  # its values have the types that a text of them needs
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return found


def _preparation_text(report: Any) -> str:
    found = _preparation(report)
    return json.dumps(report, ensure_ascii=False, indent=2) if found is None else str(found)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Runs of all folders, each folder once, with names that tell them apart.

    Raises:
        ValueError: naming the folder or file that is not what it should be.
    """
    return with_distinct_names([read_run(folder) for folder in {path.resolve(): path for path in folders}.values()])


def read_run(folder: Path) -> Run:
    """Read the folder that a run of `ORPOTrainer`, or of any trainer of transformers, wrote, or one with evaluations.

    Raises:
        ValueError: naming the folder that is no run's folder, or the file that cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a run's folder, received {'a file' if folder.exists() else 'no folder'}")
    recipe, recipe_text = run_folder.read_settings(folder)
    evaluations = read_evaluations(folder)
    return Run(
        folder=folder,
        name=str(recipe.get("run_name") or folder.resolve().name),
        history=_read_history(folder, is_optional=bool(evaluations)),
        recipe=recipe,
        recipe_text=recipe_text,
        record=run_folder.read_record(folder),
        preparation=run_folder.read_preparation(folder),
        samples=run_folder.read_samples(folder),
        evaluations=evaluations,
    )


def _read_history(folder: Path, is_optional: bool) -> list[dict[str, Any]]:
    """The logs; a model that was not trained here, such as a base model, has evaluations alone."""
    state = run_folder.TRAINER_STATE
    if is_optional and not any(any(folder.glob(name)) for name in (run_folder.LOGS, state, f"checkpoint-*/{state}")):
        return []
    return run_folder.read_history(folder)


def with_distinct_names(runs: Sequence[Run]) -> list[Run]:
    """The same runs. Runs that share a name get as many folders of their paths as make their names differ."""
    names = [run.name for run in runs]
    paths = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, paths), default=0) + 1):
        count = Counter(names)
        names = [
            name if count[name] == 1 else "/".join(parts[-depth:]) for name, parts in zip(names, paths, strict=True)
        ]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
