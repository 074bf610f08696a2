"""A token budget: the rows of a micro-batch in several passes, so that long rows do not decide the memory of a step."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orpo_trl.batch import PairCollator
from orpo_trl.config import ORPOConfig
from orpo_trl.lengths import PairLengths
from orpo_trl.upstream import HookedSFTTrainer, UpstreamError, supported_versions

logger = logging.getLogger(__name__)


@dataclass
class TokenBudget:
    """Collates the rows of a micro-batch into several batches of at most so many tokens.

    Attributes:
        collator: makes each of them.
        max_tokens: positions of a batch, padding included. A pair with more gets a batch of its own.
    """

    collator: PairCollator
    max_tokens: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        """As few batches as first-fit by falling length makes, one at least, under `passes`."""
        parts: list[list[dict[str, Any]]] = []
        for example in sorted(examples, key=lambda example: self.collator.positions([example]), reverse=True):
            fits = (part for part in parts if self.collator.positions([*part, example]) <= self.max_tokens)
            part = next(fits, None)
            if part is None:
                parts.append([example])
            else:
                part.append(example)
        return {"passes": [self.collator(part) for part in parts or [[]]]}


class TokenBudgetMixin(HookedSFTTrainer):
    """Trains with `max_tokens_per_micro_batch`: a batch of `TokenBudget` runs pass by pass, as one micro-batch.

    Without that setting, each batch is one pass.
    """

    args: ORPOConfig

    def passes(self, batch):
        return batch.get("passes", [batch])

    @property
    def train_collator(self):
        budget = self.args.max_tokens_per_micro_batch
        return self.data_collator if budget is None else TokenBudget(self.data_collator, budget)

    def get_train_dataloader(self):
        collator = self.data_collator
        self.data_collator = self.train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def warn_of_pairs_over_budget(self, lengths: PairLengths) -> None:
        budget = self.args.max_tokens_per_micro_batch
        if budget is None:
            return
        is_packed = getattr(self.data_collator, "layout", "padded") == "shared_prefix"
        longest = lengths.largest_batch(is_packed, getattr(self.data_collator, "pad_to_multiple_of", None))
        if longest > budget:
            logger.warning(
                "The longest pair takes %d tokens, more than `max_tokens_per_micro_batch: %d`: such a pair makes a "
                "micro-batch of its own.",
                longest, budget,
            )  # fmt: skip

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, totals = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and self.args.max_tokens_per_micro_batch is not None and self.accelerator.num_processes > 1:
            # Ranks must take part in each other's collectives, so all run as many passes as the rank with the most.
            counts = torch.tensor([[len(self.passes(batch)) for batch in batches]], device=device)
            of_ranks: Any = self.accelerator.gather(counts)
            most = of_ranks.amax(0).tolist()
            for batch, count in zip(batches, most, strict=True):
                batch["passes"] += [self.data_collator([]) for _ in range(count - len(batch["passes"]))]
        return batches, totals

    def training_step(self, model, inputs, num_items_in_batch=None):
        if num_items_in_batch is None:
            raise UpstreamError(
                "transformers has not counted the pairs of the optimiser step (`Trainer._get_num_items_in_batch`), so "
                f"its loss would be wrong; supported: {supported_versions('transformers')}."
            )
        *first, last = self.passes(inputs)
        losses = []
        for part in first:
            with self.accumulating(model):
                losses.append(super().training_step(model, part, num_items_in_batch))
        losses.append(super().training_step(model, last, num_items_in_batch))
        # The Trainer sums these, and a NaN would stay in its sum for good; `log` reports it.
        return torch.stack([torch.where(loss.isfinite(), loss, 0) for loss in losses]).sum()

    def floating_point_ops(self, inputs):
        return sum(super(TokenBudgetMixin, self).floating_point_ops(part) for part in self.passes(inputs))
