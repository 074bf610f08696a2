"""Versions of installed packages, as records of runs and evaluations have them."""

import importlib.metadata
from collections.abc import Iterable

# What decides a training run.
PACKAGES = (
    "orpo-trl", "torch", "transformers", "trl", "datasets", "tokenizers", "accelerate", "deepspeed", "peft",
    "bitsandbytes", "wandb",
)  # fmt: skip


def installed_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions by package, without those that are not installed."""
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
