import json
from pathlib import Path

import pytest

from orpo_trl.engine import Launch, launch_command, resolve_deepspeed
from orpo_trl.shipped import RECIPES


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(RECIPES.parent)


def test_recipes_engine_is_for_several_processes(monkeypatch):
    assert resolve_deepspeed("zero3") is None  # one process has nothing to shard
    monkeypatch.setenv("WORLD_SIZE", "4")
    for stage in (2, 3):
        config = json.loads(Path(resolve_deepspeed(f"zero{stage}")).read_text())
        assert config["zero_optimization"]["stage"] == stage
    assert resolve_deepspeed("my.json") == "my.json"
    assert resolve_deepspeed(None) is None


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP"])
def test_accelerate_config_wins_over_the_recipes_engine(monkeypatch, engine):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    assert resolve_deepspeed("zero3") is None


@pytest.mark.parametrize(
    ("launch", "own", "gpus", "expected"),
    [
        (Launch(), "zero3", 8, "scripts/run_orpo.py r.yaml --beta 1"),
        (Launch(num_processes=4), "zero3", 8, "--num_processes 4 scripts/run_orpo.py r.yaml --beta 1"),
        (Launch("zero2"), None, 8, "--config_file recipes/accelerate/zero2.yaml --num_processes 8 scripts/run_orpo.py "
         "r.yaml --beta 1"),
        (Launch("fsdp2", 2), None, 8, "--config_file recipes/accelerate/fsdp2.yaml --num_processes 2 "
         "scripts/run_orpo.py r.yaml --beta 1"),
        (Launch("ddp"), "zero3", 8, "--multi_gpu scripts/run_orpo.py r.yaml --beta 1 --deepspeed null"),
        (Launch(num_processes=2), "zero2", 0, "--config_file recipes/accelerate/cpu_zero2.yaml --num_processes 2 "
         "scripts/run_orpo.py r.yaml --beta 1"),
        (Launch(), "zero3", 0, "scripts/run_orpo.py r.yaml --beta 1"),
        (Launch("zero3", 16, 2, 1, "10.0.0.1", 29500), None, 8, "--config_file recipes/accelerate/multi_node.yaml "
         "--num_processes 16 --machine_rank 1 --main_process_ip 10.0.0.1 --main_process_port 29500 --num_machines 2 "
         "scripts/run_orpo.py r.yaml --beta 1"),
        (Launch(None, 16, 2, 0, "host"), "zero3", 8, "--config_file recipes/accelerate/multi_node.yaml "
         "--num_processes 16 --machine_rank 0 --main_process_ip host --num_machines 2 scripts/run_orpo.py r.yaml "
         "--beta 1"),
    ],
)  # fmt: skip
def test_command_line(launch, own, gpus, expected):
    command = launch_command(launch, "r.yaml", ["--beta", "1"], own, gpus)
    assert Path(command[0]).name == "accelerate"
    assert " ".join(command[1:]) == f"launch {expected}"
    if "--config_file" in command:
        assert Path(command[command.index("--config_file") + 1]).is_file()


@pytest.mark.parametrize(
    ("launch", "own", "gpus", "message"),
    [
        (Launch(num_machines=2), None, 8, "also needs --num_processes, --machine_rank, --main_process_ip"),
        (Launch(None, 15, 2, 0, "h"), None, 8, "--num_processes 15 is not a multiple of --num_machines 2"),
        (Launch(None, 16, 2, 2, "h"), None, 8, "--machine_rank must be from 0 to 1, got 2"),
        (Launch("zero4"), None, 8, "--engine: expected zero2, zero3, fsdp2, ddp or an accelerate config, got 'zero4'"),
        (Launch(num_processes=9), None, 8, "this machine has 8 GPUs"),
        (Launch("ddp", 1), None, 8, "--engine ddp needs two processes or more"),
        (Launch("ddp", 2), None, 0, "On a CPU, several processes start under"),
        (Launch(num_processes=2), None, 0, "On a CPU, several processes start under"),
        (Launch(num_processes=0), None, 0, "--num_processes must be at least 1, got 0"),
    ],
)
def test_wrong_flags_are_named(launch, own, gpus, message):
    with pytest.raises(ValueError, match=message):
        launch_command(launch, "r.yaml", [], own, gpus)
