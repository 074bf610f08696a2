"""The answers that a judge is shown: of a file, or generated first."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_trl.evaluate.options import Options, Target
from orpo_trl.evaluations import FOLDER, OWN_TEMPLATE, UNKNOWN_TEMPLATE
from orpo_trl.generate.prompts import read_rows


@dataclass(frozen=True)
class Answers:
    """A file of answers.

    Attributes:
        template: as in `Evaluation`; it is `UNKNOWN_TEMPLATE` where nothing beside the file says it.
    """

    path: Path
    template: str


def find_answers(target: Target, options: Options, benchmark: str, prompts: Path | None) -> Answers | None:
    """The answers of a target. A model generates them, beside its evaluations; the same command goes on after a kill.

    Args:
        benchmark: as `generate` names it.
        prompts: the benchmark's prompts; None: from the Hub.

    Returns:
        None in all processes of `accelerate launch` but the first.

    Raises:
        ValueError, OSError: for what the user can mend.
    """
    if target.answers is not None:
        return Answers(target.answers, target.made.get("template_of") or UNKNOWN_TEMPLATE)
    from orpo_trl.devices import this_process
    from orpo_trl.generate.run import generate_answers  # loads torch

    folder = (options.output or target.folder) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    part = f".first-{options.limit}" if options.limit else ""
    path = generate_answers(
        target.need_model(benchmark),
        benchmark,
        folder / f"{benchmark}{part}.answers.{'json' if benchmark == 'alpaca_eval' else 'jsonl'}",
        data=prompts,
        limit=options.limit,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        device=options.device,
        dtype=options.dtype,
        batch_size=options.batch_size,
        chat_template_path=options.chat_template_path,
        trust_remote_code=options.trust_remote_code,
    )
    return Answers(path, options.chat_template_path or OWN_TEMPLATE) if this_process().is_main_process else None


def rows_with(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of a .json or .jsonl file.

    Raises:
        ValueError: where a row lacks a key.
        OSError: where the file cannot be read.
    """
    rows = read_rows(path)
    for place, row in rows:
        missing = [key for key in keys if key not in row]
        if missing:
            raise ValueError(f"{place}: expected the keys {', '.join(keys)}; {missing[0]!r} is missing")
    return [row for _, row in rows]
