"""What a chat template leaves out of a row is found, and nothing else is taken for lost."""

import logging
import time

import pytest
from datasets import Dataset, IterableDataset
from support.templates import TEMPLATES

from orpo_trl.pairs import template_limits
from orpo_trl.pairs.prepare import UnrenderedRowsError, prepare_pairs
from orpo_trl.pairs.rendering import EARLIER_THOUGHTS, render
from orpo_trl.pairs.rows import ChatPair, RowError
from orpo_trl.pairs.tokenize import EMPTY_CHOSEN, PairRules

# As Mistral-7B-Instruct-v0.3: the system text stands in the last user turn, and only where that turn ends the talk.
SYSTEM_IN_LAST_TURN = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
    "{% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As the distillations of DeepSeek-R1: thoughts are cut off every answer.
NO_THOUGHTS = CHATML.replace("m['content'] | trim", "m['content'].split('</think>')[-1] | trim")
SYSTEM = {"role": "system", "content": "Speak as a pirate does."}
USER = {"role": "user", "content": "What does a cow say?"}


def answer(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def row(chosen: dict, rejected: dict, *prompt: dict, **more) -> dict:
    return {"prompt": list(prompt or (USER,)), "chosen": [chosen], "rejected": [rejected], **more}


def prepare(tokenizer, rows: list[dict], template: str, **kwargs):
    tokenizer.chat_template = template
    return prepare_pairs(Dataset.from_list(rows), tokenizer, PairRules(), **kwargs)


def kinds(tokenizer, one: dict, template: str) -> set[str]:
    tokenizer.chat_template = template
    pair = ChatPair(one["prompt"], one["chosen"], one["rejected"], one.get("options", {}))
    return {loss.kind for loss in render(pair, tokenizer).losses}


def test_system_text_that_only_a_last_user_turn_gets_is_lost_and_quoted(tokenizer, caplog):
    one = row(answer("Arr, moo."), answer("Moo."), SYSTEM, USER)
    _, report = prepare(tokenizer, [one], SYSTEM_IN_LAST_TURN)
    remarks = report.sources["train"].remarks
    assert remarks["system text lost"].words == SYSTEM["content"]
    assert "user turn rendered otherwise once a response follows" in remarks
    warning = next(text for text in caplog.messages if "system text lost" in text)
    assert warning == "train: system text lost in 1 row, first in row 0: 'Speak as a pirate does.'"
    escaped = SYSTEM_IN_LAST_TURN.replace("m['content'] }}[/INST]", "m['content'] | e }}[/INST]")
    one = row(answer("Arr, yes."), answer("Yes."), SYSTEM, {"role": "user", "content": "Is 1 < 2?"})
    assert kinds(tokenizer, one, escaped) == {
        "system text lost", "user turn rendered otherwise once a response follows"
    }  # fmt: skip
    # The last turn of a prompt that a template cuts, and writes in full once an answer follows, is not lost.
    cut = SYSTEM_IN_LAST_TURN.replace("{{ m['content'] }}[/INST]", "{{ '' if loop.last else m['content'] }}[/INST]")
    one = row(answer("Arr, yes."), answer("Yes."), SYSTEM, USER)
    assert kinds(tokenizer, one, cut) == {"system text lost", "user turn rendered otherwise once a response follows"}
    # Without a system turn the same template loses nothing.
    assert not kinds(tokenizer, row(answer("Moo."), answer("No.")), SYSTEM_IN_LAST_TURN)


@pytest.mark.parametrize("text", ["think", "a", "Moo."])
def test_text_that_the_header_of_the_answer_repeats_is_not_rendered_otherwise(tokenizer, text):
    """As the distillations of DeepSeek-R1, whose header of an answer that is to come begins a thought."""
    template = NO_THOUGHTS.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    one = row(answer("Moo."), answer("No."), {"role": "user", "content": text})
    assert kinds(tokenizer, one, template) == set()


def test_actions(tokenizer, caplog):
    rows = [row(answer("Moo."), answer("No.")), row(answer("Arr, moo."), answer("Moo."), SYSTEM, USER)]
    with pytest.raises(UnrenderedRowsError, match="system text lost in 1 row, first in row 1: 'Speak as a pirate"):
        prepare(tokenizer, rows, SYSTEM_IN_LAST_TURN, on_unrendered="error")
    pairs, report = prepare(tokenizer, rows, SYSTEM_IN_LAST_TURN, on_unrendered="drop")
    assert pairs["orpo_row"][:] == [0]
    assert report.sources["train"].dropped == {"words left out by the chat template": 1}
    streamed, _ = prepare_pairs(IterableDataset.from_generator(lambda: iter(rows)), tokenizer, PairRules())
    caplog.clear()
    assert [pair["orpo_row"] for pair in streamed] == [0, 1]
    assert any("row 1: system text lost: 'Speak as a pirate does.'" in text for text in caplog.messages)
    dropped, _ = prepare_pairs(
        IterableDataset.from_generator(lambda: iter(rows)), tokenizer, PairRules(), on_unrendered="drop"
    )
    assert [pair["orpo_row"] for pair in dropped] == [0]


def test_thoughts_that_are_cut_off_the_answer_are_lost(tokenizer):
    one = row(answer("<think>Cows moo.</think>Moo."), answer("<think>Cats meow.</think>Moo."))
    pairs_report = prepare_pairs_or_error(tokenizer, one, NO_THOUGHTS)
    assert "reasoning lost" in pairs_report
    assert kinds(tokenizer, one, CHATML) == set()


def prepare_pairs_or_error(tokenizer, one: dict, template: str) -> str:
    """The report, also where no row is left."""
    tokenizer.chat_template = template
    try:
        return str(prepare_pairs(Dataset.from_list([one]), tokenizer, PairRules())[1])
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_beside_the_answer_that_the_template_does_not_know_are_lost(tokenizer, key):
    one = row(answer("Moo.", **{key: "Cows moo."}), answer("No.", **{key: "Dogs bark."}))
    assert kinds(tokenizer, one, CHATML) == {"reasoning lost"}
    knows = CHATML.replace("{{ m['content'] | trim }}", f"{{{{ m['{key}'] }}}}{{{{ m['content'] }}}}")
    assert kinds(tokenizer, one, knows) == set()


def test_answer_of_thoughts_alone_is_empty_where_the_template_does_not_know_them(tokenizer):
    one = row(answer("", reasoning_content="Cows moo."), answer("No."))
    report = prepare_pairs_or_error(tokenizer, one, CHATML)
    assert f"dropped, {EMPTY_CHOSEN}: 1" in report
    assert "reasoning lost" in report


def test_thoughts_of_earlier_turns_are_counted_without_a_warning(tokenizer, caplog):
    earlier = [USER, answer("<think>Hm.</think>Moo."), {"role": "user", "content": "And a cat?"}]
    _, report = prepare(tokenizer, [row(answer("Meow."), answer("No."), *earlier)], NO_THOUGHTS)
    assert report.sources["train"].remarks[EARLIER_THOUGHTS].count == 1
    assert not caplog.messages


def test_tool_calls_tools_and_documents_that_the_template_does_not_know_are_lost(tokenizer):
    call = {"type": "function", "function": {"name": "count_cows", "arguments": {"field": "north", "least": 12}}}
    one = row(answer("Let me look.", tool_calls=[call]), answer("No."))
    tools = [{"type": "function", "function": {"name": "count_cows", "description": "Counts."}}]
    assert kinds(tokenizer, one, CHATML) == {"tool call lost"}
    assert kinds(tokenizer, {**one, "options": {"tools": tools}}, CHATML) == {"tool call lost", "tools not rendered"}
    documents = {"documents": [{"title": "Cows", "text": "They moo."}]}
    assert kinds(tokenizer, {**row(answer("Moo."), answer("No.")), "options": documents}, CHATML) == {
        "documents not rendered"
    }
    # Written as JSON with the keys in another order, and escaped twice, nothing is lost.
    as_json = CHATML.replace(
        "{{ m['content'] | trim }}", "{{ m['content'] }}{{ (m['tool_calls'] or '') | tojson | tojson }}"
    )
    assert kinds(tokenizer, one, as_json) == set()


def test_answer_that_the_template_shortens(tokenizer):
    first_word = CHATML.replace("m['content'] | trim", "m['content'].split()[0]")
    assert "answer shortened" in kinds(tokenizer, row(answer("Moo, said it."), answer("No.")), first_word)


def test_turn_that_is_said_twice_and_rendered_once_is_lost(tokenizer):
    talk = [USER, answer("Moo."), USER]
    once = (
        "{% for m in messages %}{% if not (loop.first and messages | length > 2) %}{{ m['content'] }}\n{% endif %}"
        "{% endfor %}"
    )
    assert "user text lost" in kinds(tokenizer, row(answer("Again."), answer("No."), *talk), once)


@pytest.mark.parametrize(
    ("template", "words"),
    [("{{ 1 / 0 }}", "ZeroDivisionError"), ("{{ messages.nothing.here }}", "UndefinedError")],
)
def test_template_that_trips_names_row_and_reason(tokenizer, template, words):
    with pytest.raises(ValueError, match=rf"train, row 0: .*chat template.*{words}"):
        prepare(tokenizer, [row(answer("Moo."), answer("No."))], template)


def test_template_that_is_no_jinja_is_named(tokenizer):
    with pytest.raises(ValueError, match="The chat template is not valid Jinja"):
        prepare(tokenizer, [row(answer("Moo."), answer("No."))], "{% for %}")


def test_template_that_never_ends_is_stopped(tokenizer, monkeypatch):
    monkeypatch.setattr(template_limits, "TIME_LIMIT", 0.3)
    forever = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}"
    start = time.monotonic()
    with pytest.raises(template_limits.TemplateLimit, match="did not end"):
        prepare(tokenizer, [row(answer("Moo."), answer("No."))], forever)
    assert time.monotonic() - start < 10


def test_text_that_ends_itself_gets_no_second_end(tokenizer):
    tokenizer.chat_template = None
    one = {"prompt": "cow:", "chosen": " moo</s>\n", "rejected": " no"}
    pairs, _ = prepare_pairs(Dataset.from_list([one]), tokenizer, PairRules())
    assert pairs[0]["chosen_ids"].count(tokenizer.eos_token_id) == 1
    assert pairs[0]["rejected_ids"].count(tokenizer.eos_token_id) == 1


def test_text_rows_for_a_chat_model_are_named_in_one_line(tokenizer, caplog):
    one = {"prompt": "cow:", "chosen": " moo", "rejected": " no", "license": "mit"}
    with caplog.at_level(logging.WARNING, "orpo_trl"):
        _, report = prepare_pairs(Dataset.from_list([one] * 3), tokenizer, PairRules())
    assert [text for text in caplog.messages if "`strings_as_messages: true`" in text and "3 rows are text" in text]
    assert report.sources["train"].unread == ["license"]
    assert "columns that nothing reads: license" in str(report)


# ---- No false alarms -------------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "count_cows", "arguments": {"field": 'north "A" & <b>', "least": 12}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "count_cows",
        "description": "Counts the cows of a field.",
        "parameters": {
            "type": "object",
            "properties": {"field": {"type": "string", "description": "Which."}, "least": {"type": "integer"}},
            "required": ["field"],
        },
    },
}
SECOND = {"role": "user", "content": "  And\n\n  a cat?\n"}
CALLED = [USER, answer("", tool_calls=[CALL]), {"role": "tool", "name": "count_cows", "content": "There are 12."}]
LONG = answer("It says **moo**.\n\n- yes\n")
# Name, prompt, response, template options, and what the source of a template holds that knows such a conversation.
CONVERSATIONS = [
    ("one turn", [USER], [LONG], {}, ""),
    ("system", [SYSTEM, USER], [LONG], {}, ""),
    ("three turns", [USER, LONG, SECOND], [answer("Meow.")], {}, ""),
    ("system, three turns", [SYSTEM, USER, LONG, SECOND], [answer("Meow.")], {}, ""),
    ("reasoning_content", [USER], [answer("Moo.", reasoning_content="Cows moo.")], {}, "reasoning_content"),
    ("thinking", [USER], [answer("Moo.", thinking="Cows moo.")], {}, ".thinking"),
    ("thoughts in the text", [USER], [answer("<think>\nCows moo.\n</think>\n\nMoo it is.")], {}, ""),
    ("earlier thoughts", [USER, answer("Moo.", reasoning_content="Cows."), SECOND], [answer("Meow.")], {}, ""),
    ("tools", [USER], [answer("Moo.")], {"tools": [TOOL]}, "tools"),
    ("tool call", [USER], [answer("", tool_calls=[CALL])], {"tools": [TOOL]}, "tools"),
    ("after a tool call", CALLED, [answer("There are twelve.")], {"tools": [TOOL]}, "tools"),
    ("answer of three turns", [USER], [*CALLED[1:], answer("There are twelve.")], {"tools": [TOOL]}, "tools"),
]
# What these templates do leave out, by their source, also of what the table above says that they know.
REAL_LOSSES = {
    "deepseek_r1_distill": {"reasoning lost"},  # cuts thoughts off every answer
    "deepseekv3": {"reasoning lost"},
    "deepseekv3_training": {"reasoning lost"},
    "gemma4": {"reasoning lost"},  # writes thoughts before tool calls alone
    "gemma4_v3": {"reasoning lost"},
    "gemma4_v4": {"reasoning lost"},
    "qwen3_instruct_2507_training": {"reasoning lost"},  # names them, and writes none
    "lfm2": {"tool call lost"},  # writes tools and no calls
    "lfm2_training": {"tool call lost"},
}
# Written for content as parts: of a text they write nothing at all.
ALL_REFUSED = ("llava_next", "llava_next_training")
PARTS_ALONE = ("idefics3", "idefics3_training", "smolvlm", "smolvlm_training")


@pytest.mark.parametrize("path", TEMPLATES, ids=[path.stem for path in TEMPLATES])
def test_templates_of_trl_raise_no_false_alarm(tokenizer, path):
    tokenizer.chat_template = path.read_text()
    rendered = set()
    for name, prompt, response, options, needs in CONVERSATIONS:
        if needs not in tokenizer.chat_template:
            continue
        try:
            found = render(ChatPair(prompt, response, None, options), tokenizer)
        except RowError:
            continue  # refused aloud, which is no loss
        rendered.add(name)
        losses = {loss for loss in found.losses if loss.kind != EARLIER_THOUGHTS}
        if path.stem in PARTS_ALONE:
            assert {"answer shortened", "user text lost"} <= {loss.kind for loss in losses}
        else:
            losses = {loss for loss in losses if loss.kind not in REAL_LOSSES.get(path.stem, ())}
            assert losses == set(), (path.stem, name, losses)
    assert ("one turn" in rendered) == (path.stem not in ALL_REFUSED)
