"""Trains a small model in a launched process and writes the results that a test compares. Not a test itself.

    run_job.py '{"output_dir": ..., "model": ..., "rows": ..., "config": {...}, "lora": false}'

Rank 0 writes `result.json` with the log history and the reports; the model is saved beside it.
"""

import json
import logging
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from orpo_trl import ORPOTrainer
from orpo_trl.pairs.load import ROW_COLUMN, SOURCE_COLUMN
from support.processes import end_rank
from support.small import TOKENIZER, make_rows, settings


def allow_fsdp_on_cpu() -> None:
    """accelerate uses FSDP for processes of accelerators alone, and would run DDP on a CPU without a word."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


class NoteSharding(TrainerCallback):
    """Notes, while training, whether a weight is sharded."""

    def __init__(self, found: dict):
        self.found = found

    def on_step_end(self, args, state, control, model, **kwargs):
        weight = next(model.parameters())
        self.found["weight_class"] = type(weight).__name__
        self.found["weight_is_sharded"] = isinstance(weight, DTensor) or hasattr(weight, "ds_tensor")


def main(job: dict) -> None:
    logging.basicConfig(level=logging.INFO)
    if job.get("fsdp"):
        allow_fsdp_on_cpu()
        job["config"]["accelerator_config"] = {"use_configured_state": True}
    output = Path(job["output_dir"])
    args = settings(output, **job["config"])
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    dataset = Dataset.from_list(make_rows(job["rows"], job.get("nll_only_every")))
    held_out = Dataset.from_list(make_rows(job.get("eval_rows", 5), 3, seed=1))
    if job.get("sources"):  # of the held-out rows, in turn
        sources = [job["sources"][row % len(job["sources"])] for row in range(len(held_out))]
        held_out = held_out.add_column(SOURCE_COLUMN, sources).add_column(ROW_COLUMN, list(range(len(held_out))))
    if job.get("shards"):  # a stream, of so many files
        dataset, held_out = (rows.to_iterable_dataset(num_shards=job["shards"]) for rows in (dataset, held_out))
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if job.get("lora") else None
    by_name = job.get("by_name", True)
    trainer = ORPOTrainer(
        job["model"] if by_name else AutoModelForCausalLM.from_pretrained(job["model"]),
        args,
        train_dataset=dataset,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=lora,
    )
    sharding = {}
    trainer.add_callback(NoteSharding(sharding))
    trainer.train(resume_from_checkpoint=job.get("resume"))
    metrics = trainer.evaluate()
    with torch.no_grad():
        ids = torch.arange(5, 25, device=args.device)[None]
        trainer.model_wrapped.eval()
        logits = trainer.model_wrapped(input_ids=ids).logits.float().cpu()
    trainer.save_model()
    if trainer.is_world_process_zero():
        torch.save(logits, output / "logits.pt")
        engine = trainer.deepspeed
        result = {
            "clipped_at": engine and engine.gradient_clipping(),
            "gradients_summed_in": str(engine.optimizer.gradient_accumulation_dtype) if engine else None,
            "ranks": trainer.accelerator.num_processes,
            "engine": str(trainer.accelerator.distributed_type),
            **sharding,
            "device_map": (args.model_init_kwargs or {}).get("device_map", "unset"),
            "history": trainer.state.log_history,
            "eval": metrics,
        }
        (output / "result.json").write_text(json.dumps(result))
    end_rank(trainer)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
