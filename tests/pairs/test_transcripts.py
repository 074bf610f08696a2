"""Dialogues in strings: rendered before, repeated beside their prompt, or beginning alike."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.templates import TEMPLATES
from trl import extract_prompt

from orpo_trl.pairs.rows import ChatPair, RowError, TextPair, row_to_pair
from orpo_trl.pairs.transcripts import COMMON_PROMPT, REPEATED_PROMPT

# Formats of common models: a user turn, the header of the answer, and what ends the answer.
FORMATS = {
    "ChatML": ("<|im_start|>user\nq?<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>\n"),
    "Phi-4": ("<|im_start|>user<|im_sep|>q?<|im_end|>", "<|im_start|>assistant<|im_sep|>", "<|im_end|>"),
    "Llama 3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq?<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "Zephyr": ("<|system|>\ns</s>\n<|user|>\nq?</s>\n", "<|assistant|>\n", "</s>\n"),
    "Gemma": ("<bos><start_of_turn>user\nq?<end_of_turn>\n", "<start_of_turn>model\n", "<end_of_turn>\n"),
    "Gemma 4": ("<bos><|turn>user\nq?<turn|>\n", "<|turn>model\n", "<turn|>\n"),
    "GPT-OSS": (
        "<|start|>system<|message|>s<|end|><|start|>user<|message|>q?<|end|>",
        "<|start|>assistant<|channel|>final<|message|>",
        "<|return|>",
    ),
    "Cohere": (
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>q?<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "GLM": ("[gMASK]<sop><|user|>\nq?", "<|assistant|>\n", "<|user|>"),
    "DeepSeek": ("<｜begin▁of▁sentence｜><｜User｜>q?", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    "Mistral": ("<s>[INST] q? ", "[/INST]", "</s>"),
    "Llama 2 without special tokens": ("[INST] q? ", "[/INST]", ""),
    "Alpaca": ("Below is an instruction.\n\n### Instruction:\nq?\n\n", "### Response:\n", ""),
    "HH-RLHF": ("\n\nHuman: q?", "\n\nAssistant:", ""),
}
formats = pytest.mark.parametrize(("turn", "header", "end"), FORMATS.values(), ids=list(FORMATS))


def turn_of(role, text):
    return {"role": role, "content": text}


@formats
def test_prompt_that_rendered_responses_repeat_is_trained_once(turn, header, end):
    """A much-copied notebook renders `chosen` and `rejected`, and leaves `prompt` beside them."""
    expected = TextPair(turn + header, f"good{end}", f"bad{end}")
    whole = {"chosen": f"{turn}{header}good{end}", "rejected": f"{turn}{header}bad{end}"}
    assert row_to_pair({"prompt": "q?", **whole}) == expected  # the user's text alone
    assert row_to_pair({"prompt": " q?\n", **whole}) == expected
    assert row_to_pair({"prompt": turn + header, **whole}) == expected
    assert row_to_pair({"prompt": "q?", "chosen": whole["chosen"]}) == TextPair(turn + header, f"good{end}", None)
    # As they stand: rendered prompt and answer, and a prompt that ends before the header of the answer.
    assert row_to_pair({"prompt": turn + header, "chosen": "good", "rejected": "bad"}).prompt == turn + header
    parted = row_to_pair({"prompt": turn, "chosen": f"{header}good", "rejected": f"{header}bad"})
    assert parted == TextPair(turn, f"{header}good", f"{header}bad")
    repeated = row_to_pair({"prompt": turn, **whole})
    assert repeated == TextPair(turn, f"{header}good{end}", f"{header}bad{end}")


@formats
def test_rendered_dialogues_alone_are_split_before_their_last_answer(turn, header, end):
    """A common beginning would take the first letters that the answers share for the prompt."""
    pair = row_to_pair({"chosen": f"{turn}{header}the cat{end}", "rejected": f"{turn}{header}the cow{end}"})
    assert pair == TextPair(turn + header, f"the cat{end}", f"the cow{end}")


@formats
def test_dialogue_that_was_rendered_before_is_malformed_in_a_turn(turn, header, end):
    whole = f"{turn}{header}good{end}"
    user, bad = turn_of("user", "q?"), turn_of("assistant", "bad")
    for row in (
        {"prompt": [user], "chosen": [turn_of("assistant", whole)], "rejected": [bad]},
        {"question": "q?", "chosen": whole, "rejected": "bad"},
        {"chosen": [user, turn_of("assistant", whole)], "rejected": [user, bad]},
        {"chosen": [user, turn_of("assistant", whole), user, bad], "rejected": None},
    ):
        with pytest.raises(RowError, match=r"column `chosen`.*rendered before"):
            row_to_pair(row)
    with pytest.raises(RowError, match=r"column `history`.*rendered before"):
        row_to_pair({"history": [["q?", whole]], "question": "q", "chosen": "good", "rejected": "bad"})


@formats
def test_rendered_strings_are_not_rendered_once_more(turn, header, end):
    row = {"prompt": "q?", "chosen": f"{turn}{header}good{end}", "rejected": "bad"}
    with pytest.raises(RowError, match=r"column `chosen`.*rendered before"):
        row_to_pair(row, strings_as_messages=True)
    if header == FORMATS["HH-RLHF"][1]:
        return  # read as turns
    for prompt in (turn + header, turn + header + "a" + end + turn + header):
        with pytest.raises(RowError, match=r"column `prompt`.*rendered before"):
            row_to_pair({"prompt": prompt, "chosen": "good", "rejected": "bad"}, strings_as_messages=True)


# Written for images: of a text they write nothing.
FOR_IMAGES = ("idefics3", "llava_next", "smolvlm")


def test_templates_of_trl_write_dialogues_that_are_found(tokenizer):
    turns = [turn_of("user", "What is it?"), turn_of("assistant", "The cat.")]
    for path in TEMPLATES:
        if path.stem.removesuffix("_training") in FOR_IMAGES:
            continue
        tokenizer.chat_template = path.read_text()
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        pair = row_to_pair({"prompt": "What is it?", "chosen": text, "rejected": text.replace("The cat.", "The cow.")})
        assert isinstance(pair, TextPair)
        assert pair.prompt + pair.chosen == text
        assert ("What is it?" in pair.prompt, "The cat." in pair.chosen) == (True, True)
        with pytest.raises(RowError, match="rendered before"):
            row_to_pair({"prompt": turns[:1], "chosen": text, "rejected": "No."})


@pytest.mark.parametrize(
    "answer",
    [
        "[INST] and [/INST] are the markers that Mistral uses.",
        "[INST] your question [/INST]",
        "Write <|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n in front of the answer.",
        "```\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n```",
        "<|user|> is one token.",
        "### Instruction:\nName a colour.\n\n### Response:\nBlue.",
        "### Instructions:\n1. Heat the oven.\n\n### Response:\nSmile.",
        "Human: Hello.\n\nAssistant: Hi. That is a dialogue.",
        "<s>struck</s> and <b>bold</b>",
        "### Response:\nYes.",
    ],
)
def test_answer_that_speaks_of_headers_is_an_answer(answer):
    asked = [turn_of("user", "What does a prompt of a chat model look like?")]
    pair = row_to_pair({"prompt": asked, "chosen": answer, "rejected": "No."})
    assert pair == ChatPair(asked, [turn_of("assistant", answer)], [turn_of("assistant", "No.")])
    row = {"prompt": asked[0]["content"], "chosen": answer, "rejected": "No."}
    assert row_to_pair(row, strings_as_messages=True) == pair
    assert row_to_pair(row) == TextPair(row["prompt"], answer, "No.")


def test_rendered_dialogue_of_another_prompt_is_malformed():
    turn, header, _ = FORMATS["ChatML"]
    with pytest.raises(RowError, match=r"column `chosen`.*from `prompt` on"):
        row_to_pair({"prompt": "another?", "chosen": f"{turn}{header}good", "rejected": f"{turn}{header}bad"})
    with pytest.raises(RowError, match=r"column `rejected`.*another dialogue"):
        row_to_pair({"prompt": "q?", "chosen": f"{turn}{header}good", "rejected": "bad"})


def test_plain_prompt_that_both_responses_repeat():
    """After a colon the text goes on. Otherwise answers may quote the question."""
    row = {"prompt": "Q: 1 + 1?\nA:", "chosen": "Q: 1 + 1?\nA: 2", "rejected": "Q: 1 + 1?\nA: 3"}
    assert row_to_pair(row) == TextPair("Q: 1 + 1?\nA:", " 2", " 3")
    chat = ChatPair([turn_of("user", row["prompt"])], [turn_of("assistant", "2")], [turn_of("assistant", "3")])
    assert row_to_pair(row, strings_as_messages=True) == chat
    greeting = {"prompt": "Hello", "chosen": "Hello! How can I help?", "rejected": "Hello."}
    assert row_to_pair(greeting) == TextPair(*greeting.values())
    assert row_to_pair(greeting).notes == row_to_pair(greeting, strings_as_messages=True).notes == (REPEATED_PROMPT,)
    # One that quotes the question is an answer.
    one = {**row, "rejected": " 3"}
    assert row_to_pair(one) == TextPair(*one.values())
    assert not row_to_pair(one).notes


# ---- Without a column of prompts -------------------------------------------------------------------------------------

TEXTS = st.text(alphabet="ab \n", max_size=8)


@given(st.text(alphabet="ab \n.é", max_size=12), TEXTS, TEXTS)
def test_common_beginning_is_the_prompt_as_in_trl(common, chosen, rejected):
    row = {"chosen": common + chosen, "rejected": common + rejected}
    if not row["chosen"].strip() or not row["rejected"].strip():
        assert row_to_pair(row) == TextPair("", row["chosen"], row["rejected"])  # dropped as empty, which TRL trains
        return
    theirs = extract_prompt(row)
    # TRL takes position -1 where the texts part at once behind a chosen one that ends with a space.
    if theirs["prompt"] and row["chosen"][0] == row["rejected"][0]:
        assert row_to_pair(row) == TextPair(theirs["prompt"], theirs["chosen"], theirs["rejected"])
        assert row_to_pair(row).notes == (COMMON_PROMPT,)
        assert set(row_to_pair(row).read) == {"chosen", "rejected"}
    else:
        with pytest.raises(RowError, match="or a common beginning of `chosen` and `rejected`"):
            row_to_pair(row)


def test_common_beginning_is_no_prompt_where_there_is_a_column_of_prompts_or_a_template():
    """A row whose prompt is missing would be trained with the first letters of its answers as one."""
    row = {"chosen": "The cat", "rejected": "The cow"}
    assert row_to_pair(row) == TextPair("The c", "at", "ow")
    for name in ("prompt", "instruction", "question", "input"):
        with pytest.raises(RowError, match="column `prompt`: expected a prompt"):
            row_to_pair({name: None, **row})
    with pytest.raises(RowError, match="column `prompt`: expected a prompt"):
        row_to_pair(row, strings_as_messages=True)
    with pytest.raises(RowError, match="column `prompt`: expected a prompt"):
        row_to_pair({"chosen": "The cat"})


def test_dialogues_of_hh_rlhf_are_told_apart_first():
    head = "\n\nHuman: q\n\nAssistant:"
    row = {"chosen": f"{head} the cat", "rejected": f"{head} the cow"}
    assert row_to_pair(row) == TextPair(head, " the cat", " the cow")
    with pytest.raises(RowError, match="another dialogue"):
        row_to_pair({**row, "rejected": "\n\nHuman: quite\n\nAssistant: another"})


def test_prompt_whose_end_is_in_no_answer_is_trained():
    """Found by the mutated rows of test_fuzz.py: the words behind the header were lost."""
    row = {"prompt": "\n\nHuman: q?\n\nAssistant: Well,", "chosen": "\n\nHuman: q?\n\nAssistant: good"}
    assert row_to_pair(row).prompt == row["prompt"]
    row["prompt"] = "<|im_start|>user\nq?<|im_end|>\n<|im_start|>assistant\nWell,"
    with pytest.raises(RowError, match="another: "):
        row_to_pair({**row, "chosen": row["prompt"].replace("Well,", "good")})
