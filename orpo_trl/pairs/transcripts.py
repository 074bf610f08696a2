"""Dialogues that stand in strings."""

from typing import Any

from orpo_trl.pairs.row_errors import RowError

# How Anthropic's HH-RLHF marks the turns of a dialogue.
HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"


def is_transcript(text: str) -> bool:
    """Whether a text is a dialogue of HH-RLHF, by its beginning."""
    return ("\n\n" + text.lstrip("\n")).startswith(HUMAN)


def is_transcript_with_answer(text: str) -> bool:
    """Whether a text is a dialogue of HH-RLHF in which the assistant has a turn."""
    head, marker, _ = text.rpartition(ASSISTANT)
    return bool(marker) and is_transcript(head)


def split_transcripts(chosen: str, rejected: str | None) -> tuple[str, str, str | None]:
    """The common prompt of two dialogues of HH-RLHF, and the last answer of each.

    Raises:
        RowError: where the dialogues differ before their last answer, or the human has the last word.
    """
    prompt, answer = _split_transcript("chosen", chosen)
    if rejected is None:
        return prompt, answer, None
    other_prompt, other_answer = _split_transcript("rejected", rejected)
    if other_prompt != prompt:
        raise RowError("rejected", "the turns of `chosen` up to the last", "another dialogue")
    return prompt, answer, other_answer


def _split_transcript(name: str, text: str) -> tuple[str, str]:
    head, marker, answer = text.rpartition(ASSISTANT)
    if HUMAN in answer:
        raise RowError(name, "a dialogue that ends with the assistant's answer", "one that ends with the human's")
    return head + marker, answer


def transcript_turns(prompt: str) -> list[dict[str, Any]]:
    """The turns of a dialogue of HH-RLHF, without an `\\n\\nAssistant:` at its end."""
    turns = []
    for block in ("\n\n" + prompt.removesuffix(ASSISTANT).lstrip("\n")).split(HUMAN)[1:]:
        user, *answers = block.split(ASSISTANT)
        turns.append({"role": "user", "content": user.strip()})
        turns.extend({"role": "assistant", "content": answer.strip()} for answer in answers)
    return turns
