"""How long a run computes: floating-point operations of training, and what devices can do of them."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from orpo_trl.config import ModelArguments, ORPOConfig

MIB = 2**20


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: words of torch's name for it.
        peak_flops: dense bf16 matrix products summed in fp32, FLOP/s, from the maker's data sheet.
        memory: bytes, as nvidia-smi reports the total.
    """

    name: str
    peak_flops: float
    memory: int


# Where several fit a name, the first is meant.
DEVICES = {
    device.name: device
    for device in (
        Device("A100 40GB", 312e12, 40960 * MIB),
        Device("A100 80GB", 312e12, 81920 * MIB),
        Device("H100 PCIe", 756e12, 81559 * MIB),
        Device("H100 NVL", 835e12, 95830 * MIB),
        Device("H100", 989e12, 81559 * MIB),
        Device("H200", 989e12, 143771 * MIB),
        Device("B200", 2250e12, 183359 * MIB),
        Device("L40S", 362e12, 46068 * MIB),
        Device("RTX 4090", 165e12, 24564 * MIB),
        Device("RTX 3090", 71e12, 24576 * MIB),
    )
}


def find_device(name: str) -> Device | None:
    """The device of `DEVICES` that torch calls `name`, such as 'NVIDIA A100-SXM4-80GB'; None where it is not there."""
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    return next((device for device in DEVICES.values() if words.issuperset(device.name.split())), None)


def named_device(name: str) -> Device:
    """The device of `DEVICES` that a person calls `name`: 'h100', 'A100-80GB'.

    Raises:
        ValueError: naming those that there are.
    """
    plain = "".join(filter(str.isalnum, name)).lower()
    fits = {key: device for key, device in DEVICES.items() if key.replace(" ", "").lower() == plain}
    if not fits:
        raise ValueError(f"--gpu: expected one of {', '.join(DEVICES)}, got {name!r}")
    return next(iter(fits.values()))


@dataclass(frozen=True)
class MatrixWeights:
    """Weights that a token is multiplied by.

    Attributes:
        body: those of all layers, whether tied to the embeddings or not; not embeddings, not the LM head.
        active: those of `body` that one token meets: of a mixture of experts, the experts that it is sent to.
        head: those of the LM head.
        attention: dimensions of the queries, all heads and layers together: 4 operations for each key of each query.
    """

    body: int
    active: int
    head: int
    attention: int


def planned_weights(config: PreTrainedConfig) -> MatrixWeights:
    """`matrix_weights` of the model that a config describes, without any memory."""
    with torch.device("meta"):
        return matrix_weights(AutoModelForCausalLM.from_config(config))


def matrix_weights(model: PreTrainedModel, has_adapter: bool = False) -> MatrixWeights:
    """Weights of a model without its embeddings, and without those of an adapter, whichever part a rank holds."""
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    text = model.config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None)
    body = active = 0
    for name, weight in model.named_parameters():
        if weight is head or weight is embeddings or (has_adapter and weight.requires_grad):
            continue
        shape = full_shape(weight)
        body += shape.numel()
        # transformers keeps the experts of a layer in one tensor, expert by expert.
        is_of_experts = chosen and ".experts." in name
        active += shape.numel() * chosen // shape[0] if is_of_experts else shape.numel()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = head_size * text.num_attention_heads * text.num_hidden_layers
    return MatrixWeights(body, active, full_shape(head).numel(), attention)


def full_shape(weight: torch.nn.Parameter) -> torch.Size:
    """Shape of a weight as a whole: under ZeRO-3 a rank holds a part of it, in 4 bits it is packed."""
    if hasattr(weight, "ds_shape"):
        return torch.Size(weight.ds_shape)
    return torch.Size(weight.quant_state.shape) if getattr(weight, "quant_state", None) else weight.shape


def train_flops(
    config: PreTrainedConfig,
    model_args: ModelArguments,
    training: ORPOConfig,
    lengths: np.ndarray,
    is_padded: bool = False,
) -> float:
    """Floating-point operations of training once on pairs of these lengths, all devices together.

    For each weight and token 2 in the forward pass, and in the backward pass 2 for the gradient of the input and 2 for
    that of the weight: 6, or 4 where `use_peft` freezes it; an adapter's own are left out. The LM head runs where a
    token is scored. Attention takes 4 for each query, key that it sees, and dimension, and twice that backward; sliding
    windows are not deducted. Gradient checkpointing runs the layers' forward pass again.

    Args:
        config: of the model.
        model_args, training: `use_peft`; `gradient_checkpointing` and `nll_scope`.
        lengths: `[pairs, 3]`: tokens of prompt, chosen and rejected response; 0 where there is no rejected one.
        is_padded: a row for each response, both as long as the longer; else the shared_prefix layout.
    """
    prompt, chosen, rejected = np.asarray(lengths, dtype=np.int64).T
    has_rejected = rejected > 0
    if is_padded:
        longest, rows = prompt + np.maximum(chosen, rejected), 1 + has_rejected
        tokens, attended = rows * longest, rows * visible(longest, longest)
    else:
        # The rejected branch begins with the last prompt token again.
        first, branch = prompt + chosen, (rejected + 1) * has_rejected
        tokens, attended = first + branch, visible(first, first) + visible(branch, prompt + rejected)
    scored = rejected + (prompt + chosen - 1 if training.nll_scope == "sequence" else chosen)
    return flops(
        planned_weights(config), tokens.sum(), attended.sum(), scored.sum(), model_args.use_peft,
        training.gradient_checkpointing,
    )  # fmt: skip


def flops(
    weights: MatrixWeights, tokens: int, attended: int, scored: int, is_frozen: bool = False, runs_again: bool = False
) -> float:
    """Floating-point operations of a forward and a backward pass; see `train_flops`.

    Args:
        weights: of the model.
        tokens: that run through the layers.
        attended: pairs of a query and a key that it sees.
        scored: tokens whose log-probability the LM head computes.
        is_frozen: the weights take no gradient, because an adapter is trained in their place.
        runs_again: gradient checkpointing computes the layers' forward pass twice.
    """
    backward = 2 if is_frozen else 4
    body = (2 + backward + 2 * runs_again) * weights.active * tokens
    head = (2 + backward) * weights.head * scored
    return float(body + head + (3 + runs_again) * 4 * weights.attention * attended)


def visible(queries: Any, keys: Any) -> Any:
    """Pairs of a query and a key that it sees, where the last query is the last key's; ints or arrays of them."""
    return queries * keys - queries * (queries - 1) // 2


def training_time(flops: float, devices: int, peak_flops: float, utilisation: float) -> float:
    """Seconds that so many operations take.

    Args:
        flops: from `train_flops`.
        devices: that share them.
        peak_flops: of one device, FLOP/s.
        utilisation: share of the peak that is reached, above 0 and at most 1.
    """
    if not 0 < utilisation <= 1:
        raise ValueError(f"`utilisation` must be above 0 and at most 1, got {utilisation!r}.")
    return flops / (devices * peak_flops * utilisation)
