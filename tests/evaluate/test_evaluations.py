"""Evaluations as files: written whole, read again, and damaged ones left out with a line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_trl.evaluations import Evaluation, Figure, read_evaluations, write_evaluation


def evaluation(**changes) -> Evaluation:
    values = {
        "benchmark": "ifeval", "model": "tiny", "asked": 541, "answered": 541, "template": "chat template", "shots": 0,
        "judge": None, "limit": None, "settings": {"max_new_tokens": 1280, "until": []}, "date": "2026-01-01T00:00:00",
        "versions": {"lm_eval": "0.4.13"}, "figures": {"prompt_strict": Figure(value=0.1 + 0.2, stderr=0.01, n=541)},
    }  # fmt: skip
    return Evaluation(**(values | changes))


def test_what_is_written_is_read_again(tmp_path):
    groups = {"category": {"math": {"score": Figure(value=7.5, low=7.0, high=8.0)}}}
    written = evaluation(groups=groups, notes=["Für alle: ≠"])
    path = write_evaluation(tmp_path, written)
    assert path == tmp_path / "evaluations" / "ifeval.json"
    assert read_evaluations(tmp_path) == [written]
    assert json.loads(path.read_text(encoding="utf-8"))["settings"] == {"max_new_tokens": 1280, "until": []}


def test_a_later_evaluation_of_the_same_name_replaces_the_earlier_one(tmp_path):
    write_evaluation(tmp_path, evaluation())
    later = evaluation(model="other")
    write_evaluation(tmp_path, later)
    assert read_evaluations(tmp_path) == [later]


def test_parts_and_other_judges_stay_beside_the_whole(tmp_path):
    kinds = [
        evaluation(),
        evaluation(limit=60),
        evaluation(limit=6),
        evaluation(judge="gpt-4"),
        evaluation(judge="me/m"),
    ]
    names = {write_evaluation(tmp_path, kind).name for kind in kinds}
    assert names == {
        "ifeval.json", "ifeval-first-60.json", "ifeval-first-6.json", "ifeval-gpt-4.json", "ifeval-me_m.json"
    }  # fmt: skip
    assert len(read_evaluations(tmp_path)) == 5


@given(benchmark=st.text(min_size=1), judge=st.none() | st.text())
def test_a_name_is_one_of_a_file_in_the_folder(benchmark, judge):
    name = evaluation(benchmark=benchmark, judge=judge).name
    assert "/" not in name
    assert name
    assert not name.startswith(".")
    assert len(name.encode()) < 200


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "Invalid JSON"), ("[1]", "object"), ('{"benchmark": 1}', "benchmark"), ("[" * 100_000, "JSON")],
    ids=["cut", "list", "type", "deep"],
)
def test_damaged_files_are_left_out_with_a_line(tmp_path, capsys, content, said):
    whole = evaluation()
    write_evaluation(tmp_path, whole)
    damaged = tmp_path / "evaluations" / "damaged.json"
    damaged.write_text(content, encoding="utf-8")
    assert read_evaluations(tmp_path) == [whole]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(damaged) in lines[0]
    assert said in lines[0]


def test_a_figure_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="finite"):
        Figure(value=float("nan"))


def test_links_out_of_the_folder_are_not_read(tmp_path, capsys):
    elsewhere = write_evaluation(tmp_path / "other", evaluation())
    run = tmp_path / "run"
    write_evaluation(run, evaluation())
    (run / "evaluations" / "link.json").symlink_to(elsewhere)
    assert len(read_evaluations(run)) == 1
    assert "link.json" in capsys.readouterr().err


def test_a_folder_without_evaluations_has_none(tmp_path):
    assert read_evaluations(tmp_path / "absent") == []
