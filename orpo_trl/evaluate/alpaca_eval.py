"""AlpacaEval 1 and 2 through the package alpaca_eval: its prompts, its parsers, its length-controlled model.

What it sends to the judge goes through judge.py, which keeps, retries and counts.
"""

import logging
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

from orpo_trl.commands import Unfinished
from orpo_trl.evaluate.answers import find_answers, rows_with
from orpo_trl.evaluate.judge import GOES_ON, Judge, endpoint_of, judge_all, missing_note, path_of
from orpo_trl.evaluate.options import Options, Target
from orpo_trl.evaluations import UNKNOWN_TEMPLATE, Evaluation, Figure
from orpo_trl.run_folder import now
from orpo_trl.versions import installed_versions

_HUB = "the dataset tatsu-lab/alpaca_eval on the Hub"
# The rows of the length-controlled model's difficulties, in the official order.
_ROWS = 805
_PACKAGES = ("orpo-trl", "alpaca_eval", "openai", "scikit-learn", "pandas")


@dataclass(frozen=True)
class _Version:
    """One version of AlpacaEval.

    Attributes:
        benchmark: its name in evaluations.
        configuration: of the package, with the judge's model, prompt and sampling.
        references: file of reference outputs on the Hub.
        usual_tokens: of a reply: one letter, or two ranks as a list.
        has_length_control: whether its length-controlled win rate is published.
    """

    benchmark: str
    configuration: str
    references: str
    usual_tokens: int
    has_length_control: bool


_VERSIONS = {
    "alpaca_eval": _Version(
        "alpaca_eval_2", "weighted_alpaca_eval_gpt4_turbo", "alpaca_eval_gpt4_baseline.json", 1, True
    ),
    "alpaca_eval_1": _Version("alpaca_eval_1", "alpaca_eval_gpt4", "alpaca_eval.json", 30, False),
}


def evaluate_alpaca_eval(target: Target, options: Options) -> Evaluation | None:
    """The win rate against reference outputs, in percent; for AlpacaEval 2 the length-controlled one too.

    Source: Li et al. 2023; Dubois et al. 2024, arXiv 2404.04475, for length control.

    Raises:
        ValueError: for files that are missing or of another form, and what `judge_all` raises.
    """
    asked = _VERSIONS[options.benchmark]
    if options.annotations is not None:
        with _package():
            rows = _stored(options.annotations, target, options)
            return _evaluation(target, options, asked, rows, rows[0]["annotator"], UNKNOWN_TEMPLATE, {})
    if options.reference_outputs is None:
        raise ValueError(
            f"{options.benchmark}: expected --reference_outputs FILE: {asked.references} of {_HUB}. The package's own "
            f"way to it fails with datasets 4 and later."
        )
    prompts = options.data_file("alpaca_eval") or options.reference_outputs
    answers = find_answers(target, options, "alpaca_eval", prompts)
    if answers is None:
        return None
    with _package():
        rows, judge, settings = _judged(answers.path, target, options, asked)
        return _evaluation(target, options, asked, rows, judge, answers.template, settings)


# ---- Judging ---------------------------------------------------------------------------------------------------------


def _judged(
    answers_file: Path, target: Target, options: Options, asked: _Version
) -> tuple[list[dict], str, dict[str, Any]]:
    from alpaca_eval.annotators import PairwiseAnnotator

    answers, references = _pairs(answers_file, options)
    # `caching_path`: else the package would keep annotations in its own folder.
    annotator = PairwiseAnnotator(annotators_config=asked.configuration, caching_path=None)
    single = annotator.annotators[asked.configuration]
    usual = single.completions_kwargs["model_name"]
    model = usual if options.judge in (None, asked.configuration) else options.judge
    sender = _Sender(single, model, asked, options, path_of(target, options, asked.benchmark))
    single.fn_completions = sender.send
    with redirect_stderr(StringIO()):  # a progress bar of one step; `send` has its own
        rows = annotator.annotate_head2head(outputs_1=references, outputs_2=answers, is_ordered=True, chunksize=None)
    name = endpoint_of(options, model).name
    judge = asked.configuration if name == usual else f"{name} with the prompt of {asked.configuration}"
    settings = {
        "judge_model": model,
        "judge_sampling": sender.sampling,
        "judge_tokens": sender.tokens,
        "judge_problem": sender.problem,
    }
    return rows, judge, settings


class _Sender:
    """Takes the place of the package's function that sends prompts."""

    def __init__(self, single: Any, model: str, asked: _Version, options: Options, path: Path):
        self.single, self.model, self.asked, self.options, self.path = single, model, asked, options, path
        self.stderr = sys.stderr
        self.sampling: dict[str, Any] = {}
        self.tokens: dict[str, int] = {}
        self.problem: str | None = None

    def send(self, prompts: Sequence[str], model_name: str, **sampling: Any) -> dict[str, list]:
        """The judge's choices for prompts, as `SingleAnnotator` of the package takes them."""
        from alpaca_eval.utils import prompt_to_chatml

        self.sampling = {"top_p": 1.0, **sampling}  # the package sends this `top_p`
        judge = Judge(
            endpoint_of(self.options, self.model),
            self.sampling,
            self._read,
            self.asked.usual_tokens,
            self.options.price,
            self.options.yes,
        )
        conversations = [prompt_to_chatml(prompt.strip()) for prompt in prompts]
        with redirect_stderr(self.stderr):
            judged = judge_all(conversations, judge, self.path)
        self.tokens = {"prompt": judged.tokens.prompt, "reply": judged.tokens.reply}
        self.problem = next(iter(judged.problems.values()), None)
        # The parsers of the package turn an empty completion into a missing annotation.
        texts = ["" if choice is None else choice["text"] for choice in judged.choices]
        return {"completions": texts, "completions_all": [choice or "" for choice in judged.choices]}

    def _read(self, choice: dict[str, Any]) -> float:
        """The preference from 1 (the first answer) to 2, by the package's parser."""
        completion = choice if self.single.completion_key == "completions_all" else choice["text"]
        try:
            [preference] = self.single.fn_completion_parser(completion)
        except Exception as error:  # parsers index, assert and evaluate
            raise ValueError(f"cannot be read: {choice['text']!r:.80}") from error
        if not isinstance(preference, int | float) or not 1 <= preference <= 2:
            raise ValueError(f"names no answer as the better one: {choice['text']!r:.80}")
        return float(preference)


# ---- Files -----------------------------------------------------------------------------------------------------------


def _pairs(answers_file: Path, options: Options) -> tuple[list[dict], list[dict]]:
    """Answers and reference outputs, row by row of the same instructions."""
    assert options.reference_outputs is not None
    answers = rows_with(answers_file, ("instruction", "output"))[: options.limit]
    references = rows_with(options.reference_outputs, ("instruction", "output"))[: options.limit]
    if len(answers) != len(references):
        raise ValueError(
            f"{answers_file}: expected {len(references)} answers, as {options.reference_outputs} has, "
            f"received {len(answers)}"
        )
    for number, (answer, reference) in enumerate(zip(answers, references, strict=True), 1):
        if answer["instruction"] != reference["instruction"]:
            raise ValueError(
                f"{answers_file}, row {number}: expected the instruction {reference['instruction']!r:.80} of "
                f"{options.reference_outputs}, received {answer['instruction']!r:.80}"
            )
    return (
        [_row(answer, answers_file.stem) for answer in answers],
        [_row(reference, "reference") for reference in references],
    )


def _row(row: dict, generator: str) -> dict:
    return {"instruction": row["instruction"], "output": row["output"], "generator": row.get("generator") or generator}


def _stored(path: Path, target: Target, options: Options) -> list[dict]:
    """Stored annotations, in the package's format."""
    keys = ("instruction", "output_1", "output_2", "generator_1", "generator_2", "annotator", "preference")
    rows = rows_with(path, keys)[: options.limit]
    for key in ("annotator", "generator_1", "generator_2"):
        if len({row[key] for row in rows}) > 1:
            raise ValueError(f"{path}: expected one {key}, received {sorted({str(row[key]) for row in rows})}")
    if target.answers is not None:
        answers = rows_with(target.answers, ("instruction", "output"))[: options.limit]
        if [row["output_2"] for row in rows] != [answer["output"] for answer in answers]:
            raise ValueError(
                f"{path}: expected annotations of the answers in {target.answers}, received those of others"
            )
    return rows


# ---- Figures ---------------------------------------------------------------------------------------------------------


def _evaluation(
    target: Target,
    options: Options,
    asked: _Version,
    rows: list[dict],
    judge: str,
    template: str,
    settings: dict[str, Any],
) -> Evaluation:
    problem = settings.pop("judge_problem", None)
    missing = [number for number, row in enumerate(rows, 1) if _is_missing(row["preference"])]
    if len(missing) == len(rows):
        none = f"{options.benchmark}: none of {len(rows)} answers has a verdict."
        if options.annotations is not None:
            raise ValueError(none)
        raise Unfinished(f"{none} {GOES_ON} For example: {problem}")
    notes = missing_note(missing, "rows", problem)
    figures = _figures(rows, asked, notes)
    return Evaluation(
        benchmark=asked.benchmark,
        model=_model_of(target, rows),
        figures=figures,
        asked=len(rows),
        answered=len(rows) - len(missing),
        template=template,
        shots=None,
        judge=judge,
        limit=options.limit,
        settings={"reference": rows[0]["generator_1"], "rows": len(rows), **settings},
        versions=installed_versions(_PACKAGES),
        date=now(),
        notes=notes,
    )


def _figures(rows: list[dict], asked: _Version, notes: list[str]) -> dict[str, Figure]:
    """Figures of annotations in the official order; what is left out is added to `notes`."""
    from alpaca_eval.metrics import get_length_controlled_winrate, get_winrate
    from alpaca_eval.utils import convert_to_dataframe

    frame = convert_to_dataframe(rows)
    frame["preference"] = frame["preference"].astype(float)
    found = get_winrate(frame)
    count = int(found["n_total"])
    figures = {"win_rate": Figure(value=found["win_rate"], stderr=_finite(found["standard_error"]), n=count)}
    if not asked.has_length_control:
        return figures
    if len(rows) != _ROWS:
        notes.append(f"No length-controlled win rate: its model is for all {_ROWS} rows in the official order.")
        return figures
    try:
        with catch_warnings():
            simplefilter("ignore", FutureWarning)  # of scikit-learn, for the package
            found = get_length_controlled_winrate(frame, save_weights_dir=None, is_warn_extreme_changes=False)
    except OSError as error:  # of the Hub's library, and of its connections
        notes.append(
            f"No length-controlled win rate: it needs df_gamed.csv of {_HUB} ({type(error).__name__}). Where there is "
            f"a network: `hf download tatsu-lab/alpaca_eval df_gamed.csv --repo-type dataset`, then the same command."
        )
        return figures
    length_controlled = Figure(
        value=found["length_controlled_winrate"], stderr=_finite(found["lc_standard_error"]), n=len(rows)
    )
    return {**figures, "lc_win_rate": length_controlled}


def _finite(value: float) -> float | None:
    return None if value != value else float(value)  # of one row


def _is_missing(preference: Any) -> bool:
    return preference is None or preference != preference or not 0 <= preference <= 2


def _model_of(target: Target, rows: list[dict]) -> str:
    return target.name if target.answers is None else str(rows[0]["generator_2"])


# ---- The package -----------------------------------------------------------------------------------------------------


@contextmanager
def _package() -> Iterator[None]:
    """Inside, the package can be imported, and does not log.

    Raises:
        ValueError: where it is not installed.
    """
    root = logging.getLogger()
    level, disabled = root.level, logging.root.manager.disable
    try:
        with _pkg_resources():
            import alpaca_eval  # noqa: F401  # sets the root logger to INFO
        # It logs each step, and a traceback for each verdict that its parser cannot read.
        logging.disable(logging.ERROR)
        yield
    except ImportError as error:
        raise ValueError(f"AlpacaEval needs alpaca_eval ({error}): pip install 'orpo-trl[eval]'") from error
    finally:
        logging.disable(disabled)
        root.setLevel(level)


@contextmanager
def _pkg_resources() -> Iterator[None]:
    """Inside, alpaca_eval 0.6.6 can `import pkg_resources`, from which it reads versions: setuptools 82 has none."""
    if find_spec("pkg_resources"):
        yield
        return
    stand_in: Any = types.ModuleType("pkg_resources")
    stand_in.get_distribution = lambda name: types.SimpleNamespace(version=version(name))
    sys.modules["pkg_resources"] = stand_in
    try:
        yield
    finally:
        del sys.modules["pkg_resources"]
