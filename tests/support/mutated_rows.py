"""Rows of every accepted shape, changed at random: wrong types, nulls, lists in lists, halves of characters, …

The same seed gives the same rows. Each text of a row has a word of its own, such as `w17q`.
"""

import copy
import json
import random
import re
from collections.abc import Iterator
from itertools import count
from typing import Any

_TOOL = {"type": "function", "function": {"name": "g", "parameters": {"type": "object", "properties": {}}}}
_COLUMNS = (
    "prompt chosen rejected instruction question input system history conversations messages rejected_response "
    "rejected_messages tools documents chat_template_kwargs prompt_ids chosen_ids rejected_ids image images audio "
    "videos completion label response_w score source text id"
).split()
_KEYS = "role content from value tool_calls reasoning_content thinking name text type function arguments weight".split()
_NUMBERS: list[Any] = [0, 1, -1, 2**63, 2**70, -(2**70), 3.5, float("nan"), float("inf"), True, False]
_TEXTS: list[Any] = [
    *("", "\0", "\ud800", "\udfff x", "a" * 100_000, "w\n" * 50_000, "e\u0301 \U0001f600 \u202e \ufeff", 'x"y, z\r\n'),
    *("null", "None", "<image> x", "[INST] x [/INST]", "<|user|>\nx</s>\n", "x</s>", "{{ 7*7 }}", "{% raw %}"),
    *('[{"role": "user", "content": "x"}]', "[{'role': 'user', 'content': 'x'}]", '[{"role": "user", "content": "x"'),
    *('{"role": "assistant", "content": "x"}', '{"a": 1}', '["x"]', "[1, 2]"),
]
_LISTS: list[Any] = [
    *([], {}, [[]], [[[["x"]]]], [None], [{}], [1, 2, 3], [4, -1], [4, 999_999], [4, "5"], [4.0], [True]),
    *([["user", "x"]], {"a": {"b": {"c": [{"d": None}]}}}, [{"name": "f"}], [{"function": {"name": 3}}]),
    [{"type": "function", "function": {"name": "f", "parameters": {"x": [None, 1, "a"]}}}],
]
_TURNS: list[Any] = [
    *({"role": "user"}, {"role": "user", "content": "x"}, {"content": "x"}, [{"role": None}]),
    *([{"role": "wizard", "content": "x"}], [{"role": 3, "content": "x"}], [{"role": "user", "content": 3}]),
    *([{"role": "user", "content": part}] for part in (None, [{"type": "image"}], [{"type": "text"}], ["x"], [[]])),
    *([{"from": "human", "value": "x"}], [{"from": "cow", "value": "x"}], [{"from": "gpt", "value": None}]),
    {"from": "function_call", "value": "{"},
    *([{"role": "assistant", "content": "x", "tool_calls": calls}] for calls in ([], ["x"], {"name": "f"})),
    [{"role": "assistant", "tool_calls": [{"function": {"name": None, "arguments": [1, None, {"a": None}]}}]}],
    *([{"role": "assistant", "content": "x", key: ["x"]}] for key in ("reasoning_content", "thinking")),
]
_ODD = [None, *_NUMBERS, *_TEXTS, *_LISTS, *_TURNS]


def words(value: Any) -> set[str]:
    """The words of all texts in a value."""
    return set(re.findall(r"w\d+q", value if isinstance(value, str) else repr(value)))


def rows_of_each_shape(first: int = 0) -> list[dict[str, Any]]:
    """A row of each accepted shape, with words that are numbered from `first` on."""
    numbers = count(first)

    def text() -> str:
        return f"w{next(numbers)}q moo"

    def user(content: Any = None) -> dict[str, Any]:
        return {"role": "user", "content": content or text()}

    def answer(**more: Any) -> dict[str, Any]:
        return {"role": "assistant", "content": text(), **more}

    def answers() -> dict[str, Any]:
        return {"chosen": text(), "rejected": text()}

    system, asked, whole, repeated = {"role": "system", "content": text()}, user(), user(), text()
    dialogue = f"\n\nHuman: {text()}\n\nAssistant: "
    call = {"type": "function", "function": {"name": f"f{text()[:-4]}", "arguments": {"field": text(), "least": 12}}}
    result = {"role": "tool", "content": text()}
    calling = [{"role": "assistant", "content": "", "tool_calls": [call]}, result, answer()]
    tools = [{**_TOOL, "function": {**_TOOL["function"], "description": text()}}]
    parts = [{"type": "text", "text": text()}, {"type": "text", "text": text()}]
    documents = [{"title": text(), "text": text()}]
    said = [{"from": "human", "value": text()}]
    gpt = {side: {"from": "gpt", "value": text()} for side in ("chosen", "rejected")}
    return [
        {"prompt": text(), **answers()},
        {"prompt": [user()], "chosen": [answer()], "rejected": [answer()]},
        {"prompt": [system, user()], **answers()},
        {"chosen": [system, asked, answer()], "rejected": [system, asked, answer()]},
        {"prompt": repeated, "chosen": [user(repeated), answer()], "rejected": [user(repeated), answer()]},
        {"instruction": text(), "input": text(), **answers()},
        {"system": text(), "history": [[text(), text()]], "question": text(), **answers()},
        {"conversations": said, **gpt},
        {"messages": [user(), answer()], "rejected_response": text()},
        {"messages": [whole, answer()], "rejected_messages": [whole, answer()]},
        {"prompt": [user()], "chosen": calling, "rejected": [answer()], "tools": tools},
        {"question": text(), **answers(), "documents": documents, "chat_template_kwargs": {"date": text()}},
        {"chosen": dialogue + text(), "rejected": dialogue + text()},
        {"prompt_ids": [4, 83, 85, 6], "chosen_ids": [83, 85, 2], "rejected_ids": [72, 2]},
        {
            "prompt": [user(parts)],
            "chosen": [answer(reasoning_content=text())],
            "rejected": [answer(reasoning_content=text())],
        },
    ]


def mutated_rows(size: int, seed: int) -> list[dict[str, Any]]:
    """`size` rows, each of some shape and changed one to three times."""
    random_ = random.Random(seed)
    rows: list[dict[str, Any]] = []
    while len(rows) < size:
        row = copy.deepcopy(random_.choice(rows_of_each_shape(100 * len(rows))))
        for _ in range(random_.choice([1, 1, 1, 2, 3])):
            _mutate(random_, row)
        if row:
            rows.append(row)
    return rows


def _mutate(random_: random.Random, row: dict[str, Any]) -> None:
    """Change a row at a random place."""
    places = list(_places(row))
    if not places:
        return
    parent, key = random_.choice(places)
    value, odd = parent[key], copy.deepcopy(random_.choice(_ODD))
    change = random_.choice(["odd", "odd", "odd", "column", "delete", "key", "double", "string", "nest", "rename"])
    if change == "column":
        row[random_.choice(_COLUMNS)] = odd
    elif change == "delete":
        del parent[key]
    elif change == "key" and isinstance(value, dict):
        value[random_.choice(_KEYS)] = odd
    elif change == "double" and isinstance(value, (list, str)):
        parent[key] = value + copy.deepcopy(value)
    elif change == "string":
        parent[key] = json.dumps(value)
    elif change == "nest":
        parent[key] = [value]
    elif change == "rename":
        row[random_.choice(_COLUMNS)] = row.pop(random_.choice(list(row)))
    else:
        parent[key] = odd


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each key of a mapping and each position of a list in a value, with what it is in."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])
