"""A tiny model with the quickstart's tokenizer, as a folder."""

from pathlib import Path

import pytest
from support.small import tiny_model

from orpo_trl.paths import RECIPES


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(RECIPES / "quickstart" / "model")
    tiny_model(len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
