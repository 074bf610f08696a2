"""A recipe file and command-line overrides to the settings of a run."""

import os
from pathlib import Path

import yaml
from trl import TrlParser

from orpo_trl.config import DataArguments, ModelArguments, ORPOConfig

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


class RecipeError(ValueError):
    """A recipe that cannot be read, or whose settings do not fit together."""


def parse_recipe(arguments: list[str]) -> tuple[ModelArguments, DataArguments, ORPOConfig]:
    """Settings from `RECIPE [--key value …]`; an override wins over the recipe, which wins over the defaults.

    Args:
        arguments: the command line after the script's name.

    Raises:
        RecipeError: naming the file, keys or overrides at fault.
        SystemExit: from argparse, where a value has the wrong type, and after `--help`.
    """
    parser = TrlParser(
        (ModelArguments, DataArguments, ORPOConfig), usage="run_orpo.py RECIPE [--key value …]", allow_abbrev=False
    )
    recipe, overrides = (None, arguments)
    if arguments and not arguments[0].startswith("-"):
        recipe, *overrides = arguments
    settings = {} if recipe is None else _read(Path(recipe))
    unknown = parser.set_defaults_with_config(**settings)
    if unknown:
        keys = ", ".join(f"`{key[2:]}`" for key in unknown[::2])
        raise RecipeError(f"{recipe}: unknown keys {keys}. `run_orpo.py --help` lists all keys.")
    if recipe is None and not {"-h", "--help"} & set(arguments):
        parser.error("name a recipe first, such as recipes/quickstart.yaml")
    parser.set_defaults(deepspeed=resolve_engine(parser.get_default("deepspeed")))
    try:
        model, data, training, unused = parser.parse_args_into_dataclasses(
            args=_resolve_engine_override(overrides), return_remaining_strings=True
        )
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{recipe}: {error}") from error
    if unused:
        raise RecipeError(f"Unknown overrides {' '.join(unused)}. `run_orpo.py --help` lists all keys.")
    if training.resume_from_checkpoint in ("true", "false"):  # a folder, or whether to find the latest one
        training.resume_from_checkpoint = training.resume_from_checkpoint == "true"
    if training.deepspeed and training.use_cpu:
        # accelerate starts DeepSpeed's communication for accelerators alone; without it DeepSpeed counts one process.
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    return model, data, training


def resolve_engine(deepspeed: str | None) -> str | None:
    """What the recipe's `deepspeed` stands for in this launch.

    `zero2` and `zero3` name files of recipes/deepspeed/. An engine of the accelerate config that the run was launched
    with wins over the recipe's, and a run of one process has nothing to shard.
    """
    if deepspeed not in ("zero2", "zero3"):
        return deepspeed
    launched = any(os.environ.get(f"ACCELERATE_USE_{engine}") == "true" for engine in ("DEEPSPEED", "FSDP"))
    if launched or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    return str(RECIPES / "deepspeed" / f"{deepspeed}.json")


def _resolve_engine_override(overrides: list[str]) -> list[str]:
    resolved = []
    for position, word in enumerate(overrides):
        key, separator, value = word.partition("=")
        if key == "--deepspeed" and separator:
            word = f"--deepspeed={resolve_engine(value) or ''}"
        elif position and overrides[position - 1] == "--deepspeed":
            word = resolve_engine(word) or ""
        resolved.append(word)
    return resolved


def _read(path: Path) -> dict:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"The recipe {path} does not exist.") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise RecipeError(f"The recipe {path} is not a YAML file: {error}") from error
    if not isinstance(settings, dict):
        raise RecipeError(f"The recipe {path} must be a mapping of keys to values, got {type(settings).__name__}.")
    odd = [key for key in settings if not isinstance(key, str)]
    if odd:
        raise RecipeError(f"The recipe {path} has a key that is not a name: {odd[0]!r}.")
    return settings
