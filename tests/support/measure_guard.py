"""Measures what the guard against non-finite steps costs: pairs of blocks of steps, with and without it.

    python tests/support/measure_guard.py --pairs 20

All rows are the same, so that all steps are. On an accelerator it is the time on the clock, and the device is waited
for at the end of a block alone, so that what the guard's look at the norm costs is seen. On a CPU it is the process's
own time, which other processes disturb less. Not a test itself.
"""

import argparse
import random
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from transformers import AutoTokenizer, Trainer, TrainerCallback

from orpo_trl import ORPOTrainer
from support.small import TOKENIZER, make_rows, settings, tiny_model


class SwitchedTrainer(ORPOTrainer):
    """The guard, or what the Trainer does without one."""

    is_guarded = True

    def guarded(self, loss, inputs, token_logps):
        return super().guarded(loss, inputs, token_logps) if self.is_guarded else loss

    def _get_grad_norm(self, model, grad_norm=None):
        if self.is_guarded:
            return super()._get_grad_norm(model, grad_norm)
        return Trainer._get_grad_norm(self, model, grad_norm)


def clock() -> float:
    """Seconds, when the device has done its work."""
    if not torch.accelerator.is_available():
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


class Blocks(TrainerCallback):
    """Seconds of each block of steps, with and without the guard; which comes first in a pair of blocks is drawn."""

    def __init__(self, trainer: SwitchedTrainer, steps: int):
        self.trainer, self.steps, self.draw = trainer, steps, random.Random(0)
        self.seconds: dict[bool, list[float]] = {True: [], False: []}

    def on_train_begin(self, args, state, control, **kwargs):
        self.since = clock()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps:
            return
        self.seconds[self.trainer.is_guarded].append(clock() - self.since)
        ended = len(self.seconds[True]) == len(self.seconds[False])
        self.trainer.is_guarded = self.draw.random() < 0.5 if ended else not self.trainer.is_guarded
        self.since = clock()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20, help="pairs of blocks, one with and one without the guard")
    parser.add_argument("--steps", type=int, default=4, help="steps of a block")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size of the model, of 4 layers")
    options = parser.parse_args()
    blocks = 2 * (options.pairs + 1)  # the first pair warms up
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    model = tiny_model(hidden_size=options.hidden, intermediate_size=2 * options.hidden, num_hidden_layers=4)
    with tempfile.TemporaryDirectory() as folder:
        args = settings(
            folder, max_steps=blocks * options.steps, logging_strategy="no", learning_rate=1e-6,
            use_cpu=not torch.accelerator.is_available(),
        )  # fmt: skip
        rows = Dataset.from_list(make_rows(1) * 32)
        trainer = SwitchedTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
        measured = Blocks(trainer, options.steps)
        trainer.add_callback(measured)
        trainer.train()
    pairs = list(zip(measured.seconds[True], measured.seconds[False], strict=True))[1:]
    shares = sorted(100 * (with_guard / without - 1) for with_guard, without in pairs)
    low, middle, high = statistics.quantiles(shares, n=4)
    step = 1000 * statistics.median(without for _, without in pairs) / options.steps
    print(f"{step:.2f} ms a step without the guard; with it {middle:+.2f} % (median of {len(pairs)} pairs of blocks, "
          f"quartiles {low:+.2f} % and {high:+.2f} %)")  # fmt: skip


if __name__ == "__main__":
    main()
