"""How a transformers model reads the packed row of `PairCollator`, in which each rejected response shares a prompt."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from orpo_trl import varlen
from orpo_trl.upstream import attention_name, eager_attention, is_flash_attention_requested, set_attention_name

# Model types of transformers for which tests/test_attention.py shows that the packed row gives the loss and gradient of
# padded rows. Any other falls back to them: what mixes tokens in another way (a state carried along the row,
# positions taken from the mask) would be silently wrong.
EXACT_MODEL_TYPES = frozenset(
    """
    apertus arcee aria_text cohere cohere2 deepseek_v2 deepseek_v3 ernie4_5 ernie4_5_moe exaone4 gemma gemma2
    gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gpt_oss granite granitemoe granitemoeshared helium
    hunyuan_v1_dense hunyuan_v1_moe internlm3 llama minimax_m2 ministral ministral3 mistral mixtral nanochat olmo olmo2
    olmo3 olmoe opt persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 starcoder2
    """.split()
)

_PREFIX = "shared_prefix_"

# Segments have other lengths in each batch, and each would be compiled anew.
_not_compiled: Any = torch.compiler.disable


class _Forward:
    """State of the running forward pass, for the attention layers and the mask: its arguments do not reach the mask.

    A compiled layer notes nothing: `was_read` is of layers that run eagerly. `masks` stay for a backward pass that
    computes layers again.
    """

    is_packed = False
    was_read = False
    masks: ClassVar[dict[tuple, torch.Tensor]] = {}


def why_not_exact(model: nn.Module, has_neftune: bool = False) -> str | None:
    """Why this model cannot read packed rows exactly, or None where it can.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        has_neftune: NEFTune's noise is added in training.
    """
    if has_neftune:
        # alpha / sqrt(width of the row * hidden size)
        return "`neftune_noise_alpha` adds noise by the width of a row, and a packed row would get too little"
    model = without_adapter(model)
    config, name = model.config, type(model).__name__
    if not type(model).__module__.startswith("transformers.models."):
        return f"{name} is not a model of the transformers library"
    if config.model_type not in EXACT_MODEL_TYPES:
        return f"{name} (model type `{config.model_type}`) is not known to read packed rows exactly"
    implementation = attention_name(config)
    enabled = implementation.startswith(_PREFIX)
    if not enabled and implementation not in ("sdpa", "eager") and not is_flash_attention_requested(config):
        return f"packed rows need `attn_implementation` sdpa, eager or a flash attention, not {implementation}"
    has_windows = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if has_windows and (config.model_type == "qwen2_moe" or not getattr(config, "use_sliding_window", True)):
        return f"{name} puts its sliding window into the mask alone"
    if config.model_type == "olmoe" and getattr(config, "sliding_window", None):
        return f"{name} has no sliding window in its mask"
    if getattr(config, "use_bidirectional_attention", None) or not getattr(config, "is_causal", True):
        return f"the attention of this {name} is not causal"
    if implementation.endswith("eager") and getattr(config, "reorder_and_upcast_attn", False):
        return "`reorder_and_upcast_attn` has an attention of its own"
    return None


def choose_layout(model: nn.Module, wanted: str, has_neftune: bool = False) -> tuple[str, str | None]:
    """The layout of a model's batches; for 'shared_prefix' its attention is then ready.

    Args:
        model: a causal language model, or a PEFT model around one; its config is changed.
        wanted: 'auto', 'shared_prefix' or 'padded' (`ORPOConfig.pair_layout`).
        has_neftune: NEFTune's noise is added in training.

    Returns:
        'shared_prefix' or 'padded', and a sentence that says why 'auto' pads.

    Raises:
        ValueError: where 'shared_prefix' is wanted and is not exact for the model.
    """
    reason = why_not_exact(model, has_neftune)
    if wanted == "shared_prefix" and reason:
        raise ValueError(f"`pair_layout: shared_prefix`: {reason}. Set `pair_layout: padded` or `auto`.")
    if wanted == "padded" or reason:
        return "padded", f"Pairs are padded, and each prompt runs twice: {reason}." if wanted == "auto" else None
    enable_packed_rows(model)
    return "shared_prefix", None


def enable_packed_rows(model: nn.Module) -> None:
    """Let the model's attention layers read packed rows in a call that brings `segments`.

    A call without them, such as generation, is the model's own attention, masks included.

    Args:
        model: one for which `why_not_exact` is None; its config is changed.
    """
    model = without_adapter(model)
    config = model.config
    name = attention_name(config)
    if name.startswith(_PREFIX):  # by an earlier trainer
        return
    varlen.test_kernel()
    attention = eager_attention(model) if name == "eager" else AttentionInterface()[name]
    if not is_flash_attention_requested(config):
        mask = AttentionMaskInterface()[name]
        name = f"{_PREFIX}{config.model_type}_{name}"
        set_attention_name(config, name)
        AttentionMaskInterface.register(name, partial(_mask_unless_packed, mask))
    elif isinstance(attention, partial):  # for another model
        return
    # A flash attention keeps its name, by which transformers finds the kernel.
    AttentionInterface.register(name, partial(_attention, attention))


@contextmanager
def reading_packed_row(model: nn.Module, is_compiled: bool = False) -> Iterator[None]:
    """Surrounds a forward call that brings `segments`: no mask over the whole row is made.

    Args:
        model: whose attention `enable_packed_rows` has set.
        is_compiled: the layers are compiled, and cannot tell that they have read the segments. That their attention is
            still ours is the proof then.

    Raises:
        RuntimeError: where no attention layer has read the segments, so that the outputs are wrong.
    """
    _Forward.is_packed, _Forward.was_read = True, False
    _Forward.masks.clear()
    try:
        yield
    finally:
        _Forward.is_packed = False
    if not (_reads_segments(model) if is_compiled else _Forward.was_read):
        raise RuntimeError(
            "No attention layer of the model has read the packed row: its `attn_implementation` was changed after the "
            "trainer was made. Set `pair_layout: padded`, or choose the implementation when loading the model."
        )


def _reads_segments(model: nn.Module) -> bool:
    config: Any = without_adapter(getattr(model, "module", model)).config
    attention = AttentionInterface().get(attention_name(config))
    return isinstance(attention, partial) and attention.func is _attention


def without_adapter(model: Any) -> PreTrainedModel:
    """The model itself, where it is wrapped in an adapter of PEFT."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _mask_unless_packed(make_mask: Callable, **kwargs: Any) -> torch.Tensor | None:
    return None if _Forward.is_packed else make_mask(**kwargs)


def _attention(
    attention: Callable,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    segments: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention` of transformers' AttentionInterface, on the segments of a packed row where there are some.

    Args:
        attention: the model's own implementation.
        query: `[1, heads, tokens, head_dim]`; `key` and `value`: the same shape, with their own number of heads.
        segments: see `PairCollator`.

    Returns:
        `[1, tokens, heads, head_dim]`, and attention weights only from a call without segments.
    """
    if segments is None:
        return attention(module, query, key, value, attention_mask, **kwargs)
    if not torch.compiler.is_compiling():  # an assignment in a checkpointed layer would end the graph
        _Forward.was_read = True
    index = segments["key_index"]
    key, value = key.index_select(2, index), value.index_select(2, index)
    if is_flash_attention_requested(module.config):
        return attention(
            module,
            query,
            key,
            value,
            None,
            cu_seq_lens_q=segments["query_ends"],
            cu_seq_lens_k=segments["key_ends"],
            max_length_q=segments["longest_query"],
            max_length_k=segments["longest_key"],
            **kwargs,
        )
    query, key, value = (_in_autocast_dtype(tensor) for tensor in (query, key, value))
    if varlen.is_exact(query, value, **kwargs):
        return varlen.varlen(query, key, value, segments, **kwargs), None
    return _by_segment(attention, module, query, key, value, segments, **kwargs), None


def _in_autocast_dtype(tensor: torch.Tensor) -> torch.Tensor:
    """Rotary embeddings leave queries and keys in fp32; autocast casts them for torch's own attention, not for ours."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


@_not_compiled
def _by_segment(attention, module, query, key, value, segments, sliding_window=None, **kwargs) -> torch.Tensor:
    """Each segment through the model's own attention, with the mask that it would have in a row of its own.

    Segments of the same lengths are one call, as rows of a batch. The masks of a batch are made by its first layer, for
    all layers.
    """
    lengths = list(zip(segments["query_lengths"], segments["key_lengths"], strict=True))
    queries = query.split(segments["query_lengths"], 2)
    keys, values = (tensor.split(segments["key_lengths"], 2) for tensor in (key, value))
    outputs: list[Any] = [None] * len(lengths)
    for query_length, key_length in dict.fromkeys(lengths):
        is_causal = query_length == key_length and (sliding_window is None or key_length <= sliding_window)
        if is_causal and attention is AttentionInterface()["sdpa"]:
            mask = None  # it is causal without, and faster
        else:
            kind = (query_length, key_length, sliding_window, query.dtype, query.device)
            mask = _Forward.masks.get(kind)
            if mask is None:
                mask = _Forward.masks[kind] = _causal_mask(query_length, key_length, sliding_window, query)
        alike = [i for i, other in enumerate(lengths) if other == (query_length, key_length)]
        rows = [torch.cat([parts[i] for i in alike]) for parts in (queries, keys, values)]
        output = attention(module, *rows, mask, sliding_window=sliding_window, **kwargs)[0]
        for i, part in zip(alike, output.split(1), strict=True):
            outputs[i] = part
    return torch.cat(outputs, dim=1)


def _causal_mask(queries: int, keys: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """`[1, 1, queries, keys]`, dtype and device of `like`: 0 where a query sees a key, the dtype's minimum elsewhere.

    The last query is the last key's. A query sees its own key and, with a window, `window - 1` before it.
    """
    position = torch.arange(keys - queries, keys, device=like.device)[:, None]
    other = torch.arange(keys, device=like.device)
    visible = other <= position
    if window is not None:
        visible &= other > position - window
    mask = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill(~visible, torch.finfo(like.dtype).min)[None, None]
