"""Trains a Mistral with random weights in a launched process, and writes its peak memory. Not a test itself.

    measure_memory.py '{"folder": ..., "pairs": 2, "prompt": 64, "response": 192, "config": {...}}'

The folder holds the model's config.json. All pairs are equal. "config" is for `ORPOConfig`. Each rank writes its peak
of resident memory, in bytes, to `peak_<rank>.txt`.
"""

import json
import resource
import sys
from pathlib import Path

from datasets import Dataset
from transformers import set_seed

from orpo_trl import ORPOConfig, ORPOTrainer
from orpo_trl.config import ModelArguments
from orpo_trl.model import build_from_scratch, load_tokenizer
from support.processes import end_rank
from support.small import TOKENIZER

STEPS = 3  # DeepSpeed knows the order of the weights, and keeps some, from the third step on


def main(job: dict) -> None:
    args = ORPOConfig(
        f"{job['folder']}/out", bf16=False, max_steps=STEPS, report_to="none", save_strategy="no", disable_tqdm=True,
        max_length=None, per_device_train_batch_size=job["pairs"], **job["config"],
    )  # fmt: skip
    set_seed(0)
    model_args = ModelArguments(job["folder"], tokenizer_name_or_path=str(TOKENIZER), from_scratch=True)
    tokenizer = load_tokenizer(model_args)
    response = [5 + index % 600 for index in range(job["response"])]
    row = {"prompt_ids": [4] * job["prompt"], "chosen_ids": response, "rejected_ids": response[::-1]}
    count = job["pairs"] * args.world_size * STEPS
    trainer = ORPOTrainer(
        build_from_scratch(model_args, tokenizer),
        args,
        train_dataset=Dataset.from_list([row] * count),
        processing_class=tokenizer,
    )
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
    Path(job["folder"], f"peak_{args.process_index}.txt").write_text(str(peak))
    end_rank(trainer)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
