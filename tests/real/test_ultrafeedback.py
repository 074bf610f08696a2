"""Preparation of real, dirty rows with the real tokenizer."""

from support.small import REPOSITORY, TOKENIZER
from transformers import AutoTokenizer

from orpo_trl.config import DataArguments
from orpo_trl.pairs.load import load_pairs
from orpo_trl.pairs.prepare import prepare_pairs
from orpo_trl.pairs.tokenize import PairRules


def prepared(data, tokenizer, **rules):
    dataset, _ = load_pairs(DataArguments(dataset_name=str(data / "ultrafeedback" / "train.jsonl")), False)
    pairs, report = prepare_pairs(dataset, tokenizer, PairRules(**rules))
    (source,) = report.sources.values()
    return dataset, pairs, source


def test_ties_and_empty_sides_are_counted_and_dropped(data, mistral_tokenizer):
    dataset, pairs, source = prepared(data, mistral_tokenizer)
    rows = list(dataset)
    ties = [i for i, row in enumerate(rows) if row["chosen"] == row["rejected"]]
    assert len(ties) == 4
    assert source.dropped == {"empty chosen": 1, "empty rejected": 1, "chosen equals rejected": 4}
    assert source.dropped_rows["chosen equals rejected"] == ties
    assert len(pairs) == source.pairs == 994


def test_the_papers_limits(data, mistral_tokenizer):
    mistral_tokenizer.chat_template = (REPOSITORY / "recipes" / "templates" / "orpo.jinja").read_text()
    _, pairs, source = prepared(
        data, mistral_tokenizer, max_length=2048, max_prompt_length=1792, strings_as_messages=True
    )
    assert source.rows == source.kept + sum(source.dropped.values())
    assert all(len(row["prompt_ids"]) < 1792 for row in pairs)
    assert all(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= 2048 for row in pairs)
    whole = [row for row in pairs if row["length"] < 1000]
    eos, newline = mistral_tokenizer.eos_token_id, mistral_tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    for row in whole[:50]:
        # The template's end of sequence and newline, and no second end of sequence.
        assert row["chosen_ids"][-1] == newline
        assert row["chosen_ids"].count(eos) == 1
        assert row["prompt_ids"][0] == mistral_tokenizer.bos_token_id


def test_prompt_and_response_together_are_the_tokens_of_the_whole_text(data, mistral_tokenizer):
    dataset, pairs, source = prepared(data, mistral_tokenizer)
    usable = [
        row for row in dataset
        if row["chosen"] != row["rejected"] and row["chosen"].strip() and row["rejected"].strip()
    ]  # fmt: skip
    merged = 0
    for row, pair in zip(usable, pairs, strict=True):
        prompt = mistral_tokenizer(row["prompt"])["input_ids"]
        whole = {side: mistral_tokenizer(row["prompt"] + row[side])["input_ids"] for side in ("chosen", "rejected")}
        merged += any(ids[: len(prompt)] != prompt for ids in whole.values())
        for side, ids in whole.items():
            assert pair["prompt_ids"] + pair[f"{side}_ids"] == [*ids, mistral_tokenizer.eos_token_id]
    assert source.prompt_changed == merged > 0


def test_instruction_rows(data):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    path = data / "polite" / "instruction-data-with-preference.json"
    dataset, _ = load_pairs(DataArguments(dataset_name=str(path)), False)
    pairs, report = prepare_pairs(dataset, tokenizer, PairRules())
    with_input = next(i for i, row in enumerate(dataset) if row["input"])
    row = dataset[with_input]
    text = tokenizer.decode(pairs[with_input]["prompt_ids"])
    assert text == f"<|user|>\n{row['instruction']}\n\n{row['input']}</s>\n<|assistant|>\n"
    (source,) = report.sources.values()
    assert source.rows == 1100
