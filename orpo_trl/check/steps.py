"""`orpo-trl check`: numbered steps that look at a recipe before it is trained. No weights are loaded."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers.utils import logging as transformers_logging

from orpo_trl.check.inputs import check_data, check_model, check_pair, check_recipe, check_template
from orpo_trl.check.plan import check_installed, check_memory, check_schedule, check_time
from orpo_trl.check.results import (
    CheckOptions,
    DataResult,
    Failed,
    ModelResult,
    RecipeResult,
    Result,
    ScheduleResult,
    Skipped,
)
from orpo_trl.devices import named_device
from orpo_trl.hidden import hide
from orpo_trl.launch import ENGINES


@dataclass(frozen=True)
class Step:
    """A step of the check.

    Attributes:
        title: what is printed.
        take: takes the options and the needed results. It yields lines of text, and its own result as soon as the
            result is known: later steps have that result even if this step fails afterwards.
        needs: results of earlier steps, in their order. The step is skipped if one of them is missing.
        finds: its own result.
    """

    title: str
    take: Callable[..., Iterator[str | Result]]
    needs: tuple[type[Result], ...]
    finds: type[Result] | None = None


STEPS = (
    Step("Recipe", check_recipe, (), RecipeResult),
    Step("Model config and tokenizer", check_model, (RecipeResult,), ModelResult),
    Step("Chat template", check_template, (RecipeResult, ModelResult)),
    Step("Data", check_data, (RecipeResult, ModelResult), DataResult),
    Step("One pair", check_pair, (RecipeResult, ModelResult, DataResult)),
    Step("Optimiser steps and tokens", check_schedule, (RecipeResult, ModelResult, DataResult), ScheduleResult),
    Step("Memory", check_memory, (RecipeResult, ModelResult, DataResult)),
    Step("Time and cost", check_time, (RecipeResult, ModelResult, DataResult, ScheduleResult)),
    Step("Installed", check_installed, (RecipeResult,)),
)


def run_checks(options: CheckOptions, say: Callable[[str], object]) -> bool:
    """Take all steps and report what they find.

    Args:
        options: the command line.
        say: prints a line of the report.

    Returns:
        Whether no step failed.

    Raises:
        ValueError: for an unknown engine or GPU.
    """
    if options.engine not in (None, *ENGINES):
        raise ValueError(f"--engine: expected {', '.join(ENGINES)}, got {options.engine!r}")
    if options.gpu is not None:
        named_device(options.gpu)
    failed = 0
    found: dict[type, Any] = {}
    with _quiet():
        for number, step in enumerate(STEPS, 1):
            sign, lines = _take(step, options, found)
            failed += sign == "✗"
            say(f"{number}. {step.title}: {sign}")
            for line in lines:
                say(f"   {hide(line)}")
    say(f"{failed} of {len(STEPS)} steps failed." if failed else "Nothing to fix.")
    return not failed


def _take(step: Step, options: CheckOptions, found: dict[type, Any]) -> tuple[str, list[str]]:
    """Sign and lines of a step; its result is added to `found`."""
    lines: list[str] = []
    try:
        for item in step.take(options, *_needed(step, found)):
            if isinstance(item, str):
                lines.append(item)
            else:
                found[type(item)] = item
    except Skipped as reason:
        return "skipped", [*lines, str(reason)]
    except Exception as error:  # the next step may still find something
        is_expected = isinstance(error, (Failed, ValueError, OSError, ImportError))
        text = str(error) if is_expected else f"{type(error).__name__}: {error}"
        return "✗", lines + text.splitlines()
    return "✓", lines


def _needed(step: Step, found: dict[type, Any]) -> list[Any]:
    for need in reversed(step.needs):  # the latest missing one says most about what to fix first
        if need not in found:
            finder = next(earlier.title for earlier in STEPS if earlier.finds is need)
            raise Skipped(f'needs what the step "{finder}" finds')
    return [found[need] for need in step.needs]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides log messages and warnings of libraries and of the trainer: the steps report what matters of them."""
    logger = logging.getLogger("orpo_trl")
    level, verbosity = logger.level, transformers_logging.get_verbosity()
    try:
        logger.setLevel(logging.ERROR)
        transformers_logging.set_verbosity_error()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch|transformers|trl")
            yield
    finally:
        logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
