"""Folders and files that somebody has prepared to do harm, and how a command answers to them."""

import json
import os
import pickle
import runpy
import shutil
import signal
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from orpo_trl.cli import main
from support.small import REPOSITORY, TOKENIZER

DATA = REPOSITORY / "recipes" / "quickstart" / "data"
SCRIPT = REPOSITORY / "scripts" / "run_orpo.py"
# Seconds after which a command counts as hanging.
PATIENCE = 60


class Payload:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return (os.system, (f"touch {self.canary}",))


def payload(canary: Path) -> bytes:
    return pickle.dumps(Payload(canary), protocol=2)


@dataclass
class Answer:
    """What a command ended with: status, and all that it printed; `error` where it did not end by itself."""

    status: int
    text: str
    error: BaseException | None

    def is_one_message(self) -> bool:
        return self.error is None and "Traceback" not in self.text


@contextmanager
def _patience():
    def stop(*_: Any) -> None:
        raise TimeoutError(f"no end within {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def orpo_trl(*words: Any) -> Answer:
    """`orpo-trl` in this process."""
    with _patience():
        result = CliRunner().invoke(main, [str(word) for word in words])
    error = None if isinstance(result.exception, (SystemExit, type(None))) else result.exception
    return Answer(result.exit_code, result.output + (result.stderr or ""), error)


def run_orpo(*words: Any) -> Answer:
    """`scripts/run_orpo.py` in this process."""
    text, status, error = StringIO(), 0, None
    with _patience(), redirect_stdout(text), redirect_stderr(text):
        try:
            runpy.run_path(str(SCRIPT))["main"]([str(word) for word in words])
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException as raised:
            status, error = 1, raised
    return Answer(status, text.getvalue(), error)


def copy_of_model(folder: Path) -> Path:
    """The quickstart's config and tokenizer, without weights."""
    shutil.copytree(TOKENIZER, folder)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
