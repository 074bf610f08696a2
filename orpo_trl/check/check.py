"""`orpo-trl check`: numbered steps that look at a recipe before it is trained. No weights are loaded."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from transformers.utils import logging as transformers_logging

from orpo_trl.check.flight import Failed, Preflight, Skipped
from orpo_trl.check.inputs import check_data, check_model, check_pair, check_recipe, check_template
from orpo_trl.check.plan import check_installed, check_memory, check_schedule, check_time
from orpo_trl.flops import named_device
from orpo_trl.launch import ENGINES

STEPS = {
    "Recipe": check_recipe,
    "Model config and tokenizer": check_model,
    "Chat template": check_template,
    "Data": check_data,
    "One pair": check_pair,
    "Optimiser steps and tokens": check_schedule,
    "Memory": check_memory,
    "Time and cost": check_time,
    "Installed": check_installed,
}


def run_checks(arguments: list[str], color: bool | None = None, **options: Any) -> bool:
    """Take all steps, print what they find, and say whether none failed.

    Args:
        arguments: recipe and overrides.
        color: whether the printed pair has colours; None for on a terminal.
        options: `engine`, `num_processes`, `gpu` (see `named_device`), `gpu_memory` (GiB), `utilisation` (share of
            the peak FLOP/s), `price` (USD per GPU hour), `full` (prepare all rows).
    """
    _check_options(options)
    color = sys.stdout.isatty() if color is None else color
    flight = Preflight(arguments, {**options, "color": color})
    with _quiet():
        return _take_steps(flight)


@contextmanager
def _quiet() -> Iterator[None]:
    """What libraries and the trainer's own modules log and warn of is said by the steps, or is not for this moment."""
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


def _take_steps(flight: Preflight) -> bool:
    failed = 0
    for number, (title, step) in enumerate(STEPS.items(), 1):
        lines: list[str] = []
        try:
            for line in step(flight):
                lines.append(line)
            sign = "✓"
        except Skipped as reason:
            sign = "skipped"
            lines.append(str(reason))
        except Exception as error:  # the next step may still find something
            named = "" if isinstance(error, (Failed, ValueError, OSError, ImportError)) else f"{type(error).__name__}: "
            sign, failed = "✗", failed + 1
            lines += f"{named}{error}".splitlines()
        click.echo(f"{number}. {title}: {sign}")
        for line in lines:
            click.echo(f"   {line}", color=flight.options["color"])
    click.echo(f"{failed} of {len(STEPS)} steps failed." if failed else "Nothing to mend.")
    return not failed


def _check_options(options: dict[str, Any]) -> None:
    if options["engine"] not in (None, *ENGINES):
        raise ValueError(f"--engine: expected {', '.join(ENGINES)}, got {options['engine']!r}")
    if options["gpu"] is not None:
        named_device(options["gpu"])
