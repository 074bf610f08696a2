"""`orpo-trl train` in real processes: it runs the command that it prints."""

import json
import shlex
import subprocess

import pytest
from support.processes import ORPO_TRL, TRAIN_ENVIRONMENT
from support.small import REPOSITORY


def losses(folder):
    state = json.loads(next(folder.glob("checkpoint-*/trainer_state.json")).read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--engine", "zero3", "--num_processes", "2"],
        pytest.param(["--engine", "zero2", "--num_processes", "2"], marks=pytest.mark.long),
        pytest.param(["--engine", "fsdp2", "--num_processes", "2"], marks=pytest.mark.long),
    ],
    ids=" ".join,
)
def test_printed_command_does_the_same_as_train(tmp_path, flags):
    def train(output, *more):
        overrides = "--max_steps 2 --logging_steps 1 --save_strategy steps --eval_strategy no --output_dir".split()
        return subprocess.run(
            [ORPO_TRL, "train", "quickstart", *flags, *overrides, str(output), *more],
            cwd=REPOSITORY, env=TRAIN_ENVIRONMENT, capture_output=True, text=True, timeout=900,
        )  # fmt: skip

    done = train(tmp_path / "a")
    assert done.returncode == 0, done.stderr[-3000:]
    dry = train(tmp_path / "a", "--dry_run").stdout.strip()
    if flags:  # one process runs in that of `orpo-trl train`
        assert done.stdout.splitlines()[0] == dry
    pasted = dry.replace(str(tmp_path / "a"), str(tmp_path / "b"))
    subprocess.run(shlex.split(pasted), cwd=REPOSITORY, env=TRAIN_ENVIRONMENT, check=True, capture_output=True)
    assert len(losses(tmp_path / "a")) == 2
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--engine", "zero3", "--num_processes", "2"]], ids=" ".join)
def test_environment_that_nobody_has_activated_is_enough(tmp_path, flags):
    """As under systemd and pipx: the programs beside the interpreter are not in PATH."""
    done = subprocess.run(
        [ORPO_TRL, "train", "quickstart", *flags, *"--max_steps 1 --eval_strategy no --output_dir".split(), tmp_path],
        cwd=REPOSITORY, env={**TRAIN_ENVIRONMENT, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "says"), [("fsdp2", True), ("zero3", False)])
def test_checkpointing_that_is_left_open_is_settled_before_two_processes_train(tmp_path, engine, says):
    """Under DeepSpeed it stays on: a model that is made to be counted would be shared out there."""
    settings = "--gradient_checkpointing null --max_steps 1 --eval_strategy no --output_dir".split()
    done = subprocess.run(
        [ORPO_TRL, "train", "quickstart", "--engine", engine, "--num_processes", "2", *settings, tmp_path],
        cwd=REPOSITORY, env=TRAIN_ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Gradient checkpointing is off: without it, about ") == says


@pytest.mark.slow
def test_failing_run_has_a_failing_exit_status(tmp_path):
    done = subprocess.run(
        [ORPO_TRL, "train", "quickstart", "--dataset_name", "./absent.jsonl", "--output_dir", str(tmp_path)],
        cwd=REPOSITORY, env=TRAIN_ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "absent.jsonl" in done.stderr
