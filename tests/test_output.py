"""Standard output of real processes in which everything else also tries to print there."""

import json
import os
import shlex
import subprocess

import pytest
import yaml
from support.processes import ORPO_TRL, TRAIN_ENVIRONMENT
from support.small import REPOSITORY, save_model

# Runs at the start of Python. It prints when transformers is imported and when the process ends, as Python, as C code
# and as a child process.
SITECUSTOMIZE = """
import atexit, os, subprocess, sys

def shout(when):
    print("NOISE", when)
    os.write(1, b"NOISE of C code\\n")
    subprocess.run(["echo", "NOISE of a child process"])

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "transformers":
            shout("import")
            atexit.register(shout, "exit")

sys.meta_path.insert(0, Finder())
"""
HOSTILE = {
    "WANDB_MODE": "offline", "WANDB_DISABLED": "true", "TRANSFORMERS_VERBOSITY": "debug", "DATASETS_VERBOSITY": "debug",
    "ACCELERATE_LOG_LEVEL": "DEBUG", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "always",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(tmp_path):
    """Runs the command in the hostile environment."""
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    paths = os.pathsep.join([str(tmp_path), TRAIN_ENVIRONMENT["PYTHONPATH"]])
    environment = {**TRAIN_ENVIRONMENT, **HOSTILE, "PYTHONPATH": paths}

    def call(*arguments: object, status: int = 0, **kwargs) -> subprocess.CompletedProcess:
        command = [ORPO_TRL, *map(str, arguments)]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, **kwargs)
        assert done.returncode == status, done.stderr[-3000:]
        return done

    return call


def test_expanded_recipe_is_yaml(run):
    done = run("recipes", "expand", "quickstart")
    assert yaml.safe_load(done.stdout)["model_name_or_path"] == "recipes/quickstart/model"
    assert done.stderr.count("NOISE import") == done.stderr.count("NOISE exit") == 1
    assert "NOISE of C code" in done.stderr
    assert "NOISE of a child process" in done.stderr
    assert "Running in WANDB offline mode" in done.stderr


@pytest.mark.slow
def test_dry_run_is_one_command_line(run):
    done = run("train", "quickstart", "--dry_run")
    assert len(done.stdout.splitlines()) == 1
    assert shlex.split(done.stdout)[-1] == "recipes/quickstart.yaml"


@pytest.mark.slow
def test_training_prints_to_the_real_standard_output(run, tmp_path):
    """One process, and the ranks of a command line that is printed first."""
    words = ["train", "quickstart", "--max_steps", "1", "--eval_strategy", "no", "--output_dir"]
    alone = run(*words, tmp_path / "one").stdout.splitlines()
    assert f"Saved the model to {tmp_path / 'one'}" in alone
    command, *printed = run(*words, tmp_path / "two", "--engine", "fsdp2", "--num_processes", "2").stdout.splitlines()
    assert shlex.split(command)[1] == "launch"
    assert f"Saved the model to {tmp_path / 'two'}" in printed


@pytest.mark.slow
def test_scores_are_json_lines(run, model):
    done = run("logps", model, "recipes/quickstart/data", "--split", "test")
    assert [json.loads(line)["row"] for line in done.stdout.splitlines()] == list(range(67))


@pytest.mark.slow
def test_report_names_the_files_that_it_writes(run, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    done = run("report", tmp_path, "--png", tmp_path / "png", "--csv", tmp_path / "m.csv")
    assert str(tmp_path / "report.html") in done.stdout.splitlines()
    assert all(os.path.isfile(line) for line in done.stdout.splitlines())


@pytest.mark.slow
def test_imported_recipe_is_yaml(run, tmp_path):
    (tmp_path / "a.yml").write_text("rl: orpo\nbase_model: some/model\norpo_alpha: 0.2\ndatasets: [{path: a/b}]\n")
    assert yaml.safe_load(run("recipes", "import", tmp_path / "a.yml").stdout)["beta"] == 0.2


@pytest.mark.slow
def test_check_prints_its_report(run):
    lines = run("check", "quickstart").stdout.splitlines()
    assert lines[0] == "1. Recipe: ✓"
    assert lines[-1] == "Nothing to fix."
    assert not any("NOISE" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "beginning"),
    [
        (["recipes"], "llama2_7b_ultrafeedback "),
        (["recipes", "quickstart"], "# "),
        (["schema", "beta"], "==== ORPO ===="),
        (["completion", "bash"], "_orpo_trl_completion() {"),
        (["--help"], "Usage: orpo-trl"),
        (["train", "--help"], "Usage: orpo-trl train"),
        (["--version"], "orpo-trl, version"),
    ],
)
def test_other_answers_begin_as_they_should(run, arguments, beginning):
    text = run(*arguments).stdout
    assert text.strip().startswith(beginning)
    assert "NOISE" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["recipes", "expand", "absent.yaml"], 2),
        (["train", "quickstart", "--bta", "1"], 2),
    ],
)
def test_failing_command_answers_nothing(run, arguments, status):
    done = run(*arguments, status=status)
    assert done.stdout == ""
    assert "Error: " in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["recipes expand quickstart", "schema", "check quickstart"])
def test_closed_pipe_is_quiet(command):
    shell = f"set -o pipefail; {ORPO_TRL} {command} | head -n 1; exit 0"
    done = subprocess.run(["bash", "-c", shell], cwd=REPOSITORY, env=TRAIN_ENVIRONMENT, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1
    assert "Broken pipe" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_error(closed):
    shell = f"{ORPO_TRL} recipes expand quickstart {closed}"
    done = subprocess.run(["bash", "-c", shell], cwd=REPOSITORY, env=TRAIN_ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# ") == (closed == "2>&-")


@pytest.mark.parametrize(
    "command", [["recipes"], ["--help"], pytest.param(["recipes", "expand", "quickstart"], marks=pytest.mark.slow)]
)
def test_a_full_disk_behind_standard_output_is_named(command):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [ORPO_TRL, *command], stdout=full, stderr=subprocess.PIPE, text=True, env=TRAIN_ENVIRONMENT
        )
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr


@pytest.mark.slow
def test_a_value_that_begins_like_the_flag_for_help_is_no_question(run):
    """The help would end the command with status 0, as if it had trained."""
    done = run("train", "quickstart", "--dry_run", "--run_name", "-hello")
    assert shlex.split(done.stdout)[-2:] == ["--run_name", "-hello"]
    assert run("train", "-h").stdout.startswith("Usage:")
    assert run("train", "quickstart", "-h").stdout.startswith("Usage:")
