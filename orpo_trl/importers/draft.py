"""A recipe in the making: each key of another tool's config becomes settings or a note."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from orpo_trl.importers.foreign_keys import OURS
from orpo_trl.sections import OF_LOADING, SECTIONS
from orpo_trl.yaml_text import ValuePath


class ImportProblem(ValueError):
    """A file that is not an ORPO config of a known tool, or has a value that cannot be read."""


@dataclass(frozen=True)
class Note:
    """What the user of an imported recipe must know; `key` and `line` are those of the imported file."""

    key: str | None
    line: int | None
    text: str


@dataclass(frozen=True)
class Imported:
    """A recipe made from another tool's config.

    Attributes:
        tool: its name, as its users write it.
        settings: our keys to plain values, in the order of `SECTIONS`.
        no_equal: keys without an equal here, and what happens instead.
        differences: where the objective or the treatment of the data differs.
        became: each of their keys to the keys of ours that it became. The tuple is empty for a key without a value
            (`null`) and for a key that only marks the config as ORPO's (`rl: orpo`). Keys of `no_equal` are left out.
        origins: our keys to where their values come from, unless that is a key of the same name.
    """

    tool: str
    settings: dict[str, Any]
    no_equal: list[Note]
    differences: list[Note]
    became: dict[str, tuple[str, ...]]
    origins: dict[str, str]


@dataclass(frozen=True)
class ForeignConfig:
    """Another tool's config: the file, values by key, and lines by the path of a value: `("datasets", 0, "path")`."""

    path: Path
    values: dict[str, Any]
    lines: Mapping[ValuePath, int] = field(default_factory=dict)

    def line(self, *path: str | int) -> int | None:
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines[path] if path else None

    def fail(self, key: str, text: str) -> NoReturn:
        line = self.line(key)
        raise ImportProblem(f"{self.path}{'' if line is None else f':{line}'}: `{key}`: {text}")


@dataclass(frozen=True)
class Tool:
    """A tool whose configs can be imported.

    Attributes:
        id: how the command line names it.
        name: how its users write it.
        renamed: their keys to ours, values unchanged.
        converted: the keys that `convert` reads, to (ours or None, one phrase on how).
        dropped: keys without an equal, to the reason and what happens instead.
        switches: keys of `dropped` that change nothing where they are false.
        convert: completes a draft: values that change, the tool's defaults where ours differ, and the differences.
        check: None for an ORPO config, else what was expected and what was found.
    """

    id: str
    name: str
    renamed: Mapping[str, str]
    converted: Mapping[str, tuple[str | None, str]]
    dropped: Mapping[str, str]
    switches: frozenset[str]
    convert: Callable[["Draft"], None]
    check: Callable[[dict[str, Any]], str | None]


def is_empty(value: Any) -> bool:
    """Whether a value means the same as leaving the key out."""
    return value is None or value in ("", [], {})


class Draft:
    """A recipe in the making. Each key of the config is taken once, and becomes settings or a note."""

    def __init__(self, tool: Tool, config: ForeignConfig):
        self.tool = tool
        self.config = config
        self.settings: dict[str, Any] = {}
        self.no_equal: list[Note] = []
        self.differences: list[Note] = []
        self.became: dict[str, tuple[str, ...]] = {}
        self.origins: dict[str, str] = {}

    def fill(self) -> "Draft":
        """Take the keys that the tables answer, then let the tool convert the rest."""
        for key, value in self.config.values.items():
            if is_empty(value) or (value is False and key in self.tool.switches):
                self.became[key] = ()
            elif key in self.tool.converted:
                continue
            elif key in self.tool.dropped:
                self.drop(key)
            elif key in self.tool.renamed or key in OURS:
                self.set(self.tool.renamed.get(key, key), value, key)
            else:
                self.drop(key, "nothing here has this name or purpose; left out")
        self.tool.convert(self)
        self._settle_loading()
        self._turn_off()
        return self

    def _settle_loading(self) -> None:
        """Arguments of `from_pretrained` that have keys of their own here."""
        given = self.settings.get("model_init_kwargs")
        for name, ours in OF_LOADING.items():
            if isinstance(given, dict) and name in given:
                given = {key: value for key, value in given.items() if key != name}
                self.settings[ours] = self.settings["model_init_kwargs"][name]
                self.origins[ours] = f"model_init_kwargs.{name}"
                self.became["model_init_kwargs"] = (*self.became["model_init_kwargs"], ours)
        if given:
            self.settings["model_init_kwargs"] = given
        else:
            self.settings.pop("model_init_kwargs", None)

    def _turn_off(self) -> None:
        """Write out what the tool does with settings that it does not read: a recipe that has them alone is refused."""
        is_evaluated = "test_split_size" in self.settings or "eval_datasets" in self.settings
        for starts, switch, off in (
            (("lora_", "use_dora", "use_rslora"), "use_peft", False),
            (("bnb_4bit_", "use_bnb_nested_quant"), "load_in_4bit", False),
            *([] if is_evaluated else [(("eval_steps", "generate_during_eval"), "eval_strategy", "no")]),
        ):
            if any(name.startswith(starts) for name in self.settings):
                self.default(switch, off)

    def take(self, key: str, kinds: type | tuple[type, ...], expected: str, default: Any = None) -> Any:
        """The value of a converted key, `default` where it is absent or empty."""
        assert key in self.tool.converted, key
        value = self.config.values.get(key)
        if is_empty(value):
            return default
        wrong = isinstance(value, bool) and bool not in (kinds if isinstance(kinds, tuple) else (kinds,))
        if wrong or not isinstance(value, kinds):
            self.config.fail(key, f"expected {expected}, received {value!r:.60}")
        return value

    def number(self, key: str, default: float | None = None) -> float | None:
        return self.take(key, (int, float), "a number", default)

    def flag(self, key: str, default: bool = False) -> bool:
        return self.take(key, bool, "true or false", default)

    def has(self, key: str) -> bool:
        return not is_empty(self.config.values.get(key))

    def set(self, ours: str, value: Any, *theirs: str, why: str = "") -> None:
        """A setting from their keys, or from none of them: then `why` says where its value comes from."""
        present = [key for key in theirs if self.has(key)]
        if ours in self.settings:
            by = self.origins.get(ours, ours)
            for key in present:
                self.drop(key, f"`{ours}` is set already, by {by}")
            return
        self.settings[ours] = value
        for key in present:
            self.became[key] = (*self.became.get(key, ()), ours)
        origin = why or ", ".join(key for key in present if key != ours)
        if origin or not present:
            self.origins[ours] = origin or f"{self.tool.name}'s default"

    def default(self, ours: str, value: Any, why: str = "") -> None:
        """A setting that the config leaves to the tool, whose default differs from ours."""
        if ours not in self.settings:
            self.set(ours, value, why=why or f"{self.tool.name}'s default")

    def silent(self, *keys: str) -> None:
        """Keys that change nothing here."""
        for key in keys:
            if key in self.config.values:
                self.became.setdefault(key, ())

    def drop(self, key: str, text: str | None = None, path: ValuePath = ()) -> None:
        """A key without an equal, or a part of its value, at a path below."""
        name = ".".join(map(str, (key, *path)))
        text = self.tool.dropped[key] if text is None else text
        self.no_equal.append(Note(name, self.config.line(key, *path), f"`{name}`: {text}"))

    def differs(self, text: str, key: str | None = None) -> None:
        self.differences.append(Note(key, None if key is None else self.config.line(key), text))

    def done(self) -> Imported:
        """The recipe; each of their keys is accounted for once, in its settings or its notes."""
        noted = {note.key for note in self.no_equal}
        became = {}
        for key in self.config.values:
            ours = tuple(name for name in self.became.get(key, ()) if name in self.settings)
            if key in noted:
                continue
            if key in self.became and (ours or not self.became[key]):
                became[key] = ours
            else:
                self.drop(key, "beside the other keys it changes nothing; left out")
        settings = {key: self.settings[key] for keys in SECTIONS.values() for key in keys if key in self.settings}
        no_equal = sorted(self.no_equal, key=lambda note: note.line or 0)
        return Imported(self.tool.name, settings, no_equal, self.differences, became, self.origins)
