"""The callbacks that every run of `ORPOTrainer` has."""

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from orpo_trl.callbacks.findings import FindingWarnings
from orpo_trl.callbacks.last_log import LastLog
from orpo_trl.callbacks.record import RunRecord
from orpo_trl.callbacks.samples import SampleCompletions
from orpo_trl.callbacks.terminal import TerminalProgress
from orpo_trl.callbacks.this_start import SettingsOfThisStart
from orpo_trl.callbacks.trackers import TensorBoardRun, WandbRun
from orpo_trl.guard import CheckModel


def standard_callbacks(trainer) -> list[TrainerCallback]:
    """The trainer's callbacks; ours take the place of those of transformers that have the same purpose."""
    ours = {
        WandbCallback: lambda: WandbRun(trainer),
        TensorBoardCallback: lambda: TensorBoardRun(trainer),
        ProgressCallback: TerminalProgress,
        PrinterCallback: TerminalProgress,
    }
    found = [
        ours[type(callback)]() if type(callback) in ours else callback
        for callback in trainer.callback_handler.callbacks
    ]
    found[:0] = [SettingsOfThisStart(trainer), CheckModel(trainer)]
    found.append(RunRecord(trainer))  # after the trackers, whose runs it records
    if trainer.args.generate_during_eval:
        found.append(SampleCompletions(trainer))
    return [*found, FindingWarnings(trainer), LastLog()]
