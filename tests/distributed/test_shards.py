"""Checkpoints that hold shards alone: a run goes on from them, the best one is found, and the model is plain."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.processes import cpu_engine, train
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow
CONFIG = {
    "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
    "load_best_model_at_end": True, "save_total_limit": 2, "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
}  # fmt: skip


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_the_best_model_is_the_final_one_though_checkpoints_hold_shards(engine, base, tmp_path):
    """The best is here the one of the greatest loss, since that is not the last."""
    output = tmp_path / "run"
    output.mkdir()
    job = {"output_dir": output, "model": base, "rows": 24, "config": CONFIG, "fsdp": engine == "fsdp2"}
    result = train(job, cpu_engine(engine, tmp_path))
    losses = {log["step"]: log["eval_loss"] for log in result["history"] if "eval_loss" in log and log["step"] > 0}
    best = max((2, 4, 6), key=lambda step: losses[step])
    assert best != 6
    assert result["eval"]["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == sorted({f"checkpoint-{best}", "checkpoint-6"})
    assert not list(output.glob("checkpoint-*/*.safetensors"))
    state = json.loads((output / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(output / f"checkpoint-{best}")
    plain = AutoModelForCausalLM.from_pretrained(output)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, torch.load(output / "logits.pt"), rtol=1e-4, atol=1e-4)
    assert all(weight.isfinite().all() for weight in load_file(output / "model.safetensors").values())
