"""The steps that plan a run: optimiser steps, memory, time and cost, and what is not installed."""

import importlib.util
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from huggingface_hub import get_token
from transformers import get_scheduler

from orpo_trl.check.activations import MicroBatch
from orpo_trl.check.flight import Failed, Preflight, Skipped
from orpo_trl.check.memory import estimate_memory
from orpo_trl.flops import Device, find_device, named_device, train_flops, training_time
from orpo_trl.launch import Launch, count_gpus, launch_command

GIB = 2**30
# Micro-batches drawn to find how large the largest is, and how full padded ones are.
DRAWS = 2_000
# Packages of optimizers, by how their names begin.
_OTHER_OPTIMIZERS = {
    "galore": "galore_torch", "lomo": "lomo_optim", "adalomo": "lomo_optim", "grokadamw": "grokadamw",
    "schedule_free": "schedulefree", "apollo": "apollo_torch", "stable_adamw": "optimi",
}  # fmt: skip


def check_schedule(flight: Preflight) -> Iterator[str]:
    flight.need("pairs", "Data")
    training = flight.training
    per_step = training.per_device_train_batch_size * flight.processes * training.gradient_accumulation_steps
    yield (
        f"{per_step} pairs an optimiser step: {training.per_device_train_batch_size} a process, times "
        f"{flight.processes} (processes), times {training.gradient_accumulation_steps} (accumulation)"
    )
    epoch = flight.num_pairs / per_step
    epoch = int(epoch) if training.dataloader_drop_last else math.ceil(epoch)
    if not epoch:
        raise Failed(
            f"`dataloader_drop_last: true` leaves no step: {flight.num_pairs:,} rows are fewer than {per_step:,}."
        )
    flight.num_steps = training.max_steps if training.max_steps > 0 else math.ceil(epoch * training.num_train_epochs)
    warmup = training.get_warmup_steps(flight.num_steps)
    epochs = "of a stream" if flight.is_stream else f"{flight.num_steps / epoch:.3g} epochs of {epoch:,}"
    share = warmup / flight.num_steps
    yield f"{flight.num_steps:,} optimiser steps, {epochs}; warm-up {warmup:,} ({share:.0%})"
    get_scheduler(  # as the run will, so that wrong `lr_scheduler_kwargs` are told here
        training.lr_scheduler_type, torch.optim.SGD([torch.zeros(1)], training.learning_rate), warmup, flight.num_steps,
        dict(training.lr_scheduler_kwargs or {}),
    )  # fmt: skip
    prompt, chosen, rejected = flight.lengths.T
    scale = flight.num_pairs / len(flight.lengths)
    unique, all_tokens = flight.lengths.sum() * scale, (2 * prompt + chosen + rejected).sum() * scale
    padded = _draw(flight, is_padded=True).mean() / training.per_device_train_batch_size * flight.num_pairs
    whole = "in those rows" if flight.is_stream else "an epoch"
    yield f"{_short(unique)} tokens {whole}, {prompt.sum() / flight.lengths.sum():.0%} of them of prompts"
    if flight.is_padded:
        yield f"padded, as this run is: {_short(padded)}, {1 - all_tokens / padded:.0%} of them filling"
    else:
        yield (
            f"padded, with each prompt twice, it would be {_short(padded)}, "
            f"{1 - all_tokens / padded:.0%} of them filling: {padded / unique:.2f} times as many"
        )
    if warmup >= flight.num_steps:
        raise Failed(f"`warmup_steps: {training.warmup_steps:g}` leaves no step after the warm-up.")


def _short(tokens: float) -> str:
    return f"{tokens / 1e6:,.2f} million" if tokens > 1e5 else f"{tokens:,.0f}"


def _draw(flight: Preflight, is_padded: bool) -> np.ndarray:
    """Tokens of the forward pass of micro-batches drawn at random."""
    size = flight.training.per_device_train_batch_size
    rows = np.random.default_rng(flight.training.seed).integers(len(flight.lengths), size=(DRAWS, size))
    prompt, chosen, rejected = (part[rows] for part in flight.lengths.T)
    if is_padded:
        longest = (prompt + np.maximum(chosen, rejected)).max(1)
        return longest * (size + (rejected > 0).sum(1))
    return (prompt + chosen + rejected + (rejected > 0)).sum(1)


def check_memory(flight: Preflight) -> Iterator[str]:
    flight.need("pairs", "Data")
    training, device = flight.training, "cuda" if flight.is_on_gpu else "cpu"
    if not flight.is_on_gpu:  # which engines start there
        launch_command(Launch(flight.options["engine"], flight.processes), "", [], flight.own_engine, gpus=0)
    prompt, chosen, rejected = flight.lengths.T
    longest = int((prompt + np.maximum(chosen, rejected)).max())
    largest = int(_draw(flight, flight.is_padded).max())
    rows = 2 * training.per_device_train_batch_size
    budget = training.max_tokens_per_micro_batch
    if budget is not None and largest > budget:
        one = longest * 2 if flight.is_padded else int((flight.lengths.sum(1)).max()) + 1
        rows, largest = max(2, rows * budget // largest), max(budget, one)
        if one > budget:
            yield f"a pair of {one:,} tokens is more than `max_tokens_per_micro_batch: {budget}` and gets its own pass"
    batch = MicroBatch(rows, largest, longest, not flight.is_padded)
    try:
        estimate = estimate_memory(flight.config, flight.model_args, training, flight.engine, batch, device)
    except ValueError as error:  # an optimizer or a model that is not known here is no fault of the recipe
        raise Skipped(str(error)) from error
    has, whose = _capacity(flight)
    engine = flight.engine
    yield f"engine {engine.name}, processes {engine.processes}; largest micro-batch {largest:,} tokens, row {longest:,}"
    for item, size in estimate.parts.items():
        yield f"{item:<24}{size / GIB:>9.2f} GiB"
    yield f"{'at the peak':<24}{estimate.total / GIB:>9.2f} GiB for each process"
    if estimate.total > has:
        raise Failed(
            f"{estimate.total / GIB:.1f} GiB are more than the {has / GIB:.1f} GiB of {whose}. Smaller: "
            "`per_device_train_batch_size`, `max_tokens_per_micro_batch`, `gradient_checkpointing: true`, an 8-bit "
            "`optim`, zero3 over more GPUs, or `use_peft` with `load_in_4bit`."
        )
    else:
        yield f"fits into the {has / GIB:.1f} GiB of {whose}"
    if device == "cuda":
        yield "Calculated, and not yet compared with a GPU's own figures; what its allocator cannot reuse comes on top."


def _capacity(flight: Preflight) -> tuple[float, str]:
    """Bytes that one process may take, and of what."""
    memory, device = flight.options["gpu_memory"], _device(flight)
    if memory:
        return memory * GIB, "--gpu-memory"
    if device:
        return device.memory, device.name
    if count_gpus():
        return torch.accelerator.get_memory_info(0)[1], "this machine's GPU"
    return psutil.virtual_memory().total / flight.processes, "this machine's memory, for each process"


def _device(flight: Preflight) -> Device | None:
    """The GPU that is planned for, where its figures are known."""
    name = flight.options["gpu"]
    if name:
        return named_device(name)
    return find_device(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None


def check_time(flight: Preflight) -> Iterator[str]:
    flight.need("num_steps", "Optimiser steps and tokens")
    device = _device(flight)
    if device is None:
        raise Skipped("no GPU is known; name one by --gpu")
    training, options = flight.training, flight.options
    if not (training.bf16 or training.fp16 or flight.model_args.dtype in ("bfloat16", "float16")):
        raise Skipped("the run computes in 32 bits, and the peaks that are known are those of 16")
    pairs = flight.num_steps * training.per_device_train_batch_size * flight.processes
    pairs *= training.gradient_accumulation_steps
    flops = train_flops(flight.config, flight.model_args, training, flight.lengths, flight.is_padded)
    flops /= len(flight.lengths)
    hours = training_time(flops * pairs, flight.processes, device.peak_flops, options["utilisation"]) / 3600
    yield (
        f"{flops / 1e12:.3g} TFLOP a pair; {flight.processes} × {device.name} at {options['utilisation']:.0%} of "
        f"{device.peak_flops / 1e12:.0f} TFLOP/s"
    )
    yield f"{hours:.1f} hours, {hours * flight.processes:.1f} GPU hours, without evaluation and saving"
    if options["price"] is not None:
        yield f"{hours * flight.processes * options['price']:.0f} USD at {options['price']:g} USD a GPU hour"


def check_installed(flight: Preflight) -> Iterator[str]:
    flight.need("model_args", "Recipe")
    training, packages = flight.training, list(_packages(flight))
    missing = [f"{reason}: {how}" for name, reason, how in packages if importlib.util.find_spec(name) is None]
    if training.push_to_hub and not (training.hub_token or get_token()):
        missing.append("`push_to_hub: true`: run `hf auth login`")
    if "wandb" in (training.report_to or []) and not _has_wandb_key(training.wandb_mode):
        missing.append("`report_to: wandb`: run `wandb login`, or set `wandb_mode: offline`")
    if missing:
        raise Failed("\n".join(missing))
    if not Path(flight.model_args.model_name_or_path).exists() and not get_token():
        yield "not logged in to the Hub: gated models and private data need `hf auth login`"
    used = sorted({name for name, _, _ in packages})
    yield f"installed, as this recipe needs: {', '.join(used)}" if used else "this recipe needs no extra package"


def _packages(flight: Preflight) -> Iterator[tuple[str, str, str]]:
    """Import name, why it is needed, and how to get it."""
    arguments, training = flight.model_args, flight.training
    optim = training.optim.value
    if training.use_liger_kernel:
        yield "liger_kernel", "`use_liger_kernel: true`", "pip install liger-kernel"
    if arguments.load_in_4bit or arguments.load_in_8bit:
        yield "bitsandbytes", "`load_in_4bit` and `load_in_8bit`", "pip install 'orpo-trl[quant]'"
    if optim.startswith("adamw_torch_"):
        if optim.endswith("bit"):
            yield "torchao", f"`optim: {optim}`", "pip install torchao"
    elif any(optim.startswith(name) for name in _OTHER_OPTIMIZERS):
        package = next(package for name, package in _OTHER_OPTIMIZERS.items() if optim.startswith(name))
        yield package, f"`optim: {optim}`", f"pip install {package.replace('_', '-')}"
    elif any(word in optim for word in ("paged_", "8bit", "bnb", "lion", "ademamix")):
        yield "bitsandbytes", f"`optim: {optim}`", "pip install 'orpo-trl[quant]', or set `optim: adamw_torch`"
    if arguments.use_peft:
        yield "peft", "`use_peft: true`", "pip install 'orpo-trl[peft]'"
    if flight.engine.name.startswith("zero"):
        yield "deepspeed", f"the engine {flight.engine.name}", "pip install deepspeed"
    if (arguments.attn_implementation or "").startswith("flash_attention"):
        name = {"flash_attention_3": "flash_attn_interface"}.get(arguments.attn_implementation, "flash_attn")
        yield name, f"`attn_implementation: {arguments.attn_implementation}`", "pip install flash-attn"
    for name in training.report_to or []:
        if name in ("wandb", "trackio", "tensorboard", "mlflow", "comet_ml", "neptune", "clearml", "swanlab"):
            yield name, f"`report_to: {name}`", f"pip install {name}"


def _has_wandb_key(mode: str | None) -> bool:
    """Whether there is one, or none is needed."""
    import wandb

    return (mode or os.environ.get("WANDB_MODE")) in ("offline", "disabled") or wandb.api.api_key is not None
