"""Files that the command `orpo-trl report` writes."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from orpo_trl.evaluations import Evaluation, Figure
from orpo_trl.metrics import number
from orpo_trl.plain_files import write_bytes, write_text
from orpo_trl.report import draw, evaluation_figures
from orpo_trl.report.page import render
from orpo_trl.report.run import Run, read_runs

PAGE = "report.html"
# What a spreadsheet takes for the beginning of a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_report(
    folders: Sequence[Path], output: Path | None = None, png: Path | None = None, table: Path | None = None
) -> list[Path]:
    """Read runs and write their page; on request, also their figures and metrics.

    Args:
        folders: the output folders of the runs.
        output: file of the page; by default `report.html`, in the folder of a single run, else in the current folder.
        png: folder for a PNG file of each figure.
        table: CSV file of all metrics; beside it, NAME_evaluations.csv, where runs have evaluations.

    Returns:
        The files written.

    Raises:
        ValueError: naming the folder or file that cannot be read.
    """
    runs = read_runs(folders)
    if output is None:
        output = (runs[0].folder if len(runs) == 1 else Path()) / PAGE
    written = [output]
    _write_text(output, render(runs))
    if png is not None:
        written += write_pictures(runs, png)
    if table is not None:
        write_table(runs, table)
        written.append(table)
        if any(run.evaluations for run in runs):
            written.append(table.with_name(f"{table.stem}_evaluations{table.suffix}"))
            write_evaluations(runs, written[-1])
    return written


def write_pictures(runs: list[Run], folder: Path) -> list[Path]:
    """Write a PNG file of each figure that has values, under its name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for room in (draw, evaluation_figures):
        for name in room.drawable(runs):
            paths.append(folder / f"{name}.png")
            write_bytes(paths[-1], draw.to_bytes(room.draw(name, runs), "png"))
    return paths


def write_table(runs: Sequence[Run], path: Path) -> None:
    """Write all metrics of all runs as CSV: a line for each log, a column for each metric."""
    metrics = sorted({name for run in runs for log in run.history for name in log} - {"step", "epoch"})
    rows = ((run.name, *map(log.get, ("step", "epoch", *metrics))) for run in runs for log in run.history)
    _write_rows(path, ("run", "step", "epoch", *metrics), rows)


def write_evaluations(runs: Sequence[Run], path: Path) -> None:
    """Write the evaluations of all runs as CSV: a line for each figure."""
    made = ("benchmark", "judge", "template", "shots", "asked", "answered", "limit", "date")
    measured = ("value", "stderr", "n", "low", "high")
    rows = (
        (run.name, *(getattr(evaluation, key) for key in made), *place, *(getattr(figure, key) for key in measured))
        for run in runs
        for evaluation in run.evaluations
        for place, figure in _figures(evaluation)
    )
    _write_rows(path, ("run", *made, "kind", "part", "figure", *measured), rows)


def _figures(evaluation: Evaluation) -> Iterator[tuple[tuple[str, str, str], Figure]]:
    """Kind of part, part and name of each figure; kind and part are empty for the whole."""
    yield from ((("", "", name), figure) for name, figure in evaluation.figures.items())
    for kind, groups in evaluation.groups.items():
        for part, figures in groups.items():
            yield from (((kind, part, name), figure) for name, figure in figures.items())


def _write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([_cell(value) for value in row] for row in (header, *rows))
    write_text(path, text.getvalue(), errors="backslashreplace")


def _cell(value: object) -> object:
    """Numbers are exact; those that are not finite are empty. No text is a formula, which a spreadsheet would run."""
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
    return "" if isinstance(value, float) and number(value) is None else value


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Half of a surrogate pair, which JSON may hold, has no bytes in UTF-8.
    write_text(path, text, errors="backslashreplace")
