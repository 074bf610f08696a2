"""What the judge of MT-Bench is asked: in FastChat's words, read from its file, or in our own."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_trl.generate.prompts import read_rows

# Categories that FastChat judges with reference answers (`NEED_REF_CATS` of its common.py).
WITH_REFERENCE = ("math", "reasoning", "coding")

# Names in FastChat's file, by whether there is a reference, and by turn.
_NAMES = {
    (False, 1): "single-v1",
    (True, 1): "single-math-v1",
    (False, 2): "single-v1-multi-turn",
    (True, 2): "single-math-v1-multi-turn",
}

_TASK = (
    "You grade the last answer of an assistant. Say in two or three sentences what is right and what is wrong in it: "
    "whether it does what the user asks, whether its facts and steps are true, and whether it is clear. Length is no "
    "merit. Then end with a grade from 1 (useless) to 10 (could not be better) in double brackets, such as [[4]]."
)
_COMPARE = " Solutions that are known to be right are given. Compare the answer with them first."


@dataclass(frozen=True)
class JudgePrompts:
    """The wording of the judge's task.

    Attributes:
        wording: `FastChat`, or `own`.
        templates: by whether there is a reference, and by turn (1 or 2): the system prompt, and a template of
            `str.format`. Empty for our own wording.
    """

    wording: str
    templates: Mapping[tuple[bool, int], tuple[str, str]]

    def messages(
        self, questions: list[str], answers: list[str], references: list[str] | None, turn: int
    ) -> list[dict[str, str]]:
        """The conversation with the judge on one turn.

        Args:
            questions, answers, references: of both turns; no references where there are none.
            turn: 1 or 2. In the second, the judge also sees the first.
        """
        if not self.templates:
            system, user = _own_words(questions[:turn], answers[:turn], references)
        else:
            system, template = self.templates[references is not None, turn]
            user = template.format(**_fields(questions, answers, references, turn))
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]


OWN = JudgePrompts("own", {})


def read_fastchat(path: Path) -> JudgePrompts:
    """FastChat's judge prompts.

    Raises:
        ValueError: where one is missing, or has other fields than FastChat's.
    """
    found = {row.get("name"): row for _, row in read_rows(path)}
    templates = {}
    for (has_reference, turn), name in _NAMES.items():
        try:
            templates[has_reference, turn] = system, template = (
                found[name]["system_prompt"],
                found[name]["prompt_template"],
            )
            template.format(**_fields(["", ""], ["", ""], ["", ""] if has_reference else None, turn))
            system.encode()
        except (LookupError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path}: expected FastChat's judge_prompts.jsonl with the prompt {name!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
    return JudgePrompts("FastChat", templates)


def _fields(questions: list[str], answers: list[str], references: list[str] | None, turn: int) -> dict[str, str]:
    """What FastChat fills its templates with (`run_judge_single` of its common.py)."""
    fields = {} if references is None else {"ref_answer_1": references[0], "ref_answer_2": references[1]}
    if turn == 1:
        return {"question": questions[0], "answer": answers[0], **fields}
    return {
        "question_1": questions[0],
        "answer_1": answers[0],
        "question_2": questions[1],
        "answer_2": answers[1],
        **fields,
    }


def _own_words(questions: list[str], answers: list[str], references: list[str] | None) -> tuple[str, str]:
    """System and user prompt in our wording. JSON keeps an answer from looking like a part of the task."""
    conversation: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        conversation.append({"user": question, "assistant": answer})
        if references is not None:
            conversation[-1]["known solution"] = references[number]
    system = _TASK + (_COMPARE if references is not None else "")
    return system, json.dumps(conversation, ensure_ascii=False, indent=1)
