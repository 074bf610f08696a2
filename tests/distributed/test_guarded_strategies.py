"""Steps that are not finite, in two real processes under each distributed strategy."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.processes import cpu_engine, launch
from support.small import REPOSITORY, TOKENIZER, tiny_model
from transformers import AutoTokenizer

from orpo_trl.run_folder import read_record, read_trouble

pytestmark = pytest.mark.slow
JOB = REPOSITORY / "tests" / "support" / "guard_job.py"
CONFIG = {
    "train_sampling_strategy": "sequential", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
    "optim": "adamw_torch", "learning_rate": 3e-3, "lr_scheduler_type": "linear", "max_steps": 4,
}  # fmt: skip
ZEBRAS = "model.embed_tokens.weight"
SPLIT = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_tokens_per_micro_batch": 60}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """The folder of a model that gives NaN for the rows with a zebra."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    (zebra,) = tokenizer(" zebra")["input_ids"]
    model = tiny_model()
    model.model.embed_tokens.weight.data[zebra] = torch.nan
    folder = tmp_path_factory.mktemp("poisoned")
    model.save_pretrained(folder)
    return folder


def run(engine: str | None, folder, model, zebras=(), **config) -> list[dict]:
    """What each rank reports; `weights.pt` of the folder holds the weights."""
    folder.mkdir()
    job = {
        "output_dir": folder, "model": model, "rows": 40, "zebras": list(zebras), "fsdp": engine == "fsdp2",
        "whole_on_each_rank": engine in ("ddp", "zero2"), "config": {**CONFIG, **config},
    }  # fmt: skip
    launched = engine if engine in (None, "ddp") else cpu_engine(engine, folder)
    done = launch(JOB, json.dumps(job, default=str), engine=launched)
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
    return [{**rank, "printed": done.stdout + done.stderr} for rank in ranks]


@pytest.fixture(scope="module")
def one_process(poisoned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    run(None, folder, poisoned, [5], per_device_train_batch_size=4)
    return folder


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("ddp", {}),
        ("zero2", SPLIT),
        pytest.param("zero3", {}, marks=pytest.mark.long),
        ("zero3", SPLIT),
        ("fsdp2", SPLIT),
    ],
    ids=["ddp", "zero2 split", "zero3", "zero3 split", "fsdp2 split"],
)
def test_bad_row_of_one_rank_is_skipped_on_both(engine, options, poisoned, one_process, tmp_path):
    """Step 2 of 4 has the bad row; weights and learning rates are those of one process, which skips it too."""
    ranks = run(engine, tmp_path / "two", poisoned, [5], **options)
    assert [rank["ranks"] for rank in ranks] == [2, 2]
    assert {"zero3": "DEEPSPEED", "zero2": "DEEPSPEED", "fsdp2": "FSDP", "ddp": "MULTI_CPU"}[engine] in ranks[0][
        "engine"
    ]
    assert [(rank["error"], rank["steps"], rank["bad_in_a_row"]) for rank in ranks] == [(None, 4, 0)] * 2
    assert len({rank.get("digest") for rank in ranks}) == 1
    trouble = read_trouble(tmp_path / "two")
    assert {row["rank"] for row in trouble} == {0, 1}
    assert {row["row"] for row in trouble} == {4, 5, 6, 7}
    assert {row["step"] for row in trouble} == {2}
    assert [row["row"] for row in trouble if not row["is_finite"]] == [5]
    assert ranks[0]["printed"].count("Step 2: the loss is not finite. The step is not taken") == 1
    expected = torch.load(one_process / "weights.pt")
    for name, weight in torch.load(tmp_path / "two" / "weights.pt").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)
    rates = json.loads((one_process / "rank-0.json").read_text())["learning_rates"]
    assert ranks[0]["learning_rates"] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        pytest.param("ddp", SPLIT, marks=pytest.mark.long),
        pytest.param("zero2", {}, marks=pytest.mark.long),
        ("zero3", SPLIT),
        ("fsdp2", {}),
    ],
    ids=["ddp split", "zero2", "zero3 split", "fsdp2"],
)
def test_learning_rate_that_explodes_ends_both_ranks_and_leaves_finite_files(engine, options, base, tmp_path):
    rate = {"learning_rate": 1e4, "lr_scheduler_type": "constant", "max_steps": 9}
    # transformers has no plain models in the checkpoints of FSDP's shards.
    save = {"save_strategy": "steps", "save_steps": 1, "save_only_model": engine != "fsdp2"}
    ranks = run(engine, tmp_path / "two", base, **options, **rate, **save)
    assert ranks[0]["error"]
    assert ranks[0]["error"] == ranks[1]["error"]
    assert ranks[0]["steps"] < 9
    assert "finished" not in read_record(tmp_path / "two")
    saved = list((tmp_path / "two").rglob("*.safetensors"))
    assert bool(saved) == (engine != "fsdp2")
    assert all(path.parent.name.startswith("checkpoint-") for path in saved)
    assert all(weight.isfinite().all() for path in saved for weight in load_file(path).values())
    assert all(weight.isfinite().all() for weight in torch.load(tmp_path / "two" / "weights.pt").values())


@pytest.mark.parametrize("checks_overflow", [True, False])
def test_zero2_in_bf16_skips_the_step_or_the_run_ends_at_it(checks_overflow, poisoned, tmp_path):
    """DeepSpeed looks at bf16 gradients by default only, and takes a step of NaN where it does not look."""
    deepspeed = {
        "bf16": {"enabled": "auto"} | ({} if checks_overflow else {"check_grad_overflow": False}),
        "zero_optimization": {"stage": 2},
        **dict.fromkeys(("gradient_accumulation_steps", "gradient_clipping", "train_batch_size"), "auto"),
        "train_micro_batch_size_per_gpu": "auto",
    }
    ranks = run("ddp", tmp_path / "two", poisoned, [5], bf16=True, deepspeed=deepspeed)
    assert "DEEPSPEED" in ranks[0]["engine"]
    assert ranks[0]["digest"] == ranks[1]["digest"]
    assert [row["row"] for row in read_trouble(tmp_path / "two") if not row["is_finite"]] == [5]
    if checks_overflow:
        assert [(rank["error"], rank["steps"]) for rank in ranks] == [(None, 4)] * 2
        weights = torch.load(tmp_path / "two" / "weights.pt")
        assert [name for name, weight in weights.items() if not weight.isfinite().all()] == [ZEBRAS]
    else:
        assert ranks[0]["error"] == ranks[1]["error"]
        assert (
            "Step 2: the gradient norm is not finite, and DeepSpeed has taken the step all the same"
            in ranks[0]["error"]
        )
