"""What a run that goes on takes from its checkpoint, and what from the settings of this start."""

import json
from pathlib import Path

from accelerate.utils import gather_object
from transformers import TrainerCallback

from orpo_trl.callbacks.record import evaluated_data
from orpo_trl.plain_files import read_text
from orpo_trl.resume import BEGAN_AT, ResumeError, refusal
from orpo_trl.resume_rules import Change

# Where one of these has changed, the best figure so far is of something else.
_OF_BEST = {"metric_for_best_model", "greater_is_better", "eval_datasets", "dataset_test_split"}


class SettingsOfThisStart(TrainerCallback):
    """Gives the state of a checkpoint the settings of this start, and refuses a start with no step left to train.

    The Trainer goes on with the intervals and the best figure of the checkpoint, whatever the settings are now, and it
    calls a run finished whose checkpoint is of a later step than its last. The first callback of all: what is in the
    folder stays as it is until this one has found nothing wrong.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.steps_taken:
            raise ResumeError(
                f"After {self.trainer.steps_taken} steps a batch did not fit into memory. `auto_find_batch_size` would "
                "begin again with weights that are trained already. Begin anew with a lower "
                "`per_device_train_batch_size` and without it: `--overwrite_output_dir` sets this run aside."
            )
        if self.trainer.start.checkpoint is not None:
            self._check_length(state)
            state.compute_steps(args, state.max_steps)  # of logs, evaluations and checkpoints
            if self._is_of_something_else(state):
                state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        self.trainer.make_room()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.steps_taken += 1

    def _check_length(self, state) -> None:
        start, folder = self.trainer.start, self.trainer.run_folder
        whole = start.record.get("max_steps")
        if whole and state.max_steps < whole and not start.is_anyway:
            raise ResumeError(refusal(folder, [Change("optimiser steps", whole, state.max_steps)]))
        if state.global_step < state.max_steps:
            return
        of_checkpoint = json.loads(read_text(Path(start.checkpoint) / "trainer_state.json")).get("max_steps")
        if of_checkpoint != state.max_steps or not (start.is_continued or start.is_anyway):
            raise ResumeError(
                f"Nothing would be trained: {start.checkpoint} is of step {state.global_step:,}, and this run has "
                f"{state.max_steps:,} steps. Set more `max_steps` or `num_train_epochs`."
            )

    def _is_of_something_else(self, state) -> bool:
        """Whether the best figure of the checkpoint cannot be compared with those of this start."""
        start, folder = self.trainer.start, self.trainer.run_folder
        if not start.is_continued or str(Path(start.checkpoint).resolve()) == start.record.get(BEGAN_AT):
            return True
        if any(change.is_refused or change.name in _OF_BEST for change in start.changes):
            return True
        known = start.record.get("datasets") or {}
        now = evaluated_data(self.trainer)
        if any((known.get(name) or data)["sha256"] != data["sha256"] for name, data in now.items()):
            return True
        best = state.best_global_step
        # It could not be loaded. A machine may see another folder than the others, and all ranks must agree.
        return any(gather_object([bool(best) and not (folder / f"checkpoint-{best}").is_dir()]))
