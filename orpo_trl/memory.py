"""Peak memory of one process of a run, item by item, from its config alone: no weights, no GPU.

State (weights, gradients, optimizer) is counted from the model on the meta device. Activations are measured
(activations.py).

The estimate for a CPU is tested against real processes. The estimate for a GPU follows the same rules and is not yet
compared with a GPU; it leaves out the fragmentation of CUDA's caching allocator. All layers count as equal. Left out:
the host memory for loading a checkpoint, `torch_compile`, evaluation, and the outputs of attention that selective
checkpointing keeps.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from orpo_trl.activations import Dtypes, MicroBatch, measure_activations, with_adapter
from orpo_trl.config import ModelArguments, ORPOConfig
from orpo_trl.flops import head_weight
from orpo_trl.launch import STRATEGIES
from orpo_trl.lengths import PairLengths
from orpo_trl.upstream import HEAD_TILES

FP32 = 4
MIB = 2**20
# Random micro-batches that show the size of the largest one and the padding of padded ones.
DRAWS = 2_000

# Resident memory of a process with the trainer's imports, tokenizer and dataset, without its weights: measured with
# torch 2.13 (CPU build), trl 1.16 and DeepSpeed 0.19. On a GPU: a round figure for the CUDA context and the buffers of
# cuBLAS and NCCL.
LIBRARIES = {"cpu": 600 * MIB, "cuda": 1024 * MIB}

# Tiles that the backward pass of TRL's fused LM head holds at once. A GPU's kernel turns one into its gradient in
# place. In torch, `_backward_tile` holds the tile, y, z, log p, p, the gradient, and three terms of the last sum.
HEAD_TILES_HELD = {"cpu": 9, "cuda": 1}

# Bytes of state for each trained weight of 4 bytes. torch's optimizers keep state in the weight's dtype, so a weight of
# 2 bytes needs half of it. Those of bitsandbytes and torchao have a dtype of their own. For Adafactor see
# `_Run.optimizer`.
TORCH_OPTIMIZERS = {"adamw_torch": 8, "adamw_torch_fused": 8, "adagrad": 4, "rmsprop": 4, "sgd": 0}
OTHER_OPTIMIZERS = {
    "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_32bit": 8, "paged_adamw_8bit": 2,
    "lion_32bit": 4, "lion_8bit": 1, "paged_lion_32bit": 4, "paged_lion_8bit": 1,
    "rmsprop_bnb": 4, "rmsprop_bnb_32bit": 4, "rmsprop_bnb_8bit": 1, "adamw_torch_8bit": 2, "adamw_torch_4bit": 1,
}  # fmt: skip

# DeepSpeed's defaults, in elements. ZeRO-3 keeps a gathered weight if it is used again within `MAX_REUSE_DISTANCE`
# others (from the third step on, when it knows their order), and steps the optimizer in groups of `SUB_GROUP`.
DEFAULT_REDUCE_BUCKET = 5 * 10**8
DEFAULT_PREFETCH_BUCKET = 5 * 10**7
MAX_REUSE_DISTANCE = 10**9
SUB_GROUP = 10**9


@dataclass(frozen=True)
class Sharding:
    """How the processes of a run share the model.

    Attributes:
        strategy: one of `launch.STRATEGIES`.
        processes: number of processes, of all machines together.
        auto_buckets: the sizes of DeepSpeed's buckets are `auto`, as under a recipe's `deepspeed: zero3`. Else they are
            DeepSpeed's defaults, which are larger, as under an accelerate config.

    Raises:
        ValueError: for an unknown strategy, or one that cannot run so many processes.
    """

    strategy: str
    processes: int = 1
    auto_buckets: bool = False

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise ValueError(f"The strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}.")
        if self.processes < 1 or (self.strategy == "single" and self.processes > 1):
            raise ValueError(f"The strategy `{self.strategy}` cannot run {self.processes} processes.")

    @property
    def is_deepspeed(self) -> bool:
        return STRATEGIES[self.strategy].is_deepspeed

    @property
    def is_zero3(self) -> bool:
        return self.is_deepspeed and self.shards_weights

    @property
    def is_offloaded(self) -> bool:
        return STRATEGIES[self.strategy].is_offloaded

    @property
    def shards_weights(self) -> bool:
        return STRATEGIES[self.strategy].shards_weights

    @property
    def shards_state(self) -> bool:
        return STRATEGIES[self.strategy].shards_state


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by item, at the moment of the largest sum.

    Attributes:
        parts: state that stays during the whole run, and temporary memory at the peak.
        total: the sum of all parts.
    """

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class WeightCounts:
    """Numbers of weights; tied weights count once.

    Attributes:
        total: all weights, adapters included.
        trained: weights that training changes.
        quantisable: weights of frozen linear layers, without the LM head: bitsandbytes quantises these.
        largest_quantisable: weights of the largest frozen linear layer.
        embeddings: trained weights of embeddings.
        head: weights of the LM head.
        largest: weights of the largest trained matrix.
        layer: weights of the largest decoder layer.
        factors: rows and columns of all trained matrices, and trained vectors: Adafactor's state.
        trains_head: whether the LM head is trained.
    """

    total: int
    trained: int
    quantisable: int
    largest_quantisable: int
    embeddings: int
    head: int
    largest: int
    layer: int
    factors: int
    trains_head: bool


def count_weights(config: PreTrainedConfig, model_args: ModelArguments) -> WeightCounts:
    """Counts the weights of the model that a run trains, adapters included. Allocates no memory."""
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config)
        model = with_adapter(causal, model_args)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    head = head_weight(causal)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    layers = max(lists, key=_size)
    linear = [
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.weight is not head and not module.weight.requires_grad
    ]
    return WeightCounts(
        total=_size(model),
        trained=sum(weight.numel() for weight in trained),
        quantisable=sum(linear),
        largest_quantisable=max(linear, default=0),
        embeddings=sum(
            module.weight.numel()
            for module in model.modules()
            if isinstance(module, nn.Embedding) and module.weight.requires_grad
        ),
        head=head.numel(),
        largest=max((weight.numel() for weight in trained), default=0),
        layer=max(_size(layer) for layer in layers),
        factors=sum(weight.numel() if weight.ndim < 2 else sum(weight.shape) for weight in trained),
        trains_head=head.requires_grad,
    )


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def estimate_memory(
    config: PreTrainedConfig,
    model_args: ModelArguments,
    training: ORPOConfig,
    sharding: Sharding,
    micro_batch: MicroBatch,
    device: str,
) -> MemoryEstimate:
    """Peak memory of one process: of its GPU, or, on a CPU, its resident memory.

    The state of `paged_*` optimizers may leave the GPU, so it counts on a CPU only. With `zero3_offload` a GPU holds no
    state. The state items of the estimate for "cpu" are then the host memory of each process.

    Args:
        config: of the model.
        model_args: its dtype, adapter and quantisation.
        training: precision, optimizer and gradient checkpointing.
        sharding: how processes share the model.
        micro_batch: the largest forward pass.
        device: "cuda" or "cpu".

    Raises:
        ValueError: for an unknown device or optimizer, or a model that cannot be measured.
    """
    if device not in LIBRARIES:
        raise ValueError(f"The device must be one of {', '.join(LIBRARIES)}, got {device!r}.")
    weights, dtypes = count_weights(config, model_args), dtypes_of(config, model_args, training, sharding)
    run = _Run(config.get_text_config(), model_args, training, sharding, weights, dtypes, device)
    activations = measure_activations(config, model_args, training, micro_batch, dtypes, device)
    # With offloading, the saved tensors of a layer leave the GPU while other layers run.
    offloaded = training.activation_offloading and device == "cuda"
    saved, peak = activations.at(2 if offloaded else run.config.num_hidden_layers)
    passes = {
        "gathered weights": run.gathered(),
        "activations": peak,
        # The head runs after all layers have saved their tensors, and frees its memory before they run backward.
        "LM head": max(saved + run.head(micro_batch.tokens) - peak, 0),
    }
    if device == "cpu":
        # malloc keeps freed blocks under 32 MiB, and most of these are smaller: they stay resident in the next phase.
        passes["reduction or step"] = max(run.reduction(), run.step())
        if sharding.strategy == "zero2":
            # So do the weights that ZeRO-2 copied into one flat buffer: activations do not fit into the freed blocks.
            # Weights that ZeRO-3 gathers do fit.
            passes["freed weights"] = weights.layer * run.config.num_hidden_layers * dtypes.held.itemsize
    else:
        # Buckets are reduced during the backward pass; the step comes after it.
        passes["reduction"] = run.reduction()
        if run.step() > sum(passes.values()):
            passes = {"step": run.step()}
    parts = {"libraries": LIBRARIES[device], **run.state(), **passes}
    return MemoryEstimate({name: size for name, size in parts.items() if size})


def largest_batch(training: ORPOConfig, lengths: PairLengths, is_padded: bool) -> tuple[MicroBatch, str]:
    """The largest forward pass of a run, and a note if a pair alone is more than the token budget.

    Args:
        training: its micro-batch and token budget.
        lengths: of the pairs, or of a sample of them.
        is_padded: the padded layout; else shared_prefix.
    """
    longest = int(lengths.longest_row.max())
    tokens = int(draw_batches(training, lengths, is_padded).max())
    rows, note = 2 * training.per_device_train_batch_size, ""
    budget = training.max_tokens_per_micro_batch
    if budget is not None and tokens > budget:
        one = lengths.largest_batch(is_packed=not is_padded)
        rows, tokens = max(2, rows * budget // tokens), max(budget, one)
        if one > budget:
            note = f"a pair of {one:,} tokens is more than `max_tokens_per_micro_batch: {budget}` and gets its own pass"
    return MicroBatch(rows, tokens, longest, not is_padded), note


def draw_batches(training: ORPOConfig, lengths: PairLengths, is_padded: bool) -> np.ndarray:
    """Tokens of the forward passes of random micro-batches."""
    size = training.per_device_train_batch_size
    rows = np.random.default_rng(training.seed).integers(len(lengths), size=(DRAWS, size))
    return lengths[rows].batch(is_packed=not is_padded)


# ---- State, buffers and steps ----------------------------------------------------------------------------------------


def dtypes_of(config: PreTrainedConfig, model_args: ModelArguments, training: ORPOConfig, sharding: Sharding) -> Dtypes:
    """The dtypes of a run's weights and matrix products."""
    named = getattr(config, "dtype", None) if model_args.dtype in (None, "auto") else model_args.dtype
    loaded = getattr(torch, named) if isinstance(named, str) else named or torch.float32
    mixed = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    compute = mixed or loaded
    if sharding.is_deepspeed:  # it converts the model, adapters included
        return Dtypes(compute, compute, compute, compute)
    # FSDP2 gathers fp32 shards in the compute dtype. Otherwise autocast casts weights where they are used.
    is_fsdp = sharding.strategy == "fsdp2"
    held = torch.float32 if is_fsdp and mixed else loaded
    # PEFT makes adapters in fp32; SFTTrainer casts those of a quantised base.
    adapter = torch.bfloat16 if _is_quantised(model_args) else torch.float32
    return Dtypes(held, compute if is_fsdp else loaded, compute, adapter if model_args.use_peft else held)


def _is_quantised(model_args: ModelArguments) -> bool:
    return model_args.load_in_4bit or model_args.load_in_8bit


@dataclass(frozen=True)
class _Run:
    config: PreTrainedConfig
    model_args: ModelArguments
    training: ORPOConfig
    sharding: Sharding
    weights: WeightCounts
    dtypes: Dtypes
    device: str

    @property
    def share(self) -> int:
        """Trained weights whose optimizer state this process holds."""
        trained = self.weights.trained
        return -(-trained // self.sharding.processes) if self.sharding.shards_state else trained

    @property
    def summed(self) -> int:
        """Bytes of a gradient that is summed over the passes of a step: upstream.py sets fp32 for bf16 under ZeRO."""
        is_fp32 = self.sharding.is_deepspeed and self.training.bf16
        return FP32 if is_fp32 else self.dtypes.trained.itemsize

    def state(self) -> dict[str, int]:
        """Bytes that stay during the whole run: weights, master copies, gradients, optimizer, buckets."""
        sharding, size, trained = self.sharding, self.dtypes.trained.itemsize, self.weights.trained
        if sharding.is_offloaded and self.device == "cuda":
            return {"reduction bucket": self.reduce_bucket() * size}
        shards = sharding.processes if sharding.shards_weights else 1
        state = {
            "weights": self.frozen() // shards + (self.share if sharding.shards_weights else trained) * size,
            "gradients": self.share * self.summed,
            "optimizer": self.optimizer(),
        }
        if sharding.is_deepspeed:
            # DeepSpeed also copies fp32 weights: it compares their torch.device with a string, which is never equal.
            state["fp32 master weights"] = self.share * FP32
        if sharding.is_zero3:
            state["reduction bucket"] = self.reduce_bucket() * size
        if sharding.is_offloaded:
            state["gradients"] += self.share * FP32  # the optimizer reads a copy in fp32
        if sharding.strategy == "ddp":
            state["reduction bucket"] = trained * size  # `gradient_as_bucket_view` is off
        return state

    def frozen(self) -> int:
        """Bytes of the frozen weights, of all processes together."""
        frozen, args = self.weights.total - self.weights.trained, self.model_args
        if not _is_quantised(args):
            return frozen * self.dtypes.held.itemsize
        # 4 bits for a weight and a constant of 32 bits for 64 weights. Nested: 8 bits for 64 weights, and 32 bits for
        # 256 constants.
        constants = (8 + 32 / 256) / 64 if args.use_bnb_nested_quant else 32 / 64
        bits = 4 + constants if args.load_in_4bit else 8
        quantised = self.weights.quantisable
        return int(quantised * bits / 8) + (frozen - quantised) * self.dtypes.held.itemsize

    def optimizer(self) -> int:
        name = getattr(self.training.optim, "value", self.training.optim)
        if name in OTHER_OPTIMIZERS:
            if name.startswith("paged_") and self.device == "cuda":
                return 0
            # The Trainer keeps bitsandbytes' state of embeddings in 32 bits; DeepSpeed's partitions hide them from it.
            is_in_8_bits = name.endswith("8bit") and not (name.startswith("adamw_torch") or self.sharding.is_deepspeed)
            shards = self.sharding.processes if self.sharding.strategy == "fsdp2" else 1
            in_32_bits = 3 * self.weights.embeddings // shards if is_in_8_bits else 0
            return (self.share + in_32_bits) * OTHER_OPTIMIZERS[name]
        # DeepSpeed's optimizer updates the fp32 master copy.
        size = FP32 if self.sharding.is_deepspeed else self.dtypes.trained.itemsize
        if name in TORCH_OPTIMIZERS:
            return self.share * TORCH_OPTIMIZERS[name] * size // FP32
        if name == "adafactor":
            # Rows and columns of matrices. DeepSpeed's partitions are flat: the state has the size of the partition.
            return self.share * FP32 if self.sharding.is_deepspeed else self.weights.factors * FP32
        known = ", ".join(sorted([*TORCH_OPTIMIZERS, *OTHER_OPTIMIZERS, "adafactor"]))
        raise ValueError(f"The memory of `optim: {name}` is not known. Known are {known}.")

    def reduce_bucket(self) -> int:
        """Elements of DeepSpeed's bucket of gradients to reduce."""
        size = self.config.hidden_size**2 if self.sharding.auto_buckets else DEFAULT_REDUCE_BUCKET
        # On a CPU, memory that is never written is never resident.
        return min(size, self.weights.trained) if self.device == "cpu" else size

    def gathered(self) -> int:
        """Bytes of whole weights that a process makes from shards or quantised weights for its passes."""
        weights, size = self.weights, self.dtypes.compute.itemsize
        if _is_quantised(self.model_args):
            return weights.largest_quantisable * size
        if self.sharding.strategy == "fsdp2":
            # The current layer, the next one, and an all-gather buffer. Weights outside the layers stay gathered.
            outside = weights.total - weights.layer * self.config.num_hidden_layers
            return (3 * weights.layer + max(outside, 0)) * size
        if not self.sharding.is_zero3:
            return 0
        # ZeRO-3 keeps the gathered weights of a layer from its forward to its backward pass if fewer than
        # `MAX_REUSE_DISTANCE` weights are used in between. The layers in between run once forward and once backward;
        # with checkpointing they run forward twice.
        times = 3 if self.training.gradient_checkpointing else 2
        auto = self.sharding.auto_buckets
        prefetched = int(0.9 * self.config.hidden_size**2) if auto else DEFAULT_PREFETCH_BUCKET
        kept = min(MAX_REUSE_DISTANCE // times + weights.layer + prefetched, weights.total)
        # ZeRO-3 gathers weights into a buffer, and copies them out of it.
        return (kept + min(prefetched, weights.total)) * size

    def head(self, tokens: int) -> int:
        """Bytes of the fused LM head at its peak, in the backward pass."""
        weights, dtypes = self.weights, self.dtypes
        rows, words = HEAD_TILES[self.device]
        tile = min(rows, tokens) * words
        tiles = tile * (dtypes.compute.itemsize + (HEAD_TILES_HELD[self.device] - 1) * FP32)
        hidden = tokens * self.config.hidden_size
        # Gradients are summed in fp32 and then cast.
        sums = [(hidden, dtypes.compute.itemsize)]
        if weights.trains_head:
            sums.append((weights.head, dtypes.model.itemsize))
        return tiles + sum(count * (FP32 + (size if size != FP32 else 0)) for count, size in sums)

    def reduction(self) -> int:
        """Temporary bytes of the reduction of a bucket of gradients."""
        size = self.dtypes.trained.itemsize
        bucket = min(max(self.reduce_bucket(), self.weights.largest), self.weights.trained)
        if self.sharding.is_zero3:
            # `reduce_scatter_coalesced` joins the gradients. gloo's reduce_scatter works on a copy of its input.
            return bucket * size * (2 if self.device == "cpu" else 1)
        if self.sharding.strategy == "zero2":
            # The bucket, a second bucket with `overlap_comm` (in the shipped zero2.json), and a flattened copy.
            return (self.reduce_bucket() * (2 if self.sharding.auto_buckets else 1) + bucket) * size
        if self.sharding.strategy == "fsdp2":
            # Whole gradients of a layer, and the buffer that reduces them.
            return 2 * self.weights.layer * self.dtypes.compute.itemsize
        return self.weights.largest * size  # the new gradient of one weight, before it is added

    def step(self) -> int:
        """Temporary bytes of the optimizer's step."""
        group, size = self.share, self.dtypes.trained.itemsize
        name = getattr(self.training.optim, "value", self.training.optim)
        # Without a fused kernel Adam allocates denominators: one for all weights on a GPU, two for one weight on a CPU.
        denominators = {"cuda": 1, "cpu": 2}[self.device] if name == "adamw_torch" else 0
        if not self.sharding.is_deepspeed:
            return denominators * size * (group if self.device == "cuda" else self.weights.largest)
        if self.sharding.is_offloaded:
            return 0
        if self.sharding.strategy == "zero3":
            group = min(group, SUB_GROUP)
        # The gradients of the group in one piece, and then in fp32.
        return group * (self.summed + (FP32 if self.summed != FP32 else 0) + denominators * FP32)
