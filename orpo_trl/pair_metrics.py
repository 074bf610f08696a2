"""What a run logs of its pairs: sums of micro-batches, means of a logging window or of an evaluation set."""

import logging
from collections.abc import Callable

import torch
from accelerate import Accelerator

from orpo_trl.config import ORPOConfig
from orpo_trl.losses import odds_ratio_delta, odds_ratio_loss, orpo_loss
from orpo_trl.metric_sums import MetricSums, PairGroups
from orpo_trl.throughput import Throughput

logger = logging.getLogger(__name__)


# Means over pairs, each from chosen and rejected (`[pairs]`, mean token log-probabilities) and the log odds ratio.
PAIR_METRICS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "log_odds_ratio": lambda chosen, rejected, log_ratio: -odds_ratio_loss(log_ratio),
    "log_odds_chosen": lambda chosen, rejected, log_ratio: log_ratio,
    "odds_ratio_delta": lambda chosen, rejected, log_ratio: odds_ratio_delta(log_ratio),
    "logps/chosen": lambda chosen, rejected, log_ratio: chosen,
    "logps/rejected": lambda chosen, rejected, log_ratio: rejected,
    "rewards/accuracies": lambda chosen, rejected, log_ratio: _is_right(chosen, rejected),
}


def _is_right(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    # TRL compares the rewards, which are all 0 at beta = 0. A comparison with NaN is False, which would be a number.
    return torch.where((chosen - rejected).isfinite(), (chosen > rejected).float(), torch.nan)


class PairMetrics:
    """Metrics of training and of evaluation, and warnings of values that are not finite.

    Args:
        args: of the run; `beta`.
        accelerator: of the run; means are taken over all of its ranks.
        throughput: of the run; its numbers are reduced with the metrics, in the same collective.
        aux_loss_weight: weight of the load-balancing loss of a mixture of experts; None where the model has none.
    """

    def __init__(
        self, args: ORPOConfig, accelerator: Accelerator, throughput: Throughput, aux_loss_weight: float | None = None
    ):
        self.args, self.accelerator, self.throughput = args, accelerator, throughput
        self.aux_loss_weight = aux_loss_weight
        names = ["nll_loss", *PAIR_METRICS, *([] if aux_loss_weight is None else ["aux_loss"])]
        self.had_non_finite_loss = False
        self._sums = {"train": MetricSums(names), "eval": MetricSums(names)}
        self._groups = PairGroups(args.beta)
        self._last_step = 0
        self._has_seen_pairs = False

    def start(self, step: int, num_tokens: int) -> None:
        """A run begins, or resumes after this optimiser step and this many tokens."""
        self._last_step = step
        self.throughput.start(num_tokens)

    @torch.no_grad()
    def add(
        self,
        mode: str,
        batch: dict,
        nll: torch.Tensor,
        chosen: torch.Tensor,
        rejected: torch.Tensor,
        log_ratio: torch.Tensor,
        aux_loss: torch.Tensor | None = None,
    ) -> None:
        """Add a micro-batch, without waiting for the device.

        Args:
            mode: 'train' or 'eval'.
            batch: from `PairCollator`.
            nll: scalar, from `losses.nll_sum`.
            chosen, rejected: `[pairs]`, mean token log-probabilities.
            log_ratio: `[pairs]`, from `losses.log_odds_ratio`.
            aux_loss: scalar, mean over the micro-batch.
        """
        of_pairs = [compute(chosen, rejected, log_ratio) for compute in PAIR_METRICS.values()]
        values = [nll.reshape(1), torch.stack(of_pairs).sum(dim=1)]
        weights = [batch["num_nll_units"], *[batch["num_pairs"]] * len(of_pairs)]
        if aux_loss is not None:
            values.append(aux_loss.float().reshape(1) * batch["num_micro_batches"])
            weights.append(batch["num_micro_batches"])
        self._sums[mode].add(torch.cat(values), weights)
        if mode == "eval":
            self._groups.add(chosen, rejected, batch["pair_sources"], batch["pair_lengths"])

    def of_training(self, step: int) -> dict[str, float]:
        """Metrics of the window that ends with an optimiser step. Every rank must call it.

        Returns:
            Means and throughput, by logged name; `loss` is NaN, and set, only where a value was not finite.
        """
        metrics, non_finite, numbers = self._sums["train"].reduce(self.accelerator, self.throughput.numbers())
        metrics = {**self._with_rewards(metrics), **self.throughput.metrics(numbers)}
        if non_finite:
            self.had_non_finite_loss = True
            metrics["loss"] = float("nan")
            where = f"between steps {self._last_step + 1} and {step}"
            self._warn_non_finite(where, non_finite, "left out of the means")
        self._last_step = step
        self._warn_without_pairs("log_odds_ratio" in metrics)
        return metrics

    def of_evaluation(self, step: int) -> dict[str, float]:
        """Metrics of a whole evaluation set, without prefix. Every rank must call it.

        A metric is NaN where a value of any pair was not finite: a mean over the others would compare another set, and
        a model that gives no finite value at all could look like the best one.
        """
        metrics, non_finite, _ = self._sums["eval"].reduce(self.accelerator)
        groups = self._groups.reduce()
        if non_finite:
            self._warn_non_finite(f"in evaluation at step {step}", non_finite, "so that their means are NaN")
            metrics |= dict.fromkeys(non_finite, float("nan"))
            groups = dict.fromkeys(groups, float("nan"))
        # The Trainer's own loss is a mean over batches of any size, rows of the last one repeated.
        loss = orpo_loss(metrics.get("nll_loss", 0.0), -metrics.get("log_odds_ratio", 0.0), self.args.beta)
        metrics["loss"] = float(loss + (self.aux_loss_weight or 0.0) * metrics.get("aux_loss", 0.0))
        return {**self._with_rewards(metrics), **groups}

    def _with_rewards(self, metrics: dict[str, float]) -> dict[str, float]:
        """TRL's rewards are beta times the log-probabilities, so they need no sums of their own."""
        if "logps/chosen" not in metrics or "logps/rejected" not in metrics:
            return metrics
        chosen, rejected = (self.args.beta * metrics[f"logps/{side}"] for side in ("chosen", "rejected"))
        return {**metrics, "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}

    def _warn_without_pairs(self, has_pairs: bool) -> None:
        """A stream does not know beforehand that its `rejected` column is missing or misspelt."""
        if not has_pairs and not self._has_seen_pairs and self.args.beta and self.accelerator.is_main_process:
            logger.warning("No row so far has a `rejected` response: the odds-ratio term has not been trained.")
        self._has_seen_pairs |= has_pairs

    def _warn_non_finite(self, where: str, non_finite: dict[str, int], effect: str) -> None:
        if self.accelerator.is_main_process:
            counts = ", ".join(f"{name} in {count} micro-batches" for name, count in non_finite.items())
            logger.warning("Non-finite values %s, %s: %s", where, effect, counts)
