"""GPUs by the names that torch and people give them."""

import psutil
import pytest
import torch

from orpo_trl import devices
from orpo_trl.devices import DEVICES, find_device, named_device, torch_device

# As nvidia-smi, rocm-smi and torch print them.
NAMES = {
    "NVIDIA A100-SXM4-40GB": "A100 40GB", "NVIDIA A100-PCIE-40GB": "A100 40GB", "NVIDIA A100 80GB PCIe": "A100 80GB",
    "NVIDIA A100-SXM4-80GB": "A100 80GB", "NVIDIA A100-SXM-64GB": "A100 64GB", "NVIDIA A800-SXM4-80GB": "A800",
    "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H100 PCIe": "H100 PCIe", "NVIDIA H100 NVL": "H100 NVL",
    "NVIDIA H100 64GB HBM2": "H100 64GB", "NVIDIA H800": "H800", "NVIDIA H200": "H200", "NVIDIA H200 NVL": "H200 NVL",
    "NVIDIA H20": "H20", "NVIDIA GH200 480GB": "GH200", "NVIDIA B200": "B200", "NVIDIA B300 SXM6 AC": "B300",
    "NVIDIA GB200": "GB200", "NVIDIA A10": "A10", "NVIDIA A10G": "A10G", "NVIDIA A30": "A30", "NVIDIA A40": "A40",
    "NVIDIA L4": "L4", "NVIDIA L40": "L40", "NVIDIA L40S": "L40S", "Tesla T4": "T4",
    "Tesla V100-SXM2-16GB": "V100 16GB", "Tesla V100-SXM2-32GB": "V100 32GB", "NVIDIA RTX A6000": "RTX A6000",
    "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "RTX PRO 6000", "NVIDIA GeForce RTX 5090": "RTX 5090",
    "NVIDIA GeForce RTX 4090": "RTX 4090", "NVIDIA GeForce RTX 4090 D": "RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU": "RTX 4090 Laptop", "NVIDIA GeForce RTX 4080": "RTX 4080",
    "NVIDIA GeForce RTX 3090": "RTX 3090", "NVIDIA GeForce RTX 3090 Ti": "RTX 3090 Ti",
    "AMD Instinct MI300X": "MI300X", "AMD Instinct MI300X OAM": "MI300X",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_device_is_found_by_the_name_that_torch_gives_it(name):
    assert find_device(name) is DEVICES[NAMES[name]]


def test_each_device_is_found_and_has_a_source():
    assert {find_device(name) for name in NAMES} == set(DEVICES.values())
    assert all(device.source for device in DEVICES.values())


def test_memory_is_the_cards_own_where_there_is_one():
    assert find_device("NVIDIA GH200 144G HBM3e", 150 * 10**9).memory == 150 * 10**9
    assert find_device("NVIDIA V100", 33 * 10**9).name == "V100 32GB"  # a name without it
    assert find_device("NVIDIA A100", 42 * 10**9).name == "A100 40GB"


def test_part_of_a_gpu_has_its_share():
    part = find_device("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 42_000_000_000)
    assert (part.peak_flops, part.memory) == (pytest.approx(312e12 * 3 / 7), 42_000_000_000)
    assert find_device("NVIDIA H100 80GB HBM3 MIG 1g.10gb").memory == 10**10


@pytest.mark.parametrize("name", ["NVIDIA GeForce GTX 1080", "NVIDIA GeForce RTX 2080 Ti", "Tesla P100-PCIE-16GB"])
def test_unknown_device_is_none(name):
    assert find_device(name) is None


@pytest.mark.parametrize(("name", "words"), [("h100", "H100"), ("A100-80GB", "A100 80GB"), ("rtx_4090", "RTX 4090")])
def test_device_is_found_by_the_name_that_a_person_gives_it(name, words):
    assert named_device(name) is DEVICES[words]
    with pytest.raises(ValueError, match=r"--gpu: expected one of A100 40GB, .*, got 'abacus'"):
        named_device("abacus")


def test_device_of_torch_is_one_that_torch_can_use():
    assert torch_device("cpu") == torch.device("cpu")
    assert torch.zeros(1, device=torch_device()).item() == 0
    with pytest.raises(ValueError, match="--device: torch cannot use 'abacus'"):
        torch_device("abacus")


@pytest.mark.parametrize(
    ("groups", "limited"),
    [
        ("0::/job/step\n", "job/memory.max"),  # SLURM, systemd
        ("0::/\n", "memory.max"),  # a container
        ("5:cpu:/a\n4:memory:/a\n", "memory/a/memory.limit_in_bytes"),
    ],
)
def test_limit_of_a_job_or_a_container_is_found(tmp_path, groups, limited):
    (tmp_path / "own").write_text(groups)
    path = tmp_path / "root" / limited
    path.parent.mkdir(parents=True)
    path.write_text("1234\n")
    found = [file for file in devices._memory_limits(tmp_path / "own", tmp_path / "root") if file.exists()]
    assert found == [path]


def test_memory_is_at_most_that_of_the_machine():
    assert 0 < devices.cpu_memory() <= psutil.virtual_memory().total
