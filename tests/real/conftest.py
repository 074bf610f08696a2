"""Real data: read from the folder that ORPO_TRL_DATA names, skipped where it is unset."""

import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def data() -> Path:
    folder = os.environ.get("ORPO_TRL_DATA")
    if not folder:
        pytest.skip("ORPO_TRL_DATA is not set: it names the folder with ultrafeedback/ and tokenizers/")
    return Path(folder)


@pytest.fixture
def mistral_tokenizer(data):
    return AutoTokenizer.from_pretrained(data / "tokenizers" / "mistral-7b-v0.1")
