"""The shell scripts of ORPO's authors, which run their main.py: not read, since shipped recipes have their settings."""

import re
from pathlib import Path
from typing import NoReturn

from orpo_trl.importers.draft import ImportProblem
from orpo_trl.paths import RECIPES
from orpo_trl.plain_files import read_text
from orpo_trl.yaml_text import from_yaml

# Names under which the authors publish scripts whose settings are shipped.
_SCRIPTS = {
    "run_mistral_orpo_beta.sh": "mistral_beta",
    "run_mistral_orpo_capybara.sh": "mistral_capybara",
}


def refuse_name(path: Path) -> None:
    """Answers to the name of an authors' script, whether the file exists or not.

    Raises:
        ImportProblem: with the shipped recipe that has the script's settings.
    """
    if path.name in _SCRIPTS:
        _refuse(path, _SCRIPTS[path.name])


def refuse_script(path: Path, text: str) -> None:
    """Answers to a shell script that runs main.py, by the model and the dataset that it names.

    Raises:
        ImportProblem: with the shipped recipe of this model and dataset, or how to begin where there is none.
    """
    is_script = path.suffix in (".sh", ".bash") or text.startswith("#!") or "accelerate launch" in text
    if is_script and re.search(r"(^|[\s/])main\.py\s", text):
        _refuse(path, _recipe_in(text))


def _recipe_in(text: str) -> str | None:
    """The shipped recipe whose model and dataset a script names."""
    words = set(re.split(r"[\s\"'=]+", text))
    for path in sorted(RECIPES.glob("*.yaml")):
        settings = from_yaml(read_text(path))
        if {settings.get("model_name_or_path"), settings.get("dataset_name")} <= words:
            return path.stem
    return None


def _refuse(path: Path, recipe: str | None) -> NoReturn:
    if recipe is None:
        raise ImportProblem(
            f"{path} is a script of ORPO's authors, and no shipped recipe trains its model on its dataset; take the "
            "nearest of `orpo-trl recipes`, and override by `--key value` what differs"
        )
    raise ImportProblem(
        f"{path} is a script of ORPO's authors; its published version is the shipped recipe {recipe} (override by "
        f"`--key value` what you have changed): orpo-trl recipes {recipe}"
    )
