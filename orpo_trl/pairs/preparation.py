"""What preparation made of a dataset: counts by source and reason, and token statistics."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import cast

import numpy as np

from orpo_trl.pairs.remarks import is_fault, is_loss

# Row numbers listed per reason; the rest are counted.
MAX_LISTED = 5


@dataclass
class Remark:
    """Rows of a source with the same remark, such as "system text lost".

    Attributes:
        count: number of rows.
        row: number of the first.
        words: what the chat template left out of that row; empty where the remark is about something else.
    """

    count: int
    row: int
    words: str


@dataclass
class SourceReport:
    """Counts of one source. Row numbers count from 0 in the source as it was loaded."""

    rows: int = 0
    pairs: int = 0
    nll_only: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_rows: dict[str, list[int]] = field(default_factory=dict)
    cut_chosen: int = 0
    cut_rejected: int = 0
    prompt_changed: int = 0
    text_rows: int = 0
    remarks: dict[str, "Remark"] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    @property
    def kept(self) -> int:
        return self.pairs + self.nll_only


@dataclass
class LengthStats:
    """Token counts of one part over the kept rows."""

    mean: float
    median: float
    p95: float
    max: int
    total: int

    @classmethod
    def of(cls, lengths: np.ndarray) -> "LengthStats":
        if not len(lengths):
            return cls(0.0, 0.0, 0.0, 0, 0)
        median, p95 = np.percentile(lengths, [50, 95])
        return cls(float(lengths.mean()), float(median), float(p95), int(lengths.max()), int(lengths.sum()))


@dataclass
class PreparationReport:
    """The report of one dataset. `str(report)` is the text for people, `to_dict()` the same as plain values."""

    name: str
    sources: dict[str, SourceReport]
    tokens: dict[str, LengthStats]

    @property
    def pairs(self) -> int:
        return sum(source.pairs for source in self.sources.values())

    @property
    def kept(self) -> int:
        return sum(source.kept for source in self.sources.values())

    @property
    def faults(self) -> list[str]:
        """A sentence for each remark that is worth a warning: how many rows, and the first of them."""
        return self._remarks(is_fault)

    @property
    def losses(self) -> list[str]:
        """Those of `faults` that name words which the chat template left out."""
        return self._remarks(is_loss)

    def _remarks(self, is_meant: Callable[[str], bool]) -> list[str]:
        return [
            f"{name}: {kind} in {remark.count:,} row{'s' if remark.count > 1 else ''}, first in row {remark.row}"
            + (f": {remark.words!r}" if remark.words else "")
            for name, source in self.sources.items()
            for kind, remark in source.remarks.items()
            if is_meant(kind)
        ]

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "PreparationReport":
        """The report that `to_dict` was called on."""
        sources = {name: SourceReport(**source) for name, source in values["sources"].items()}
        for source in sources.values():
            source.remarks = {kind: Remark(**remark) for kind, remark in cast(dict, source.remarks).items()}
        tokens = {part: LengthStats(**stats) for part, stats in values["tokens"].items()}
        return cls(values["name"], sources, tokens)

    def __str__(self) -> str:
        lines = [f"Prepared the {self.name} dataset:"]
        for name, source in self.sources.items():
            kinds = f"{source.pairs:,} pairs"
            if source.nll_only:
                kinds += f", {source.nll_only:,} without a rejected response (NLL term alone)"
            lines.append(f"  {name}: {source.rows:,} rows read, {source.kept:,} kept ({kinds})")
            for reason, count in source.dropped.items():
                rows = source.dropped_rows[reason]
                listed = ", ".join(map(str, rows)) + (", …" if count > len(rows) else "")
                lines.append(f"    dropped, {reason}: {count:,} (row{'s' if count > 1 else ''} {listed})")
            if source.cut_chosen or source.cut_rejected:
                lines.append(
                    f"    cut on the right, end-of-sequence lost: {source.cut_chosen:,} chosen, "
                    f"{source.cut_rejected:,} rejected"
                )
            if source.prompt_changed:
                lines.append(f"    prompt shortened where its tokens merge with a response: {source.prompt_changed:,}")
            if source.text_rows:
                lines.append(f"    text, trained as it stands: {source.text_rows:,} rows")
            for kind, remark in source.remarks.items():
                lines.append(f"    {kind}: {remark.count:,} (first in row {remark.row})")
            if source.unread:
                lines.append(f"    columns that nothing reads: {', '.join(source.unread)}")
        lines.append(f"  {'tokens':<10}{'mean':>8}{'median':>8}{'95 %':>8}{'max':>8}{'total':>14}")
        for part, stats in self.tokens.items():
            lines.append(
                f"  {part:<10}{stats.mean:>8.0f}{stats.median:>8.0f}{stats.p95:>8.0f}{stats.max:>8,}{stats.total:>14,}"
            )
        return "\n".join(lines)
