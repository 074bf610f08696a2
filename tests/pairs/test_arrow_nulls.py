"""Nulls that a row means reach the template; those that Arrow fills absent keys with do not."""

import json

import pytest
from datasets import Dataset, Features, IterableDataset, Json, Value
from datasets import List as ListOf

from orpo_trl.config import DataArguments
from orpo_trl.pairs.arrow_nulls import without_filling
from orpo_trl.pairs.load import load_pairs
from orpo_trl.pairs.prepare import prepare_pairs
from orpo_trl.pairs.rows import row_to_pair
from orpo_trl.pairs.tokenize import PairRules

TEMPLATE = (
    "{{ tools | tojson if tools else '' }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{{ m.tool_calls | tojson if m.tool_calls else '' }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tool(name, **properties):
    return {"name": name, "parameters": {"type": "object", "properties": properties}}


def turns(**arguments):
    """An answer that is one call, as most are."""
    return [{"role": "assistant", "content": "", "tool_calls": [{"name": "count", "arguments": arguments}]}]


# What Arrow could not tell from a filled null: the mappings at each place of this row have the same keys.
ROW = {
    "tools": [tool("count", least={"type": "integer", "default": None})],
    "prompt": [{"role": "user", "content": "How many cows?"}],
    "chosen": turns(field="north", least=None),
    "rejected": turns(field=None, least=2),
}
OTHER = {**ROW, "tools": [tool("f")], "chosen": turns(cow="Berta"), "rejected": turns(cow=None)}


def trained(tokenizer, rows):
    """Texts of the first row: prompt, chosen, rejected."""
    tokenizer.chat_template = TEMPLATE
    pair = next(iter(prepare_pairs(rows, tokenizer, PairRules())[0]))
    return [tokenizer.decode(pair[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")]


def are_kept(texts):
    return ['"default": null' in texts[0], '"least": null' in texts[1], '"field": null' in texts[2]]


@pytest.mark.parametrize("streaming", [False, True])
def test_nulls_of_json_lines_whose_mappings_differ_are_kept(tokenizer, tmp_path, streaming):
    """`datasets` stores them as JSON."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(OTHER))
    rows, _ = load_pairs(DataArguments(dataset_name=str(tmp_path / "rows.jsonl"), dataset_streaming=streaming), False)
    # A stream of a file does not say that it is stored as JSON.
    assert are_kept(trained(tokenizer, rows)) == [not streaming] * 3


def test_nulls_of_json_in_strings_and_of_columns_of_json_are_kept(tokenizer):
    in_strings = {name: json.dumps(value) for name, value in ROW.items()}
    assert are_kept(trained(tokenizer, Dataset.from_list([in_strings]))) == [True] * 3
    columns = {name: [value] for name, value in ROW.items()}
    for feature in (Json(), ListOf(Json())):
        rows = Dataset.from_dict(columns, features=Features(dict.fromkeys(ROW, feature)))
        assert are_kept(trained(tokenizer, rows)) == [True] * 3
    # Beside other keys that Arrow fills.
    call = {"name": Value("string"), "id": Value("string"), "arguments": Json()}
    answer = ListOf({"role": Value("string"), "content": Value("string"), "tool_calls": ListOf(call)})
    features = Features({**Dataset.from_list([ROW]).features, "chosen": answer, "rejected": answer})
    rows = Dataset.from_dict(columns, features=features)
    texts = trained(tokenizer, rows)
    assert are_kept(texts) == [False, True, True]
    assert '"id"' not in "".join(texts)


def test_nulls_of_rows_in_python_are_kept_where_their_mappings_differ(tokenizer):
    """Whether the null of a single call is meant cannot be told from Arrow's."""
    assert are_kept(trained(tokenizer, Dataset.from_list([ROW, OTHER]))) == [False] * 3
    assert row_to_pair(ROW).chosen[0]["tool_calls"][0]["arguments"] == {"field": "north"}
    answer = {"role": "assistant", "content": "Two."}
    longer = {**ROW, "tools": [*ROW["tools"], {"name": "f"}]}
    for side in ("chosen", "rejected"):
        longer[side] = [*ROW[side], {"role": "tool", "content": "2"}, answer]
    texts = trained(tokenizer, IterableDataset.from_generator(lambda: iter([longer])))
    assert are_kept(texts) == [True] * 3
    # Absent keys of messages go wherever they are from.
    pair = row_to_pair({**longer, "chosen": [{**answer, "content": None, "reasoning_content": "Hm."}, answer]})
    assert pair.chosen[0] == {"role": "assistant", "reasoning_content": "Hm."}


def test_filled_keys_go_and_nulls_in_lists_stay():
    rows = [[tool("f", unit={"enum": ["m", None]})], [tool("g", least={"type": "integer"})]]
    stored = Dataset.from_dict({"tools": rows})
    assert stored[0]["tools"][0]["parameters"]["properties"]["least"] is None
    assert [without_filling(row["tools"]) for row in stored] == rows
    assert [without_filling(row["tools"], stored.features["tools"]) for row in stored] == rows


def test_nulls_of_mappings_that_differ_are_meant():
    tools = [tool("f", unit={"type": "string", "enum": ["m", None], "default": None}), tool("g")]
    assert without_filling(tools) == tools
    assert "default" not in without_filling(tools[:1])[0]["parameters"]["properties"]["unit"]
    assert without_filling(tools[:1], ListOf(Json())) == tools[:1]
