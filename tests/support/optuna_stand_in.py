"""The part of optuna that a search of transformers' Trainer calls: a study that tries given values. No test itself."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

from transformers.hyperparameter_search import OptunaBackend
from transformers.integrations import integration_utils


class Trial:
    def __init__(self, study: "Study", number: int, values: dict[str, Any]):
        self.study, self.number, self.params, self.reported, self._values = study, number, {}, [], values

    def suggest_float(self, name: str, low: float, high: float, **_: Any) -> float:
        assert low <= self._values[name] <= high
        return self.params.setdefault(name, self._values[name])

    def report(self, value: float, step: int) -> None:
        self.reported.append((step, value))

    def should_prune(self) -> bool:
        return False


class Study:
    def __init__(self, values: list[dict[str, Any]]):
        self.trials = [Trial(self, number, values) for number, values in enumerate(values)]

    def _is_multi_objective(self) -> bool:
        return False

    def optimize(self, objective, n_trials: int, **_: Any) -> None:
        self.results = [objective(trial) for trial in self.trials[:n_trials]]

    @property
    def best_trial(self) -> SimpleNamespace:
        number = min(range(len(self.results)), key=self.results.__getitem__)
        return SimpleNamespace(number=number, value=self.results[number], params=self.trials[number].params)


def stand_in(monkeypatch, values: list[dict[str, Any]]) -> Study:
    """Put a package `optuna` into this process whose study tries these values, in their order."""
    study = Study(values)
    package: Any = ModuleType("optuna")
    package.Trial, package.trial = Trial, SimpleNamespace(BaseTrial=Trial)
    package.create_study = lambda **_: study
    monkeypatch.setitem(sys.modules, "optuna", package)
    monkeypatch.setattr(OptunaBackend, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(integration_utils, "is_optuna_available", lambda: True)
    return study
