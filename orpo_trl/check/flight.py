"""What the steps of a preflight share."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from orpo_trl.check.memory import Engine
from orpo_trl.config import DataArguments, ModelArguments, ORPOConfig
from orpo_trl.launch import DEEPSPEED, count_gpus


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
        own_engine: the recipe's `deepspeed` and `fsdp`.
        pairs: prepared pairs of the sample to train on.
        lengths: `[pairs, 3]`, their tokens of prompt, chosen and rejected response, 0 for none.
        num_pairs: of the whole train dataset, where the sample stands for it.
        is_stream: the rows are those of a stream, whose number is not known.
        num_steps: optimiser steps.
    """

    arguments: list[str]
    options: dict[str, Any]
    model_args: ModelArguments | None = None
    data_args: DataArguments | None = None
    training: ORPOConfig | None = None
    own_engine: dict[str, Any] = field(default_factory=dict)
    config: PretrainedConfig | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    why_padded: str | None = None
    pairs: Dataset | None = None
    lengths: np.ndarray | None = None
    num_pairs: int = 0
    is_stream: bool = False
    num_steps: int | None = None

    def need(self, name: str, step: str) -> Any:
        """An attribute that an earlier step finds."""
        found = getattr(self, name)
        if found is None:
            raise Skipped(f'needs what the step "{step}" finds')
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
        asked, own = self.options["engine"], self.own_engine
        if asked:
            return Engine(asked, self.processes)
        if self.processes == 1:
            return Engine("single")
        name, auto_buckets = _engine_of(own)
        # On a CPU, the recipe's engine is launched by an accelerate config too, which has DeepSpeed's own buckets.
        return Engine(name, self.processes, auto_buckets and self.is_on_gpu)


def _engine_of(own: dict[str, Any]) -> tuple[str, bool]:
    """The engine that a recipe's `deepspeed` or `fsdp` stands for, and whether DeepSpeed's buckets are `auto`."""
    deepspeed = own.get("deepspeed")
    if deepspeed in DEEPSPEED:
        return deepspeed, True
    if not deepspeed:
        return "fsdp2" if own.get("fsdp") else "ddp", False
    config = deepspeed if isinstance(deepspeed, dict) else json.loads(Path(deepspeed).read_text(encoding="utf-8"))
    zero = config.get("zero_optimization", {})
    if zero.get("stage") not in (2, 3):
        return "ddp", False
    offloaded = zero["stage"] == 3 and zero.get("offload_optimizer", {}).get("device") not in (None, "none")
    return f"zero{zero['stage']}" + ("_offload" if offloaded else ""), zero.get("reduce_bucket_size") == "auto"
