"""What `${NAME}` of a recipe holds leaves the process nowhere."""

import copy
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.hostile import DATA, SCRIPT
from support.processes import TRAIN_ENVIRONMENT
from support.small import TOKENIZER, settings

from orpo_trl.hidden import hide, hide_all, hide_contents


@pytest.fixture(autouse=True)
def nothing_hidden_afterwards():
    yield
    hide_contents({})


def test_contents_are_shown_by_their_names(monkeypatch):
    monkeypatch.setenv("DATA", "/data/jane")
    monkeypatch.setenv("WHO", "jane")
    hide_contents({"/data/jane/rows.jsonl": "${DATA}/rows.jsonl", "jane": "${WHO}"})
    assert hide("read /data/jane/rows.jsonl, /data/jane/b and jane") == "read ${DATA}/rows.jsonl, ${DATA}/b and ${WHO}"
    assert hide("janet") == "janet"  # a short one as a whole word only
    value = {"jane": ["/data/jane/x", 1, None, ("jane",)]}
    assert hide_all(value) == {"${WHO}": ["${DATA}/x", 1, None, ("${WHO}",)]}
    hide_contents({})
    assert hide_all(value) is value


def test_pickled_settings_and_those_of_trackers_hide_contents_and_a_copy_keeps_them(monkeypatch, tmp_path):
    monkeypatch.setenv("PLACE", str(tmp_path))
    args = settings(tmp_path / "out", hub_token="hf_1234567890")
    hide_contents({f"{tmp_path}/out": "${PLACE}/out"})
    assert pickle.loads(pickle.dumps(args)).output_dir == "${PLACE}/out"
    assert str(tmp_path) not in args.to_json_string()
    assert b"hf_1234567890" not in pickle.dumps(args)
    copied = copy.deepcopy(args)
    assert (copied.output_dir, copied.hub_token) == (f"{tmp_path}/out", "hf_1234567890")


RECIPE = """\
extends: quickstart.yaml
model_name_or_path: ${ORPO_MODEL}
chat_template_path: ${ORPO_TEMPLATE}
datasets: [{path: "${ORPO_DATA_FOLDER}/train.jsonl"}]
eval_datasets: {held_out: {path: "${ORPO_DATA_FOLDER}/test.jsonl"}}
dataset_name: null
output_dir: ${ORPO_OUT}/run
hub_token: ${ORPO_TOKEN}
hub_model_id: ${ORPO_TOKEN}/model
run_name: ${ORPO_NAME}-run
run_group: ${ORPO_NAME}
run_tags: ["${ORPO_NAME}"]
project: ${ORPO_NAME}
report_to: [wandb, tensorboard]
wandb_mode: offline
max_steps: 2
eval_strategy: steps
eval_steps: 2
save_strategy: steps
save_steps: 2
logging_steps: 1
generate_during_eval: true
"""


@pytest.mark.slow
def test_no_file_tracker_or_message_of_a_run_holds_the_contents(tmp_path):
    """One run with a marker in paths, token and names, and one that fails; every byte is searched."""
    data, model, out = (tmp_path / f"marker-{name}" for name in ("data", "model", "out"))
    shutil.copytree(DATA, data)
    shutil.copytree(TOKENIZER, model)
    template = tmp_path / "marker-template.jinja"
    template.write_text((model / "chat_template.jinja").read_text())
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    environment = {
        **TRAIN_ENVIRONMENT,
        "ORPO_MODEL": str(model), "ORPO_DATA_FOLDER": str(data), "ORPO_TEMPLATE": str(template), "ORPO_OUT": str(out),
        "ORPO_TOKEN": "marker-token", "ORPO_NAME": "marker-name", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true",
    }  # fmt: skip

    def run(*overrides: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(SCRIPT), str(tmp_path / "recipe.yaml"), *overrides]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    done = run()
    assert done.returncode == 0, done.stderr[-3000:]
    failed = run("--pad_token", "<absent>", "--output_dir", str(tmp_path / "second"))
    assert failed.returncode == 2
    (data / "train.jsonl").write_text('{"chosen": 1}\n')
    malformed = run("--output_dir", str(tmp_path / "third"))
    assert malformed.returncode == 2
    assert "${ORPO_DATA_FOLDER}/train.jsonl, row 0" in malformed.stderr
    for text in (done.stdout, done.stderr, failed.stdout, failed.stderr, malformed.stdout, malformed.stderr):
        assert "marker-" not in text
    files = [path for top in (out, tmp_path / "wandb") for path in top.rglob("*") if path.is_file()]
    held = [str(path.relative_to(tmp_path)) for path in files if b"marker-" in path.read_bytes()]
    assert held == []
    names = {path.name for path in files}
    assert {"training_args.bin", "run.json", "README.md", "metrics.jsonl", "samples.jsonl"} <= names
    assert any(name.endswith(".wandb") for name in names)
    assert any(name.startswith("events.out") for name in names)
    assert "${ORPO_DATA_FOLDER}/train.jsonl" in (Path(out) / "run" / "README.md").read_text()
    assert os.path.isfile(out / "run" / "model.safetensors")
