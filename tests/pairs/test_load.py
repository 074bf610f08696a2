import json
import re
from collections import Counter

import pytest
from datasets import Dataset, DatasetDict, Image, IterableDataset, Value
from datasets import List as ListOf

from orpo_trl.config import DataArguments, DatasetSource
from orpo_trl.pairs.load import ROW_COLUMN, SOURCE_COLUMN, UNREAD_COLUMN, load_pairs
from orpo_trl.pairs.prepare import prepare_pairs
from orpo_trl.pairs.tokenize import PairRules

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
    (stream, _) = load(dataset_name=str(tmp_path / "d"), dataset_streaming=True)
    assert isinstance(stream, IterableDataset)
    # It has no other rows to evaluate on, and no part of them that a split could name.
    with pytest.raises(ValueError, match="could not be loaded"):
        load(True, dataset_name=str(tmp_path / "d"))
    with pytest.raises(ValueError, match="could not be loaded"):
        load(datasets=[{"path": str(tmp_path / "d"), "split": "train[:2]"}])
    with pytest.raises(ValueError, match="cannot be chosen from" if as_dict else "all of its rows in one split"):
        load(datasets=[{"path": str(tmp_path / "d"), "data_files": "a.jsonl"}])


def test_stream(tmp_path):
    train, _ = load(dataset_name=write(tmp_path / "rows.jsonl"), dataset_streaming=True)
    rows = list(train)
    assert [row[ROW_COLUMN] for row in rows] == list(range(10))
    assert rows[3]["prompt"] == "q3"


@pytest.mark.parametrize("streaming", [False, True])
def test_file_of_texts_and_messages_is_read_as_its_rows_are(tmp_path, tokenizer, streaming):
    turns = {name: [{"role": "user" if name == "prompt" else "assistant", "content": name}] for name in TEXTS}
    text = {"prompt": 'a "b":', "chosen": " c\n", "rejected": " d"}
    path = write(tmp_path / "rows.jsonl", [text, turns])
    rows, _ = load(dataset_name=path, dataset_streaming=streaming)
    pairs = list(prepare_pairs(rows, tokenizer, PairRules())[0])
    assert len(pairs) == 2
    assert tokenizer.decode(pairs[0]["prompt_ids"] + pairs[0]["chosen_ids"]) == 'a "b": c\n' + tokenizer.eos_token


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("text", ['"Hello"', "null", "007", " 42 ", "007 is"])
def test_text_that_a_file_of_texts_and_messages_changes_is_refused_by_its_line(tmp_path, monkeypatch, text, streaming):
    turns = {name: [{"role": "user" if name == "prompt" else "assistant", "content": name}] for name in TEXTS}
    row = {"prompt": "a:", "chosen": "b", "rejected": text}
    path = write(tmp_path / "rows.jsonl", [ROWS[0], turns, row])
    if text == "007 is":
        assert list(load(dataset_name=path, dataset_streaming=streaming)[0])[2]["rejected"] == text
        return
    with pytest.raises(ValueError, match=f"line 3 has the text {re.escape(repr(text))} in the column `rejected`"):
        load(dataset_name=path, dataset_streaming=streaming)
    if not streaming:  # a file of any size
        monkeypatch.setattr("orpo_trl.pairs.load._MAX_CHECKED", 1)
        with pytest.raises(ValueError, match="line 3 has the text"):
            load(dataset_name=path)
    # Of a file in which all rows have texts, no text is changed.
    path = write(tmp_path / "texts.jsonl", [ROWS[0], row])
    assert list(load(dataset_name=path, dataset_streaming=streaming)[0])[1]["rejected"] == text


def test_mixture_keeps_source_and_row(tmp_path):
    a, b = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", ROWS[:4])
    train, _ = load(datasets=[{"path": a}, {"path": b}])
    assert len(train) == 14
    assert (train[12][SOURCE_COLUMN], train[12][ROW_COLUMN]) == (b, 2)
    assert set(train.column_names) == TEXTS | {SOURCE_COLUMN, ROW_COLUMN, UNREAD_COLUMN}


def test_mixture_joins_where_empty_columns_of_images_differ_in_type(tmp_path):
    types = {"a": Image(), "b": Value("string"), "c": ListOf(Value("string"))}
    for name, kind in types.items():
        rows = Dataset.from_list([{**row, "image": None} for row in ROWS[:2]])
        rows.cast_column("image", kind).save_to_disk(tmp_path / name)
    train, _ = load(datasets=[{"path": str(tmp_path / name)} for name in types])
    assert len(train) == 6
    assert "image" not in train.column_names


def test_mixture_fractions_repeat_no_row(tmp_path):
    a, b = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", ROWS[:3])
    train, _ = load(datasets=[{"path": a, "fraction": 0.5}, {"path": b, "fraction": 0.5}])
    assert train[SOURCE_COLUMN][:] == [a] * 3 + [b] * 3


@pytest.mark.parametrize(("weight", "most"), [(0.5, 1), (2, 2), (2.5, 3)])
def test_mixture_weight_is_how_often_rows_are_used(tmp_path, weight, most):
    a, b = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", ROWS[:3])
    train, _ = load(datasets=[{"path": a, "weight": weight}, {"path": b}])
    uses = Counter(row for row, source in zip(train[ROW_COLUMN], train[SOURCE_COLUMN], strict=True) if source == a)
    assert sum(uses.values()) == 10 * weight
    assert max(uses.values()) == most
    assert len(uses) == (5 if weight < 1 else 10)
    assert train[SOURCE_COLUMN][:].count(b) == 3
    assert load(datasets=[{"path": a, "weight": weight}, {"path": b}])[0][:] == train[:]


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_are_chosen_and_renamed(tmp_path, streaming):
    rows = [{"q": f"q{i}", "good": "a", "bad": "b", "chosen": "not this"} for i in range(4)]
    source = {
        "path": write(tmp_path / "rows.jsonl", rows),
        "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"},
    }
    train, _ = load(datasets=[source], dataset_streaming=streaming)
    first = next(iter(train))
    assert {name: first[name] for name in TEXTS} == {"prompt": "q0", "chosen": "a", "rejected": "b"}


def test_several_evaluation_sets(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    sets = {"all": {"path": path}, "few": {"path": write(tmp_path / "few.jsonl", ROWS[:3])}}
    _, test = load(True, dataset_name=path, eval_datasets=sets)
    assert {label: len(rows) for label, rows in test.items()} == {"all": 10, "few": 3}


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
        ({"dataset_name": "{tmp}/empty.jsonl"}, ValueError, "empty.jsonl' could not be loaded: it has no rows"),
        ({"dataset_name": "{tmp}/broken.jsonl"}, ValueError, "broken.jsonl' could not be loaded"),
        ({"datasets": [{"path": "{tmp}/rows.jsonl", "columns": ["promt"]}]}, ValueError, "no column `promt`"),
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
    with pytest.raises(ValueError, match=r"'test'(.|\n)*Without a test split, set `test_split_size`"):
        load(True, dataset_name=path)
    with pytest.raises(ValueError, match="`test_split_size`"):
        load(True, datasets=[{"path": path}])


def test_test_split_that_is_there_and_broken_is_named_as_such(tmp_path):
    write(tmp_path / "train.jsonl")
    (tmp_path / "test.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt"\n')
    with pytest.raises(ValueError, match=r"test\.jsonl") as caught:
        load(True, dataset_name=str(tmp_path))
    assert "test_split_size" not in str(caught.value)


def test_rows_that_are_held_out_are_not_trained_where_nothing_is_evaluated(tmp_path):
    """Else evaluation would decide what is trained."""
    path = write(tmp_path / "rows.jsonl")
    train, test = load(True, dataset_name=path, test_split_size=3)
    alone, none = load(False, dataset_name=path, test_split_size=3)
    assert alone.to_list() == train.to_list()
    assert (len(test), none) == (3, None)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("is_folder", [False, True])
def test_cells_of_csv_are_text_and_only_an_empty_one_is_absent(tmp_path, streaming, is_folder):
    path = tmp_path / "train.csv"
    path.write_text("prompt,chosen,rejected\n007,None,N/A\nq,True,null\nq,1.50,\n", encoding="utf-8")
    name = str(tmp_path if is_folder else path)
    rows, _ = load_pairs(DataArguments(dataset_name=name, dataset_streaming=streaming), with_test=False)
    found = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    assert found == [("007", "None", "N/A"), ("q", "True", "null"), ("q", "1.50", None)]


def test_columns_that_nothing_reads_are_named_by_source_or_refused(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    Dataset.from_list([{"prompt": "q", "chosen": "a", "rejected": "b", "score": 1.0, "messages": "m"}]).to_json(path)
    rows, _ = load_pairs(DataArguments(dataset_name=str(path)), with_test=False)
    _, report = prepare_pairs(rows, tokenizer, PairRules())
    assert report.sources[str(path)].unread == ["score", "messages"]
    entry = DatasetSource(path=str(path), columns={"prompt": "prompt", "chosen": "chosen", "winner": "score"})
    with pytest.raises(ValueError, match=r"names `winner`, which nothing reads"):
        load_pairs(DataArguments(datasets=[entry]), with_test=False)


def test_prompt_that_stands_nowhere_in_the_turns_is_named(tokenizer):
    turns = [{"role": "user", "content": "Moo?"}, {"role": "assistant", "content": "Yes."}]
    other = [turns[0], {"role": "assistant", "content": "No."}]
    row = {"prompt": "Speak as a pirate.", "chosen": turns, "rejected": other}
    _, report = prepare_pairs(Dataset.from_list([row]), tokenizer, PairRules())
    assert list(report.sources["train"].remarks) == ["`prompt` is not read: it stands nowhere in the turns beside it"]
