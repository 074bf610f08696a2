"""Train a model with ORPO, from a recipe.

    accelerate launch scripts/run_orpo.py recipes/quickstart.yaml
    accelerate launch scripts/run_orpo.py recipes/mistral_beta.yaml --learning_rate 1e-5

Every key of a recipe can be overridden by `--key value`. `orpo-trl schema` lists them, `orpo-trl check RECIPE` looks at
a recipe before training, and `orpo-trl train RECIPE` finds the command line for a distributed strategy.
"""

# ruff: noqa: E402 (some of the warnings to hide are given by imports)

import logging
import os
import sys
from pathlib import Path
from typing import NoReturn, cast

from orpo_trl.quiet import hide_known_warnings

hide_known_warnings()

from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel, set_seed
from trl import get_peft_config, get_quantization_config

from orpo_trl import ORPOConfig, ORPOTrainer
from orpo_trl.callbacks.trackers import TrackerError, finish_wandb
from orpo_trl.hidden import hide
from orpo_trl.launch import start_deepspeed_on_cpu
from orpo_trl.metrics import EVALUATION, evaluation_prefixes, held_out_table
from orpo_trl.model import build_from_scratch, load_tokenizer, model_init_kwargs
from orpo_trl.output_folder import folder_problem
from orpo_trl.pairs.load import load_pairs
from orpo_trl.pairs.prepare import RowsError
from orpo_trl.printable import printable
from orpo_trl.recipe.files import RecipeError
from orpo_trl.recipe.parse import build_settings, load_recipe
from orpo_trl.recipe.show import expanded
from orpo_trl.upstream import get_last_checkpoint
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
    problem = checkpoint_problem(training_args)
    if problem:
        fail(problem)
    if training_args.deepspeed and training_args.use_cpu:
        start_deepspeed_on_cpu()
    set_up_logging()
    set_seed(training_args.seed)

    # ---- Data --------------------------------------------------------------------------------------------------------
    with_test = training_args.eval_strategy != "no"
    try:
        with PartialState().main_process_first():
            train_dataset, eval_dataset = load_pairs(data_args, with_test, seed=training_args.seed)
    except (ValueError, OSError) as error:
        fail(error)

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
        trainer = ORPOTrainer(
            model=model,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    except Exception as error:  # a damaged or hostile model makes the libraries raise anything
        if training_args.log_level == "debug":
            raise
        is_expected = isinstance(error, (ValueError, TypeError, OSError, ImportError))
        text = str(error) if is_expected else f"{type(error).__name__}: {error}"
        text = text.partition("\nException raised from")[0]  # then torch lists its C++ functions
        fail(f"{text}\n(--log_level debug shows where this came from)")
    checkpoint = recipe.settings.pop("resume_from_checkpoint", None)  # it belongs to this start, not to the run
    trainer.recipe = expanded(recipe)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (RowsError, TrackerError, UnsafeWeights) as error:  # rows of a stream are read while it trains
        fail(error)
    metrics = final_evaluation(trainer) if with_test else None

    # ---- Save --------------------------------------------------------------------------------------------------------
    cast(PreTrainedModel, trainer.model).config.use_cache = True  # off in training, wanted for generation
    trainer.save_model(training_args.output_dir)
    trainer.create_model_card()
    if metrics is not None and trainer.is_world_process_zero():
        print_summary(metrics)
    trainer.accelerator.print(printable(hide(f"Saved the model to {training_args.output_dir}")))
    if training_args.push_to_hub:
        trainer.push_to_hub()
    finish_wandb()
    trainer.accelerator.end_training()


def checkpoint_problem(args: ORPOConfig) -> str | None:
    """Why a run cannot write or resume, as far as it is known before data and weights are loaded; None where it can."""
    wanted, folder = args.resume_from_checkpoint, Path(args.output_dir or "")
    problem = folder_problem(folder)
    if problem:
        return problem
    if wanted is True and not (folder.is_dir() and get_last_checkpoint(folder)):
        return f"`resume_from_checkpoint: true`: expected a checkpoint-… folder in {args.output_dir}, found none"
    if isinstance(wanted, str) and not Path(wanted).is_dir():
        return f"`resume_from_checkpoint`: expected the folder of a checkpoint or true, received {wanted!r}"
    return None


def final_evaluation(trainer: ORPOTrainer) -> dict[str, float]:
    """Metrics of the model that is saved: those of the last step where it has been evaluated, else a new evaluation."""
    state = trainer.state
    logged = [log for log in state.log_history if log["step"] == state.global_step]
    metrics = {name: value for log in logged for name, value in log.items() if name.startswith(EVALUATION)}
    if metrics and not trainer.args.load_best_model_at_end:
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


def fail(problem: object) -> NoReturn:
    """Stop with one message from the main process: the user can fix the problem, and a traceback is no help."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(hide(f"run_orpo.py: {problem}")), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
