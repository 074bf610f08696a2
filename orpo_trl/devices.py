"""Devices: what GPUs can do, how many this machine has, and which one a name stands for."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import psutil
import torch

if TYPE_CHECKING:
    from accelerate import PartialState

MIB = 2**20


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: words of torch's name for it.
        peak_flops: dense 16-bit matrix products summed in fp32, FLOP/s. bf16, but fp16 where there is no bf16.
        memory: bytes, as nvidia-smi or rocm-smi reports the total.
        source: of `peak_flops`.
    """

    name: str
    peak_flops: float
    memory: int
    source: str


# Where several fit a name, the first one counts: special cards stand before those whose words they also have. Makers
# print most peaks with sparsity: twice the dense peaks given here. GeForce cards sum in fp32 at half their speed.
_SHEET = "data sheet"
_AMPERE, _ADA, _BLACKWELL = "GA102 whitepaper", "Ada whitepaper", "RTX Blackwell whitepaper"
DEVICES = {
    device.name: device
    for device in (
        Device("A100 40GB", 312e12, 40960 * MIB, f"A100 {_SHEET}"),
        Device("A100 80GB", 312e12, 81920 * MIB, f"A100 {_SHEET}"),
        Device("A100 64GB", 312e12, 65536 * MIB, "as the A100; a card of the Leonardo computer"),
        Device("A800", 312e12, 81920 * MIB, f"A800 {_SHEET}"),
        Device("H100 PCIe", 756e12, 81559 * MIB, f"H100 {_SHEET}"),
        Device("H100 NVL", 835e12, 95830 * MIB, f"H100 {_SHEET}"),
        Device("H100 64GB", 989e12, 65247 * MIB, "as the H100 SXM; a card of the MareNostrum computer"),
        Device("H100", 989e12, 81559 * MIB, f"H100 {_SHEET}, SXM"),
        Device("H800", 989e12, 81559 * MIB, f"H800 {_SHEET}, SXM"),
        Device("H200 NVL", 835e12, 143771 * MIB, f"H200 {_SHEET}"),
        Device("H200", 989e12, 143771 * MIB, f"H200 {_SHEET}, SXM"),
        Device("H20", 148e12, 97871 * MIB, f"H20 {_SHEET}"),
        Device("GH200", 989e12, 97871 * MIB, f"GH200 {_SHEET}; 96 GB"),
        Device("B200", 2250e12, 183359 * MIB, f"HGX B200 {_SHEET}"),
        Device("B300", 2250e12, 275040 * MIB, f"HGX B300 {_SHEET}"),
        Device("GB200", 2500e12, 189471 * MIB, f"GB200 NVL72 {_SHEET}, of one GPU"),
        Device("A10G", 70e12, 23028 * MIB, f"A10G {_SHEET}"),
        Device("A10", 125e12, 23028 * MIB, f"A10 {_SHEET}"),
        Device("A30", 165e12, 24576 * MIB, f"A30 {_SHEET}"),
        Device("A40", 149.7e12, 46068 * MIB, f"A40 {_SHEET}"),
        Device("L40S", 362e12, 46068 * MIB, f"L40S {_SHEET}"),
        Device("L40", 181e12, 46068 * MIB, f"L40 {_SHEET}"),
        Device("L4", 121e12, 23034 * MIB, f"L4 {_SHEET}"),
        Device("T4", 65e12, 15360 * MIB, f"T4 {_SHEET}; fp16"),
        Device("V100 32GB", 125e12, 32768 * MIB, f"V100 {_SHEET}, SXM2; fp16"),
        Device("V100 16GB", 125e12, 16384 * MIB, f"V100 {_SHEET}, SXM2; fp16"),
        Device("RTX PRO 6000", 503.8e12, 97887 * MIB, f"{_BLACKWELL} for professional cards"),
        Device("RTX 6000 Ada", 364.2e12, 49140 * MIB, f"{_ADA} for professional cards"),
        Device("RTX A6000", 154.8e12, 49140 * MIB, f"{_AMPERE}, appendix on the RTX A6000"),
        Device("RTX 5090", 209.5e12, 32607 * MIB, _BLACKWELL),
        Device("RTX 4090 Laptop", 82.5e12, 16376 * MIB, f"{_ADA}: 9,728 cores, scaled from the RTX 4090"),
        Device("RTX 4090 D", 147.1e12, 24564 * MIB, f"{_ADA}: 14,592 cores, scaled from the RTX 4090"),
        Device("RTX 4090", 165.2e12, 24564 * MIB, _ADA),
        Device("RTX 4080", 97.5e12, 16376 * MIB, _ADA),
        Device("RTX 3090 Ti", 80e12, 24564 * MIB, _AMPERE),
        Device("RTX 3090", 71e12, 24576 * MIB, _AMPERE),
        Device("MI300X", 1307.4e12, 196592 * MIB, f"AMD Instinct MI300X {_SHEET}"),
    )
}
# "MIG 3g.40gb": 3 of 7 parts of a GPU, with 40 GB.
_MIG = re.compile(r"\bMIG (\d)g\.(\d+)gb", re.IGNORECASE)
_MIG_PARTS = 7


def find_device(name: str, memory: int | None = None) -> Device | None:
    """The device of `DEVICES` that torch calls `name`, such as 'NVIDIA A100-SXM4-80GB'; None if it is not listed.

    Of a part of a GPU ('… MIG 3g.40gb'), the share of its peak.

    Args:
        memory: bytes of the card itself, where there is one; some cards of one name have more than others.
    """
    part = _MIG.search(name)
    whole = _MIG.sub("", name)
    words = set(re.split(r"[^A-Za-z0-9]+", re.sub(r"(?<=[A-Z]\d00)(?=-)", " ", whole)))
    # Names such as "Tesla V100-SXM2-32GB" and "NVIDIA A100-SXM-64GB" say the memory, others are told apart by it.
    fitting = [device for device in DEVICES.values() if words.issuperset(device.name.split())]
    if not fitting and memory is not None:
        named = [device for device in DEVICES.values() if words.issuperset(re.sub(r" \d+GB", "", device.name).split())]
        fitting = sorted(named, key=lambda device: abs(device.memory - memory))
    if not fitting:
        return None
    found = fitting[0]
    if part:
        share = int(part[1]) / _MIG_PARTS
        size = int(part[2]) * 10**9 if memory is None else memory
        return replace(found, name=f"{found.name} MIG {part[1]}g", peak_flops=found.peak_flops * share, memory=size)
    return found if memory is None else replace(found, memory=memory)


def find_cuda_device(device: torch.device | int = 0) -> Device | None:
    """The known figures of a GPU of this machine, with the memory that the card itself reports."""
    properties = torch.cuda.get_device_properties(device)
    return find_device(properties.name, properties.total_memory)


def named_device(name: str) -> Device:
    """The device of `DEVICES` that a person calls `name`: 'h100', 'A100-80GB'.

    Raises:
        ValueError: listing the known names.
    """
    plain = "".join(filter(str.isalnum, name)).lower()
    for key, device in DEVICES.items():
        if key.replace(" ", "").lower() == plain:
            return device
    raise ValueError(f"--gpu: expected one of {', '.join(DEVICES)}, got {name!r}")


def cpu_memory() -> int:
    """Bytes of memory that this machine has, or the container or the job that this process is in."""
    limits = [psutil.virtual_memory().total]
    for file in _memory_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")):
        with suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(file.read_text()))
    return min(limits)


def _memory_limits(own: Path, root: Path) -> Iterator[Path]:
    """Files that limit the memory of this process: those of its control group and of all above it.

    Args:
        own: the groups of this process, a line each: `0::/path`, or of version 1 `4:memory:/path`.
        root: where the groups are.
    """
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            top, name = (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
            if controllers in ("", "memory"):
                group = PurePosixPath(path)
                yield from (top / str(part).lstrip("/") / name for part in (group, *group.parents))


def count_gpus() -> int:
    """Accelerators of this machine."""
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def this_process(**options: Any) -> "PartialState":
    """This process among those of `accelerate launch`, also on a CPU.

    Left to itself, accelerate looks for the backend of a GPU there, finds none, and each process takes itself for the
    only one.

    Args:
        options: of `PartialState`.
    """
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available(), **options)


def torch_device(name: str | None = None) -> torch.device:
    """torch's device of that name. Default: this machine's accelerator, or its CPU.

    Raises:
        ValueError: if torch cannot use it.
    """
    if name is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled for a device
        raise ValueError(f"--device: torch cannot use {name!r}: {str(error).splitlines()[0]}") from error
    return torch.device(name)
