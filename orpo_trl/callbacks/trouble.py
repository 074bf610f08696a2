"""Says so when the curves of a run tell of trouble."""

import logging

from transformers import TrainerCallback

from orpo_trl.diagnosis import find_trouble

logger = logging.getLogger(__name__)


class TroubleWarnings(TrainerCallback):
    """Warns once of each kind of trouble that `find_trouble` sees in the logs."""

    def __init__(self):
        self._told: set[str] = set()

    def on_train_begin(self, args, state, control, **kwargs):
        self._told.clear()

    def on_log(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        warmup = args.get_warmup_steps(state.max_steps)
        for kind, sentence in find_trouble(state.log_history, args.beta, warmup, state.max_steps).items():
            # The trainer itself names a non-finite step, with the metrics and micro-batches.
            if kind not in self._told and kind != "non_finite":
                self._told.add(kind)
                logger.warning("Step %d: %s", state.global_step, sentence)
