"""Rows as other tools write them."""

import pytest

from orpo_trl.pairs.foreign_rows import check_columns
from orpo_trl.pairs.rows import ChatPair, RowError, row_to_pair


def turn(role, text):
    return {"role": role, "content": text}


USER, GOOD, BAD, SYSTEM = turn("user", "q"), turn("assistant", "good"), turn("assistant", "bad"), turn("system", "s")
CHAT = ChatPair([USER], [GOOD], [BAD])
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}
ANSWERS = {"chosen": "good", "rejected": "bad"}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "bad"}}, CHAT),
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
        ({"conversations": [{"from": "nobody", "value": "q"}], **ANSWERS}, "prompt"),
        ({"question": "q", "tools": [3], **ANSWERS}, "tools"),
    ],
)
def test_row_is_refused_by_column(row, column):
    with pytest.raises(RowError) as error:
        row_to_pair(row)
    assert error.value.column == column


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
    ],
)
def test_columns_of_other_tools_get_one_message(columns, said):
    with pytest.raises(ValueError, match=said):
        check_columns(columns)
