"""Fixtures and the environment of all tests."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from hypothesis import HealthCheck, settings
from support.small import REPOSITORY
from transformers import AutoTokenizer

# Absolute times say nothing on a shared machine.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(REPOSITORY / "recipes" / "quickstart" / "model")
