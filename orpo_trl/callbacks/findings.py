"""Logs what the diagnosis finds while a run trains."""

import logging
from typing import Any

from transformers import TrainerCallback

from orpo_trl.diagnosis import NON_FINITE, diagnose

logger = logging.getLogger(__name__)


class FindingWarnings(TrainerCallback):
    """Warns once of each finding of `diagnose`, which it calls about a hundred times in a run.

    Args:
        trainer: its preparation reports tell how many pairs are held out.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self._logged: set[str] = set()
        self._next_look = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._logged.clear()
        self._next_look = 0

    def on_log(self, args: Any, state, control, **kwargs):
        if not state.is_world_process_zero or state.global_step < self._next_look:
            return
        # Each call reads all logs so far.
        self._next_look = state.global_step + state.max_steps // 100
        warmup = args.get_warmup_steps(state.max_steps)
        pairs = {name: report.pairs for name, report in self.trainer.preparation_reports.items()}
        for kind, sentence in diagnose(state.log_history, args.beta, warmup, state.max_steps, pairs).items():
            # The trainer itself warns of a non-finite step, and names the metrics and micro-batches.
            if kind not in self._logged and kind != NON_FINITE:
                self._logged.add(kind)
                logger.warning("Step %d: %s", state.global_step, sentence)
