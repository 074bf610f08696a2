"""Weighted means of metrics: summed on the device, reduced over all ranks once per log."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from orpo_trl.metrics import group_metric

# The first bucket of lengths holds responses of up to so many tokens; each further bucket is twice as wide.
SHORTEST_BUCKET = 64


class MetricSums:
    """Sums of values and weights since the last `reduce`, on the device, without waiting for it.

    The mean of a metric over a logging window, all ranks and micro-batches is sum of values / sum of weights, where
    the weight is the number of tokens or pairs behind a value: unlike a mean of means it does not depend on how rows
    are split. A non-finite value is left out together with its weight, and counted.

    Args:
        names: names of the metrics, in the order in which `add` takes them.
    """

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self._sums: torch.Tensor | None = None

    def add(self, values: torch.Tensor, weights: Sequence[float]) -> None:
        """Add one micro-batch's part of each metric.

        Args:
            values: `[metrics]`, sums over tokens or pairs.
            weights: the number of tokens or pairs in each sum; 0 where the micro-batch has none.
        """
        # MPS has no float64; a window's counts fit float32.
        dtype = torch.float32 if values.device.type == "mps" else torch.float64
        values = values.detach().to(dtype)
        finite = values.isfinite()
        counts = torch.tensor(weights, dtype=dtype).to(values.device, non_blocking=True)
        part = torch.stack([values.where(finite, 0), counts.where(finite, 0), (~finite).to(dtype)])
        self._sums = part if self._sums is None else self._sums + part

    def reduce(
        self, accelerator: Accelerator, numbers: Sequence[float] = ()
    ) -> tuple[dict[str, float], dict[str, int], list[list[float]]]:
        """Means over all ranks since the last call, and the number of non-finite micro-batches.

        It needs one collective and one device synchronisation in total. Every rank must call it.

        Args:
            accelerator: the run's accelerator.
            numbers: further numbers of this rank, which the same collective gathers.

        Returns:
            The mean of each metric (absent where its weights sum to 0), the number of non-finite micro-batches of each
            metric (absent where it is 0), and the `numbers` of each rank.
        """
        if self._sums is None:
            return {}, {}, []
        mine = torch.cat([self._sums.flatten(), torch.tensor(numbers, dtype=self._sums.dtype).to(self._sums.device)])
        of_ranks = _gather(accelerator, mine[None]).cpu()
        table, numbers_of_ranks = of_ranks.split([self._sums.numel(), len(numbers)], dim=1)
        sums, weights, counts = table.sum(dim=0).view(3, -1).tolist()
        self._sums = None
        rows = list(zip(self.names, sums, weights, counts, strict=True))
        means = {name: value / weight for name, value, weight, _ in rows if weight}
        return means, {name: int(count) for name, _, _, count in rows if count}, numbers_of_ranks.tolist()


def _gather(accelerator: Accelerator, tensor: torch.Tensor) -> torch.Tensor:
    gathered = accelerator.gather(tensor)
    if not isinstance(gathered, torch.Tensor):  # accelerate also gathers containers, which come back as such
        raise TypeError(f"expected a tensor from `gather`, received {type(gathered).__name__}")
    return gathered


class PairGroups:
    """Accuracy and margin of held-out pairs, by the source of a pair and by the length of its longer response."""

    def __init__(self, beta: float):
        self.beta = beta
        self._parts: list[tuple[torch.Tensor, list[str | None], list[int]]] = []

    def add(
        self, chosen: torch.Tensor, rejected: torch.Tensor, sources: Sequence[str | None], lengths: Sequence[int]
    ) -> None:
        """Add a micro-batch, without waiting for the device.

        Args:
            chosen, rejected: `[pairs]`, mean token log-probabilities.
            sources: the source of each pair.
            lengths: the number of tokens in each pair's longer response.
        """
        self._parts.append((torch.stack([chosen, rejected]).detach(), list(sources), list(lengths)))

    def reduce(self) -> dict[str, float]:
        """Metrics of all ranks since the last call. Every rank must call it.

        Returns:
            `sources/NAME/…` and `lengths/FROM-TO/…`, each with `accuracies`, `margins` (beta times the difference of
            the log-probabilities, as in `rewards/margins`) and `pairs`. Pairs whose log-probabilities are not finite
            are left out. Where all pairs are in one group, that kind of group is left out.
        """
        mine: dict[tuple[str, str], list[float]] = {}
        if self._parts:
            logps = torch.cat([part for part, _, _ in self._parts], dim=1).float().T.tolist()
            sources = [source for _, part, _ in self._parts for source in part]
            lengths = [length for _, _, part in self._parts for length in part]
            for (chosen, rejected), source, length in zip(logps, sources, lengths, strict=True):
                margin = chosen - rejected
                if not abs(margin) < float("inf"):
                    continue
                for group in (("sources", str(source)), ("lengths", length_bucket(length))):
                    pairs, correct, total = mine.get(group, (0, 0, 0.0))
                    mine[group] = [pairs + 1, correct + (chosen > rejected), total + margin]
        self._parts.clear()
        sums: dict[tuple[str, str], list[float]] = {}
        for of_rank in gather_object([mine]):
            for group, part in of_rank.items():
                sums[group] = [a + b for a, b in zip(sums.get(group, (0, 0, 0.0)), part, strict=True)]
        sources = [name for kind, name in sums if kind == "sources"]
        lengths = [name for kind, name in sums if kind == "lengths"]
        labels = {("sources", name): label for name, label in _short_names(sources).items()}
        labels |= {("lengths", name): name for name in sorted(lengths, key=lambda name: int(name.split("-")[0]))}
        metrics: dict[str, float] = {}
        for (kind, name), label in labels.items():
            if len(sources if kind == "sources" else lengths) > 1:
                pairs, correct, total = sums[kind, name]
                metrics[group_metric(kind, label, "accuracies")] = correct / pairs
                metrics[group_metric(kind, label, "margins")] = self.beta * total / pairs
                metrics[group_metric(kind, label, "pairs")] = pairs
        return metrics


def _short_names(sources: list[str]) -> dict[str, str]:
    """The last part of each path or Hub id where those parts differ, else all of it without slashes.

    Trackers read a slash as a section.
    """
    last = {source: source.rstrip("/").rsplit("/", 1)[-1] for source in sorted(sources)}
    return last if len(set(last.values())) == len(last) else {source: source.replace("/", "_") for source in last}


def length_bucket(tokens: int) -> str:
    """'1-64', '65-128', '129-256', …: powers of two, so that names do not depend on the data."""
    high = SHORTEST_BUCKET
    while high < tokens:
        high *= 2
    return f"{high // 2 + 1 if high > SHORTEST_BUCKET else 1}-{high}"
