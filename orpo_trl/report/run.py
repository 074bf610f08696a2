"""A run's folder, read: its logs, recipe, samples and how it was made."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from orpo_trl.recipe.files import read_recipe
from orpo_trl.report import history as logs
from orpo_trl.report.history import number
from orpo_trl.run_folder import METRICS, PREPARATION, RECIPE, RUN, SAMPLES, read_lines
from orpo_trl.yaml_text import to_yaml

TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Run:
    """What a run left in its folder; what it did not leave is empty.

    Attributes:
        folder: where it lies.
        name: the recipe's `run_name`, else the folder's name.
        history: logs in order, with `step`, `epoch` and metrics under their logged names.
        recipe: settings by key; of a run from Python, those that are not the defaults.
        recipe_text: the recipe's file as it stands; of a run from Python, those settings.
        record: `run.json`.
        preparation: `preparation.json`.
        samples: answers to held-out prompts.
    """

    folder: Path
    name: str
    history: list[dict[str, Any]]
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    preparation: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

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

    @cached_property
    def labels(self) -> list[str]:
        """Names of the evaluation sets; `[""]` for one without a name."""
        return logs.labels(self.history)

    @property
    def last_step(self) -> int:
        return int(max((number(log.get("step")) or 0 for log in self.history), default=0))

    @cached_property
    def beta(self) -> float | None:
        """λ as recorded; of a run of TRL's trainer, from its rewards, which are λ times the log-probabilities."""
        stated = self.setting("beta")
        if stated is not None:
            return number(stated)
        for log in self.history:
            reward, logps = (number(log.get(name)) for name in ("rewards/chosen", "logps/chosen"))
            if reward is not None and logps:
                return float(f"{reward / logps:.3g}")
        return None

    def setting(self, key: str) -> Any:
        """A value as the run recorded it, else as the recipe states it; None where neither does."""
        found = self.record.get(key)
        return self.recipe.get(key) if found is None else found

    @property
    def model_name(self) -> str:
        model = self.record.get("model")
        name = self.recipe.get("model_name_or_path") or (model.get("name") if isinstance(model, dict) else None)
        return str(name or "")


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Runs of all folders, each folder once, with names that tell them apart.

    Raises:
        ValueError: naming the folder or file that is not what it should be.
    """
    return with_distinct_names([read_run(folder) for folder in {path.resolve(): path for path in folders}.values()])


def read_run(folder: Path) -> Run:
    """Read the folder that a run of `ORPOTrainer`, or of any trainer of transformers, wrote.

    Raises:
        ValueError: naming the folder that is none of a run, or the file that cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a run's folder, received {'a file' if folder.exists() else 'no folder'}")
    history = read_lines(folder / METRICS) if (folder / METRICS).is_file() else _trainer_history(folder)
    record = _read_object(folder / RUN)
    recipe, recipe_text = _read_recipe(folder / RECIPE)
    settings = record.get("settings")
    if not recipe and isinstance(settings, dict):
        recipe, recipe_text = settings, to_yaml(settings)
    return Run(
        folder=folder,
        name=str(recipe.get("run_name") or folder.resolve().name),
        history=history,
        recipe=recipe,
        recipe_text=recipe_text,
        record=record,
        preparation=_read_object(folder / PREPARATION),
        samples=read_lines(folder / SAMPLES),
    )


def with_distinct_names(runs: Sequence[Run]) -> list[Run]:
    """The same runs; those that share a name get as many folders of their paths as tell them apart."""
    names = [run.name for run in runs]
    paths = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, paths), default=0) + 1):
        count = Counter(names)
        names = [
            name if count[name] == 1 else "/".join(parts[-depth:]) for name, parts in zip(names, paths, strict=True)
        ]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _trainer_history(folder: Path) -> list[dict[str, Any]]:
    """The logs that transformers keeps with each checkpoint: those of the newest."""
    states = [_read_object(path) for path in (*folder.glob(f"checkpoint-*/{TRAINER_STATE}"), folder / TRAINER_STATE)]
    states = [state for state in states if isinstance(state.get("log_history"), list)]
    if not states:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{folder}: expected a run's folder, with {METRICS} or a `log_history` in {TRAINER_STATE} or "
            f"checkpoint-*/{TRAINER_STATE}; found {found}"
        )
    newest = max(states, key=lambda state: number(state.get("global_step")) or 0)
    return [log for log in newest["log_history"] if isinstance(log, dict)]


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also where it is no UTF-8
        raise ValueError(f"{path}: expected JSON, received: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, received {str(found)[:60]!r}")
    return found


def _read_recipe(path: Path) -> tuple[dict[str, Any], str]:
    """Settings and text; environment variables stay the names that they are in the file."""
    if not path.is_file():
        return {}, ""
    text = path.read_text(encoding="utf-8", errors="replace")
    recipe = read_recipe(path)
    for (*above, last), original in recipe.secrets.items():
        target: Any = recipe.settings
        for part in above:
            target = target[part]
        target[last] = original
    return recipe.settings, text
