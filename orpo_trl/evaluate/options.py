"""What an evaluation is asked for: its target, and the options that the benchmarks share."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_trl import run_folder
from orpo_trl.plain_files import read_text

# One of these is in the folder of a model.
_OF_MODEL = ("config.json", "adapter_config.json")


@dataclass(frozen=True)
class Options:
    """Options of `orpo-trl evaluate`. A benchmark reads those that mean something to it.

    Attributes:
        benchmark: the name that the user has given; one of the table in `command.py`, or a task of lm-eval.
        data: file with the benchmark's items in place of the Hub; or a folder with files named by benchmark.
        limit: the first so many items; None for all.
        output: folder in which `evaluations/` is written; None for the target's.
        batch_size: rows of a forward pass.
        dtype: of the weights; `auto` as they are stored.
        device: torch's name; None for the GPU where there is one.
        seed: of everything that is drawn; lm-eval's own by default.
        max_new_tokens: of an answer; None for the benchmark's own.
        chat_template_path: a .jinja file, or a tokenizer; None for the model's own template.
        trust_remote_code: whether code that comes with the model may run.
        against: Hub id or folder of a model to compare with.
        judge: model that judges; None for the benchmark's own.
        endpoint: address of an OpenAI-compatible server of the judge; None for the library's own.
        judge_prompts, reference_answers: FastChat's files for MT-Bench.
        reference_outputs: answers that AlpacaEval compares with.
        annotations: stored judgements, which are scored in place of new ones.
        workers: requests to the judge at one time.
        timeout: seconds without a byte of the judge's server, after which a request is sent again.
        price: USD per million tokens of the judge's prompts and replies; None for that of a known judge.
        yes: whether to send without asking.
    """

    benchmark: str = ""
    data: Path | None = None
    limit: int | None = None
    output: Path | None = None
    batch_size: int = 8
    dtype: str = "auto"
    device: str | None = None
    seed: int = 1234
    max_new_tokens: int | None = None
    chat_template_path: str | None = None
    trust_remote_code: bool = False
    against: str | None = None
    judge: str | None = None
    endpoint: str | None = None
    judge_prompts: Path | None = None
    reference_answers: Path | None = None
    reference_outputs: Path | None = None
    annotations: Path | None = None
    workers: int = 8
    timeout: float = 600.0
    price: tuple[float, float] | None = None
    yes: bool = False

    def data_file(self, benchmark: str) -> Path | None:
        """The file of a benchmark's items: `data` itself, or `BENCHMARK.*` in it. None for the Hub.

        Raises:
            ValueError: where `data` does not exist, or is a folder without such a file.
        """
        if self.data is None or self.data.is_file():
            return self.data
        if not self.data.is_dir():
            raise ValueError(f"--data: {self.data} does not exist")
        found = sorted(path for path in self.data.iterdir() if path.stem == benchmark and path.is_file())
        if not found:
            raise ValueError(f"--data: expected a file {benchmark}.jsonl in {self.data}, found none")
        return found[0]


class DataUnreachable(ValueError):
    """The items of a benchmark cannot be had."""

    def __init__(self, benchmark: str, source: str, problem: str):
        super().__init__(
            f"{benchmark}: its data, {source}, cannot be reached ({problem}). Name a file of it: --data FILE"
        )


@dataclass(frozen=True)
class Target:
    """What is evaluated.

    Attributes:
        name: Hub id, or the name of the folder or of the file of answers.
        folder: where `evaluations/` is, unless `--output` says another.
        model: Hub id or folder to load; None for answers.
        answers: file of stored answers; None for a model.
        is_run: whether the folder is one of a run, with its recipe.
    """

    name: str
    folder: Path
    model: str | None = None
    answers: Path | None = None
    is_run: bool = False

    @property
    def made(self) -> dict[str, Any]:
        """What `orpo-trl generate` has recorded beside the answers; empty where it has not, and of a model.

        Raises:
            ValueError: where the record is damaged.
        """
        from orpo_trl.generate.benchmarks import settings_file

        path = None if self.answers is None else settings_file(self.answers)
        if path is None or not path.is_file():
            return {}
        try:
            found = json.loads(read_text(path))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: expected JSON, received: {error}") from error
        return found if isinstance(found, dict) else {}

    def need_model(self, benchmark: str) -> str:
        """The model.

        Raises:
            ValueError: where the target is a file of answers.
        """
        if self.model is None:
            raise ValueError(f"{benchmark}: expected a model or a run, received the file {self.answers}")
        return self.model


def find_target(text: str) -> Target:
    """The target that a user names: a file of answers, a folder of a model or a run, or a Hub id.

    Raises:
        ValueError: for a folder without a model, and a path that does not exist.
    """
    path = Path(text).expanduser()
    if path.is_file():
        return Target(path.stem, path.parent, answers=path)
    if path.is_dir():
        _require_model_in(path)
        return Target(path.resolve().name, path, str(path), is_run=(path / run_folder.RUN).is_file())
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or path.suffix in (".json", ".jsonl"):
        raise ValueError(f"{text}: expected a model, a run or a file of answers; there is no such file or folder")
    return Target(text, Path("outputs") / path.name, text)


def _require_model_in(folder: Path) -> None:
    if any((folder / name).is_file() for name in _OF_MODEL):
        return
    inner = sorted(path.parent.name for name in _OF_MODEL for path in folder.glob(f"*/{name}"))
    hint = f" Name one of those in it: {', '.join(dict.fromkeys(inner))}." if inner else ""
    raise ValueError(f"{folder}: expected the folder of a model, with {' or '.join(_OF_MODEL)}; found neither.{hint}")
