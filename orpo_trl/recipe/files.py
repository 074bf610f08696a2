"""A recipe file and its parents to settings that know the line they come from."""

import os
import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from orpo_trl.paths import RECIPES, relative

COMMAND_LINE = "command line"
_ENVIRONMENT = re.compile(r"\$\{(\w+)\}")
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}
_NOT_FOUND = "there is no such recipe"


@dataclass(frozen=True)
class Problem:
    """What is wrong with a recipe, and where: `file:line`, the file alone, or the command line."""

    place: str
    text: str

    @property
    def file(self) -> str:
        return re.sub(r":\d+$", "", self.place)

    @property
    def line(self) -> int:
        return int(self.place[len(self.file) + 1 :] or 0)

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


class RecipeError(ValueError):
    """A recipe that cannot be read, or whose settings are wrong: all of its problems at once."""

    def __init__(self, problems: list[Problem]):
        files = [*dict.fromkeys(found.file for found in problems if found.file != COMMAND_LINE), COMMAND_LINE]
        self.problems = sorted(dict.fromkeys(problems), key=lambda found: (files.index(found.file), found.line))
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
        settings: values by key.
        places: where each value comes from, by the path to it: `("beta",)`, `("datasets", 0, "path")`.
        secrets: keys whose value holds an environment variable; their text with `${NAME}` still in it.
        problems: what was found wrong on the way.
        wrong: keys whose value is not to be used.
        is_whole: whether the file and all of its parents could be read.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    places: dict[tuple, str] = field(default_factory=dict)
    secrets: dict[tuple, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)
    is_whole: bool = True

    def place(self, *path: str | int) -> str:
        """Where the value at a path, or what it is part of, was set."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, COMMAND_LINE)

    def without_secrets(self, text: str) -> str:
        """A message with the names of environment variables in place of what they hold."""
        for path, original in self.secrets.items():
            value: Any = self.settings
            for part in path:
                value = value[part]
            if isinstance(value, str) and len(value) > 3:
                text = text.replace(value, original)
        return text

    def set(self, key: str, value: Any, places: dict[tuple, str], secrets: dict[tuple, str] | None = None) -> None:
        """Set a key, or with dots in it a part of its value: `model_init_kwargs.revision`, `datasets.0.path`.

        Args:
            key: top-level key or dotted path.
            value: replaces what was there.
            places: of the value and its parts, by path below the key; `()` is the value's own.
            secrets: likewise.
        """
        first, *rest = key.split(".")
        path = (first, *(int(part) if part.isascii() and part.isdecimal() else part for part in rest))
        target: Any = self.settings
        for depth, part in enumerate(path[:-1]):
            if isinstance(target, dict) and target.get(part) is None:
                target[part] = {}
                self.places[path[: depth + 1]] = places[()]
            target = _child(target, part)
            if target is None:
                whole = ".".join(map(str, path[: depth + 1]))
                self.problems.append(Problem(places[()], f"`{key}`: there is no `{whole}` to set a part of"))
                return
        if isinstance(target, list) and not (isinstance(path[-1], int) and path[-1] < len(target)):
            self.problems.append(Problem(places[()], f"`{key}`: expected a position below {len(target)}"))
            return
        target[path[-1]] = value
        for found in (self.places, self.secrets):
            for old in [old for old in found if old[: len(path)] == path]:
                del found[old]
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
    """The file that a recipe's path, or the name of a shipped recipe, stands for.

    Raises:
        RecipeError: naming the shipped recipe that is meant most likely.
    """
    path = Path(name).expanduser()
    try:
        if path.exists():
            return path
        shipped = shipped_path(name) or RECIPES / f"{name}.yaml"
        if shipped.is_file() and shipped.suffix in (".yaml", ".yml"):
            return relative(shipped)
    except OSError as error:  # too long for a name
        raise RecipeError([Problem(f"{name:.60}…", error.strerror or str(error))]) from error
    close = get_close_matches(path.stem, [file.stem for file in RECIPES.glob("*.yaml")], n=1)
    hint = (
        f"; did you mean the shipped recipe `{close[0]}`?" if close else "; `orpo-trl recipes` lists the shipped ones"
    )
    raise RecipeError([Problem(name, _NOT_FOUND + hint)])


def shipped_path(name: str) -> Path | None:
    """What `recipes/…` stands for where the current folder has no such file: the shipped one. None if there is none."""
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
    settings = document.read()
    recipe.is_whole &= bool(settings)
    for name in _parents(settings.pop("extends", None), document):
        place = document.places[("extends",)]
        parent = _parent(path, name)
        through = [*chain, path]
        recipe.is_whole &= parent is not None
        if parent is None:
            recipe.problems.append(Problem(place, f"`extends`: there is no file {name}"))
        elif parent.resolve() in [file.resolve() for file in through]:
            recipe.is_whole = False
            circle = " → ".join(str(file) for file in [*through, parent])
            recipe.problems.append(Problem(place, f"`extends` goes in a circle: {circle}"))
        elif parent.resolve() not in seen:
            seen.add(parent.resolve())
            _read(parent, recipe, through, seen)
    for key, value in settings.items():
        if "." in key and key.split(".")[0] in settings:
            text = f"`{key}` and `{key.split('.')[0]}` both stand here; keep one of them"
            recipe.problems.append(Problem(document.places[(key,)], text))
            continue
        recipe.set(key, value, document.below(document.places, key), document.below(document.secrets, key))


def _parent(path: Path, name: str) -> Path | None:
    """The file that a recipe at `path` extends by `name`: beside it, or shipped. None where there is none."""
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
    document.problems.append(Problem(document.places[("extends",)], text))
    return []


def read_value(text: str) -> Any:
    """A value of the command line: YAML's number, truth value, null, `[list]` or `{mapping}`, else the text itself."""
    if text[:1] in ("[", "{"):
        problems: list[Problem] = []
        value = _Document(Path(COMMAND_LINE), problems).construct_text(text)
        return text if problems else value
    return _scalar(text)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: `5e-6` is a number; `no`, `on` and dates are text. Aliases are refused."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's class attribute)

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (`*name`) are not read; use `extends`", mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else; repeats a value that stands twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _float(dumper: _Dumper, value: float) -> yaml.Node:
    node = yaml.SafeDumper.represent_float(dumper, value)
    node.value = re.sub(r"e([-+])0*(\d)", r"e\1\2", node.value)  # 5.0e-06
    return node


def _text(dumper: _Dumper, value: str) -> yaml.Node:
    # Line breaks and other unprintable characters as escapes, which keep a value in one line.
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')


_Dumper.add_representer(float, _float)
_Dumper.add_representer(str, _text)

for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def to_yaml(settings: dict[str, Any]) -> str:
    """Settings as YAML, read alike by YAML 1.1 and 1.2, a line for each value that is no mapping or list."""
    return yaml.dump(settings, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=10**6)


def _scalar(text: str) -> Any:
    kind = _Loader("").resolve(yaml.ScalarNode, text, (True, False)).rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int" and len(text) < 100:
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)
    if kind == "float":
        return float(text.replace(".", "", 1) if "n" in text.lower() else text)  # Python has no dot in `.inf`
    return text


class _Document:
    """One YAML file to plain values, with the place of each."""

    def __init__(self, path: Path, problems: list[Problem]):
        self.path = path
        self.problems = problems
        self.places: dict[tuple, str] = {}
        self.secrets: dict[tuple, str] = {}

    @staticmethod
    def below(found: dict[tuple, str], key: str) -> dict[tuple, str]:
        return {path[1:]: value for path, value in found.items() if path[:1] == (key,)}

    def read(self) -> dict[str, Any]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            self._report(_NOT_FOUND)
            return {}
        except (OSError, UnicodeDecodeError) as error:
            self._report(f"the recipe cannot be read: {error}")
            return {}
        before = len(self.problems)
        settings = self.construct_text(text)
        if isinstance(settings, dict):
            return settings
        if len(self.problems) == before:
            self._report(f"a recipe is a mapping of keys to values, received {_kind(settings)}")
        return {}

    def construct_text(self, text: str) -> Any:
        try:
            node = yaml.compose(text, _Loader)
            return None if node is None else self._construct(node, ())
        except yaml.MarkedYAMLError as error:
            self._report(f"not YAML: {error.problem or error.context}", error.problem_mark or error.context_mark)
        except yaml.YAMLError as error:
            self._report(f"not YAML: {error}".replace("\n", " "))
        except RecursionError:
            self._report("not a recipe: nested too deep")
        return None

    def _construct(self, node: yaml.Node, path: tuple) -> Any:
        self.places[path] = self._place(node.start_mark)
        if node.tag not in _TAGS:
            self._report(f"the tag {node.tag} is not read", node.start_mark)
        if isinstance(node, yaml.SequenceNode):
            return [self._construct(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if _ENVIRONMENT.search(node.value):
            self.secrets[path] = node.value
            node.value = _ENVIRONMENT.sub(lambda match: self._variable(match[1], node), node.value)
            return node.value if node.style else _scalar(node.value)
        return node.value if node.tag == "tag:yaml.org,2002:str" else _scalar(node.value)

    def _mapping(self, node: yaml.MappingNode, path: tuple) -> dict:
        mapping, lines = {}, {}
        for key_node, value_node in node.value:
            key, mark = key_node.value, key_node.start_mark
            if not isinstance(key, str) or not (key_node.style or isinstance(_scalar(key), str)):
                received = f"{key!r:.60}" if isinstance(key, str) else "a list or a mapping"
                self._report(f"a key must be a name, received {received}", mark)
                continue
            if key in lines:
                self._report(f"`{key}` stands here and in line {lines[key]}; keep one of them", mark)
                continue
            lines[key] = mark.line + 1
            mapping[key] = self._construct(value_node, (*path, key))
            self.places[(*path, key)] = self._place(mark)
        return mapping

    def _variable(self, name: str, node: yaml.Node) -> str:
        if name not in os.environ:
            self._report(f"the environment variable {name} is not set", node.start_mark)
        return os.environ.get(name, "")

    def _place(self, mark: Any) -> str:
        return str(self.path) if mark is None else f"{self.path}:{mark.line + 1}"

    def _report(self, text: str, mark: Any = None) -> None:
        self.problems.append(Problem(self._place(mark), text))


def _kind(value: Any) -> str:
    return {type(None): "nothing", list: "a list"}.get(type(value), f"{value!r:.60}")
