"""A YAML config to values whose keys know their lines."""

import re
from pathlib import Path
from typing import Any

import yaml

from orpo_trl.importers.draft import Config, ImportProblem


class _Loader(yaml.SafeLoader):
    """YAML 1.1, as these tools read it, but `5e-6` is a number, which they make it later; and dates are text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's class attribute)
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (`*name`) are not read; write the value out", mark)
        return super().compose_node(parent, index)


_EXPONENT = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def read_text(path: Path) -> str:
    """The text of a config.

    Raises:
        ImportProblem: where the file is missing, a folder, or not UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ImportProblem(f"the config {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ImportProblem(f"the config {path} cannot be read: {error}") from error


def read_yaml(path: Path, text: str) -> Config:
    """A mapping of keys to plain values.

    Raises:
        ImportProblem: with the line, where the text is not YAML, not a mapping, or has a key twice.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            kind = {yaml.SequenceNode: "a list", type(None): "nothing"}.get(type(node), "text")
            raise ImportProblem(f"{path}: a config is a mapping of keys to values, received {kind}")
        values: dict[str, Any] = {}
        lines: dict[tuple, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in values:
                raise ImportProblem(f"{path}:{line}: `{key}` stands here and in line {lines[(key,)]}; keep one of them")
            values[key] = loader.construct_object(value_node, deep=True)
            _note_lines(key_node, value_node, (), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ImportProblem(f"{place}: not YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ImportProblem(f"{path}: not YAML: {error}".replace("\n", " ")) from error
    return Config(path, values, lines)


def _note_lines(key_node: yaml.Node, node: yaml.Node, path: tuple, lines: dict[tuple, int]) -> None:
    path = (*path, str(key_node.value))
    lines[path] = key_node.start_mark.line + 1
    entries = [(path, node)]
    if isinstance(node, yaml.SequenceNode):
        entries = [((*path, index), item) for index, item in enumerate(node.value)]
        lines.update({below: item.start_mark.line + 1 for below, item in entries})
    for below, entry in entries:
        if isinstance(entry, yaml.MappingNode):
            for inner_key, inner in entry.value:
                _note_lines(inner_key, inner, below, lines)
