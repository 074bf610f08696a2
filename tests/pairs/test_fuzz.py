"""Mutated rows in Python and in files: each trains with its words, is dropped with a count, or is refused by place."""

import copy
import csv
import io
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, IterableDataset

from orpo_trl.config import DataArguments
from orpo_trl.pairs.load import ORIGIN_COLUMNS, ROW_COLUMN, UNREAD_COLUMN, load_pairs
from orpo_trl.pairs.prepare import MalformedRowsError, prepare_pairs
from orpo_trl.pairs.remarks import is_fault
from orpo_trl.pairs.tokenize import DROP_REASONS, MALFORMED, PairRules, tokenize_rows
from tests.pairs.test_data_formats import DOCUMENT
from tests.support.mutated_rows import mutated_rows, words

Row = dict[str, Any]
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
# Refused as a whole, from the columns alone.
NO_PAIRS = re.compile("The rows have no `chosen`; they have |The train dataset has none of the columns of a pair")


class Fates:
    """What becomes of rows. Fails where one is lost in silence, or refused without its place.

    Attributes:
        counts: number of rows by fate: 'trained', a reason for dropping, 'refused by line' of a file, or 'no pairs'.
    """

    def __init__(self, tokenizer, caplog):
        self.tokenizer, self.caplog = tokenizer, caplog
        self.counts: Counter[str] = Counter()

    def of_python(self, rows: list[Row]) -> None:
        # The columns of the first row decide whether a stream holds pairs.
        rows = [{"prompt": "w0q", "chosen": "w1q", "rejected": "w2q"}, *rows]
        self._of_dataset(rows, IterableDataset.from_generator(lambda: iter(copy.deepcopy(rows))), "train")

    def of_file(self, rows: list[Row], path: Path, streaming: bool) -> None:
        while rows:
            firsts = WRITERS[path.suffix](rows, path)
            arguments = DataArguments(dataset_name=str(path), dataset_streaming=streaming)
            try:
                dataset = load_pairs(arguments, with_test=False)[0]
            except ValueError as error:
                place = re.search(rf"'{path}' could not be loaded: line (\d+) (has|is) .*\. \w+ ", str(error))
                assert place, error
                line = int(place[1])
                rows = [row for k, row in enumerate(rows) if not firsts[k] <= line < firsts[k + 1]]
                self.counts["refused by line"] += 1
            else:
                self._of_dataset(rows, dataset, str(path))
                return

    def _of_dataset(self, rows: list[Row], dataset: Any, source: str) -> None:
        try:
            refused = self._refused(dataset, source)
            kept, dropped = self._kept_and_dropped(dataset, source)
        except ValueError as error:
            assert NO_PAIRS.match(str(error)), error
            self.counts["no pairs"] += len(rows)
            return
        assert len(kept) + sum(dropped.values()) == len(rows)
        assert dropped[MALFORMED] == refused
        self.counts.update(dropped, trained=len(kept))
        read = list(dataset)
        for index, pair in kept.items():
            self._check_words(rows[index], read[index], pair)

    def _refused(self, dataset: Any, source: str) -> int:
        """The number of rows that an error counts, of which it names the first ten by source, row and column."""
        try:
            list(prepare_pairs(dataset, self.tokenizer, PairRules())[0])
        except MalformedRowsError as error:
            size, *lines = str(error).splitlines()
            count = int(size.split()[0].replace(",", ""))
            place = rf"  {re.escape(source)}, row \d+: column `\w+`: expected .*, received "
            assert [bool(re.match(place, line)) for line in lines[:count][:10]] == [True] * min(count, 10), error
            return count
        except ValueError as error:
            assert str(error).startswith("No row of the train dataset is left to use.") or NO_PAIRS.match(str(error))
        return 0

    def _kept_and_dropped(self, dataset: Any, source: str) -> tuple[dict[int, Row], Counter[str]]:
        """Prepared pairs by row, and the number of the others by reason, from the report or the log of a stream."""
        self.caplog.clear()
        with self.caplog.at_level(logging.WARNING, "orpo_trl"):
            try:
                pairs, report = prepare_pairs(dataset, self.tokenizer, PairRules(), on_malformed="drop")
                kept = {pair[ROW_COLUMN]: pair for pair in pairs}
            except ValueError as error:
                if NO_PAIRS.match(str(error)):
                    raise
                kept, report = {}, str(error)
        if report is not None:
            found = re.findall(r"^    dropped, (.*): ([\d,]+) \(row", str(report), re.M)
            return kept, Counter({reason: int(count.replace(",", "")) for reason, count in found})
        found = re.findall(rf"^{re.escape(source)}, row \d+: dropped, (.*)", "\n".join(self.caplog.messages), re.M)
        return kept, Counter(reason if reason in DROP_REASONS else MALFORMED for reason in found)

    def _check_words(self, written: Row, read: Row, pair: Row) -> None:
        """Every word of a row that trains was read from its file, and is in its ids, or is said not to be."""
        unread = (read.get(UNREAD_COLUMN) or "").split(",")
        read = {name: value for name, value in read.items() if name not in ORIGIN_COLUMNS}
        assert words({name: value for name, value in written.items() if name not in unread}) <= words(read), written
        trained = words(self.tokenizer.decode([token for name in IDS for token in pair[name] or ()]))
        assert trained <= words(read), written
        if trained < words(read):
            record = tokenize_rows({name: [value] for name, value in read.items()}, self.tokenizer, PairRules())
            # Which variables a template has is not known.
            used = {name: read[name] for name in record["read"][0].split(",") if name != "chat_template_kwargs"}
            remarks = json.loads(record["remarks"][0] or "[]")
            assert words(used) <= trained or any(is_fault(kind) for kind, _ in remarks), written


def write_jsonl(rows: list[Row], path: Path) -> list[int]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return list(range(1, len(rows) + 2))


def write_csv(rows: list[Row], path: Path) -> list[int]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(names)
    firsts = []
    for row in rows:
        firsts.append(text.getvalue().count("\n") + 1)
        cells = [row.get(name) for name in names]
        writer.writerow(["" if x is None else x if isinstance(x, str) else json.dumps(x) for x in cells])
    path.write_bytes(text.getvalue().encode("utf-8", "surrogatepass"))
    return [*firsts, text.getvalue().count("\n") + 1]


def write_parquet(rows: list[Row], path: Path) -> list[int]:
    Dataset.from_list(rows).to_parquet(path)
    return []


def rows_of_one_type(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows that Parquet takes, in groups whose columns have one type each."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        with suppress(pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError, ValueError):
            dataset = Dataset.from_list([row])
            pq.write_table(dataset.data.table, io.BytesIO())
            groups.setdefault(str(dataset.features), []).append(row)
    yield from groups.values()


WRITERS = {".jsonl": write_jsonl, ".csv": write_csv, ".parquet": write_parquet}


@pytest.fixture
def fates(tokenizer, caplog):
    (tokenizer.chat_template,) = re.findall(r"^```jinja\n(.*?)^```$", DOCUMENT, re.M | re.S)
    return Fates(tokenizer, caplog)


def check(counts: Counter[str]) -> None:
    """That the rows are not all of one fate."""
    assert min(counts["trained"], counts[MALFORMED]) > counts.total() / 10, counts


@pytest.mark.parametrize(("size", "seed"), [(300, 0), pytest.param(3_000, 1, marks=pytest.mark.slow)])
def test_no_row_in_python_is_lost_in_silence(fates, size, seed):
    rows = mutated_rows(size, seed)
    for start in range(0, size, 50):
        fates.of_python(rows[start : start + 50])
    assert fates.counts.total() == size + size // 50
    check(fates.counts)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize(("size", "seed"), [(20, 0), pytest.param(200, 1, marks=pytest.mark.slow)])
def test_no_row_of_a_file_is_lost_in_silence(fates, tmp_path, suffix, streaming, size, seed):
    rows = mutated_rows(size, seed)
    groups = (
        rows_of_one_type(rows[: size // 2]) if suffix == ".parquet" else [rows[k : k + 20] for k in range(0, size, 20)]
    )
    for number, group in enumerate(groups):
        fates.of_file(group, tmp_path / f"{number}{suffix}", streaming)
    check(fates.counts)
