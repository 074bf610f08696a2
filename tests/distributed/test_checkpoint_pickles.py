"""Checkpoints that DeepSpeed has written pass the look at their pickles; one with code in it does not."""

import pytest
from support.hostile import payload
from support.processes import cpu_engine, train

from orpo_trl.weights import UnsafeWeights, refuse_unsafe_checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero3", "zero2"])
def test_checkpoint_of_a_strategy_is_accepted_and_one_with_code_in_it_is_not(engine, base, tmp_path):
    config = {
        "max_steps": 1, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2,
        "optim": "adamw_torch",
    }  # fmt: skip
    out = tmp_path / "out"
    out.mkdir()
    job = {"rows": 8, "eval_rows": 3, "config": config, "model": base, "output_dir": out}
    train(job, cpu_engine(engine, tmp_path))
    checkpoint = out / "checkpoint-1"
    pickles = [*checkpoint.glob("*/*.pt"), *checkpoint.glob("*/.metadata")]
    assert pickles
    refuse_unsafe_checkpoint(checkpoint)
    canary = tmp_path / "canary"
    pickles[0].write_bytes(payload(canary))
    with pytest.raises(UnsafeWeights, match="it would call"):
        refuse_unsafe_checkpoint(checkpoint)
    assert not canary.exists()
