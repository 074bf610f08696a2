"""Typed settings of a run: `ORPOConfig` for the trainer, `ModelArguments` and `DataArguments` for the entry point."""

import copy
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Required

from pydantic import ConfigDict, Field, with_config
from transformers import TrainingArguments, is_torch_xla_available
from transformers.training_args import OptimizerNames
from trl import ModelConfig, SFTConfig
from typing_extensions import TypedDict

from orpo_trl.durations import read_duration
from orpo_trl.global_batch import split_global_batch
from orpo_trl.hidden import hide_all
from orpo_trl.processes import launched_precision
from orpo_trl.sections import MEANINGLESS

NLL_SCOPES = ("sequence", "completion")
NLL_REDUCTIONS = ("token_mean", "micro_batch_mean", "sequence_mean", "max_length")
PAIR_LAYOUTS = ("auto", "shared_prefix", "padded")
SAMPLING_STRATEGIES = ("auto", "random", "sequential", "group_by_length", "batch_rebalance")
MALFORMED_ACTIONS = ("error", "drop")
UNRENDERED_ACTIONS = ("warn", "error", "drop")
PROMPT_TURNS = ("auto", "all", "first")
RESUME_MODES = ("auto",)
# Settings that the device decides where they are None.
_OF_DEVICE = (
    "bf16", "gradient_checkpointing", "activation_checkpointing", "gradient_checkpointing_kwargs",
    "activation_checkpointing_kwargs",
)  # fmt: skip
WANDB_MODES = ("online", "offline", "disabled")


@dataclass(frozen=True)
class SettingsProblem:
    """What is wrong with settings: the keys that it is about, the one to change first, and a sentence."""

    keys: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return self.text


class SettingsError(ValueError):
    """Settings that are out of range, contradictory or without meaning.

    Attributes:
        problems: all that was found, each with its keys.
    """

    def __init__(self, owner: str, problems: list[SettingsProblem]):
        super().__init__(f"{owner}:\n" + "\n".join(f"  - {problem}" for problem in problems))
        self.problems = problems


def _has_accelerator() -> bool:
    import torch  # not at the top: `orpo-trl schema` reads the classes without it, in a third of the time

    return torch.accelerator.is_available()


@dataclass
class ORPOConfig(SFTConfig):
    """Settings of `ORPOTrainer`: those of ORPO below, and every one of `trl.SFTConfig` that means something for pairs.

    Takes every argument of TRL 1.16's `trl.experimental.orpo.ORPOConfig`. Defaults that differ from `SFTConfig`:
    `learning_rate` 5e-6 (the paper's code) instead of 2e-5; `train_sampling_strategy` 'auto', which balances the tokens
    of ranks; and `logging_nan_inf_filter` off, because it hides a non-finite loss as 0.0 and costs a device
    synchronisation per micro-batch.

    Raises:
        SettingsError: listing every argument that is out of range, contradictory, or without meaning for pairs.
    """

    learning_rate: float = field(default=5e-6, metadata={"help": "Initial learning rate."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Must be off: a non-finite loss is logged as it is, and its step is named."},
    )
    beta: float = field(
        default=0.1,
        metadata={"help": "Weight of the odds-ratio term: lambda in the paper, alpha in the authors' code."},
    )
    nll_scope: str = field(
        default="sequence",
        metadata={
            "help": "Tokens that the NLL term covers: prompt and chosen response ('sequence', as the paper and TRL), "
            "or the chosen response alone ('completion').",
            "choices": list(NLL_SCOPES),
        },
    )
    nll_reduction: str = field(
        default="token_mean",
        metadata={
            "help": "How token losses become the NLL term. 'token_mean': mean over all tokens of the optimiser step, "
            "all ranks and accumulation steps. 'micro_batch_mean': token mean of each micro-batch, then their mean "
            "(TRL and the authors' current code). 'sequence_mean': token mean of each row, then the mean over rows. "
            "'max_length': sum of a row / (max_length - 1), then the mean over rows (how the released weights were "
            "trained).",
            "choices": list(NLL_REDUCTIONS),
        },
    )
    pair_layout: str = field(
        default="auto",
        metadata={
            "help": "How the responses of a pair are laid out. 'shared_prefix': one row without padding, in which each "
            "prompt runs once; an error where that is not exact for the model. 'padded': a padded row per response. "
            "'auto': shared_prefix wherever it is exact; with `neftune_noise_alpha`, padded.",
            "choices": list(PAIR_LAYOUTS),
        },
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Pairs of an optimiser step, on any number of processes. `gradient_accumulation_steps` follows; "
            "where the pairs of a process are no multiple of `per_device_train_batch_size`, the micro-batch is "
            "lowered to what divides them. None: micro-batch x accumulation x processes."
        },
    )
    gradient_accumulation_steps: int | None = field(
        default=None,
        metadata={
            "help": "Micro-batches of an optimiser step on each process. None: what `global_batch_size` needs, else 1."
        },
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={
            "help": "Split the rows of a micro-batch (`per_device_train_batch_size`) into forward and backward passes "
            "of at most this many tokens, padding included; a longer pair gets a pass of its own. The optimiser step "
            "and its loss stay the same, but for a load-balancing loss, which is a mean over passes. None: one pass."
        },
    )
    train_sampling_strategy: str = field(
        default="auto",
        metadata={
            "help": "Order of the training rows: 'random', 'sequential', 'group_by_length', or 'batch_rebalance': "
            "random, with the rows of each optimiser step distributed so that all ranks and accumulation steps get "
            "about the same number of tokens. 'auto': batch_rebalance, or random where the loss depends on which rows "
            "share a micro-batch.",
            "choices": list(SAMPLING_STRATEGIES),
        },
    )
    max_length: int | None = field(
        default=1024,
        metadata={
            "help": "Longest row in tokens, prompt included; longer responses are cut on the right. None: no limit."
        },
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Rows whose prompt has this many tokens or more are dropped. None: no limit."},
    )
    max_completion_length: int | None = field(
        default=None,
        metadata={"help": "Longest response in tokens; longer ones are cut on the right. None: no limit."},
    )
    strings_as_messages: bool = field(
        default=False,
        metadata={
            "help": "Render string prompts and responses through the chat template, as one user and one assistant "
            "turn (HH-RLHF strings as their turns). Off: strings are trained on as they are, as in TRL."
        },
    )
    prompt_turns: str = field(
        default="auto",
        metadata={
            "help": "Turns of a conversation that are its prompt. 'auto': those of `prompt` where it holds messages, "
            "as in TRL, else all but the last answer. 'all': all but the last answer. 'first': those before the first "
            "answer; the odds ratio then covers all later turns, the user's included (as Capybara's released weights "
            "were trained).",
            "choices": list(PROMPT_TURNS),
        },
    )
    on_malformed: str = field(
        default="error",
        metadata={
            "help": "What to do when rows do not have an accepted shape: 'error' names them and stops, 'drop' counts "
            "them in the preparation report and goes on.",
            "choices": list(MALFORMED_ACTIONS),
        },
    )
    on_unrendered: str = field(
        default="warn",
        metadata={
            "help": "What to do when the chat template leaves out words of a row, such as its system text or the "
            "thoughts of its answer: 'warn' trains on what is left, 'error' names the rows and stops, 'drop' counts "
            "them in the preparation report and goes on without them.",
            "choices": list(UNRENDERED_ACTIONS),
        },
    )
    max_nonfinite_steps: int = field(
        default=3,
        metadata={
            "help": "After so many optimiser steps in a row whose loss or gradient norm is not finite, the run stops "
            "with an error and saves no model. None of these steps is taken, and their rows are written to "
            "`<output_dir>/trouble.jsonl`."
        },
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of the model to 0."})
    padding_value: int | None = field(
        default=None, metadata={"help": "Token id that pads short rows. None: the tokenizer's pad token."}
    )
    generate_during_eval: bool = field(
        default=False,
        metadata={
            "help": "At each evaluation, generate greedy answers to a few held-out prompts and write them to "
            "`<output_dir>/samples.jsonl`, and to wandb where it is in `report_to`."
        },
    )
    run_group: str | None = field(default=None, metadata={"help": "Group of runs in wandb that this one belongs to."})
    run_tags: list[str] = field(default_factory=list, metadata={"help": "Tags of the run in wandb."})
    wandb_mode: str | None = field(
        default=None,
        metadata={
            "help": "Whether wandb sends what it logs: 'online', 'offline' (to `wandb/`, for a later `wandb sync`), or "
            "'disabled'. None: as the environment variable WANDB_MODE says, or else online.",
            "choices": list(WANDB_MODES),
        },
    )
    resume: str | None = field(
        default=None,
        metadata={
            "help": "'auto': the same command begins the run, goes on from its latest whole checkpoint, or says that "
            "it is finished. None: an output folder with a run that did not finish is refused.",
            "choices": list(RESUME_MODES),
        },
    )
    resume_anyway: bool = field(
        default=False,
        metadata={
            "help": "Go on with a run although its data, tokenizer, template, lengths, loss, seed or model have "
            "changed: the weights are then those of no single recipe. This start only."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Begin anew in a folder with another run, which is set aside under its date. With `resume: auto`, "
            "a run of the same settings goes on all the same. This start only."
        },
    )
    stop_after: str | float | None = field(
        default=None,
        metadata={
            "help": "Stop with a checkpoint and exit status 75 at the end of the optimiser step in which this time is "
            "over: 90s, 45m, 3h50m, 1d2h, or seconds as a number. Counted from the start of the process; in Python, "
            "from that of `train`. The same command goes on. None: no limit."
        },
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the layers again in the backward pass instead of keeping their activations: less memory, "
            "up to a third more time. None: on; on a CPU, off where the memory holds the activations."
        },
    )
    # TrainingArguments looks for torch before it names this default, and `orpo-trl schema` leaves torch out.
    optim: OptimizerNames | str = field(
        default="adamw_torch_fused", metadata=TrainingArguments.__dataclass_fields__["optim"].metadata
    )
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first optimiser step as well."})
    is_encoder_decoder: bool | None = field(
        default=None, metadata={"help": "Accepted because TRL has it; True is refused: models here are decoder-only."}
    )

    def __post_init__(self):
        problems = [*self._range_problems(), *self._contradictions(), *self._meaningless_problems()]
        if problems:
            raise SettingsError("ORPOConfig", problems)
        if not _has_accelerator() and not is_torch_xla_available():
            # Without it, accelerate looks for the backend of a GPU and finds none. Each process of a distributed launch
            # then runs as if it were the only one.
            self.use_cpu = True
        # As they were asked for: what is left open, this device decides.
        self.asked = {name: getattr(self, name) for name in _OF_DEVICE if hasattr(self, name)}
        self._settle_precision()
        open_ones = {name for name, value in self.asked.items() if value is None}
        is_unset = {name for name in self.asked if name.endswith("_checkpointing")} <= open_ones
        if is_unset:
            self.set_checkpointing(True)
        # Whether the memory decides: `memory.leave_out_checkpointing`.
        self.is_checkpointing_open = self.use_cpu and self.asked.keys() - {"bf16"} <= open_ones
        # Micro-batch and accumulation as they were asked for; `split_for` changes the fields.
        self.asked_split = (self.per_device_train_batch_size, self.gradient_accumulation_steps)
        # Before TrainingArguments fill in the DeepSpeed config. Launchers tell a process how many there are by this.
        self.split_note = self.split_for(int(os.environ.get("WORLD_SIZE", 1)))
        given = self.accelerator_config
        if self.dataloader_pin_memory and not self.use_cpu and (given is None or isinstance(given, dict)):
            # Else the host waits for the device with each batch that it copies. Trainer's default is to wait.
            self.accelerator_config = {"non_blocking": True, **(given or {})}
        super().__post_init__()
        unsafe = self._loading_problems()
        if unsafe:
            raise SettingsError("ORPOConfig", unsafe)
        if self.run_name is None and self.output_dir is not None:
            # Otherwise trackers invent a name, and a resumed run gets another one.
            self.run_name = Path(self.output_dir).name

    def _settle_precision(self) -> None:
        """Where neither `bf16` nor `fp16` is set, the config of accelerate decides, then the device."""
        asked = launched_precision()
        if self.bf16 or self.fp16:
            return
        if asked == "fp16":
            self.fp16 = True
        elif self.bf16 is None and (asked in ("bf16", "fp8") or self.use_cpu):
            # TRL's default is bf16. It would win over fp8, and is slower on most CPUs.
            self.bf16 = asked == "bf16"

    def set_checkpointing(self, is_on: bool) -> None:
        """Gradient checkpointing, under both of its names: transformers 5.23 reads the newer one."""
        self.gradient_checkpointing = is_on  # pyright: ignore[reportIncompatibleVariableOverride]
        if hasattr(self, "activation_checkpointing"):
            self.activation_checkpointing = is_on

    def split_for(self, processes: int) -> str:
        """Sets micro-batch and accumulation as `global_batch_size` wants them for a number of processes.

        Returns:
            What the user should know of it, or an empty string.

        Raises:
            SettingsError: if these processes cannot share the global batch.
        """
        if self.global_batch_size is None:
            self.gradient_accumulation_steps = self.gradient_accumulation_steps or 1
            return ""
        micro_batch, accumulation = self.asked_split
        try:
            split = split_global_batch(
                self.global_batch_size, micro_batch, accumulation, processes, self.nll_reduction == "micro_batch_mean"
            )
        except ValueError as error:
            keys = ("global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")
            raise SettingsError("ORPOConfig", [SettingsProblem(keys, str(error))]) from error
        self.per_device_train_batch_size = split.micro_batch
        self.gradient_accumulation_steps = split.accumulation  # pyright: ignore[reportIncompatibleVariableOverride]
        return split.note

    @classmethod
    def of(cls, args: TrainingArguments) -> "ORPOConfig":
        """The settings of another trainer's arguments: `transformers.TrainingArguments`, TRL's SFTConfig or ORPOConfig.

        Every field keeps its value, also a default that is not ours, such as the learning rate. Left out are defaults
        that mean nothing here, such as `logging_nan_inf_filter`.

        Raises:
            TypeError: if they are of another kind, such as a DPOConfig, which has fields that ORPOConfig does not have.
            SettingsError: as at construction.
        """
        if isinstance(args, cls):
            return args
        kind = type(args).__name__
        if not isinstance(args, TrainingArguments):
            raise TypeError(f"`args` must be an ORPOConfig, got {kind}.")
        given = {f.name: (getattr(args, f.name), f.default) for f in fields(args) if f.init}
        unknown = sorted(given.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise TypeError(f"`args` must be an ORPOConfig, got {kind}, which has fields of its own: {unknown[:5]}.")
        # Not `to_dict`, which hides tokens, `eos_token` and `pad_token` among them.
        return cls(
            **{
                name: value
                for name, (value, default) in given.items()
                if not (name in MEANINGLESS and value == default)
            }
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without tokens, and without what environment variables hold: the Trainer pickles its arguments into the
        folder that `push_to_hub` uploads."""
        return {**hide_all(self.__dict__), "hub_token": None, "push_to_hub_token": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "ORPOConfig":
        """The same settings for this very process: all of them."""
        made = object.__new__(type(self))
        made.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return made

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, which trackers are sent: environment variables are shown by their names."""
        return hide_all(super().to_dict())

    def _range_problems(self) -> list[SettingsProblem]:
        found: list[SettingsProblem] = []

        def wrong(name: str, expected: str) -> None:
            found.append(SettingsProblem((name,), f"`{name}` must be {expected}, got {getattr(self, name)!r}"))

        if not isinstance(self.beta, (int, float)) or not 0 <= self.beta < float("inf"):
            wrong("beta", "a finite number >= 0")
        for name, allowed in (
            ("nll_scope", NLL_SCOPES),
            ("nll_reduction", NLL_REDUCTIONS),
            ("pair_layout", PAIR_LAYOUTS),
            ("train_sampling_strategy", SAMPLING_STRATEGIES),
            ("prompt_turns", PROMPT_TURNS),
            ("on_malformed", MALFORMED_ACTIONS),
            ("on_unrendered", UNRENDERED_ACTIONS),
            ("wandb_mode", (None, *WANDB_MODES)),
            ("resume", (None, *RESUME_MODES)),
        ):
            if getattr(self, name) not in allowed:
                wrong(name, f"one of {', '.join(map(str, allowed))}")
        for name, least in (
            ("max_length", 2),
            ("max_prompt_length", 1),
            ("max_completion_length", 1),
            ("max_tokens_per_micro_batch", 1),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                wrong(name, f"{least} or more tokens, or None for no limit")
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "global_batch_size",
        ):
            if isinstance(getattr(self, name), (int, float)) and getattr(self, name) < 1:
                wrong(name, "at least 1")
        if not isinstance(self.max_nonfinite_steps, int) or self.max_nonfinite_steps < 1:
            wrong("max_nonfinite_steps", "1 or more optimiser steps")
        for name in ("learning_rate", "warmup_steps", "weight_decay"):
            if isinstance(getattr(self, name), (int, float)) and not getattr(self, name) >= 0:
                wrong(name, "at least 0")
        for name in ("seed", "data_seed"):
            if isinstance(getattr(self, name), int) and not 0 <= getattr(self, name) < 2**32:
                wrong(name, "from 0 to 2^32 - 1")
        if self.stop_after is not None:
            try:
                read_duration(self.stop_after)
            except ValueError as error:
                found.append(SettingsProblem(("stop_after",), f"`stop_after`: {error}"))
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            wrong("num_train_epochs", "above 0")
        return found

    def _contradictions(self) -> list[SettingsProblem]:
        found: list[SettingsProblem] = []
        if self.nll_reduction == "max_length" and self.max_length is None:
            text = "`nll_reduction: max_length` divides by max_length - 1, but `max_length` is None"
            found.append(SettingsProblem(("nll_reduction", "max_length"), text))
        if self.nll_reduction == "micro_batch_mean" and self.max_tokens_per_micro_batch is not None:
            text = "`max_tokens_per_micro_batch` would change the loss of `nll_reduction: micro_batch_mean`"
            found.append(SettingsProblem(("max_tokens_per_micro_batch", "nll_reduction"), text))
        if self.neftune_noise_alpha and self.pair_layout == "shared_prefix":
            text = (
                "`neftune_noise_alpha` adds noise by the width of a row, which `pair_layout: shared_prefix` changes; "
                "set `auto` or `padded`"
            )
            found.append(SettingsProblem(("pair_layout", "neftune_noise_alpha"), text))
        if self.global_batch_size is not None and self.auto_find_batch_size:
            text = "`auto_find_batch_size: true` would change the pairs of a step, which `global_batch_size` sets"
            found.append(SettingsProblem(("auto_find_batch_size", "global_batch_size"), text))
        if self.activation_offloading and not _has_accelerator():
            text = "`activation_offloading: true` moves activations from an accelerator, and there is none"
            found.append(SettingsProblem(("activation_offloading",), text))
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(self, name):
                text = (
                    f"`{name}: true` would cast the weights that are trained on, or saved, after an evaluation; `bf16: "
                    "true` computes training and evaluation in 16 bits"
                )
                found.append(SettingsProblem((name,), text))
        if self.eos_token is not None and not (self.chat_template_path or ".jinja").endswith((".jinja", ".j2")):
            text = (
                f"`eos_token`: `chat_template_path` names the tokenizer {self.chat_template_path}, whose conversations "
                "end with its own token; name a .jinja file, or leave `eos_token` out"
            )
            found.append(SettingsProblem(("eos_token", "chat_template_path"), text))
        if self.is_encoder_decoder:
            text = "`is_encoder_decoder: true`: encoder-decoder models are not supported"
            found.append(SettingsProblem(("is_encoder_decoder",), text))
        return found

    def _loading_problems(self) -> list[SettingsProblem]:
        """Arguments of `from_pretrained` that would let a model's folder run code."""
        kwargs = self.model_init_kwargs if isinstance(self.model_init_kwargs, dict) else {}
        found = []
        for name, safe, why in (
            ("trust_remote_code", False, "to run code that comes with a model, set `trust_remote_code: true`"),
            ("allow_all_kernels", False, "it runs code from anywhere on the Hub"),
            ("use_safetensors", True, "weights are read from safetensors alone, as a pickle can run code"),
            ("weights_only", True, "weights are read from safetensors alone, as a pickle can run code"),
        ):
            if kwargs.get(name, safe) not in (safe, None):
                text = f"`model_init_kwargs: {{{name}: {str(kwargs[name]).lower()}}}` is refused: {why}"
                found.append(SettingsProblem(("model_init_kwargs",), text))
        return found

    def _meaningless_problems(self) -> list[SettingsProblem]:
        defaults = {f.name: f.default for f in fields(self)}
        found = [
            SettingsProblem(
                (name,), f"`{name}` has no meaning for preference pairs (got {getattr(self, name)!r}): {instead}"
            )
            for name, instead in MEANINGLESS.items()
            if getattr(self, name) not in (defaults[name], None, [])
        ]
        for option in ("split_batches", "dispatch_batches"):
            if self.accelerator_config and self._accelerator_option(option):
                text = f"`accelerator_config: {option}` has no meaning here: each rank reads its own rows"
                found.append(SettingsProblem(("accelerator_config",), text))
        return found

    def _accelerator_option(self, name: str) -> Any:
        config = self.accelerator_config
        return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


@dataclass
class ModelArguments(ModelConfig):
    """Which model to train, as TRL's `ModelConfig`, plus where weights and tokenizer come from.

    Raises:
        SettingsError: where quantisation does not go with the rest.
    """

    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer, where it is not the model's own."}
    )
    from_scratch: bool = field(
        default=False,
        metadata={"help": "Build the model with random weights from the config at `model_name_or_path`."},
    )

    def __post_init__(self):
        problems: list[SettingsProblem] = []
        quantised = tuple(name for name in ("load_in_4bit", "load_in_8bit") if getattr(self, name))
        if len(quantised) > 1:
            text = "`load_in_4bit` and `load_in_8bit`: set one of them; received both"
            problems.append(SettingsProblem(quantised, text))
        if quantised and self.from_scratch:
            text = f"`{quantised[0]}` quantises loaded weights; `from_scratch` loads none"
            problems.append(SettingsProblem((quantised[0], "from_scratch"), text))
        elif quantised and not self.use_peft:
            text = f"`{quantised[0]}`: quantised weights cannot be trained; set `use_peft: true` for an adapter"
            problems.append(SettingsProblem((quantised[0], "use_peft"), text))
        if problems:
            raise SettingsError("ModelArguments", problems)
        super().__post_init__()


@with_config(ConfigDict(extra="forbid", strict=True))
class DatasetSource(TypedDict, total=False):
    """One source of pairs in `datasets` or `eval_datasets`, with the keys of TRL's `DatasetConfig` and `weight`.

    `columns` is a list of columns to read, or a mapping of our names to the source's, such as
    `{prompt: question, chosen: preferred, rejected: other}`.
    """

    path: Required[str]
    name: str | None
    data_dir: str | None
    data_files: str | list[str] | dict[str, str] | None
    split: str
    columns: list[str] | dict[str, str] | None
    fraction: Annotated[float, Field(gt=0)] | None
    weight: Annotated[float, Field(gt=0)] | None


@dataclass
class DataArguments:
    """Which pairs to train and evaluate on. Names and meanings are those of TRL's scripts.

    A dataset is named by a Hub id, a folder, or a local .json, .jsonl, .parquet or .csv file.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, folder or file (.json, .jsonl, .parquet, .csv) with the pairs."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, read where `eval_strategy` is not 'no'."}
    )
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read rows while training instead of before it; needs `max_steps`."}
    )
    datasets: list[DatasetSource] = field(
        default_factory=list,
        metadata={
            "help": "Several sources in place of `dataset_name`: a list of mappings with `path` and optionally "
            "`name`, `data_dir`, `data_files`, `split`, `columns` (a list, or a mapping of our names to the source's), "
            "`fraction` (share of the mixture, as in TRL; no row is repeated) or `weight` (how often its rows are "
            "used: 0.5 a random half of them, 2 each twice)."
        },
    )
    eval_datasets: dict[str, DatasetSource] = field(
        default_factory=dict,
        metadata={
            "help": "Evaluation sets, evaluated one by one, in place of `dataset_test_split`: a mapping of labels to "
            "entries as in `datasets`. The names of metrics have the label in them: `eval_LABEL_loss`."
        },
    )
    test_split_size: float | None = field(
        default=None,
        metadata={
            "help": "Share (below 1) or number of training rows to hold out for evaluation, if there is no test split."
        },
    )

    def problems(self, with_test: bool) -> list[SettingsProblem]:
        """Why these settings do not name the rows to train on or, `with_test`, the rows to evaluate on."""
        return [*self._source_problems(), *self._test_problems(with_test), *self._weight_problems()]

    def _source_problems(self) -> list[SettingsProblem]:
        found: list[SettingsProblem] = []
        if bool(self.dataset_name) == bool(self.datasets):
            given = "both" if self.dataset_name else "neither"
            text = f"Set one of `dataset_name` and `datasets`; received {given}"
            found.append(SettingsProblem(("dataset_name", "datasets"), text))
        if self.datasets and (self.dataset_config is not None or self.dataset_train_split != "train"):
            keys = ("dataset_config", "dataset_train_split", "datasets")
            text = (
                "`dataset_config` and `dataset_train_split` are not for `datasets`, whose entries have `name`, `split`"
            )
            found.append(SettingsProblem(keys, text))
        return found

    def _test_problems(self, with_test: bool) -> list[SettingsProblem]:
        found: list[SettingsProblem] = []

        def wrong(keys: tuple[str, ...], text: str) -> None:
            found.append(SettingsProblem(keys, text))

        size = self.test_split_size
        if size is not None and self.eval_datasets:
            keys = ("test_split_size", "eval_datasets")
            wrong(keys, "Set one of `test_split_size` and `eval_datasets`; received both")
        if size is not None and not size > 0:
            wrong(("test_split_size",), f"`test_split_size` must be above 0, got {size}")
        if size is not None and self.dataset_streaming:
            keys = ("test_split_size", "dataset_streaming")
            wrong(keys, "`test_split_size` cannot split a stream: set `dataset_streaming: false`")
        if self.datasets and with_test and size is None and not self.eval_datasets:
            keys = ("datasets", "eval_strategy")
            text = "`datasets` has no test split: set `test_split_size` or `eval_datasets`, or `eval_strategy: no`"
            wrong(keys, text)
        return found

    def _weight_problems(self) -> list[SettingsProblem]:
        found: list[SettingsProblem] = []
        shares = [entry.get("fraction") for entry in self.datasets]
        weights = [entry.get("weight") for entry in self.datasets]
        if any(shares) and (self.dataset_streaming or not all(shares) or any(weights)):
            text = "`fraction` must be set for all entries of `datasets` or for none, without `weight`, not for streams"
            found.append(SettingsProblem(("datasets", "dataset_streaming"), text))
        if any(weights) and self.dataset_streaming:
            text = "`weight` in `datasets` needs the number of rows: set `dataset_streaming: false`"
            found.append(SettingsProblem(("datasets", "dataset_streaming"), text))
        if self.test_split_size is not None and any(weight and weight > 1 for weight in weights):
            text = "`weight` above 1 repeats rows, and `test_split_size` would hold out rows that are also trained on"
            found.append(SettingsProblem(("datasets", "test_split_size"), text))
        found += [
            SettingsProblem(
                ("eval_datasets",), f"`eval_datasets.{label}`: `fraction` and `weight` are for rows to train on"
            )
            for label, entry in self.eval_datasets.items()
            if {"fraction", "weight"} & set(entry)
        ]
        return found
