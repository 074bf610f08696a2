"""The steps that plan a run: optimiser steps, memory, time and cost, and missing packages."""

import copy
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token
from transformers import get_scheduler

from orpo_trl.check.results import (
    CheckOptions,
    DataResult,
    Failed,
    ModelResult,
    RecipeResult,
    ScheduleResult,
    Skipped,
)
from orpo_trl.config import ORPOConfig
from orpo_trl.devices import Device, count_gpus, cpu_memory, find_cuda_device, named_device
from orpo_trl.flops import train_flops, training_time
from orpo_trl.launch import DEEPSPEED, Launch, launch_command
from orpo_trl.memory import Sharding, draw_batches, estimate_memory, largest_batch
from orpo_trl.model import model_name
from orpo_trl.plain_files import read_text
from orpo_trl.recomputation import ROOMY, leave_out_checkpointing
from orpo_trl.unused_packages import is_installed

GIB = 2**30
# From this share of a GPU on, what no estimate knows may be too much: fragments of the allocator, other processes.
_TIGHT = 0.9
# Share of the speed of matrix products that a training step reaches on a CPU: a round figure. For SmolLM2-135M beside
# other work it gave 16 minutes, and runs took 14 to 16 with their evaluations.
_CPU_SHARE = 0.5
# Packages of optimizers, by how their names begin.
_OTHER_OPTIMIZERS = {
    "galore": "galore_torch", "lomo": "lomo_optim", "adalomo": "lomo_optim", "grokadamw": "grokadamw",
    "schedule_free": "schedulefree", "apollo": "apollo_torch", "stable_adamw": "optimi",
}  # fmt: skip


def check_schedule(
    options: CheckOptions, recipe: RecipeResult, model: ModelResult, data: DataResult
) -> Iterator[str | ScheduleResult]:
    """Optimiser steps, warm-up, and tokens of an epoch."""
    training = recipe.training
    note = training.split_for(options.processes)
    if note:
        yield note
    batch_size = training.per_device_train_batch_size
    accumulation = training.gradient_accumulation_steps or 1
    per_step = batch_size * options.processes * accumulation
    yield (
        f"{per_step} pairs an optimiser step: {batch_size} a process, times "
        f"{options.processes} (processes), times {accumulation} (accumulation)"
    )
    epoch = data.num_pairs / per_step
    epoch = int(epoch) if training.dataloader_drop_last else math.ceil(epoch)
    if not epoch:
        raise Failed(
            f"`dataloader_drop_last: true` leaves no step: {data.num_pairs:,} rows are fewer than {per_step:,}."
        )
    num_steps = training.max_steps if training.max_steps > 0 else math.ceil(epoch * training.num_train_epochs)
    yield ScheduleResult(num_steps, per_step)
    warmup = training.get_warmup_steps(num_steps)
    epochs = "of a stream" if data.is_stream else f"{num_steps / epoch:.3g} epochs of {epoch:,}"
    yield f"{num_steps:,} optimiser steps, {epochs}; warm-up {warmup:,} ({warmup / num_steps:.0%})"
    _check_scheduler(training, warmup, num_steps)
    yield from _token_lines(training, model, data)
    if warmup >= num_steps:
        raise Failed(f"`warmup_steps: {training.warmup_steps:g}` leaves no step after the warm-up.")


def _check_scheduler(training: ORPOConfig, warmup: int, num_steps: int) -> None:
    """Makes the scheduler of the run, which finds wrong `lr_scheduler_kwargs`."""
    optimizer = torch.optim.SGD([torch.zeros(1)], training.learning_rate)
    kwargs = training.lr_scheduler_kwargs
    get_scheduler(
        training.lr_scheduler_type, optimizer, warmup, num_steps, dict(kwargs) if isinstance(kwargs, dict) else {}
    )


def _token_lines(training: ORPOConfig, model: ModelResult, data: DataResult) -> Iterator[str]:
    lengths = data.lengths
    scale = data.num_pairs / len(lengths)
    unique, total = lengths.unique.sum() * scale, lengths.total.sum() * scale
    padded = (
        draw_batches(training, data.lengths, is_padded=True).mean()
        / training.per_device_train_batch_size
        * data.num_pairs
    )
    padding = f"{1 - total / padded:.0%} of them padding"
    whole = "in those rows" if data.is_stream else "an epoch"
    yield f"{_short(unique)} tokens {whole}, {lengths.prompt.sum() / lengths.unique.sum():.0%} of them of prompts"
    if model.is_padded:
        yield f"padded, as this run is: {_short(padded)}, {padding}"
    else:
        yield (
            f"padded, with each prompt twice, it would be {_short(padded)}, {padding}: "
            f"{padded / unique:.2f} times as many"
        )


def _short(tokens: float) -> str:
    return f"{tokens / 1e6:,.2f} million" if tokens > 1e5 else f"{tokens:,.0f}"


def check_memory(options: CheckOptions, recipe: RecipeResult, model: ModelResult, data: DataResult) -> Iterator[str]:
    """Memory of one process, compared with what there is."""
    device = "cuda" if options.is_on_gpu else "cpu"
    if not options.is_on_gpu:  # raises for a strategy that does not start on a CPU
        launch_command(Launch(options.engine, options.processes), "", [], recipe.own, gpus=0)
    sharding = _sharding(options, recipe.own)
    if not options.is_on_gpu:
        note = leave_out_checkpointing(
            model.config, recipe.model_args, recipe.training, sharding, data.lengths, model.is_padded
        )
        if note:
            yield note
    batch, note = largest_batch(recipe.training, data.lengths, model.is_padded)
    if note:
        yield note
    try:
        estimate = estimate_memory(model.config, recipe.model_args, recipe.training, sharding, batch, device)
    except ValueError as error:  # an unknown optimizer or model is no fault of the recipe
        raise Skipped(str(error)) from error
    has, whose = _capacity(options)
    yield (
        f"strategy {sharding.strategy}, processes {sharding.processes}; largest micro-batch {batch.tokens:,} tokens, "
        f"row {batch.longest:,}"
    )
    for item, size in estimate.parts.items():
        yield f"{item:<24}{size / GIB:>9.2f} GiB"
    yield f"{'at the peak':<24}{estimate.total / GIB:>9.2f} GiB for each process"
    if estimate.total > has:
        raise Failed(
            f"{estimate.total / GIB:.1f} GiB are more than the {has / GIB:.1f} GiB of {whose}. Smaller: "
            "`per_device_train_batch_size`, `max_tokens_per_micro_batch`, `gradient_checkpointing: true`, an 8-bit "
            "`optim`, zero3 over more GPUs, or `use_peft` with `load_in_4bit`."
        )
    share = estimate.total / has
    yield f"fits into the {has / GIB:.1f} GiB of {whose}, {share:.0%} of them"
    if device == "cuda" and recipe.training.gradient_checkpointing:
        yield from _without_checkpointing(recipe, model, data, sharding, _TIGHT * has)
    if device == "cuda" and share > _TIGHT:
        yield "That is tight: what the estimate leaves out may not fit. A lower `max_tokens_per_micro_batch` helps."
    if device == "cuda":
        yield "Calculated, not compared with a GPU yet; memory that its allocator cannot reuse is not included."


def _without_checkpointing(
    recipe: RecipeResult, model: ModelResult, data: DataResult, sharding: Sharding, has: float
) -> Iterator[str]:
    """A line with the settings that compute no layer twice and take at most `has` bytes, if there are some.

    A token budget splits the forward passes and changes nothing else, so that smaller ones are tried too.
    """
    training = copy.copy(recipe.training)
    training.set_checkpointing(False)
    operations = [
        train_flops(model.config, recipe.model_args, settings, data.lengths, model.is_padded)
        for settings in (training, recipe.training)
    ]
    largest, _ = largest_batch(training, data.lengths, model.is_padded)
    budgets = [tokens for tokens in (16384, 8192, 4096) if tokens < largest.tokens]
    for budget in (training.max_tokens_per_micro_batch, *budgets):
        training.max_tokens_per_micro_batch = budget
        batch, _ = largest_batch(training, data.lengths, model.is_padded)
        estimate = estimate_memory(model.config, recipe.model_args, training, sharding, batch, "cuda")
        if estimate.total <= has:
            passes = f" --max_tokens_per_micro_batch {budget}" if budget in budgets else ""
            yield (
                f"Faster, and it fits too: --gradient_checkpointing false{passes} takes "
                f"{estimate.total / GIB:.1f} GiB, and {1 - operations[0] / operations[1]:.0%} fewer operations"
            )
            return


def _sharding(options: CheckOptions, own: dict[str, Any]) -> Sharding:
    """How the processes of the run share the model."""
    if options.engine:
        return Sharding(options.engine, options.processes)
    if options.processes == 1:
        return Sharding("single")
    strategy, auto_buckets = _strategy_of(own)
    # On a CPU an accelerate config launches the recipe's strategy, with DeepSpeed's own buckets.
    return Sharding(strategy, options.processes, auto_buckets and options.is_on_gpu)


def _strategy_of(own: dict[str, Any]) -> tuple[str, bool]:
    """The strategy that a recipe's `deepspeed` or `fsdp` means, and whether DeepSpeed's buckets are `auto`."""
    deepspeed = own.get("deepspeed")
    if deepspeed in DEEPSPEED:
        return deepspeed, True
    if not deepspeed:
        return "fsdp2" if own.get("fsdp") else "ddp", False
    config = deepspeed if isinstance(deepspeed, dict) else json.loads(read_text(Path(deepspeed)))
    zero = config.get("zero_optimization", {})
    if zero.get("stage") not in (2, 3):
        return "ddp", False
    offloaded = zero["stage"] == 3 and zero.get("offload_optimizer", {}).get("device") not in (None, "none")
    return f"zero{zero['stage']}" + ("_offload" if offloaded else ""), zero.get("reduce_bucket_size") == "auto"


def _capacity(options: CheckOptions) -> tuple[float, str]:
    """Bytes that one process may take, and whose they are."""
    device = _device(options)
    if options.gpu_memory:
        return options.gpu_memory * GIB, "--gpu_memory"
    if device:
        return device.memory, device.name
    if count_gpus():
        return torch.accelerator.get_memory_info(0)[1], "this machine's GPU"
    return cpu_memory() / options.processes, "this machine's memory, for each process"


def _device(options: CheckOptions) -> Device | None:
    """The GPU to plan for, if its figures are known."""
    if options.gpu:
        return named_device(options.gpu)
    return find_cuda_device() if torch.cuda.is_available() else None


def check_time(
    options: CheckOptions, recipe: RecipeResult, model: ModelResult, data: DataResult, schedule: ScheduleResult
) -> Iterator[str]:
    """Hours, GPU hours and cost."""
    device = _device(options)
    if not options.is_on_gpu:
        yield from _cpu_time(options, recipe, model, data, schedule)
        return
    if device is None:
        raise Skipped("the speed of this GPU is not known; name one by --gpu")
    training = recipe.training
    if not (training.bf16 or training.fp16 or recipe.model_args.dtype in ("bfloat16", "float16")):
        raise Skipped("the run computes in 32 bits, and only 16-bit peaks are known")
    flops = train_flops(model.config, recipe.model_args, training, data.lengths, model.is_padded) / len(data.lengths)
    total, processes = flops * schedule.num_steps * schedule.pairs_per_step, options.processes
    hours = training_time(total, processes, device.peak_flops, options.utilisation) / 3600
    yield (
        f"{flops / 1e12:.3g} TFLOP a pair; {processes} × {device.name} at {options.utilisation:.0%} of "
        f"{device.peak_flops / 1e12:.0f} TFLOP/s"
    )
    yield f"{hours:.1f} hours, {hours * processes:.1f} GPU hours, without evaluation and saving"
    if options.price is not None:
        yield f"{hours * processes * options.price:.0f} USD at {options.price:g} USD a GPU hour"


def _cpu_time(
    options: CheckOptions, recipe: RecipeResult, model: ModelResult, data: DataResult, schedule: ScheduleResult
) -> Iterator[str]:
    """Hours on this machine's CPU, by the speed of its matrix products, and settings that would be faster."""
    training = recipe.training
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    peak = matrix_speed(dtype)
    flops = train_flops(model.config, recipe.model_args, training, data.lengths, model.is_padded) / len(data.lengths)
    seconds = training_time(flops * schedule.num_steps * schedule.pairs_per_step, 1, peak, _CPU_SHARE)
    yield (
        f"{flops / 1e9:,.3g} GFLOP a pair; this CPU multiplies matrices of {str(dtype).removeprefix('torch.')} at "
        f"{peak / 1e9:,.0f} GFLOP/s, and a run reaches about {_CPU_SHARE:.0%} of that"
    )
    yield (
        f"about {seconds / schedule.num_steps:,.2g} seconds an optimiser step, {timedelta(seconds=round(seconds))} in "
        "all, without evaluation and saving, where no other program takes the cores"
    )
    if training.bf16 and matrix_speed(torch.float32) > peak:
        yield "Faster: --bf16 false; this CPU multiplies matrices of float32 faster"
    if training.gradient_checkpointing and not training.is_checkpointing_open:
        without = copy.copy(training)
        without.set_checkpointing(False)
        batch, _ = largest_batch(without, data.lengths, model.is_padded)
        sharding = _sharding(options, recipe.own)
        with suppress(ValueError):  # an unknown optimizer or model: the step on memory says so
            needed = estimate_memory(model.config, recipe.model_args, without, sharding, batch, "cpu").total
            if needed <= ROOMY * _capacity(options)[0]:
                yield f"Faster, and it fits too: --gradient_checkpointing false takes {needed / GIB:.1f} GiB"


def matrix_speed(dtype: torch.dtype) -> float:
    """FLOP/s of this CPU for matrix products, measured in a tenth of a second."""
    size, done = 768, 0
    one = torch.ones(size, size, dtype=dtype)
    torch.mm(one, one)  # the first one prepares
    start = time.perf_counter()
    while time.perf_counter() - start < 0.1:
        torch.mm(one, one)
        done += 1
    return 2 * size**3 * done / (time.perf_counter() - start)


def check_installed(options: CheckOptions, recipe: RecipeResult) -> Iterator[str]:
    """Packages and logins that the recipe needs."""
    training, packages = recipe.training, list(_packages(recipe, _sharding(options, recipe.own)))
    missing = [f"{reason}: {how}" for name, reason, how in packages if not is_installed(name)]
    if training.push_to_hub and not (training.hub_token or get_token()):
        missing.append("`push_to_hub: true`: run `hf auth login`")
    is_sent = "wandb" in (training.report_to or []) and is_installed("wandb")
    if is_sent and not _has_wandb_key(training.wandb_mode):
        missing.append("`report_to: wandb`: run `wandb login`, or set `wandb_mode: offline`")
    if missing:
        raise Failed("\n".join(missing))
    if not Path(model_name(recipe.model_args)).exists() and not get_token():
        yield "not logged in to the Hub: gated models and private data need `hf auth login`"
    used = sorted({name for name, _, _ in packages})
    yield f"installed, as this recipe needs: {', '.join(used)}" if used else "this recipe needs no extra package"


def _packages(recipe: RecipeResult, sharding: Sharding) -> Iterator[tuple[str, str, str]]:
    """Import name, what needs it, and how to install it."""
    arguments, training = recipe.model_args, recipe.training
    optim: str = getattr(training.optim, "value", training.optim)
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
    if sharding.is_deepspeed:
        yield "deepspeed", f"the strategy {sharding.strategy}", "pip install deepspeed"
    attention = arguments.attn_implementation or ""
    if attention.startswith("flash_attention"):
        name = {"flash_attention_3": "flash_attn_interface"}.get(attention, "flash_attn")
        yield name, f"`attn_implementation: {attention}`", "pip install flash-attn"
    for name in training.report_to or []:
        if name in ("wandb", "trackio", "tensorboard", "mlflow", "comet_ml", "neptune", "clearml", "swanlab"):
            yield name, f"`report_to: {name}`", f"pip install {name}"


def _has_wandb_key(mode: str | None) -> bool:
    """Whether wandb has a key, or needs none."""
    import wandb

    return (mode or os.environ.get("WANDB_MODE")) in ("offline", "disabled") or wandb.api.api_key is not None
