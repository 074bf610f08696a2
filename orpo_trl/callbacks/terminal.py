"""A progress bar, and one aligned line per log."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback
from transformers.trainer_utils import has_length

# Lines between two headers.
LINES_PER_HEADER = 25

# Title, metric and format of each column; held-out metrics have the same names behind their prefix.
_COLUMNS: list[tuple[str, str, Callable[[float], str]]] = [
    ("loss", "loss", "{:.4f}".format),
    ("NLL", "nll_loss", "{:.4f}".format),
    ("log odds", "log_odds_chosen", "{:+.3f}".format),
    ("accuracy", "rewards/accuracies", "{:.3f}".format),
    ("margin", "rewards/margins", "{:+.4f}".format),
    ("chosen", "logps/chosen", "{:.3f}".format),
    ("rejected", "logps/rejected", "{:.3f}".format),
    ("lr", "learning_rate", "{:.2e}".format),
    ("grad", "grad_norm", "{:.2f}".format),
    ("tok/s", "throughput/unique_tokens_per_second", "{:,.0f}".format),
]
_WIDTH = 9


class TerminalProgress(ProgressCallback):
    """The Trainer's progress bars on a terminal, with loss, margin and accuracy; a line per log there and elsewhere.

    Where the error stream is no terminal, or with `disable_tqdm`, there are no bars: a log file then holds lines alone.
    Only the main process writes.
    """

    def __init__(self):
        super().__init__()
        self._lines = 0
        self._since: tuple[int, float] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step
        self._since = (state.global_step, time.monotonic())
        if state.is_world_process_zero:
            self.training_bar = self._bar(args, state.max_steps, desc="train", initial=state.global_step)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if state.is_world_process_zero and has_length(eval_dataloader):
            if self.prediction_bar is None:
                self.prediction_bar = self._bar(args, len(eval_dataloader), desc="eval", leave=False)
            self.prediction_bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        logs = {name: value for name, value in logs.items() if name != "total_flos"}
        if "train_runtime" in logs:
            tqdm.write(_closing_line(state.global_step, logs))
            return
        prefixes = _prefixes(logs)
        if not prefixes:
            others = ", ".join(f"{name} {value}" for name, value in logs.items() if name != "epoch")
            tqdm.write(f"step {state.global_step:,}: {others}")
        for prefix in prefixes:
            if self._lines % LINES_PER_HEADER == 0:
                tqdm.write(_header())
            self._lines += 1
            tqdm.write(self._line(state, prefix, logs))
            if not prefix and self.training_bar is not None:
                self.training_bar.set_postfix(
                    {
                        title: write(logs[name])
                        for title, name, write in _COLUMNS
                        if title in ("loss", "margin", "accuracy") and name in logs
                    }
                )

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            self.training_bar.close()
        self.training_bar = self._since = None

    def _bar(self, args, total: int, **kwargs) -> tqdm:
        # None: no bar where the error stream is not a terminal.
        return tqdm(total=total, dynamic_ncols=True, disable=True if args.disable_tqdm else None, **kwargs)

    def _line(self, state, prefix: str, logs: dict[str, Any]) -> str:
        what, _, label = prefix.rstrip("_").partition("_")
        cells = [f"{state.global_step:>7,}", f"{state.epoch or 0:>6.2f}"]
        for _, name, write in _COLUMNS:
            value = logs.get(prefix + name)
            cells.append((write(value) if isinstance(value, (int, float)) else "").rjust(_WIDTH))
        last = label if prefix else f"{self._left(state):>8}"
        return f"{what or 'train':<6}{' '.join(cells)} {last}".rstrip()

    def _left(self, state) -> str:
        """Time until the last step, if it goes on as it went so far."""
        if self._since is None or state.global_step <= self._since[0]:
            return ""
        start, since = self._since
        seconds = (time.monotonic() - since) / (state.global_step - start) * (state.max_steps - state.global_step)
        return str(timedelta(seconds=round(seconds)))


def _header() -> str:
    titles = " ".join(title.rjust(_WIDTH) for title, _, _ in _COLUMNS)
    return f"{'':<6}{'step':>7} {'epoch':>6} {titles} {'left':>8}"


def _prefixes(logs: dict[str, Any]) -> list[str]:
    """'' for a log of training, 'eval_' or 'eval_LABEL_' for each evaluation in it."""
    found = [name.removesuffix("nll_loss") for name in logs if name.endswith("nll_loss")]
    return found or ([""] if "loss" in logs else [])


def _closing_line(steps: int, logs: dict[str, Any]) -> str:
    text = f"Trained to step {steps:,} in {timedelta(seconds=round(logs['train_runtime']))}"
    if "train_loss" in logs:
        text += f", mean loss {logs['train_loss']:.4f}"
    return text
