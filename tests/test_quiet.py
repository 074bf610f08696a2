"""Warnings that are hidden, and those that are not."""

import logging
import subprocess
import warnings

import pytest
from support.processes import ENGINES, ORPO_TRL, TRAIN_ENVIRONMENT, launch
from support.small import REPOSITORY

from orpo_trl.quiet import hide_known_warnings

RUN_ORPO = REPOSITORY / "scripts" / "run_orpo.py"
SHORT = "recipes/quickstart.yaml --max_steps 1 --warmup_steps 0 --eval_strategy no --save_strategy no".split()
HIDDEN = ("is deprecated and will be removed in v6", "Setting accelerator to CPU", "torch.distributed.")


@pytest.fixture(autouse=True)
def fresh_filters():
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        hide_known_warnings()
        yield


@pytest.mark.parametrize(
    ("message", "is_hidden"),
    [
        ("`gradient_checkpointing` is deprecated and will be removed in v6.", True),
        ("`gradient_checkpointing_kwargs` is deprecated and will be removed in v6.", True),
        ("`is_gradient_checkpointing` is deprecated and will be removed in v6.", True),
        ("`torch.distributed.all_gather_into_tensor` is deprecated.", True),
        ("`warmup_ratio` is deprecated and will be removed in v6.", False),
    ],
)
def test_known_warnings_are_hidden_and_others_are_shown(message, is_hidden):
    with warnings.catch_warnings(record=True) as shown:
        warnings.warn(message, FutureWarning, stacklevel=2)
    assert bool(shown) != is_hidden


@pytest.mark.parametrize(
    ("logger", "message", "is_hidden"),
    [
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: %s.", True),
        ("bitsandbytes.backends.cpu.ops", "Something else: %s", False),
        ("DeepSpeed", "Setting accelerator to CPU. %s", True),
        ("DeepSpeed", "Loss scale %s", False),
    ],
)
def test_known_log_messages_are_hidden_and_others_are_shown(logger, message, is_hidden):
    shown: list[logging.LogRecord] = []

    class Note(logging.Handler):
        def emit(self, record):
            shown.append(record)

    handler = Note()
    found = logging.getLogger(logger)
    found.addHandler(handler)
    try:
        found.warning(message, "detail")
    finally:
        found.removeHandler(handler)
    assert bool(shown) != is_hidden


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "config"),
    [
        (["--gradient_checkpointing", "true", "--use_peft", "--lora_target_modules", "all-linear"], None),
        ([], ENGINES / "cpu_zero3.yaml"),
    ],
    ids=["lora", "zero3"],
)
def test_training_shows_none_of_them(overrides, config, tmp_path):
    done = launch(RUN_ORPO, *SHORT, *overrides, "--output_dir", str(tmp_path), engine=config)
    text = done.stdout + done.stderr
    # The process of `accelerate launch` itself imports DeepSpeed, and is not ours.
    assert text.count("Setting accelerator to CPU") == (1 if config else 0)
    assert not any(warning in text for warning in HIDDEN if "accelerator" not in warning)


@pytest.mark.slow
def test_command_that_starts_training_shows_none_of_them_either(tmp_path):
    command = [ORPO_TRL, "train", *SHORT, "--engine", "zero3", "--num_processes", "2", "--output_dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=TRAIN_ENVIRONMENT, capture_output=True, text=True, timeout=900, check=True
    )
    assert not any(warning in done.stdout + done.stderr for warning in HIDDEN)
