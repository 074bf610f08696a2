"""A file that is broken, or that its reader would change in silence, is one error: the file, the line, what to do."""

import json
from typing import Any

import pytest
from accelerate import PartialState
from datasets import Dataset

from orpo_trl.config import DataArguments
from orpo_trl.pairs.load import load_pairs

ROWS = [{"prompt": f"q{i}", "chosen": " a", "rejected": " b"} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
HEADER = "prompt,chosen,rejected\n"
BROKEN = {
    "cut.jsonl": (LINES[:-10], "line 3 is not JSON (Unterminated string starting at). Repair or remove it"),
    "middle.jsonl": (LINES + '{"prompt": "q", "ch\n' + LINES, "line 4 is not JSON"),
    "scalar.jsonl": (LINES + "3\n", "line 4 is 3, and not a row. Write a JSON mapping"),
    "surrogate.jsonl": (LINES + '{"prompt": "\\ud800"}\n', "line 4 has half a character (a lone surrogate)"),
    "large.jsonl": (LINES + '{"tools": [{"x": 99999999999999999999}]}', "line 4 has a number beyond 64 bits"),
    # Arrow's reader of JSON ends the process with a segmentation fault.
    "deep.jsonl": (LINES + f'{{"meta": {"[" * 50_000}{"]" * 50_000}}}\n', "line 4 has values nested more than 60 deep"),
    "deep.json": ('[\n{"prompt": ' + '{"a":\n' * 100 + '"]"' + "}" * 101 + "]", "line 60 has values nested more than"),
    "bytes.jsonl": (LINES.encode() + b'{"prompt": "\xff"}', "line 4 is not UTF-8 text (byte 0xff). Write the f"),
    "blank.jsonl": ("\n\n", "it has no rows"),
    "mixed.json": (json.dumps([*ROWS, "q"]), "element 3 is 'q', and not a row"),
    "cut.json": (json.dumps(ROWS, indent=1)[:-5], "line 15 is not JSON"),
    "none.json": ("[]", "it has no rows"),
    "long.csv": (HEADER + "q,a,b\n" + "q,a,b,c\n", "line 3 has 4 cells, and the header 3. Repair that row"),
    # pandas moves the cells of such a file by a column, and gives those of the next one nulls.
    "shifted.csv": (HEADER + "q,a,b,c\n", "line 2 has 4 cells"),
    "short.csv": (HEADER + '"q\nr",a\n', "line 2 has 2 cells"),
    "nul.csv": (HEADER + "q,a\0,b\n", "NUL"),
    "twice.csv": ("prompt,prompt,chosen\nq,a,b\n", "line 1 names the column `prompt` twice"),
    "bytes.csv": (HEADER.encode() + b"q,\xff,b\n", "line 2 is not UTF-8 text"),
    "header.csv": (HEADER, "it has no rows"),
    "text.parquet": ("text", "it is no whole Parquet file"),
}  # fmt: skip


def load(path, **kwargs) -> Any:
    return load_pairs(DataArguments(dataset_name=str(path), **kwargs), with_test=False)[0]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_named_with_its_line_and_what_to_do(tmp_path, name, streaming):
    content, words = BROKEN[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="could not be loaded") as caught:
        load(tmp_path / name, dataset_streaming=streaming)
    assert words in str(caught.value)
    assert name in str(caught.value)


def test_file_of_a_folder_is_named(tmp_path):
    (tmp_path / "train.csv").write_text(HEADER + "q,a\n")
    with pytest.raises(ValueError, match=r"train.csv: line 2 has 2 cells"):
        load(tmp_path)


def test_folder_without_data_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no data.* Expected files ending in .json, .jsonl, .parquet, .csv"):
        load(tmp_path)


def test_parquet_file_that_was_cut(tmp_path):
    path = tmp_path / "rows.parquet"
    Dataset.from_list(ROWS * 100).to_parquet(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"rows.parquet.*it is no whole Parquet file.* Write or download it again"):
        load(path)


def test_parquet_file_with_a_hole_is_named_before_a_stream_trains(tmp_path):
    path = tmp_path / "rows.parquet"
    Dataset.from_list(ROWS * 5_000).to_parquet(path, batch_size=5_000)
    content = bytearray(path.read_bytes())
    content[-4_000:-3_800] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows.parquet.*it is no whole Parquet file.* Write or download it again"):
        load(path, dataset_streaming=True)


def test_one_process_of_a_machine_looks_through_a_file(tmp_path, monkeypatch):
    (tmp_path / "rows.csv").write_text(HEADER + "q,a\n")
    monkeypatch.setattr(PartialState(), "local_process_index", 1)
    assert len(load(tmp_path / "rows.csv")) == 1


def test_brackets_in_strings_and_60_of_them_inside_each_other_are_no_fault(tmp_path):
    path = tmp_path / "rows.jsonl"
    deep = "[" * 58 + '"' + "[{" * 100 + '"' + "]" * 58
    path.write_text(LINES.replace("q1", '\\"' + "{" * 100) + f'{{"prompt": "q", "chosen": "a", "meta": {deep}}}')
    assert load(path)["prompt"][1] == '"' + "{" * 100


def test_large_number_that_nothing_reads_and_long_cells_are_no_fault(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(LINES + json.dumps({**ROWS[0], "score": 2**70, "tools": [{"name": "9" * 20}]}))
    assert len(load(rows)) == 4
    cells = tmp_path / "rows.csv"
    cells.write_text(HEADER + f'q,"{"a" * 200_000}\n\n",b\n\nq,a,b\n')
    assert [len(text) for text in load(cells)["chosen"]] == [200_002, 1]
