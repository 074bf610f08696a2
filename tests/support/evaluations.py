"""Evaluations as the benchmarks write them, made by hand."""

from typing import Any

from orpo_trl.evaluations import OWN_TEMPLATE, Evaluation, Figure

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")

# As the published figures were measured: judge, template, shots, items, and further settings.
MADE: dict[str, dict[str, Any]] = {
    "alpaca_eval_1": {"judge": "alpaca_eval_gpt4", "template": OWN_TEMPLATE, "answered": 805},
    "alpaca_eval_2": {"judge": "weighted_alpaca_eval_gpt4_turbo", "template": OWN_TEMPLATE, "answered": 805},
    "mt_bench": {
        "judge": "gpt-4",
        "template": OWN_TEMPLATE,
        "answered": 160,
        "settings": {"judge_prompts": "FastChat"},
    },
    "ifeval": {"template": OWN_TEMPLATE, "shots": 0, "answered": 541, "settings": {"max_new_tokens": 1280}},
    "arc_challenge": {"shots": 25, "answered": 1172},
    "hellaswag": {"shots": 10, "answered": 10042},
    "truthfulqa_mc2": {"shots": 0, "answered": 817},
}  # fmt: skip


def evaluation(benchmark: str, figures: dict[str, Any] | None = None, **changes: Any) -> Evaluation:
    """An evaluation like the published ones, but for `changes`; figures are values, or fields of `Figure`."""
    made = {
        "template": None, "shots": None, "judge": None, "limit": None, "answered": 10, "settings": {},
        "versions": {"lm_eval": "0.4.13"}, "date": "2026-01-02T03:04:05+00:00",
        **MADE.get(benchmark, {}), **changes,
    }  # fmt: skip
    return Evaluation(
        benchmark=benchmark,
        figures=measured(figures if figures is not None else {"score": 1.0}),
        **{"model": "run", "asked": made["answered"], **made},
    )


def measured(figures: dict[str, Any]) -> dict[str, Figure]:
    return {
        name: Figure(**value) if isinstance(value, dict) else Figure(value=value) for name, value in figures.items()
    }


def mt_bench(score: float = 6.5, **changes: Any) -> Evaluation:
    """Scores by category and turn."""
    groups = {"category": {name: measured({"score": score + index / 4}) for index, name in enumerate(CATEGORIES)}}
    return evaluation(
        "mt_bench", {"score": score, "turn_1": score + 0.5, "turn_2": score - 0.5}, groups=groups, **changes
    )


def preferences(**changes: Any) -> Evaluation:
    """Accuracy and margin by source and length, with intervals."""
    accuracy = {"value": 0.6591, "low": 0.61, "high": 0.703, "n": 200}
    part = measured({"accuracy": accuracy, "margin": 0.25})
    groups = {
        "source": {"ultrachat": part, "flan": part}, "chosen_length": {"1-512 tokens": part, "513-1024 tokens": part},
        "against": {"all": part}, "difference_source": {"ultrachat": part, "flan": part},
    }  # fmt: skip
    return evaluation("preferences", {"accuracy": accuracy, "margin": 0.25, "log_odds": 0.4}, groups=groups, **changes)
