"""How an answer is drawn, so that it depends on its prompt and the seed, and not on what else is in the batch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TopPLogitsWarper


@dataclass(frozen=True)
class Sampling:
    """Settings of one answer.

    Attributes:
        max_new_tokens: most tokens of the answer.
        temperature: divides the logits; 0: always the most likely token.
        top_p: share of the probability that is kept, from the most likely token on; 1: all.
        seed: of this answer alone.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


def seed_of(seed: int, index: int, turn: int) -> int:
    """A seed for one answer, from 0 to 2³¹ − 1, as servers take it."""
    digest = hashlib.sha256(f"{seed} {index} {turn}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def processors(batch: Sequence[Sampling], prompt_length: int, device: torch.device) -> LogitsProcessorList | None:
    """What makes the most likely token of each row the one that is drawn; None where all rows are greedy.

    Args:
        batch: settings of each row.
        prompt_length: tokens of a padded prompt.
        device: of the logits.
    """
    if not any(row.temperature for row in batch):
        return None
    return LogitsProcessorList([DrawBySeed(batch, prompt_length, device)])


class DrawBySeed(LogitsProcessor):
    """Leaves of each row's logits `[batch, vocabulary]` the token that is drawn; of greedy rows, all.

    A row has its own uniform numbers, made on the CPU from its seed: the token is where the cumulative probability
    passes the number of the step. torch's own sampling shares a generator among the rows of a batch.
    """

    def __init__(self, batch: Sequence[Sampling], prompt_length: int, device: torch.device):
        self.prompt_length = prompt_length
        self.is_greedy = torch.tensor([not row.temperature for row in batch], device=device)
        temperatures = [row.temperature or 1.0 for row in batch]
        self.temperatures = torch.tensor(temperatures, device=device)[:, None]
        self.uniform = torch.stack([_uniform(row) for row in batch]).to(device)  # [batch, new tokens], fp64
        (top_p,) = {row.top_p for row in batch}  # one setting for all answers
        self.keep_top = TopPLogitsWarper(top_p) if top_p < 1 else None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_length
        logits = scores.float() / self.temperatures
        if self.keep_top is not None:
            logits = self.keep_top(input_ids, logits)  # pyright: ignore[reportArgumentType]
        # A cumulative sum of fp32 over 100,000 tokens is off by more than unlikely tokens have.
        cumulative = logits.softmax(-1).double().cumsum(-1)
        threshold = self.uniform[:, step, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=scores.shape[-1] - 1)
        only = torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)
        return torch.where(self.is_greedy[:, None], scores, only)


def _uniform(row: Sampling) -> torch.Tensor:
    generator = torch.Generator().manual_seed(row.seed)
    return torch.rand(row.max_new_tokens, generator=generator, dtype=torch.float64)
