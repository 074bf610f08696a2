"""Answers to held-out prompts, grouped so that all runs' answers to a prompt stand together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from orpo_trl.metrics import number
from orpo_trl.report.prompts import Prompt, read_prompt, shorten_text
from orpo_trl.report.run import Run

# Earlier evaluations shown of one run, so that a page stays small.
MAX_STEPS = 8


@dataclass
class Card:
    """A held-out prompt with its two responses, and the runs' answers: run, step and text of each."""

    dataset: str
    prompt: Prompt
    chosen: str
    rejected: str
    answers: list[tuple[Run, int, str]] = field(default_factory=list)


def last_cards(runs: Sequence[Run]) -> list[Card]:
    """Prompts of each run's last evaluation, each once, with the answers of all runs."""
    return _cards((run, sample) for run in runs for sample in _by_step(run).get(max(_by_step(run), default=0), []))


def earlier_cards(run: Run) -> dict[int, list[Card]]:
    """Prompts and answers by step, newest first, without the last evaluation; at most `MAX_STEPS`, evenly spaced."""
    by_step = _by_step(run)
    steps = sorted(by_step)[:-1]
    if len(steps) > MAX_STEPS:
        steps = [steps[round(i * (len(steps) - 1) / (MAX_STEPS - 1))] for i in range(MAX_STEPS)]
    return {step: _cards((run, sample) for sample in by_step[step]) for step in reversed(steps)}


def _by_step(run: Run) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for sample in run.samples:
        found.setdefault(int(number(sample.get("step")) or 0), []).append(sample)
    return found


def _cards(samples: Iterable[tuple[Run, dict[str, Any]]]) -> list[Card]:
    cards: dict[tuple, Card] = {}
    for run, sample in samples:
        dataset, prompt, chosen, rejected = (
            shorten_text(sample.get(name)) for name in ("dataset", "prompt", "chosen", "rejected")
        )
        card = Card(dataset, read_prompt(sample), chosen, rejected)
        answer = (run, int(number(sample.get("step")) or 0), shorten_text(sample.get("completion")))
        cards.setdefault((dataset, prompt, chosen, rejected), card).answers.append(answer)
    return list(cards.values())
