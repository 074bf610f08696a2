"""Fixtures and the environment of all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A user's settings must not decide a test. Libraries read them when they are imported, so they are cleared here, and
# nothing above imports one of those libraries.
for name in [name for name in os.environ if name.startswith(("WANDB_", "HF_", "ORPO_")) and name != "ORPO_TRL_DATA"]:
    del os.environ[name]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A second thread slows tiny models down, and sums then depend on how it shares the work.
os.environ["OMP_NUM_THREADS"] = "1"

# Absolute times say nothing on a shared machine.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


@pytest.fixture
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "recipes" / "quickstart" / "model")
