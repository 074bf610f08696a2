"""How a trainer writes checkpoints and the final model: whole, or under a name that says that they are not."""

import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import is_peft_model

from orpo_trl import checkpoints, run_folder
from orpo_trl.checkpoints import INCOMPLETE, SaveError
from orpo_trl.config import ORPOConfig
from orpo_trl.resume import Start
from orpo_trl.upstream import HookedSFTTrainer, is_write_error

# Seconds that a shared file system may take to show a new folder on all machines.
_VISIBLE_WITHIN = 120


class SavingMixin(HookedSFTTrainer):
    """Writes checkpoints and models beside their place, and moves them there when all ranks have written theirs.

    Checkpoints of DeepSpeed and FSDP hold the shards from which training goes on, and no plain model beside them; an
    adapter is saved all the same, since it is small. `save_model` writes the plain model.

    Attributes:
        start: what this run began with; its id is in each checkpoint.
    """

    args: ORPOConfig
    start: Start

    @contextmanager
    def saving_checkpoint(self) -> Iterator[Path]:
        step = self.state.global_step
        made_in = self.run_folder / INCOMPLETE
        name = f"checkpoint-{step}"
        with self._writing(f"checkpoint of step {step}"):
            self._begin_writing(made_in)
            yield made_in
            self._flush(made_in / name)
            if self._writes_names:
                facts = {
                    "run": self.start.run_id,
                    "step": step,
                    "sharding": self.sharding,
                    "processes": self.accelerator.num_processes,
                    "model_only": self.args.save_only_model,
                }
                checkpoints.seal(made_in / name, facts)
                checkpoints.publish(made_in / name, self.run_folder / name)
                kept = [self.state.best_model_checkpoint, name]
                checkpoints.remove_old(self.run_folder, self.args.save_total_limit, kept)
                checkpoints.remove_incomplete(self.run_folder)
            self.accelerator.wait_for_everyone()
            self._check_visible(self.run_folder / name)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the plain model as `write_model`, and with `push_to_hub` send it, as the Trainer does."""
        if not self.is_saving_checkpoint:
            self.write_model(output_dir)
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        elif self._checkpoints_hold_models:
            super().save_model(output_dir, _internal_call)
            self.save_sharded_model(str(output_dir))

    def write_model(self, output_dir: str | None = None) -> None:
        """Write the plain model, of all ranks' shards. Called by all ranks.

        Args:
            output_dir: by default that of the run, which counts as finished then.

        Raises:
            SaveError: where it cannot be written.
        """
        target = Path(output_dir or self.run_folder)
        made_in = target / INCOMPLETE / "model"
        with self._writing(f"model in {target}"):
            self._begin_writing(made_in.parent)
            super().save_model(str(made_in), _internal_call=True)
            self.save_sharded_model(str(made_in))
            if self.accelerator.is_main_process and not any(made_in.rglob("*.safetensors")):
                raise SaveError(
                    f"The model in {target} could not be written: the engine has gathered no weights. Under ZeRO-3, "
                    "set `zero3_save_16bit_model: true` in the accelerate config, or "
                    "`stage3_gather_16bit_weights_on_model_save: true` in DeepSpeed's."
                )
            self._flush(made_in)
            if self._writes_names:
                checkpoints.move_model(made_in, target)
                checkpoints.remove_incomplete(target)
                if target == self.run_folder:
                    run_folder.mark_saved(target)
            self.accelerator.wait_for_everyone()

    @property
    def _checkpoints_hold_models(self) -> bool:
        sends = self.args.push_to_hub and self.args.hub_strategy != "end"
        return self.sharding == "none" or self.args.save_only_model or sends or bool(is_peft_model(self.model))

    @property
    def _writes_names(self) -> bool:
        """Whether this process renames, moves and deletes: one of all, or one of each machine that has its own disk."""
        accelerator = self.accelerator
        return accelerator.is_local_main_process if self.args.save_on_each_node else accelerator.is_main_process

    def _check_visible(self, checkpoint: Path) -> None:
        """Each machine must see a checkpoint that is whole; a shared file system may take a while."""
        if not self.accelerator.is_local_main_process:
            return
        end = time.monotonic() + _VISIBLE_WITHIN
        while not (checkpoint / checkpoints.COMPLETE).exists():
            if time.monotonic() > end:
                raise SaveError(
                    f"{checkpoint} is not to be seen on {socket.gethostname()}: `output_dir` is not shared by the "
                    "machines. Set one that is, or `save_on_each_node: true`."
                )
            time.sleep(1)

    def _begin_writing(self, folder: Path) -> None:
        if self._writes_names:
            checkpoints.remove_incomplete(folder.parent)
        self.accelerator.wait_for_everyone()
        folder.mkdir(parents=True, exist_ok=True)

    def _flush(self, folder: Path) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_local_main_process:
            checkpoints.sync_files(folder)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not is_write_error(error):
                raise
            free = _free_space(self.run_folder)
            if self._writes_names:
                checkpoints.remove_incomplete(self.run_folder)  # it may have filled the disk
            raise SaveError(
                f"The {what} could not be written: {' '.join(str(error).split())} ({free}). Checkpoints that were "
                "whole before are untouched; once that is mended, the same command goes on from the latest."
            ) from error


def _free_space(folder: Path) -> str:
    try:
        return f"free on that disk: {shutil.disk_usage(folder).free / 2**20:,.1f} MiB"
    except OSError as error:
        return f"the output folder: {error.strerror}"
