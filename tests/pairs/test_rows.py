"""Every accepted shape of a row, and the error of every shape that is not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_trl.pairs.rows import ChatPair, RowError, TextPair, is_empty, row_to_pair


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


CHAT = ChatPair([user("q")], [bot("good")], [bot("bad")])
TEXT = TextPair("q", "good", "bad")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"chosen": [user("q"), bot("good")], "rejected": [user("q"), bot("bad")]}, CHAT),
        ({"prompt": "q", "chosen": [bot("good")], "rejected": [bot("bad")]}, CHAT),
        ({"prompt": [user("q")], "chosen": [bot("good")], "rejected": [bot("bad")]}, CHAT),
        ({"prompt": [user("q")], "chosen": "good", "rejected": "bad"}, CHAT),
        # UltraFeedback repeats the prompt beside the whole conversation; some sets repeat it as messages.
        ({"prompt": "q", "chosen": [user("q"), bot("good")], "rejected": [user("q"), bot("bad")]}, CHAT),
        ({"prompt": [user("q")], "chosen": [user("q"), bot("good")], "rejected": [user("q"), bot("bad")]}, CHAT),
        ({"instruction": "q", "chosen": "good", "rejected": "bad"}, CHAT),
        ({"question": "q", "chosen": "good", "rejected": "bad"}, CHAT),
        ({"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"}, CHAT),
        (
            {"instruction": "sum up", "input": "a text", "output": "x", "chosen": "good", "rejected": "bad"},
            ChatPair([user("sum up\n\na text")], [bot("good")], [bot("bad")]),
        ),
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, TEXT),
        # CSV holds messages as their JSON.
        (
            {
                "prompt": "q",
                "chosen": '[{"role": "assistant", "content": "good"}]',
                "rejected": '[{"role": "assistant", "content": "bad"}]',
            },
            CHAT,
        ),
        # A prompt that the lists do not hold comes after the system turn, and before an answer that others follow.
        (
            {"prompt": "q", "chosen": [system("s"), bot("good")], "rejected": [system("s"), bot("bad")]},
            ChatPair([system("s"), user("q")], [bot("good")], [bot("bad")]),
        ),
        (
            {
                "prompt": "q",
                "chosen": [bot("a"), user("more"), bot("good")],
                "rejected": [bot("a"), user("more"), bot("bad")],
            },
            ChatPair([user("q"), bot("a"), user("more")], [bot("good")], [bot("bad")]),
        ),
        (
            {"prompt": [system("s")], "chosen": [user("q"), bot("good")], "rejected": [user("q"), bot("bad")]},
            ChatPair([system("s"), user("q")], [bot("good")], [bot("bad")]),
        ),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
            TextPair("\n\nHuman: q\n\nAssistant:", " good", " bad"),
        ),
        # Arrow fills absent keys of messages, and absent columns, with None.
        (
            {
                "chosen": [{**user("q"), "tool_calls": None}, {**bot("good"), "tool_calls": None}],
                "rejected": [{**user("q"), "tool_calls": None}, {**bot("bad"), "tool_calls": None}],
                "prompt": None,
            },
            CHAT,
        ),
    ],
)
def test_accepted_shape(row, expected):
    assert row_to_pair(row) == expected


@pytest.mark.parametrize("row", [{"chosen": [user("q"), bot("good")]}, {"prompt": "q", "chosen": [bot("good")]}])
def test_row_without_rejected_is_for_the_nll_alone(row):
    assert row_to_pair(row) == ChatPair([user("q")], [bot("good")], None)
    assert row_to_pair({**row, "rejected": None}).rejected is None


def test_prompt_is_every_turn_but_the_last():
    turns = [{"role": "system", "content": "s"}, user("q1"), bot("a1"), user("q2")]
    pair = row_to_pair({"chosen": [*turns, bot("good")], "rejected": [*turns, bot("bad")]})
    assert pair == ChatPair(turns, [bot("good")], [bot("bad")])


def test_strings_as_messages():
    assert row_to_pair({"prompt": "q", "chosen": "good", "rejected": "bad"}, strings_as_messages=True) == CHAT
    transcript = {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "good", "rejected": "bad"}
    assert row_to_pair(transcript, strings_as_messages=True) == CHAT
    dialogue = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: q\n\nAssistant: "
    pair = row_to_pair({"chosen": dialogue + "good", "rejected": dialogue + "bad"}, strings_as_messages=True)
    assert pair == ChatPair([user("hi"), bot("hello"), user("q")], [bot("good")], [bot("bad")])


@pytest.mark.parametrize(
    ("row", "column", "expected", "received"),
    [
        ({"prompt": "q", "rejected": "bad"}, "chosen", "a string or a list of messages", "`prompt`, `rejected`"),
        ({"prompt": "q", "chosen": 3, "rejected": "bad"}, "chosen", "a string or a list of messages", "int 3"),
        ({"prompt": "q", "chosen": "good", "rejected": 3.5}, "rejected", "a string or a list", "float 3.5"),
        ({"prompt": "q", "chosen": "good", "rejected": [bot("bad")]}, "rejected", "the type of `chosen`", "a list"),
        ({"chosen": "good", "rejected": "bad"}, "prompt", "`instruction`", "`chosen`, `rejected`"),
        ({"prompt": {"a": 1}, "chosen": "good", "rejected": "bad"}, "prompt", "a string or a list", "dict"),
        ({"prompt": [], "chosen": "good", "rejected": "bad"}, "prompt", "at least one message", "an empty list"),
        ({"instruction": 7, "chosen": "good", "rejected": "bad"}, "instruction", "a string", "int 7"),
        ({"instruction": "q", "input": 7, "chosen": "good", "rejected": "bad"}, "input", "a string", "int 7"),
        ({"chosen": [bot("good")], "rejected": [bot("bad")]}, "prompt", "the first turns of `chosen`", "one turn"),
        (
            {"prompt": [system("s"), user("q")], "chosen": [user("q"), bot("good")]},
            "prompt", "the first turns of `chosen`", "other turns",
        ),
        ({"prompt": "q", "chosen": "[{'role': 'assistant', 'content': 'a'}]"}, "chosen", "as JSON", "'role'"),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: thanks"},
            "chosen", "ends with the assistant's answer", "the human's",
        ),
        ({"chosen": "You are X.\n\nHuman: q\n\nAssistant: a"}, "prompt", "from '\\n\\nHuman:'", "`chosen`"),
        ({"prompt": "q", "chosen": [], "rejected": [bot("bad")]}, "chosen", "end with an assistant", "an empty list"),
        ({"chosen": [bot("x"), user("q")], "rejected": [user("q")]}, "chosen", "end with an assistant", "'user'"),
        ({"prompt": "q", "chosen": ["good"], "rejected": ["bad"]}, "chosen", "`role` and `content`", "position 0"),
        ({"prompt": "q", "chosen": [{"from": "gpt"}], "rejected": []}, "chosen", "`content`", "position 0"),
        ({"prompt": "q", "chosen": [{"role": "assistant"}], "rejected": []}, "chosen", "`content`", "position 0"),
        ({"prompt": "q", "chosen": [{**bot("good"), "tool_calls": 1}]}, "chosen", "`tool_calls`", "int 1 at"),
        (
            {"chosen": [user("q"), bot("good")], "rejected": [user("another"), bot("bad")]},
            "rejected", "the turns of `chosen`", "position 0",
        ),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"},
            "rejected", "the turns of `chosen`", "another dialogue",
        ),
    ],
)  # fmt: skip
def test_malformed_row_names_column_expectation_and_finding(row, column, expected, received):
    """TRL answers these with a bare KeyError or IndexError, or discards the prompt (known failure 17)."""
    with pytest.raises(RowError) as error:
        row_to_pair(row)
    assert error.value.column == column
    assert expected in error.value.expected
    assert received in error.value.received


@pytest.mark.parametrize("response", ["", " \n", bot(""), bot("  ")])
def test_empty_responses(response):
    assert is_empty(response if isinstance(response, str) else [response])


@pytest.mark.parametrize("response", ["a", bot("a"), {"role": "assistant", "tool_calls": [{"function": {}}]}])
def test_responses_that_are_not_empty(response):
    assert not is_empty(response if isinstance(response, str) else [response])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": VALUES}), max_size=3
)
COLUMNS = st.sampled_from(["prompt", "chosen", "rejected", "instruction", "question", "input"])


@given(st.dictionaries(COLUMNS, VALUES | MESSAGES), st.booleans())
def test_any_row_is_read_or_refused_by_name(row, strings_as_messages):
    try:
        pair = row_to_pair(row, strings_as_messages)
    except RowError as error:
        assert error.column in str(error)
    else:
        is_empty(pair.chosen)
