"""Memory that the passes of a model take, measured without memory.

The architecture itself, cut to two and to three layers, runs forward and backward on tensors without storage.
"""

import copy
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from trl import get_peft_config

from orpo_trl.config import ModelArguments, ORPOConfig
from orpo_trl.model import disable_dropout


@dataclass(frozen=True)
class MicroBatch:
    """The largest forward pass of one process.

    Attributes:
        rows: padded rows, or segments of the packed row: two for a pair.
        tokens: of all rows, filling included.
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
        held: of the weights as the engine holds them, master copies apart.
        model: of the weights that the layers are given.
        compute: of matrix products.
        trained: of trained weights as the engine holds them; an adapter can differ from its base.
    """

    held: torch.dtype
    model: torch.dtype
    compute: torch.dtype
    trained: torch.dtype


@dataclass(frozen=True)
class Activations:
    """Bytes of a forward and backward pass without the LM head, linear in the number of layers.

    Attributes:
        saved: of two and three layers, between the passes.
        peak: of two and three layers, at the peak; working gradients included, gradients of weights not.
    """

    saved: tuple[int, int]
    peak: tuple[int, int]

    def at(self, layers: int) -> tuple[int, int]:
        """Saved and peak bytes with so many layers."""
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
    """Runs the architecture, cut to two and to three layers, forward and backward on tensors without storage.

    Raises:
        ValueError: where it cannot run so: it has no layers of attention, or an attention that is not exchangeable.
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
        causal.gradient_checkpointing_enable(training.gradient_checkpointing_kwargs or {"use_reentrant": False})
        if model is not causal:
            causal.enable_input_require_grads()
    rows = 1 if micro_batch.is_packed else micro_batch.rows
    autocast = nullcontext() if dtypes.compute == dtypes.model else torch.autocast("cpu", dtypes.compute)
    # Fake tensors have a device, which autocast goes by, and meta tensors have not.
    with FakeTensorMode():
        _make_fake(model, dtypes.trained if model is not causal else dtypes.model)
        shape = rows, micro_batch.tokens // rows
        inputs = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "position_ids")}
        # A mask of four dimensions is taken as it is, where making one would look into tensors that hold nothing.
        inputs["attention_mask"] = torch.zeros(1, 1, 1, 1)
        with LiveBytes(model) as live:
            with autocast:
                body = getattr(causal, causal.base_model_prefix)
                hidden = body(**inputs, use_cache=False).last_hidden_state
            saved = live.bytes
            hidden.backward(torch.empty_like(hidden))
    return saved, live.peak


def _make_fake(model: nn.Module, trained: torch.dtype) -> None:
    """Puts fake tensors in the place of meta tensors; gradients of weights, which are counted apart, go at once."""
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
        text.first_k_dense_replace = 0  # the first layers of a mixture of experts are not the rule
    text.num_hidden_layers = layers
    return config


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it and still alive.

    Attributes:
        bytes: now.
        peak: the most so far.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.bytes = self.peak = 0
        tensors = [*model.parameters(), *model.buffers()]
        self._known = {id(tensor.untyped_storage()): tensor for tensor in tensors}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
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

    A packed row's keys hold each prompt once for each response. How long prompts are is not known here: its segments
    are taken to be as long as the longest. On a CPU each segment has a call of its own, for which outputs are joined,
    and each rejected one, half of them, a mask.
    """

    name = "preflight"

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
    def backward(ctx, gradient):
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


def with_adapter(model: PreTrainedModel, model_args: ModelArguments) -> nn.Module:
    """The model, with the adapter that `use_peft` asks for."""
    adapter = get_peft_config(model_args)
    if adapter is None:
        return model
    from peft import get_peft_model

    return get_peft_model(model, adapter)
