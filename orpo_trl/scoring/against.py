"""Scores of a model beside those of another one, its base, on the same tokens."""

from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from orpo_trl.scoring.logps import RECORD

_OF_THE_ROW = ("source", "row", "prompt_tokens", "chosen_tokens", "rejected_tokens")
# What the base adds to a record: `base_chosen_logp` and so on.
OF_THE_MODEL = [name for name in RECORD.names if name not in _OF_THE_ROW]
RECORD_AGAINST = pa.schema([*RECORD, *(RECORD.field(name).with_name(f"base_{name}") for name in OF_THE_MODEL)])


def with_base(records: list[dict[str, Any]], of_base: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of the model with the values of the base: the keys of `RECORD_AGAINST`.

    Args:
        records, of_base: from `score_pairs`, of the same rows in the same order.
    """
    return [
        {**record, **{f"base_{name}": base[name] for name in OF_THE_MODEL}}
        for record, base in zip(records, of_base, strict=True)
    ]


def check_same_tokens(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase) -> None:
    """Look whether the ids of pairs are the same tokens in the vocabulary of the base.

    Further tokens, which no row has, do no harm. The template of the base does not matter: both models score the rows
    as `tokenizer` has rendered them.

    Args:
        pairs: prepared pairs, of at least one row.
        tokenizer: has made them.

    Raises:
        ValueError: naming the first token that is another one, or none.
    """
    vocabulary, of_base = tokenizer.get_vocab(), base.get_vocab()
    if vocabulary == of_base:
        return
    tokens, base_tokens = ({number: token for token, number in one.items()} for one in (vocabulary, of_base))
    for number in _ids(pairs):
        mine, theirs = tokens.get(number), base_tokens.get(number)
        if mine != theirs:
            raise ValueError(
                f"--against: the rows have token {number}, which is {mine!r} for MODEL's tokenizer and "
                f"{'no token' if theirs is None else repr(theirs)} for that of {base.name_or_path!r}. "
                "Log-probabilities per token compare over the same tokens alone. `orpo-trl evaluate MODEL preferences "
                "--against BASE` compares models with different vocabularies, each on its own tokens."
            )


def _ids(pairs: Dataset) -> list[int]:
    """The token ids that occur in pairs, in ascending order."""
    table = pairs.with_format("arrow")[:]
    columns = [table[f"{part}_ids"].combine_chunks().flatten() for part in ("prompt", "chosen", "rejected")]
    return np.unique(np.concatenate([column.to_numpy(zero_copy_only=False) for column in columns])).tolist()
