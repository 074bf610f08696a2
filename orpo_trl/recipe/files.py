"""A recipe file and its parents as settings, each with the line that set it."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from orpo_trl.paths import RECIPES, relative
from orpo_trl.plain_files import UnsafeFile, read_text
from orpo_trl.yaml_text import ValuePath, YamlReader, scalar

_ENVIRONMENT = re.compile(r"\$\{(\w+)\}")
_EXTENDS = ("extends",)
_NOT_FOUND = "there is no such recipe"


@dataclass(frozen=True)
class Place:
    """Where a value was set: a line of a file, a file as a whole, or the command line."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


COMMAND_LINE = Place("command line")


@dataclass(frozen=True)
class Problem:
    """What is wrong with a recipe, where, and with which value: `path` is empty where it is about no single key."""

    place: Place
    text: str
    path: ValuePath = ()

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


class RecipeError(ValueError):
    """A recipe that cannot be read, or whose settings are wrong: all of its problems at once, file by file."""

    def __init__(self, problems: list[Problem]):
        files = [*dict.fromkeys(found.place.file for found in problems if found.place != COMMAND_LINE)]
        files.append(COMMAND_LINE.file)
        self.problems = sorted(
            dict.fromkeys(problems), key=lambda found: (files.index(found.place.file), found.place.line or 0)
        )
        if len(self.problems) == 1:
            super().__init__(str(self.problems[0]))
        else:
            lines = "\n".join(f"  {problem}" for problem in self.problems)
            super().__init__(f"{len(self.problems)} problems\n{lines}")


@dataclass
class Recipe:
    """Settings of a recipe, its parents and its overrides.

    Attributes:
        name: its path, as it was given.
        settings: values by key, as they were written.
        places: where each value was set, by its path: `("beta",)`, `("datasets", 0, "path")`.
        secrets: texts that name an environment variable, by the path of the value that holds its content.
        problems: what is wrong.
        wrong: keys whose value cannot be used.
        is_whole: whether the file and all of its parents could be read.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    places: dict[ValuePath, Place] = field(default_factory=dict)
    secrets: dict[ValuePath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)
    is_whole: bool = True

    def place(self, *path: str | int) -> Place:
        """Where the value at a path, or the value that it is part of, was set."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, COMMAND_LINE)

    def without_secrets(self, text: str) -> str:
        """A message with the names of environment variables in place of their contents."""
        for value, original in self.contents().items():
            if len(value) > 3:
                text = text.replace(value, original)
        return text

    def contents(self) -> dict[str, str]:
        """What values with an environment variable in them have become, and the text that each was written as."""
        found: dict[str, str] = {}
        for path, original in self.secrets.items():
            value: Any = self.settings
            for part in path:
                value = value[part]
            if isinstance(value, str):
                found[value] = original
        return found

    def set(
        self,
        key: str,
        value: Any,
        places: Mapping[ValuePath, Place],
        secrets: Mapping[ValuePath, str] | None = None,
    ) -> None:
        """Set a key, or with dots in it a part of its value: `model_init_kwargs.revision`, `datasets.0.path`.

        Args:
            key: top-level key or dotted path.
            value: replaces the earlier value.
            places: where the value and its parts were set, by path below the key; `()` is the value itself.
            secrets: texts that name an environment variable, likewise.
        """
        first, *rest = key.split(".")
        path: ValuePath = (first, *(int(part) if part.isascii() and part.isdecimal() else part for part in rest))
        target: Any = self.settings
        for depth, part in enumerate(path[:-1]):
            if isinstance(target, dict) and target.get(part) is None:
                target[part] = {}
                self.places[path[: depth + 1]] = places[()]
            target = _child(target, part)
            if target is None:
                whole = ".".join(map(str, path[: depth + 1]))
                self.problems.append(Problem(places[()], f"`{key}`: there is no `{whole}` to set a part of", path))
                return
        last = path[-1]
        if isinstance(target, dict) or (isinstance(last, int) and last < len(target)):
            target[last] = value
        else:
            self.problems.append(Problem(places[()], f"`{key}`: expected a position below {len(target)}", path))
            return
        for by_path in (self.places, self.secrets):
            for old in [old for old in by_path if old[: len(path)] == path]:
                del by_path[old]
        self.places.update({(*path, *below): place for below, place in places.items()})
        self.secrets.update({(*path, *below): text for below, text in (secrets or {}).items()})


def _child(value: Any, part: str | int) -> Any:
    """The mapping or list below a value; None where there is none."""
    if isinstance(value, dict):
        found = value.get(part)
    else:
        found = value[part] if isinstance(part, int) and part < len(value) else None
    return found if isinstance(found, (dict, list)) else None


def find_recipe(name: str) -> Path:
    """The file of a recipe that is given by its path or by the name of a shipped one.

    Raises:
        RecipeError: where there is none; it suggests the shipped recipe of the nearest name.
    """
    path = Path(name).expanduser()
    try:
        if path.exists():
            return path
        shipped = shipped_path(name) or RECIPES / f"{name}.yaml"
        if shipped.is_file() and shipped.suffix in (".yaml", ".yml"):
            return relative(shipped)
    except OSError as error:  # too long for a name
        raise RecipeError([Problem(Place(f"{name:.60}…"), error.strerror or str(error))]) from error
    close = get_close_matches(path.stem, [file.stem for file in RECIPES.glob("*.yaml")], n=1)
    hint = (
        f"; did you mean the shipped recipe `{close[0]}`?" if close else "; `orpo-trl recipes` lists the shipped ones"
    )
    raise RecipeError([Problem(Place(name), _NOT_FOUND + hint)])


def shipped_path(name: str) -> Path | None:
    """The shipped file that `recipes/…` names, where the current folder has no such file; None if there is none."""
    parts = Path(name).parts
    if parts[:1] != ("recipes",) or Path(name).exists():
        return None
    path = RECIPES.joinpath(*parts[1:])
    return path if path.exists() else None


def read_recipe(path: Path) -> Recipe:
    """A recipe with the parents that it extends, the nearest last; its problems are in `problems`."""
    recipe = Recipe(str(path))
    _read(path, recipe, [], set())
    return recipe


def _read(path: Path, recipe: Recipe, chain: list[Path], seen: set[Path]) -> None:
    """Each file once: read again through a second parent, it would undo what the first one changed."""
    document = _Document(path, recipe.problems)
    settings = document.settings
    recipe.is_whole &= bool(settings)
    for name in _parents(settings.pop("extends", None), document):
        place = document.places[_EXTENDS]
        parent = _parent(path, name)
        through = [*chain, path]
        recipe.is_whole &= parent is not None
        if parent is None:
            recipe.problems.append(Problem(place, f"`extends`: there is no file {name}", _EXTENDS))
        elif parent.resolve() in [file.resolve() for file in through]:
            recipe.is_whole = False
            circle = " → ".join(str(file) for file in [*through, parent])
            recipe.problems.append(Problem(place, f"`extends` goes in a circle: {circle}", _EXTENDS))
        elif parent.resolve() not in seen:
            seen.add(parent.resolve())
            _read(parent, recipe, through, seen)
    for key, value in settings.items():
        if "." in key and key.split(".")[0] in settings:
            text = f"`{key}` and `{key.split('.')[0]}` both stand here; keep one of them"
            recipe.problems.append(Problem(document.places[(key,)], text, (key,)))
            continue
        recipe.set(key, value, _below(document.places, key), _below(document.secrets, key))


def _parent(path: Path, name: str) -> Path | None:
    """The file that a recipe at `path` means by `extends: name`: beside it, or shipped. None where there is none."""
    beside = Path(os.path.normpath(path.parent / Path(name).expanduser()))
    try:
        found = next((file for file in (beside, RECIPES / name, RECIPES / f"{name}.yaml") if file.is_file()), None)
    except OSError:  # too long for a name
        return None
    return relative(found) if found and found != beside else found


def _parents(extends: Any, document: "_Document") -> list[str]:
    names = [extends] if isinstance(extends, str) else extends or []
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    text = f"`extends`: expected a file or a list of files, received {extends!r:.60}"
    document.problems.append(Problem(document.places[_EXTENDS], text, _EXTENDS))
    return []


def read_value(text: str) -> Any:
    """A value of the command line: YAML's number, truth value, null, `[list]` or `{mapping}`, else the text itself."""
    if text[:1] in ("[", "{"):
        # The shell has put in environment variables.
        reader = YamlReader()
        value = reader.read(text)
        return text if reader.problems else value
    return scalar(text)


class _RecipeReader(YamlReader):
    """Replaces `${NAME}` by the environment variable, and keeps the text with the name in `secrets`."""

    def __init__(self):
        super().__init__()
        self.secrets: dict[ValuePath, str] = {}

    def _scalar(self, node: yaml.ScalarNode, path: ValuePath) -> Any:
        if not _ENVIRONMENT.search(node.value):
            return super()._scalar(node, path)
        self.secrets[path] = node.value
        for name in _ENVIRONMENT.findall(node.value):
            if name not in os.environ:
                self._found(f"the environment variable {name} is not set", path, node.start_mark)
        text = _ENVIRONMENT.sub(lambda match: os.environ.get(match[1], ""), node.value)
        return text if node.style else scalar(text)


class _Document:
    """One recipe file: its settings, with the place of each value; adds to `problems` what is wrong."""

    def __init__(self, path: Path, problems: list[Problem]):
        self.problems = problems
        self.settings: dict[str, Any] = {}
        self.places: dict[ValuePath, Place] = {}
        self.secrets: dict[ValuePath, str] = {}
        whole = Place(str(path))
        try:
            text = read_text(path)
        except FileNotFoundError:
            problems.append(Problem(whole, _NOT_FOUND))
            return
        except (OSError, UnicodeDecodeError, UnsafeFile) as error:
            problems.append(Problem(whole, f"the recipe cannot be read: {error}"))
            return
        reader = _RecipeReader()
        values = reader.read(text)
        problems += [Problem(Place(whole.file, found.line), found.text, found.path) for found in reader.problems]
        if isinstance(values, dict):
            self.settings, self.secrets = values, reader.secrets
            self.places = {below: Place(whole.file, line) for below, line in reader.lines.items()}
        elif not reader.problems:
            kind = {type(None): "nothing", list: "a list"}.get(type(values), f"{values!r:.60}")
            problems.append(Problem(whole, f"a recipe is a mapping of keys to values, received {kind}"))


def _below(by_path: Mapping[ValuePath, Any], key: str) -> dict[ValuePath, Any]:
    return {path[1:]: value for path, value in by_path.items() if path[:1] == (key,)}
