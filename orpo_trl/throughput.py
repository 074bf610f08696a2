"""How fast a run trains: what its steps cost, over the time that they took."""

import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from orpo_trl.devices import find_cuda_device
from orpo_trl.flops import MatrixWeights, flops, matrix_weights

GIB = 2**30

# Entries of a batch's `work`, in the order in which ranks exchange them.
_WORK = ("pairs", "tokens", "unique_tokens", "positions", "padded_positions", "scored", "attended")


class Throughput:
    """Work and time of a logging window, evaluation and saving left out.

    Args:
        device: of this process.
        model: without the wrapper of an adapter.
        is_frozen: an adapter is trained instead of the model's weights.
    """

    def __init__(self, device: torch.device, model: PreTrainedModel, is_frozen: bool = False):
        self.device = device
        self.is_frozen = is_frozen
        self.num_tokens = 0
        self._work: Counter[str] = Counter()
        self._since: float | None = None
        known = find_cuda_device(device) if device.type == "cuda" else None
        self.peak_flops = known.peak_flops if known else None
        self._weights: MatrixWeights | None = matrix_weights(model, is_frozen) if known else None

    def start(self, num_tokens: int = 0) -> None:
        """A run begins, or goes on after this many tokens."""
        self.num_tokens = num_tokens
        self._work.clear()
        self._since = time.perf_counter()

    def stop(self) -> None:
        self._since = None

    @property
    def is_running(self) -> bool:
        return self._since is not None

    def add(self, work: Mapping[str, int]) -> None:
        """Count a micro-batch of this rank: `work` of `PairCollator`."""
        self._work.update(work)

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """The time of what runs inside does not count. May be nested."""
        since, self._since = self._since, None
        start = time.perf_counter()
        try:
            yield
        finally:
            if since is not None:
                self._since = since + time.perf_counter() - start

    def numbers(self) -> list[float]:
        """Work of this rank in the window, and its peak memory: input of `metrics`, which takes those of all ranks."""
        return [*(self._work[name] for name in _WORK), peak_memory(self.device)]

    def metrics(self, of_ranks: list[list[float]]) -> dict[str, float]:
        """End the window.

        Args:
            of_ranks: `numbers()` of each rank.

        Returns:
            `num_tokens` (trained on since the start, each response with its prompt), and of the window tokens and pairs
            per second, each prompt counted once; the share of the positions of padded rows that were not computed; the
            share of the device's peak FLOP/s that the model made use of, where the device is known; and the largest
            memory of a process since its start: of the GPU, or resident on a CPU.
        """
        if self._since is None:
            return {}
        now = time.perf_counter()
        work = {name: int(sum(rank[index] for rank in of_ranks)) for index, name in enumerate(_WORK)}
        seconds = max(now - self._since, 1e-9)
        self._since = now
        self._work.clear()
        self.num_tokens += work["tokens"]
        metrics = {
            "num_tokens": self.num_tokens,
            "throughput/unique_tokens_per_second": work["unique_tokens"] / seconds,
            "throughput/pairs_per_second": work["pairs"] / seconds,
        }
        if work["padded_positions"]:
            metrics["throughput/padding_avoided_percent"] = 100 * (1 - work["positions"] / work["padded_positions"])
        if self._weights is not None and self.peak_flops is not None:
            # Of the model, not of the hardware: recomputation by checkpointing and padding do not count.
            done = flops(self._weights, work["unique_tokens"], work["attended"], work["scored"], self.is_frozen)
            metrics["throughput/mfu_percent"] = 100 * done / (seconds * self.peak_flops * len(of_ranks))
        metrics["memory/peak_gib"] = max(rank[-1] for rank in of_ranks) / GIB
        return metrics


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch has had allocated on the GPU, or the most that the process has had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
