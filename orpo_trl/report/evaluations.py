"""Tables of what benchmarks measured, the runs beside each other and beside published models.

A figure stands beside a published one only where `differences` of the two is empty. Evaluations of one benchmark that
differ in how they were made, in the judge or the number of items, stand in rows of their own; a note says why.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orpo_trl.evaluations import Evaluation
from orpo_trl.evaluations import Figure as Measured
from orpo_trl.published import Published, differences, published_figures
from orpo_trl.report.benchmarks import column, in_order, label, number_text, place, shown, template_text, value_text
from orpo_trl.report.run import Run
from orpo_trl.report.tables import Table
from orpo_trl.report.text import NOTHING, shorten, show

# Kinds of parts whose own name does not say enough.
_KINDS = {"chosen_length": "length of chosen", "longer": "which response is longer"}


@dataclass(frozen=True)
class Comparison:
    """The table of evaluations.

    Attributes:
        published: models that have a figure in the table.
        tables: one for each benchmark; the values of a row are those of the runs, then those of `published`.
        notes: sentences below the table; a row refers to its note by `[1]`.
        sources: where the figures of `published` are from.
    """

    published: list[str]
    tables: list[Table]
    notes: list[str]
    sources: list[str]


@dataclass(frozen=True)
class _Group:
    """Evaluations of one benchmark that compare with each other: at most one of each run, by the run's number."""

    benchmark: str
    by_run: dict[int, Evaluation]

    @property
    def one(self) -> Evaluation:
        return next(iter(self.by_run.values()))

    @property
    def published(self) -> list[Published]:
        return table_figures(self.benchmark)

    @property
    def beside(self) -> list[Published]:
        """Published figures that the group's may stand beside."""
        return [figure for figure in self.published if not differences(self.one, figure)]


def table_figures(benchmark: str) -> list[Published]:
    """The published figures of a benchmark that tables and figures show: one of each model and name."""
    return [figure for figure in published_figures(benchmark) if not figure.at]


def compare(runs: Sequence[Run]) -> Comparison | None:
    """The evaluations of runs, in the order of the paper's table; None where no run has one."""
    groups = _groups(runs)
    if not groups:
        return None
    beside = [figure for group in groups for figure in group.beside]
    models = [name for name in dict.fromkeys(one.model for one in published_figures()) if name in _models(beside)]
    notes: list[str] = []
    rows: dict[str, list[tuple[str, list[str]]]] = {}
    for group in groups:
        words = _note(group, is_alone=sum(other.benchmark == group.benchmark for other in groups) == 1)
        if words:
            notes.append(f"[{len(notes) + 1}] {shown(group.benchmark).title}: {words}.")
        mark = f" [{len(notes)}]" if words else ""
        rows.setdefault(group.benchmark, []).extend(_rows(group, len(runs), models, mark))
    names = [*(run.name for run in runs), *models]
    return Comparison(
        published=models,
        tables=[Table(shown(benchmark).title, names, found) for benchmark, found in rows.items()],
        notes=notes + list(_remarks(runs, beside)),
        sources=list(dict.fromkeys(part for figure in beside for part in figure.source.split("; "))),
    )


def parts(runs: Sequence[Run]) -> list[Table]:
    """Figures of parts of a benchmark: held-out pairs by source and by length, MT-Bench by category and turn."""
    found: dict[tuple[str, str], dict[int, dict[str, dict[str, Measured]]]] = {}
    for index, run in enumerate(runs):
        # The last one counts: that of the whole benchmark.
        for evaluation in sorted(run.evaluations, key=lambda one: (one.limit is None, one.answered)):
            for kind, groups in evaluation.groups.items():
                found.setdefault((evaluation.benchmark, kind), {})[index] = groups
    return [_part_table(*key, found[key], runs) for key in sorted(found, key=lambda key: place(key[0]))]


def comparable(runs: Sequence[Run], benchmark: str) -> list[tuple[int, Evaluation]]:
    """Number of the run and evaluation, of those that compare with published figures, else with each other."""
    groups = [group for group in _groups(runs) if group.benchmark == benchmark]
    return list(groups[0].by_run.items()) if groups else []


def _groups(runs: Sequence[Run]) -> list[_Group]:
    """In the order of the table; of a benchmark, first what stands beside the most published figures."""
    found: dict[tuple, _Group] = {}
    for index, run in enumerate(runs):
        for evaluation in sorted(run.evaluations, key=lambda one: one.date):
            made = (evaluation.judge, evaluation.template, evaluation.shots, evaluation.answered)
            words = [tuple(differences(evaluation, figure)) for figure in table_figures(evaluation.benchmark)]
            group = _Group(evaluation.benchmark, {})
            found.setdefault((evaluation.benchmark, made, *words), group).by_run[index] = evaluation
    return sorted(
        found.values(), key=lambda group: (place(group.benchmark), -len(group.beside), -group.one.answered)
    )  # fmt: skip


def _rows(group: _Group, count: int, models: Sequence[str], mark: str) -> Iterator[tuple[str, list[str]]]:
    names = dict.fromkeys(name for evaluation in group.by_run.values() for name in evaluation.figures)
    digits = shown(group.benchmark).digits
    for name in in_order(group.benchmark, names):
        measured = {
            index: value_text(group.benchmark, evaluation.figures[name])
            for index, evaluation in group.by_run.items()
            if name in evaluation.figures
        }
        published = {one.model: number_text(one.value, digits) for one in group.beside if one.figure == name}
        cells = [measured.get(index, NOTHING) for index in range(count)]
        yield label(group.benchmark, name) + mark, cells + [published.get(model, NOTHING) for model in models]


def _note(group: _Group, is_alone: bool) -> str:
    """Why the group's figures do not stand beside all published ones; else, where groups differ, how they were made."""
    models = _models(group.published)
    reasons: dict[str, list[str]] = {}
    for figure in group.published:
        for words in differences(group.one, figure):
            if figure.model not in reasons.setdefault(words, []):
                reasons[words].append(figure.model)
    if reasons:
        said = [words + ("" if len(who) == len(models) else f" ({', '.join(who)})") for words, who in reasons.items()]
        which = "the published ones" if not group.beside else "some published ones"
        return f"not set beside {which}: {shorten('; '.join(said), 600)}"
    if is_alone or group.published:
        return ""
    made = [f"{group.one.answered:,} items answered"]
    made += [f"{group.one.shots} examples in the prompt"] if group.one.shots is not None else []
    made += [f"judged by {group.one.judge}"] if group.one.judge else []
    return shorten("; ".join([*made, template_text(group.one)]), 600)


def _remarks(runs: Sequence[Run], beside: Sequence[Published]) -> Iterator[str]:
    """What a reader should know of the figures: what is assumed, what is missing, and the evaluations' own notes."""
    yield from dict.fromkeys(figure.assumed for figure in beside if figure.assumed)
    for run in runs:
        for evaluation in sorted(run.evaluations, key=lambda one: place(one.benchmark)):
            title = f"{shown(evaluation.benchmark).title} of {run.name}"
            if evaluation.answered < evaluation.asked:
                missing = evaluation.asked - evaluation.answered
                yield f"{title}: {missing:,} of {evaluation.asked:,} items have no figure."
            for note in evaluation.notes:
                yield f"{title}: {shorten(note, 600)}"


def _part_table(
    benchmark: str, kind: str, by_run: dict[int, dict[str, dict[str, Measured]]], runs: Sequence[Run]
) -> Table:
    measured = [figures for groups in by_run.values() for figures in groups.values()]
    wanted = shown(benchmark).of_parts
    names = in_order(
        benchmark, {name: None for figures in measured for name in figures if name in wanted or not wanted}
    )
    has_counts = any(figure.n is not None for figures in measured for figure in figures.values())
    rows = []
    for part in dict.fromkeys(part for groups in by_run.values() for part in groups):
        cells = []
        for index in range(len(runs)):
            figures = by_run.get(index, {}).get(part, {})
            cells += [value_text(benchmark, figures[name]) if name in figures else NOTHING for name in names]
            counts = [figure.n for figure in figures.values() if figure.n is not None]
            cells += [show(max(counts, default=None))] if has_counts else []
        rows.append((shorten(part, 60), cells))
    columns = [*(column(benchmark, name) for name in names), *(["items"] if has_counts else [])]
    return Table(f"{shown(benchmark).title}{_of_kind(kind)}", [run.name for run in runs], rows, tuple(columns))


def _of_kind(kind: str) -> str:
    """What the parts of a kind are: `source` for the model, `against_source` for the one that it is compared with."""
    for prefix, words in (("against", ", of the model compared with"), ("difference", ", difference to that model")):
        if kind == prefix or kind.startswith(f"{prefix}_"):
            return words + (_of_kind(kind.removeprefix(f"{prefix}_")) if kind != prefix else "")
    return f" by {_KINDS.get(kind) or shorten(kind.replace('_', ' '), 40)}"


def _models(figures: Sequence[Published]) -> list[str]:
    return list(dict.fromkeys(figure.model for figure in figures))
