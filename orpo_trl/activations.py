"""The memory of a model's forward and backward pass, measured without that memory.

The model itself, cut to two and to three layers, runs forward and backward on tensors without storage.
"""

import copy
import weakref
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from trl import get_peft_config

from orpo_trl.config import ModelArguments, ORPOConfig
from orpo_trl.model import disable_dropout
from orpo_trl.upstream import fake_tensors, watching_tensors


@dataclass(frozen=True)
class MicroBatch:
    """The largest forward pass of one process.

    Attributes:
        rows: padded rows, or segments of the packed row; a pair has two.
        tokens: tokens of all rows, padding included.
        longest: tokens of the longest response with its prompt.
        is_packed: whether the layout is shared_prefix.
    """

    rows: int
    tokens: int
    longest: int
    is_packed: bool


@dataclass(frozen=True)
class Dtypes:
    """Dtypes of a run.

    Attributes:
        held: weights in memory, without master copies.
        model: weights that the layers use.
        compute: matrix products.
        trained: trained weights in memory; an adapter can differ from its base.
    """

    held: torch.dtype
    model: torch.dtype
    compute: torch.dtype
    trained: torch.dtype


@dataclass(frozen=True)
class Activations:
    """Bytes of a forward and backward pass without the LM head, linear in the number of layers.

    Attributes:
        saved: with two and with three layers, between the passes.
        peak: with two and with three layers, at the peak. Gradients of activations are included, gradients of weights
            are not.
    """

    saved: tuple[int, int]
    peak: tuple[int, int]

    def at(self, layers: int) -> tuple[int, int]:
        """Saved and peak bytes with this number of layers."""
        (saved, more), (peak, higher) = self.saved, self.peak
        return saved + (layers - 2) * (more - saved), peak + (layers - 2) * (higher - peak)


def measure_activations(
    config: PreTrainedConfig,
    model_args: ModelArguments,
    training: ORPOConfig,
    micro_batch: MicroBatch,
    dtypes: Dtypes,
    device: str,
) -> Activations:
    """Measures the model, cut to two and to three layers.

    Raises:
        ValueError: if the model cannot run so, such as one without attention layers, or with attention of its own.
    """
    try:
        short, long = (
            _run(_cut(config, layers), model_args, training, micro_batch, dtypes, device) for layers in (2, 3)
        )
    except Exception as error:
        problem = f"The memory of `{config.model_type}` cannot be measured without its weights"
        raise ValueError(f"{problem} ({type(error).__name__}: {error}).") from error
    return Activations((short[0], long[0]), (short[1], long[1]))


def _run(config, model_args, training, micro_batch, dtypes, device) -> tuple[int, int]:
    """Bytes alive between the forward and the backward pass, and at the peak."""
    AttentionInterface.register(_KernelLike.name, _KernelLike(micro_batch, device))
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config, dtype=dtypes.model, attn_implementation=_KernelLike.name)
        model = with_adapter(causal, model_args).train()
    disable_dropout(model)
    if training.gradient_checkpointing:
        kwargs = {"use_reentrant": False, **(training.gradient_checkpointing_kwargs or {})}
        kwargs.pop("selective", None)  # TRL's own key
        causal.gradient_checkpointing_enable(kwargs)
        if model is not causal:
            causal.enable_input_require_grads()
    rows = 1 if micro_batch.is_packed else micro_batch.rows
    autocast = nullcontext() if dtypes.compute == dtypes.model else torch.autocast("cpu", dtypes.compute)
    # Autocast needs tensors on a device. Fake tensors have one, meta tensors do not.
    with fake_tensors():
        _make_fake(model, dtypes.trained if model is not causal else dtypes.model)
        shape = rows, micro_batch.tokens // rows
        inputs = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "position_ids")}
        # The model takes a mask of four dimensions as it is. To make one, it would read tensors that hold nothing.
        inputs["attention_mask"] = torch.zeros(1, 1, 1, 1)
        live = LiveBytes(model)
        with watching_tensors(live.add):
            with autocast:
                body = getattr(causal, causal.base_model_prefix)
                hidden = body(**inputs, use_cache=False).last_hidden_state
            saved = live.bytes
            hidden.backward(torch.empty_like(hidden))
    return saved, live.peak


def _make_fake(model: nn.Module, trained: torch.dtype) -> None:
    """Replaces meta tensors by fake tensors. Gradients of weights are dropped at once: they are counted elsewhere."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) not in made:
                dtype = trained if weight.requires_grad else weight.dtype
                fake = nn.Parameter(torch.empty(weight.shape, dtype=dtype), weight.requires_grad)
                if weight.requires_grad:
                    fake.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
                made[id(weight)] = fake
            setattr(module, name, made[id(weight)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _cut(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(text, name, None):
            setattr(text, name, getattr(text, name)[-layers:])
    if getattr(text, "first_k_dense_replace", None):
        text.first_k_dense_replace = 0  # its dense first layers are not typical
    text.num_hidden_layers = layers
    return config


class LiveBytes:
    """Counts the bytes of tensors while they are alive.

    Args:
        model: its weights do not count.

    Attributes:
        bytes: their sum now.
        peak: the largest sum so far.
    """

    def __init__(self, model: nn.Module):
        self.bytes = self.peak = 0
        tensors = [*model.parameters(), *model.buffers()]
        self._known = {id(tensor.untyped_storage()): tensor for tensor in tensors}

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor from now on; one that shares the storage of a counted one costs nothing."""
        storage = tensor.untyped_storage()
        if id(storage) in self._known:
            return
        self._known[id(storage)] = None
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._remove, id(storage), storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        del self._known[key]
        self.bytes -= size


class _KernelLike:
    """An attention function that allocates and saves what a fused kernel does: q, k, v, output and log-sum-exp.

    The keys of a packed row hold each prompt once for each response. The lengths of prompts are not known here, so all
    segments count as the longest one. On a CPU segments of different lengths are calls of their own: the outputs of all
    calls are copied into one tensor, and the call of a rejected response needs a mask. Half of the segments are
    rejected responses.
    """

    name = "orpo_trl_check"

    def __init__(self, micro_batch: MicroBatch, device: str):
        rows, tokens, longest = micro_batch.rows, micro_batch.tokens, micro_batch.longest
        self.is_packed, self.is_joined = micro_batch.is_packed, micro_batch.is_packed and device == "cpu"
        self.keys = max(rows * longest, tokens)
        self.masked = rows // 2 * (tokens // rows) * longest

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        if self.is_packed:
            index = torch.zeros(self.keys, dtype=torch.int64)
            key, value = key.index_select(2, index), value.index_select(2, index)
        masks = query.new_empty(self.masked) if self.is_joined else None
        output = _FusedAttention.apply(query, key, value, masks)
        return output.clone() if self.is_joined else output, None


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, masks):
        rows, heads, tokens, _ = query.shape
        output = query.new_empty(rows, tokens, heads, value.shape[-1])
        log_sum_exp = query.new_empty(rows, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sum_exp, masks)
        return output

    @staticmethod
    def backward(ctx, *gradients):
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


def with_adapter(model: PreTrainedModel, model_args: ModelArguments) -> nn.Module:
    """The model, with an adapter if `use_peft` is set."""
    adapter = get_peft_config(model_args)
    if adapter is None:
        return model
    from peft import get_peft_model

    return get_peft_model(model, adapter)
