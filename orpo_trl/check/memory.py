"""Peak memory of one process of a run, item by item, from its config alone: no weights, no GPU.

State (weights, gradients, optimizer) is counted from the model on the meta device. Activations are measured, not
derived (activations.py).

The CPU side is tested against real processes. The GPU side follows the same rules and has not been measured; it leaves
out the fragmentation of CUDA's caching allocator. Layers are taken to be alike. Left out: the host memory of loading
a checkpoint, `torch_compile`, and evaluation.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from orpo_trl.check.activations import Dtypes, MicroBatch, measure_activations, with_adapter
from orpo_trl.config import ModelArguments, ORPOConfig

ENGINES = ("single", "ddp", "zero2", "zero3", "zero3_offload", "fsdp2")
FP32 = 4
MIB = 2**20

# Resident memory of a process after the trainer's imports, tokenizer and dataset, less its weights: measured with torch
# 2.13 (CPU build), trl 1.16 and DeepSpeed 0.19. On a GPU: CUDA context, cuBLAS and NCCL buffers, an allowance.
LIBRARIES = {"cpu": 600 * MIB, "cuda": 1024 * MIB}

# Tiles of TRL's fused LM head, in tokens and words: `shrink_head_tiles` on a CPU, else those of trl's chunked_logprob.
HEAD_TILES = {"cpu": (512, 8192), "cuda": (4096, 32768)}
# Tiles that its backward holds at once. A GPU's kernel turns one into its gradient in place. In torch, `_backward_tile`
# holds the tile, y, z, log p, p, the gradient, and three terms of the gradient's last sum.
HEAD_TILES_HELD = {"cpu": 9, "cuda": 1}

# Bytes of state for each trained weight of 4 bytes. torch's optimizers keep state in the weight's dtype, so half of it
# for 2 bytes; bitsandbytes' and torchao's have a dtype of their own. Adafactor's is in `_Run.optimizer`.
TORCH_OPTIMIZERS = {"adamw_torch": 8, "adamw_torch_fused": 8, "adagrad": 4, "rmsprop": 4, "sgd": 0}
OTHER_OPTIMIZERS = {
    "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_32bit": 8, "paged_adamw_8bit": 2,
    "lion_32bit": 4, "lion_8bit": 1, "paged_lion_32bit": 4, "paged_lion_8bit": 1,
    "rmsprop_bnb": 4, "rmsprop_bnb_32bit": 4, "rmsprop_bnb_8bit": 1, "adamw_torch_8bit": 2, "adamw_torch_4bit": 1,
}  # fmt: skip

# DeepSpeed's defaults, in elements. ZeRO-3 keeps a gathered weight that is used again within so many others (from the
# third step on, when it knows their order), and steps the optimizer in groups of at most so many.
DEFAULT_REDUCE_BUCKET = 5 * 10**8
DEFAULT_PREFETCH_BUCKET = 5 * 10**7
MAX_REUSE_DISTANCE = 10**9
SUB_GROUP = 10**9


@dataclass(frozen=True)
class Engine:
    """How the processes of a run share the model.

    Attributes:
        name: one of `ENGINES`.
        processes: of all machines.
        auto_buckets: DeepSpeed's buckets have the sizes that `auto` stands for (a recipe's `deepspeed: zero3`); else
            its defaults, which are larger (an accelerate config).
    """

    name: str
    processes: int = 1
    auto_buckets: bool = False

    def __post_init__(self):
        if self.name not in ENGINES:
            raise ValueError(f"The engine must be one of {', '.join(ENGINES)}, got {self.name!r}.")
        if self.processes < 1 or (self.name == "single" and self.processes > 1):
            raise ValueError(f"The engine `{self.name}` cannot run {self.processes} processes.")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by item. Those of one kind that come at different times are counted where their sum is largest.

    Attributes:
        parts: state that stays, and what comes on top of it at the peak.
        total: their sum.
    """

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class WeightCounts:
    """Numbers of weights; tied ones count once.

    Attributes:
        total: all, adapters included.
        trained: those that training changes.
        quantisable: those of frozen linear layers but the head, which bitsandbytes quantises.
        largest_quantisable: those of the largest of them.
        embeddings: trained ones of embeddings.
        head: those of the LM head.
        largest: those of the largest trained matrix.
        layer: those of the largest decoder layer.
        factors: rows and columns of all trained matrices, and trained vectors: what Adafactor keeps.
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
    """Weights of the model that a run trains, adapters included, counted without any memory."""
    with torch.device("meta"):
        model = with_adapter(AutoModelForCausalLM.from_config(config), model_args)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    head = model.get_output_embeddings()
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    layers = max(lists, key=_size)
    linear = [
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad
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
        head=head.weight.numel(),
        largest=max((weight.numel() for weight in trained), default=0),
        layer=max(_size(layer) for layer in layers),
        factors=sum(weight.numel() if weight.ndim < 2 else sum(weight.shape) for weight in trained),
        trains_head=head.weight.requires_grad,
    )


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def estimate_memory(
    config: PreTrainedConfig,
    model_args: ModelArguments,
    training: ORPOConfig,
    engine: Engine,
    micro_batch: MicroBatch,
    device: str,
) -> MemoryEstimate:
    """Peak memory of one process: of its GPU, or, on a CPU, its resident memory.

    State of `paged_*` optimizers may leave the GPU, and counts on a CPU alone. With `zero3_offload`, a GPU holds no
    state; what the host holds for each process is in the state items of the estimate for "cpu".

    Args:
        config: of the model.
        model_args: its dtype, adapter and quantisation.
        training: precision, optimizer and gradient checkpointing.
        engine: how processes share the model.
        micro_batch: the largest one.
        device: "cuda" or "cpu".

    Raises:
        ValueError: for an unknown device or optimizer, or an architecture that cannot be measured.
    """
    if device not in LIBRARIES:
        raise ValueError(f"The device must be one of {', '.join(LIBRARIES)}, got {device!r}.")
    weights, dtypes = count_weights(config, model_args), dtypes_of(config, model_args, training, engine)
    run = _Run(config.get_text_config(), model_args, training, engine, weights, dtypes, device)
    activations = measure_activations(config, model_args, training, micro_batch, dtypes, device)
    # Offloaded, the layers' saved tensors leave the GPU, but for those at work.
    offloaded = training.activation_offloading and device == "cuda"
    saved, peak = activations.at(2 if offloaded else run.config.num_hidden_layers)
    passes = {
        "gathered weights": run.gathered(),
        "activations": peak,
        # The head runs when all layers have saved what they save, and has gone when the last one runs backward.
        "LM head": max(saved + run.head(micro_batch.tokens) - peak, 0),
    }
    if device == "cpu":
        # malloc keeps freed pieces under 32 MiB, as most of these are: they are still resident in the next phase.
        passes["reduction or step"] = max(run.reduction(), run.step())
        if engine.name == "zero2":
            # So do the weights that it copied into one flat buffer: activations do not fit into their places, where
            # those that ZeRO-3 gathers do.
            passes["freed weights"] = weights.layer * run.config.num_hidden_layers * dtypes.held.itemsize
    else:
        # Buckets are reduced while the backward pass goes on; the step comes after it.
        passes["reduction"] = run.reduction()
        if run.step() > sum(passes.values()):
            passes = {"step": run.step()}
    parts = {"libraries": LIBRARIES[device], **run.state(), **passes}
    return MemoryEstimate({name: size for name, size in parts.items() if size})


# ---- State, buffers and steps ----------------------------------------------------------------------------------------


def dtypes_of(config: PreTrainedConfig, model_args: ModelArguments, training: ORPOConfig, engine: Engine) -> Dtypes:
    """Dtypes of a run."""
    named = getattr(config, "dtype", None) if model_args.dtype in (None, "auto") else model_args.dtype
    loaded = getattr(torch, named) if isinstance(named, str) else named or torch.float32
    mixed = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    compute = mixed or loaded
    if _is_deepspeed(engine):  # it converts the model, adapters included
        return Dtypes(compute, compute, compute, compute)
    # FSDP2 gathers fp32 shards in the compute dtype; else autocast casts weights where they are used.
    is_fsdp = engine.name == "fsdp2"
    held = torch.float32 if is_fsdp and mixed else loaded
    # PEFT makes adapters in fp32; SFTTrainer casts those of a quantised base.
    adapter = torch.bfloat16 if _is_quantised(model_args) else torch.float32
    return Dtypes(held, compute if is_fsdp else loaded, compute, adapter if model_args.use_peft else held)


def _is_deepspeed(engine: Engine) -> bool:
    return engine.name.startswith("zero")


def _is_quantised(model_args: ModelArguments) -> bool:
    return model_args.load_in_4bit or model_args.load_in_8bit


@dataclass(frozen=True)
class _Run:
    config: PreTrainedConfig
    model_args: ModelArguments
    training: ORPOConfig
    engine: Engine
    weights: WeightCounts
    dtypes: Dtypes
    device: str

    @property
    def share(self) -> int:
        """Trained weights whose optimizer state this process holds."""
        whole = self.engine.name in ("single", "ddp")
        return self.weights.trained if whole else -(-self.weights.trained // self.engine.processes)

    def state(self) -> dict[str, int]:
        """What stays: weights, master copies, gradients, optimizer, buckets."""
        engine, size, trained = self.engine, self.dtypes.trained.itemsize, self.weights.trained
        if engine.name == "zero3_offload" and self.device == "cuda":
            return {"reduction bucket": self.reduce_bucket() * size}
        are_weights_shared = engine.name in ("zero3", "zero3_offload", "fsdp2")
        shards = engine.processes if are_weights_shared else 1
        state = {
            "weights": self.frozen() // shards + (self.share if are_weights_shared else trained) * size,
            "gradients": self.share * size,
            "optimizer": self.optimizer(),
        }
        if _is_deepspeed(engine):
            # DeepSpeed copies fp32 weights too: it compares their torch.device with a string, which is never equal.
            state["fp32 master weights"] = self.share * FP32
        if engine.name in ("zero3", "zero3_offload"):
            state["reduction bucket"] = self.reduce_bucket() * size
        if engine.name == "zero3_offload":
            state["gradients"] += self.share * FP32  # those that the optimizer reads
        if engine.name == "ddp":
            state["reduction bucket"] = trained * size  # `gradient_as_bucket_view` is off
        return state

    def frozen(self) -> int:
        """Bytes of the weights that are not trained, of all processes."""
        frozen, args = self.weights.total - self.weights.trained, self.model_args
        if not _is_quantised(args):
            return frozen * self.dtypes.held.itemsize
        # 4 bits, and a constant of 32 bits for 64 weights; nested, one of 8 bits, and 32 bits for 256 of those.
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
            is_in_8_bits = name.endswith("8bit") and not (name.startswith("adamw_torch") or _is_deepspeed(self.engine))
            shards = self.engine.processes if self.engine.name == "fsdp2" else 1
            in_32_bits = 3 * self.weights.embeddings // shards if is_in_8_bits else 0
            return (self.share + in_32_bits) * OTHER_OPTIMIZERS[name]
        # DeepSpeed's optimizer is given the fp32 master copy.
        size = FP32 if _is_deepspeed(self.engine) else self.dtypes.trained.itemsize
        if name in TORCH_OPTIMIZERS:
            return self.share * TORCH_OPTIMIZERS[name] * size // FP32
        if name == "adafactor":
            # Rows and columns of matrices; DeepSpeed's partitions are flat, and kept whole.
            return self.share * FP32 if _is_deepspeed(self.engine) else self.weights.factors * FP32
        known = ", ".join(sorted([*TORCH_OPTIMIZERS, *OTHER_OPTIMIZERS, "adafactor"]))
        raise ValueError(f"The memory of `optim: {name}` is not known. Known are {known}.")

    def reduce_bucket(self) -> int:
        """Elements of DeepSpeed's bucket of gradients to reduce."""
        size = self.config.hidden_size**2 if self.engine.auto_buckets else DEFAULT_REDUCE_BUCKET
        # On a CPU, what is never written to is never resident.
        return min(size, self.weights.trained) if self.device == "cpu" else size

    def gathered(self) -> int:
        """Bytes of whole weights that a process makes, from shards or quantised ones, for its passes."""
        weights, size = self.weights, self.dtypes.compute.itemsize
        if _is_quantised(self.model_args):
            return weights.largest_quantisable * size
        if self.engine.name == "fsdp2":
            # The layer at work and the next one, an all-gather buffer, and what is in no layer, gathered throughout.
            outside = weights.total - weights.layer * self.config.num_hidden_layers
            return (3 * weights.layer + max(outside, 0)) * size
        if self.engine.name not in ("zero3", "zero3_offload"):
            return 0
        # A layer's weights are kept from its forward to its backward pass where those of the layers between, which run
        # twice meanwhile, or three times with checkpointing, are not too many.
        times = 3 if self.training.gradient_checkpointing else 2
        auto = self.engine.auto_buckets
        prefetched = int(0.9 * self.config.hidden_size**2) if auto else DEFAULT_PREFETCH_BUCKET
        kept = min(MAX_REUSE_DISTANCE // times + weights.layer + prefetched, weights.total)
        # They are gathered in a buffer, and copied out of it.
        return (kept + min(prefetched, weights.total)) * size

    def head(self, tokens: int) -> int:
        """Bytes of the fused LM head at its peak, in the backward pass."""
        weights, dtypes = self.weights, self.dtypes
        rows, words = HEAD_TILES[self.device]
        tile = min(rows, tokens) * words
        tiles = tile * (dtypes.compute.itemsize + (HEAD_TILES_HELD[self.device] - 1) * FP32)
        hidden = tokens * self.config.hidden_size
        # Gradients are summed in fp32, and then cast.
        sums = [(hidden, dtypes.compute.itemsize)]
        if weights.trains_head:
            sums.append((weights.head, dtypes.model.itemsize))
        return tiles + sum(count * (FP32 + (size if size != FP32 else 0)) for count, size in sums)

    def reduction(self) -> int:
        """Bytes that come and go with the reduction of a bucket of gradients."""
        size = self.dtypes.trained.itemsize
        bucket = min(max(self.reduce_bucket(), self.weights.largest), self.weights.trained)
        if self.engine.name in ("zero3", "zero3_offload"):
            # `reduce_scatter_coalesced` joins the gradients; gloo's reduce_scatter works on a copy of its input.
            return bucket * size * (2 if self.device == "cpu" else 1)
        if self.engine.name == "zero2":
            # The bucket, a second one with `overlap_comm` (the shipped zero2.json), and their flattened copy.
            return (self.reduce_bucket() * (2 if self.engine.auto_buckets else 1) + bucket) * size
        if self.engine.name == "fsdp2":
            # Whole gradients of a layer, and the buffer that they are reduced from.
            return 2 * self.weights.layer * self.dtypes.compute.itemsize
        return self.weights.largest * size  # of one weight, before it is added to what is there

    def step(self) -> int:
        """Bytes that come and go with the optimizer's step."""
        group, size = self.share, self.dtypes.trained.itemsize
        name = getattr(self.training.optim, "value", self.training.optim)
        # Without a fused kernel, Adam writes the denominator out: one of all weights on a GPU, two of one on a CPU.
        denominators = {"cuda": 1, "cpu": 2}[self.device] if name == "adamw_torch" else 0
        if not _is_deepspeed(self.engine):
            return denominators * size * (group if self.device == "cuda" else self.weights.largest)
        if self.engine.name == "zero3_offload":
            return 0
        if self.engine.name == "zero3":
            group = min(group, SUB_GROUP)
        # Gradients of the group in one piece, then in fp32.
        return group * (size + (FP32 if size != FP32 else 0) + denominators * FP32)
