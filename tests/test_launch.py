import json
from pathlib import Path

import pytest

from orpo_trl.launch import Launch, launch_command, resolve_deepspeed
from orpo_trl.paths import RECIPES, RUN_SCRIPT


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(RECIPES.parent)


def test_strategy_of_the_recipe_is_for_several_processes(monkeypatch):
    assert resolve_deepspeed("zero3") is None  # one process has nothing to shard
    monkeypatch.setenv("WORLD_SIZE", "4")
    for stage in (2, 3):
        path = resolve_deepspeed(f"zero{stage}")
        assert isinstance(path, str)
        config = json.loads(Path(path).read_text())
        assert config["zero_optimization"]["stage"] == stage
    assert resolve_deepspeed("my.json") == "my.json"
    assert resolve_deepspeed(None) is None


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP"])
def test_accelerate_config_wins_over_the_strategy_of_the_recipe(monkeypatch, engine):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    assert resolve_deepspeed("zero3") is None


CONFIG = "--quiet --config_file recipes/accelerate"
MULTI_NODE = f"{CONFIG}/multi_node.yaml"
RUN = "scripts/run_orpo.py r.yaml --beta 1"
TWO_HOSTS = "--machine_rank 1 --main_process_ip host --main_process_port 29500 --num_machines 2"
ZERO3, ZERO2, JSON = {"deepspeed": "zero3"}, {"deepspeed": "zero2"}, {"deepspeed": "my.json"}


@pytest.mark.parametrize(
    ("launch", "own", "gpus", "expected"),
    [
        (Launch(), ZERO3, 8, f"{CONFIG}/ddp.yaml --num_processes 8 {RUN}"),
        (Launch(num_processes=4), ZERO3, 8, f"{CONFIG}/ddp.yaml --num_processes 4 {RUN}"),
        (Launch(num_processes=1), ZERO3, 8, f"{CONFIG}/single.yaml --num_processes 1 --gpu_ids 0 {RUN}"),
        (Launch(), {}, 1, f"{CONFIG}/single.yaml --num_processes 1 {RUN}"),
        (Launch("zero2"), {}, 8, f"{CONFIG}/zero2.yaml --num_processes 8 {RUN}"),
        (Launch("fsdp2", 2), JSON, 8, f"{CONFIG}/fsdp2.yaml --num_processes 2 {RUN} --deepspeed null"),
        (Launch("zero3_offload", 1), {}, 1, f"{CONFIG}/zero3_offload.yaml --num_processes 1 {RUN}"),
        (Launch("ddp"), ZERO3, 8, f"{CONFIG}/ddp.yaml --num_processes 8 {RUN} --deepspeed null"),
        (Launch("zero3"), {"fsdp": "full_shard"}, 8, f"{CONFIG}/zero3.yaml --num_processes 8 {RUN} --fsdp null"),
        (Launch("r.yaml"), ZERO3, 8, f"--quiet --config_file r.yaml {RUN} --deepspeed null"),
        (Launch(num_processes=2), ZERO2, 0, f"{CONFIG}/cpu_zero2.yaml --num_processes 2 {RUN}"),
        (Launch(), ZERO3, 0, f"{CONFIG}/single.yaml --num_processes 1 {RUN}"),
        (Launch("zero3", 16, 2, 1, "host", 29500), {}, 8, f"{MULTI_NODE} --num_processes 16 {TWO_HOSTS} {RUN}"),
        (Launch(None, 16, 2, 1, "host", 29500), ZERO3, 8, f"{MULTI_NODE} --num_processes 16 {TWO_HOSTS} {RUN}"),
        (Launch(None, 2, 2, 1, "host", 29500), {}, 1, f"{CONFIG}/ddp.yaml --num_processes 2 {TWO_HOSTS} {RUN}"),
        (Launch(None, 8, 1, 0, "host", 29500), {}, 8, f"{CONFIG}/ddp.yaml --num_processes 8 --machine_rank 0 "
         f"--main_process_ip host --main_process_port 29500 {RUN}"),
    ],
)  # fmt: skip
def test_command_line(launch, own, gpus, expected, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if launch.engine == "r.yaml":
        monkeypatch.chdir(tmp_path)
        (tmp_path / "r.yaml").write_text("distributed_type: MULTI_GPU\n")
        expected = expected.replace("scripts/run_orpo.py", str(RUN_SCRIPT))
    command = launch_command(launch, "r.yaml", ["--beta", "1"], own, gpus)
    assert Path(command[0]).name == "accelerate"
    assert " ".join(command[1:]) == f"launch {expected}"
    assert Path(command[command.index("--config_file") + 1]).is_file()


@pytest.mark.parametrize(
    ("launch", "own", "gpus", "starts"),
    [
        (Launch(), ZERO3, 8, ("multi_gpu", 8, 1)), (Launch(num_processes=4), {}, 8, ("multi_gpu", 4, 1)),
        (Launch(num_processes=1), {}, 8, (None, 1, 1)), (Launch(), {}, 1, (None, 1, 1)),
        (Launch("ddp"), {}, 8, ("multi_gpu", 8, 1)), (Launch("zero2"), {}, 8, ("use_deepspeed", 8, 1)),
        (Launch("fsdp2", 2), {}, 8, ("use_fsdp", 2, 1)), (Launch("zero3_offload", 1), {}, 8, ("use_deepspeed", 1, 1)),
        (Launch(None, 2, 2, 1, "host"), {}, 1, ("multi_gpu", 2, 2)),
        (Launch(None, 16, 2, 1, "host"), ZERO3, 8, ("use_deepspeed", 16, 2)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("default", [None, "distributed_type: 'NO'\nnum_processes: 1\n", "distributed_type: MULTI_GPU\n"
                         "num_processes: 3\nmixed_precision: fp16\n"])  # fmt: skip
def test_accelerate_starts_what_was_asked_for_whatever_its_defaults(
    launch, own, gpus, starts, default, tmp_path, monkeypatch
):
    """accelerate parses the command line, on a machine with other defaults. The number of GPUs is faked."""
    import torch
    from accelerate.commands import launch as accelerate_launch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    file = tmp_path / "default_config.yaml"
    if default:
        file.write_text(
            "compute_environment: LOCAL_MACHINE\nuse_cpu: false\nmachine_rank: 0\nnum_machines: 1\n" + default
        )
    monkeypatch.setattr(accelerate_launch, "default_config_file", str(file))
    command = launch_command(launch, "r.yaml", [], own, gpus)
    args = accelerate_launch.launch_command_parser().parse_args(command[2:])
    args, _, _ = accelerate_launch._validate_launch_command(args)
    engine = next((name for name in ("use_deepspeed", "use_fsdp", "multi_gpu") if getattr(args, name)), None)
    assert (engine, args.num_processes, args.num_machines) == starts
    assert args.mixed_precision == "no"  # the recipe's `bf16` decides
    assert args.training_script.endswith("run_orpo.py")
    if args.num_machines > 1:
        assert (args.machine_rank, args.main_process_ip) == (1, "host")


@pytest.mark.parametrize(
    ("launch", "own", "gpus", "message"),
    [
        (Launch(num_machines=2), {}, 8, "also needs --num_processes, --machine_rank, --main_process_ip"),
        (Launch(None, 15, 2, 0, "h"), {}, 8, "--num_processes 15 is not a multiple of --num_machines 2"),
        (Launch(None, 16, 2, 2, "h"), {}, 8, "--machine_rank must be from 0 to 1, got 2"),
        (Launch(machine_rank=5), {}, 8, "--machine_rank: these are for --num_machines 2 or more"),
        (
            Launch("zero4"),
            {},
            8,
            "--engine: expected zero2, zero3, zero3_offload, fsdp2, ddp or an accelerate config, got",
        ),
        (Launch("recipes/quickstart.yaml"), {}, 8, "or an accelerate config, got 'recipes/quickstart.yaml'"),
        (Launch(num_processes=9), {}, 8, "this machine has 8 GPUs"),
        (Launch("ddp", 1), {}, 8, "--engine ddp needs two processes or more"),
        (Launch("ddp", 2), {}, 0, "On a CPU, processes start under .* not under ddp"),
        (Launch("zero3_offload"), {}, 0, "On a CPU, processes start under .* not under zero3_offload"),
        (Launch(num_processes=2), {}, 0, "On a CPU, processes start under .* and the recipe names none"),
        (Launch(num_processes=0), {}, 0, "--num_processes must be at least 1, got 0"),
    ],
)
def test_wrong_flags_are_named(launch, own, gpus, message):
    with pytest.raises(ValueError, match=message):
        launch_command(launch, "r.yaml", [], own, gpus)
