import json

import pytest
from datasets import Dataset, DatasetDict

from orpo_trl.config import DataArguments
from orpo_trl.pairs.load import ROW_COLUMN, SOURCE_COLUMN, load_pairs

ROWS = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b", "score": i} for i in range(10)]
TEXTS = {"prompt", "chosen", "rejected"}


def write(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(with_test=False, **kwargs):
    return load_pairs(DataArguments(**kwargs), with_test)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet", "csv"])
def test_local_file(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    getattr(Dataset.from_list(ROWS), f"to_{suffix.removesuffix('l')}")(path)
    train, test = load(dataset_name=str(path))
    assert train["prompt"][:] == [row["prompt"] for row in ROWS]
    assert train[SOURCE_COLUMN][:] == [str(path)] * 10
    assert train[ROW_COLUMN][:] == list(range(10))
    assert test is None


def test_folder_with_splits(tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl", ROWS[:3])
    train, test = load(True, dataset_name=str(tmp_path))
    assert (len(train), len(test)) == (10, 3)
    assert test[0][SOURCE_COLUMN] == f"{tmp_path}:test"


@pytest.mark.parametrize("as_dict", [True, False])
def test_folder_of_save_to_disk(tmp_path, as_dict):
    dataset = Dataset.from_list(ROWS)
    (DatasetDict(train=dataset) if as_dict else dataset).save_to_disk(tmp_path / "d")
    assert len(load(dataset_name=str(tmp_path / "d"))[0]) == 10


def test_stream(tmp_path):
    train, _ = load(dataset_name=write(tmp_path / "rows.jsonl"), dataset_streaming=True)
    rows = list(train)
    assert [row[ROW_COLUMN] for row in rows] == list(range(10))
    assert rows[3]["prompt"] == "q3"


def test_mixture_keeps_source_and_row(tmp_path):
    a, b = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", ROWS[:4])
    train, _ = load(datasets=[{"path": a}, {"path": b}])
    assert len(train) == 14
    assert (train[12][SOURCE_COLUMN], train[12][ROW_COLUMN]) == (b, 2)
    assert set(train.column_names) == TEXTS | {SOURCE_COLUMN, ROW_COLUMN}


def test_mixture_fractions_repeat_no_row(tmp_path):
    a, b = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", ROWS[:3])
    train, _ = load(datasets=[{"path": a, "fraction": 0.5}, {"path": b, "fraction": 0.5}])
    assert train[SOURCE_COLUMN][:] == [a] * 3 + [b] * 3


@pytest.mark.parametrize("size", [0.3, 3.0])
def test_held_out_share_or_number(tmp_path, size):
    train, test = load(True, dataset_name=write(tmp_path / "rows.jsonl"), test_split_size=size)
    assert (len(train), len(test)) == (7, 3)


def test_held_out_rows_do_not_depend_on_the_process(tmp_path):
    """TRL's mixture splits without a seed, so that each rank holds out other rows."""
    path = write(tmp_path / "rows.jsonl")
    splits = [load(True, dataset_name=path, test_split_size=0.3) for _ in range(2)]
    assert splits[0][1][:] == splits[1][1][:]
    assert len(splits[0][0]) == 7
    assert not set(splits[0][0]["prompt"]) & set(splits[0][1]["prompt"])


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, ValueError, "one of `dataset_name` and `datasets`; received neither"),
        ({"dataset_name": "a", "datasets": [{"path": "b"}]}, ValueError, "received both"),
        ({"dataset_name": "./absent.jsonl"}, FileNotFoundError, "absent.jsonl"),
        ({"dataset_name": "{tmp}/rows.jsonl", "dataset_train_split": "validation"}, ValueError, "'validation'"),
        ({"dataset_name": "{tmp}/rows.txt"}, ValueError, ".jsonl"),
        ({"datasets": [{"paht": "b"}]}, ValueError, "`datasets` entry 0 has unknown keys paht"),
        ({"datasets": ["rows"]}, ValueError, "`datasets` entry 0 must be a mapping with `path`, got 'rows'"),
        ({"datasets": {"path": "rows"}}, ValueError, "`datasets` must be a list of mappings"),
        ({"datasets": [{"path": "{tmp}/rows.jsonl", "fraction": -1}]}, ValueError, "must be above 0, got -1"),
        ({"dataset_name": "{tmp}/empty.jsonl"}, ValueError, "empty.jsonl' could not be loaded: it has no rows"),
        ({"dataset_name": "{tmp}/broken.jsonl"}, ValueError, "broken.jsonl' could not be loaded"),
        ({"datasets": [{"name": "b"}]}, ValueError, "entry 0 has no `path`"),
        ({"datasets": [{"path": "{tmp}/rows.jsonl"}, {"path": "{tmp}/chat.jsonl"}]}, ValueError, "`columns`"),
    ],
)
def test_wrong_names(tmp_path, kwargs, error, message):
    write(tmp_path / "rows.jsonl")
    write(tmp_path / "rows.txt")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "q", "cho')
    write(tmp_path / "chat.jsonl", [{"chosen": [{"role": "assistant", "content": "a"}]}])
    kwargs = json.loads(json.dumps(kwargs).replace("{tmp}", str(tmp_path)))
    with pytest.raises(error) as caught:
        load(**kwargs)
    assert message in str(caught.value)


def test_evaluation_needs_rows(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="`eval_strategy` is 'no'"):
        load(False, dataset_name=path, test_split_size=0.1)
    with pytest.raises(ValueError, match="'test'"):
        load(True, dataset_name=path)
    with pytest.raises(ValueError, match="`test_split_size`"):
        load(True, datasets=[{"path": path}])
