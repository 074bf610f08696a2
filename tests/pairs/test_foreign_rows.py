"""Rows as other tools write them."""

import json

import numpy as np
import pytest

from orpo_trl.pairs.foreign_rows import check_columns
from orpo_trl.pairs.rows import ChatPair, RowError, row_to_pair


def turn(role, text):
    return {"role": role, "content": text}


USER, GOOD, BAD, SYSTEM = turn("user", "q"), turn("assistant", "good"), turn("assistant", "bad"), turn("system", "s")
CHAT = ChatPair([USER], [GOOD], [BAD])
HUMAN, GPT, GPT_BAD = (
    {"from": name, "value": text} for name, text in (("human", "q"), ("gpt", "good"), ("gpt", "bad"))
)
ANSWERS = {"chosen": "good", "rejected": "bad"}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
TOOL = turn("tool", "1")
CALLED = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
OBSERVED = {"from": "observation", "value": "1"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": GPT_BAD}, CHAT),
        ({"conversations": [HUMAN], "chosen": [GPT], "rejected": [GPT_BAD]}, CHAT),
        ({"chosen": [HUMAN, GPT], "rejected": [HUMAN, GPT_BAD]}, CHAT),
        (
            {"conversations": [HUMAN, CALLED, OBSERVED], **ANSWERS},
            ChatPair([USER, CALL, TOOL], [GOOD], [BAD]),
        ),
        (
            {"conversations": [HUMAN], "chosen": [CALLED, OBSERVED, GPT], "rejected": [GPT_BAD]},
            ChatPair([USER], [CALL, TOOL, GOOD], [BAD]),
        ),
        (
            {"conversations": [HUMAN, {**CALLED, "value": f"[{CALLED['value']}]"}, OBSERVED], "chosen": GPT},
            ChatPair([USER, CALL, TOOL], [GOOD], None),
        ),
        ({"conversations": [HUMAN], **ANSWERS}, CHAT),
        ({"messages": [USER, GOOD], "rejected_response": "bad"}, CHAT),
        ({"messages": [USER, GOOD], "rejected_messages": [USER, BAD]}, CHAT),
        ({"system": "s", "question": "q", **ANSWERS}, ChatPair([SYSTEM, USER], [GOOD], [BAD])),
        ({"system": "", "input": "q", **ANSWERS}, CHAT),
        ({"system": "s", "input": "q", **ANSWERS}, ChatPair([SYSTEM, USER], [GOOD], [BAD])),
        (
            {"history": [["a", "b"]], "instruction": "q", **ANSWERS},
            ChatPair([turn("user", "a"), turn("assistant", "b"), USER], [GOOD], [BAD]),
        ),
        ({"images": [], "image": None, "question": "q", **ANSWERS}, CHAT),
        (
            {"prompt": [USER], "chosen": [CALL, turn("tool", "1"), GOOD], "rejected": [BAD]},
            ChatPair([USER], [CALL, turn("tool", "1"), GOOD], [BAD]),
        ),
        (
            {"chosen": [USER, CALL, turn("tool", "1"), GOOD], "rejected": [USER, BAD]},
            ChatPair([USER], [CALL, turn("tool", "1"), GOOD], [BAD]),
        ),
        ({"prompt": [turn("user", [{"type": "text", "text": "q"}])], **ANSWERS}, CHAT),
        ({"prompt": '[{"content": "q", "role": "user"}]', **ANSWERS}, CHAT),
    ],
)
def test_row_is_converted(row, expected):
    assert row_to_pair(row) == expected


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": "q", "images": ["a.png"], **ANSWERS}, "images"),
        ({"prompt": "q", "system": "s", **ANSWERS}, "system"),
        ({"prompt": [SYSTEM, USER], "system": "s", **ANSWERS}, "system"),
        ({"question": "q", "history": ["a"], **ANSWERS}, "history"),
        ({"prompt": "[{'content': 'q', 'role': 'user'}]", **ANSWERS}, "prompt"),
        ({"prompt": [turn("user", [{"type": "image"}])], **ANSWERS}, "prompt"),
        ({"prompt": "q", "history": [["a", "b"]], **ANSWERS}, "history"),
        ({"conversations": [{"from": "nobody", "value": "q"}], **ANSWERS}, "conversations"),
        ({"conversations": [HUMAN, {**CALLED, "value": "f()"}, OBSERVED], **ANSWERS}, "conversations"),
        ({"conversations": [HUMAN, GPT], **ANSWERS}, "conversations"),
        ({"conversations": [USER, GOOD], **ANSWERS}, "conversations"),
        ({"conversations": [HUMAN, CALLED], **ANSWERS}, "conversations"),
        ({"conversations": [HUMAN], "prompt": "q", **ANSWERS}, "conversations"),
        ({"conversations": [HUMAN], "chosen": [HUMAN], "rejected": [GPT]}, "chosen"),
        ({"messages": [USER], "rejected_response": "bad"}, "messages"),
        ({"messages": [GOOD], "rejected_response": "bad"}, "messages"),
        ({"messages": [USER, {"role": "assistant"}], "rejected_response": "bad"}, "messages"),
        ({"messages": [USER, GOOD], "rejected_response": 3}, "rejected_response"),
        ({"messages": [USER, GOOD], "rejected_messages": "bad"}, "rejected_messages"),
        ({"messages": [USER, GOOD], "rejected_messages": [SYSTEM, USER, BAD]}, "rejected_messages"),
        ({"messages": [USER, GOOD], "rejected_messages": [USER, BAD, USER]}, "rejected_messages"),
        ({"question": "q", "tools": [3], **ANSWERS}, "tools"),
        ({"question": "q", "tools": [3], "messages": [USER], **ANSWERS}, "tools"),
    ],
)
def test_row_is_refused_by_column(row, column):
    with pytest.raises(RowError) as error:
        row_to_pair(row)
    assert error.value.column == column
    # Nor does the sentence name a column that the row does not have.
    for name in ("chosen", "rejected", "prompt"):
        assert f"`{name}`" not in str(error.value) or name in row


TURNS = [USER, GOOD]


@pytest.mark.parametrize(
    "text",
    [
        str(TURNS),  # Python
        str(np.array(TURNS)),  # a cell that pandas wrote: no commas between the turns
        repr(np.array(TURNS)),
        str(tuple(TURNS)),
        json.dumps(TURNS)[:-8],  # cut off
        json.dumps(TURNS) + ",",
        "\n".join(map(json.dumps, TURNS)),
        str([{"role": "user", "content": 'It\'s "q"', "name": None}]),
    ],
)
def test_text_of_turns_that_is_no_json_is_malformed(text):
    for row in ({"prompt": text, **ANSWERS}, {"prompt": "q", "chosen": text, "rejected": "bad"}):
        with pytest.raises(RowError, match="messages as a list or as JSON"):
            row_to_pair(row)


@pytest.mark.parametrize(
    "answer",
    [
        f"{json.dumps(TURNS)}\nis a list of two turns.",
        f"{TURNS}\n\nIt's Python.",
        f"Here they are: {TURNS}",
        '[{"role": "user", "content": question}]',
        '[{"role": "user", "content": "…"}, …]',
        '{"role": "user", "content": "a"} comes before {"role": "assistant", "content": "b"}',
        f"```\n{TURNS}\n```",
    ],
)
def test_answer_that_shows_turns_is_an_answer(answer):
    asked = "How do I write messages?"
    assert row_to_pair({"prompt": asked, "chosen": answer, "rejected": "No."}).chosen == answer
    assert row_to_pair({"prompt": answer, **ANSWERS}).prompt == answer
    assert row_to_pair({"question": asked, "chosen": answer, "rejected": "No."}).chosen == [turn("assistant", answer)]


@pytest.mark.parametrize(
    ("prompt_turns", "prompt", "chosen", "rejected"),
    [
        ("auto", [USER], [CALL, TOOL, GOOD], [CALL, TOOL, BAD]),
        ("all", [USER, CALL, TOOL], [GOOD], [BAD]),
        ("first", [USER], [CALL, TOOL, GOOD], [CALL, TOOL, BAD]),
    ],
)
def test_which_turns_of_an_answer_of_several_turns_are_prompt(prompt_turns, prompt, chosen, rejected):
    row = {"prompt": [USER], "chosen": [CALL, TOOL, GOOD], "rejected": [CALL, TOOL, BAD]}
    assert row_to_pair(row, prompt_turns=prompt_turns) == ChatPair(prompt, chosen, rejected)
    # Answers of another number of turns part where they differ, whatever is asked.
    short = {**row, "rejected": [BAD]}
    assert row_to_pair(short, prompt_turns=prompt_turns) == ChatPair([USER], [CALL, TOOL, GOOD], [BAD])


def test_first_answer_of_earlier_turns_is_where_the_response_starts():
    row = {"prompt": [USER, GOOD, USER], "chosen": [CALL, TOOL, GOOD], "rejected": [BAD]}
    assert row_to_pair(row) == row_to_pair(row, prompt_turns="all") == ChatPair(*row.values())
    first = row_to_pair(row, prompt_turns="first")
    assert first == ChatPair([USER], [GOOD, USER, CALL, TOOL, GOOD], [GOOD, USER, BAD])
    row = {"history": [["a", "b"]], "question": "q", **ANSWERS}
    first = row_to_pair(row, prompt_turns="first")
    earlier = [turn("assistant", "b"), USER]
    assert first == ChatPair([turn("user", "a")], [*earlier, GOOD], [*earlier, BAD])


def test_text_that_looks_a_little_like_turns_stays_text():
    for text in ('[{"role": 1}]', '{"name": "x"}', "[1, 2]", "{ int role; }"):
        assert row_to_pair({"prompt": text, **ANSWERS}).prompt == text


def test_markers_of_media_are_noted():
    assert row_to_pair({"prompt": "<image> q", **ANSWERS}).notes == ("literal `<image>` in a text row",)


def test_columns_that_pair_was_read_from():
    row = {"system": "s", "question": "q", "score": 1, **ANSWERS}
    assert set(row_to_pair(row).read) == {"system", "question", "chosen", "rejected"}


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (["prompt", "response_w", "response_l"], "chosen: response_w, rejected: response_l"),
        (["prompt", "completion", "label"], "KTO"),
        (["prompt", "responses", "scores"], "scored lists"),
        (["prompt", "completions"], "scored lists"),
        (["prompt", "response_0", "response_1", "better"], "stands in another column"),
        (["question", "win", "lose"], "chosen: win, rejected: lose"),
        (["question", "positive", "negative"], "chosen: positive, rejected: negative"),
        (["question", "accepted", "rejected"], "chosen: accepted, rejected: rejected"),
        (["query", "response", "rejected_response"], "chosen: response, rejected: rejected_response"),
        (["query", "chosen_response", "rejected_response"], "chosen: chosen_response"),
        (["preferred", "dispreferred"], "chosen: preferred, rejected: dispreferred"),
    ],
)
def test_columns_of_other_tools_get_one_message(columns, said):
    with pytest.raises(ValueError, match=said):
        check_columns(columns)


@pytest.mark.parametrize(
    "columns",
    [
        ["prompt", "chosen", "responses", "scores"],
        ["messages", "rejected_response", "response"],
        ["chosen_ids"],
        ["text"],
    ],
)
def test_columns_that_are_read_or_unknown_are_left_to_the_rows(columns):
    check_columns(columns)
