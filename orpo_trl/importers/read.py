"""A YAML config as values whose keys know their lines."""

from pathlib import Path

from orpo_trl.importers.draft import ForeignConfig, ImportProblem
from orpo_trl.plain_files import UnsafeFile
from orpo_trl.plain_files import read_text as read_plain
from orpo_trl.yaml_text import Yaml11Reader


def read_text(path: Path) -> str:
    """The text of a config.

    Raises:
        ImportProblem: where the file is missing, a folder, or not UTF-8 text.
    """
    try:
        return read_plain(path)
    except FileNotFoundError:
        raise ImportProblem(f"the config {path} does not exist") from None
    except (OSError, UnicodeDecodeError, UnsafeFile) as error:
        raise ImportProblem(f"the config {path} cannot be read: {error}") from error


def read_yaml(path: Path, text: str) -> ForeignConfig:
    """A mapping of keys to plain values.

    Raises:
        ImportProblem: with the line, where the text is not YAML, not a mapping, or has a key twice.
    """
    reader = Yaml11Reader()
    values = reader.read(text)
    if reader.problems:
        first = reader.problems[0]
        raise ImportProblem(f"{path}{'' if first.line is None else f':{first.line}'}: {first.text}")
    if not isinstance(values, dict):
        kind = {list: "a list", type(None): "nothing"}.get(type(values), "text")
        raise ImportProblem(f"{path}: a config is a mapping of keys to values, received {kind}")
    return ForeignConfig(path, values, reader.lines)
