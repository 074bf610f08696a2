"""torch's variable-length attention (FlashAttention), where it is there and right."""

import inspect
import itertools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

logger = logging.getLogger(__name__)

DTYPES = (torch.float16, torch.bfloat16)
# Dtypes for which `test_kernel` has shown, in this process, that the kernel is right.
_right: set[torch.dtype] = set()
_tested: set[torch.dtype] = set()
# torch 2.11 has no such parameter, and wants as many heads of keys as of queries.
_SHARES_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters


def test_kernel() -> None:
    """Find out, once per process and dtype, for which dtypes the kernel gives what `varlen` promises.

    Kernels differ in where they align a causal mask of more keys than queries. Ours must do it at the end of both, as
    NVIDIA's builds do; ROCm's align it at the beginning, where a rejected response would not see its prompt.
    """
    if torch.version.hip is not None or not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return
    for dtype in DTYPES:
        if dtype not in _tested:
            _tested.add(dtype)
            problem = kernel_problem(dtype, torch.device("cuda"))
            if problem:
                logger.warning("The responses of a packed row are read one by one in %s: %s", dtype, problem)
            else:
                _right.add(dtype)


def kernel_problem(dtype: torch.dtype, device: torch.device) -> str | None:
    """What is wrong with the kernel, or None: two segments, one of them with fewer queries than keys."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, length, 64, generator=generator) for length in (5, 6, 6))
    # The first has 2 queries and 3 keys: its queries are the last two tokens. The second has 3 of each.
    lengths = ((2, 3), (3, 3))
    expected = []
    parts = (query.split([2, 3], 2), key.split([3, 3], 2), value.split([3, 3], 2))
    for (queries, keys), *part in zip(lengths, *parts, strict=True):
        visible = torch.ones(queries, keys).tril(keys - queries).bool()
        expected.append(F.scaled_dot_product_attention(*part, attn_mask=visible))
    ends = [
        torch.tensor([0, *itertools.accumulate(column)], dtype=torch.int32, device=device)
        for column in zip(*lengths, strict=True)
    ]
    segments = {"query_ends": ends[0], "key_ends": ends[1], "longest_query": 3, "longest_key": 3}
    try:
        query, key, value = (tensor.to(device, dtype) for tensor in (query, key, value))
        found = varlen(query, key, value, segments).float().cpu()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return f"the variable-length kernel of this torch does not run ({str(error).splitlines()[0]:.120})"
    difference = (found - torch.cat(expected, 2).transpose(1, 2)).abs().max().item()
    # Rounding of bfloat16 is 0.01 here; a mask in the wrong place is 0.5 and more.
    return None if difference < 0.05 else f"the variable-length kernel of this torch is wrong by {difference:.2f}"


def is_exact(query, value, dropout=0.0, softcap=None, s_aux=None, position_bias=None, **kwargs) -> bool:
    """Whether the kernel computes this attention; the arguments are those of transformers' attention functions."""
    return (
        query.is_cuda
        and query.dtype in _right
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and not dropout
        and softcap is None
        and s_aux is None
        and position_bias is None
    )


def varlen(query, key, value, segments, scaling=None, sliding_window=None, **kwargs) -> torch.Tensor:
    """All segments in one call, each with a causal mask that is aligned at the end of its queries and keys.

    Args:
        query: `[1, heads, tokens, head_dim]`; `key` and `value`: `[1, key_heads, keys, head_dim]`.
        segments: see `PairCollator`.

    Returns:
        `[1, tokens, heads, head_dim]`.
    """
    options: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if _SHARES_HEADS:
            options["enable_gqa"] = True
        else:
            times = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(times, dim=1) for tensor in (key, value))
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output: Any = varlen_attn(
        query,
        key,
        value,
        segments["query_ends"],
        segments["key_ends"],
        segments["longest_query"],
        segments["longest_key"],
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **options,
    )
    return output[None]
