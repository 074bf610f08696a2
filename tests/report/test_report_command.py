import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from support.run_folders import history, metrics, write_run

from orpo_trl.cli import main


def run(*arguments):
    return CliRunner().invoke(main, ["report", *map(str, arguments)], prog_name="orpo-trl")


def test_page_lies_in_the_folder_of_its_run_and_its_place_is_printed(tmp_path):
    folder = write_run(tmp_path / "run")
    result = run(folder)
    assert (result.exit_code, result.stdout.strip()) == (0, str(folder / "report.html"))
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_page_of_several_runs_lies_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [write_run(tmp_path / name / "run") for name in "ab"]
    assert run(*folders).stdout.strip() == "report.html"
    assert "a/run" in Path("report.html").read_text(encoding="utf-8")


def test_page_pictures_and_table_are_written_where_they_are_asked_for(tmp_path):
    folder = write_run(tmp_path / "run")
    page, pictures, table = tmp_path / "new" / "p.html", tmp_path / "deep" / "png", tmp_path / "tables" / "m.csv"
    result = run(folder, "-o", page, "--png", pictures, "--csv", table)
    written = sorted(pictures.iterdir())
    assert {path.stem for path in written} >= {"logps", "loss", "throughput"}
    for path in written:
        image = Image.open(path)
        image.verify()
        assert image.format == "PNG"
        assert 800 < image.width < 1200
        assert 500 < image.height < 1000
    assert sorted(result.stdout.split()) == sorted(map(str, [page, *written, table]))
    assert page.is_file()
    assert not (folder / "report.html").exists()


def test_table_holds_all_metrics_of_all_runs_exactly(tmp_path):
    logs = {
        "a": history(4),
        "b": [{"step": 1, "loss": 0.1 + 0.2, '=odd,"name"\n': 1e-300}, {"step": 2, "loss": None, "epoch": 0.5}],
    }
    folders = [write_run(tmp_path / name, lines) for name, lines in logs.items()]
    run(*folders, "-o", tmp_path / "p.html", "--csv", tmp_path / "m.csv")
    with open(tmp_path / "m.csv", encoding="utf-8", newline="") as file:
        # What a spreadsheet would run as a formula has an apostrophe before it.
        rows = [
            {"=" + name[2:] if name.startswith("'=") else name: value for name, value in row.items()}
            for row in csv.DictReader(file)
        ]
    columns = list(rows[0])
    assert columns[:3] == ["run", "step", "epoch"]
    assert columns[3:] == sorted({name for lines in logs.values() for log in lines for name in log} - {"step", "epoch"})
    expected = [(name, log) for name, lines in logs.items() for log in lines]
    for row, (name, log) in zip(rows, expected, strict=True):
        assert row.pop("run") == name
        found = {column: float(value) for column, value in row.items() if value != ""}
        assert found == {column: value for column, value in log.items() if value is not None}


def test_folders_of_another_trainer_stand_beside_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = {"global_step": 2, "log_history": [{"step": 2, **metrics(2)}, {"step": 2, **metrics(2, prefix="eval_")}]}
    (tmp_path / "trl" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "trl" / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
    assert run(write_run(tmp_path / "ours"), tmp_path / "trl").exit_code == 0


def test_half_a_surrogate_pair_is_written_as_its_number(tmp_path):
    folder = write_run(tmp_path / "run", samples=[{"step": 1, "prompt": "\ud83d", "completion": "x"}])
    assert run(folder).exit_code == 0
    assert "\\ud83d" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "absent", "absent: expected a run's folder, received no folder"),
        (lambda path: path, "expected a run's folder, with metrics.jsonl"),
    ],
)
def test_wrong_folder_ends_with_a_message_and_no_page(tmp_path, make, message):
    result = run(make(tmp_path), "-o", tmp_path / "p.html")
    assert result.exit_code == 2
    assert str(tmp_path) in result.output
    assert message in result.output
    assert not (tmp_path / "p.html").exists()


def test_page_that_cannot_be_written_ends_with_a_message(tmp_path):
    result = run(write_run(tmp_path / "run"), "-o", tmp_path)
    assert result.exit_code == 2
    assert str(tmp_path) in result.output


def test_command_needs_no_training_library_and_help_no_matplotlib(tmp_path):
    folder = write_run(tmp_path / "run", preparation={"train": {}})
    code = (
        "import sys; from orpo_trl.cli import main; main(sys.argv[1:], standalone_mode=False);"
        "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    for arguments, loaded in ((["--help"], "[]"), (["report", "--help"], "[]"), (["report", folder], "['matplotlib']")):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.splitlines()[-1] == loaded
