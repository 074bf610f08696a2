"""Weighted means of what a run measures, summed on the device and reduced over ranks once per log."""

import torch
from accelerate import Accelerator


class MetricSums:
    """Sums of values and weights since the last `reduce`, on the device, without waiting for it.

    The mean of a metric over a logging window, all ranks and micro-batches is sum of values / sum of weights, where
    the weight is the number of tokens or pairs behind a value: unlike a mean of means it does not depend on how rows
    are split. A non-finite value is left out, with its weight, and counted.
    """

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, value: torch.Tensor, weight: float) -> None:
        """Add one micro-batch's part of a metric.

        Args:
            name: of the metric; every rank adds the same names.
            value: scalar, the sum over the tokens or pairs.
            weight: how many there are; 0 where the micro-batch has none.
        """
        # MPS has no float64; a window's counts fit float32.
        dtype = torch.float32 if value.device.type == "mps" else torch.float64
        value = value.detach().to(dtype)
        finite = value.isfinite()
        part = torch.stack(
            [torch.where(finite, value, 0), torch.where(finite, float(weight), 0.0).to(dtype), (~finite).to(dtype)]
        )
        self._sums[name] = self._sums[name] + part if name in self._sums else part

    def reduce(self, accelerator: Accelerator) -> tuple[dict[str, float], dict[str, int]]:
        """Means over all ranks since the last call, and how many micro-batches were non-finite.

        One collective and one device synchronisation for all metrics. Every rank must call it.

        Returns:
            Mean by name, left out where the weights sum to 0, and the count of non-finite parts by name, left out
            where it is 0.
        """
        if not self._sums:
            return {}, {}
        names = list(self._sums)
        table = accelerator.reduce(torch.stack([self._sums[name] for name in names]), "sum").tolist()
        self._sums.clear()
        rows = dict(zip(names, table, strict=True))
        means = {name: value / weight for name, (value, weight, _) in rows.items() if weight}
        non_finite = {name: int(count) for name, (_, _, count) in rows.items() if count}
        return means, non_finite
