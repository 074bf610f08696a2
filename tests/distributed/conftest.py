"""What the runs of this folder share."""

import pytest
from support.small import tiny_model


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a tiny model with a sliding window."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model(sliding_window=7).save_pretrained(folder)
    return folder
