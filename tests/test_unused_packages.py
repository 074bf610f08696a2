"""Packages that a run does not use: they are not loaded, and need not be there."""

import subprocess
import sys

import pytest
from support.processes import TRAIN_ENVIRONMENT
from support.small import REPOSITORY

from orpo_trl.recipe.keys import recipe_keys
from orpo_trl.recipe.show import schema_text
from orpo_trl.unused_packages import unused

# Each may be absent where a run does not use it.
OPTIONAL = ["deepspeed", "wandb", "matplotlib", "tensorboard", "trackio", "peft", "bitsandbytes"]
SHORT = ["--max_steps", "1", "--eval_strategy", "no", "--per_device_train_batch_size", "2"]
# Left out where nothing hints at their use.
EVERY = {"peft", "bitsandbytes", "wandb", "trackio", "deepspeed"}
# `orpo-trl`, in a process that has no packages of these names.
COMMAND = """
import sys
for name in sys.argv[1].split(): sys.modules[name] = None
sys.argv[:2] = ["orpo-trl"]
from orpo_trl.cli import main
try: main()
finally:
    names = sorted(name for name, module in sys.modules.items() if module and "." not in name)
    print("loaded:", *names, file=sys.stderr)
"""


def orpo_trl_without(names, *arguments):
    return subprocess.run(
        [sys.executable, "-c", COMMAND, " ".join(names), *map(str, arguments)],
        capture_output=True, text=True, env=TRAIN_ENVIRONMENT, cwd=REPOSITORY,
    )  # fmt: skip


def loaded(done) -> set[str]:
    _, found, names = done.stderr.rpartition("loaded:")
    assert found
    return set(names.split())


def test_quickstart_trains_where_none_of_the_optional_packages_is_there(tmp_path):
    done = orpo_trl_without(OPTIONAL, "train", "quickstart", *SHORT, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "The model card has no curve: matplotlib is not installed." in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONAL)
def test_quickstart_trains_without(name, tmp_path):
    done = orpo_trl_without([name], "train", "quickstart", *SHORT, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr


def test_run_loads_none_of_the_packages_that_it_does_not_use(tmp_path):
    done = orpo_trl_without([], "train", "quickstart", *SHORT, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert not loaded(done) & ({*OPTIONAL} - {"matplotlib"})  # which draws the curve of the model card


@pytest.mark.parametrize("arguments", [["schema", "beta"], ["recipes", "expand", "quickstart"]])
def test_commands_that_read_recipes_load_no_optional_package(arguments):
    done = orpo_trl_without([], *arguments)
    assert done.returncode == 0, done.stderr
    assert not loaded(done) & {*OPTIONAL}


def test_schema_loads_no_torch_and_lists_what_it_would_list_with_it():
    done = orpo_trl_without([], "schema")
    assert "torch" not in loaded(done)
    assert done.stdout == schema_text(list(recipe_keys()))
    assert done.stderr.startswith("loaded:")  # without a warning that torch is missing


def test_command_that_needs_an_absent_package_names_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    done = orpo_trl_without(["matplotlib"], "report", tmp_path)
    assert done.returncode == 2
    assert "Error: this needs the package matplotlib, which is not installed" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "used"),
    [
        ([], set()),
        (["--use_peft", "true"], {"peft", "bitsandbytes"}),
        (["--use-peft"], {"peft", "bitsandbytes"}),
        (["--lora_r=8"], {"peft", "bitsandbytes"}),
        (["--load_in_4bit"], {"peft", "bitsandbytes"}),
        (["--optim", "paged_adamw_8bit"], {"bitsandbytes"}),
        (["--report_to", "wandb"], {"wandb"}),
        (["--report_to=tensorboard", "wandb"], {"wandb"}),
        (["--report_to", "all"], {"wandb", "trackio"}),
        (["--report_to", "[all]"], {"wandb", "trackio"}),
        (["--optim", "ademamix"], {"bitsandbytes"}),
        (["--optim", "galore_adamw"], {"bitsandbytes"}),  # whose package imports it
        (["--report_to", "trackio"], {"trackio"}),
        (["--deepspeed", "zero3"], {"deepspeed"}),
        (["--trust_remote_code"], EVERY),
        (["--model_name_or_path", "org/any"], {"peft"}),
    ],
)
def test_package_is_loaded_where_anything_hints_at_its_use(overrides, used):
    assert EVERY - set(unused(["quickstart", *overrides])) == used


def test_engine_of_a_launcher_needs_no_hint(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert set(unused(["quickstart"])) == EVERY - {"deepspeed"}
    monkeypatch.delenv("LOCAL_RANK")
    assert set(unused(["quickstart"], "zero3")) == EVERY - {"deepspeed"}


def test_parents_and_folders_hint_too(tmp_path):
    (tmp_path / "parent.yaml").write_text("use_peft: true\n")
    (tmp_path / "mine.yaml").write_text("extends: [quickstart.yaml, parent.yaml]\n")
    assert unused([str(tmp_path / "mine.yaml")]) == ["wandb", "trackio", "deepspeed"]
    (tmp_path / "adapter").mkdir()
    (tmp_path / "own.yaml").write_text(f"model_name_or_path: {tmp_path / 'adapter'}\n")
    assert "peft" not in unused([str(tmp_path / "own.yaml")])  # "adapter" in a name is a hint as well
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "own.yaml").write_text(f"model_name_or_path: {folder}\n")
    assert "peft" in unused([str(tmp_path / "own.yaml")])
    (folder / "adapter_config.json").write_text("{}")
    assert "peft" not in unused([str(tmp_path / "own.yaml")])
    assert unused(["no such recipe"]) == []
