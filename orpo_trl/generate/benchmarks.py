"""The benchmarks whose answers are generated: their prompts, settings, and files of answers.

Formats and settings: AlpacaEval's and FastChat's own, and the files that ORPO's authors published
(github.com/xfactlab/orpo).
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_trl.generate.prompts import Conversation, read_prompts, read_rows, text_of, user_turn

# FastChat's temperatures by category (`temperature_config` of fastchat/llm_judge/common.py).
_TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1, "arena-hard-200": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Answered:
    """A conversation with its answers.

    Attributes:
        answers: one for each user turn.
        seconds: time of the last answer, since 1970.
        digest: of all that decided the answers, in hexadecimal.
    """

    conversation: Conversation
    answers: list[str]
    seconds: float
    digest: str


@dataclass(frozen=True)
class Source:
    """A file on the Hub: repository, its kind, and the file."""

    repository: str
    kind: str
    file: str


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, or the format of a file of one's own prompts.

    Attributes:
        read: makes the conversations of a file.
        render: the text of the file of answers, given the model's name.
        max_new_tokens: of an answer.
        temperature: 0: greedy. A conversation's own comes first.
        source: where the prompts are, without `--data`.
    """

    read: Callable[[Path], list[Conversation]]
    render: Callable[[Sequence[Answered], str], str]
    max_new_tokens: int = 1024
    temperature: float = 0.0
    source: Source | None = None


def conversations_of(prompts: str, data: Path | None) -> tuple[Benchmark, list[Conversation]]:
    """What is to be asked.

    Args:
        prompts: name of a benchmark, or a file of prompts.
        data: the benchmark's prompts; None: from the Hub.

    Raises:
        ValueError, OSError: where they cannot be read.
    """
    benchmark = BENCHMARKS.get(prompts)
    if benchmark is None:
        if data is not None:
            raise ValueError(f"--data is for a benchmark ({', '.join(BENCHMARKS)}), received PROMPTS {prompts!r}")
        if not Path(prompts).suffix:
            raise ValueError(f"PROMPTS: expected {', '.join(BENCHMARKS)} or a file, received {prompts!r}")
        return OWN, OWN.read(Path(prompts))
    return benchmark, benchmark.read(data or _from_hub(prompts, benchmark.source))


def data_of(name: str, data: Path | None) -> Path:
    """The file of a benchmark's prompts: `data`, else that of the Hub.

    Raises:
        ValueError: where the Hub does not give it.
    """
    return data or _from_hub(name, BENCHMARKS[name].source)


def _from_hub(name: str, source: Source | None) -> Path:
    from huggingface_hub import hf_hub_download

    if source is None:
        raise ValueError(f"{name}: set --data FILE")
    try:
        return Path(hf_hub_download(source.repository, source.file, repo_type=source.kind))
    except (OSError, ValueError) as error:  # offline, gated, moved
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{name}: {source.file} of {source.repository} cannot be had from the Hub; set --data FILE. ({reason})"
        ) from error


def settings_file(output: Path) -> Path:
    """The file beside the answers that says how they were made."""
    return output.with_name(f"{output.name}.settings.json")


def read_answers(path: Path) -> list[list[str]]:
    """Answers of a file of any benchmark, or of one's own prompts: those of each conversation, in order.

    Raises:
        ValueError, OSError: naming file and row of what is no answer.
    """
    return [_answers_of(place, row) for place, row in read_rows(path)]


def _answers_of(place: str, row: dict[str, Any]) -> list[str]:
    found: Any = [row.get("output", row.get("response"))]
    with suppress(LookupError, TypeError):
        found = row["choices"][0]["turns"]
    if not (isinstance(found, list) and found and all(isinstance(text, str) for text in found)):
        raise ValueError(f"{place}: expected an answer in `output`, `response` or `choices`, received {row!r:.60}")
    return found


# ---- AlpacaEval ------------------------------------------------------------------------------------------------------


def _read_alpaca_eval(path: Path) -> list[Conversation]:
    """A list of `instruction` and `dataset`, in the official order: the length-controlled figure goes by position."""
    found = []
    for place, row in read_rows(path):
        instruction = text_of(place, row, "instruction")
        found.append(user_turn(instruction, {"instruction": instruction, "dataset": text_of(place, row, "dataset")}))
    return found


def _render_alpaca_eval(answered: Sequence[Answered], name: str) -> str:
    rows = [
        {
            "instruction": one.conversation.fields["instruction"],
            "output": one.answers[0],
            "generator": name,
            "dataset": one.conversation.fields["dataset"],
            "datasplit": "eval",
        }
        for one in answered
    ]
    return json.dumps(rows, indent=4)


# ---- MT-Bench --------------------------------------------------------------------------------------------------------


def _read_mt_bench(path: Path) -> list[Conversation]:
    """FastChat's question.jsonl: `question_id`, `category`, and `turns` of two texts."""
    found = []
    for place, row in read_rows(path):
        turns, number, category = row.get("turns"), row.get("question_id"), text_of(place, row, "category")
        if not isinstance(number, int):
            raise ValueError(f"{place}: expected a number in `question_id`, received {number!r:.60}")
        if not (isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)):
            raise ValueError(f"{place}: expected a list of texts in `turns`, received {turns!r:.60}")
        if category not in _TEMPERATURES:
            raise ValueError(
                f"{place}: expected one of {', '.join(_TEMPERATURES)} in `category`, received {category!r}"
            )
        found.append(
            user_turn(
                turns[0], {"question_id": number}, follow_ups=tuple(turns[1:]), temperature=_TEMPERATURES[category]
            )
        )
    return found


def _render_mt_bench(answered: Sequence[Answered], name: str) -> str:
    return "".join(
        json.dumps(
            {
                "question_id": one.conversation.fields["question_id"],
                "answer_id": one.digest[:22],  # FastChat: 22 characters by chance
                "model_id": name,
                "choices": [{"index": 0, "turns": one.answers}],
                "tstamp": one.seconds,
            }
        )
        + "\n"
        for one in answered
    )


# ---- IFEval, and files of one's own ----------------------------------------------------------------------------------


def _read_ifeval(path: Path) -> list[Conversation]:
    found = []
    for place, row in read_rows(path):
        prompt = text_of(place, row, "prompt")
        found.append(user_turn(prompt, {"prompt": prompt}))
    return found


def _render_lines(answered: Sequence[Answered], name: str) -> str:
    lines: list[dict[str, Any]] = [{**one.conversation.fields, "response": one.answers[0]} for one in answered]
    return "".join(json.dumps(line) + "\n" for line in lines)


OWN = Benchmark(read_prompts, _render_lines)

BENCHMARKS = {
    # As the entry of Mistral-ORPO-beta on the leaderboard.
    "alpaca_eval": Benchmark(
        _read_alpaca_eval,
        _render_alpaca_eval,
        2048,
        0.7,
        Source("tatsu-lab/alpaca_eval", "dataset", "alpaca_eval.json"),
    ),
    "mt_bench": Benchmark(
        _read_mt_bench, _render_mt_bench, 1024, source=Source("lmsys/mt-bench", "space", "data/mt_bench/question.jsonl")
    ),
    # As lm-eval's task.
    "ifeval": Benchmark(
        _read_ifeval, _render_lines, 1280, source=Source("google/IFEval", "dataset", "ifeval_input_data.jsonl")
    ),
}
