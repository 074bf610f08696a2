"""Every shipped recipe passes its check, and trains a tiny model on local rows, with overrides alone."""

import importlib.util
import json
import logging
import math
import subprocess
import warnings

import pytest
from click.testing import CliRunner
from support.processes import ORPO_TRL, TRAIN_ENVIRONMENT
from support.small import REPOSITORY, make_rows
from transformers import AutoTokenizer

from orpo_trl.cli import main
from orpo_trl.paths import RECIPES
from orpo_trl.recipe.parse import load_recipe

MODEL = "recipes/quickstart/model"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
# Of each kind one that the default tests check: from scratch, a paper's checkpoint, QLoRA.
QUICK = ("quickstart", "mistral_beta", "qwen3_8b_qlora")
# Of each strategy one that really starts processes: ZeRO-3, ZeRO-2, one process with an adapter.
LAUNCHED = ("mistral_beta", "opt_350m_hh_rlhf", "qwen3_8b_qlora")
SAVING = ("--save_strategy", "steps", "--save_steps", "1", "--load_best_model_at_end", "false")
# Splits that the recipes name.
SPLITS = ("train", "test", "train_prefs", "test_prefs")


def turn(role, content):
    return {"role": role, "content": content}


def chat(row):
    talk = [turn("user", row["prompt"]), turn("assistant", "Well."), turn("user", "Go on.")]
    return {side: [*talk, turn("assistant", row[side])] for side in ("chosen", "rejected")}


def transcript(row):
    return {side: f"\n\nHuman: {row['prompt']}\n\nAssistant: {row[side]}" for side in ("chosen", "rejected")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Datasets of conversations and of HH-RLHF transcripts, with the splits that recipes name."""
    made = {}
    for name, shape in (("chat", chat), ("hh", transcript)):
        made[name] = tmp_path_factory.mktemp(name)
        files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in SPLITS)
        (made[name] / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
        for split in SPLITS:
            rows = [shape(row) for row in make_rows(60 if "train" in split else 8)]
            (made[name] / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def overrides(name, folders, output):
    return [
        *f"--model_name_or_path {MODEL} --from_scratch --dtype float32 --bf16 false --optim adamw_torch".split(),
        *"--load_in_4bit false --attn_implementation null --max_length 256 --max_prompt_length 200".split(),
        *"--max_steps 2 --warmup_steps 1 --logging_steps 1".split(),
        "--dataset_name", str(folders["hh" if "hh" in name else "chat"]), "--output_dir", str(output),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_shipped_recipe_passes_its_check(name, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    arguments = ["check", name, *overrides(name, folders, tmp_path), "--num_processes", "2", "--gpu_memory", "80"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "✗" not in result.output
    assert "Nothing to fix." in result.output


@pytest.fixture
def run_orpo(monkeypatch):
    """The entry point, in this process. What it sets up for a whole process is taken back."""
    monkeypatch.chdir(REPOSITORY)
    logger = logging.getLogger("orpo_trl")
    handlers, level = list(logger.handlers), logger.level
    spec = importlib.util.spec_from_file_location("run_orpo", REPOSITORY / "scripts" / "run_orpo.py")
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        spec.loader.exec_module(module)
        yield module.main
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipe_trains(name, folders, tmp_path, run_orpo):
    run_orpo([name, *overrides(name, folders, tmp_path), *SAVING, "--deepspeed", "null"])
    check_run(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHED)
def test_shipped_recipe_trains_under_the_strategy_that_it_names(name, folders, tmp_path):
    engine = load_recipe([name]).settings.get("deepspeed")
    processes = ["--num_processes", "2"] if engine else []
    done = subprocess.run(
        [ORPO_TRL, "train", name, *processes, *overrides(name, folders, tmp_path), *SAVING],
        cwd=REPOSITORY, env=TRAIN_ENVIRONMENT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    if engine:
        assert f"cpu_{engine}.yaml" in done.stdout.splitlines()[0]
    check_run(tmp_path)


def check_run(folder):
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    logs = [entry for entry in state["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in logs] == [1, 2]
    assert all(math.isfinite(entry["loss"]) and 0 < entry["loss"] < 20 for entry in logs)
    # The template is saved with the tokenizer, for generation.
    assert AutoTokenizer.from_pretrained(folder).chat_template
