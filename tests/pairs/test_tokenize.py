"""Token ids of a pair: where the response starts, what ends it, and which rows are dropped."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orpo_trl.pairs import tokenize as tokenization
from orpo_trl.pairs.tokenize import (
    CUT_TIE,
    EMPTY_CHOSEN,
    EMPTY_PROMPT,
    EMPTY_REJECTED,
    KEPT,
    LONG_PROMPT,
    MALFORMED,
    NO_ROOM,
    TIE,
    PairRules,
    leading_special_ids,
    tokenize_rows,
)


def tokenize(tokenizer, row: dict, **rules) -> dict:
    columns = tokenize_rows({name: [value] for name, value in row.items()}, tokenizer, PairRules(**rules))
    return {name: values[0] for name, values in columns.items()}


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


CHAT = {"prompt": [{"role": "user", "content": "What does a cow say?"}]}
ROW = {
    **CHAT,
    "chosen": [{"role": "assistant", "content": "A cow says moo."}],
    "rejected": [{"role": "assistant", "content": "Go away."}],
}


def test_conversation_is_what_the_template_writes(tokenizer):
    record = tokenize(tokenizer, ROW)
    assert tokenizer.decode(record["prompt_ids"]) == "<|user|>\nWhat does a cow say?</s>\n<|assistant|>\n"
    assert tokenizer.decode(record["chosen_ids"]) == "A cow says moo.</s>\n"
    assert tokenizer.decode(record["rejected_ids"]) == "Go away.</s>\n"
    assert record["status"] == KEPT
    assert record["length"] == sum(len(record[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))


def test_first_turn_as_prompt_leaves_all_later_turns_to_the_responses(tokenizer):
    talk = [("system", "Be kind."), ("user", "A cow?"), ("assistant", "Moo."), ("user", "And a cat?")]
    talk = [{"role": role, "content": content} for role, content in talk]
    row = {
        side: [*talk, {"role": "assistant", "content": text}]
        for side, text in (("chosen", "Meow."), ("rejected", "No"))
    }
    whole, first = tokenize(tokenizer, row), tokenize(tokenizer, row, prompt_turns="first")
    assert tokenizer.decode(first["prompt_ids"]) == "<|system|>\nBe kind.</s>\n<|user|>\nA cow?</s>\n<|assistant|>\n"
    later = "Moo.</s>\n<|user|>\nAnd a cat?</s>\n<|assistant|>\n"
    assert tokenizer.decode(first["chosen_ids"]) == later + "Meow.</s>\n"
    assert tokenizer.decode(first["rejected_ids"]) == later + "No</s>\n"
    for side in ("chosen_ids", "rejected_ids"):
        assert first["prompt_ids"] + first[side] == whole["prompt_ids"] + whole[side]
    # The length filter sees the first turn alone too.
    limit = len(first["prompt_ids"]) + 1
    assert tokenize(tokenizer, row, max_prompt_length=limit)["status"] == LONG_PROMPT
    assert tokenize(tokenizer, row, max_prompt_length=limit, prompt_turns="first")["status"] == KEPT
    # A single turn is the same either way.
    assert tokenize(tokenizer, ROW, prompt_turns="first") == tokenize(tokenizer, ROW)


def test_end_of_sequence_is_not_doubled_after_a_template_that_ends_with_a_newline(tokenizer):
    """TRL appends a second one to `</s>\\n` (known failure 14)."""
    assert tokenize(tokenizer, ROW)["chosen_ids"].count(tokenizer.eos_token_id) == 1


def test_plain_text_ends_with_one_end_of_sequence(tokenizer):
    record = tokenize(tokenizer, {"prompt": "a cow:", "chosen": " moo", "rejected": " meow</s>"})
    eos = tokenizer.eos_token_id
    assert record["prompt_ids"] == encode(tokenizer, "a cow:")
    assert record["chosen_ids"] == [*encode(tokenizer, " moo"), eos]
    assert record["rejected_ids"] == [*encode(tokenizer, " meow"), eos]


def test_text_that_ends_with_a_turn_of_another_format_gets_no_second_end(tokenizer):
    """Of a tokenizer that was extended, whose end of sequence stayed what it was."""
    row = {"prompt": "a cow:", "chosen": " moo<|im_end|>\n", "rejected": " meow<end_of_turn>"}
    eos = tokenizer.eos_token_id
    spelt = tokenize(tokenizer, row)  # in pieces, at which no answer would ever stop
    assert spelt["chosen_ids"][-1] == spelt["rejected_ids"][-1] == eos
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    own = tokenize(tokenizer, row)
    assert own["chosen_ids"] == encode(tokenizer, " moo<|im_end|>\n")
    assert own["chosen_ids"].count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert own["rejected_ids"][-1] == eos
    # A token in the middle of a text, or another one at its end, ends nothing.
    for text in (" moo<|im_end|> moo", " moo<|user|>"):
        assert tokenize(tokenizer, {**row, "chosen": text})["chosen_ids"][-1] == eos


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": "a \ud83d", "chosen": " moo", "rejected": " meow"}, "prompt"),
        ({"prompt": "a", "chosen": " moo", "rejected": " \udc00meow"}, "rejected"),
        ({"chosen": "a \ud83d moo", "rejected": "a meow"}, "chosen"),
        ({**ROW, "chosen": '[{"role": "assistant", "content": "\\ud83d"}]'}, "chosen"),
        ({**ROW, "rejected": [{"role": "assistant", "content": "", "tool_calls": [{"\ud83d": 1}]}]}, "rejected"),
        ({"conversations": [{"from": "human", "value": "\ud83d"}], "chosen": "a", "rejected": "b"}, "conversations"),
        ({"question": "\ud83d", "chosen": "a", "rejected": "b"}, "question"),
        ({"question": "q", "system": "\ud83d", "chosen": "a", "rejected": "b"}, "system"),
        ({**ROW, "tools": '[{"name": "f", "description": "\\ud83d"}]'}, "tools"),
    ],
)
def test_halves_of_characters_are_malformed_by_column(tokenizer, row, column):
    """The tokenizer refuses the whole batch for one of them, without a name."""
    record = tokenize(tokenizer, row)
    assert record["status"] == MALFORMED
    assert f"column `{column}`: expected text without lone surrogates" in record["problem"]
    record["problem"].encode()


def test_words_of_a_template_that_no_text_can_hold_are_escaped(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('\ud83d') }}"
    assert "\\ud83d" in tokenize(tokenizer, ROW)["problem"]


def test_control_characters_and_whole_characters_are_text(tokenizer):
    row = {"prompt": "a\0cow:", "chosen": " \0moo 😀", "rejected": "\0\x01\x7f"}
    record = tokenize(tokenizer, row)
    assert record["status"] == KEPT
    assert tokenizer.decode(record["prompt_ids"] + record["chosen_ids"]) == "a\0cow: \0moo 😀</s>"
    assert tokenize(tokenizer, row, strings_as_messages=True)["status"] == KEPT


@pytest.mark.parametrize("number", [2**63, -(2**80), 10**4000], ids=["64 bits", "negative", "4,001 digits"])
def test_numbers_above_64_bits_in_a_row_are_rendered(tokenizer, number):
    tokenizer.chat_template = "{{ messages | tojson }}{{ tools | tojson }}"
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": number}}}]}
    tools = [{"name": "f", "parameters": {"maximum": number}}]
    record = tokenize(tokenizer, {**CHAT, "chosen": json.dumps([call]), "rejected": ROW["rejected"], "tools": tools})
    assert record["status"] == KEPT
    assert tokenizer.decode(record["prompt_ids"] + record["chosen_ids"]).count(str(number)) == 2


def test_number_that_python_does_not_print_is_malformed(tokenizer):
    record = tokenize(tokenizer, {**ROW, "tools": [{"name": "f", "parameters": {"maximum": 10**5000}}]})
    assert record["status"] == MALFORMED
    assert "column `tools`: expected numbers of at most 14,000 bits" in record["problem"]


@pytest.mark.parametrize("name", ["prompt_ids", "chosen_ids"])
def test_token_ids_above_64_bits_are_malformed(tokenizer, name):
    record = tokenize(tokenizer, {"prompt_ids": [5], "chosen_ids": [7], "rejected_ids": [8], name: [10**30]})
    assert record["status"] == MALFORMED


def test_row_that_the_template_refuses_is_named_by_its_own_column(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    turns = [*CHAT["prompt"], *ROW["chosen"]]
    record = tokenize(tokenizer, {"messages": turns, "rejected_response": "Go away."})
    assert record["problem"].startswith("column `messages`: expected turns that the chat template accepts")


def test_prompt_and_response_are_encoded_together(tokenizer):
    """Encoding the response alone would give tokens that the model never sees after this prompt."""
    record = tokenize(tokenizer, {"prompt": "What does a c", "chosen": "ow say", "rejected": "at say"})
    eos = [tokenizer.eos_token_id]
    assert record["prompt_changed"]
    assert record["prompt_ids"] + record["chosen_ids"] == encode(tokenizer, "What does a cow say") + eos
    assert record["prompt_ids"] + record["rejected_ids"] == encode(tokenizer, "What does a cat say") + eos


def test_tools_are_rendered(tokenizer):
    """TRL ignores the column (known failure 13)."""
    tokenizer.chat_template = "{% if tools %}{{ tools[0].name }}{% endif %}" + tokenizer.chat_template
    with_tools = tokenize(tokenizer, {**ROW, "tools": [{"name": "moo_counter", "unit": None}]})
    as_json = tokenize(tokenizer, {**ROW, "tools": '[{"name": "moo_counter"}]'})
    assert tokenizer.decode(with_tools["prompt_ids"]).startswith("moo_counter")
    assert as_json == with_tools


def test_chat_template_kwargs_are_passed(tokenizer):
    tokenizer.chat_template = "{{ mood }}" + tokenizer.chat_template
    record = tokenize(tokenizer, {**ROW, "chat_template_kwargs": {"mood": "happy"}})
    assert tokenizer.decode(record["prompt_ids"]).startswith("happy")


def test_template_that_renders_the_generation_prompt_otherwise_is_cut_where_it_parts(tokenizer):
    generation = "{{- '<|assistant|>\\n<think>' -}}"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{- '<|assistant|>\\n' -}}", generation)
    record = tokenize(tokenizer, ROW)
    assert record["prompt_changed"]
    assert tokenizer.decode(record["prompt_ids"] + record["chosen_ids"]).endswith(
        "<|assistant|>\nA cow says moo.</s>\n"
    )


def test_row_that_the_template_refuses_is_malformed(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    record = tokenize(tokenizer, ROW)
    assert record["status"] == MALFORMED
    assert "roles must alternate" in record["problem"]


def test_conversations_without_a_template_are_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="`chat_template_path`"):
        tokenize(tokenizer, ROW)


def word_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "?": 2, "a": 3, "b": 4, "c": 5}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="?", **kwargs)


def test_beginning_of_sequence_is_added_once_and_only_where_the_tokenizer_adds_it():
    from tokenizers.processors import TemplateProcessing

    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    plain = word_tokenizer(bos_token="<s>")
    assert leading_special_ids(plain) == []
    assert tokenize(plain, {**row, "chosen": " b", "rejected": " c"})["prompt_ids"] == [3]
    adding = word_tokenizer(bos_token="<s>")
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert leading_special_ids(adding) == [0]
    assert tokenize(adding, {**row, "chosen": " b", "rejected": " c"})["prompt_ids"] == [0, 3]
    written = tokenize(adding, {"prompt": "<s> a", "chosen": " b", "rejected": " c"})
    assert written["prompt_ids"] == [0, 3]


@pytest.mark.parametrize(
    ("row", "rules", "status"),
    [
        ({"chosen": "", "rejected": " b"}, {}, EMPTY_CHOSEN),
        ({"chosen": " b", "rejected": " \n"}, {}, EMPTY_REJECTED),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, {}, EMPTY_PROMPT),
        ({"chosen": " b", "rejected": " b"}, {}, TIE),
        ({"prompt": "a a a"}, {"max_prompt_length": 3}, LONG_PROMPT),
        ({"prompt": "a a a"}, {"max_prompt_length": 4}, KEPT),
        ({"prompt": "a a a a"}, {"max_length": 4}, NO_ROOM),
        ({"prompt": "a a a a"}, {"max_length": 5}, KEPT),
        ({"chosen": " b b c", "rejected": " b b a"}, {"max_length": 3}, CUT_TIE),
        ({"chosen": " b b c", "rejected": " b b a"}, {"max_completion_length": 2}, CUT_TIE),
        ({"chosen": " b b c", "rejected": " b b a"}, {"max_completion_length": 3}, KEPT),
    ],
)
def test_dropped_rows(row, rules, status):
    """Known failures 1, 2 and 24: rows that would give 0/0, exceed `max_length`, or train noise."""
    record = tokenize(word_tokenizer(), {"prompt": "a", "chosen": " b", "rejected": " c", **row}, **rules)
    assert record["status"] == status
    assert (record["chosen_ids"] is not None) == (status == KEPT)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(2, 25))
def test_no_row_exceeds_max_length_and_every_kept_row_has_a_response(prompt, chosen, rejected, max_length):
    """TRL gave a 120-token row at `max_length=16` (known failure 2)."""
    row = {"prompt": " ".join("a" * prompt), "chosen": " b" * chosen, "rejected": " c" * rejected}
    record = tokenize(word_tokenizer(), row, max_length=max_length)
    if record["status"] != KEPT:
        assert record["status"] == NO_ROOM
        assert prompt >= max_length
        return
    for name, length in (("chosen", chosen), ("rejected", rejected)):
        ids = record[f"{name}_ids"]
        whole = length + 1  # the end of sequence
        assert 1 <= len(ids) == min(whole, max_length - prompt)
        assert record[f"{name}_cut"] == (len(ids) < whole)
        # A cut response has lost its end of sequence, and the report counts it (known failure 20).
        assert (ids[-1] == 1) == (not record[f"{name}_cut"])


def test_token_ids_are_taken_as_they_are(tokenizer):
    """TRL cannot read rows of token ids (known failure 19)."""
    row = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [10]}
    record = tokenize(tokenizer, row, max_length=4)
    assert [record[name] for name in row] == [[5, 6], [7, 8], [10]]
    assert tokenize(tokenizer, {**row, "rejected_ids": None})["rejected_ids"] is None


@pytest.mark.parametrize(
    ("ids", "received"),
    [({"chosen_ids": [9999]}, "9999"), ({"rejected_ids": ["a"]}, "'a'"), ({"chosen_ids": None}, "None")],
)
def test_wrong_token_ids_are_malformed(tokenizer, ids, received):
    record = tokenize(tokenizer, {"prompt_ids": [5], "chosen_ids": [7], "rejected_ids": [8], **ids})
    assert record["status"] == MALFORMED
    assert next(iter(ids)) in record["problem"]
    assert received in record["problem"]


def test_each_text_is_encoded_once_and_in_one_call(tokenizer, monkeypatch):
    """TRL calls the tokenizer five times a row (known failure 19)."""
    calls = []

    class Counted:
        def __getattr__(self, name):
            return getattr(tokenizer._tokenizer, name)

        def encode_batch_fast(self, texts, **kwargs):
            calls.append(texts)
            return tokenizer._tokenizer.encode_batch_fast(texts, **kwargs)

    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", Counted())
    batch = {"prompt": ["a", "b"], "chosen": [" c", " d"], "rejected": [" e", None]}
    tokenize_rows(batch, tokenizer, PairRules())
    assert calls == [["a", "a c", "a e", "b", "b d"]]


def test_settings_of_the_tokenizer_file_cut_and_fill_nothing(tokenizer):
    """Some tokenizer.json files hold a truncation and a padding, which transformers' own call turns off."""
    texts = ["the cow says moo", "the"]
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding()
    assert tokenization._encode(texts, tokenizer) == expected


def test_batch_of_mixed_rows_keeps_their_order(tokenizer):
    batch = {
        "prompt": ["a cow", "a cow", "a cow", None],
        "chosen": [" says", "", " says", " says"],
        "rejected": [" eats", " eats", None, " eats"],
    }
    columns = tokenize_rows(batch, tokenizer, PairRules())
    assert columns["status"] == [KEPT, EMPTY_CHOSEN, KEPT, MALFORMED]
    assert [ids is None for ids in columns["rejected_ids"]] == [False, True, True, True]
