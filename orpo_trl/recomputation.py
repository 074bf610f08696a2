"""Whether a run on a CPU computes activations again in the backward pass, where its settings leave that open."""

import copy
from typing import Any

from accelerate.utils import is_peft_model
from transformers import PreTrainedConfig, PreTrainedModel

from orpo_trl.config import ModelArguments, ORPOConfig
from orpo_trl.devices import cpu_memory
from orpo_trl.lengths import PairLengths
from orpo_trl.memory import Sharding, estimate_memory, largest_batch

# Share of a CPU's memory that a run may plan with: other programs have some of it.
ROOMY = 0.7


def leave_out_checkpointing(
    config: PreTrainedConfig,
    model_args: ModelArguments,
    training: ORPOConfig,
    sharding: Sharding,
    lengths: PairLengths,
    is_padded: bool,
) -> str:
    """Turn gradient checkpointing off on a CPU, where the run has not set it and the memory holds all activations.

    Args:
        config, model_args, training, sharding: as in `memory.estimate_memory`; `training` is changed.
        lengths, is_padded: as in `memory.largest_batch`.

    Returns:
        What was decided, in a sentence; empty where the run has set it, or where nothing can be known. Under DeepSpeed
        checkpointing stays on: there, a model that is made to be counted would be shared out like the one that trains.
    """
    if not training.is_checkpointing_open or sharding.is_deepspeed:
        return ""
    trial = copy.copy(training)
    trial.set_checkpointing(False)
    batch, _ = largest_batch(trial, lengths, is_padded)
    try:
        needed = estimate_memory(config, model_args, trial, sharding, batch, "cpu").total
    except ValueError:  # a model or an optimizer that cannot be measured
        return ""
    has = cpu_memory() / sharding.processes
    training.set_checkpointing(needed > ROOMY * has)
    fits = "do not fit" if training.gradient_checkpointing else "fit"
    return (
        f"Gradient checkpointing is {'on' if training.gradient_checkpointing else 'off'}: without it, about "
        f"{needed / 2**30:.1f} GiB {fits} into {ROOMY:.0%} of this machine's {has / 2**30:.1f} GiB. "
        "Set `gradient_checkpointing` to choose yourself."
    )


def arguments_of(model: PreTrainedModel) -> ModelArguments:
    """Arguments that plan the memory of a model that is loaded: its dtype, and the ranks of a LoRA adapter.

    Another adapter, or one beside whole layers, is planned as full fine-tuning, which takes more.
    """
    arguments: Any = ModelArguments(dtype=str(model.dtype).removeprefix("torch."))
    adapter: Any = next(iter(getattr(model, "peft_config", {}).values()), None)
    is_lora = getattr(adapter, "target_modules", None) and getattr(adapter, "r", None)
    if is_peft_model(model) and is_lora and not getattr(adapter, "modules_to_save", None):
        arguments.use_peft, arguments.lora_r = True, adapter.r
        targets = adapter.target_modules
        arguments.lora_target_modules = targets if isinstance(targets, str) else sorted(targets)
    return arguments
