"""Fixtures and the environment of all tests."""

import os

# A user's settings must not decide a test. Libraries read them at import, so they are cleared before any import.
for _name in list(os.environ):
    if _name.startswith(("WANDB_", "HF_", "ORPO_")) and _name != "ORPO_TRL_DATA":
        del os.environ[_name]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Absolute times say nothing on a shared machine.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


@pytest.fixture
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "recipes" / "quickstart" / "model")
