"""Every key that a recipe may have, with its type, and the messages for wrong keys and wrong values."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache, cached_property
from typing import Any, Literal, Required, Union

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from typing_extensions import get_type_hints, is_typeddict

from orpo_trl.config import DataArguments, ModelArguments, ORPOConfig
from orpo_trl.importers import FOREIGN_KEYS
from orpo_trl.yaml_text import ValuePath

# The config classes that the keys of a recipe belong to.
OWNERS = {"model": ModelArguments, "data": DataArguments, "training": ORPOConfig}

# The annotations of the config classes are too narrow for these: a folder, or whether to find the latest one; the name
# of one module, or of several.
_OWN_HINTS = {"resume_from_checkpoint": bool | str | None, "lora_target_modules": str | list[str] | None}
# Names that people give to a setting by habit, where spelling or another tool's use of the name suggests no key, or a
# wrong one. They win over `FOREIGN_KEYS`: axolotl's `batch_size`, for one, counts whole steps.
_EVERYDAY = {
    **dict.fromkeys(("lambda", "lam", "orpo_lambda", "lambda_orpo"), "beta"),
    **dict.fromkeys(("epochs", "epoch"), "num_train_epochs"),
    **dict.fromkeys(("batch_size", "train_batch_size"), "per_device_train_batch_size"),
    **dict.fromkeys(("grad_accum", "grad_accum_steps", "accumulation_steps"), "gradient_accumulation_steps"),
    "max_prompt_len": "max_prompt_length",
    "model": "model_name_or_path",
    "tokenizer": "tokenizer_name_or_path",
    "wd": "weight_decay",
    "lora": "use_peft",
    "rank": "lora_r",
}
# One has values that YAML cannot hold; the other is set by the launcher in each process.
_NOT_IN_RECIPES = {"parallelism_config", "local_rank"}

_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
_BOOLEANS = {"yes": True, "on": True, "no": False, "off": False}
_NAMES = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    types.NoneType: "null",
}


@dataclass(frozen=True)
class Key:
    """One key: its config class by its name in `OWNERS`, the type of its values, its default and help text."""

    name: str
    owner: str
    hint: Any
    default: Any
    help: str

    @cached_property
    def _adapter(self) -> TypeAdapter:
        # A typed mapping brings its own configuration.
        try:
            return TypeAdapter(self.hint, config=_STRICT)
        except PydanticUserError:
            return TypeAdapter(self.hint)

    def check(self, value: Any) -> tuple[Any, list[tuple[ValuePath, str]]]:
        """The value as its config class takes it, and what is wrong with it: the path below the key, and a message."""
        value = self._convert(value)
        try:
            return self._adapter.validate_python(value), []
        except ValidationError as error:
            found = [_explain(self.hint, value, problem["loc"], problem["type"]) for problem in error.errors()]
        problems = {}
        for path, text in found:  # a union has an error for each of its members
            problems.setdefault(path, text)
        return value, [(path, f"`{'.'.join(map(str, (self.name, *path)))}`{text}") for path, text in problems.items()]

    def _convert(self, value: Any) -> Any:
        members = set(_members(self.hint))
        origins = {typing.get_origin(member) or member for member in members}
        if isinstance(value, float) and value.is_integer() and int in members and float not in members:
            return int(value)  # `1e3`
        if isinstance(value, str) and bool in members and str not in members:
            return _BOOLEANS.get(value.lower(), value)  # truth values of YAML 1.1
        if isinstance(value, str) and list in origins and not origins & {str, Literal}:
            return [value]
        return value


@cache
def recipe_keys() -> Mapping[str, Key]:
    """All keys by name, in the order of the config classes."""
    found = {}
    for owner, config_class in OWNERS.items():
        hints = get_type_hints(config_class, include_extras=True)
        for field in dataclasses.fields(config_class):
            if field.name in _NOT_IN_RECIPES or not field.init:
                continue
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            hint = _OWN_HINTS.get(field.name, hints[field.name])
            choices = field.metadata.get("choices")
            hint = _hint(hint, choices)
            found[field.name] = Key(field.name, owner, hint, default, field.metadata.get("help", ""))
    return found


def meant_by(name: str) -> str | None:
    """The key of ours that was most likely meant by another tool's key or a misspelt one; None where none is near."""
    if name in _EVERYDAY:
        return _EVERYDAY[name]
    if name in FOREIGN_KEYS:
        return FOREIGN_KEYS[name][0]
    return next(iter(difflib.get_close_matches(name, [*recipe_keys(), "extends"], n=1)), None)


def unknown_key(name: str) -> str:
    """The message for a key that does not exist, with the key to write in its place."""
    if name == "extends":
        return "`extends` stands in a recipe's file, at its top level"
    ours = meant_by(name)
    if name in FOREIGN_KEYS and name not in _EVERYDAY:
        return f"unknown key `{name}` ({FOREIGN_KEYS[name][1]})" + (f"; write `{ours}`" if ours else "")
    return f"unknown key `{name}`; " + (f"did you mean `{ours}`?" if ours else "`orpo-trl schema` lists all keys")


def describe(hint: Any) -> str:
    """A type in words: `int | None` is "a whole number or null"."""
    return " or ".join(dict.fromkeys(_describe(member) for member in _members(hint)))


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is typing.Annotated:
        return describe(arguments[0]) + " above 0"
    if origin is list and is_typeddict(arguments[0]):
        return "a list of mappings with `path`"
    if origin is list:
        return f"a list of {describe(arguments[0])}"
    if origin is dict and is_typeddict(arguments[1]):
        return "a mapping of labels to mappings with `path`"
    if is_typeddict(hint):
        return "a mapping with `path`"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(value.value for value in hint)}"
    return _NAMES[origin or hint]


def _hint(hint: Any, choices: Any) -> Any:
    """A field's type, its choices and enumerations spelled out."""
    members = _members(hint)
    enums = [member for member in members if isinstance(member, type) and issubclass(member, Enum)]
    values = [value.value for enum in enums for value in enum] or list(choices or [])
    if not values:
        return hint
    rest = [member for member in members if member not in (*enums, str)]
    return Union[(Literal[tuple(values)], *rest)]


def _members(hint: Any) -> tuple:
    is_union = typing.get_origin(hint) in (Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _explain(hint: Any, value: Any, location: ValuePath, kind: str) -> tuple[ValuePath, str]:
    """The path below a key where a value is wrong, and why. pydantic's location also names the members of unions."""
    path: list = []
    for part in location:
        parent_hint, parent = hint, value
        inner = _inner(hint, part)
        if inner is None:
            continue
        path.append(part)
        hint = inner
        value = value.get(part) if isinstance(value, dict) else value[part]
        if kind in ("missing", "extra_forbidden") and part == location[-1]:
            return tuple(path[:-1] if kind == "missing" else path), _wrong_entry(parent_hint, parent, part, kind)
    close = difflib.get_close_matches(str(value), list(_choices(hint)), n=1)
    expected = f"did you mean {close[0]}? " if close else ""
    if not (close and len(list(_choices(hint))) > 10):
        expected += f"expected {describe(hint)}, "
    return tuple(path), f": {expected}received {_received(value)}"


def _inner(hint: Any, part: Any) -> Any:
    """The type that a value of type `hint` has at `part`; None where it has no such part."""
    for member in _members(hint):
        origin, arguments = typing.get_origin(member), typing.get_args(member)
        if origin is list and isinstance(part, int):
            return arguments[0]
        if origin is dict and isinstance(part, str) and is_typeddict(arguments[1]):
            return arguments[1]
        if is_typeddict(member):
            return _entry_hints(member).get(part, Any)
    return None


def _entry_hints(entry: type) -> dict[str, Any]:
    return {
        name: typing.get_args(hint)[0] if typing.get_origin(hint) is Required else hint
        for name, hint in get_type_hints(entry, include_extras=True).items()
    }


def _wrong_entry(hint: Any, entry: Any, part: str | int, kind: str) -> str:
    names = list(_entry_hints(hint))
    if kind == "missing":
        return f": `{part}` is missing; it has {', '.join(f'`{name}`' for name in entry)}"
    close = difflib.get_close_matches(str(part), names, n=1)
    return ": unknown key; " + (f"did you mean `{close[0]}`?" if close else f"its keys are {', '.join(names)}")


def _choices(hint: Any) -> Iterator[str]:
    for member in _members(hint):
        if typing.get_origin(member) is Literal:
            yield from map(str, typing.get_args(member))


def _received(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value!r:.60}"
