"""Rows of any accepted shape to token ids of prompt, chosen and rejected.

`load` names to datasets, `rows` one row to one pair, `tokenize` pairs to ids, `prepare` all of it with a report.
"""

from orpo_trl.pairs.load import ROW_COLUMN, SOURCE_COLUMN, load_pairs
from orpo_trl.pairs.prepare import (
    PAIR_COLUMNS,
    MalformedRowsError,
    column_names,
    longest_rows,
    pair_lengths,
    prepare_pairs,
)
from orpo_trl.pairs.report import PreparationReport
from orpo_trl.pairs.tokenize import PairRules

__all__ = [
    "PAIR_COLUMNS",
    "ROW_COLUMN",
    "SOURCE_COLUMN",
    "MalformedRowsError",
    "PairRules",
    "PreparationReport",
    "column_names",
    "load_pairs",
    "longest_rows",
    "pair_lengths",
    "prepare_pairs",
]
