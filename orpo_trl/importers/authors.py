"""The shell scripts of ORPO's authors: `accelerate launch … main.py --key value …`.

Arguments and defaults: src/args.py of github.com/xfactlab/orpo; what becomes of them: its main.py and src/utils.py.
"""

import re
import shlex
from pathlib import Path
from typing import Any

from orpo_trl.importers.draft import Config, Draft, ImportProblem, Tool
from orpo_trl.importers.shared import ROWS_DROPPED
from orpo_trl.importers.tables import FLASH

_SCRIPT = "main.py"
_ENGINE = "config_file"
# Their arguments with a value: default and type.
_ARGUMENTS: dict[str, tuple[Any, type]] = {
    "model_name": ("gpt2", str),
    "data_name": ("HuggingfaceH4/UltraFeedback", str),
    "alpha": (1.0, float),
    "lr": (2e-5, float),
    "lr_scheduler_type": ("cosine", str),
    "warmup_steps": (5000, int),
    "optim": ("paged_adamw_32bit", str),
    "num_train_epochs": (10, int),
    "per_device_train_batch_size": (2, int),
    "per_device_eval_batch_size": (2, int),
    "gradient_accumulation_steps": (1, int),
    "prompt_max_length": (256, int),
    "response_max_length": (1024, int),
    "evaluation_strategy": ("epoch", str),
    "num_proc": (8, int),
    "seed": (42, int),
    "lora_rank": (64, int),
    "lora_alpha": (16, int),
    "lora_dropout": (0.1, float),
}
_SWITCHES = ("flash_attention_2", "enable_lora", "disable_prompt_loss", "do_eval")
_RENAMED = {
    "model_name": "model_name_or_path",
    "prompt_max_length": "max_prompt_length",
    "response_max_length": "max_length",
    "num_proc": "dataset_num_proc",
    "alpha": "beta",
    "lr": "learning_rate",
    "wandb_project_name": "project",
}
_CONVERTED = {
    "data_name": ("dataset_name", ""),
    "optim": ("optim", ""),
    "evaluation_strategy": ("eval_strategy", "and save_strategy"),
    "per_device_eval_batch_size": ("per_device_eval_batch_size", ""),
    "enable_lora": ("use_peft", ""),
    "lora_rank": ("lora_r", ""),
    "lora_alpha": ("lora_alpha", ""),
    "lora_dropout": ("lora_dropout", ""),
    "disable_prompt_loss": ("nll_scope", "completion"),
    _ENGINE: ("deepspeed", "zero2 or zero3 in place of a file"),
}
_UNUSED = "the authors' code reads it and does not use it"
_DROPPED = {
    **dict.fromkeys(("torch_compile", "save_dir", "save_strategy", "overwrite_output_dir", "do_eval"), _UNUSED),
    "flash_attention_2": FLASH,
    "cache_dir": "set the environment variable HF_HUB_CACHE",
    "wandb_entity": "set the environment variable WANDB_ENTITY, and `report_to: wandb`",
    "num_processes": "orpo-trl train FILE --num_processes …",
    "num_machines": "orpo-trl train FILE --num_machines …",
    "machine_rank": "orpo-trl train FILE --machine_rank …",
    "main_process_ip": "orpo-trl train FILE --main_process_ip …",
    "main_process_port": "orpo-trl train FILE --main_process_port …",
}
_ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"  # the one dataset of theirs whose splits have own names


def read_script(path: Path, text: str) -> Config:
    """The arguments of the command that runs main.py, as values by name, with the lines they stand in.

    Raises:
        ImportProblem: with the line, where there is no such command, there are several, or a value is missing.
    """
    commands = [command for command in _commands(path, text) if any(_is_script(word) for word, _ in command)]
    if len(commands) != 1:
        where = ", ".join(str(command[0][1]) for command in commands)
        found = f"found {len(commands)}, in lines {where}; keep one" if commands else "found none"
        raise ImportProblem(f"{path}: expected one command that runs {_SCRIPT}, {found}")
    words = commands[0]
    start = next(position for position, (word, _) in enumerate(words) if _is_script(word))
    values: dict[str, Any] = {}
    lines: dict[tuple, int] = {}
    for part, is_launch in ((words[:start], True), (words[start + 1 :], False)):
        for name, value, line in _arguments(path, part, is_launch):
            if (name,) in lines:
                raise ImportProblem(
                    f"{path}:{line}: `--{name}` stands here and in line {lines[(name,)]}; keep one of them"
                )
            values[name], lines[(name,)] = value, line
    return Config(path, values, lines)


def _is_script(word: str) -> bool:
    return word == _SCRIPT or word.endswith(f"/{_SCRIPT}")


def _commands(path: Path, text: str) -> list[list[tuple[str, int]]]:
    """The commands of a shell script: words with their lines, variables of the script filled in."""
    commands: list[list[tuple[str, int]]] = [[]]
    variables: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        goes_on = line.endswith("\\") and not line.endswith("\\\\")
        lexer = shlex.shlex(line[:-1] if goes_on else line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError as error:
            raise ImportProblem(f"{path}:{number}: not a shell command that can be read: {error}") from error
        for word in words:
            if set(word) <= set(";&|"):
                commands.append([])
            else:
                commands[-1].append((_expand(word, variables), number))
        if not goes_on:
            for name, _, value in (word.partition("=") for word, _ in commands[-1] if _is_assignment(word)):
                if all(_is_assignment(word) or word == "export" for word, _ in commands[-1]):
                    variables[name] = value
            commands.append([])
    return [command for command in commands if command]


def _is_assignment(word: str) -> bool:
    return re.match(r"[A-Za-z_]\w*=", word) is not None


def _expand(word: str, variables: dict[str, str]) -> str:
    return re.sub(r"\$\{?([A-Za-z_]\w*)\}?", lambda found: variables.get(found[1], found[0]), word)


def _arguments(path: Path, words: list[tuple[str, int]], is_launch: bool) -> list[tuple[str, Any, int]]:
    """Names, values and lines of `--name value`, `--name=value` and `--name`; environment variables of a launch too."""
    found = []
    position = 0
    while position < len(words):
        word, line = words[position]
        position += 1
        if is_launch and _is_assignment(word):
            found.append((word.partition("=")[0], word.partition("=")[2], line))
        if not word.startswith("--"):
            continue
        name, separator, text = word[2:].partition("=")
        following = words[position][0] if position < len(words) else None
        if not separator and name not in _SWITCHES and following is not None and not following.startswith("--"):
            text, separator = following, " "
            position += 1
        if name in _ARGUMENTS and not is_launch:
            if not separator:
                raise ImportProblem(f"{path}:{line}: `--{name}` has no value")
            found.append((name, _typed(path, line, name, text), line))
        else:
            found.append((name, text if separator else True, line))
    return found


def _typed(path: Path, line: int, name: str, text: str) -> Any:
    kind = _ARGUMENTS[name][1]
    try:
        return kind(text)
    except ValueError:
        expected = {int: "a whole number", float: "a number"}[kind]
        raise ImportProblem(f"{path}:{line}: `--{name}`: expected {expected}, received {text!r:.60}") from None


def _convert(draft: Draft) -> None:
    script = draft.config.path
    _model_and_engine(draft)
    _data_and_evaluation(draft)
    scope = "completion" if draft.flag("disable_prompt_loss") else "sequence"
    draft.set("nll_scope", scope, "disable_prompt_loss", why="" if scope == "completion" else "the authors' objective")
    draft.set("nll_reduction", "micro_batch_mean", why="the authors' objective")
    draft.set("disable_dropout", False, why="the authors leave dropout as the model has it")
    draft.differs(
        "The authors' NLL leaves out the end-of-sequence token, which is the pad token there, and the odds ratio "
        "scores one more of them after the template's last newline; here both cover what the template writes."
    )
    draft.differs(ROWS_DROPPED)
    optim = draft.take("optim", str, "a name", _ARGUMENTS["optim"][0])
    if optim == "paged_adamw_32bit":
        draft.set("optim", "adamw_torch", "optim", why="paged_adamw_32bit: the same update, state paged to the CPU")
        draft.differs(
            "The optimiser is adamw_torch, whose update is that of paged_adamw_32bit; it needs no bitsandbytes.",
            "optim",
        )
    else:
        draft.set("optim", optim, "optim")
    for name, (value, _) in _ARGUMENTS.items():
        if name not in _CONVERTED:
            draft.default(_RENAMED.get(name, name), value, "the default of the authors' code")
    for ours, value in (("bf16", True), ("gradient_checkpointing", True), ("logging_steps", 50)):
        draft.set(ours, value, why="fixed in the authors' code")
    draft.set("output_dir", f"outputs/{script.stem}", why="named after the script")


def _model_and_engine(draft: Draft) -> None:
    draft.set("dtype", "float32", why="bf16 computes in 16 bits, with a 32-bit copy of the weights")
    draft.differs(
        "The authors load the weights in bf16; here bf16 computes, and the weights that are updated have 32 bits."
    )
    draft.set("chat_template_path", "recipes/templates/orpo.jinja", why="where the tokenizer has none")
    draft.differs(
        "The authors' template stands in where the tokenizer has none; take chat_template_path out for a model whose "
        "tokenizer has its own."
    )
    if draft.flag("enable_lora"):
        draft.set("use_peft", True, "enable_lora")
        for ours, name in (("lora_r", "lora_rank"), ("lora_alpha", "lora_alpha"), ("lora_dropout", "lora_dropout")):
            draft.set(ours, draft.number(name, _ARGUMENTS[name][0]), name)
    draft.silent("lora_rank", "lora_alpha", "lora_dropout")
    config = draft.take(_ENGINE, str, "a file")
    stage = re.search(r"fsdp|(?:ds|zero|z|stage)[-_]?([123])", Path(config).name.lower()) if config else None
    if stage:
        engine = f"zero{max(int(stage[1] or 3), 2)}"
        draft.set("deepspeed", engine, _ENGINE)
        draft.differs(
            f"The engine is {engine}, which shards as the accelerate config's name tells; the file is not read.",
            _ENGINE,
        )
    elif config:
        draft.drop(_ENGINE, "no engine is seen in the name; write `deepspeed: zero2` or `zero3`")


def _data_and_evaluation(draft: Draft) -> None:
    name = draft.take("data_name", str, "a dataset", _ARGUMENTS["data_name"][0])
    draft.set("dataset_name", name, "data_name")
    strategy = draft.take("evaluation_strategy", str, "a strategy", _ARGUMENTS["evaluation_strategy"][0])
    draft.set("save_strategy", strategy, "evaluation_strategy", why="the authors save as often as they evaluate")
    if name == _ULTRAFEEDBACK:
        draft.set("dataset_train_split", "train_prefs", "data_name")
        draft.set("dataset_test_split", "test_prefs", "data_name")
        draft.set("eval_strategy", strategy, "evaluation_strategy")
        draft.set("load_best_model_at_end", strategy != "no", why="fixed in the authors' code")
        size = draft.number("per_device_eval_batch_size", _ARGUMENTS["per_device_eval_batch_size"][0])
        draft.set("per_device_eval_batch_size", size, "per_device_eval_batch_size")
    else:
        draft.set("eval_strategy", "no", why="to evaluate, name a test split and set epoch")
        draft.differs(
            "The authors evaluate after each epoch, and keep the best one, where the dataset has a test split; here "
            "nothing is evaluated until eval_strategy and dataset_test_split say so.",
            "data_name",
        )
        if draft.has("per_device_eval_batch_size"):
            size = draft.number("per_device_eval_batch_size")
            draft.set("per_device_eval_batch_size", size, "per_device_eval_batch_size")


AUTHORS = Tool(
    id="authors",
    name="the authors' script",
    renamed=_RENAMED,
    converted=_CONVERTED,
    dropped=_DROPPED,
    switches=frozenset(),
    convert=_convert,
    check=lambda values: None,  # a command that runs main.py
    same=frozenset(_ARGUMENTS),
)
