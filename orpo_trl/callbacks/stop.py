"""Stops training with a checkpoint: on a signal to any rank, and after `stop_after`."""

import time

import torch
from transformers import TrainerCallback

from orpo_trl import interruptions
from orpo_trl.durations import read_duration


class StopWhenAsked(TrainerCallback):
    """Stops all ranks at the end of the same optimiser step, with a checkpoint.

    A rank knows alone that it was asked. So that no collective is added, the trainer sums `request()` over the ranks
    with the totals of each optimiser step, and hands the sum back to `hear`. `on_step_end` reads it.

    Args:
        trainer: its `interruption` says why training has stopped before its end, else it is None.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        after = trainer.args.stop_after
        self._limit = None if after is None else read_duration(after)
        self._text = f"`stop_after: {after}`"
        self._began = time.monotonic()
        self._sum: torch.Tensor | None = None
        self._is_copied: torch.Event | None = None

    def request(self) -> int:
        """1 where this rank wants to stop."""
        return int(self._reason() is not None)

    def hear(self, total: torch.Tensor) -> None:
        """Take the sum of all ranks' requests, a scalar on the trainer's device."""
        self._sum = total.to("cpu", non_blocking=True)
        if total.device.type != "cpu":
            # Read at the end of the step. Waiting for the copy here would let the accelerator run dry.
            self._is_copied = torch.Event(total.device)
            self._is_copied.record()

    def on_train_begin(self, args, state, control, **kwargs):
        self._began = time.monotonic()
        self._sum = self._is_copied = None
        self.trainer.interruption = None
        interruptions.training(True)

    def on_step_begin(self, args, state, control, **kwargs):
        interruptions.at_step(state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs):
        if self._is_copied is not None:
            self._is_copied.synchronize()
        if self._sum is not None and self._sum.item():
            self._stop(control)

    def on_evaluate(self, args, state, control, **kwargs):
        """An evaluation may take minutes. The checkpoint is written right after it, not a step later."""
        if not self.trainer.is_in_train or self.trainer.interruption is not None:
            return
        request = torch.tensor(self.request(), device=args.device)
        if self.trainer.accelerator.reduce(request, "sum").item():
            self._stop(control)

    def on_epoch_end(self, args, state, control, **kwargs):
        # The Trainer calls this wherever it leaves an epoch. What an epoch's end asks for would be done in its middle.
        # At its last step it is done now: a run that goes on begins with the next epoch.
        if self.trainer.interruption is not None and state.epoch != int(state.epoch):
            control.should_log = control.should_evaluate = control.should_save = False

    def on_train_end(self, args, state, control, **kwargs):
        interruptions.training(False)

    def _reason(self) -> str | None:
        running = interruptions.seconds()
        running = time.monotonic() - self._began if running is None else running
        if self._limit is not None and running >= self._limit:
            return self._text
        return interruptions.asked()

    def _stop(self, control) -> None:
        self.trainer.interruption = self._reason() or "another process was asked to stop"
        # With a log, so that the metrics of the steps since the last one are not lost.
        control.should_log = control.should_save = control.should_training_stop = True
