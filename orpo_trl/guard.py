"""Steps and models that are not finite: the step is not taken, its rows are recorded, and a broken model is not saved.

One number decides, the norm of the gradient of the whole optimiser step: it is the same on all ranks, so all of them do
the same. `guarded` gives a loss that is not finite a gradient of NaN, so that the norm knows of it too:

    compute_loss      `guarded`         keeps the micro-batch, and carries a bad loss into the gradient
    _get_grad_norm    `may_step`        reads the norm; where it is bad, gathers and records the rows
    optimizer.step                      does nothing after a bad norm; so does the scheduler
    events of a step  `before_events`   a checkpoint that is due waits for a good step
                      `after_events`    raises after `max_nonfinite_steps` bad steps in a row
    _save_checkpoint  `before_saving`   raises where the weights, or what the model makes of known rows, are not finite
    start and end     `CheckModel`      the same; weights that are broken from the start are named in a warning

fp16: the scaler of the loss begins too high by design, and lowers itself at each step whose gradient overflows. Such
a step is not taken either, but it is no trouble as long as the loss is finite and the scale is above 1.

Optimizers that step inside the backward pass (LOMO, the layer-wise ones of GaLore and APOLLO) cannot be held back. What
they break is found before it is saved.
"""

import logging
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from orpo_trl import run_folder
from orpo_trl.config import ORPOConfig
from orpo_trl.losses import response_sums
from orpo_trl.metrics import METRICS
from orpo_trl.upstream import HookedSFTTrainer, get_last_checkpoint, local_part, loss_scale, step_was_taken

logger = logging.getLogger(__name__)

# A gradient norm above so many times the running median is named. The median is of the last good steps, and is trusted
# from so many on.
SPIKE, SPIKE_WINDOW, SPIKE_LEAST = 10, 100, 20
# Rows and weights that a message names.
NAMED = 3


class NonFiniteError(RuntimeError):
    """A run that cannot go on: steps that are not finite, or a model that is broken."""


class StepGuard:
    """What is known of the steps of a run so far.

    Attributes:
        passes: of the optimiser step that is being computed: each batch with `[rows, seq]` log-probabilities.
        known: a batch of the last good step; None before the first one.
        bad_in_a_row: steps that were not finite, up to the last one.
        blames_rows: the last step was bad because of some of its rows; others of it were finite.
        last_good_step: number of the last step that was finite; 0 before the first one.
        owes_checkpoint, owes_evaluation: were due at a bad step.
        given_broken: names of weights that were not finite when training began.
    """

    def __init__(self):
        self.passes: list[tuple[dict[str, Any], torch.Tensor]] = []
        self.known: dict[str, Any] | None = None
        self.bad_in_a_row = 0
        self.blames_rows = False
        self.last_good_step = 0
        self.owes_checkpoint = self.owes_evaluation = False
        self.given_broken: list[str] = []
        self._norms: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def good_step(self, step: int, norm: float) -> float:
        """Note a finite step.

        Returns:
            The running median that the norm is a spike of; 0 where it is none.
        """
        self.bad_in_a_row, self.last_good_step = 0, step
        self.known = self.passes[-1][0] if self.passes else self.known
        median = statistics.median(self._norms) if len(self._norms) >= SPIKE_LEAST else 0.0
        self._norms.append(norm)
        return median if norm > SPIKE * median else 0.0


class GuardMixin(HookedSFTTrainer):
    """Takes no optimiser step that is not finite, and saves no model that is broken; see the head of this file."""

    args: ORPOConfig
    guard: StepGuard

    def token_logps(self, model, inputs) -> tuple[torch.Tensor, Any]:
        """`[rows, seq]` log-probabilities of a batch, and the output of the model."""
        raise NotImplementedError

    def begin_run(self, is_trial):
        super().begin_run(is_trial)
        self.guard = StepGuard()
        self._is_trial = is_trial

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        except NonFiniteError as error:
            self.is_in_train = False
            if not self._is_trial:
                raise
            # A search goes on; its trials with too high a learning rate have no result, and none is the best.
            logger.warning("This trial has no result. %s", error)
            self.objective: Any = math.nan

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.guard.passes = []
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def guarded(self, loss: torch.Tensor, inputs: dict[str, Any], token_logps: torch.Tensor) -> torch.Tensor:
        """The loss of a batch as it is, but with a gradient of NaN where it is not finite.

        Args:
            loss: scalar, to be trained on.
            inputs: the batch.
            token_logps: `[rows, seq]`, its log-probabilities.
        """
        if self.is_in_train:
            self.guard.passes.append((inputs, token_logps.detach()))
        # A finite gradient of a loss that is not finite is possible, and would be averaged with those of other rows.
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    # ---- Steps ---------------------------------------------------------------------------------------------------

    def may_step(self, norm):
        guard, step = self.guard, self.state.global_step + 1
        if 0 <= norm < math.inf:
            median = guard.good_step(step, norm)
            if median and self.is_world_process_zero():
                logger.warning(
                    "Step %d: the gradient norm is %.3g, more than %d times its running median of %.3g.",
                    step, norm, SPIKE, median,
                )  # fmt: skip
            return True
        rows = self._rows_of_step(step)
        if loss_scale(self) > 1 and all(row["is_finite"] for row in rows):
            return False
        guard.bad_in_a_row += 1
        guard.blames_rows = {row["is_finite"] for row in rows} == {True, False}
        if self.is_world_process_zero():
            run_folder.append_trouble(self.run_folder, rows)
            logger.warning(self._about_step(step, rows))
        if step_was_taken(self):
            raise NonFiniteError(
                f"Step {step}: the gradient norm is not finite, and DeepSpeed has taken the step all the same, so the "
                "weights are broken. Set `check_grad_overflow: true` under `bf16` in its config. "
                f"{self._what_is_left()}"
            )
        return False

    def before_events(self):
        guard, control = self.guard, self.control
        if not guard.bad_in_a_row:
            control.should_save |= guard.owes_checkpoint
            control.should_evaluate |= guard.owes_evaluation
            guard.owes_checkpoint = guard.owes_evaluation = False
            return
        control.should_log = True  # the step has a log of its own, whatever `logging_steps` is
        if guard.bad_in_a_row >= self.args.max_nonfinite_steps:
            control.should_evaluate = control.should_save = False
        elif control.should_save and not (control.should_training_stop and guard.blames_rows):
            control.should_save, guard.owes_checkpoint = False, True
            # The best model is one that has been evaluated and saved at the same step.
            control.should_evaluate, guard.owes_evaluation = False, control.should_evaluate or guard.owes_evaluation

    def after_events(self):
        guard = self.guard
        if guard.bad_in_a_row >= self.args.max_nonfinite_steps:
            raise NonFiniteError(
                f"Step {self.state.global_step}: the loss or the gradient norm was not finite in {guard.bad_in_a_row} "
                f"steps in a row (`max_nonfinite_steps: {self.args.max_nonfinite_steps}`). None of them was taken. "
                f"{self._why_steps_are_bad()} {self._what_is_left()}"
            )

    def _rows_of_step(self, step: int) -> list[dict[str, Any]]:
        """The rows of the step on all ranks. Every rank must call it."""
        rank = self.accelerator.process_index
        mine = [row for inputs, logps in self.guard.passes for row in describe_rows(inputs, logps)]
        rows = gather_object([{"step": step, "rank": rank, **row} for row in mine])
        return sorted(rows, key=_badness)

    def _about_step(self, step: int, rows: list[dict[str, Any]]) -> str:
        worst = "; ".join(_in_words(row) for row in rows[:NAMED])
        has_loss = rows and all(row["is_finite"] for row in rows)
        what = METRICS["grad_norm"].label if has_loss else "loss"
        return (
            f"Step {step}: the {what} is not finite. The step is not taken ({self.guard.bad_in_a_row} in a row, "
            f"the run stops at {self.args.max_nonfinite_steps}). "
            + (f"Worst of its {len(rows)} rows: {worst}. " if rows else "")
            + f"All are in {self.run_folder / run_folder.TROUBLE}."
        )

    def _why_steps_are_bad(self) -> str:
        if self.guard.given_broken:
            return f"{_of_weights(self.guard.given_broken)}, and were not when training began."
        if not self.guard.last_good_step:
            return "No step of this run was finite: is the given model sound? Else lower `learning_rate`."
        return (
            f"The last good step was {self.guard.last_good_step}: lower `learning_rate`, or look at the rows in "
            f"{self.run_folder / run_folder.TROUBLE}."
        )

    def _what_is_left(self) -> str:
        folder = Path(self.run_folder)
        newest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        return f"No model was saved. Newest checkpoint: {newest or 'none'}."

    # ---- Models --------------------------------------------------------------------------------------------------

    def note_given_model(self) -> None:
        """Warn of weights that are not finite before the first step: a token that is never used may be such a row."""
        self.guard.given_broken = self._broken_weights()
        if self.guard.given_broken and self.is_world_process_zero():
            logger.warning("%s, before the first step.", _of_weights(self.guard.given_broken))

    def before_saving(self) -> None:
        """Raise where the model is broken. Every rank must call it, before a checkpoint is written."""
        broken = [name for name in self._broken_weights() if name not in self.guard.given_broken]
        if not broken and self._gives_numbers():
            return
        reason = _of_weights(broken) if broken else "The model gives no finite log-probability for rows of the step"
        raise NonFiniteError(
            f"Step {self.state.global_step}: {reason}, though the gradient norm was finite: the step itself has broken "
            f"the model. Lower `learning_rate`. {self._what_is_left()}"
        )

    def check_trained_model(self) -> None:
        """Raise where the run has reached its end with a model that is broken."""
        self.before_saving()
        guard, state = self.guard, self.state
        is_last = not (self.args.load_best_model_at_end and state.best_model_checkpoint)
        if guard.bad_in_a_row and not guard.blames_rows and is_last and state.global_step >= state.max_steps:
            raise NonFiniteError(
                f"Step {state.global_step}: the run ends with {guard.bad_in_a_row} steps whose loss or gradient norm "
                f"was not finite, and that is not because of single rows. {self._why_steps_are_bad()} "
                f"{self._what_is_left()}"
            )

    def _broken_weights(self) -> list[str]:
        """Names of weights that are not finite, each rank looking at its part. Every rank must call it."""
        parts = {name: local_part(weight) for name, weight in self.model.named_parameters()}
        parts = {
            name: part
            for name, part in parts.items()
            if part.is_floating_point() and part.numel() and part.element_size() > 1
        }
        # The largest absolute value: NaN where one is NaN, and unlike `isfinite` it needs no memory.
        largest = [torch.linalg.vector_norm(part, math.inf).float().to(self.args.device) for part in parts.values()]
        finite = torch.stack(largest).isfinite().tolist() if largest else []
        mine = [name for name, is_finite in zip(parts, finite, strict=True) if not is_finite]
        return sorted(set(gather_object(mine)))

    def _gives_numbers(self) -> bool:
        """Whether the model gives a finite log-probability for one row at least, of those that it was just given.

        Weights of 1e30 are finite, and all that they give is NaN. Every rank must call it.
        """
        inputs = self.guard.known or (self.guard.passes[-1][0] if self.guard.passes else None)
        found = []
        if inputs is not None:
            model: Any = self.model_wrapped
            was_training = model.training
            model.eval()
            with torch.no_grad():
                found = [row["is_finite"] for row in describe_rows(inputs, self.token_logps(model, inputs)[0])]
            model.train(was_training)
        found = gather_object(found)
        return any(found) or not found


class CheckModel(TrainerCallback):
    """Looks at the model when training begins and ends, before another callback calls the run finished."""

    def __init__(self, trainer: GuardMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.note_given_model()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.check_trained_model()


# ---- Rows ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def describe_rows(inputs: dict[str, Any], token_logps: torch.Tensor) -> list[dict[str, Any]]:
    """What a model makes of each row of a batch.

    Args:
        inputs: from `PairCollator`. Of a batch without `rows`, nothing is known.
        token_logps: `[rows, seq]`, log-probability of each scored token.

    Returns:
        What `rows` of the batch holds, with `nll`, mean over the tokens of the NLL term, `logps/chosen` and
        `logps/rejected` (absent without a response), and `is_finite`: whether all of them are.
    """
    rows = inputs.get("rows", [])
    if not rows:
        return []
    token_logps = token_logps.float()
    lengths = inputs["completion_lengths"]
    logps = (response_sums(token_logps, inputs["completion_index"], len(lengths)) / lengths).tolist()
    rejected = iter(logps[len(rows) :])
    described = []
    for row, chosen, nll in zip(rows, logps[: len(rows)], _nll(inputs, token_logps), strict=False):
        values = {"nll": nll, "logps/chosen": chosen}
        if row["rejected_tokens"] is not None:
            values["logps/rejected"] = next(rejected)
        described.append({**row, **values, "is_finite": all(math.isfinite(value) for value in values.values())})
    return described


def _nll(inputs: dict[str, Any], token_logps: torch.Tensor) -> list[float]:
    """Mean over the NLL tokens of each response, the chosen ones first."""
    is_scored = inputs["nll_divisors"] > 0
    count = len(inputs["completion_lengths"])
    if "segments" in inputs:
        ends = inputs["segments"]["query_ends"][1:].long()
        positions = torch.arange(token_logps.shape[1], device=token_logps.device)
        of_position = torch.searchsorted(ends, positions, right=True).expand(token_logps.shape)
    else:
        of_position = torch.arange(len(token_logps), device=token_logps.device)[:, None].expand(token_logps.shape)
    of_token = of_position[is_scored]
    sums = token_logps.new_zeros(count).index_add(0, of_token, -token_logps[is_scored])
    return (sums / torch.bincount(of_token, minlength=count).clamp(min=1)).tolist()


def _badness(row: dict[str, Any]) -> tuple[bool, float]:
    return row["is_finite"], row["logps/chosen"] if row["is_finite"] else 0.0


def _in_words(row: dict[str, Any]) -> str:
    sides = [f"{side} {row[f'logps/{side}']:.4g}" for side in ("chosen", "rejected") if f"logps/{side}" in row]
    tokens = [row[f"{part}_tokens"] for part in ("prompt", "chosen", "rejected")]
    sizes = " + ".join(str(count) for count in tokens if count is not None)
    return f"{row['source']}, row {row['row']} (nll {row['nll']:.4g}, {', '.join(sides)}, {sizes} tokens)"


def _of_weights(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"Weights of the model are not finite: {', '.join(names[:NAMED])}{more}"
