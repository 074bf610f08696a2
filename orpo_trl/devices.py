"""Devices: what GPUs can do, how many this machine has, and which one a name stands for."""

import re
from dataclasses import dataclass

import torch

MIB = 2**20


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: words of torch's name for it.
        peak_flops: dense bf16 matrix products summed in fp32, FLOP/s, from the maker's data sheet.
        memory: bytes, as nvidia-smi reports the total.
    """

    name: str
    peak_flops: float
    memory: int


# Where several fit a name, the first one counts.
DEVICES = {
    device.name: device
    for device in (
        Device("A100 40GB", 312e12, 40960 * MIB),
        Device("A100 80GB", 312e12, 81920 * MIB),
        Device("H100 PCIe", 756e12, 81559 * MIB),
        Device("H100 NVL", 835e12, 95830 * MIB),
        Device("H100", 989e12, 81559 * MIB),
        Device("H200", 989e12, 143771 * MIB),
        Device("B200", 2250e12, 183359 * MIB),
        Device("L40S", 362e12, 46068 * MIB),
        Device("RTX 4090", 165e12, 24564 * MIB),
        Device("RTX 3090", 71e12, 24576 * MIB),
    )
}


def find_device(name: str) -> Device | None:
    """The device of `DEVICES` that torch calls `name`, such as 'NVIDIA A100-SXM4-80GB'; None if it is not listed."""
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    return next((device for device in DEVICES.values() if words.issuperset(device.name.split())), None)


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


def count_gpus() -> int:
    """Accelerators of this machine."""
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


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
