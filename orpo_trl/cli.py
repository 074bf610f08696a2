"""The command `orpo-trl`. Each subcommand imports what it needs when it runs, so that `--help` is quick."""

import math
import os
import shlex
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
    from orpo_trl.shipped import RECIPES

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
    from orpo_trl.engine import Launch, count_gpus, launch_command
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
    from orpo_trl.preflight.check import run_checks

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
    from orpo_trl.shipped import RECIPES

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
    from orpo_trl.recipe.write import expanded

    with _failing():
        loaded = load_recipe([recipe, *overrides])
        build_settings(loaded, with_engine=False)
    click.echo(expanded(loaded), nl=False)


@recipes.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--tool",
    type=click.Choice(["axolotl", "llama-factory", "alignment-handbook", "trl", "authors"]),
    help="Whose file it is. Default: seen from its keys.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the recipe here instead of printing it.")
def import_(file: Path, tool: str | None, output: Path | None) -> None:
    """Turn another tool's ORPO config into a recipe.

    Reads axolotl (`rl: orpo`), LLaMA-Factory (`pref_loss: orpo`), alignment-handbook, TRL's `--config` files, and the
    shell scripts of ORPO's authors. Keys that have no equal here, and places where the objective differs, are listed
    in the recipe's head and on standard error.

    \b
    Example:
      orpo-trl recipes import axolotl.yml -o recipes/mine.yaml
    """
    from orpo_trl.recipe.foreign import import_recipe, recipe_text

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
@click.argument("names", nargs=-1, metavar="[KEY]...")
def schema(names: tuple[str, ...]) -> None:
    """Print every key of a recipe, or the KEYs given, with type, default and help.

    \b
    Examples:
      orpo-trl schema | less
      orpo-trl schema beta nll_reduction
    """
    from orpo_trl.recipe.keys import keys, unknown_key
    from orpo_trl.recipe.write import schema_text

    unknown = [name for name in names if name not in keys()]
    if unknown:
        raise _Failure("\n".join(unknown_key(name) for name in unknown))
    click.echo(schema_text(names or list(keys())), nl=False)


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
