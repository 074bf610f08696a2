"""Dialogues that stand in strings: HH-RLHF's, and those that a chat template rendered before."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from orpo_trl.pairs.row_errors import RowError

# How Anthropic's HH-RLHF marks the turns of a dialogue.
HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"

# What ends a turn, or a text, in the formats of common models.
TURN_ENDS = (
    *("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<｜end▁of▁sentence｜>"),
    *(
        "<|im_end|>",
        "<|eot_id|>",
        "<|eot|>",
        "<end_of_turn>",
        "<turn|>",
        "<|end|>",
        "<|return|>",
        "<|END_OF_TURN_TOKEN|>",
    ),
)

REPEATED_PROMPT = (
    "`chosen` and `rejected` begin with the prompt, which is trained twice; leave `prompt` out to split there"
)
COMMON_PROMPT = "no column of prompts: what `chosen` and `rejected` have in common at their beginning is the prompt"


class _Format(NamedTuple):
    """How a chat template marks turns: the header of any turn, at the start of a text, and the header of an answer.

    `is_plain`: its headers are words that people write too.
    """

    turn: re.Pattern[str]
    answer: re.Pattern[str]
    is_plain: bool = False


def _format(turn: str, answer: str, is_plain: bool = False) -> _Format:
    begin = r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>|<｜begin▁of▁sentence｜>|\[gMASK\]<sop>)?\s*"
    return _Format(re.compile(begin + turn), re.compile(answer), is_plain)


_FORMATS = (
    _format(r"<\|im_start\|>\w+(?:\n|<\|im_sep\|>)", r"<\|im_start\|>assistant(?:\n|<\|im_sep\|>)"),  # ChatML, Phi-4
    # Llama 3
    _format(r"<\|start_header_id\|>\w+<\|end_header_id\|>\n+", r"<\|start_header_id\|>assistant<\|end_header_id\|>\n+"),
    _format(r"<\|(?:system|user|assistant)\|>\n", r"<\|assistant\|>\n"),  # Zephyr, Phi-3, Tülu, GLM
    _format(r"<start_of_turn>(?:user|model)\n", r"<start_of_turn>model\n"),  # Gemma
    _format(r"<\|turn>(?:system|user|model)\n", r"<\|turn>model\n"),  # Gemma 4
    _format(r"<\|start\|>\w+[^<]*<\|message\|>", r"<\|start\|>assistant[^\n]*?<\|message\|>"),  # GPT-OSS
    _format(r"<\|START_OF_TURN_TOKEN\|><\|\w+\|>", r"<\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|>"),  # Cohere
    _format(r"<｜(?:User|Assistant)｜>", r"<｜Assistant｜>"),  # DeepSeek
    _format(r"\[INST\]", r"\[/INST\]", is_plain=True),  # Mistral, Llama 2
    _format(r"(?:Below is an instruction[^#]*)?### Instruction:\n", r"### Response:\n?", is_plain=True),  # Alpaca
    _format(HUMAN.strip(), ASSISTANT, is_plain=True),  # HH-RLHF
)


class Dialogue(NamedTuple):
    """A rendered dialogue: its text up to and with the header of its last answer, and what follows.

    Attributes:
        is_answer: it begins with the header of an answer.
        is_plain: its headers are words that people write too, such as `[INST]`.
    """

    head: str
    answer: str
    is_answer: bool
    is_plain: bool


def find_dialogue(text: str) -> Dialogue | None:
    """The dialogue that a text is: a header stands at its very start, and there is one of an answer."""
    for turn, answer, is_plain in _FORMATS:
        start = turn.match(text)
        ends = [header.end() for header in answer.finditer(text)] if start else []
        if start and ends:
            is_plain = is_plain and not text.lstrip().startswith("<s>")
            return Dialogue(text[: ends[-1]], text[ends[-1] :], ends[0] == start.end(), is_plain)
    return None


def refuse_rendered_prompt(prompt: str) -> None:
    """Refuse a rendered prompt where the chat template would render it once more, as the text of one turn.

    Raises:
        RowError: quoting how the dialogue begins.
    """
    found = find_dialogue(prompt)
    if found and not (found.is_plain and found.answer.strip()):
        raise _rendered_before("prompt", prompt)


def refuse_rendered_answer(column: str, text: str, asked: Iterable[str]) -> None:
    """Refuse a rendered dialogue in the place of an answer, which the chat template would render as one turn.

    Args:
        column: where the answer is from.
        text: the answer.
        asked: texts of the user. An answer may speak of `[INST]`, or write an instruction for another model, so headers
            of plain words count only where one of these texts stands behind them.

    Raises:
        RowError: quoting how the dialogue begins.
    """
    found = find_dialogue(text)
    if found and (not found.is_plain or any(user.strip() and user.strip() in found.head for user in asked)):
        raise _rendered_before(column, text)


def _rendered_before(column: str, text: str) -> RowError:
    return RowError(column, "the text of one turn", f"a dialogue that was rendered before: {text[:40]!r}")


def without_prompt(prompt: str, chosen: str, rejected: str | None) -> tuple[str, str | None, tuple[str, ...]]:
    """Responses without the prompt that both repeat at their beginning, which would be trained twice.

    They are cut where the prompt ends as one that is to be continued: it is a rendered dialogue, or ends with a colon.
    Of other prompts it is not known whether the answers quote them.

    Returns:
        Chosen, rejected, and what is worth a warning.
    """
    responses = [chosen] if rejected is None else [chosen, rejected]
    if not prompt.strip() or not all(text.startswith(prompt) for text in responses):
        return chosen, rejected, ()
    if not _begins_with_header(prompt) and not prompt.rstrip().endswith(":"):
        return chosen, rejected, (REPEATED_PROMPT,)
    chosen, *others = (text[len(prompt) :] for text in responses)
    return chosen, others[0] if others else None, ()


def split_at_prompt(prompt: str, chosen: str, rejected: str | None) -> tuple[str, str, str | None, tuple[str, ...]]:
    """A row of text without the repetition of its prompt: responses that begin with it (`without_prompt`), or that are
    whole rendered dialogues with the prompt inside, which are split before their last answer.

    Returns:
        Prompt, chosen, rejected, and what is worth a warning.

    Raises:
        RowError: where a response is another dialogue than that of the prompt.
    """
    whole, (chosen, rejected, notes) = (chosen, rejected), without_prompt(prompt, chosen, rejected)
    found = find_dialogue(chosen)
    if whole != (chosen, rejected) or found is None or found.is_answer or _is_continued(prompt):
        return prompt, chosen, rejected, notes
    holds = prompt.strip() in (chosen if prompt.startswith(found.head) else found.head)
    split = _split_dialogues(chosen, rejected)
    if holds and split:
        return *split, ()
    if found.is_plain:
        return prompt, chosen, rejected, notes
    if not holds:
        raise RowError("chosen", "an answer, or the rendered dialogue from `prompt` on", f"another: {chosen[:40]!r}")
    raise RowError("rejected", "the turns of `chosen` up to the last", "another dialogue")


def _is_continued(prompt: str) -> bool:
    """Whether a prompt is rendered and has no header of an answer yet, as a system turn alone."""
    return _begins_with_header(prompt) and find_dialogue(prompt) is None


def _begins_with_header(text: str) -> bool:
    return any(turn.match(text) for turn, *_ in _FORMATS)


def _split_dialogues(chosen: str, rejected: str | None) -> tuple[str, str, str | None] | None:
    """The common prompt of two rendered dialogues, and the last answer of each; None where they differ before it."""
    first = find_dialogue(chosen)
    if first is None or rejected is None:
        return first and (first.head, first.answer, None)
    second = find_dialogue(rejected)
    return (first.head, first.answer, second.answer) if second and second.head == first.head else None


def split_common(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    """Two texts that begin alike, without a column of prompts: their common prompt, and what follows in each.

    Rendered dialogues are split before their last answer. Other texts are cut where `trl.extract_prompt` cuts them:
    where they part, and a space before that counts to the responses; where one text is the beginning of the other, its
    last character counts to the responses too. None where nothing is left for a prompt.
    """
    if split := _split_dialogues(chosen, rejected):
        return split[0], split[1], split[2] or ""
    common = common_length(chosen, rejected)
    if common == min(len(chosen), len(rejected)) or chosen[:common].endswith(" "):
        common -= 1
    return (chosen[:common], chosen[common:], rejected[common:]) if common > 0 else None


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many characters, or turns, two sequences have in common at their beginning."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


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
