"""A progress bar, and one aligned line for each log."""

import time
from datetime import timedelta
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback

from orpo_trl.metrics import METRICS, evaluation_label, prefixes
from orpo_trl.printable import printable
from orpo_trl.upstream import has_length

# Lines between two headers.
LINES_PER_HEADER = 25

# Held-out metrics have the same names behind their prefix.
_COLUMNS = [metric for metric in METRICS.values() if metric.title]
# Seconds between two words of the progress bar on the micro-batch.
_PAUSE = 0.5
# What the progress bar shows.
_IN_BAR = ("loss", "rewards/accuracies", "rewards/margins")
_WIDTH = 9


class TerminalProgress(ProgressCallback):
    """A line for each log; on a terminal also the Trainer's progress bars, with loss, accuracy and margin.

    Where the error stream is not a terminal, or with `disable_tqdm`, there are no bars, so a log file holds only lines.
    Only the main process writes.
    """

    def __init__(self):
        super().__init__()
        self._lines = 0
        self._since: tuple[int, float] | None = None
        self._micro_batch, self._shown = 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step
        self._since = (state.global_step, time.monotonic())
        if state.is_world_process_zero:
            self.training_bar = self._bar(args, state.max_steps, desc="train", initial=state.global_step)

    def on_substep_end(self, args, state, control, **kwargs):
        """Within an optimiser step, which can take minutes, the bar tells the micro-batch."""
        self._micro_batch += 1
        if self.training_bar is not None and time.monotonic() - self._shown > _PAUSE:
            self._shown = time.monotonic()
            self.training_bar.set_description(
                f"train, micro-batch {self._micro_batch} of {args.gradient_accumulation_steps}"
            )

    def on_step_end(self, args, state, control, **kwargs):
        self._micro_batch, self._shown = 0, time.monotonic()
        if self.training_bar is not None:
            self.training_bar.set_description("train", refresh=False)
        super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if state.is_world_process_zero and has_length(eval_dataloader):
            if self.prediction_bar is None:
                self.prediction_bar = self._bar(args, len(eval_dataloader), desc="eval", leave=False)
            self.prediction_bar.update(1)

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs):
        if not state.is_world_process_zero:
            return
        logs = {name: value for name, value in (logs or {}).items() if name != "total_flos"}
        # With `include_num_input_tokens_seen`, each log of a window has `train_runtime` too.
        if "train_runtime" in logs and "loss" not in logs:
            tqdm.write(_closing_line(state.global_step, logs))
            return
        found = prefixes(logs)
        if not found:
            others = ", ".join(f"{name} {value}" for name, value in logs.items() if name != "epoch")
            tqdm.write(printable(f"step {state.global_step:,}: {others}"))
        for prefix in found:
            if self._lines % LINES_PER_HEADER == 0:
                tqdm.write(_header())
            self._lines += 1
            tqdm.write(printable(self._line(state, prefix, logs)))
            if not prefix and self.training_bar is not None:
                self.training_bar.set_postfix(
                    {METRICS[name].title: format(logs[name], METRICS[name].format) for name in _IN_BAR if name in logs}
                )

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            self.training_bar.close()
        self.training_bar = self._since = None

    def _bar(self, args, total: int, **kwargs) -> tqdm:
        # None: no bar where the error stream is not a terminal.
        return tqdm(total=total, dynamic_ncols=True, disable=True if args.disable_tqdm else None, **kwargs)

    def _line(self, state, prefix: str, logs: dict[str, Any]) -> str:
        cells = [f"{state.global_step:>7,}", f"{state.epoch or 0:>6.2f}"]
        for metric in _COLUMNS:
            value = logs.get(prefix + metric.name)
            cells.append((format(value, metric.format) if isinstance(value, (int, float)) else "").rjust(_WIDTH))
        last = evaluation_label(prefix) if prefix else f"{self._left(state):>8}"
        return f"{prefix.partition('_')[0] or 'train':<6}{' '.join(cells)} {last}".rstrip()

    def _left(self, state) -> str:
        """Time until the last step, at the speed so far."""
        if self._since is None or state.global_step <= self._since[0]:
            return ""
        start, since = self._since
        seconds = (time.monotonic() - since) / (state.global_step - start) * (state.max_steps - state.global_step)
        return str(timedelta(seconds=round(seconds)))


def _header() -> str:
    titles = " ".join(metric.title.rjust(_WIDTH) for metric in _COLUMNS)
    return f"{'':<6}{'step':>7} {'epoch':>6} {titles} {'left':>8}"


def _closing_line(steps: int, logs: dict[str, Any]) -> str:
    text = f"Trained to step {steps:,} in {timedelta(seconds=round(logs['train_runtime']))}"
    if "train_loss" in logs:
        text += f", mean loss {logs['train_loss']:.4f}"
    return text
