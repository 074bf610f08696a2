"""What a pair costs, padded and packed, from the lengths of its three parts. Knows nothing of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np

PARTS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class PairLengths:
    """Tokens of the prompts and responses of pairs. Every cost below is an array of the same shape.

    A padded pair takes two rows, each a prompt with one response, padded to the longest row of its batch. A packed pair
    takes one stretch of a row, in which the prompt runs once:

        padded    prompt chosen  / prompt rejected
        packed    prompt chosen last-prompt-token rejected

    A row without a rejected response takes one padded row, and has no last part when it is packed.

    Attributes:
        prompt: `[...]`, int64, 1 or more; by convention the last axis is that of the pairs.
        chosen: `[...]`, int64, 1 or more.
        rejected: `[...]`, int64; 0 where there is no rejected response.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @classmethod
    def of(cls, pairs: Iterable[Mapping[str, Any]]) -> PairLengths:
        """Lengths `[pairs]` of prepared pairs, from the columns `prompt_ids`, `chosen_ids` and `rejected_ids`."""
        table = [[_size(pair.get(f"{part}_ids")) for part in PARTS] for pair in pairs]
        return cls(*np.array(table, dtype=np.int64).reshape(-1, len(PARTS)).T)

    def __len__(self) -> int:
        return len(self.prompt)

    def __getitem__(self, index: Any) -> PairLengths:
        """Lengths of some of the pairs, by any index of numpy."""
        return PairLengths(self.prompt[index], self.chosen[index], self.rejected[index])

    @property
    def is_pair(self) -> np.ndarray:
        """Whether there is a rejected response, bool."""
        return self.rejected > 0

    @property
    def unique(self) -> np.ndarray:
        """Tokens with the prompt counted once."""
        return self.prompt + self.chosen + self.rejected

    @property
    def total(self) -> np.ndarray:
        """Tokens with the prompt counted with each response, without padding."""
        return self.unique + self.prompt * self.is_pair

    @property
    def rows(self) -> np.ndarray:
        """Rows of a padded batch: 2, or 1 without a rejected response."""
        return 1 + self.is_pair

    @property
    def longer_response(self) -> np.ndarray:
        """Tokens of the longer response."""
        return np.maximum(self.chosen, self.rejected)

    @property
    def longest_row(self) -> np.ndarray:
        """Tokens of the prompt with its longer response."""
        return self.prompt + self.longer_response

    @property
    def padded(self) -> np.ndarray:
        """Positions in a padded batch of its own."""
        return self.rows * self.longest_row

    @property
    def packed(self) -> np.ndarray:
        """Positions in a packed row: the last prompt token stands before the rejected response again."""
        return self.unique + self.is_pair

    @property
    def attended(self) -> np.ndarray:
        """Pairs of a token and a token that it sees, each prompt once: what the model needs."""
        row = self.prompt + self.chosen
        return _seen(row, row) + _seen(self.rejected, self.prompt + self.rejected)

    @property
    def attended_packed(self) -> np.ndarray:
        """The same as computed in a packed row, where the repeated prompt token is a query too."""
        return self.attended + self.prompt * self.is_pair

    @property
    def attended_padded(self) -> np.ndarray:
        """The same as computed in rows of `longest_row`."""
        return self.rows * _seen(self.longest_row, self.longest_row)

    def batch(self, is_packed: bool, multiple: int | None = None) -> np.ndarray:
        """Positions of the batch of the pairs along the last axis, padding included: `[...]` without that axis.

        Args:
            is_packed: one row for all pairs; else padded rows.
            multiple: the length of a row is rounded up to a multiple of it.
        """
        if is_packed:
            return round_up(self.packed.sum(-1), multiple)
        return self.rows.sum(-1) * round_up(self.longest_row.max(-1, initial=0), multiple)

    def largest_batch(self, is_packed: bool, multiple: int | None = None) -> int:
        """Positions of the largest batch of one pair alone; arguments as in `batch`."""
        return int(self[..., None].batch(is_packed, multiple).max())


def round_up(size: Any, multiple: int | None) -> Any:
    """An int or an array of them, rounded up to a multiple; as it is where that is None or 0."""
    return -(-size // multiple) * multiple if multiple else size


def _size(ids: Sized | None) -> int:
    return 0 if ids is None else len(ids)


def _seen(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Pairs of a query and a key that it sees, where the last query and the last key are the same token."""
    return queries * keys - queries * (queries - 1) // 2
