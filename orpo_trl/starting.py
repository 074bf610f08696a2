"""How `train` starts: a run that begins, or one that goes on from a checkpoint."""

import logging
import socket
from pathlib import Path
from typing import Any, cast

from accelerate.utils import gather_object

from orpo_trl import checkpoints, resume
from orpo_trl.callbacks.record import what_decides
from orpo_trl.config import ORPOConfig
from orpo_trl.resume import BEGAN_AT, Asked, ResumeError, Start
from orpo_trl.resume_rules import facts_changes, sharding_problem
from orpo_trl.run_lock import RunLock
from orpo_trl.upstream import HookedSFTTrainer
from orpo_trl.weights import refuse_unsafe_checkpoint

logger = logging.getLogger(__name__)


class StartMixin(HookedSFTTrainer):
    """Finds the checkpoint to go on from, and refuses one of a run that trains something else: see `resume.py`.

    Attributes:
        recipe: text of the recipe, which is compared with that of the run in the folder.
        start: whether the run of `train` begins, or goes on with one that is in the output folder.
        steps_taken: by this call of `train`.
    """

    args: ORPOConfig
    recipe: str
    start: Start
    steps_taken: int = 0
    _next_start: Start | None = None
    _lock: RunLock | None = None

    def begin_with(self, start: Start, lock: RunLock | None) -> None:
        """Let the next call of `train` begin or go on as `resume.claim_on_all` has found. The folder stays locked."""
        self._next_start, self._lock = start, lock

    def make_room(self) -> None:
        """Set aside the run that is in the way of this start. Called by all ranks, when nothing else can be wrong."""
        if self.start.in_the_way:
            self.start, self._lock = resume.make_room_on_all(self.run_folder, self.start, self._lock)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as `transformers.Trainer.train`; with `resume: auto` in the settings, from the latest checkpoint on.

        Raises:
            ResumeError: where the checkpoint is of a run that trains something else, or the run is finished.
            SaveError: where a checkpoint could not be written.
        """
        is_locked_here = False
        is_trial = kwargs.get("trial") is not None  # of a search: each has a folder of its own
        self.steps_taken = 0
        if not is_trial:
            self.run_folder = Path(cast(str, self.args.output_dir))  # a search has left that of its last trial
        if self._next_start is None and not is_trial and (resume_from_checkpoint or self.args.resume is not None):
            wanted = Asked(
                self.run_folder, self.recipe, self.args.resume, resume_from_checkpoint, self.args.resume_anyway,
                self.args.overwrite_output_dir, self.accelerator.num_processes,
            )  # fmt: skip
            if self.args.resume is None:
                self._next_start = resume.by_hand(wanted)
            else:
                self._next_start, self._lock = resume.claim_on_all(wanted)
                is_locked_here = True
        given = None if is_trial or not resume_from_checkpoint else str(resume_from_checkpoint)
        self.start, self._next_start = self._next_start or Start(checkpoint=given), None
        try:
            if self.start.finished:
                raise ResumeError(self.start.finished)
            if self.start.is_continued or self.start.checkpoint:
                self._check_start()
            output = super().train(self.start.checkpoint, *args, **kwargs)
        finally:
            if is_locked_here and self._lock is not None:
                self._lock.release()
        # A trial that is not finite has no output.
        return output and output._replace(training_loss=output.metrics["train_loss"])

    def _check_start(self) -> None:
        """
        Raises:
            ResumeError: where the data, the tokenizer or the sharding are not those of the run that goes on.
            UnsafeWeights: where loading the checkpoint would run code.
        """
        start = self.start
        if start.checkpoint:
            # Each machine looks for itself: without a common disk, one may not have it.
            problems = gather_object([self._checkpoint_problem(Path(start.checkpoint))])
            if any(problems):
                raise ResumeError(f"{start.checkpoint} cannot be loaded: {next(filter(None, problems))}.")
            refuse_unsafe_checkpoint(Path(start.checkpoint))
        changes = list(facts_changes(start.record, what_decides(self)))
        if changes and not start.is_anyway:
            raise ResumeError(resume.refusal(self.run_folder, changes))
        for change in changes:
            logger.warning("Changed: %s", change)

    def _checkpoint_problem(self, path: Path) -> str | None:
        if not path.is_dir():
            return f"it is not to be seen on {socket.gethostname()}"
        facts = checkpoints.read(path).facts
        began_here = str(path.resolve()) == self.start.record.get(BEGAN_AT)
        if self.start.is_continued and not began_here and facts.get("run", self.start.run_id) != self.start.run_id:
            return f"on {socket.gethostname()}, it is of another run"
        return sharding_problem(facts, self.sharding, self.accelerator.num_processes)
