"""Reading and writing YAML: recipes in YAML 1.2, files of other tools in YAML 1.1, which those tools read.

Both readers refuse aliases, tags and keys that stand twice, build plain values only, and keep the line of each value.
"""

import re
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.composer import ComposerError

# A position in nested values, from the top: `("datasets", 0, "path")`.
ValuePath = tuple[str | int, ...]

_STR = "tag:yaml.org,2002:str"
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}


class _Loader(yaml.SafeLoader):
    """Refuses aliases: a few of them can stand for a value of any size."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            text = "aliases (`*name`) are not read; write the value out"
            raise ComposerError(None, None, text, self.peek_event().start_mark)
        return super().compose_node(parent, index)


class _Loader12(_Loader):
    """YAML 1.2's core schema, set up below: `5e-6` is a number; `no`, `on` and dates are text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's class attribute)


class _Loader11(_Loader):
    """YAML 1.1, but `5e-6` is a number, which these tools make of it later, and dates are text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's class attribute)
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":merge", ":value"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_EXPONENT = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_Loader11.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else; repeats a value that stands twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    node = dumper.represent_float(value)
    node.value = re.sub(r"e([-+])0*(\d)", r"e\1\2", node.value)  # 5.0e-06
    return node


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    # Line breaks and other unprintable characters as escapes, which keep a value in one line.
    return dumper.represent_scalar(_STR, value, style=None if value.isprintable() else '"')


_Dumper.add_representer(float, _float)
_Dumper.add_representer(str, _text)

for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
):
    for _class in (_Loader12, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))


def to_yaml(values: dict[str, Any]) -> str:
    """Values as YAML, read the same way by YAML 1.1 and 1.2, one line for each value that is no mapping or list."""
    return yaml.dump(values, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=10**6)


def to_yaml_line(value: Any) -> str:
    """One value as YAML in one line: `{num_cycles: 2}`."""
    text = yaml.dump(value, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=10**6, default_flow_style=True)
    return text.removesuffix("...\n").rstrip("\n")


def scalar(text: str) -> Any:
    """What a word stands for in YAML 1.2: a number, a truth value, null, or the text itself."""
    kind = _Loader12("").resolve(yaml.ScalarNode, text, (True, False)).rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int" and len(text) < 100:
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)
    if kind == "float":
        return float(text.replace(".", "", 1) if "n" in text.lower() else text)  # Python has no dot in `.inf`
    return text


@dataclass(frozen=True)
class YamlProblem:
    """What is wrong with a YAML text: the path of the value and its line, where it has one."""

    path: ValuePath
    line: int | None
    text: str


class YamlReader:
    """A YAML 1.2 text as plain values.

    Attributes:
        lines: of every value, by path; for an entry of a mapping, the line of its key.
        problems: why something of the text is not in the values, in the order of the text.
    """

    _loader: type[_Loader] = _Loader12

    def __init__(self):
        self._yaml = self._loader("")
        self.lines: dict[ValuePath, int] = {}
        self.problems: list[YamlProblem] = []

    def read(self, text: str) -> Any:
        """The values of a text; None where it is empty or no YAML, which `problems` then says."""
        try:
            self._yaml = self._loader(text)
            node = self._yaml.get_single_node()
            return None if node is None else self._value(node, ())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self._found(f"not YAML: {error.problem or error.context}", (), mark)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of YAML 1.1 that Python does not take
            self._found(f"not YAML: {error}".replace("\n", " "))
        except RecursionError:
            self._found("nested too deep")
        return None

    def _value(self, node: yaml.Node, path: ValuePath) -> Any:
        self.lines[path] = node.start_mark.line + 1
        if node.tag not in _PLAIN_TAGS:
            self._found(f"the tag {node.tag} is not read", path, node.start_mark)
        elif isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*path, index)) for index, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        elif isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        return None

    def _mapping(self, node: yaml.MappingNode, path: ValuePath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            mark = key_node.start_mark
            if not isinstance(key_node, yaml.ScalarNode):
                self._found("a key must be a name, received a list or a mapping", path, mark)
                continue
            key = key_node.value
            below = (*path, key)
            if not self._is_key(key_node):
                self._found(f"a key must be a name, received {key!r:.60}", path, mark)
            elif key in mapping:
                text = f"`{key}` stands here and in line {self.lines[below]}; keep one of them"
                self._found(text, below, mark)
            else:
                mapping[key] = self._value(value_node, below)
                self.lines[below] = mark.line + 1
        return mapping

    def _is_key(self, node: yaml.ScalarNode) -> bool:
        return bool(node.style) or isinstance(scalar(node.value), str)

    def _scalar(self, node: yaml.ScalarNode, path: ValuePath) -> Any:
        return node.value if node.tag == _STR else scalar(node.value)

    def _found(self, text: str, path: ValuePath = (), mark: yaml.Mark | None = None) -> None:
        self.problems.append(YamlProblem(path, None if mark is None else mark.line + 1, text))


class Yaml11Reader(YamlReader):
    """A YAML 1.1 text as plain values; any word may be a key, as in `no: 1`."""

    _loader = _Loader11

    def _is_key(self, node: yaml.ScalarNode) -> bool:
        return True

    def _scalar(self, node: yaml.ScalarNode, path: ValuePath) -> Any:
        return self._yaml.construct_object(node)


def from_yaml_of_others(text: str) -> Any:
    """The values of another tool's YAML, by YAML 1.1 and with aliases, as that tool reads it.

    Raises:
        ValueError: where the text is no YAML.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error


def from_yaml(text: str) -> Any:
    """The values of a YAML 1.2 text.

    Raises:
        ValueError: where the text is no YAML, or has aliases, tags or repeated keys.
    """
    reader = YamlReader()
    values = reader.read(text)
    if reader.problems:
        first = reader.problems[0]
        raise ValueError(first.text if first.line is None else f"line {first.line}: {first.text}")
    return values
