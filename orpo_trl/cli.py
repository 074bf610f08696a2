"""The command `orpo-trl`. Each subcommand imports what it needs when it runs, so that `--help` is quick."""

import contextlib
import math
import os
import shlex
import sys
import warnings
from pathlib import Path

import click

_EXTRA = {"ignore_unknown_options": True}


class _Failure(click.ClickException):
    """The user's to mend: a message instead of a traceback, and the exit status of wrong usage."""

    exit_code = 2


class _Number(click.FloatRange):
    """A finite number: `nan` is in every range."""

    def convert(self, value, parameter, context):
        number = super().convert(value, parameter, context)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", parameter, context)
        return number


def _complete_recipe(context, parameter, incomplete):
    from click.shell_completion import CompletionItem

    names = [name for name in _shipped_names() if name.startswith(incomplete)]
    return [*map(CompletionItem, names), CompletionItem(incomplete, type="file")]


def _shipped_names() -> list[str]:
    from orpo_trl.paths import RECIPES

    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


_recipe = click.argument("recipe", shell_complete=_complete_recipe)
_overrides = click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[--key value]...")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="orpo-trl")
def main() -> None:
    """ORPO training on TRL: recipes, checks before training, and a launcher.

    \b
    Examples:
      orpo-trl train quickstart                    a small model on a CPU, in a minute or two
      orpo-trl check recipes/mistral_beta.yaml     before renting GPUs
      orpo-trl recipes                             what is shipped
    """
    # Recipes have the key that TRL sets itself.
    warnings.filterwarnings("ignore", message=".gradient_checkpointing. is deprecated")


@main.command(context_settings=_EXTRA)
@_recipe
@_overrides
@click.option(
    "--engine",
    metavar="ENGINE",
    help="zero3, zero2, zero3_offload, fsdp2, ddp, or an accelerate config. Default: the recipe's.",
)
@click.option(
    "--num_processes", "--num-processes", type=int, metavar="N", help="GPUs, of all machines together. Default: all."
)
@click.option("--num_machines", "--num-machines", type=int, default=1, metavar="N", help="Machines. Default: 1.")
@click.option("--machine_rank", "--machine-rank", type=int, metavar="N", help="This machine's number, from 0.")
@click.option("--main_process_ip", "--main-process-ip", metavar="HOST", help="Address of machine 0.")
@click.option(
    "--main_process_port",
    "--main-process-port",
    type=click.IntRange(1, 65535),
    metavar="PORT",
    help="A free port of machine 0.",
)
@click.option("--dry-run", "--dry_run", is_flag=True, help="Print the command line, and do not run it.")
def train(recipe: str, overrides: tuple[str, ...], dry_run: bool, **launch) -> None:
    """Train as RECIPE says: a file, or the name of a shipped recipe.

    Checks the recipe, then prints and executes an `accelerate launch` command line. Every key of the recipe can be
    overridden by `--key value`; `orpo-trl schema` lists them.

    \b
    Examples:
      orpo-trl train recipes/mistral_beta.yaml --learning_rate 1e-5
      orpo-trl train mistral_beta --engine fsdp2 --num_processes 4
      orpo-trl train quickstart --engine zero3 --num_processes 2 --dry-run
      orpo-trl train mistral_beta --num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip 10.0.0.1
    """
    from orpo_trl.launch import Launch, count_gpus, launch_command
    from orpo_trl.recipe.parse import build_settings, load_recipe

    with _failing():
        loaded = load_recipe([recipe, *overrides])
        build_settings(loaded, with_engine=False)
        own = {key: loaded.settings.get(key) for key in ("deepspeed", "fsdp")}
        gpus = count_gpus()
        command = launch_command(Launch(**launch), loaded.name, list(overrides), own, gpus)
    if dry_run and not gpus:
        click.echo("This machine has no GPU, so this is a command line for CPUs.", err=True)
    click.echo(shlex.join(command))
    if not dry_run:
        os.execvp(command[0], command)


@main.command(context_settings=_EXTRA)
@_recipe
@_overrides
@click.option("--engine", metavar="ENGINE", help="zero3, zero2, zero3_offload, fsdp2 or ddp. Default: the recipe's.")
@click.option(
    "--num_processes",
    "--num-processes",
    type=click.IntRange(1),
    metavar="N",
    help="GPUs to plan for. Default: this machine's.",
)
@click.option("--gpu", metavar="NAME", help="GPU to plan for, such as a100-80gb or h100. Default: this machine's.")
@click.option(
    "--gpu-memory",
    type=_Number(min=0, min_open=True),
    metavar="GIB",
    help="Memory of one GPU. Default: that of --gpu.",
)
@click.option(
    "--utilisation",
    type=_Number(0, 1, min_open=True),
    default=0.4,
    show_default=True,
    help="Share of the GPU's peak FLOP/s that the run reaches.",
)
@click.option("--price", type=_Number(min=0), metavar="USD", help="Price of one GPU for one hour.")
@click.option("--full", is_flag=True, help="Prepare all rows, not a sample.")
@click.option("--color/--no-color", default=None, help="Colour the printed pair. Default: on a terminal.")
def check(recipe: str, overrides: tuple[str, ...], **options) -> None:
    """Look at RECIPE before it is trained, without loading weights.

    Numbered steps: the recipe itself, model config and tokenizer, chat template, data, one pair token by token,
    optimiser steps, memory, time and cost, and what is not installed. Each ends in ✓ (fine), ✗ (to mend) or skipped;
    the exit status is 1 where one failed.

    \b
    Examples:
      orpo-trl check recipes/mistral_beta.yaml --num_processes 4 --gpu a100-80gb --price 2
      orpo-trl check quickstart --full
      orpo-trl check my.yaml --gpu-memory 24
    """
    from orpo_trl.check.check import run_checks

    with _failing():
        passed = run_checks([recipe, *overrides], **options)
    raise SystemExit(0 if passed else 1)


class _RecipesGroup(click.Group):
    """`recipes NAME` prints a recipe, beside the subcommands."""

    def get_command(self, context, name):
        found = super().get_command(context, name)
        if found or name not in _shipped_names():
            return found
        return click.Command(name, callback=lambda: _print_recipe(name), help=f"Print the recipe {name}.")

    def resolve_command(self, context, arguments):
        if self.get_command(context, arguments[0]) is None:
            from orpo_trl.recipe.files import find_recipe

            with _failing():
                find_recipe(arguments[0])
        return super().resolve_command(context, arguments)

    def shell_complete(self, context, incomplete):
        from click.shell_completion import CompletionItem

        names = [CompletionItem(name) for name in _shipped_names() if name.startswith(incomplete)]
        return [*super().shell_complete(context, incomplete), *names]


@main.group(cls=_RecipesGroup, invoke_without_command=True, subcommand_metavar="[NAME | COMMAND]")
@click.pass_context
def recipes(context: click.Context) -> None:
    """List the shipped recipes, or print the one called NAME.

    \b
    Examples:
      orpo-trl recipes
      orpo-trl recipes mistral_beta > my.yaml
      orpo-trl recipes expand my.yaml
      orpo-trl recipes import axolotl.yml -o my.yaml
    """
    if context.invoked_subcommand is None:
        from orpo_trl.recipe.library import shipped_recipes

        headers = shipped_recipes()
        width = max(len(header.name) for header in headers)
        for header in headers:
            click.echo(f"{header.name:<{width}}  {header.title}")


def _print_recipe(name: str) -> None:
    from orpo_trl.paths import RECIPES

    click.echo((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"), nl=False)


@recipes.command(context_settings=_EXTRA)
@_recipe
@_overrides
def expand(recipe: str, overrides: tuple[str, ...]) -> None:
    """Print RECIPE with its parents and overrides in one, and where each value comes from.

    \b
    Example:
      orpo-trl recipes expand mistral_beta_released --learning_rate 1e-5
    """
    from orpo_trl.recipe.parse import build_settings, load_recipe
    from orpo_trl.recipe.show import expanded

    with _failing():
        loaded = load_recipe([recipe, *overrides])
        build_settings(loaded, with_engine=False)
    click.echo(expanded(loaded), nl=False)


@recipes.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--tool",
    type=click.Choice(["axolotl", "llama-factory", "alignment-handbook", "trl"]),
    help="The tool whose config it is. Default: detected from its keys.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the recipe here instead of printing it.")
def import_(file: Path, tool: str | None, output: Path | None) -> None:
    """Turn another tool's ORPO config into a recipe.

    Reads axolotl (`rl: orpo`), LLaMA-Factory (`pref_loss: orpo`), alignment-handbook, and TRL's `--config` files. The
    recipe's header and standard error list the keys that have no equal here, and what differs in the objective. For a
    shell script of ORPO's authors, the answer is the shipped recipe with its settings.

    \b
    Example:
      orpo-trl recipes import axolotl.yml -o recipes/mine.yaml
    """
    from orpo_trl.importers import import_recipe, recipe_text

    with _failing():
        if output is not None and output.exists():
            raise ValueError(f"--output: {output} exists already")
        imported = import_recipe(file, tool)
        text = recipe_text(imported, file.name)
        if output is None:
            click.echo(text, nl=False)
        else:
            output.write_text(text, encoding="utf-8")
    for title, notes in (("Keys without an equal here", imported.no_equal), ("Differences", imported.differences)):
        if notes:
            click.echo(f"{title}:", err=True)
        for note in notes:
            place = f"{file}:{note.line}: " if note.line else ""
            click.echo(f"  {place}{note.text}", err=True)
    if output is not None:
        click.echo(f"Written to {output}. Next: orpo-trl check {output}", err=True)


@main.command()
@click.argument("model")
@click.argument("data")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A new .jsonl or .parquet file. Default: print.")
@click.option("--split", default="train", show_default=True, help="Split of DATA.")
@click.option("--config", help="Configuration of a Hub dataset.")
@click.option("--tokenizer", metavar="NAME", help="Hub id or folder. Default: MODEL's own.")
@click.option(
    "--chat_template_path",
    "--chat-template-path",
    metavar="NAME",
    help="A .jinja file, or a tokenizer with the template. Default: that of the tokenizer.",
)
@click.option(
    "--strings_as_messages",
    "--strings-as-messages",
    is_flag=True,
    help="Render string prompts and responses through the chat template.",
)
@click.option(
    "--prompt_turns",
    "--prompt-turns",
    type=click.Choice(["all", "first"]),
    default="all",
    show_default=True,
    help="Turns of a conversation that are its prompt: all but the last answer, or up to the first.",
)
@click.option(
    "--max_length",
    "--max-length",
    type=click.IntRange(2),
    metavar="TOKENS",
    help="Cut responses of longer rows. Default: none is cut.",
)
@click.option(
    "--max_prompt_length",
    "--max-prompt-length",
    type=click.IntRange(1),
    metavar="TOKENS",
    help="Drop rows with prompts as long as this.",
)
@click.option(
    "--max_completion_length",
    "--max-completion-length",
    type=click.IntRange(1),
    metavar="TOKENS",
    help="Cut longer responses.",
)
@click.option(
    "--on_malformed",
    "--on-malformed",
    type=click.Choice(["error", "drop"]),
    default="error",
    show_default=True,
    help="Name rows without an accepted shape and stop, or count and drop them.",
)
@click.option(
    "--pair_layout",
    "--pair-layout",
    type=click.Choice(["auto", "shared_prefix", "padded"]),
    default="auto",
    show_default=True,
    help="Run each prompt once (shared_prefix), or a row per response. auto: once wherever it is exact.",
)
@click.option(
    "--max_tokens",
    "--max-tokens",
    type=click.IntRange(1),
    default=8192,
    show_default=True,
    metavar="TOKENS",
    help="Tokens of a forward pass, filling included, which bounds its memory.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="Of the weights. auto: as they are stored. Log-probabilities are float32.",
)
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, … Default: the GPU where there is one.")
@click.option("--trust_remote_code", "--trust-remote-code", is_flag=True, help="Run code that comes with MODEL.")
def logps(model: str, data: str, output: Path | None, **options) -> None:
    """Score pairs under a model: log-probabilities, odds, accuracy.

    MODEL is a Hub id or a folder, of a causal language model or of a PEFT adapter; DATA a Hub id, a folder, or a .json,
    .jsonl, .parquet or .csv file, with rows as for training. The rows that are kept come in the order of DATA, as JSON
    Lines on standard output or in a file: source and row number, tokens, mean and sum of each response's token
    log-probabilities, its log odds, the log odds ratio of the pair (log_or), odds_ratio_delta = sigmoid(-log_or), and
    whether chosen is more likely than rejected (is_correct). Report and summary go to standard error.

    \b
    Examples:
      orpo-trl logps outputs/quickstart recipes/quickstart/data --split test | head -n 3
      orpo-trl logps kaist-ai/mistral-orpo-beta pairs.jsonl -o scores.parquet --max_length 2048
      orpo-trl logps outputs/adapter argilla/dpo-mix-7k --split test -o scores.jsonl --dtype bfloat16
    """
    with _failing(), contextlib.redirect_stdout(sys.stderr):  # libraries print to standard output, too
        from orpo_trl.scoring.run_logps import json_lines, run_logps

        records = run_logps(model, data, output, **options)
    if output is None:
        for line in json_lines(records):
            click.echo(line, nl=False)


@main.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The page. Default: report.html in RUN, of several runs in the current folder.",
)
@click.option(
    "--png",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Also write each figure as a PNG file.",
)
@click.option(
    "--csv",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write all metrics as a CSV file.",
)
def report(runs: tuple[Path, ...], output: Path | None, png: Path | None, csv: Path | None) -> None:
    """Make one page of a RUN's folder, or of several side by side.

    Held-out metrics, diagnosis, curves, what the recipes differ in, answers to held-out prompts, and how the runs were
    made, in one HTML file that loads nothing. Folders of other trainers are read too: their trainer_state.json is.

    \b
    Examples:
      orpo-trl report outputs/quickstart
      orpo-trl report outputs/lambda-* -o lambda.html --png figures --csv metrics.csv
    """
    from orpo_trl.report.write import write_report

    with _failing():
        written = write_report(runs, output, png, csv)
    for path in written:
        click.echo(path)


@main.command()
@click.argument("names", nargs=-1, metavar="[KEY]...")
def schema(names: tuple[str, ...]) -> None:
    """Print every key of a recipe, or the KEYs given, with type, default and help.

    \b
    Examples:
      orpo-trl schema | less
      orpo-trl schema beta nll_reduction
    """
    from orpo_trl.recipe.keys import recipe_keys, unknown_key
    from orpo_trl.recipe.show import schema_text

    unknown = [name for name in names if name not in recipe_keys()]
    if unknown:
        raise _Failure("\n".join(unknown_key(name) for name in unknown))
    click.echo(schema_text(names or list(recipe_keys())), nl=False)


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes orpo-trl's commands and recipes in a shell.

    \b
    Examples:
      orpo-trl completion bash >> ~/.bashrc
      orpo-trl completion zsh >> ~/.zshrc
      orpo-trl completion fish > ~/.config/fish/completions/orpo-trl.fish
    """
    from click.shell_completion import get_completion_class

    click.echo(get_completion_class(shell)(main, {}, "orpo-trl", "_ORPO_TRL_COMPLETE").source())


class _failing:
    """Turns what is the user's to mend into a message."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, (ValueError, OSError)) and not isinstance(error, BrokenPipeError):
            raise _Failure(str(error)) from error
