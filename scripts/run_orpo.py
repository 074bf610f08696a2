"""Train a model with ORPO, from a recipe.

    accelerate launch scripts/run_orpo.py recipes/quickstart.yaml
    accelerate launch scripts/run_orpo.py recipes/mistral_beta.yaml --learning_rate 1e-5

Every key of a recipe can be overridden by `--key value`. `orpo-trl schema` lists them, `orpo-trl check RECIPE` looks at
a recipe before training, and `orpo-trl train RECIPE` finds the command line for a distributed strategy.
"""

# ruff: noqa: E402 (some of the warnings to hide are given by imports)

import atexit
import logging
import os
import sys
from pathlib import Path
from typing import Any, NoReturn, cast

from orpo_trl import interruptions
from orpo_trl.quiet import hide_known_warnings
from orpo_trl.unused_packages import leave_out_unused

hide_known_warnings()
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
    # Each packed step has another size, and a GPU's memory would end up in pieces. Read when CUDA starts.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
if __name__ == "__main__":
    interruptions.listen()  # first of all: the imports below take seconds
    leave_out_unused(sys.argv[1:])

from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel, set_seed
from trl import get_peft_config, get_quantization_config

from orpo_trl import ORPOTrainer
from orpo_trl.callbacks.trackers import TrackerError, finish_wandb
from orpo_trl.checkpoints import SaveError, checkpoints_of
from orpo_trl.exit_codes import FAILED, WRONG_INPUT
from orpo_trl.guard import NonFiniteError
from orpo_trl.hidden import hide
from orpo_trl.launch import start_deepspeed_on_cpu
from orpo_trl.metrics import EVALUATION, evaluation_prefixes, held_out_table
from orpo_trl.model import build_from_scratch, load_tokenizer, model_init_kwargs
from orpo_trl.output_folder import folder_problem
from orpo_trl.pairs.load import load_pairs
from orpo_trl.pairs.prepare import RowsError
from orpo_trl.printable import printable
from orpo_trl.processes import another_has_failed, world_problem
from orpo_trl.recipe.files import RecipeError
from orpo_trl.recipe.parse import build_settings, load_recipe
from orpo_trl.recipe.show import expanded
from orpo_trl.resume import OF_ONE_START, Asked, ResumeError, claim_on_all
from orpo_trl.resume_rules import named_files
from orpo_trl.upstream import is_peft_available
from orpo_trl.weights import UnsafeWeights


def main(arguments: list[str]) -> None:
    # ---- Parse -------------------------------------------------------------------------------------------------------
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    try:
        recipe = load_recipe(arguments)
        model_args, data_args, training_args = build_settings(recipe)
    except RecipeError as error:
        fail(error)
    if training_args.deepspeed and training_args.use_cpu:
        start_deepspeed_on_cpu()
    problem = world_problem(PartialState().num_processes)
    if problem:
        fail(problem)
    if model_args.use_peft and not is_peft_available():
        fail("`use_peft: true` needs peft: pip install 'orpo-trl[peft]'")
    set_up_logging()
    set_seed(training_args.seed)
    problem = folder_problem(Path(cast(str, training_args.output_dir)))
    if problem:
        fail(problem)
    of_start = {name: recipe.settings.pop(name, None) for name in OF_ONE_START}
    wanted = Asked(
        folder=Path(cast(str, training_args.output_dir)),
        recipe=expanded(recipe),
        resume=training_args.resume,
        checkpoint=of_start["resume_from_checkpoint"],
        is_anyway=training_args.resume_anyway,
        is_overwritten=training_args.overwrite_output_dir,
        processes=PartialState().num_processes,
        inputs=named_files(model_args, data_args, training_args),
    )
    try:
        start, lock = claim_on_all(wanted)
    except ResumeError as error:
        fail(error)
    if lock is not None:
        atexit.register(lock.release)
    if start.finished:
        PartialState().print(start.finished)
        return

    # ---- Data --------------------------------------------------------------------------------------------------------
    with_test = training_args.eval_strategy != "no"
    try:
        with PartialState().main_process_first():
            train_dataset, eval_dataset = load_pairs(data_args, with_test, seed=training_args.seed)
    except (ValueError, OSError) as error:
        fail(error)
    if data_args.test_split_size and not with_test:
        PartialState().print("`test_split_size` holds rows out, and `eval_strategy: no` evaluates none of them.")

    # ---- Model -------------------------------------------------------------------------------------------------------
    try:
        tokenizer = load_tokenizer(model_args, training_args.trust_remote_code)
        if model_args.from_scratch:
            model = build_from_scratch(model_args, tokenizer, training_args.trust_remote_code)
        else:
            model = cast(str, model_args.model_name_or_path)
            own = cast(dict, training_args.model_init_kwargs or {})
            training_args.model_init_kwargs = {**model_init_kwargs(model_args), **own}

        # ---- Train ---------------------------------------------------------------------------------------------------
        peft_config: Any = get_peft_config(model_args)
        if peft_config is not None and model_args.model_revision != "main":
            peft_config.revision = model_args.model_revision  # of the base: whoever loads the adapter asks for it
        trainer = ORPOTrainer(
            model=model,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model_args),
            peft_config=peft_config,
        )
    except Exception as error:  # a damaged or hostile model makes the libraries raise anything
        if training_args.log_level == "debug" or another_has_failed():  # then `reported` hides this error
            raise
        is_expected = isinstance(error, (ValueError, TypeError, OSError, ImportError))
        text = str(error) if is_expected else f"{type(error).__name__}: {error}"
        text = text.partition("\nException raised from")[0]  # then torch lists its C++ functions
        fail(f"{text}\n(--log_level debug shows where this came from)")
    trainer.recipe = wanted.recipe
    trainer.begin_with(start, lock)
    try:
        trainer.train()
    except ResumeError as error:
        fail(error, FAILED if trainer.steps_taken else WRONG_INPUT)
    except (RowsError, TrackerError, UnsafeWeights) as error:  # rows of a stream are read while it trains
        fail(error)
    except NonFiniteError as error:
        fail(error, FAILED)
    except (SaveError, OSError) as error:
        fail(error, FAILED, from_any=True)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        fail(f"{error} The same command goes on from the latest checkpoint.", FAILED, from_any=True)
    if trainer.interruption:
        end_interrupted(trainer)
    interruptions.stop_if_asked()
    metrics = final_evaluation(trainer) if with_test else None

    # ---- Save --------------------------------------------------------------------------------------------------------
    cast(PreTrainedModel, trainer.model).config.use_cache = True  # off in training, wanted for generation
    try:
        trainer.write_model()
        trainer.create_model_card()
    except (SaveError, OSError) as error:
        fail(error, FAILED, from_any=True)
    if trainer.is_world_process_zero():
        if metrics is not None:
            print_summary(metrics)
        print(printable(hide(f"Saved the model to {training_args.output_dir}")))
    if training_args.push_to_hub:
        push(trainer)
    finish_wandb()
    trainer.accelerator.end_training()


def push(trainer: ORPOTrainer) -> None:
    try:
        trainer.push_to_hub()
    except Exception as error:  # of its HTTP client, whichever that is
        folder, name = trainer.run_folder, trainer.hub_model_id
        fail(
            f"The model is saved in {folder}, and could not be sent to the Hub: {error}\nOnce it can be reached, "
            f"`hf upload {name} {folder}` sends it.", FAILED,
        )  # fmt: skip


def end_interrupted(trainer: ORPOTrainer) -> NoReturn:
    """Leave a run that has stopped with a checkpoint, so that the same command goes on."""
    step = trainer.state.global_step
    finish_wandb()
    # Last of all: the launcher ends the other processes as soon as one has ended.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    found = checkpoints_of(trainer.run_folder)  # none of a step that was not finite
    checkpoint = f"Checkpoint: {found[0].path}" if found else "There is no checkpoint."
    interruptions.leave(f"Stopped after step {step:,} ({trainer.interruption}). {checkpoint}")


def final_evaluation(trainer: ORPOTrainer) -> dict[str, float]:
    """Metrics of the model that is saved: those of the last step where it has been evaluated, else a new evaluation."""
    state = trainer.state
    logged = [log for log in state.log_history if log["step"] == state.global_step]
    metrics = {name: value for log in logged for name, value in log.items() if name.startswith(EVALUATION)}
    # A start that took no step may have other pairs to evaluate on than the one that did.
    if metrics and trainer.steps_taken and not trainer.args.load_best_model_at_end:
        return metrics
    return trainer.evaluate()


def print_summary(metrics: dict[str, float]) -> None:
    for prefix in evaluation_prefixes(metrics):
        table = Table("metric", title=escape(printable(f"Held-out pairs ({prefix.removesuffix('_')})")))
        table.add_column("value", justify="right")
        for row in held_out_table(metrics, prefix):
            table.add_row(*row)
        Console().print(table)


def set_up_logging() -> None:
    """Show the package's messages on the main process and its warnings on all; transformers keeps its own handlers."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_PlainMessages())
    logger = logging.getLogger("orpo_trl")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if PartialState().is_main_process else logging.WARNING)


class _PlainMessages(logging.Formatter):
    """Messages alone, without what environment variables hold and what a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(hide(super().format(record)))


def fail(problem: object, status: int = WRONG_INPUT, from_any: bool = False) -> NoReturn:
    """Stop with one message: the user can fix the problem, and a traceback is no help.

    Args:
        problem: the message.
        status: of the exit.
        from_any: any process may have the problem alone; else all should have it, and the main one tells it.
    """
    if not from_any:
        interruptions.let_main_tell(status)
    print(printable(hide(f"run_orpo.py: {problem}")), file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    with interruptions.reported():
        main(sys.argv[1:])
