"""A recipe and command-line overrides to the settings of a run, or to all that is wrong with them."""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from orpo_trl.config import DataArguments, ModelArguments, ORPOConfig, SettingsError, SettingsProblem
from orpo_trl.hidden import hide_all, hide_contents
from orpo_trl.launch import DEEPSPEED, resolve_deepspeed
from orpo_trl.metrics import EVALUATION
from orpo_trl.processes import launched_precision
from orpo_trl.recipe.files import (
    COMMAND_LINE,
    Place,
    Problem,
    Recipe,
    RecipeError,
    find_recipe,
    read_recipe,
    read_value,
    shipped_path,
)
from orpo_trl.recipe.keys import OWNERS, Key, meant_by, recipe_keys, unknown_key
from orpo_trl.sections import OF_LOADING

_MODEL = "model_name_or_path"
# Keys that name a file or folder, which may be a shipped one.
_PATHS = (_MODEL, "tokenizer_name_or_path", "dataset_name", "chat_template_path", "deepspeed")

# Keys that are read with one strategy alone, or with any but `no`: the key, that of the strategy, its default.
_OF_ANY_STRATEGY = ("generate_during_eval", "load_best_model_at_end")
_OF_STRATEGY = (
    ("eval_steps", "eval_strategy", "no"),
    ("save_steps", "save_strategy", "steps"),
    ("logging_steps", "logging_strategy", "steps"),
    ("generate_during_eval", "eval_strategy", "no"),
    ("load_best_model_at_end", "save_strategy", "steps"),
)
# Keys that are read where another one is true: that one, how their names begin, and what they are for.
_OF_SWITCH = {
    "use_peft": (("lora_", "use_dora", "use_rslora"), "adapters"),
    "load_in_4bit": (("bnb_4bit_", "use_bnb_nested_quant"), "weights of 4 bits"),
}

# Keys whose values are sent to trackers as they are.
_SENT = ("run_name", "project", "run_group", "run_tags")

Settings = tuple[ModelArguments, DataArguments, ORPOConfig]


def load_recipe(arguments: list[str]) -> Recipe:
    """The recipe with its parents and overrides. Each key and each type is checked; `problems` has what is wrong.

    An override wins over the recipe, which wins over the defaults.

    Args:
        arguments: a recipe's path, or the name of a shipped one, and overrides: `--key value`, `--key=value`,
            `--key` alone for true, `--key a b` for a list, `--key.part value` for a part of a nested value.

    Raises:
        RecipeError: where no recipe is named, or the named one does not exist.
    """
    if not arguments or arguments[0].startswith("-"):
        raise RecipeError([Problem(COMMAND_LINE, "name a recipe first, such as recipes/quickstart.yaml")])
    recipe = read_recipe(find_recipe(arguments[0]))
    _override(recipe, arguments[1:])
    _check(recipe)
    hide_contents(recipe.contents())
    return recipe


def build_settings(recipe: Recipe, with_engine: bool = True) -> Settings:
    """The config objects of a recipe. `recipes/…` is a shipped file where the current folder has no such file.

    Args:
        recipe: from `load_recipe`.
        with_engine: False leaves out `deepspeed` and `fsdp`, which prepare this very process for a distributed run.

    Raises:
        RecipeError: with the problems that the recipe already has, and those between its values.
    """
    values = {
        name: recipe_keys()[name].check(value)[0] for name, value in recipe.settings.items() if name not in recipe.wrong
    }
    found: list[SettingsProblem] = []
    if values.get(_MODEL) is None and recipe.is_whole and not _is_model_meant(recipe):
        found.append(SettingsProblem((), f"set `{_MODEL}` to a Hub id or a folder"))
    for name in _PATHS:
        if isinstance(values.get(name), str):
            values[name] = str(shipped_path(values[name]) or values[name])
    if _are_rows_to_evaluate_on_named(recipe, values):
        values["eval_strategy"] = _evaluation_strategy(values)
    if ("output_dir",) in recipe.secrets and values.get("run_name") is None:
        values["run_name"] = Path(recipe.secrets["output_dir",]).name  # its default is the folder's name
    values |= {name: hide_all(values[name]) for name in _SENT if name in values}
    found += _deepspeed_problems(values.get("deepspeed")) + _unread_problems(recipe, values)
    values["deepspeed"] = resolve_deepspeed(values.get("deepspeed")) if with_engine and not found else None
    if not with_engine:
        values["fsdp"] = None
    built: dict[str, Any] = {}
    for owner, config_class in OWNERS.items():
        try:
            own = {name: value for name, value in values.items() if recipe_keys()[name].owner == owner}
            built[owner] = config_class(**own)
        except SettingsError as error:
            found += error.problems
        except (ValueError, TypeError, ImportError, OSError) as error:
            # transformers and TRL raise one error at a time. Beside other problems, it may be their consequence.
            if not (recipe.problems or found):
                found.append(_of_library(error))
    if "data" in built and not recipe.problems:
        found += built["data"].problems(with_test=values.get("eval_strategy", "no") != "no")
    if len(built) == len(OWNERS):
        found += _best_model_problems(built["training"], built["data"])
    problems = [*recipe.problems, *(_placed(recipe, problem) for problem in found)]
    if problems:
        raise RecipeError(problems)
    return built["model"], built["data"], built["training"]


def _are_rows_to_evaluate_on_named(recipe: Recipe, values: dict[str, Any]) -> bool:
    """Whether `test_split_size` or `eval_datasets` turns evaluation on: where `eval_strategy` is not set, or where it
    is `no` in a file that what comes later changes, a child or the command line."""
    named = [name for name in ("test_split_size", "eval_datasets") if values.get(name)]
    strategy = values.get("eval_strategy")
    if strategy is None:
        return bool(named)
    return strategy == "no" and any(_is_set_later(recipe, name, "eval_strategy") for name in named)


def _evaluation_strategy(values: dict[str, Any]) -> str:
    """`steps` where something says so, else an evaluation each epoch."""
    if values.get("eval_steps"):
        return "steps"
    # transformers wants checkpoints at the steps that are evaluated.
    return values.get("save_strategy") or "steps" if values.get("load_best_model_at_end") else "epoch"


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
        recipe.set(name, _typed(recipe_keys().get(name), values), {(): COMMAND_LINE})


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
        key = recipe_keys().get(name)
        if key is None:
            found = [((), unknown_key(name))]
        else:
            taken, found = key.check(value)
            recipe.settings[name] = _as_written(value, taken)
        if name == "hub_token" and value is not None and (found or (name,) not in recipe.secrets):
            # Not shown: it would stand in logs.
            found = [((), "`hub_token`: this is no place for a token; write ${HF_TOKEN}, or run `hf auth login`")]
        if found:
            recipe.wrong.add(name)
            recipe.problems += [
                Problem(recipe.place(name, *path), recipe.without_secrets(text), (name, *path)) for path, text in found
            ]


def _as_written(value: Any, taken: Any) -> Any:
    """The converted value, except that an integer stays an integer where the key takes a float."""
    if isinstance(taken, float) and isinstance(value, int):
        return value
    if isinstance(taken, dict) and isinstance(value, dict):
        return {name: _as_written(value.get(name), inner) for name, inner in taken.items()}
    if isinstance(taken, list) and isinstance(value, list):
        return [_as_written(*pair) for pair in zip(value, taken, strict=True)]
    return taken


def _is_model_meant(recipe: Recipe) -> bool:
    """Whether a wrong key is, or was meant to be, the model's: it is not missing then."""
    return any(
        path and _MODEL in (path[0], meant_by(str(path[0]))) for path in (found.path for found in recipe.problems)
    )


def _deepspeed_problems(deepspeed: Any) -> list[SettingsProblem]:
    if not isinstance(deepspeed, str) or deepspeed in DEEPSPEED or Path(deepspeed).is_file():
        return []
    close = get_close_matches(deepspeed, DEEPSPEED, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    text = f"`deepspeed`: {hint}expected {', '.join(DEEPSPEED)} or an existing JSON file, received {deepspeed!r}"
    return [SettingsProblem(("deepspeed",), text)]


def _unread_problems(recipe: Recipe, values: dict[str, Any]) -> list[SettingsProblem]:
    """Keys that somebody has set and that nothing would read, or that another one contradicts."""
    found: list[SettingsProblem] = []

    def wrong(text: str, *names: str) -> None:
        found.append(SettingsProblem(names, text))

    def is_meant(name: str, switch: str) -> bool:
        # A file that turns off what its parent, or itself, has settings for is right.
        return recipe.place(name).file == COMMAND_LINE.file or _is_set_later(recipe, name, switch)

    for switch, (starts, what) in _OF_SWITCH.items():
        for name in values:
            is_unread = name.startswith(starts) and values[name] is not None and not values.get(switch)
            if is_unread and is_meant(name, switch):
                wrong(f"`{name}` is for {what}: set `{switch}: true`, or `{switch}: false` before it", name)
    for name, strategy, default in _OF_STRATEGY:
        chosen = values.get(strategy) or default
        wanted = "steps or epoch" if name in _OF_ANY_STRATEGY else "steps"
        is_read = chosen == "steps" or (name in _OF_ANY_STRATEGY and chosen != "no")
        if values.get(name) and not is_read and is_meant(name, strategy):
            wrong(f"`{name}` is read with `{strategy}: {wanted}`, and that is {chosen}", name, strategy)
    given = values.get("model_init_kwargs")
    for name, instead in OF_LOADING.items():
        if isinstance(given, dict) and name in given:
            wrong(f"`model_init_kwargs`: set `{instead}` in place of `{name}` in it", "model_init_kwargs")
    for name in ("checkpointing", "checkpointing_kwargs"):
        names = (f"gradient_{name}", f"activation_{name}")
        older, newer = (values.get(name) for name in names)
        if None not in (older, newer) and older != newer:
            wrong(f"`{names[0]}` and `{names[1]}` are two names of one setting; received {older} and {newer}", *names)
    precision = launched_precision()
    if _is_other_precision(precision, values.get("bf16"), values.get("fp16")):
        asked = [name for name in ("bf16", "fp16") if values.get(name) is not None]
        text = ", ".join(f"`{name}: {str(values[name]).lower()}`" for name in asked)
        wrong(f"accelerate's config asks for `mixed_precision: {precision}`, and the recipe for {text}", *asked)
    return found


def _is_other_precision(of_launcher: str | None, bf16: bool | None, fp16: bool | None) -> bool:
    """Whether a recipe asks for another precision than the config of accelerate; `bf16: false` asks for 32 bits."""
    if of_launcher == "fp8":
        return bool(bf16 or fp16)
    if of_launcher == "fp16":
        return bf16 is not None and not fp16
    return of_launcher == "bf16" and (bf16 is False or bool(fp16))


def _is_set_later(recipe: Recipe, name: str, other: str) -> bool:
    """Whether a key is set where `other` is not, or in a file that changes the one with `other`: in a child, or on the
    command line."""
    if other not in recipe.settings:
        return True
    order = list(recipe.places)
    is_later = order.index((name,)) > order.index((other,))
    return is_later and recipe.place(name).file != recipe.place(other).file


def _best_model_problems(training: ORPOConfig, data: DataArguments) -> list[SettingsProblem]:
    """transformers would look for the metric only at the first evaluation, under the name of one evaluation set."""
    metric = (training.metric_for_best_model or "").removeprefix(EVALUATION)
    labels = list(data.eval_datasets)
    if not (training.load_best_model_at_end and labels) or any(metric.startswith(f"{label}_") for label in labels):
        return []
    text = (
        f"`metric_for_best_model`: with `eval_datasets`, expected a metric of one of them, such as "
        f"{EVALUATION}{labels[0]}_loss, received {training.metric_for_best_model}"
    )
    return [SettingsProblem(("metric_for_best_model", "eval_datasets"), text)]


def _of_library(error: Exception) -> SettingsProblem:
    """An error of transformers or TRL, which name arguments in backticks or as words with underscores."""
    text = " ".join(str(error).split())
    words = re.findall(r"`(\w+)", text) + re.findall(r"[a-z0-9]+_\w+", text)
    return SettingsProblem(tuple(word for word in words if word in recipe_keys()), text)


def _placed(recipe: Recipe, problem: SettingsProblem) -> Problem:
    """The problem, with the place of the first of its keys that the recipe sets; else the place is the whole recipe."""
    name = next((name for name in problem.keys if name in recipe.settings), None)
    place = Place(recipe.name) if name is None else recipe.place(name)
    return Problem(place, recipe.without_secrets(problem.text), () if name is None else (name,))
