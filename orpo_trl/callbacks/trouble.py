"""Says so when the curves of a run tell of trouble."""

import logging

from transformers import TrainerCallback

from orpo_trl.diagnosis import find_trouble

logger = logging.getLogger(__name__)


class TroubleWarnings(TrainerCallback):
    """Warns once of each kind of trouble that `find_trouble` sees in the logs, looking a hundred times in a run."""

    def __init__(self):
        self._told: set[str] = set()
        self._next_look = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._told.clear()
        self._next_look = 0

    def on_log(self, args, state, control, **kwargs):
        if not state.is_world_process_zero or state.global_step < self._next_look:
            return
        # Each look reads all logs so far.
        self._next_look = state.global_step + state.max_steps // 100
        warmup = args.get_warmup_steps(state.max_steps)
        for kind, sentence in find_trouble(state.log_history, args.beta, warmup, state.max_steps).items():
            # The trainer itself names a non-finite step, with the metrics and micro-batches.
            if kind not in self._told and kind != "non_finite":
                self._told.add(kind)
                logger.warning("Step %d: %s", state.global_step, sentence)
