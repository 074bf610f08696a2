"""GPUs by the names that torch and people give them."""

import pytest
import torch

from orpo_trl.devices import DEVICES, find_device, named_device, torch_device


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_device_is_found_by_the_name_that_torch_gives_it(name, words):
    assert find_device(name) is DEVICES[words]


@pytest.mark.parametrize("name", ["NVIDIA GeForce GTX 1080", "NVIDIA GH200 480GB"])
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
