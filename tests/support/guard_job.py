"""Trains with a bad row, or with too high a learning rate, in launched processes. Not a test itself.

    guard_job.py '{"output_dir": ..., "model": ..., "rows": ..., "zebras": [...], "config": {...},
                   "whole_on_each_rank": true, "fsdp": false}'

The rows `zebras` have a token that no other row has. Each rank writes `rank-N.json`: the error that `train` raised, the
steps and learning rates, and a digest of its weights where it holds all of them. Rank 0 writes `weights.pt`.
"""

import hashlib
import json
import logging
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from orpo_trl import ORPOTrainer
from orpo_trl.guard import NonFiniteError
from orpo_trl.launch import start_deepspeed_on_cpu
from support.processes import end_rank
from support.run_job import allow_fsdp_on_cpu
from support.small import TOKENIZER, make_rows, settings


def main(job: dict) -> None:
    logging.basicConfig(level=logging.INFO)
    if job.get("fsdp"):
        allow_fsdp_on_cpu()
        job["config"]["accelerator_config"] = {"use_configured_state": True}
    if job["config"].get("deepspeed"):
        start_deepspeed_on_cpu()
    output = Path(job["output_dir"])
    args = settings(output, **job["config"])
    rows = make_rows(job["rows"])
    for row in job["zebras"]:
        rows[row]["chosen"] = " zebra"
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    trainer = ORPOTrainer(job["model"], args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    error = None
    try:
        trainer.train()
    except NonFiniteError as raised:
        error = str(raised)
    lrs = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # every rank must take part
    result = {
        "ranks": trainer.accelerator.num_processes,
        "engine": str(trainer.accelerator.distributed_type),
        "error": error,
        "steps": trainer.state.global_step,
        "learning_rates": lrs,
        "bad_in_a_row": trainer.guard.bad_in_a_row,
    }
    rank = trainer.accelerator.process_index
    if job["whole_on_each_rank"]:
        result["digest"] = digest(state)
    (output / f"rank-{rank}.json").write_text(json.dumps(result))
    if rank == 0:
        torch.save({name: weight.cpu() for name, weight in state.items()}, output / "weights.pt")
    end_rank(trainer)


def digest(state: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(state[name].cpu().float().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
