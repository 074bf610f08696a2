"""The command `orpo-trl evaluate`: which benchmarks there are, and what is said of each.

`BENCHMARKS` names for each benchmark a module of this folder and a function in it, which is imported when it is asked
for:

    def evaluate_…(target: Target, options: Options) -> Evaluation | None

It reads the options that mean something to it (`options.benchmark` is the name that was asked for), and returns what it
has measured. It writes nothing in `evaluations/`. It raises ValueError or OSError for what the user can mend, and
`DataUnreachable` where its items cannot be had. None is returned by all processes of `accelerate launch` but the first.
"""

import importlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from orpo_trl.commands import Unfinished
from orpo_trl.evaluate.judge import GOES_ON
from orpo_trl.evaluate.options import Options, Target, find_target
from orpo_trl.evaluations import Evaluation, Figure, write_evaluation
from orpo_trl.printable import printable
from orpo_trl.published import Published, differences, published_figures
from orpo_trl.report.benchmarks import column, in_order, label, number_text, shown, value_text


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark is.

    Attributes:
        module: of this folder.
        function: in that module.
        has_judge: whether another model judges the answers.
        takes_answers: whether a file of answers can be scored.
    """

    module: str
    function: str
    has_judge: bool = False
    takes_answers: bool = False


_TASK = Benchmark("harness", "evaluate_task")
# The tasks of the Open LLM Leaderboard, version 1, in the order of the paper's table.
OPEN_LLM = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k")
BENCHMARKS = {
    # First: the model that the tasks of lm-eval share stays in memory.
    "preferences": Benchmark("preferences", "evaluate_preferences"),
    "ifeval": Benchmark("ifeval", "evaluate_ifeval", takes_answers=True),
    **dict.fromkeys(OPEN_LLM, _TASK),
    "alpaca_eval": Benchmark("alpaca_eval", "evaluate_alpaca_eval", has_judge=True, takes_answers=True),
    "alpaca_eval_1": Benchmark("alpaca_eval", "evaluate_alpaca_eval", has_judge=True, takes_answers=True),
    "mt_bench": Benchmark("mt_bench", "evaluate_mt_bench", has_judge=True, takes_answers=True),
}
GROUPS = {"open_llm": OPEN_LLM}


def run_evaluate(target: str, benchmark: str | None, options: Options) -> Iterator[str]:
    """Evaluate, and yield a table of each benchmark as it ends; its file is written by then.

    Of several benchmarks, those that cannot run are told on standard error, and the others go on.

    Args:
        target: as the user names it; see `find_target`.
        benchmark: a name of `BENCHMARKS` or `GROUPS`, or a task of lm-eval; None for all that need no judge.

    Raises:
        ValueError, OSError: for what the user can mend; of several benchmarks at the end.
        Unfinished: where a judge has left items without a verdict, after the table.
    """
    found = find_target(target)
    names = _names(found, benchmark, options)
    failed, unjudged = [], []
    for name in names:
        try:
            evaluation = _function(name)(found, replace(options, benchmark=name))
        except (ValueError, OSError) as error:
            if len(names) == 1:
                raise
            print(printable(f"{'' if str(error).startswith(name) else f'{name}: '}{error}"), file=sys.stderr)
            failed.append(name)
            continue
        if evaluation is not None:
            path = _write(options.output or found.folder, evaluation)
            yield f"{table(evaluation)}\n{path}\n"
            if BENCHMARKS.get(name, _TASK).has_judge and evaluation.answered < evaluation.asked:
                unjudged.append(
                    f"{name}: {evaluation.asked - evaluation.answered} of {evaluation.asked} have no verdict."
                )
    if unjudged and options.annotations is None:
        raise Unfinished(" ".join([*unjudged, GOES_ON]))
    if failed:
        raise ValueError(f"not evaluated: {', '.join(failed)}; the reasons are above")


def _names(target: Target, benchmark: str | None, options: Options) -> tuple[str, ...]:
    """The benchmarks to run.

    Raises:
        ValueError: for a name that is none, and options that do not fit.
    """
    if benchmark is None:
        if target.answers is not None:
            raise ValueError(f"{target.answers}: name the benchmark that these answers are of: {_known(True)}")
        names = tuple(name for name, found in BENCHMARKS.items() if not found.has_judge)
        if not target.is_run and options.data is None:  # no pairs are known
            names = tuple(name for name in names if name != "preferences")
    else:
        names = GROUPS.get(benchmark, (benchmark,))
    if len(names) > 1 and options.data is not None and not options.data.is_dir():
        raise ValueError(
            f"--data: expected a folder with a file per benchmark ({', '.join(names)}), got {options.data}"
        )
    for name in names:
        if name not in BENCHMARKS and not _is_task(name):
            raise ValueError(_unknown(name))
        if target.answers is not None and not BENCHMARKS.get(name, _TASK).takes_answers:
            raise ValueError(f"{name}: stored answers cannot be scored, only those of: {_known(True)}")
        is_task = BENCHMARKS.get(name, _TASK).function == _TASK.function
        if is_task and len(names) == 1 and options.chat_template_path is not None:
            raise ValueError(f"{name}: its questions are no conversations; leave --chat_template_path out")
    return names


def _function(name: str):
    found = BENCHMARKS.get(name, _TASK)
    return getattr(importlib.import_module(f"orpo_trl.evaluate.{found.module}"), found.function)


def _write(folder: Path, evaluation: Evaluation) -> Path:
    """Write the file of an evaluation and put it into the folder's model card, where that has a place for it."""
    from orpo_trl.model_card import refresh_card

    path = write_evaluation(folder, evaluation)
    try:
        refresh_card(folder)
    except (ValueError, OSError) as error:  # the evaluation is there all the same
        print(printable(f"The model card is as it was: {error}"), file=sys.stderr)
    return path


def _known(takes_answers: bool) -> str:
    return ", ".join(name for name, found in BENCHMARKS.items() if found.takes_answers >= takes_answers)


def _is_task(name: str) -> bool:
    from orpo_trl.evaluate.tasks import task_names

    return name in task_names()


def _unknown(name: str) -> str:
    from orpo_trl.evaluate.tasks import task_names

    own = [*BENCHMARKS, *GROUPS]
    close = get_close_matches(name, own, n=3) or get_close_matches(name, task_names(), n=3)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    return f"There is no benchmark {name!r}. {hint}There are {', '.join(own)}, and the tasks of lm-eval by their names."


# ---- The table -------------------------------------------------------------------------------------------------------


def table(evaluation: Evaluation) -> str:
    """An evaluation as text for a terminal: published figures beside it where they compare, else what differs."""
    benchmark = evaluation.benchmark
    published = [figure for figure in published_figures(benchmark) if not figure.at]
    differing = [(figure.model, differences(evaluation, figure)) for figure in published]
    lines = [_title(evaluation)]
    width = max(len(label(benchmark, name)) for name in evaluation.figures)
    for name in in_order(benchmark, evaluation.figures):
        line = f"  {label(benchmark, name):<{width}}  {value_text(benchmark, evaluation.figures[name])}"
        beside = [
            f"{figure.model} {number_text(figure.value, shown(benchmark).digits)}"
            for figure, (_, words) in zip(published, differing, strict=True)
            if figure.figure == name and not words
        ]
        lines.append(f"{line}   published: {', '.join(beside)}" if beside else line)
    for kind, groups in evaluation.groups.items():
        lines += _group_lines(benchmark, kind, groups)
    notes = [*evaluation.notes, *_remarks(published, differing)]
    return "\n".join([*lines, *(f"  {note}" for note in notes)])


def _group_lines(benchmark: str, kind: str, groups: dict[str, dict[str, Figure]]) -> list[str]:
    """The values of one kind of groups, a line per group."""
    names = in_order(benchmark, {name: figure for figures in groups.values() for name, figure in figures.items()})
    heads = [column(benchmark, name) for name in names]
    width = max(len(group) for group in (kind, *groups))
    lines = [f"  {kind:<{width}}  {'items':>6}" + "".join(f"  {head:>7}" for head in heads)]
    for group, figures in groups.items():
        count = next((figure.n for figure in figures.values() if figure.n is not None), "")
        numbers = [
            number_text(figures[name].value, shown(benchmark).digits) if name in figures else "" for name in names
        ]
        cells = (f"  {number:>{max(7, len(head))}}" for number, head in zip(numbers, heads, strict=True))
        lines.append(f"  {group:<{width}}  {count:>6}" + "".join(cells))
    return lines


def _title(evaluation: Evaluation) -> str:
    parts = [f"{evaluation.answered:,} of {evaluation.asked:,} items"]
    parts += [f"the first {evaluation.limit} alone"] if evaluation.limit else []
    parts += [f"{evaluation.shots} shots"] if evaluation.shots is not None else []
    parts += [f"template: {evaluation.template or 'none'}"]
    parts += [f"judge {evaluation.judge}"] if evaluation.judge else []
    return f"{shown(evaluation.benchmark).title} of {evaluation.model} ({', '.join(parts)})"


def _remarks(published: Sequence[Published], differing: Sequence[tuple[str, list[str]]]) -> Iterator[str]:
    """Why published figures are not shown, and what is assumed of those that are."""
    reasons: dict[str, dict[str, None]] = {}
    for model, words in differing:
        if words:
            reasons.setdefault("; ".join(words), {})[model] = None
    for words, models in reasons.items():
        yield f"Not beside the published figures of {', '.join(models)}: {words}."
    yield from dict.fromkeys(
        figure.assumed for figure, (_, words) in zip(published, differing, strict=True) if figure.assumed and not words
    )
