"""A dataset of rows to a dataset of token ids, with a report of what was dropped and cut."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, IterableDataset, Json
from transformers import PreTrainedTokenizerBase

from orpo_trl.lengths import PARTS, PairLengths
from orpo_trl.pairs.columns import ROW_COLUMNS
from orpo_trl.pairs.foreign_rows import check_columns
from orpo_trl.pairs.load import ORIGIN_COLUMNS, ROW_COLUMN, SOURCE_COLUMN, UNREAD_COLUMN
from orpo_trl.pairs.preparation import MAX_LISTED, LengthStats, PreparationReport, Remark, SourceReport
from orpo_trl.pairs.remarks import is_fault, is_loss
from orpo_trl.pairs.tokenize import (
    DROP_REASONS,
    KEPT,
    MALFORMED,
    PAIR_FEATURES,
    TOKENIZED_FEATURES,
    UNRENDERED,
    PairRules,
    tokenize_rows,
)
from orpo_trl.upstream import fingerprint

logger = logging.getLogger(__name__)

# Columns of prepared pairs.
PAIR_COLUMNS = (*PAIR_FEATURES, SOURCE_COLUMN, ROW_COLUMN)

NO_END_OF_SEQUENCE = (
    "The tokenizer has no end-of-sequence token, so the model could not learn where a response ends. Set `eos_token` "
    "to a token of its vocabulary."
)

UNRENDERED_ADVICE = (
    "Set `chat_template_path` to a template that renders them, change the rows, or set `on_unrendered: drop` to train "
    "without these rows."
)

AS_TEXT = (
    "%s: %s rows are text, and are trained as they stand, without the tokenizer's chat template. "
    "`strings_as_messages: true` renders them as a conversation."
)

# What decides a pair's tokens beside its row, the tokenizer and the rules.
_CODE = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]


class RowsError(ValueError):
    """Rows that cannot be prepared, or a chat template that does not render them.

    Args:
        text: the message. A data loader raises the error of its worker again, by this one argument, with the worker's
            traceback before the message; that is left out.
    """

    def __init__(self, text: str):
        super().__init__(text.rpartition(f".{type(self).__name__}: ")[2] if text.startswith("Caught ") else text)


class MalformedRowsError(RowsError):
    """Rows without an accepted shape, each named by source, row number, column, expectation and finding."""

    @classmethod
    def of(cls, problems: list[str], count: int) -> "MalformedRowsError":
        """The error of so many rows, with the problems of the first ones."""
        more = f"\n  and {count - len(problems):,} more" if count > len(problems) else ""
        rows = "1 row does" if count == 1 else f"{count:,} rows do"
        return cls(
            f"{rows} not have an accepted shape:\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + more
            + "\nFix or remove them, or set `on_malformed: drop` to train without them."
        )


class UnrenderedRowsError(RowsError):
    """Rows of which the chat template leaves out words, with `on_unrendered: error`."""

    @classmethod
    def of(cls, faults: list[str]) -> "UnrenderedRowsError":
        return cls(
            "The chat template leaves out words of the rows:\n"
            + "\n".join(f"  {fault}" for fault in faults)
            + f"\n{UNRENDERED_ADVICE}"
        )


@overload
def prepare_pairs(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    rules: PairRules,
    name: str = ...,
    on_malformed: str = ...,
    on_unrendered: str = ...,
    num_proc: int | None = ...,
) -> tuple[Dataset, PreparationReport]: ...


@overload
def prepare_pairs(
    dataset: IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    rules: PairRules,
    name: str = ...,
    on_malformed: str = ...,
    on_unrendered: str = ...,
    num_proc: int | None = ...,
) -> tuple[IterableDataset, None]: ...


def prepare_pairs(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    rules: PairRules,
    name: str = "train",
    on_malformed: str = "error",
    on_unrendered: str = "warn",
    num_proc: int | None = None,
) -> tuple[Dataset | IterableDataset, PreparationReport | None]:
    """Tokenise a dataset of pairs, drop what the paper's rules drop, and say what became of every row.

    The result of a dataset on disk is cached by `datasets`; with several processes one of them tokenises, and the
    others read its cache.

    Args:
        dataset: rows of the accepted shapes (docs/data_formats.md).
        tokenizer: encodes the texts; needs an end-of-sequence token, and a chat template for conversations.
        rules: limits of length, and how strings are read.
        name: what to call the dataset in the report, and in errors where rows carry no source of their own.
        on_malformed: 'error' to raise on rows of no accepted shape, 'drop' to count and drop them.
        on_unrendered: what to do with rows of which the chat template leaves out words: 'warn', 'error' or 'drop'.
        num_proc: processes that tokenise; not used for an `IterableDataset`.

    Returns:
        The pairs, with columns `prompt_ids`, `chosen_ids`, `rejected_ids` (None for a row of the NLL term alone),
        `length` (their sum), `orpo_source` and `orpo_row` (where the row is from), and the report (None for an
        `IterableDataset`, whose drops are logged batch by batch).

    Raises:
        MalformedRowsError: naming the rows of no accepted shape.
        UnrenderedRowsError: naming the words that the chat template leaves out, with `on_unrendered: error`.
        ValueError: where the tokenizer has no end-of-sequence token, or no row is left.
    """
    columns = column_names(dataset)
    check_columns([column for column in columns if column not in ORIGIN_COLUMNS])
    if tokenizer.eos_token_id is None:
        raise ValueError(NO_END_OF_SEQUENCE)
    if not set(columns) & set(ROW_COLUMNS):
        received = [f"`{column}`" for column in columns if column not in ORIGIN_COLUMNS]
        raise ValueError(
            f"The {name} dataset has none of the columns of a pair. Expected `chosen`, `rejected` and a prompt; "
            f"received {', '.join(received) or 'no columns'}."
        )
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError(f"The {name} dataset has no rows.")
    arguments = {"tokenizer": tokenizer, "rules": rules, "features": dataset.features}
    if isinstance(dataset, IterableDataset):
        arguments |= {"name": name, "on_malformed": on_malformed, "on_unrendered": on_unrendered, "said": set()}
        pairs = dataset.map(_tokenize_and_drop, batched=True, with_indices=True, fn_kwargs=arguments)
        return pairs.select_columns(list(PAIR_COLUMNS)), None

    used = [column for column in columns if column in ROW_COLUMNS]
    rows_only = _undecoded(dataset.with_format(None).select_columns(used))
    state = PartialState()
    with state.main_process_first(), state.local_main_process_first():
        tokenized = rows_only.map(
            tokenize_rows,
            batched=True,
            fn_kwargs=arguments,
            num_proc=num_proc,
            remove_columns=used,
            features=TOKENIZED_FEATURES,
            desc=f"Tokenizing the {name} dataset",
            # `datasets` would know the function by its name alone, and give an upgraded package the old one's tokens.
            new_fingerprint=fingerprint(rows_only, tokenizer, rules, _CODE),
        )
    sources, rows = _origins(dataset, name)
    status = np.array(tokenized["status"][:], dtype=object)
    malformed = np.flatnonzero(status == MALFORMED)
    if len(malformed) and on_malformed == "error":
        listed = tokenized.select(malformed[:10])["problem"]
        problems = [f"{sources[i]}, row {rows[i]}: {text}" for i, text in zip(malformed, listed, strict=False)]
        raise MalformedRowsError.of(problems, len(malformed))
    remarks = tokenized["remarks"][:]
    if on_unrendered == "drop":
        status[[k for k, text in enumerate(remarks) if status[k] == KEPT and _has_losses(text)]] = UNRENDERED
    report = _report(name, tokenized, status, sources, rows)
    _add_remarks(report, remarks, sources, rows)
    _add_unread(report, dataset, used, tokenized, sources)
    if state.is_main_process:
        _warn(report, tokenizer, on_unrendered)
    if report.losses and on_unrendered == "error":
        raise UnrenderedRowsError.of(report.losses)
    if not report.kept:
        raise ValueError(f"No row of the {name} dataset is left to use.\n{report}")
    # Before rows are selected: a column that is added afterwards would copy all of them.
    tokenized = tokenized.select_columns(list(PAIR_FEATURES))
    tokenized = tokenized.add_column(SOURCE_COLUMN, sources).add_column(ROW_COLUMN, rows)
    return tokenized.select(np.flatnonzero(status == KEPT)), report


def _undecoded(dataset: Dataset) -> Dataset:
    """The dataset, with images and the like as they are stored: rows that hold one are refused, and none is decoded."""
    for column, feature in dataset.features.items():
        if getattr(feature, "decode", False) and not isinstance(feature, Json):
            # Texts of a JSON column that is not decoded would be trained with their quotes.
            dataset = dataset.cast_column(column, replace(cast(Any, feature), decode=False))
    return dataset


def _has_losses(remarks: str | None) -> bool:
    return remarks is not None and any(is_loss(kind) for kind, _ in json.loads(remarks))


def _add_remarks(report: PreparationReport, remarks: list[str | None], sources: np.ndarray, rows: np.ndarray) -> None:
    for text, source, row in zip(remarks, sources, rows, strict=True):
        if text is None:
            continue
        found = report.sources[source].remarks
        for kind, words in dict(json.loads(text)).items():
            if kind in found:
                found[kind].count += 1
            else:
                found[kind] = Remark(1, int(row), words)


def _add_unread(
    report: PreparationReport, dataset: Dataset, used: list[str], tokenized: Dataset, sources: np.ndarray
) -> None:
    """Name the columns of each source that nothing reads: of no row shape, or used by no row."""
    left = [column for column in dataset.column_names if column not in (*used, *ORIGIN_COLUMNS)]
    table = tokenized.with_format("arrow").select_columns(["read"])[:]
    read = np.asarray(table["read"].to_pylist(), dtype=object)
    unread = np.array(dataset[UNREAD_COLUMN][:], dtype=object) if UNREAD_COLUMN in dataset.column_names else None
    for source, found in report.sources.items():
        here = sources == source
        of_rows = {name for names in set(read[here]) if names for name in names.split(",")}
        of_source = (
            [name for text in set(unread[here]) if text for name in text.split(",")] if unread is not None else []
        )
        # Of rows that could not be read it is not known.
        unused = [column for column in used if column not in of_rows] if of_rows else []
        filled = [column for column in unused if _is_filled(dataset, column, here)]
        found.unread = [*filled, *left, *of_source]


def _is_filled(dataset: Dataset, column: str, here: np.ndarray) -> bool:
    """Whether a column has a value in any of these rows: sources that are joined have each other's columns, empty."""
    table = _undecoded(dataset.select_columns([column])).with_format("arrow")[:]
    return bool((_numpy(table[column].is_valid(), False) & here).any())


def _warn(report: PreparationReport, tokenizer: PreTrainedTokenizerBase, on_unrendered: str) -> None:
    """Say what a user must know even where reports are not printed."""
    for fault in report.faults:
        logger.warning("%s", fault)
    if report.losses and on_unrendered == "warn":
        logger.warning("%s", UNRENDERED_ADVICE)
    if tokenizer.chat_template:
        for source, found in report.sources.items():
            if found.text_rows:
                logger.warning(AS_TEXT, source, f"{found.text_rows:,}")


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Columns of a dataset; of a stream that does not know them, those of its first row."""
    return dataset.column_names or list(next(iter(dataset), {}))


def pair_lengths(pairs: Dataset) -> PairLengths:
    """Lengths `[pairs]` of prepared pairs."""
    return _lengths(pairs.with_format("arrow")[:])


def _tokenize_and_drop(
    batch: Mapping,
    indices: list[int],
    name: str,
    on_malformed: str,
    on_unrendered: str,
    said: set[tuple[str, str]],
    **kwargs: Any,
) -> dict[str, list]:
    """`tokenize_rows` for streams: drops at once what a `Dataset` drops after the report.

    `said` holds the source and kind of each remark that was logged: the first of a kind is.
    """
    used = {column: values for column, values in batch.items() if column in ROW_COLUMNS}
    try:
        records = tokenize_rows(used, **kwargs)
    except ValueError as error:  # of the chat template
        raise RowsError(str(error)) from error
    sources = batch.get(SOURCE_COLUMN) or [name] * len(indices)
    rows = batch.get(ROW_COLUMN) or indices
    losses = _say_remarks(records, sources, rows, said)
    if losses and on_unrendered == "error":
        raise UnrenderedRowsError.of(list(losses.values()))
    if on_unrendered == "drop":
        for index in losses:
            records["status"][index] = UNRENDERED if records["status"][index] == KEPT else records["status"][index]
    for source in dict.fromkeys(source for source, text in zip(sources, records["is_text"], strict=True) if text):
        if kwargs["tokenizer"].chat_template and (source, AS_TEXT) not in said:
            said.add((source, AS_TEXT))
            logger.warning(AS_TEXT, source, "the")
    named = list(zip(records["status"], sources, rows, records["problem"], strict=True))
    problems = [f"{source}, row {row}: {text}" for status, source, row, text in named if status == MALFORMED]
    if problems and on_malformed == "error":
        raise MalformedRowsError.of(problems[:10], len(problems))
    for status, source, row, problem in named:
        if status != KEPT:
            logger.warning("%s, row %s: dropped, %s", source, row, problem or status)
    kept = [index for index, status in enumerate(records["status"]) if status == KEPT]
    records |= {SOURCE_COLUMN: sources, ROW_COLUMN: rows}
    # Columns of the rows, which a later batch may have more of, stay as long as the pairs until they are left out.
    return {
        **{column: [None] * len(kept) for column in batch},
        **{column: [records[column][index] for index in kept] for column in PAIR_COLUMNS},
    }


def _say_remarks(
    records: Mapping[str, list], sources: list[str], rows: list[int], said: set[tuple[str, str]]
) -> dict[int, str]:
    """Log the first remark of each kind; returns what the template left out of which row, by its place in the batch."""
    losses = {}
    for index, text in enumerate(records["remarks"]):
        for kind, words in json.loads(text) if text else ():
            sentence = f"{sources[index]}, row {rows[index]}: {kind}" + (f": {words!r}" if words else "")
            if is_fault(kind) and (sources[index], kind) not in said:
                said.add((sources[index], kind))
                logger.warning("%s", sentence)
            if is_loss(kind):
                losses[index] = sentence
    return losses


def _origins(dataset: Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Source and row number of each row: those that `load_pairs` noted, else the dataset's own name and order."""
    if {SOURCE_COLUMN, ROW_COLUMN} <= set(dataset.column_names):
        return np.array(dataset[SOURCE_COLUMN][:], dtype=object), np.array(dataset[ROW_COLUMN][:])
    return np.full(len(dataset), name, dtype=object), np.arange(len(dataset))


def _report(name: str, tokenized: Dataset, status: np.ndarray, sources: np.ndarray, rows: np.ndarray):
    table = tokenized.with_format("arrow")[:]
    lengths = _lengths(table)
    flags = {flag: _numpy(table[flag], False) for flag in ("chosen_cut", "rejected_cut", "prompt_changed", "is_text")}
    kept = status == KEPT
    paired = kept & _numpy(table["rejected_ids"].is_valid(), False)
    reports = {}
    for source in dict.fromkeys(sources):
        here = sources == source
        dropped = {reason: rows[here & (status == reason)] for reason in DROP_REASONS}
        reports[source] = SourceReport(
            rows=int(here.sum()),
            pairs=int((here & paired).sum()),
            nll_only=int((here & kept & ~paired).sum()),
            dropped={reason: len(found) for reason, found in dropped.items() if len(found)},
            dropped_rows={reason: found[:MAX_LISTED].tolist() for reason, found in dropped.items() if len(found)},
            cut_chosen=int(flags["chosen_cut"][here].sum()),
            cut_rejected=int(flags["rejected_cut"][here].sum()),
            prompt_changed=int(flags["prompt_changed"][here].sum()),
            text_rows=int((flags["is_text"] & kept)[here].sum()),
        )
    tokens = {
        "prompt": LengthStats.of(lengths.prompt[kept]),
        "chosen": LengthStats.of(lengths.chosen[kept]),
        "rejected": LengthStats.of(lengths.rejected[paired]),
    }
    return PreparationReport(name, reports, tokens)


def _lengths(table: pa.Table) -> PairLengths:
    columns = (pc.call_function("list_value_length", [table[f"{part}_ids"]]) for part in PARTS)
    return PairLengths(*(_numpy(column, 0).astype(np.int64) for column in columns))


def _numpy(column: pa.ChunkedArray, absent) -> np.ndarray:
    return pc.fill_null(column, absent).to_numpy()
