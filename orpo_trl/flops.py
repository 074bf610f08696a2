"""How long a run computes: floating-point operations of training, and the time that devices need for them."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from orpo_trl.config import ModelArguments, ORPOConfig
from orpo_trl.lengths import PairLengths
from orpo_trl.losses import nll_tokens
from orpo_trl.upstream import full_shape


@dataclass(frozen=True)
class MatrixWeights:
    """Counts of the weights that a token is multiplied by.

    Attributes:
        body: weights of all layers, without embeddings and LM head.
        active: weights of `body` that one token uses. A mixture of experts sends it to some of the experts.
        head: weights of the LM head, tied to the embeddings or not.
        attention: dimensions of the queries, all heads and layers together: 4 operations for each key of each query.
    """

    body: int
    active: int
    head: int
    attention: int


def planned_weights(config: PreTrainedConfig) -> MatrixWeights:
    """`matrix_weights` of the model that a config describes. Allocates no memory."""
    with torch.device("meta"):
        return matrix_weights(AutoModelForCausalLM.from_config(config))


def matrix_weights(model: PreTrainedModel, has_adapter: bool = False) -> MatrixWeights:
    """Counts the weights of a model, without its embeddings and its adapter.

    A sharded weight counts in full, whichever part of it this rank holds.
    """
    head, embeddings = head_weight(model), model.get_input_embeddings().weight
    text = model.config.get_text_config()
    chosen: int = getattr(text, "num_experts_per_tok", None) or 0
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


def head_weight(model: PreTrainedModel) -> torch.nn.Parameter:
    """The weight of the LM head.

    Raises:
        ValueError: if the model has no LM head.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no LM head.")
    return head.weight


def train_flops(
    config: PreTrainedConfig,
    model_args: ModelArguments,
    training: ORPOConfig,
    lengths: PairLengths,
    is_padded: bool = False,
) -> float:
    """Floating-point operations of training once on pairs of these lengths, summed over all devices.

    Each weight costs 6 operations per token: 2 in the forward pass, 2 for the gradient of the input and 2 for the
    gradient of the weight. A weight that `use_peft` freezes costs 4. The weights of the adapter are left out. The LM
    head runs for scored tokens only. Attention costs 4 operations for each dimension of each pair of a query and a key
    that it sees, and twice that in the backward pass; sliding windows are not deducted. Gradient checkpointing runs
    the forward pass of the layers again.

    Args:
        config: of the model.
        model_args: `use_peft` counts.
        training: `gradient_checkpointing` and `nll_scope` count.
        lengths: `[pairs]`.
        is_padded: the padded layout, which pads both rows of a pair to the longer one; else shared_prefix.
    """
    if is_padded:
        tokens, attended = lengths.padded, lengths.attended_padded
    else:
        tokens, attended = lengths.packed, lengths.attended_packed
    scored = nll_tokens(lengths.prompt, lengths.chosen, training.nll_scope) + lengths.rejected
    return flops(
        planned_weights(config), int(tokens.sum()), int(attended.sum()), int(scored.sum()), model_args.use_peft,
        bool(training.gradient_checkpointing),
    )  # fmt: skip


def flops(
    weights: MatrixWeights, tokens: int, attended: int, scored: int, is_frozen: bool = False, runs_again: bool = False
) -> float:
    """Floating-point operations of a forward and a backward pass; see `train_flops`.

    Args:
        weights: of the model.
        tokens: tokens that run through the layers.
        attended: pairs of a query and a key that it sees.
        scored: tokens whose log-probability the LM head computes.
        is_frozen: the weights take no gradient, because an adapter is trained instead.
        runs_again: gradient checkpointing computes the forward pass of the layers twice.
    """
    backward = 2 if is_frozen else 4
    body = (2 + backward + 2 * runs_again) * weights.active * tokens
    head = (2 + backward) * weights.head * scored
    return float(body + head + (3 + runs_again) * 4 * weights.attention * attended)


def training_time(flops: float, devices: int, peak_flops: float, utilisation: float) -> float:
    """Seconds of computing.

    Args:
        flops: operations of all devices together, from `train_flops`.
        devices: number of devices.
        peak_flops: FLOP/s of one device.
        utilisation: share of the peak that is reached, above 0 and at most 1.
    """
    if not 0 < utilisation <= 1:
        raise ValueError(f"`utilisation` must be above 0 and at most 1, got {utilisation!r}.")
    return flops / (devices * peak_flops * utilisation)
