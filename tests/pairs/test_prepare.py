"""Datasets of rows to datasets of pairs: reports, errors, streams and the cache."""

import logging

import pytest
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher

from orpo_trl.pairs.load import ROW_COLUMN, SOURCE_COLUMN
from orpo_trl.pairs.prepare import PAIR_COLUMNS, MalformedRowsError, pair_lengths, prepare_pairs
from orpo_trl.pairs.tokenize import PairRules

GOOD = {"prompt": "What does a cow say?", "chosen": " moo", "rejected": " meow"}


def prepare(rows: list[dict], tokenizer, on_malformed="error", **rules):
    return prepare_pairs(Dataset.from_list(rows), tokenizer, PairRules(**rules), "train", on_malformed)


def test_report_counts_every_row_once(tokenizer):
    rows = [
        GOOD,
        {**GOOD, "chosen": ""},
        {**GOOD, "rejected": None},
        {**GOOD, "rejected": GOOD["chosen"]},
        {**GOOD, "prompt": "cow " * 50},
        {**GOOD, "chosen": " moo" * 50},
        {**GOOD, "prompt": None},
    ]
    pairs, report = prepare(rows, tokenizer, on_malformed="drop", max_prompt_length=40, max_length=50)
    source = report.sources["train"]
    assert source.dropped == {
        "malformed": 1, "empty chosen": 1, "chosen equals rejected": 1, "prompt of max_prompt_length or more": 1
    }  # fmt: skip
    assert source.dropped_rows["empty chosen"] == [1]
    assert (source.rows, source.pairs, source.nll_only, source.cut_chosen, source.cut_rejected) == (7, 2, 1, 1, 0)
    assert source.rows == source.kept + sum(source.dropped.values())
    assert len(pairs) == report.kept == 3
    assert (pairs["orpo_source"][:], pairs["orpo_row"][:]) == (["train"] * 3, [0, 2, 5])
    assert pairs.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "length", "orpo_source", "orpo_row"]
    for name in ("prompt", "chosen", "rejected"):
        lengths = [len(ids) for ids in pairs[f"{name}_ids"] if ids is not None]
        assert report.tokens[name].total == sum(lengths)
        assert report.tokens[name].max == max(lengths)
    text = str(report)
    for part in ("7 rows read, 3 kept", "empty chosen: 1 (row 1)", "1 without a rejected", "lost: 1 chosen"):
        assert part in text


def test_malformed_row_among_a_thousand_is_named(tokenizer):
    rows = [{**GOOD, "chosen": f" moo {i}"} for i in range(1000)]
    rows[612] = {**rows[612], "chosen": None}
    dataset = Dataset.from_list(rows).add_column(SOURCE_COLUMN, ["farm.jsonl"] * 1000)
    dataset = dataset.add_column(ROW_COLUMN, list(range(1000)))
    with pytest.raises(MalformedRowsError) as error:
        prepare_pairs(dataset, tokenizer, PairRules())
    assert "1 row does not" in str(error.value)
    expected = "farm.jsonl, row 612: column `chosen`: expected a string or a list of messages, received nothing"
    assert expected in str(error.value)


def test_many_malformed_rows_are_counted_and_the_first_named(tokenizer):
    with pytest.raises(MalformedRowsError) as error:
        prepare([{**GOOD, "prompt": None}] * 25, tokenizer)
    message = str(error.value)
    assert "25 rows do not" in message
    assert "row 9:" in message
    assert "and 15 more" in message


def test_max_length_none_means_no_limit(tokenizer):
    """TRL cuts at 512 then (known failure 18)."""
    pairs, _ = prepare([{**GOOD, "chosen": " moo" * 3000}], tokenizer, max_length=None)
    assert len(pairs[0]["chosen_ids"]) > 3000


def test_dataset_without_a_usable_row_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"(?s)No row of the train dataset is left.*empty chosen: 1"):
        prepare([{**GOOD, "chosen": ""}], tokenizer)


def test_dataset_of_other_columns_is_refused(tokenizer):
    with pytest.raises(ValueError, match="received `text`, `label`"):
        prepare([{"text": "a", "label": 1}], tokenizer)


def test_tokenizer_without_end_of_sequence_is_refused_before_any_work(tokenizer):
    """TRL stores None among the token ids (known failure 16)."""
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="`eos_token`"):
        prepare([GOOD], tokenizer)


def test_prepared_pairs_are_held_to_the_rules_again(tokenizer):
    pairs, _ = prepare([GOOD, {**GOOD, "chosen": " moo moo moo"}, {**GOOD, "rejected": None}], tokenizer)
    again, _ = prepare_pairs(pairs, tokenizer, PairRules())
    assert again[:] == pairs[:]
    shorter, report = prepare_pairs(pairs, tokenizer, PairRules(max_length=len(pairs[0]["prompt_ids"]) + 2))
    assert max(map(len, shorter["chosen_ids"])) == 2
    assert report.sources["train"].cut_chosen == 1


def test_token_id_rows_with_a_length_column_are_checked(tokenizer):
    rows = [{"prompt_ids": [5] * 40, "chosen_ids": [7], "rejected_ids": [8], "length": 42},
            {"prompt_ids": [5], "chosen_ids": [], "rejected_ids": [8], "length": 2},
            {"prompt_ids": [5], "chosen_ids": [7], "rejected_ids": [8], "length": 99}]  # fmt: skip
    pairs, report = prepare(rows, tokenizer, max_length=16)
    assert report.sources["train"].dropped == {"empty chosen": 1, "prompt fills max_length": 1}
    assert pairs["length"][:] == [3]


def test_dataset_of_tensors(tokenizer):
    rows = Dataset.from_list([{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}]).with_format("torch")
    assert prepare_pairs(rows, tokenizer, PairRules())[0][0]["prompt_ids"] == [5, 6]


def test_changed_code_does_not_read_the_old_cache(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    Dataset.from_list([GOOD] * 3).to_json(path)
    dataset = Dataset.from_json(str(path), cache_dir=str(tmp_path))
    before, _ = prepare_pairs(dataset, tokenizer, PairRules())
    monkeypatch.setattr("orpo_trl.pairs.prepare._CODE", [b"changed"])
    after, _ = prepare_pairs(dataset, tokenizer, PairRules())
    assert before.cache_files[0] != after.cache_files[0]


def test_token_id_rows(tokenizer):
    pairs, report = prepare([{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}], tokenizer)
    ids = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}
    assert pairs[0] == {**ids, "length": 4, "orpo_source": "train", "orpo_row": 0}
    assert report.pairs == 1


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def test_stream_gives_the_same_pairs_and_names_what_it_drops(tokenizer, caplog):
    rows = [GOOD, {**GOOD, "chosen": ""}, {**GOOD, "rejected": " baa"}]
    streamed, report = prepare_pairs(stream(rows), tokenizer, PairRules())
    with caplog.at_level(logging.WARNING, "orpo_trl"):
        streamed = list(streamed)
    assert report is None
    as_text, dropped = caplog.messages
    assert dropped == "train, row 1: dropped, empty chosen"
    assert as_text.startswith("train: the rows are text, and are trained as they stand")
    assert len(caplog.messages) == 2
    assert streamed == list(prepare(rows, tokenizer)[0])


def test_stream_whose_rows_have_other_columns_than_the_first(tokenizer):
    rows = [{"prompt": "q", "chosen": " moo"}, {**GOOD, "source": "x"}, {**GOOD, "chosen": "", "tools": None}]
    streamed = list(prepare_pairs(stream(rows), tokenizer, PairRules())[0])
    assert [set(row) for row in streamed] == [set(PAIR_COLUMNS)] * 2
    assert [row["orpo_row"] for row in streamed] == [0, 1]
    assert streamed[0]["rejected_ids"] is None


def test_stream_names_a_malformed_row(tokenizer):
    streamed, _ = prepare_pairs(stream([GOOD, {**GOOD, "prompt": 5}]), tokenizer, PairRules())
    with pytest.raises(MalformedRowsError, match="train, row 1: column `prompt`"):
        list(streamed)


def test_second_preparation_reads_the_cache(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    Dataset.from_list([GOOD] * 3).to_json(path)
    dataset = Dataset.from_json(str(path), cache_dir=str(tmp_path))
    first, _ = prepare_pairs(dataset, tokenizer, PairRules(max_length=64))
    again, _ = prepare_pairs(dataset, tokenizer, PairRules(max_length=64))
    other, _ = prepare_pairs(dataset, tokenizer, PairRules(max_length=20))
    assert again.cache_files[0] == first.cache_files[0]
    assert other.cache_files[0] != first.cache_files[0]


def test_tokenizer_hash_does_not_change_with_use(tokenizer):
    """Processes that waited for the first one's cache would miss it, and tokenise again."""
    before = Hasher.hash(tokenizer)
    prepare([GOOD], tokenizer)
    assert Hasher.hash(tokenizer) == before


def test_several_processes_give_the_same_pairs(tokenizer):
    dataset = Dataset.from_list([{**GOOD, "chosen": f" moo {i}"} for i in range(50)])
    one, _ = prepare_pairs(dataset, tokenizer, PairRules())
    two, _ = prepare_pairs(dataset, tokenizer, PairRules(), num_proc=2)
    assert one[:] == two[:]


def test_lengths_of_prepared_pairs_are_read_without_their_tokens():
    pairs = [
        {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5, 6]},
        {"prompt_ids": [1], "chosen_ids": [3, 4], "rejected_ids": [4]},
        {"prompt_ids": [1, 2, 3], "chosen_ids": [3], "rejected_ids": None},
    ]
    lengths = pair_lengths(Dataset.from_list(pairs))
    assert [part.tolist() for part in (lengths.prompt, lengths.chosen, lengths.rejected)] == [
        [2, 1, 3],
        [1, 2, 1],
        [3, 1, 0],
    ]
