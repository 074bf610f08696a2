"""Generated conversations under generated templates: every word of a row is in its ids, or the preparation names it.

Each text of a row has words of its own, such as `w17q`. Which of them reached the ids is counted in the decoded ids, by
code that knows of the row and the ids alone.
"""

import json
import re
from itertools import count
from typing import Any, NamedTuple

from hypothesis import event, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from orpo_trl.pairs.tokenize import PairRules, tokenize_rows
from tests.support.small import REPOSITORY

TOKENIZER = AutoTokenizer.from_pretrained(REPOSITORY / "recipes" / "quickstart" / "model")


# ---- Conversations ---------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """Words that belong together: what is said where none of them, or not all of them, are in the ids of `side`."""

    kind: str
    side: str
    words: frozenset[str]


class Row(NamedTuple):
    columns: dict[str, Any]
    texts: list[Text]


GAPS = st.sampled_from([" ", "\n", "\n\n", "  ", "\t", ' "', " & ", " <b>", " é ", " 'x' ", " \\ ", ", "])
EDGES = st.sampled_from(["", "", "", " ", "\n", "  \n"])


class Writer:
    """Draws a row, and notes each of its texts."""

    def __init__(self, draw):
        self.draw, self.numbers, self.texts = draw, count(), []

    def some(self, *choices):
        return self.draw(st.sampled_from(choices))

    def text(self, kind: str, side: str, is_plain: bool = False) -> str:
        words = [f"w{next(self.numbers)}q" for _ in range(1 if is_plain else self.some(1, 1, 2, 3))]
        self.texts.append(Text(kind, side, frozenset(words)))
        if is_plain:
            return words[0]
        text = words[0]
        for word in words[1:]:
            text += self.draw(GAPS) + word
        return self.draw(EDGES) + text + self.draw(EDGES)

    def content(self, kind: str, side: str) -> Any:
        if self.some(*[False] * 5, True):
            parts = [self.text(kind, side) for _ in range(self.some(1, 2))]
            self._join(len(parts))
            return [{"type": "text", "text": part} for part in parts]
        return self.text(kind, side)

    def _join(self, size: int) -> None:
        """The last texts are parts of one."""
        last = self.texts[-size:]
        self.texts[-size:] = [last[0]._replace(words=frozenset().union(*(text.words for text in last)))]

    def answer(self, side: str, is_trained: bool) -> dict[str, Any]:
        kind, thoughts = ("answer shortened", "reasoning lost") if is_trained else (
            "earlier answer lost", "thoughts of earlier turns left out")  # fmt: skip
        turn = {"role": "assistant"}
        place = self.some("none", "none", "key", "text")
        if place == "key":
            turn[self.some("reasoning_content", "thinking", "reasoning")] = self.text(thoughts, side)
        head = f"<think>{self.text(thoughts, side)}</think>" if place == "text" else ""
        turn["content"] = head + self.text(kind, side) if head else self.content(kind, side)
        return turn

    def call(self, side: str) -> list[dict[str, Any]]:
        """A turn that calls a tool, and the tool's result."""
        name = self.text("tool call lost", side, is_plain=True)
        arguments = {
            self.text("tool call lost", side, is_plain=True): self.text("tool call lost", side)
            for _ in range(self.some(0, 1, 2))
        }
        arguments = json.dumps(arguments) if self.some(False, False, True) else arguments
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        result = {"role": "tool", "content": self.text("tool result lost", side)}
        return [{"role": "assistant", "content": "", "tool_calls": [call]}, result]

    def prompt(self) -> list[dict[str, Any]]:
        turns = []
        for _ in range(self.some(0, 0, 1, 2)):
            turns.append({"role": "user", "content": self.content("user text lost", "prompt")})
            turns += self.call("prompt") if self.some(False, False, True) else []
            turns.append(self.answer("prompt", is_trained=False))
        turns.append({"role": "user", "content": self.content("user text lost", "prompt")})
        return turns

    def response(self, side: str) -> list[dict[str, Any]]:
        calls = self.call(side) if self.some(False, False, False, True) else []
        return [*calls, self.answer(side, is_trained=True)]

    def tools(self) -> list[dict[str, Any]]:
        name = self.text("tools not rendered", "prompt", is_plain=True)
        described = {"name": name, "description": self.text("tools not rendered", "prompt", is_plain=True)}
        return [{"type": "function", "function": described}]

    def documents(self) -> list[dict[str, str]]:
        # Not "x": some answers have one in quotes.
        return [{"title": self.text("documents not rendered", "prompt"), "text": "z"}]


@st.composite
def rows(draw) -> Row:
    writer = Writer(draw)
    columns: dict[str, Any] = {}
    system = writer.some("none", "none", "turn", "column")
    text = writer.content("system text lost", "prompt") if system == "turn" else ""
    if system == "column":
        columns["system"] = writer.text("system text lost", "prompt")
    columns["prompt"] = [*([{"role": "system", "content": text}] if text else []), *writer.prompt()]
    columns |= {side: writer.response(side) for side in ("chosen", "rejected")}
    if writer.some(False, False, True):
        columns["tools"] = writer.tools()
    if writer.some(False, False, False, True):
        columns["documents"] = writer.documents()
    return Row(columns, writer.texts)


# ---- Templates -------------------------------------------------------------------------------------------------------

# Each piece is one of several; `text` is the content of a turn, which the pieces change before it is written.
THOUGHTS = {
    "kept": "",
    "stripped": "{% if '</think>' in text %}{% set text = text.split('</think>')[-1] %}{% endif %}",
    "stripped before the last user turn": (
        "{% if '</think>' in text and loop.index0 < ns.last %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    ),
    "stripped before the last turn": (
        "{% if '</think>' in text and not loop.last %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    ),
}
REASONING = {
    "unknown": "",
    "known": "{% for key in ('reasoning_content', 'thinking', 'reasoning') if m[key] %}<think>{{ m[key] }}</think>"
    "{% endfor %}",
    "of one name": "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content | trim }}\n</think>\n\n{% endif %}",
    "of the last turn": (
        "{% if loop.index0 > ns.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    ),
}
WRITTEN = {
    "as it is": "{{ text }}",
    "trimmed": "{{ text | trim }}",
    "escaped": "{{ text | e }}",
    "as JSON": "{{ text | tojson }}",
    "its first word": "{{ text.split()[0] if text.split() else '' }}",
}
CALLS = {
    "unknown": "",
    "as JSON": "{{ m.tool_calls | tojson }}",
    "as JSON in JSON": "{{ m.tool_calls | tojson | tojson }}",
    "arguments first": "{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{{ c.function.name }}"
    "{% endfor %}",
    "arguments sorted": "{% for c in m.tool_calls %}{{ c.function.name }}{% if c.function.arguments is mapping %}"
    "{% for key, value in c.function.arguments | dictsort(reverse=true) %}<{{ key }}>{{ value }}</{{ key }}>"
    "{% endfor %}{% else %}{{ c.function.arguments }}{% endif %}{% endfor %}",
    "names alone": "{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}",
}
SYSTEM = {
    "kept": "{% if m.role == 'system' %}<|system|>\n{{ text }}</s>\n{% endif %}",
    "lost": "",
    "in the first user turn": "{% if m.role == 'user' and ns.system and ns.first == loop.index0 %}"
    "{% set text = ns.system + '\n\n' + text %}{% endif %}",
    "in the last user turn": "{% if m.role == 'user' and ns.system and ns.last == loop.index0 %}"
    "{% set text = ns.system + '\n\n' + text %}{% endif %}",
    "in a last turn of the user": "{% if m.role == 'user' and ns.system and loop.last %}"
    "{% set text = ns.system + '\n\n' + text %}{% endif %}",
}
TOOLS = {
    "unknown": "",
    "known": "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}",
    "names alone": "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}",
}
DOCUMENTS = {"unknown": "", "known": "{% if documents %}{{ documents | tojson }}{% endif %}"}
RESULTS = {"kept": "{% if m.role == 'tool' %}<tool>{{ text }}</tool>\n{% endif %}", "lost": ""}
GENERATION = {"plain": "", "with a thought": "<think>\n", "with an empty thought": "<think>\n\n</think>\n\n"}

PIECES = {
    "thoughts": THOUGHTS, "reasoning": REASONING, "written": WRITTEN, "calls": CALLS, "system": SYSTEM, "tools": TOOLS,
    "documents": DOCUMENTS, "results": RESULTS, "generation": GENERATION,
}  # fmt: skip
HEAD = (
    "{% set ns = namespace(last=-1, first=-1, system='') %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% if ns.first < 0 %}{% set ns.first = loop.index0 %}{% endif %}"
    "{% elif m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% endfor %}"
)


def template(names: dict[str, str]) -> str:
    piece = {part: PIECES[part][name] for part, name in names.items()}
    answer = f"{piece['thoughts']}<|assistant|>\n{piece['reasoning']}{piece['written']}"
    calls = f"{{% if m.tool_calls %}}{piece['calls']}{{% endif %}}"
    return (
        f"{HEAD}{piece['tools']}{piece['documents']}"
        "{% for m in messages %}{% set text = m.content or '' %}"
        f"{piece['system']}"
        f"{{% if m.role == 'user' %}}<|user|>\n{piece['written']}</s>\n{{% endif %}}"
        f"{piece['results']}"
        f"{{% if m.role == 'assistant' %}}{answer}{calls}</s>\n{{% endif %}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}<|assistant|>\n{piece['generation']}{{% endif %}}"
    )


HARMLESS = ("kept", "known", "as it is", "plain", "as JSON")
# A harmless choice is drawn as often as all others together.
TEMPLATES = st.fixed_dictionaries(
    {
        part: st.sampled_from([name for name in names if name in HARMLESS]) | st.sampled_from(list(names))
        for part, names in PIECES.items()
    }
)

# ---- The comparison --------------------------------------------------------------------------------------------------

_WORD = re.compile(r"w\d+q").findall
_CHANGED = "rendered otherwise once a response follows"


def words_of_ids(ids: list[int]) -> set[str]:
    return set(_WORD(TOKENIZER.decode(ids)))


@given(rows(), TEMPLATES)
@settings(max_examples=200)
def test_every_word_is_in_the_ids_or_named(row, names):
    TOKENIZER.chat_template = template(names)
    found = tokenize_rows({name: [value] for name, value in row.columns.items()}, TOKENIZER, PairRules())
    found = {name: values[0] for name, values in found.items()}
    event(found["status"])
    remarks = json.loads(found["remarks"] or "[]")
    named = {(kind, word) for kind, words in remarks if not kind.endswith(_CHANGED) for word in _WORD(words)}
    if found["status"] != "kept":
        assert found["status"] != "malformed", found["problem"]
        assert remarks  # the rows have words on both sides, which are lost where nothing is left of a side
        return
    in_prompt = words_of_ids(found["prompt_ids"])
    in_ids = {side: words_of_ids(found["prompt_ids"] + found[f"{side}_ids"]) for side in ("chosen", "rejected")}
    lost, is_moved = set(), False
    for kind, side, words in row.texts:
        missing = words - (in_ids["chosen"] & in_ids["rejected"] if side == "prompt" else in_ids[side])
        is_moved |= side == "prompt" and not missing and not words <= in_prompt
        lost |= {(kind, word) for word in words} if missing else set()
    assert named == lost
    assert any(kind.endswith(_CHANGED) for kind, _ in remarks) == is_moved
