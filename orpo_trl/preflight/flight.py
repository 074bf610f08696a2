"""What the steps of a preflight share."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from orpo_trl.config import DataArguments, ModelArguments, ORPOConfig
from orpo_trl.engine import DEEPSPEED, count_gpus
from orpo_trl.preflight.memory import Engine


class Failed(Exception):
    """What is to be mended."""


class Skipped(Exception):
    """Why a step was not taken."""


@dataclass
class Preflight:
    """What the steps have found so far; a step needs what those before it found.

    Attributes:
        arguments: recipe and overrides.
        options: of the command line; see `run_checks`.
        pairs: prepared pairs of the sample to train on.
        lengths: `[pairs, 3]`, their tokens of prompt, chosen and rejected response, 0 for none.
        num_pairs: of the whole train dataset, where the sample stands for it.
        num_steps: optimiser steps.
    """

    arguments: list[str]
    options: dict[str, Any]
    model_args: ModelArguments | None = None
    data_args: DataArguments | None = None
    training: ORPOConfig | None = None
    own_engine: Any = None
    config: PretrainedConfig | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    why_padded: str | None = None
    pairs: Dataset | None = None
    lengths: np.ndarray | None = None
    num_pairs: int = 0
    num_steps: int | None = None

    def need(self, name: str, step: str) -> Any:
        """An attribute that an earlier step finds."""
        found = getattr(self, name)
        if found is None:
            raise Skipped(f"needs what the step {step!r} finds")
        return found

    @property
    def processes(self) -> int:
        return self.options["num_processes"] or max(count_gpus(), 1)

    @property
    def is_padded(self) -> bool:
        return self.training.pair_layout == "padded" or self.why_padded is not None

    @property
    def is_on_gpu(self) -> bool:
        return bool(count_gpus() or self.options["gpu"] or self.options["gpu_memory"])

    @property
    def engine(self) -> Engine:
        asked = self.options["engine"]
        name = asked or _engine_of(self.own_engine)
        # On a CPU, the recipe's engine is launched by an accelerate config too, which has DeepSpeed's own buckets.
        auto_buckets = asked is None and self.is_on_gpu
        return Engine(name, self.processes, auto_buckets) if self.processes > 1 else Engine("single")


def _engine_of(deepspeed: str | dict | None) -> str:
    """The engine that a recipe's `deepspeed` names, or that its DeepSpeed config is one of."""
    if deepspeed is None or deepspeed in DEEPSPEED:
        return deepspeed or "ddp"
    config = deepspeed if isinstance(deepspeed, dict) else json.loads(Path(deepspeed).read_text(encoding="utf-8"))
    stage = config.get("zero_optimization", {}).get("stage", 0)
    return f"zero{stage}" if stage in (2, 3) else "ddp"
