"""How a run starts: distributed strategies, the shipped accelerate configs, and the command line of a launch."""

import os
import runpy
import shutil
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_trl import exit_codes, interruptions
from orpo_trl.network import DEFAULT_PORT
from orpo_trl.paths import RECIPES, RUN_SCRIPT, relative
from orpo_trl.plain_files import read_text
from orpo_trl.watch import Machines
from orpo_trl.yaml_text import from_yaml_of_others


@dataclass(frozen=True)
class Strategy:
    """How processes share a model.

    Attributes:
        shards_state: each process holds a share of the gradients and the optimizer state, else all of them.
        shards_weights: each process holds a share of the weights, else all of them.
        is_deepspeed: DeepSpeed shards, else torch.
        is_offloaded: weights and optimizer state stay in CPU memory.
    """

    shards_state: bool = False
    shards_weights: bool = False
    is_deepspeed: bool = False
    is_offloaded: bool = False


STRATEGIES = {
    "single": Strategy(),  # one process
    "zero2": Strategy(shards_state=True, is_deepspeed=True),
    "zero3": Strategy(shards_state=True, shards_weights=True, is_deepspeed=True),
    "zero3_offload": Strategy(shards_state=True, shards_weights=True, is_deepspeed=True, is_offloaded=True),
    "fsdp2": Strategy(shards_state=True, shards_weights=True),
    "ddp": Strategy(),
}
# The strategies that `--engine` names.
ENGINES = tuple(name for name in STRATEGIES if name != "single")
# The strategies that a recipe names by `deepspeed`.
DEEPSPEED = ("zero2", "zero3")
_OF_SEVERAL = ("machine_rank", "main_process_ip", "main_process_port")


def resolve_deepspeed(deepspeed: str | dict | None) -> str | dict | None:
    """The DeepSpeed config that the recipe's `deepspeed` means in this process, or None.

    `zero2` and `zero3` name files of recipes/deepspeed/. The strategy of the accelerate config that launched this
    process wins over the recipe's. A run of one process has nothing to shard.
    """
    if deepspeed not in DEEPSPEED:
        return deepspeed
    launched = any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("DEEPSPEED", "FSDP"))
    if launched or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    return str(RECIPES / "deepspeed" / f"{deepspeed}.json")


def start_deepspeed_on_cpu() -> None:
    """Open DeepSpeed's communication, which accelerate opens on accelerators only.

    Without it, DeepSpeed counts one process.
    """
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


@dataclass(frozen=True)
class Launch:
    """The launch options of `orpo-trl train`.

    Attributes:
        engine: one of `ENGINES`, or an accelerate config file; None for the recipe's own strategy.
        num_processes: GPUs of all machines together; None for all GPUs of this machine.
        num_machines, machine_rank, main_process_ip, main_process_port: as in `accelerate launch`.
    """

    engine: str | None = None
    num_processes: int | None = None
    num_machines: int = 1
    machine_rank: int | None = None
    main_process_ip: str | None = None
    main_process_port: int | None = None


def launch_command(launch: Launch, recipe: str, overrides: list[str], own: dict[str, Any], gpus: int) -> list[str]:
    """The `accelerate launch` command line of a run.

    It always names a config file and the number of processes. Otherwise the defaults that the user once gave to
    `accelerate config` would decide.

    Args:
        launch: the launch options.
        recipe: path of the recipe.
        overrides: passed on as they are.
        own: the recipe's `deepspeed` and `fsdp`; `launch.engine` replaces them.
        gpus: GPUs of this machine; 0 means that the run is on a CPU.

    Raises:
        ValueError: naming the flags that are missing or do not fit together.
    """
    named = own.get("deepspeed") if own.get("deepspeed") in DEEPSPEED else None
    processes = max(gpus, 1) if launch.num_processes is None else launch.num_processes
    engine = launch.engine or _default_engine(launch, named, processes, gpus)
    _check(launch, engine, processes, gpus)
    if launch.engine is not None:
        overrides = [*overrides, *(word for key, value in own.items() if value for word in (f"--{key}", "null"))]
    command = [_accelerate(), "launch", "--quiet", "--config_file", str(_config_file(engine, launch, gpus))]
    if launch.engine in (None, *ENGINES) or launch.num_processes is not None:
        command += ["--num_processes", str(processes)]
    if processes == 1 and gpus > 1:
        # A process that sees several GPUs would spread each batch over all of them.
        command += ["--gpu_ids", os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]]
    for name in ("machine_rank", "main_process_ip", "main_process_port"):
        value = getattr(launch, name)
        if value is not None:
            command += [f"--{name}", str(value)]
    if launch.num_machines > 1:
        command += ["--num_machines", str(launch.num_machines)]
    return [*command, str(relative(RUN_SCRIPT)), recipe, *overrides]


def find_own_programs() -> None:
    """Let this process and its children find the programs beside the interpreter, also where nobody has activated its
    environment: DeepSpeed calls ninja."""
    own, path = str(Path(sys.executable).parent), os.environ.get("PATH")
    if own not in (path or "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, (own, path)))


def is_one_process(launch: Launch, gpus: int) -> bool:
    """Whether a launch is one process, which needs no launcher: see `run_here`.

    On a machine of several GPUs it needs one: this process has counted them, and cannot hide all but one any more.
    """
    processes = max(gpus, 1) if launch.num_processes is None else launch.num_processes
    return launch.engine is None and launch.num_machines == 1 and processes == 1 and gpus <= 1


def run_here(arguments: list[str]) -> int:
    """Run scripts/run_orpo.py in this process, which listens to signals already, and return its exit status.

    Args:
        arguments: a recipe and overrides.
    """
    try:
        script = runpy.run_path(str(RUN_SCRIPT))
        with interruptions.reported():
            script["main"](arguments)
    except Exception:  # the caller takes a ValueError for wrong input
        traceback.print_exc()
        return exit_codes.FAILED
    return exit_codes.DONE


def machines(launch: Launch) -> Machines:
    """The machines of a launch that `launch_command` has taken."""
    if launch.num_machines == 1:
        return Machines()
    return Machines(
        launch.num_machines,
        launch.machine_rank or 0,
        launch.main_process_ip or "",
        launch.main_process_port or DEFAULT_PORT,
    )


def _default_engine(launch: Launch, named: str | None, processes: int, gpus: int) -> str:
    """The strategy of the accelerate config if `--engine` is not given.

    On GPUs this is ddp, which only starts the processes: the recipe's `deepspeed` then shards by itself. On a CPU, and
    for zero3 on several machines, the accelerate config must name DeepSpeed.
    """
    if processes == 1:
        return "single"
    if not gpus or (launch.num_machines > 1 and named == "zero3"):
        return named or "ddp"
    return "ddp"


def _check(launch: Launch, engine: str, processes: int, gpus: int) -> None:
    several = launch.num_machines > 1
    for name in ("num_processes", "num_machines"):
        value = getattr(launch, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    if engine not in ("single", *ENGINES) and not _is_accelerate_config(Path(engine)):
        raise ValueError(f"--engine: expected {', '.join(ENGINES)} or an accelerate config, got {engine!r}.")
    _check_machines(launch)
    if launch.engine == "ddp" and processes < 2:
        raise ValueError("--engine ddp needs two processes or more; a single one starts without --engine.")
    if engine not in ("single", *ENGINES):
        return
    if not several and gpus and processes > gpus:
        raise ValueError(f"--num_processes {processes}: this machine has {gpus} GPU{'s' if gpus > 1 else ''}.")
    if not gpus and engine != "single" and not _config_file(engine, launch, gpus).is_file():
        asked = f"not under {engine}" if launch.engine else "and the recipe names none of them"
        raise ValueError(f"On a CPU, processes start under --engine zero2, zero3 or fsdp2 only, {asked}.")


def _check_machines(launch: Launch) -> None:
    if launch.num_machines < 2:
        given = [f"--{name}" for name in _OF_SEVERAL if getattr(launch, name) is not None and launch.machine_rank != 0]
        if given:
            raise ValueError(f"{', '.join(given)}: these are for --num_machines 2 or more.")
        return
    processes, rank = launch.num_processes, launch.machine_rank
    if processes is None or rank is None or launch.main_process_ip is None:
        missing = [f"--{name}" for name in ("num_processes", *_OF_SEVERAL[:2]) if getattr(launch, name) is None]
        raise ValueError(
            f"--num_machines {launch.num_machines} also needs {', '.join(missing)}: --num_processes counts the GPUs of "
            "all machines, --machine_rank is this one's number from 0, --main_process_ip the address of rank 0."
        )
    if processes % launch.num_machines:
        raise ValueError(f"--num_processes {processes} is not a multiple of --num_machines {launch.num_machines}.")
    if not 0 <= rank < launch.num_machines:
        raise ValueError(f"--machine_rank must be from 0 to {launch.num_machines - 1}, got {rank}.")


def _is_accelerate_config(path: Path) -> bool:
    try:
        config = from_yaml_of_others(read_text(path))
    except (OSError, ValueError):  # no file, no text, no YAML
        return False
    return isinstance(config, dict) and "distributed_type" in config


def _config_file(engine: str, launch: Launch, gpus: int) -> Path:
    if engine not in ("single", *ENGINES):
        return Path(engine)
    folder = RECIPES / "accelerate"
    if not gpus and engine != "single":
        return relative(folder / f"cpu_{engine}.yaml")
    return relative(folder / ("multi_node.yaml" if launch.num_machines > 1 and engine == "zero3" else f"{engine}.yaml"))


def _accelerate() -> str:
    """The accelerate of this environment: its name if the shell finds the same one, else its path."""
    own, found = Path(sys.executable).parent / "accelerate", shutil.which("accelerate")
    return str(own) if own.exists() and found != str(own) else "accelerate"
