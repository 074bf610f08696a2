"""What the command `orpo-trl` adds to click: messages for errors, standard output for answers, recipes by name."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click import Choice, IntRange, option
from click.shell_completion import CompletionItem

from orpo_trl import output
from orpo_trl.exit_codes import TRY_AGAIN, WRONG_INPUT
from orpo_trl.hidden import hide
from orpo_trl.paths import RECIPES, SLURM_SCRIPT
from orpo_trl.printable import printable

# What `recipes NAME` prints beside the recipes.
_SCRIPTS = {"slurm": SLURM_SCRIPT}


class Failure(click.ClickException):
    """A problem that the user can fix: a message instead of a traceback, and the exit status of wrong usage."""

    exit_code = WRONG_INPUT


class Unfinished(click.ClickException):
    """Work that is not complete, in a sentence that says how to go on."""

    exit_code = TRY_AGAIN

    def __init__(self, message: str):
        super().__init__(printable(hide(message)))


@contextmanager
def _failing() -> Iterator[None]:
    """Turns errors that the user can fix into a message."""
    try:
        yield
    except BrokenPipeError:  # click ends quietly
        raise
    except RecursionError as error:
        raise Failure("a file is nested too deep to be read") from error
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        from orpo_trl.unused_packages import left_out

        if name in ("", "orpo_trl", *left_out):
            raise  # a fault of ours
        raise Failure(f"this needs the package {name}, which is not installed") from error
    except (ValueError, OSError) as error:
        raise Failure(printable(hide(str(error)))) from error


class _Command(click.Command):
    """A command whose standard output carries its answer alone."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # `-h` asks for help where it is no value: first, or behind the recipe.
        if ctx.ignore_unknown_options and "-h" in args[:2] and not args[0].startswith("--"):
            args = ["--help"]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _failing(), output.reserved():
            return super().invoke(ctx)


class _Group(click.Group):
    command_class = _Command


class MainGroup(_Group):
    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        try:
            try:
                return super().main(*args, standalone_mode=standalone_mode, **extra)
            finally:
                if standalone_mode:  # the process ends here
                    output.close()
        except OSError as error:  # of texts that click itself writes, such as the help
            if not standalone_mode:
                raise
            if not isinstance(error, BrokenPipeError):
                click.echo(f"Error: {error}", err=True)
            os._exit(1)


class RecipesGroup(_Group):
    """`recipes NAME` prints a recipe, beside the subcommands."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = super().get_command(ctx, cmd_name)
        if cmd_name in _SCRIPTS:
            return _Command(
                cmd_name,
                callback=lambda: _print_file(_SCRIPTS[cmd_name]),
                help=f"Print the {cmd_name} script, for `> {_SCRIPTS[cmd_name].name}`.",
            )
        if found or cmd_name not in _shipped_names():
            return found
        return _Command(
            cmd_name, callback=lambda: _print_file(RECIPES / f"{cmd_name}.yaml"), help=f"Print the recipe {cmd_name}."
        )

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None:
            from orpo_trl.recipe.files import find_recipe

            with _failing():
                find_recipe(args[0])
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return [*super().shell_complete(ctx, incomplete), *_matching_names(incomplete)]


class Number(click.FloatRange):
    """A finite number: `nan` is in every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def _shipped_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _matching_names(incomplete: str) -> list[CompletionItem]:
    names = [name for name in _shipped_names() if name.startswith(incomplete)]
    return [CompletionItem(name) for name in names]


def complete_recipe(context: click.Context, parameter: click.Parameter, incomplete: str) -> list:
    return [*_matching_names(incomplete), CompletionItem(incomplete, type="file")]


def tokens(name: str, least: int, help: str) -> Any:
    return option(name, type=IntRange(least), metavar="TOKENS", help=help)


def choice(name: str, choices: list[str], help: str) -> Any:
    """An option whose first choice is its default."""
    return option(name, type=Choice(choices), default=choices[0], show_default=True, help=help)


def _print_file(path: Path) -> None:
    output.answer(path.read_text(encoding="utf-8"), end="")
