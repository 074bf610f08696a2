"""Everything of other libraries that they do not promise to keep, in one place.

`NEEDS` lists each such name with what it is needed for. tests/test_upstream.py checks that each is there, and that the
hooks of the trainers are called; run that test when a version bound is raised. No other file of the package uses a
private name of another library.

Two kinds of text are elsewhere, because a command must not load torch for them: the environment variables
`ACCELERATE_USE_*` in launch.py, and the messages of quiet.py.

The functions and classes below give these names a stable form: `HookedSFTTrainer` turns the private methods of TRL's
and transformers' trainers into methods that `ORPOTrainer` overrides.
"""

import importlib
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.attention.varlen  # registers its operator
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Need:
    """A name of another library.

    Attributes:
        path: module, class and attribute, with dots between them.
        why: what the package needs it for; completes "needed for …".
        parameters: of a function, those that the package passes by name or by position.
        is_of_instances: the attribute exists on instances alone, not on the class.
    """

    path: str
    why: str
    parameters: tuple[str, ...] = ()
    is_of_instances: bool = False

    @property
    def package(self) -> str:
        return self.path.split(".")[0]

    def find(self, instance: Any = None) -> Any:
        """What the name stands for.

        Args:
            instance: of the class, where the attribute is one of instances.

        Raises:
            UpstreamError: where the library does not have it any more, or it takes other parameters.
        """
        owner_path, _, name = self.path.rpartition(".")
        try:
            found = getattr(_resolve(owner_path) if instance is None else instance, name)
        except (ImportError, AttributeError) as error:
            raise UpstreamError(f"{self._sentence()} It does not exist.") from error
        missing = [name for name in self.parameters if name not in _parameters(found)]
        if missing:
            raise UpstreamError(f"{self._sentence()} It does not take {', '.join(f'`{name}`' for name in missing)}.")
        return found

    def _sentence(self) -> str:
        return (
            f"`{self.path}` is needed for {self.why}; supported: {supported_versions(self.package)}, "
            f"installed: {version(self.package)}."
        )


class UpstreamError(ImportError):
    """A library has changed a name that it does not promise to keep, and that the package needs."""


def supported_versions(package: str) -> str:
    """The requirement of this package on another one: `trl<1.17,>=1.16`."""
    stated = [line.split(";")[0].strip() for line in requires("orpo-trl") or []]
    return next((line for line in stated if re.fullmatch(rf"{package}\b(?!-).*", line)), package)


def _resolve(path: str) -> Any:
    """The module, or the class in one, that a dotted path names."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        owner, _, name = path.rpartition(".")
        if not owner:
            raise
        return getattr(_resolve(owner), name)


def _parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


_TRAINER = "transformers.trainer.Trainer"
_SFT = "trl.trainer.sft_trainer.SFTTrainer"
_SAMPLER = "transformers.trainer_pt_utils.BatchRebalanceSampler"
_UTILS = "trl.trainer.utils"
# Classes whose methods we override. If one of these gets another name, ours is not called, and a run silently trains
# something else.
HOOKS = (_TRAINER, _SFT, _SAMPLER)

NEEDS = (
    # ---- The LM head
    Need(f"{_UTILS}.add_fused_lm_head", "log-probabilities without logits", ("model", "cast_lm_head_to_fp32")),
    Need(f"{_UTILS}._CHUNKED_LOGPROB_CHUNK_SIZE", "tiles of the LM head that fit a CPU's cache"),
    Need("trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE", "tiles of the LM head that fit a CPU's cache"),
    Need(f"{_UTILS}._use_triton", "an LM head for which the host does not wait", ("device",)),
    Need("peft.utils.other.TrainableTokensWrapper", "a head of which an adapter trains the rows of some tokens"),
    Need("peft.utils.other.TrainableTokensWrapper.token_adapter", "a head of which an adapter trains the rows of some "
         "tokens", is_of_instances=True),
    # ---- Models
    Need(f"{_UTILS}.disable_dropout_in_model", "`disable_dropout`", ("model",)),
    Need(f"{_UTILS}.get_config_model_id", "the name of a model that was given as an object", ("config",)),
    Need("trl.models.unwrap_model_for_generation", "answers to held-out prompts while training under ZeRO-3",
         ("model", "accelerator", "gradient_checkpointing_kwargs")),
    Need(f"{_UTILS}.pad", "batches of prompts to answer", ("tensors", "padding_value", "padding_side")),
    Need("transformers.utils.find_adapter_config_file", "telling an adapter's folder from a model's", ("revision",)),
    Need("transformers.utils.is_peft_available", "a clear error where peft is missing"),
    Need("transformers.utils.TRANSFORMERS_DYNAMIC_MODULE_NAME", "naming the models whose own code was run"),
    # ---- Attention
    Need("transformers.PreTrainedConfig._attn_implementation", "the attention that reads packed rows"),
    Need("transformers.utils.generic.is_flash_attention_requested", "the kernel of a packed row", ("config",)),
    Need("trl.models.selective_activation_checkpointing._aten_attention_ops", "selective checkpointing of packed rows"),
    Need("torch.ops.torch_attn._varlen_attn.default", "selective checkpointing of packed rows"),
    Need("transformers.models.mistral.modeling_mistral.eager_attention_forward", "packed rows with `eager` attention; "
         "each model's module has one", ("module", "query", "key", "value", "attention_mask")),
    # ---- Data
    Need("datasets.fingerprint.Hasher.hash", "a cache of tokens that knows the package's version", ("value",)),
    Need("datasets.Dataset._fingerprint", "a cache of tokens that knows the rows", is_of_instances=True),
    # ---- Order of the rows
    Need("transformers.trainer_pt_utils.get_length_grouped_indices", "`train_sampling_strategy: group_by_length`",
         ("lengths", "batch_size", "generator")),
    Need(_SAMPLER, "a sampler that gives each rank its own rows: the Trainer does not shard one of this class again",
         ("lengths", "effective_batch_size", "dp_size", "grad_accum", "seed", "rank", "drop_last")),
    Need(f"{_SAMPLER}._assign", "balanced micro-batches of padded rows", ("indices", "lengths")),
    Need(f"{_SAMPLER}._yield_global_batch", "balanced micro-batches", ("batch_indices",)),
    *(
        Need(f"{_SAMPLER}.{name}", "the rows of an optimiser step", is_of_instances=True)
        for name in ("lengths", "effective_batch_size", "dp_size", "grad_accum", "rank", "epoch", "seed",
                     "num_full_batches", "remainder", "has_tail", "num_global_batches")
    ),
    # ---- The trainer
    Need(f"{_SFT}._prepare_dataset", "pairs in place of texts",
         ("dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name")),
    Need(f"{_SFT}._set_signature_columns_if_needed", "the columns of pairs"),
    Need(f"{_SFT}._tokenizer", "the tokenizer inside a processor", is_of_instances=True),
    Need(f"{_SFT}._tag_names", "the tags of a model on the Hub"),
    Need(f"{_SFT}._save_checkpoint", "checkpoints that are renamed when they are whole", ("model", "trial")),
    Need(f"{_TRAINER}._push_from_checkpoint", "sending a checkpoint once it has its name", ("checkpoint_folder",)),
    Need(f"{_TRAINER}._finish_current_push", "telling pushes that have failed"),
    Need("transformers.utils.PushInProgress", "telling pushes that have failed", ("jobs",)),
    Need(f"{_TRAINER}._load_optimizer_and_scheduler", "the learning rate of a resumed run", ("checkpoint",)),
    Need(f"{_TRAINER}._determine_best_metric", "a checkpoint of a run that stops, with `save_strategy: best`",
         ("metrics", "trial")),
    Need(f"{_TRAINER}._load_scaler", "a run that goes on in bf16 and began in fp16", ("checkpoint",)),
    Need(f"{_TRAINER}._save", "the plain model of FSDP's shards", ("output_dir", "state_dict")),
    Need("accelerate.state.AcceleratorState.deepspeed_plugin", "the stage of ZeRO, and gradients that are summed in "
         "fp32"),
    Need("trl.trainer.base_trainer._BaseTrainer", "`model_init`: what SFTTrainer does to a model, without a Trainer"),
    Need(f"{_SFT}.maybe_activation_offload_context", "`activation_offloading` of a model of `model_init`",
         is_of_instances=True),
    Need(f"{_SFT}.aux_loss_enabled", "the load-balancing loss of a mixture of experts", is_of_instances=True),
    Need(f"{_SFT}.router_aux_loss_coef", "the load-balancing loss of a mixture of experts", is_of_instances=True),
    Need(f"{_TRAINER}._signature_columns", "the columns of pairs", is_of_instances=True),
    Need(f"{_TRAINER}._train_batch_size", "the rows of a micro-batch, after `auto_find_batch_size` too",
         is_of_instances=True),
    Need(f"{_TRAINER}._get_train_sampler", "a sampler that gives each rank its own rows", ("train_dataset",)),
    Need(f"{_TRAINER}._get_eval_sampler", "a sampler that gives each rank its own rows", ("eval_dataset",)),
    Need(f"{_TRAINER}._finalize_training", "a checkpoint to go on from, which `save_total_limit: 1` would delete",
         ("trial", "num_train_samples", "start_time")),
    Need(f"{_TRAINER}._hp_search_setup", "the settings of a trial, and a new model's batches and metrics", ("trial",)),
    Need(f"{_TRAINER}._get_output_dir", "the folder of a trial", ("trial",)),
    Need(f"{_TRAINER}._run_epoch", "the order of the rows of a resumed epoch", ("model", "epoch")),
    Need(f"{_TRAINER}._get_num_items_in_batch", "the counts that a step's loss is divided by",
         ("batch_samples", "device")),
    Need(f"{_TRAINER}._track_num_input_tokens", "`include_num_input_tokens_seen` under a token budget", ("inputs",)),
    Need(f"{_TRAINER}.model_accepts_loss_kwargs", "a loss that the Trainer does not divide again",
         is_of_instances=True),
    Need(f"{_TRAINER}._get_grad_norm", "steps that are not taken where the gradient is not finite",
         ("model", "grad_norm")),
    Need(f"{_TRAINER}._maybe_log_save_evaluate", "no checkpoint of a step that was not finite"),
    Need("accelerate.optimizer.AcceleratedOptimizer._is_overflow", "a schedule that waits for a step that is not taken",
         is_of_instances=True),
    Need("accelerate.optimizer.AcceleratedOptimizer.scaler", "steps of fp16 that are not taken", is_of_instances=True),
    Need("accelerate.utils.deepspeed.DeepSpeedOptimizerWrapper.step_was_skipped", "steps that DeepSpeed does not take"),
    Need("deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3.loss_scale", "steps of fp16 that are not taken"),
    Need("transformers.trainer_utils.get_last_checkpoint", "resuming", ("folder",)),
    Need("transformers.trainer_utils.has_length", "progress bars over streams", ("dataset",)),
    Need("accelerate.state.GradientState.sync_gradients", "a token budget's passes before the last",
         is_of_instances=True),
    Need("accelerate.state.GradientState._set_sync_gradients", "a token budget's passes before the last",
         ("sync_gradients",)),
    # ---- Logs
    Need(f"{_UTILS}.get_comet_experiment_url", "the address of a comet experiment in the model card"),
    Need("transformers.integrations.WandbCallback._log_model", "wandb's folder of files to send", is_of_instances=True),
    Need("transformers.integrations.TensorBoardCallback._SummaryWriter", "one curve of a run that goes on",
         is_of_instances=True),
    Need(f"{_UTILS}.get_trackio_space_url", "the address of a trackio space in the model card"),
    # ---- The memory estimate
    Need("torch._subclasses.fake_tensor.FakeTensorMode", "the memory estimate of `orpo-trl check`"),
    Need("torch.utils._python_dispatch.TorchDispatchMode", "the memory estimate of `orpo-trl check`"),
    Need("torch.utils._pytree.tree_leaves", "the memory estimate of `orpo-trl check`", ("tree",)),
)  # fmt: skip


def check_needs(prefixes: tuple[str, ...] = ("",)) -> None:
    """Look for the names of `NEEDS` that need no instance.

    Args:
        prefixes: of the paths to look for; by default all.

    Raises:
        UpstreamError: listing all that are missing.
    """
    problems = []
    for need in NEEDS:
        if need.is_of_instances or not need.path.startswith(prefixes):
            continue
        try:
            need.find()
        except UpstreamError as error:
            problems.append(str(error))
    if problems:
        raise UpstreamError("\n".join(problems))


try:
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
    from datasets import Dataset
    from datasets.fingerprint import Hasher
    from transformers import PreTrainedConfig, PreTrainedModel, Trainer
    from transformers.trainer_pt_utils import BatchRebalanceSampler
    from transformers.trainer_pt_utils import get_length_grouped_indices as get_length_grouped_indices
    from transformers.trainer_utils import get_last_checkpoint as get_last_checkpoint
    from transformers.trainer_utils import has_length as has_length
    from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME
    from transformers.utils import find_adapter_config_file as find_adapter_config_file
    from transformers.utils import is_peft_available as is_peft_available
    from transformers.utils.generic import is_flash_attention_requested as is_flash_attention_requested
    from trl import SFTTrainer
    from trl.kernels import chunked_logprob
    from trl.models import selective_activation_checkpointing as selective
    from trl.models import unwrap_model_for_generation as unwrap_model_for_generation
    from trl.trainer import utils as trl_utils
    from trl.trainer.base_trainer import _BaseTrainer
    from trl.trainer.utils import add_fused_lm_head as add_fused_lm_head
    from trl.trainer.utils import disable_dropout_in_model as disable_dropout_in_model
    from trl.trainer.utils import get_comet_experiment_url as get_comet_experiment_url
    from trl.trainer.utils import get_config_model_id as get_config_model_id
    from trl.trainer.utils import get_trackio_space_url as get_trackio_space_url
    from trl.trainer.utils import pad as pad

    _use_triton = trl_utils._use_triton
    # Tiles of TRL's fused LM head, in tokens and words of the vocabulary, by kind of device. TRL's are made for GPUs:
    # 4,096 tokens by 32,768 words in fp32, several at a time. On a CPU these are often larger than all logits of a
    # batch, and take three times as long as tiles that stay in its cache.
    HEAD_TILES = {
        "cpu": (512, 8192),
        "cuda": (chunked_logprob.TOKEN_CHUNK_SIZE, trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE),
    }
except (ImportError, AttributeError):
    check_needs()
    raise


# How peft's warning begins where an adapter's file lacks weights that its config promises; there is no error.
MISSING_ADAPTER_KEYS = "Found missing adapter keys"
# Settings in the groups of an optimizer that a run that goes on may change.
OPTIMIZER_SETTINGS = ("initial_lr", "betas", "eps", "weight_decay", "warmup_steps")


def is_write_error(error: BaseException) -> bool:
    """Whether an error is that of a file that could not be written. torch gives a RuntimeError where a disk is full."""
    if isinstance(error, RuntimeError):
        return any(word in str(error) for word in ("inline_container", "PytorchStreamWriter", "filesystem error"))
    return isinstance(error, (OSError, SafetensorError))


# ---- The LM head -----------------------------------------------------------------------------------------------------


def use_cpu_head_tiles() -> None:
    """Let the fused LM head of this process compute the tiles that are fast on a CPU. TRL has no setting for them."""
    chunked_logprob.TOKEN_CHUNK_SIZE, trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = HEAD_TILES["cpu"]


def settle_head_of_tokens(model: PreTrainedModel) -> None:
    """Let the fused LM head read a head of which an adapter trains the rows of some tokens.

    `trainable_token_indices` wraps the head where it is named there, or tied to the embeddings. TRL reads the weight
    and the bias of the head, and peft's wrapper has the weight alone.

    Args:
        model: without the wrapper of its adapter.

    Raises:
        ValueError: where peft itself would leave out the head's bias, or has wrapped a head that it trains as a whole.
    """
    if not is_peft_available():
        return
    from peft.utils.other import TrainableTokensWrapper

    head: Any = model.get_output_embeddings()
    if not isinstance(head, TrainableTokensWrapper):
        return
    base = head.token_adapter.base_layer
    if not isinstance(base, nn.Linear):
        raise ValueError(
            "`trainable_token_indices` with `modules_to_save` of the LM head: the head is tied to the embeddings, and "
            "peft cannot train it twice. Remove the head from `modules_to_save`. (A tokenizer as `chat_template_path` "
            "that adds tokens sets both: add them yourself, with a .jinja file as `chat_template_path`.)"
        )
    if base.bias is not None:
        raise ValueError("`trainable_token_indices`: the LM head has a bias, which peft would leave out.")
    setattr(head, "bias", None)  # noqa: B010 (to a type checker, a module holds tensors alone)


def run_fused_head(model: nn.Module, inputs: dict[str, Any], is_all_scored: bool = False) -> tuple[torch.Tensor, Any]:
    """Forward pass of a model that `add_fused_lm_head` has prepared.

    Args:
        model: as it is, or wrapped for a distributed run.
        inputs: what its forward takes; `shift_labels` `[rows, seq]` names the token that each position predicts.
        is_all_scored: nearly every position has a label. The head then computes all of them. On a GPU TRL's head else
            picks those with a label, and the host waits for the device until it knows how many there are.

    Returns:
        `[rows, seq]`, log-probabilities of `shift_labels`, 0 where a label is -100; and the output of the model.
    """
    try:
        if is_all_scored:
            trl_utils._use_triton = _never
        outputs = model(**inputs, fused_lm_head=True, use_cache=False)
    finally:
        trl_utils._use_triton = _use_triton
    return outputs.log_probs, outputs


def _never(device: torch.device) -> bool:
    """In place of TRL's `_use_triton` where its head decides whether to pick positions; the kernels have their own."""
    return False


# ---- Attention -------------------------------------------------------------------------------------------------------


def attention_name(config: PreTrainedConfig) -> str:
    """The name of a model's attention in transformers' AttentionInterface."""
    return config._attn_implementation or "eager"


def set_attention_name(config: PreTrainedConfig, name: str) -> None:
    config._attn_implementation = name


def eager_attention(model: PreTrainedModel) -> Callable[..., Any]:
    """A model's own `eager` attention: each model's module brings one, which AttentionInterface does not have."""
    return sys.modules[type(model).__module__].eager_attention_forward


def _attention_ops(of_trl: Callable[[], set] = selective._aten_attention_ops) -> set:
    """Attention whose output selective checkpointing keeps: TRL's, and torch's variable-length one."""
    return of_trl() | {torch.ops.torch_attn._varlen_attn.default}


selective._aten_attention_ops = _attention_ops

# ---- Weights ---------------------------------------------------------------------------------------------------------


def full_shape(weight: nn.Parameter) -> torch.Size:
    """Shape of a weight as a whole: under ZeRO-3 a rank holds a part of it, in 4 bits it is packed."""
    whole = getattr(weight, "ds_shape", None)  # of DeepSpeed
    if whole is not None:
        return torch.Size(whole)
    quantised = getattr(weight, "quant_state", None)  # of bitsandbytes
    return torch.Size(quantised.shape) if quantised else weight.shape


def is_remote_code(made: Any) -> bool:
    """Whether a model, config or tokenizer is of a class that came as code with a model's folder or from the Hub."""
    return type(made).__module__.split(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME


def local_part(weight: nn.Parameter) -> torch.Tensor:
    """The part of a weight that this rank holds, under ZeRO-3 and FSDP2; else all of it."""
    part: Any = getattr(weight, "ds_tensor", None)  # of DeepSpeed
    if part is None:
        part = weight.to_local() if isinstance(weight, DTensor) else weight
    return part.detach()


# ---- Steps that are not taken ----------------------------------------------------------------------------------------


def skip_next_step(optimizer: AcceleratedOptimizer) -> None:
    """Let the next `step` of accelerate's optimizer change nothing, and say so, so that the scheduler waits too.

    Under DeepSpeed `step` does nothing anyway: its engine has decided, by the same norm.
    """
    take = optimizer.step

    def skip(closure: Any = None) -> None:
        optimizer.step = take
        if optimizer.scaler is not None:
            optimizer.scaler.update()  # it has looked at the gradients when it unscaled them
        optimizer._is_overflow = True

    optimizer.step = skip


def step_was_taken(trainer: Trainer) -> bool:
    """Whether DeepSpeed, which steps before the norm is known, has taken the step."""
    optimizer = trainer.optimizer
    return isinstance(optimizer, DeepSpeedOptimizerWrapper) and not optimizer.step_was_skipped


def loss_scale(trainer: Trainer) -> float:
    """What the loss is multiplied by in the backward pass of fp16; 1 in other precisions."""
    optimizer: Any = trainer.optimizer
    if isinstance(optimizer, DeepSpeedOptimizerWrapper):
        return float(getattr(optimizer.optimizer, "loss_scale", 1.0))
    return 1.0 if optimizer.scaler is None else optimizer.scaler.get_scale()


# ---- Data ------------------------------------------------------------------------------------------------------------


def fingerprint(dataset: Dataset, *parts: Any) -> str:
    """A name for what a function of a dataset and of these parts gives, under which `datasets` caches it."""
    return Hasher.hash([dataset._fingerprint, *parts])


# ---- Logs ------------------------------------------------------------------------------------------------------------


def sends_checkpoints(callback: Any) -> bool:
    """Whether a WandbCallback sends checkpoints too (`WANDB_LOG_MODEL`)."""
    return callback._log_model.is_enabled


def event_writer(callback: Any, folder: str, step: int) -> Any:
    """A writer of TensorBoard events; readers leave out what an earlier one has written for later steps."""
    return callback._SummaryWriter(folder, purge_step=step + 1)


# ---- Memory without memory -------------------------------------------------------------------------------------------


def fake_tensors() -> AbstractContextManager:
    """Tensors that are made inside have a shape, a dtype and a device, and no storage."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


@contextmanager
def watching_tensors(watch: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Calls `watch` with each tensor that an operation inside returns."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    watch(leaf)
            return result

    with Watching():
        yield


# ---- Order of the rows -----------------------------------------------------------------------------------------------


class RankAwareSampler(BatchRebalanceSampler):
    """A sampler that already gives each rank its own rows: the Trainer does not shard it again."""

    def balanced(self, rows: list[int]) -> Iterator[list[int]]:
        """This rank's micro-batches of the rows of one optimiser step, as `assign` distributes them."""
        yield from self._yield_global_batch(rows)

    def assign(self, rows: list[int], lengths: list[int]) -> list[list[list[int]]]:
        """Rows of each rank's micro-batches. By default as transformers distributes padded rows."""
        return super()._assign(rows, lengths)

    def _assign(self, indices: list[int], lengths: list[int]) -> list[list[list[int]]]:
        return self.assign(indices, lengths)


# ---- The trainer -----------------------------------------------------------------------------------------------------


class _NoTrainer(_BaseTrainer):
    """Stands where SFTTrainer would make a Trainer of the model."""

    def __init__(self, model: Any, **_: Any):
        self.model = model


_Stand: Any = _NoTrainer


class _ModelSetUp(SFTTrainer, _Stand):
    """What SFTTrainer does to a model that it is given, for a trainer that has trained another one before.

    Args:
        trainer: the one that trains `model`.
        model: as `model_init` has made it.
        processing_class: of `trainer`, as it was given: SFTTrainer may add tokens, to it and to the model.
        peft_config: likewise.
    """

    def __init__(self, trainer: SFTTrainer, model: PreTrainedModel, processing_class: Any, peft_config: Any):
        self.args, self.accelerator, self._tag_names = trainer.args, trainer.accelerator, trainer._tag_names
        # SFTTrainer looks at the first row, for images.
        rows = Dataset.from_list([{"chosen": ""}])
        super().__init__(
            model, trainer.args, train_dataset=rows, processing_class=processing_class, peft_config=peft_config
        )

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class HookedSFTTrainer(SFTTrainer):
    """SFTTrainer, whose private methods call methods that a subclass overrides.

    Attributes:
        dataset_columns: of a prepared dataset, those that the collator reads.
        hub_tags: of the model on the Hub.
        run_folder: where a run leaves its files: `output_dir`, or in a search the trial's folder in it.
        interruption: why training has stopped with a checkpoint before its end; else None.
    """

    dataset_columns: tuple[str, ...] = ()
    hub_tags: tuple[str, ...] = ()
    interruption: str | None = None

    # The Trainer types these as what they may be before it is set up.
    args: Any
    model: Any = None
    data_collator: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(self, *args: Any, **kwargs: Any):
        self._tag_names = list(self.hub_tags)
        super().__init__(*args, **kwargs)
        # `compute_loss` divides by the totals of the whole optimiser step, so the Trainer must not divide again. It
        # goes by this attribute, which it has found from the model. (`loss_is_scaled_for_ga` says the same, but early
        # releases of transformers 5 do not know it.)
        self.model_accepts_loss_kwargs = True
        self._settle_deepspeed()
        self.run_folder = Path(self.args.output_dir)
        # Where the checkpoint that is being saved is made, and the optimizer's settings as this start asks for them.
        self._made_in: Path | None = None
        self._as_asked: list[dict[str, Any]] = []

    def set_up_model(self, model: PreTrainedModel, processing_class: Any, peft_config: Any) -> Any:
        """Make a later model of `model_init` ready, as SFTTrainer makes the first one at construction.

        Args:
            model: as `model_init` has made it; is changed.
            processing_class, peft_config: copies of what the trainer was given; are changed.

        Returns:
            The model, or the PEFT model around it.
        """
        made = _ModelSetUp(self, model, processing_class, peft_config)
        for name in ("maybe_activation_offload_context", "aux_loss_enabled", "router_aux_loss_coef"):
            setattr(self, name, getattr(made, name))
        ready: Any = made.model
        ready.config.use_cache = self.args.use_cache  # the Trainer's part
        return ready

    @property
    def text_tokenizer(self) -> Any:
        """The tokenizer: the `processing_class`, or what it holds."""
        return self._tokenizer

    @property
    def sharding(self) -> str:
        """How the ranks share the model and the optimizer: 'none', 'zero1', 'zero2', 'zero3' or 'fsdp'."""
        if self.is_deepspeed_enabled:
            plugin: Any = self.accelerator.state.deepspeed_plugin
            return f"zero{plugin.zero_stage}"
        return "fsdp" if self.is_fsdp_enabled else "none"

    def _settle_deepspeed(self) -> None:
        """What DeepSpeed's config leaves open, and the Trainer too.

        - Gradients are clipped at `max_grad_norm`. The Trainer fills in what is "auto" only, and DeepSpeed's default
          is 1.
        - ZeRO sums the gradients of a step's passes in fp32. DeepSpeed's default is the dtype of the weights: in bf16 a
          sum of 32 gradients loses what each adds below its 8 bits. Under DDP and FSDP2 they are fp32 anyway.
        """
        if not self.is_deepspeed_enabled:
            return
        config: Any = self.accelerator.state.deepspeed_plugin.deepspeed_config  # pyright: ignore[reportOptionalMemberAccess]
        config.setdefault("gradient_clipping", self.args.max_grad_norm)
        if self.args.bf16 and self.sharding in ("zero2", "zero3"):
            config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")

    @property
    def is_saving_checkpoint(self) -> bool:
        return self._made_in is not None

    def save_sharded_model(self, folder: str) -> None:
        """Save the plain model of FSDP's shards, which the Trainer does for full state dicts only. On all ranks."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.is_fsdp_enabled and "FULL_STATE_DICT" not in str(getattr(plugin, "state_dict_type", "")):
            state: Any = self.accelerator.get_state_dict(self.model)
            self._save(folder, state_dict=state)

    @property
    def micro_batch_rows(self) -> int:
        """Rows of a full micro-batch; `auto_find_batch_size` may have lowered it."""
        return self._train_batch_size

    # Methods to override.

    def prepare_dataset(self, dataset: Any, name: str, args: Any) -> Any:
        """A dataset that the user gave, as the trainer uses it. `self.args` does not exist yet."""
        raise NotImplementedError

    def train_sampler(self, dataset: Any) -> Any:
        raise NotImplementedError

    def eval_sampler(self, dataset: Any) -> Any:
        raise NotImplementedError

    def begin_run(self, is_trial: bool) -> None:
        """Called by `train` when it has its model and, in a search, the settings of the trial."""

    def begin_epoch(self, epoch: int) -> None:
        """Called before each epoch, the rest of a resumed one included."""

    def step_totals(self, batches: list[dict[str, Any]], device: torch.device) -> Any:
        """What `compute_loss` gets as `num_items_in_batch`, from this rank's micro-batches of an optimiser step."""
        raise NotImplementedError

    def passes(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """The forward passes that a micro-batch takes."""
        return [batch]

    def may_step(self, norm: float) -> bool:
        """Whether the optimiser step may be taken, by the norm of its gradient before clipping: that of all ranks."""
        return True

    def before_events(self) -> None:
        """Called after each optimiser step, before its log, evaluation and checkpoint."""

    def after_events(self) -> None:
        """Called after them, and where there were none."""

    def before_saving(self) -> None:
        """Called on all ranks before a checkpoint is written, inside `saving_checkpoint`; may raise."""

    def saving_checkpoint(self) -> AbstractContextManager[Path]:
        """Surrounds the saving of a checkpoint; gives the folder in which the checkpoint's folder is made."""
        return nullcontext(self.run_folder)

    @contextmanager
    def accumulating(self, model: nn.Module) -> Iterator[None]:
        """Surrounds a pass before the last of a micro-batch: DDP and DeepSpeed neither exchange gradients nor step.

        FSDP reduces each pass into the sharded gradient, which takes less memory than to hold all of it until the last.
        """
        state = self.accelerator.gradient_state
        was_last = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
                yield
        finally:
            state._set_sync_gradients(was_last)

    # What TRL and transformers call.

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        return self.prepare_dataset(dataset, dataset_name, args)

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = list(self.dataset_columns)

    def _get_train_sampler(self, train_dataset=None):
        return self.train_sampler(self.train_dataset if train_dataset is None else train_dataset)

    def _get_eval_sampler(self, eval_dataset):
        return self.eval_sampler(eval_dataset)

    def _hp_search_setup(self, trial):
        super()._hp_search_setup(trial)
        self.run_folder = Path(self._get_output_dir(trial))
        self.begin_run(trial is not None)

    def _run_epoch(self, model, epoch, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            # A run that resumes at its last step. The Trainer looks at `max_steps` only after a step.
            self.control.should_training_stop = True
            return None
        self.begin_epoch(epoch)
        return super()._run_epoch(model, epoch, *args, **kwargs)

    def _finalize_training(self, *args, **kwargs):
        self._name_best_checkpoint()
        best = self.state.best_model_checkpoint
        if self.interruption is not None:
            # The best model is for the end of a run: loading it takes time, and the Trainer deletes checkpoints then.
            self.state.best_model_checkpoint = None
        output = super()._finalize_training(*args, **kwargs)
        self.state.best_model_checkpoint = best
        return output

    def _get_num_items_in_batch(self, batch_samples, device):
        return self.step_totals(batch_samples, device)

    def _track_num_input_tokens(self, inputs):
        for part in self.passes(inputs):
            super()._track_num_input_tokens(part)

    def _get_grad_norm(self, model, grad_norm=None):
        norm: Any = super()._get_grad_norm(model, grad_norm)
        if norm is None:
            raise ValueError(
                "DeepSpeed gives no gradient norm, and the trainer would not see a gradient that is not finite: use "
                "ZeRO stage 1, 2 or 3, without `compute_grad_norm: false`."
            )
        # Under FSDP2 it is a sum that the ranks have not added up yet.
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        norm = float(norm)  # waits for the device, once a step: it is the number that the Trainer logs
        optimizer: Any = self.optimizer
        optimizer._is_overflow = False
        if not self.may_step(norm):
            skip_next_step(optimizer)
        return norm

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self.before_events()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.after_events()

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._made_in is None else str(self._made_in)

    def _save_checkpoint(self, model, trial):
        name = f"checkpoint-{self.state.global_step}"
        with self.saving_checkpoint() as made_in:
            self._made_in = made_in
            try:
                super()._save_checkpoint(model, trial)
                self._name_best_checkpoint()
                if self.args.should_save:
                    self.state.save_to_json(str(made_in / name / "trainer_state.json"))
            finally:
                self._made_in = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(self.run_folder / name))

    def _name_best_checkpoint(self) -> None:
        """Give the state the path that the best checkpoint has, or gets, in the run's folder.

        The Trainer looks for it where checkpoints are made, and a folder that was moved has another path.
        """
        best = self.state.best_global_step
        path = self.run_folder / f"checkpoint-{best}"
        if best and (best == self.state.global_step or path.is_dir()):
            self.state.best_model_checkpoint = str(path)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._made_in is None:  # else its files are still going to be moved
            self._tell_failed_pushes()
            super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self):
        super()._finish_current_push()
        self._tell_failed_pushes()

    def _tell_failed_pushes(self) -> None:
        """The Trainer pushes in threads, and does not look at how they have ended."""
        push = getattr(self, "push_in_progress", None)
        for job in push.jobs if push is not None else ():
            if job.done() and job.exception() is not None:
                logger.warning("A push to the Hub has failed, and training goes on: %s", job.exception())

    def _determine_best_metric(self, metrics, trial):
        # With `save_strategy: best`, a checkpoint is saved where this is true: also the one of a run that stops.
        return super()._determine_best_metric(metrics, trial) or self.interruption is not None

    def _load_scaler(self, checkpoint):
        if self.accelerator.scaler is not None:  # that of fp16; a run may go on in bf16
            super()._load_scaler(checkpoint)

    def create_scheduler(self, num_training_steps, optimizer=None):
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        made: Any = self.optimizer
        if made is not None:
            self._as_asked = [dict(group, params=None) for group in made.param_groups]
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._as_asked:
            self._apply_settings()

    def _apply_settings(self) -> None:
        """Give the optimizer and the scheduler of a resumed run the settings of this start, not the checkpoint's."""
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        inner: Any = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
        for group, asked in zip(optimizer.param_groups, self._as_asked, strict=True):
            before, rate = group.get("initial_lr"), asked.get("initial_lr")
            # Some optimizers keep their state beside these.
            group.update({name: asked[name] for name in OPTIMIZER_SETTINGS if name in asked})
            if before and rate and before != rate:
                group["lr"] *= rate / before
        rates: list[Any] = [asked.get("initial_lr") for asked in self._as_asked]
        is_scaled = isinstance(inner, LambdaLR) and None not in rates
        if is_scaled:
            # Exactly what a run would have at this step that had these settings from its beginning.
            inner.base_lrs = rates
            for group, rate, scale in zip(optimizer.param_groups, rates, inner.lr_lambdas, strict=True):
                group["lr"] = rate * scale(inner.last_epoch)
        if hasattr(inner, "_last_lr"):
            inner._last_lr = [group["lr"] for group in optimizer.param_groups]
