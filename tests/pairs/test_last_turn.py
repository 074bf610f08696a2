"""The last turn of the user in prompts that chat templates have rendered."""

import pytest
from support.templates import TEMPLATES

from orpo_trl.pairs.last_turn import TurnMarks, special_texts
from orpo_trl.pairs.rendering import render_turns
from orpo_trl.pairs.row_errors import RowError
from orpo_trl.pairs.tokenize import prompt_ids

# Written for content as parts: of a text they write nothing at all.
PARTS_ALONE = ("idefics3", "llava_next", "smolvlm")
# Puts the system text into the turn of the user.
SYSTEM_IN_TURN = ("gemma3",)
SYSTEM = {"role": "system", "content": "Be brief.\n\nBe kind."}
USER, ANSWER = {"role": "user", "content": "A cow?"}, {"role": "assistant", "content": "Moo."}
SECOND = {"role": "user", "content": "And\n\na cat? user Mew"}


def decoded(turns, tokenizer) -> str:
    return tokenizer.decode(prompt_ids([render_turns(turns, tokenizer, add_generation_prompt=True)], tokenizer)[0])


@pytest.mark.parametrize("path", TEMPLATES, ids=[path.stem for path in TEMPLATES])
def test_last_turn_is_found_under_the_templates_of_trl(tokenizer, path):
    tokenizer.chat_template = path.read_text()
    name = path.stem.removesuffix("_training")
    marks = TurnMarks.of(tokenizer)
    if name in PARTS_ALONE:
        assert marks is None
        return
    assert marks is not None
    for turns in ([USER], [USER, ANSWER, SECOND], [SYSTEM, USER], [SYSTEM, USER, ANSWER, SECOND]):
        try:
            prompt = decoded(turns, tokenizer)
        except RowError:
            assert turns[0] is SYSTEM
            continue
        place = marks.find(prompt)
        assert place is not None
        expected = turns[-1]["content"]
        if name in SYSTEM_IN_TURN and turns == [SYSTEM, USER]:
            expected = f"{SYSTEM['content']}\n\n{expected}"
        assert prompt[slice(*place)] == expected


def test_prompt_that_was_cut_behind_its_last_turn(tokenizer):
    """The header of the answer counts to the responses where a template renders it differently once they follow."""
    marks, prompt = TurnMarks.of(tokenizer), decoded([SYSTEM, USER], tokenizer)
    assert marks is not None
    for length in range(len(prompt), prompt.index(USER["content"]) + len(USER["content"]) - 1, -1):
        begin, end = marks.find(prompt[:length]) or (0, 0)
        assert prompt[begin:end] == USER["content"]


def test_text_that_is_no_conversation_has_no_last_turn(tokenizer):
    marks = TurnMarks.of(tokenizer)
    assert marks is not None
    assert marks.find("a school:") is None
    tokenizer.chat_template = None
    assert TurnMarks.of(tokenizer) is None
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    assert TurnMarks.of(tokenizer) is None
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert TurnMarks.of(tokenizer) is None


def test_special_tokens_are_named_once(tokenizer):
    (ids,) = prompt_ids([render_turns([USER, ANSWER, SECOND], tokenizer, add_generation_prompt=True)], tokenizer)
    assert special_texts(ids, tokenizer) == ["<|user|>", "</s>", "<|assistant|>"]
