"""Configs of other tools are imported by the command, and train a tiny model on local rows with overrides alone."""

import json
import math
import subprocess

import pytest
from support.foreign_configs import CONFIGS
from support.processes import ORPO_TRL, TRAIN_ENVIRONMENT
from support.small import REPOSITORY, make_rows

from orpo_trl.recipe.parse import load_recipe


def orpo_trl(*arguments):
    command = [ORPO_TRL, *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, env=TRAIN_ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS])
def test_imported_recipe_trains(name, tmp_path):
    (tmp_path / name).write_text(CONFIGS[name])
    recipe, rows, output = tmp_path / "imported.yaml", tmp_path / "rows.jsonl", tmp_path / "out"
    done = orpo_trl("recipes", "import", tmp_path / name, "-o", recipe)
    assert "Differences:" in done.stderr
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows(24)))
    sharding = load_recipe([str(recipe)]).settings.get("deepspeed")
    orpo_trl(
        "train", recipe, *(["--num_processes", "2"] if sharding else []),
        *"--model_name_or_path recipes/quickstart/model --from_scratch --dtype float32 --bf16 false".split(),
        *"--optim adamw_torch --load_in_4bit false --attn_implementation null --report_to none".split(),
        *"--strings_as_messages --max_length 256 --max_prompt_length 200 --max_steps 2 --warmup_steps 1".split(),
        *"--logging_steps 1 --save_strategy steps --save_steps 1 --eval_strategy no --test_split_size null".split(),
        *"--datasets [] --eval_datasets {} --dataset_train_split train --push_to_hub false".split(),
        "--dataset_name", rows, "--output_dir", output,
    )  # fmt: skip
    state = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 2
    assert all(math.isfinite(loss) and 0 < loss < 20 for loss in losses)
