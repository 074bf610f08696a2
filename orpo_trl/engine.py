"""What shards a run: the recipe's engine, the shipped accelerate configs, and the command line that starts either."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from orpo_trl.shipped import RECIPES, RUN_SCRIPT, relative

DEEPSPEED = ("zero2", "zero3")
ENGINES = (*DEEPSPEED, "fsdp2", "ddp")


def resolve_deepspeed(deepspeed: str | dict | None) -> str | dict | None:
    """What the recipe's `deepspeed` stands for in this process.

    `zero2` and `zero3` name files of recipes/deepspeed/. An engine of the accelerate config that the run was launched
    with wins over the recipe's, and a run of one process has nothing to shard.
    """
    if deepspeed not in DEEPSPEED:
        return deepspeed
    launched = any(os.environ.get(f"ACCELERATE_USE_{engine}") == "true" for engine in ("DEEPSPEED", "FSDP"))
    if launched or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    return str(RECIPES / "deepspeed" / f"{deepspeed}.json")


def start_deepspeed_on_cpu() -> None:
    """Open DeepSpeed's communication, which accelerate does for accelerators alone.

    Without it, DeepSpeed counts one process.
    """
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


@dataclass(frozen=True)
class Launch:
    """What `orpo-trl train` was asked for. None: left to accelerate, which takes every GPU of this machine.

    Attributes:
        engine: one of `ENGINES`, or an accelerate config file; None for the recipe's own.
        num_processes: GPUs of all machines together.
        num_machines, machine_rank, main_process_ip, main_process_port: as in `accelerate launch`.
    """

    engine: str | None = None
    num_processes: int | None = None
    num_machines: int = 1
    machine_rank: int | None = None
    main_process_ip: str | None = None
    main_process_port: int | None = None


def launch_command(
    launch: Launch, recipe: str, overrides: list[str], own_engine: str | dict | None, gpus: int
) -> list[str]:
    """The `accelerate launch` command line of a run.

    Args:
        launch: what was asked for.
        recipe: path of the recipe.
        overrides: passed on as they are.
        own_engine: the recipe's `deepspeed`; other than `DEEPSPEED`, the run finds it in the recipe.
        gpus: of this machine; 0 for a CPU.

    Raises:
        ValueError: naming the flags that are missing or do not fit together.
    """
    own_engine = own_engine if own_engine in DEEPSPEED else None
    _check(launch, own_engine, gpus)
    engine = launch.engine
    if engine is None and (launch.num_machines > 1 or (not gpus and (launch.num_processes or 1) > 1)):
        # Neither several machines nor several processes on a CPU start without a config.
        engine = own_engine
    command = [_accelerate(), "launch"]
    if engine == "ddp":
        command += ["--multi_gpu"]
        overrides = [*overrides, "--deepspeed", "null"]
    elif engine is not None:
        command += ["--config_file", str(_config_file(engine, launch, gpus))]
        if launch.num_processes is None and gpus and engine in ENGINES:
            command += ["--num_processes", str(gpus)]
    for name in ("num_processes", "machine_rank", "main_process_ip", "main_process_port"):
        value = getattr(launch, name)
        if value is not None:
            command += [f"--{name}", str(value)]
    if launch.num_machines > 1:
        command += ["--num_machines", str(launch.num_machines)]
    return [*command, str(relative(RUN_SCRIPT)), recipe, *overrides]


def _check(launch: Launch, own_engine: str | None, gpus: int) -> None:
    several = launch.num_machines > 1
    for name in ("num_processes", "num_machines"):
        value = getattr(launch, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    missing = [
        f"--{name}"
        for name in ("num_processes", "machine_rank", "main_process_ip")
        if several and getattr(launch, name) is None
    ]
    if missing:
        raise ValueError(
            f"--num_machines {launch.num_machines} also needs {', '.join(missing)}: --num_processes counts the GPUs of "
            "all machines, --machine_rank is this one's number from 0, --main_process_ip the address of rank 0."
        )
    if several and launch.num_processes % launch.num_machines:
        raise ValueError(
            f"--num_processes {launch.num_processes} is not a multiple of --num_machines {launch.num_machines}."
        )
    if several and not 0 <= launch.machine_rank < launch.num_machines:
        raise ValueError(f"--machine_rank must be from 0 to {launch.num_machines - 1}, got {launch.machine_rank}.")
    if launch.engine is not None and launch.engine not in ENGINES and not Path(launch.engine).is_file():
        raise ValueError(f"--engine: expected {', '.join(ENGINES)} or an accelerate config, got {launch.engine!r}.")
    processes = launch.num_processes or 1
    if gpus and not several and processes > gpus and launch.engine in (None, *ENGINES):
        raise ValueError(f"--num_processes {processes}: this machine has {gpus} GPUs.")
    engine = launch.engine or own_engine
    if launch.engine == "ddp" and (processes if not gpus else launch.num_processes or gpus) < 2:
        raise ValueError("--engine ddp needs two processes or more; a single one starts without --engine.")
    if not gpus and processes > 1 and engine in (None, "ddp"):
        raise ValueError("On a CPU, several processes start under --engine zero2, zero3 or fsdp2 alone.")


def _config_file(engine: str, launch: Launch, gpus: int) -> Path:
    if engine not in ENGINES:
        return Path(engine)
    folder = RECIPES / "accelerate"
    if not gpus:
        return relative(folder / f"cpu_{engine}.yaml")
    return relative(folder / ("multi_node.yaml" if launch.num_machines > 1 and engine == "zero3" else f"{engine}.yaml"))


def _accelerate() -> str:
    """The accelerate of this environment, by name alone where the shell would find the same one."""
    own, found = Path(sys.executable).parent / "accelerate", shutil.which("accelerate")
    return str(own) if own.exists() and found != str(own) else "accelerate"


def count_gpus() -> int:
    """Accelerators of this machine."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0
