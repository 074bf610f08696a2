"""What each benchmark and each of its figures is called, and its unit, in the order of the paper's table."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from orpo_trl.evaluations import UNKNOWN_TEMPLATE, Evaluation, Figure
from orpo_trl.metrics import MARGIN, METRICS
from orpo_trl.report.text import shorten


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is shown.

    Attributes:
        title: its name.
        figures: what each figure is called, in order; figures that are not named here follow under their own names.
        digits: after the decimal point.
        dataset: Hub id of its items; '' where there is none.
        short: what figures are called at the head of a column, where that is shorter.
        of_parts: figures that are shown of parts of the benchmark; all where this is empty.
    """

    title: str
    figures: dict[str, str] = field(default_factory=dict)
    digits: int = 4
    dataset: str = ""
    short: dict[str, str] = field(default_factory=dict)
    of_parts: tuple[str, ...] = ()


_RATES = {"win_rate": "win rate (%)", "lc_win_rate": "length-controlled win rate (%)"}
_NORMALISED, _ACCURACY = {"acc_norm": "normalised accuracy"}, {"acc": "accuracy"}
BENCHMARKS = {
    "alpaca_eval_1": Benchmark("AlpacaEval 1", _RATES, 2, "tatsu-lab/alpaca_eval"),
    "alpaca_eval_2": Benchmark("AlpacaEval 2", _RATES, 2, "tatsu-lab/alpaca_eval"),
    "mt_bench": Benchmark(
        "MT-Bench",
        {"score": "score (1 to 10)", "turn_1": "score of the first turn", "turn_2": "score of the second turn"},
        2,
        "HuggingFaceH4/mt_bench_prompts",
    ),
    "ifeval": Benchmark(
        "IFEval",
        {
            "prompt_strict": "prompts, strict",
            "prompt_loose": "prompts, loose",
            "instruction_strict": "instructions, strict",
            "instruction_loose": "instructions, loose",
        },
        dataset="google/IFEval",
    ),
    "arc_challenge": Benchmark("ARC, challenge", _NORMALISED, dataset="allenai/ai2_arc"),
    "hellaswag": Benchmark("HellaSwag", _NORMALISED, dataset="Rowan/hellaswag"),
    "mmlu": Benchmark("MMLU", _ACCURACY, dataset="cais/mmlu"),
    "truthfulqa_mc2": Benchmark("TruthfulQA", _ACCURACY, dataset="truthfulqa/truthful_qa"),
    "winogrande": Benchmark("Winogrande", _ACCURACY, dataset="allenai/winogrande"),
    "gsm8k": Benchmark("GSM8K", {"exact_match": "exact match"}, dataset="openai/gsm8k"),
    "preferences": Benchmark(
        "Held-out pairs",
        {
            "accuracy": METRICS["rewards/accuracies"].heading,
            "margin": METRICS[MARGIN].heading,
            "log_odds": METRICS["log_odds_chosen"].heading,
            "chosen": METRICS["logps/chosen"].heading,
            "rejected": METRICS["logps/rejected"].heading,
        },
        short={
            "accuracy": METRICS["rewards/accuracies"].title,
            "margin": "margin",
            "log_odds": METRICS["log_odds_chosen"].title,
            "chosen": METRICS["logps/chosen"].title,
            "rejected": METRICS["logps/rejected"].title,
        },
        of_parts=("accuracy", "margin"),
    ),
}
_HELD_OUT = "preferences"


def shown(benchmark: str) -> Benchmark:
    """How a benchmark is shown; a task of lm-eval under its own name."""
    return BENCHMARKS.get(benchmark) or Benchmark(shorten(benchmark, 60))


def place(benchmark: str) -> tuple[int, str]:
    """What benchmarks are sorted by: those of the paper, then other tasks of lm-eval, then held-out pairs."""
    order = list(BENCHMARKS)
    if benchmark == _HELD_OUT:
        return len(order) + 1, ""
    return (order.index(benchmark), "") if benchmark in BENCHMARKS else (len(order), benchmark)


def in_order(benchmark: str, figures: Iterable[str]) -> list[str]:
    """The names of figures, in the order in which they are shown."""
    known = list(shown(benchmark).figures)
    return sorted(figures, key=lambda name: known.index(name) if name in known else len(known))


def label(benchmark: str, figure: str) -> str:
    """What a figure is called beside the benchmark's title."""
    return shown(benchmark).figures.get(figure) or shorten(figure.replace("_", " "), 60)


def column(benchmark: str, figure: str) -> str:
    """What a figure is called at the head of a column."""
    return shown(benchmark).short.get(figure) or label(benchmark, figure)


def value_text(benchmark: str, figure: Figure) -> str:
    """A value with what is known of its error: `0.4213 ± 0.0211`, `0.66 [0.61, 0.70]`."""
    digits = shown(benchmark).digits
    text = number_text(figure.value, digits)
    if figure.low is not None and figure.high is not None:
        return f"{text} [{number_text(figure.low, digits)}, {number_text(figure.high, digits)}]"
    return text if figure.stderr is None else f"{text} ± {number_text(figure.stderr, digits)}"


def template_text(evaluation: Evaluation) -> str:
    """What rendered the prompts of an evaluation."""
    if evaluation.template == UNKNOWN_TEMPLATE:
        return "template not recorded"
    return evaluation.template or "no template"


def number_text(value: float, digits: int) -> str:
    """A number with so many digits after the point; very large ones with an exponent."""
    text = f"{value:.{digits}f}" if abs(value) < 1e9 else f"{value:.3e}"
    return text.replace("-", "−", text[0] == "-")
