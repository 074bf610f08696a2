"""Logs the optimiser steps that are left when a run ends, or writes a checkpoint, between two logs."""

from transformers import IntervalStrategy, TrainerCallback


class LastLog(TrainerCallback):
    """With logs by steps or epochs, asks for a log where training stops; the Trainer gives none where the step has one.

    Also before a checkpoint: a run that goes on from it does not know the losses of the steps since the last log.
    """

    def on_step_end(self, args, state, control, **kwargs):
        # Before the last evaluation and checkpoint, so that the log stands before theirs.
        self._ask(args, control, state.global_step >= state.max_steps)

    def on_epoch_end(self, args, state, control, **kwargs):
        # An evaluation may have stopped the run after its last step.
        self._ask(args, control, False)

    @staticmethod
    def _ask(args, control, is_last: bool) -> None:
        is_due = is_last or control.should_training_stop or control.should_save
        if args.logging_strategy != IntervalStrategy.NO and is_due:
            control.should_log = True
