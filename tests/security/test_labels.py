"""Labels and names in the model card and in CSV mean nothing but themselves; remote code is named."""

import csv
import json
import re

import yaml
from support.hostile import copy_of_model, edit_json, orpo_trl, run_orpo
from support.run_folders import metrics, write_run

from orpo_trl.model_card import write_card

LABEL = "a|b <script>alert(1)</script> [x](javascript:1) ![i](http://x) `c` *d*\n# e\n---\n"


def test_labels_in_the_model_card_are_text(tmp_path):
    prefix = f"eval_{LABEL}_"
    logs = [{"step": 1, **metrics(1)}, {"step": 1, **metrics(1, prefix=prefix), f"{prefix}runtime": 1.0}]
    folder = write_run(tmp_path / "run", logs, recipe="beta: 0.1\nrun_name: |\n  ```\n  </details>\n")
    write_card(
        folder, model_name=LABEL, source=LABEL, base_model="", dataset_name=LABEL, tags=[LABEL], is_adapter=False,
        is_chat=True, versions={}, pages={}, remote_code=[f"model {LABEL}"],
    )  # fmt: skip
    text = (folder / "README.md").read_text()
    _, front, body = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    assert yaml.safe_load(front)["tags"] == [LABEL]
    outside_of_code = re.sub(r"^(````*)\w*\n.*?\n\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside_of_code
    assert "](javascript" not in re.sub(r"\\.", "", outside_of_code)
    rows = [line for line in outside_of_code.splitlines() if line.startswith("| eval")]
    assert rows
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows)
    headings = [line for line in outside_of_code.splitlines() if line.startswith("# ")]
    assert len(headings) == 1


def test_formulas_in_csv_are_text(tmp_path):
    for number, name in enumerate(("=1+1", "+1", "-1", "@SUM(1)")):
        logs = [{"step": 1, "loss": -1.0, name: name}]
        folder = write_run(tmp_path / str(number), logs, recipe=f"run_name: '{name}'\n")
        assert orpo_trl("report", folder, "--csv", tmp_path / "m.csv").status == 0
        with open(tmp_path / "m.csv", newline="") as file:
            header, row = csv.reader(file)
        assert (row[0], header[3], row[3]) == (f"'{name}",) * 3
        assert row[4] == "-1.0"  # a number stays one


CODE = """
from transformers import MistralConfig, MistralForCausalLM

class OwnConfig(MistralConfig):
    model_type = "own_mistral"

class OwnModel(MistralForCausalLM):
    config_class = OwnConfig
"""


def test_remote_code_is_run_by_the_flag_alone_and_then_named(tmp_path):
    model = copy_of_model(tmp_path / "own_model")
    (model / "own.py").write_text(CODE)
    maps = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_json(model / "config.json", model_type="own_mistral", auto_map=maps)
    run = [
        "recipes/quickstart.yaml", "--model_name_or_path", model, "--max_steps", "1", "--logging_steps", "1",
        "--output_dir", tmp_path / "out",
    ]  # fmt: skip
    answer = run_orpo(*run)
    assert (answer.status, answer.error) == (2, None)
    assert (
        "comes with code of its own, which is not run. Read it first; `trust_remote_code: true` runs it" in answer.text
    )
    answer = run_orpo(*run, "--trust_remote_code")
    assert (answer.status, answer.error) == (0, None), answer.text
    assert json.loads((tmp_path / "out" / "run.json").read_text())["remote_code"] == [f"model {model}"]
    assert (
        "has executed code that came with its model (`trust_remote_code: true`): model "
        in (tmp_path / "out" / "README.md").read_text()
    )
    assert orpo_trl("report", tmp_path / "out").status == 0
    assert f"was run: model {model}" in (tmp_path / "out" / "report.html").read_text()
