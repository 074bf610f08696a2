"""wandb and TensorBoard with the settings of a run, on top of the integrations of transformers."""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback, WandbCallback

from orpo_trl import run_folder
from orpo_trl.upstream import get_comet_experiment_url, get_trackio_space_url, sends_checkpoints
from orpo_trl.yaml_text import from_yaml


class TrackerError(RuntimeError):
    """A tracker that does not start with the settings it was given."""


class WandbRun(WandbCallback):
    """transformers' integration, with the run's project, name, group, tags and mode from the settings.

    A run that resumes from a checkpoint continues its wandb run, whose id is in the run's folder. The recipe is part of
    the wandb run's config, beside the settings and the model's config.

    Args:
        trainer: its `recipe` is sent.
    """

    def __init__(self, trainer):
        super().__init__()
        self.trainer = trainer

    def setup(self, args, state, model, **kwargs):
        import wandb
        from wandb.errors import UsageError

        if state.is_world_process_zero and wandb.run is None:
            if not sends_checkpoints(self):
                # Where tables wait to be sent. By default in the user's home, whose name the run's file would hold.
                os.environ.setdefault("WANDB_DATA_DIR", tempfile.mkdtemp(prefix="wandb-"))
            try:
                wandb.init(
                    project=os.environ.get("WANDB_PROJECT", args.project),
                    name=state.trial_name or args.run_name,  # of a search for hyper-parameters
                    group=args.run_group,
                    tags=args.run_tags,
                    mode=args.wandb_mode,
                    id=saved_run_id(args.output_dir) if state.global_step else None,
                    resume="allow",
                    # These would send the name of the user and of the machine, and the command line.
                    settings=wandb.Settings(x_disable_meta=True, x_disable_machine_info=True, disable_git=True),
                )
            except UsageError as error:
                raise TrackerError(f"`report_to: wandb`: {error} Or set `wandb_mode: offline`.") from error
        super().setup(args, state, model, **kwargs)
        if state.is_world_process_zero:
            wandb.config.update({"recipe": from_yaml(self.trainer.recipe)}, allow_val_change=True)


def saved_run_id(output_dir: str) -> str | None:
    """Id of the wandb run that an earlier start of this run made."""
    return run_folder.read_record(Path(output_dir)).get("wandb_run_id")


def _active_run() -> Any:
    """The wandb run of this process; None where nothing has started one, and then wandb is not loaded either."""
    wandb = sys.modules.get("wandb")
    return wandb.run if wandb is not None else None


def finish_wandb() -> None:
    """Close the wandb run of this process, which waits for what is still to be sent; without a run, do nothing."""
    run = _active_run()
    if run is not None:
        run.finish()


def current_run_id() -> str | None:
    """Id of the wandb run of this process."""
    run = _active_run()
    return run.id if run is not None else None


def run_pages() -> dict[str, str]:
    """Addresses at which the trackers of this process show the run, by the tracker's name."""
    run = _active_run()
    pages = {
        "Weights & Biases": run.url if run is not None else None,
        "trackio": get_trackio_space_url(),
        "Comet": get_comet_experiment_url(),
    }
    return {name: url for name, url in pages.items() if url}


class TensorBoardRun(TensorBoardCallback):
    """transformers' integration, in `runs/TIME` of the output folder; a run that resumes continues the newest one."""

    def on_train_begin(self, args, state, control, **kwargs):
        if self.logging_dir is None:
            self.logging_dir = str(_event_folder(Path(args.output_dir) / "runs", is_resumed=bool(state.global_step)))
        super().on_train_begin(args, state, control, **kwargs)


def _event_folder(folder: Path, is_resumed: bool) -> Path:
    earlier = sorted(folder.iterdir()) if is_resumed and folder.is_dir() else []
    return earlier[-1] if earlier else folder / time.strftime("%Y-%m-%d_%H-%M-%S")


def log_table(name: str, records: list[dict[str, Any]], step: int) -> None:
    """Log records of the same keys as a table to the wandb run of this process, where there is one."""
    run = _active_run()
    if run is not None:
        import wandb

        table = wandb.Table(columns=list(records[0]))
        for record in records:
            table.add_data(*record.values())
        run.log({name: table, "train/global_step": step})
