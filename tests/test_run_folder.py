import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_trl.run_folder import (
    append_lines,
    append_log,
    append_samples,
    keep_until,
    read_history,
    read_lines,
    read_preparation,
    read_record,
    read_samples,
    read_settings,
    write_origin,
    write_record,
)

RECORDS = st.lists(
    st.dictionaries(st.text(), st.one_of(st.text(), st.integers(), st.floats(allow_nan=False))), max_size=5
)


@given(records=RECORDS)
def test_lines_come_back(records, tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    append_lines(path, records[:2])
    append_lines(path, records[2:])
    finite = [{k: None if v in (float("inf"), -float("inf")) else v for k, v in r.items()} for r in records]
    assert read_lines(path) == finite
    for line in path.read_text(encoding="utf-8").split("\n"):
        assert not line or json.loads(line, parse_constant=pytest.fail) is not None  # JSON, without NaN or Infinity


def test_half_a_line_at_the_end_is_left_out_and_elsewhere_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected a JSON object, received '\{\"ste'"):
        read_lines(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: expected a JSON object, received '\[1\]'"):
        read_lines(path)


def test_a_run_that_resumes_keeps_what_is_before_its_step(tmp_path):
    keep_until(tmp_path, 5)
    assert not any(tmp_path.iterdir())
    for step in (1, 5, 6):
        append_log(tmp_path, {"step": step})
    append_samples(tmp_path, [{"step": 6}])
    keep_until(tmp_path, 5)
    assert read_history(tmp_path) == [{"step": 1}, {"step": 5}]
    assert read_samples(tmp_path) == []
    keep_until(tmp_path, -1)
    assert not any(tmp_path.iterdir())


def test_what_was_written_is_read_back(tmp_path):
    folder = tmp_path / "new" / "run"
    write_origin(folder, "beta: 0.1  # the paper's\n", {"train": {"rows": 1}}, {"seed": 1})
    assert read_settings(folder) == ({"beta": 0.1}, "beta: 0.1  # the paper's\n")
    assert read_preparation(folder) == {"train": {"rows": 1}}
    assert read_record(folder) == {"seed": 1}
    write_record(folder, {"seed": 1, "last_step": 5})
    assert read_record(folder) == {"seed": 1, "last_step": 5}


def test_folder_without_files_reads_as_empty(tmp_path):
    assert (read_settings(tmp_path), read_preparation(tmp_path), read_record(tmp_path)) == (({}, ""), {}, {})
    assert read_samples(tmp_path) == []
    with pytest.raises(ValueError, match="expected a run's folder"):
        read_history(tmp_path)
