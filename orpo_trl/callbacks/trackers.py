"""wandb and TensorBoard with the settings of a run, on top of the integrations of transformers."""

import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback

from orpo_trl import run_folder
from orpo_trl.metrics import EVALUATION
from orpo_trl.upstream import event_writer, get_comet_experiment_url, get_trackio_space_url, sends_checkpoints
from orpo_trl.yaml_text import from_yaml

logger = logging.getLogger(__name__)

# The default, which leaves it to the environment.
_PROJECT = TrainingArguments.__dataclass_fields__["project"].default
# By wandb run: names and steps of the tables that an earlier start has sent.
_sent_tables: dict[str, set[tuple[str, int]]] = {}


class TrackerError(RuntimeError):
    """A tracker that does not start with the settings it was given."""


class WandbRun(WandbCallback):
    """transformers' integration, with the run's project, name, group, tags and mode from the settings.

    A run that goes on continues its wandb run, whose id is in run.json. Logs that this wandb run has already, of the
    steps between the checkpoint and the end of the earlier start, are not sent again. The recipe is part of the wandb
    run's config, beside the settings and the model's config.

    Args:
        trainer: its `recipe` is sent.
    """

    def __init__(self, trainer):
        super().__init__()
        self.trainer = trainer
        self._sent: set[tuple[int, str]] = set()

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if _name_of_log({"step": state.global_step, **(logs or {})}) not in self._sent:
            super().on_log(args, state, control, model, logs, **kwargs)

    def setup(self, args, state, model, **kwargs):
        import wandb
        from wandb.errors import CommError, UsageError

        if state.is_world_process_zero and wandb.run is None:
            if not sends_checkpoints(self):
                # Where tables wait to be sent. By default in the user's home, whose name the run's file would hold.
                os.environ.setdefault("WANDB_DATA_DIR", tempfile.mkdtemp(prefix="wandb-"))
            settings = {
                "project": os.environ.get("WANDB_PROJECT", _PROJECT) if args.project == _PROJECT else args.project,
                "name": state.trial_name or args.run_name,  # of a search for hyper-parameters
                "group": args.run_group,
                "tags": args.run_tags,
                "id": self._earlier_run(state),
                "resume": "allow",
                # These would send the name of the user and of the machine, and the command line.
                "settings": wandb.Settings(x_disable_meta=True, x_disable_machine_info=True, disable_git=True),
            }
            try:
                wandb.init(mode=args.wandb_mode, **settings)
            except UsageError as error:
                raise TrackerError(f"`report_to: wandb`: {error} Or set `wandb_mode: offline`.") from error
            except CommError as error:
                run = wandb.init(mode="offline", **settings)
                logger.warning(
                    "wandb cannot be reached, so this run is logged offline: `wandb sync %s` sends it later. (%s)",
                    os.path.dirname(run.dir),
                    " ".join(str(error).split())[:200],
                )
        super().setup(args, state, model, **kwargs)
        if state.is_world_process_zero:
            wandb.config.update({"recipe": from_yaml(self.trainer.recipe)}, allow_val_change=True)

    def _earlier_run(self, state) -> str | None:
        """Id of the wandb run that an earlier start of this run made."""
        if not state.global_step and not self.trainer.start.is_continued:
            return None
        folder = self.trainer.run_folder
        found = run_folder.read_record(folder).get("wandb_run_id")
        if found is not None:
            logs = run_folder.read_lines(folder / run_folder.LOGS)
            self._sent = {_name_of_log(log) for log in logs if log["step"] > state.global_step}
            _sent_tables[found] = {
                (f"samples/{sample['dataset']}", sample["step"]) for sample in run_folder.read_samples(folder)
            }
        return found


def _name_of_log(log: dict[str, Any]) -> tuple[int, str]:
    """The step of a log, and what tells the logs of a step apart: training's from each evaluation set's."""
    return log["step"], min((name for name in log if name.startswith(EVALUATION)), default="loss" * ("loss" in log))


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
    """transformers' integration, in `runs/TIME` of the output folder; a run that goes on continues the newest one.

    Args:
        trainer: says whether its run goes on.
    """

    def __init__(self, trainer):
        super().__init__()
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        is_continued = bool(state.global_step) or self.trainer.start.is_continued
        if self.logging_dir is None:
            self.logging_dir = str(_event_folder(Path(args.output_dir) / "runs", is_continued))
        # The trials of a search have folders of their own, which the Trainer's integration names.
        if is_continued and state.is_world_process_zero and not state.is_hyper_param_search and self.tb_writer is None:
            # Without what the earlier start has logged after the checkpoint.
            self.tb_writer = event_writer(self, self.logging_dir, state.global_step)
        super().on_train_begin(args, state, control, **kwargs)


def _event_folder(folder: Path, is_continued: bool) -> Path:
    earlier = sorted(folder.iterdir()) if is_continued and folder.is_dir() else []
    return earlier[-1] if earlier else folder / time.strftime("%Y-%m-%d_%H-%M-%S")


def log_table(name: str, records: list[dict[str, Any]], step: int) -> None:
    """Log records of the same keys as a table to the wandb run of this process, where there is one.

    Not again where a run that went on has sent the table of this step before.
    """
    run = _active_run()
    if run is not None and (name, step) not in _sent_tables.get(run.id, ()):
        import wandb

        table = wandb.Table(columns=list(records[0]))
        for record in records:
            table.add_data(*record.values())
        run.log({name: table, "train/global_step": step})
