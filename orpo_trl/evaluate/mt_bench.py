"""MT-Bench: each of two turns of 80 answers is graded by a judge, from 1 to 10.

Source: Zheng et al. 2023, arXiv 2306.05685; the single-answer grading of FastChat (`fastchat/llm_judge`).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from orpo_trl.commands import Unfinished
from orpo_trl.evaluate.answers import find_answers, rows_with
from orpo_trl.evaluate.judge import GOES_ON, Judge, endpoint_of, judge_all, missing_note, path_of
from orpo_trl.evaluate.mt_bench_prompts import OWN, WITH_REFERENCE, JudgePrompts, read_fastchat
from orpo_trl.evaluate.options import Options, Target
from orpo_trl.evaluations import UNKNOWN_TEMPLATE, Evaluation, Figure
from orpo_trl.generate.benchmarks import data_of
from orpo_trl.run_folder import now
from orpo_trl.versions import installed_versions

_JUDGE = "gpt-4"
# FastChat's, for judges of OpenAI.
_SAMPLING = {"temperature": 0, "max_tokens": 2048, "n": 1}
# A grade with its explanation, of GPT-4.
_USUAL_TOKENS = 200
_TURNS = (1, 2)
_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_PACKAGES = ("orpo-trl", "openai")
# Of question, answers and references alike.
_Texts = dict[Any, list[str]]


@dataclass(frozen=True)
class _Turn:
    """One answer to grade, or graded."""

    question: Any
    category: str
    turn: int

    def __str__(self) -> str:
        return f"{self.question} turn {self.turn}"


@dataclass(frozen=True)
class _Graded:
    """Grades, who gave them, and why one is missing."""

    model: str
    grades: dict[_Turn, float]
    judge: str
    settings: dict[str, Any]
    problem: str | None = None


def evaluate_mt_bench(target: Target, options: Options) -> Evaluation | None:
    """The mean grade of all judged turns, of each turn, and of each category.

    Raises:
        ValueError: for files that are missing or of another form, and what `judge_all` raises.
    """
    path = data_of("mt_bench", options.data_file("mt_bench"))
    categories, questions = _questions(path, options.limit)
    turns = [_Turn(question, category, turn) for question, category in categories.items() for turn in _TURNS]
    if options.annotations is not None:
        return _evaluation(target, options, turns, _stored(options.annotations, turns), UNKNOWN_TEMPLATE)
    answers = find_answers(target, options, "mt_bench", path)
    if answers is None:
        return None
    graded = _judged(target, options, turns, questions, answers.path)
    return _evaluation(target, options, turns, graded, answers.template)


def _evaluation(target: Target, options: Options, turns: Sequence[_Turn], graded: _Graded, template: str) -> Evaluation:
    grades = graded.grades
    if not grades:
        none = f"mt_bench: none of {len(turns)} turns has a verdict."
        if options.annotations is not None:
            raise ValueError(none)
        raise Unfinished(f"{none} {GOES_ON} For example: {graded.problem}")
    missing = [str(turn) for turn in turns if turn not in grades]
    return Evaluation(
        benchmark="mt_bench",
        model=graded.model,
        figures=_figures(grades),
        groups={"category": _by_category(grades)},
        asked=len(turns),
        answered=len(grades),
        template=template,
        shots=None,
        judge=graded.judge,
        limit=options.limit,
        settings=graded.settings,
        versions=installed_versions(_PACKAGES),
        date=now(),
        notes=missing_note(missing, "turns", graded.problem),
    )


def read_rating(choice: dict[str, Any]) -> float:
    """The grade in a judge's reply: the first `[[7]]` or `[[7.5]]`.

    Args:
        choice: of the API, with its `text`.

    Raises:
        ValueError: where there is none from 1 to 10.
    """
    found = _RATING.search(choice["text"])
    if found is None:
        raise ValueError(f"no grade such as [[7]] in: {choice['text'][-80:]!r}")
    grade = float(found[1])
    if not 1 <= grade <= 10:
        raise ValueError(f"expected a grade from 1 to 10, received {found[0]}")
    return grade


# ---- Judging ---------------------------------------------------------------------------------------------------------


def _judged(target: Target, options: Options, turns: Sequence[_Turn], questions: _Texts, answers_file: Path) -> _Graded:
    answers = _require(answers_file, _read_answers(answers_file), questions)
    prompts = OWN if options.judge_prompts is None else read_fastchat(options.judge_prompts)
    references = _references(options, prompts, turns)
    model = options.judge or _JUDGE
    conversations = [
        prompts.messages(questions[turn.question], answers[turn.question], _references_of(turn, references), turn.turn)
        for turn in turns
    ]
    judge = Judge(endpoint_of(options, model), _SAMPLING, read_rating, _USUAL_TOKENS, options.price, options.yes)
    judged = judge_all(conversations, judge, path_of(target, options, "mt_bench"))
    grades = {turn: verdict for turn, verdict in zip(turns, judged.verdicts, strict=True) if verdict is not None}
    settings = {
        "judge_model": model,
        "judge_sampling": _SAMPLING,
        "judge_prompts": prompts.wording,
        "reference_answers": bool(references),
        "judge_tokens": {"prompt": judged.tokens.prompt, "reply": judged.tokens.reply},
    }
    # Such a grade must not be taken for one under FastChat's prompts.
    name = judge.endpoint.name
    judge_name = name if prompts is not OWN else f"{name} with our own wording"
    model_judged = target.name
    if target.answers is not None:
        model_judged = str(rows_with(answers_file, ())[0].get("model_id") or target.name)
    return _Graded(model_judged, grades, judge_name, settings, next(iter(judged.problems.values()), None))


def _references_of(turn: _Turn, references: _Texts) -> list[str] | None:
    return references.get(turn.question) if turn.category in WITH_REFERENCE else None


# ---- Files -----------------------------------------------------------------------------------------------------------


def _questions(path: Path, limit: int | None) -> tuple[dict[Any, str], _Texts]:
    """Categories and texts by question."""
    rows = rows_with(path, ("question_id", "category", "turns"))[:limit]
    for row in rows:
        if not isinstance(row["category"], str):
            raise ValueError(f"{path}: expected a text in `category`, received {row['category']!r:.60}")
    texts = _texts(path, rows, lambda row: row["turns"])
    return {row["question_id"]: row["category"] for row in rows}, texts


def _references(options: Options, prompts: JudgePrompts, turns: Sequence[_Turn]) -> _Texts:
    """Reference answers by question; none without a file."""
    needed = {turn.question: None for turn in turns if turn.category in WITH_REFERENCE}
    if options.reference_answers is None:
        if needed and prompts is not OWN:
            raise ValueError(
                f"mt_bench: expected --reference_answers FILE: FastChat judges {', '.join(WITH_REFERENCE)} with them"
            )
        return {}
    return _require(options.reference_answers, _read_answers(options.reference_answers), needed)


def _read_answers(path: Path) -> _Texts:
    return _texts(path, rows_with(path, ("question_id", "choices")), lambda row: row["choices"][0]["turns"])


def _texts(path: Path, rows: list[dict], turns_of: Any) -> _Texts:
    found: _Texts = {}
    for row in rows:
        try:
            turns = found[row["question_id"]] = list(turns_of(row))
        except (LookupError, TypeError) as error:
            raise ValueError(f"{path}: expected FastChat's format; {error} is missing in {row!r:.80}") from error
        if len(turns) != len(_TURNS) or not all(isinstance(text, str) for text in turns):
            raise ValueError(f"{path}: expected two turns of question {row['question_id']}, received {turns!r:.80}")
    return found


def _require(path: Path, found: _Texts, questions: Iterable[Any]) -> _Texts:
    missing = [str(question) for question in questions if question not in found]
    if missing:
        raise ValueError(f"{path}: expected answers to all questions; those to {', '.join(missing)} are missing")
    return found


def _stored(path: Path, turns: Sequence[_Turn]) -> _Graded:
    """Grades of FastChat's file of single-answer judgements (`model_judgment/gpt-4_single.jsonl`) of one model."""
    rows = rows_with(path, ("question_id", "model", "judge", "score", "turn"))
    try:
        scores = {(row["question_id"], row["turn"]): row["score"] for row in rows}
        models = {str(row["model"]) for row in rows}
        judges = {str(row["judge"][0]) for row in rows}
        names = {str(row["judge"][1]) for row in rows}
    except (LookupError, TypeError) as error:
        raise ValueError(
            f"{path}: expected FastChat's judgements, with the judge's model and prompt: {error}"
        ) from error
    if len(models) > 1 or len(judges) > 1 or len(scores) < len(rows):
        raise ValueError(
            f"{path}: expected one judgement of each turn, of one model by one judge; received {len(rows)} judgements "
            f"of {len(scores)} turns, models {sorted(models)}, judges {sorted(judges)}"
        )
    grades = {}
    for turn in turns:
        score = scores.get((turn.question, turn.turn))
        if isinstance(score, int | float) and 1 <= score <= 10:  # FastChat writes -1 where it found none
            grades[turn] = float(score)
    is_fastchat = all(name.startswith("single-") for name in names)
    return _Graded(models.pop(), grades, judges.pop(), {"judge_prompts": "FastChat" if is_fastchat else "unknown"})


# ---- Figures ---------------------------------------------------------------------------------------------------------


def _figures(grades: dict[_Turn, float]) -> dict[str, Figure]:
    """As FastChat's show_result.py: the overall score is the mean of all judged turns."""
    figures = {"score": _figure(list(grades.values()), _question_means(grades))}
    for number in _TURNS:
        of_turn = [grade for turn, grade in grades.items() if turn.turn == number]
        if of_turn:
            figures[f"turn_{number}"] = _figure(of_turn, of_turn)
    return figures


def _by_category(grades: dict[_Turn, float]) -> dict[str, dict[str, Figure]]:
    found: dict[str, dict[_Turn, float]] = defaultdict(dict)
    for turn, grade in grades.items():
        found[turn.category][turn] = grade
    return {
        category: {"score": _figure(list(part.values()), _question_means(part))} for category, part in found.items()
    }


def _question_means(grades: dict[_Turn, float]) -> list[float]:
    by_question: dict[Any, list[float]] = defaultdict(list)
    for turn, grade in grades.items():
        by_question[turn.question].append(grade)
    return [mean(of_question) for of_question in by_question.values()]


def _figure(values: list[float], independent: list[float]) -> Figure:
    """A mean.

    Args:
        independent: what its standard error comes from. The two turns of a question are not independent.
    """
    stderr = stdev(independent) / len(independent) ** 0.5 if len(independent) > 1 else None
    return Figure(value=mean(values), stderr=stderr, n=len(values))
