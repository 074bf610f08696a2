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

    def begin_with(self, start: Start) -> None:
        """Let the next call of `train` begin or go on as the start says, for which `resume.make_room` has made room."""
        self._next_start = start

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as `transformers.Trainer.train`; with `resume: auto` in the settings, from the latest checkpoint on.

        Raises:
            ResumeError: where the checkpoint is of a run that trains something else, or the run is finished.
            SaveError: where a checkpoint could not be written.
        """
        lock = None
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
                start, lock = resume.claim_on_all(wanted)
                self._next_start, lock = resume.make_room_on_all(self.run_folder, start, lock)
        given = None if is_trial or not resume_from_checkpoint else str(resume_from_checkpoint)
        self.start, self._next_start = self._next_start or Start(checkpoint=given), None
        try:
            if self.start.finished:
                raise ResumeError(self.start.finished)
            if self.start.is_continued or self.start.checkpoint:
                self._check_start()
            output = super().train(self.start.checkpoint, *args, **kwargs)
        finally:
            if lock is not None:
                lock.release()
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
