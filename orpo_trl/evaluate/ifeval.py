"""IFEval: which of the instructions in a prompt an answer follows. lm-eval's task and scorer, 0-shot and greedy.

Its four figures are shares: of prompts of which all instructions are followed, and of instructions; each strict and
loose (also without the first or last line, and without asterisks). https://arxiv.org/abs/2311.07911
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from orpo_trl.evaluate.harness import PACKAGES, evaluation_of, run_tasks
from orpo_trl.evaluate.items import digest
from orpo_trl.evaluate.options import Options, Target
from orpo_trl.evaluate.tasks import load_tasks
from orpo_trl.evaluations import OWN_TEMPLATE, UNKNOWN_TEMPLATE, Evaluation, Figure
from orpo_trl.run_folder import now, read_lines
from orpo_trl.versions import installed_versions

# Ours, and those of lm-eval.
_FIGURES = {
    "prompt_strict": "prompt_level_strict_acc",
    "instruction_strict": "inst_level_strict_acc",
    "prompt_loose": "prompt_level_loose_acc",
    "instruction_loose": "inst_level_loose_acc",
}
_COLUMNS = {"key", "prompt", "instruction_id_list", "kwargs"}
_PUNKT = "tokenizers/punkt_tab"


def evaluate_ifeval(target: Target, options: Options) -> Evaluation | None:
    """IFEval of a model with its chat template, or of stored answers.

    Raises:
        ValueError, OSError: for what the user can mend, before anything is generated.
    """
    _prepare_scorer()
    tasks, source = load_tasks("ifeval", options)
    absent = _COLUMNS - set(tasks[0].eval_docs.column_names)
    if absent:
        raise ValueError(f"ifeval: {options.data} lacks the columns {', '.join(sorted(absent))}")
    if target.answers is not None:
        return _score(target, target.answers, options, tasks[0], source)
    results = run_tasks(target, options, tasks, shots=None, has_chat_template=True)
    if results is None:
        return None
    template = options.chat_template_path or OWN_TEMPLATE
    return evaluation_of(
        target, options, results, figures(results["samples"]["ifeval"]), template=template, shots=0, settings=source
    )


def figures(scores: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """The four figures.

    Args:
        scores: for each prompt, under lm-eval's names of the metrics: whether all instructions are followed, and a list
            of whether each one is.

    Returns:
        Figures with standard errors. lm-eval gives none of the shares of instructions. They are ratios of two sums over
        prompts, followed instructions x over instructions m, and the instructions of one prompt are answered together:
        the error of r = Σx / Σm is √(n / (n − 1) · Σ(x − r·m)²) / Σm over the n prompts. For m = 1 that is the
        standard error of a mean, as lm-eval gives it of the shares of prompts.
    """
    found = {}
    for name, metric in _FIGURES.items():
        values = [score[metric] if isinstance(score[metric], list) else [score[metric]] for score in scores]
        followed, asked = [sum(value) for value in values], [len(value) for value in values]
        found[name] = Figure(value=sum(followed) / sum(asked), stderr=_error_of_ratio(followed, asked), n=sum(asked))
    return found


def _error_of_ratio(followed: Sequence[int], asked: Sequence[int]) -> float | None:
    n = len(asked)
    if n < 2:
        return None
    ratio = sum(followed) / sum(asked)
    squares = math.fsum((x - ratio * m) ** 2 for x, m in zip(followed, asked, strict=True))
    return math.sqrt(n / (n - 1) * squares) / sum(asked)


def _prepare_scorer() -> None:
    """Raises a ValueError where the scorer lacks what it needs. lm-eval itself would fail after all is generated."""
    try:
        import langdetect
        import nltk
    except ImportError as error:
        raise ValueError(f"ifeval needs lm-eval and what scores ({error}): pip install 'orpo-trl[eval]'") from error
    try:
        nltk.data.find(f"{_PUNKT}/english")
    except LookupError as error:
        raise ValueError(
            "ifeval: its scorer splits sentences by NLTK's punkt_tab, which is not here. Get it once: python -m "
            "nltk.downloader punkt_tab; or set NLTK_DATA to a folder that has tokenizers/punkt_tab"
        ) from error
    langdetect.DetectorFactory.seed = 0  # else the language of a short answer differs from call to call


# ---- Stored answers --------------------------------------------------------------------------------------------------


def _score(target: Target, answers: Path, options: Options, task: Any, source: dict[str, Any]) -> Evaluation:
    """The scorer of lm-eval's task alone, on answers found by their prompts."""
    items = list(task.eval_docs)[: options.limit]
    responses = _responses(answers, items)
    random.seed(0)  # as lm-eval: the scorer draws what an instruction leaves open
    scores = [
        task.process_results(item, [responses[item["prompt"]]])
        for item in tqdm(items, desc="Scoring", unit="answer")
        if item["prompt"] in responses
    ]
    missing = len(items) - len(scores)
    made = target.made
    identity = made.get("identity", {})
    model = Path(str(identity.get("model") or target.name))  # of a folder elsewhere, its name alone
    recorded = {"answers": identity, "answers_sha256": digest([answers])}
    settings = {**source, **recorded, "max_new_tokens": identity.get("max_new_tokens")}
    return Evaluation(
        benchmark="ifeval", model=model.name if model.is_absolute() else str(model), figures=figures(scores),
        asked=len(items), answered=len(scores), template=made.get("template_of") or UNKNOWN_TEMPLATE, shots=0,
        judge=None, limit=options.limit, settings=settings,
        versions=installed_versions(PACKAGES), date=now(),
        notes=[f"Without an answer, and left out: {missing:,} of the prompts."] if missing else [],
    )  # fmt: skip


def _responses(path: Path, items: Sequence[dict[str, Any]]) -> dict[str, str]:
    prompts = {item["prompt"] for item in items}
    found: dict[str, str] = {}
    for number, row in enumerate(read_lines(path), start=1):
        prompt, response = row.get("prompt"), row.get("response")
        if not isinstance(prompt, str) or not isinstance(response, str):
            raise ValueError(f"{path}, answer {number}: expected the texts `prompt` and `response`, got {list(row)}")
        if prompt in prompts:
            found[prompt] = response
    if not found:
        raise ValueError(f"{path}: none of its prompts is one of IFEval's")
    return found
