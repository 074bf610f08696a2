"""Packages that libraries load wherever they are installed, left out where a run does not use them.

transformers loads peft with its trainer, peft loads bitsandbytes, and that loads torch's compiler: four CPU seconds.
TRL loads wandb and trackio, accelerate loads DeepSpeed. For Python, None in `sys.modules` means that there is no such
package, and the libraries work so.

Imports neither torch nor transformers: call this before them.
"""

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

from orpo_trl import processes
from orpo_trl.recipe.files import Recipe, RecipeError, find_recipe, read_recipe, shipped_path

# What hints at the use of a package, in the keys and values of a recipe or on a command line. Where in doubt, a package
# is loaded.
_HINTS = {
    "peft": ("peft", "lora", "adapter", "load_in_", "quant", "trust_remote_code"),
    "bitsandbytes": (
        "peft", "lora", "adapter", "load_in_", "quant", "trust_remote_code", "bnb", "bit", "paged", "ademamix",
        "galore", "apollo",
    ),
    "wandb": ("wandb", "trust_remote_code"),
    "trackio": ("trackio", "trust_remote_code"),
    "deepspeed": ("deepspeed", "trust_remote_code"),
}  # fmt: skip
_TRACKERS = {"wandb", "trackio"}
# What this process has left out.
left_out: set[str] = set()


def leave_out_all() -> None:
    """Leave all of them out of this process: for commands that read recipes and load no model."""
    _leave_out(list(_HINTS))


def leave_out_torch() -> None:
    """Leave torch out as well: for a command that reads the keys of recipes, and no recipe."""
    _leave_out([*_HINTS, "torch"])
    if "torch" in left_out:
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # else transformers says that it has not found torch


def leave_out_unused(arguments: list[str], engine: str | None = None) -> None:
    """Leave out of this process what a run does not use; see `unused`."""
    _leave_out(unused(arguments, engine))


def _leave_out(names: list[str]) -> None:
    if "transformers" in sys.modules:  # it has looked for them, as in a program that calls a command
        return
    for name in names:
        if name not in sys.modules and importlib.util.find_spec(name) is not None:
            sys.modules[name] = None  # type: ignore[assignment]
            left_out.add(name)


def is_installed(name: str) -> bool:
    """Whether there is a package of this name, left out or not."""
    return name in left_out or importlib.util.find_spec(name) is not None


def unused(arguments: list[str], engine: str | None = None) -> list[str]:
    """The packages that a run does not use.

    Args:
        arguments: a recipe and overrides, as of `load_recipe`. Where the recipe cannot be read, there are none.
        engine: that this process starts the run with. A config file may name DeepSpeed as well.
    """
    try:
        recipe = read_recipe(find_recipe(arguments[0]))
    except (RecipeError, OSError, IndexError):
        return []
    words = " ".join([*_words(recipe.settings), *arguments[1:]]).replace("-", "_").replace("=", " ").lower()
    names = [name for name, hints in _HINTS.items() if not any(hint in words for hint in hints)]
    if "report_to" in words and re.search(r"\ball\b", words):  # all trackers that are installed
        names = [name for name in names if name not in _TRACKERS]
    if engine or processes.is_launched():  # then the engine decides, and a recipe need not name it
        names = [name for name in names if name != "deepspeed"]
    return [name for name in names if name != "peft" or not _may_be_adapter(recipe, arguments)]


def _words(value: Any) -> list[str]:
    """The keys and values of settings in their order: a key stands in front of its value."""
    if isinstance(value, dict):
        return [word for key, inner in value.items() for word in (str(key), *_words(inner))]
    if isinstance(value, list):
        return [word for inner in value for word in _words(inner)]
    return [str(value)]


def _may_be_adapter(recipe: Recipe, arguments: list[str]) -> bool:
    """Whether the model may be an adapter, which transformers loads with peft. Of a Hub id, nobody knows."""
    model = recipe.settings.get("model_name_or_path")
    if not isinstance(model, str) or any("model_name_or_path" in word.replace("-", "_") for word in arguments):
        return True
    folder = shipped_path(model) or Path(model)
    return not folder.is_dir() or (folder / "adapter_config.json").exists()
