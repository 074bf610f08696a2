"""A recipe and command-line overrides to the settings of a run, or to all that is wrong with them."""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from orpo_trl.config import DataArguments, ModelArguments, ORPOConfig, SettingsError
from orpo_trl.launch import DEEPSPEED, resolve_deepspeed
from orpo_trl.recipe.files import (
    COMMAND_LINE,
    Problem,
    Recipe,
    RecipeError,
    find_recipe,
    read_recipe,
    read_value,
    shipped_path,
)
from orpo_trl.recipe.keys import GROUPS, Key, keys, unknown_key

# Keys that name a file or folder, which may be a shipped one.
_PATHS = ("model_name_or_path", "tokenizer_name_or_path", "dataset_name", "chat_template_path", "deepspeed")

Settings = tuple[ModelArguments, DataArguments, ORPOConfig]


def parse_recipe(arguments: list[str]) -> Settings:
    """Settings from `RECIPE [--key value …]`; an override wins over the recipe, which wins over the defaults.

    Args:
        arguments: a recipe's path, or the name of a shipped one, and overrides: `--key value`, `--key=value`,
            `--key` alone for true, `--key a b` for a list, `--key.part value` for a part of a nested value.

    Raises:
        RecipeError: with every problem of the recipe, its parents and the overrides, each with its line.
    """
    return build_settings(load_recipe(arguments))


def load_recipe(arguments: list[str]) -> Recipe:
    """The recipe with its parents and overrides, each key and type checked; what is wrong is in `problems`.

    Raises:
        RecipeError: where no recipe is named, or there is none of that name.
    """
    if not arguments or arguments[0].startswith("-"):
        raise RecipeError([Problem(COMMAND_LINE, "name a recipe first, such as recipes/quickstart.yaml")])
    recipe = read_recipe(find_recipe(arguments[0]))
    _override(recipe, arguments[1:])
    _check(recipe)
    return recipe


def build_settings(recipe: Recipe, with_engine: bool = True) -> Settings:
    """The config objects of a recipe. `recipes/…` is a shipped file where the current folder has none of that name.

    Args:
        recipe: from `load_recipe`.
        with_engine: False leaves `deepspeed` and `fsdp` out, which prepare this very process for a distributed run.

    Raises:
        RecipeError: with the problems that the recipe already has, and those of how its values fit together.
    """
    values = {key: value for key, value in recipe.settings.items() if key not in recipe.wrong}
    texts = []
    # A misspelt key, whose problem names the right one, must not be said to be missing too.
    named = any("model_name" in found.text for found in recipe.problems)
    if values.get("model_name_or_path") is None and recipe.is_whole and not named:
        texts.append("set `model_name_or_path` to a Hub id or a folder")
    for key in _PATHS:
        if isinstance(values.get(key), str):
            values[key] = str(shipped_path(values[key]) or values[key])
    texts += _engine_problems(values.get("deepspeed"))
    values["deepspeed"] = resolve_deepspeed(values.get("deepspeed")) if with_engine and not texts else None
    if not with_engine:
        values["fsdp"] = None
    built: dict[str, Any] = {}
    for group, owner in GROUPS.items():
        try:
            built[group] = owner(**{key: value for key, value in values.items() if keys()[key].group == group})
        except SettingsError as error:
            texts += error.problems
        except (ValueError, TypeError, ImportError, OSError) as error:
            # Of transformers or TRL, one at a time; beside other problems it may only follow from them.
            if not (recipe.problems or texts):
                texts.append(" ".join(str(error).split()))
    if "data" in built and not recipe.problems:
        texts += built["data"].problems(with_test=values.get("eval_strategy", "no") != "no")
    if len(built) == len(GROUPS):
        texts += _best_model_problems(built["training"], built["data"])
    problems = [*recipe.problems, *(Problem(_place(recipe, text), recipe.without_secrets(text)) for text in texts)]
    if problems:
        raise RecipeError(problems)
    return built["model"], built["data"], built["training"]


def _override(recipe: Recipe, words: list[str]) -> None:
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("--") or word == "--":
            recipe.problems.append(Problem(COMMAND_LINE, f"expected `--key value`, received {word!r}"))
            continue
        name, separator, value = word[2:].partition("=")
        values = [value] if separator else []
        while not separator and position < len(words) and not words[position].startswith("--"):
            values.append(words[position])
            position += 1
        first, dot, rest = name.partition(".")
        name = first.replace("-", "_") + dot + rest
        recipe.set(name, _typed(keys().get(name), values), {(): COMMAND_LINE})


def _typed(key: Key | None, texts: list[str]) -> Any:
    """The value that the words of an override stand for: as YAML reads them, or else as the texts that they are."""
    if not texts:
        return True
    candidates: list[Any] = [[read_value(text) for text in texts], texts]
    if len(texts) == 1:
        candidates = [candidate[0] for candidate in candidates]
    return next((value for value in candidates if key is not None and not key.check(value)[1]), candidates[0])


def _check(recipe: Recipe) -> None:
    for name, value in recipe.settings.items():
        key = keys().get(name)
        if key is None:
            found = [((), unknown_key(name))]
        else:
            recipe.settings[name], found = key.check(value)
        if name == "hub_token" and value is not None and (found or (name,) not in recipe.secrets):
            # Not shown: it would stand in logs.
            found = [((), "`hub_token`: this is no place for a token; write ${HF_TOKEN}, or run `hf auth login`")]
        if found:
            recipe.wrong.add(name)
            recipe.problems += [
                Problem(recipe.place(name, *path), recipe.without_secrets(text)) for path, text in found
            ]


def _engine_problems(deepspeed: Any) -> list[str]:
    if not isinstance(deepspeed, str) or deepspeed in DEEPSPEED or Path(deepspeed).is_file():
        return []
    close = get_close_matches(deepspeed, DEEPSPEED, n=1)
    mean = f"did you mean {close[0]}? " if close else ""
    return [f"`deepspeed`: {mean}expected {', '.join(DEEPSPEED)} or an existing JSON file, received {deepspeed!r}"]


def _best_model_problems(training: ORPOConfig, data: DataArguments) -> list[str]:
    """transformers looks for the metric at the first evaluation, and several sets have one for each label."""
    metric = (training.metric_for_best_model or "").removeprefix("eval_")
    labels = list(data.eval_datasets)
    if not (training.load_best_model_at_end and labels) or any(metric.startswith(f"{label}_") for label in labels):
        return []
    return [
        f"`metric_for_best_model`: with `eval_datasets`, expected a metric of one of them, such as "
        f"eval_{labels[0]}_loss, received {training.metric_for_best_model}"
    ]


def _place(recipe: Recipe, text: str) -> str:
    """Where the first of the keys that a problem names was set; else the recipe as a whole."""
    named = re.findall(r"`(\w+)", text) + re.findall(r"\w+", text)
    return next((recipe.place(name) for name in named if name in recipe.settings), recipe.name)
