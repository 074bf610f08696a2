"""The command `orpo-trl generate`: a file of answers, and those of another model beside them."""

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orpo_trl.devices import this_process
from orpo_trl.generate.benchmarks import conversations_of, read_answers
from orpo_trl.generate.prompts import questions
from orpo_trl.generate.run import generate_answers
from orpo_trl.plain_files import write_text
from orpo_trl.printable import printable


def run_generate(model: str, prompts: str, output: Path, against: str | None = None, **options: Any) -> Iterator[str]:
    """Write the answers of a model, and of `against` where it is given.

    Args:
        model, prompts, output: as in `generate_answers`.
        against: another model, with its own answers in STEM.against.ENDING, and both in STEM.beside.jsonl. Where it
            has no chat template, as base models have none, it is asked in that of `model`.
        options: of `generate_answers`.

    Yields:
        Text for people: each question with both answers.

    Raises:
        ValueError, OSError: as `generate_answers`.
    """
    generate_answers(model, prompts, output, **options)
    is_main = this_process().is_main_process  # of several that answer together
    if is_main:
        print(printable(f"Answers: {output}"), file=sys.stderr)
    if against is None:
        return
    gc.collect()  # the first model leaves memory before the second comes
    other = output.with_name(f"{output.stem}.against{output.suffix}")
    template = None if options.get("endpoint") else model
    generate_answers(against, prompts, other, default_template=template, **options)
    if not is_main:
        return
    _, conversations = conversations_of(prompts, options.get("data"))
    beside = [
        {"questions": list(questions(conversation)), model: ours, against: theirs}
        for conversation, ours, theirs in zip(conversations, read_answers(output), read_answers(other), strict=False)
    ]
    path = output.with_name(f"{output.stem}.beside.jsonl")
    write_text(path, "".join(json.dumps(row) + "\n" for row in beside))
    print(printable(f"Both: {path}"), file=sys.stderr)
    for number, row in enumerate(beside, start=1):
        yield f"──── {number}"
        for turn, question in enumerate(row["questions"]):
            yield f"{question.strip()}\n"
            for name in (model, against):
                yield f"── {name}\n{row[name][turn].strip()}\n"
