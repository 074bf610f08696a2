"""Items of a benchmark in files: by split, as a user or the Hub names them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orpo_trl.evaluate.items import read_items, split_files

ROWS = [{"kwargs": [{"a": 1}]}, {"kwargs": [{"b": "x"}, {}]}]


def write(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_file_holds_what_is_scored(tmp_path):
    file = write(tmp_path / "any.jsonl")
    assert split_files(file, "ifeval", "train") == {"train": [file]}


@pytest.mark.parametrize("place", ["", "gsm8k"], ids=["folder", "folder-of-benchmarks"])
def test_a_folder_holds_splits(tmp_path, place):
    train, test = (write(tmp_path / place / f"{split}.jsonl") for split in ("train", "test"))
    write(tmp_path / place / "README.md")
    assert split_files(tmp_path, "gsm8k", "test") == {"train": [train], "test": [test]}


def test_a_folder_may_hold_a_file_per_benchmark(tmp_path):
    file = write(tmp_path / "ifeval.jsonl")
    write(tmp_path / "gsm8k.jsonl")
    assert split_files(tmp_path, "ifeval", "train") == {"train": [file]}


def test_files_of_the_hub_are_found_by_their_splits(tmp_path):
    for name in ("test-00000-of-00002", "test-00001-of-00002", "train-00000-of-00001"):
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / f"{name}.parquet")
    found = split_files(tmp_path, "gsm8k", "test")
    assert {split: [path.name for path in paths] for split, paths in found.items()} == {
        "test": ["test-00000-of-00002.parquet", "test-00001-of-00002.parquet"],
        "train": ["train-00000-of-00001.parquet"],
    }  # fmt: skip
    assert len(read_items(found["test"])) == 4


def test_dictionaries_get_the_same_keys_in_every_row(tmp_path):
    found = read_items([write(tmp_path / "items.jsonl")])
    assert found[0]["kwargs"] == [{"a": 1, "b": None}]
    assert found[1]["kwargs"] == [{"a": None, "b": "x"}, {"a": None, "b": None}]


def test_a_list_in_a_json_file_is_the_same_rows(tmp_path):
    file = tmp_path / "items.json"
    file.write_text(json.dumps(ROWS), encoding="utf-8")
    assert read_items([file]).to_list() == read_items([write(tmp_path / "items.jsonl")]).to_list()


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "expected rows"), ("[1]\n", "JSON object"), ("{nothing}\n{}\n", "JSON object"),
     ('{"a": 1}\n{"a": "x"}\n', "the same columns")],
    ids=["empty", "list", "no-json", "types"],
)  # fmt: skip
def test_other_files_are_refused_by_name(tmp_path, content, said):
    file = tmp_path / "items.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=said) as raised:
        read_items([file])
    assert str(file) in str(raised.value)


def test_a_folder_without_the_scored_split_is_refused(tmp_path):
    write(tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match=r"expected test\.jsonl of gsm8k in .*, found train"):
        split_files(tmp_path, "gsm8k", "test")
