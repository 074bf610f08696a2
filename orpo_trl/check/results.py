"""What the steps of a check share: the options of the command, and the result of each step."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from orpo_trl.config import DataArguments, ModelArguments, ORPOConfig
from orpo_trl.devices import count_gpus
from orpo_trl.lengths import PairLengths
from orpo_trl.pairs.load import load_pairs


class Failed(Exception):
    """What the user has to fix."""


class Skipped(Exception):
    """Why a step was not taken."""


@dataclass(frozen=True)
class CheckOptions:
    """The command line of `orpo-trl check`.

    Attributes:
        arguments: recipe and overrides.
        engine: one of `launch.ENGINES`; None for the recipe's own strategy.
        num_processes: GPUs to plan for; None for all GPUs of this machine.
        gpu: a GPU's name, see `named_device`; None for this machine's.
        gpu_memory: GiB of one GPU; None for the memory of `gpu`.
        utilisation: share of the peak FLOP/s that the run reaches.
        price: USD per GPU hour.
        full: prepare all rows, not a sample.
        color: whether the printed pair has colours.
    """

    arguments: list[str]
    engine: str | None = None
    num_processes: int | None = None
    gpu: str | None = None
    gpu_memory: float | None = None
    utilisation: float = 0.4
    price: float | None = None
    full: bool = False
    color: bool = False

    @property
    def processes(self) -> int:
        return self.num_processes or max(count_gpus(), 1)

    @property
    def is_on_gpu(self) -> bool:
        return bool(count_gpus() or self.gpu or self.gpu_memory)


@dataclass(frozen=True)
class RecipeResult:
    """Settings of the run.

    Attributes:
        own: the recipe's `deepspeed` and `fsdp`, which `training` is built without.
    """

    model_args: ModelArguments
    data_args: DataArguments
    training: ORPOConfig
    own: dict[str, Any]

    @cached_property
    def sets(self) -> dict[str, Dataset | IterableDataset]:
        """Rows of the training set and of those that the run evaluates on, by name."""
        with_test = self.training.eval_strategy != "no"
        train, test = load_pairs(self.data_args, with_test, seed=self.training.seed)
        held_out: dict[str, Any] = test if isinstance(test, dict) else {"eval": test} if with_test else {}
        return {"train": train, **held_out}


@dataclass(frozen=True)
class ModelResult:
    """The model's config, the tokenizer as training would have it, and the layout that the model reads."""

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    is_padded: bool


@dataclass(frozen=True)
class DataResult:
    """Prepared training pairs.

    Attributes:
        pairs: of the sample.
        lengths: `[pairs]` of the sample.
        num_pairs: pairs of the whole training set, estimated from the sample.
        is_stream: the rows come from a stream, so their number is not known.
    """

    pairs: Dataset
    lengths: PairLengths
    num_pairs: int
    is_stream: bool


@dataclass(frozen=True)
class ScheduleResult:
    """Optimiser steps of the run, and pairs of each."""

    num_steps: int
    pairs_per_step: int


Result = RecipeResult | ModelResult | DataResult | ScheduleResult
