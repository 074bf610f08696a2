"""The command `orpo-trl`. Each subcommand imports what it needs when it runs, so that `--help` is quick."""

import gc
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
from click import Choice, IntRange, argument, option

from orpo_trl import interruptions
from orpo_trl import output as standard_output
from orpo_trl.commands import Failure, MainGroup, Number, RecipesGroup, choice, complete_recipe, tokens
from orpo_trl.exit_codes import FAILED
from orpo_trl.output import answer
from orpo_trl.printable import printable
from orpo_trl.quiet import hide_known_warnings

# Overrides of a recipe are no options of the command. A value such as `-hello` must not be read as `-h`.
_EXTRA = {"ignore_unknown_options": True, "help_option_names": ["--help"]}
_FILE = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)
_ANY_PATH = click.Path(path_type=Path)


_recipe = argument("recipe", shell_complete=complete_recipe)
_overrides = argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[--key value]...")


def _server_options(command: Any) -> Any:
    """Options of requests to a server: those of `generate` and `evaluate` alike."""
    timeout = option("--timeout", type=Number(0, min_open=True), default=600.0, show_default=True, metavar="SECONDS",
                     help="Silence of the server, after which a request is sent again.")  # fmt: skip
    workers = option("--workers", type=IntRange(1), default=8, show_default=True, metavar="N",
                     help="Requests at a time of --endpoint.")  # fmt: skip
    return workers(timeout(command))


def _sampling_options(command: Any) -> Any:
    """Options of a model that answers: those of `generate` and `chat` alike."""
    options = [
        option("--top_p", type=Number(0, 1, min_open=True), default=1.0, show_default=True,
               help="Share of the probability to draw from."),
        option("--seed", type=int, default=42, show_default=True, help="Of the answers that are drawn."),
        option("--chat_template_path", metavar="NAME",
               help="A .jinja file, or a tokenizer. Default: that of the tokenizer."),
        choice("--dtype", ["auto", "bfloat16", "float16", "float32"], "Of the weights. auto: as they are stored."),
        option("--device", metavar="NAME", help="cpu, cuda, cuda:1, … Default: the GPU if there is one."),
        option("--trust_remote_code", is_flag=True, help="Run code that comes with MODEL."),
    ]  # fmt: skip
    for add in reversed(options):
        command = add(command)
    return command


@click.group(
    cls=MainGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        # Every option takes both spellings: `--gpu_memory` and `--gpu-memory`.
        "token_normalize_func": lambda name: name.replace("-", "_"),
    },
)
@click.version_option(package_name="orpo-trl")
def main() -> None:
    """ORPO training on TRL: recipes, checks before training, and a launcher.

    \b
    Examples:
      orpo-trl train quickstart                    a small model on a CPU, in a minute or two
      orpo-trl check recipes/mistral_beta.yaml     before renting GPUs
      orpo-trl recipes                             the shipped recipes
    """
    hide_known_warnings()


@main.command(context_settings=_EXTRA)
@_recipe
@_overrides
@option("--engine", help="zero3, zero2, zero3_offload, fsdp2, ddp, or an accelerate config. Default: the recipe's.")
@option("--num_processes", type=int, metavar="N", help="GPUs, of all machines together. Default: all.")
@option("--num_machines", type=int, default=1, metavar="N", help="Machines. Default: 1.")
@option("--machine_rank", type=int, metavar="N", help="This machine's number, from 0.")
@option("--main_process_ip", metavar="HOST", help="Address of machine 0.")
@option("--main_process_port", type=IntRange(1, 65535), metavar="PORT", help="A free port of machine 0.")
@option("--dry_run", is_flag=True, help="Print the command line, and do not run it.")
def train(recipe: str, overrides: tuple[str, ...], dry_run: bool, **launch: Any) -> None:
    """Train as RECIPE says: a file, or the name of a shipped recipe.

    Checks the recipe. One process then runs here; several are started by an `accelerate launch` command line, which is
    printed. A signal or Ctrl-C stops the run with a checkpoint and exit status 75: the same command goes on. Every key
    of the recipe can be overridden by `--key value`; `orpo-trl schema` lists them.

    \b
    Examples:
      orpo-trl train recipes/mistral_beta.yaml --learning_rate 1e-5
      orpo-trl train mistral_beta --engine fsdp2 --num_processes 4
      orpo-trl train quickstart --engine zero3 --num_processes 2 --dry_run
      orpo-trl train mistral_beta --num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip 10.0.0.1
    """
    from orpo_trl.unused_packages import leave_out_unused

    given = ["orpo-trl", *sys.argv[1:]]
    if not dry_run:
        interruptions.listen(given)  # first of all: the imports below take seconds
    leave_out_unused([recipe, *overrides], launch["engine"])
    from orpo_trl.devices import count_gpus
    from orpo_trl.launch import Launch, find_own_programs, is_one_process, launch_command, machines, run_here
    from orpo_trl.recipe.parse import build_settings, load_recipe

    loaded = load_recipe([recipe, *overrides])
    build_settings(loaded, with_engine=False)
    own = {key: loaded.settings.get(key) for key in ("deepspeed", "fsdp")}
    gpus = count_gpus()
    asked = Launch(**launch)
    command = launch_command(asked, loaded.name, list(overrides), own, gpus)
    if not gpus:
        # Else DeepSpeed, which accelerate imports, warns that it has found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if dry_run:
            click.echo("This machine has no GPU, so this is a command line for CPUs.", err=True)
    if dry_run:
        answer(shlex.join(command))
        return
    standard_output.release()
    find_own_programs()
    if is_one_process(asked, gpus):
        raise SystemExit(run_here([loaded.name, *overrides]))
    from orpo_trl.supervisor import Supervisor

    click.echo(shlex.join(command))
    raise SystemExit(Supervisor(command, given, machines(asked)).run())


@main.command(context_settings=_EXTRA)
@_recipe
@_overrides
@option("--engine", help="zero3, zero2, zero3_offload, fsdp2 or ddp. Default: the recipe's.")
@option("--num_processes", type=IntRange(1), metavar="N", help="GPUs to plan for. Default: this machine's.")
@option("--gpu", metavar="NAME", help="GPU to plan for, such as a100-80gb or h100. Default: this machine's.")
@option("--gpu_memory", type=Number(0, min_open=True), metavar="GIB", help="Memory of one GPU. Default: that of --gpu.")
@option(
    "--utilisation",
    type=Number(0, 1, min_open=True),
    default=0.4,
    show_default=True,
    help="Share of the GPU's peak FLOP/s that the run reaches.",
)
@option("--price", type=Number(0), metavar="USD", help="Price of one GPU for one hour.")
@option("--full", is_flag=True, help="Prepare all rows, not a sample.")
@option("--color/--no_color", default=None, help="Colour the printed pair. Default: on a terminal.")
def check(recipe: str, overrides: tuple[str, ...], color: bool | None, **options: Any) -> None:
    """Look at RECIPE before it is trained, without loading weights.

    Numbered steps: the recipe itself, model config and tokenizer, chat template, data, one pair token by token,
    optimiser steps, memory, time and cost, and missing packages. Each ends in ✓ (fine), ✗ (to fix) or skipped;
    the exit status is 1 if one failed.

    \b
    Examples:
      orpo-trl check recipes/mistral_beta.yaml --num_processes 4 --gpu a100-80gb --price 2
      orpo-trl check quickstart --full
      orpo-trl check my.yaml --gpu_memory 24
    """
    from orpo_trl.unused_packages import leave_out_unused

    # Nearly all objects are those of imports, and stay: to look among them for garbage takes a sixth of the CPU time.
    click.get_current_context().call_on_close(partial(gc.set_threshold, *gc.get_threshold()))
    gc.set_threshold(50_000)
    leave_out_unused([recipe, *overrides])
    from orpo_trl.check.results import CheckOptions
    from orpo_trl.check.steps import run_checks

    color = standard_output.is_terminal() if color is None else color
    checked = CheckOptions([recipe, *overrides], color=color, **options)
    if not run_checks(checked, lambda line: answer(line, color=color)):
        raise SystemExit(1)


@main.group(cls=RecipesGroup, invoke_without_command=True, subcommand_metavar="[NAME | COMMAND]")
@click.pass_context
def recipes(context: click.Context) -> None:
    """List the shipped recipes, or print the one called NAME, or the script for a SLURM cluster.

    \b
    Examples:
      orpo-trl recipes
      orpo-trl recipes mistral_beta > my.yaml
      orpo-trl recipes slurm > train.sbatch
      orpo-trl recipes expand my.yaml
      orpo-trl recipes import axolotl.yml -o my.yaml
    """
    if context.invoked_subcommand is None:
        with standard_output.reserved():
            from orpo_trl.recipe.library import shipped_recipes

            headers = shipped_recipes()
            width = max(len(header.name) for header in headers)
            for header in headers:
                answer(f"{header.name:<{width}}  {header.title}")


@recipes.command(context_settings=_EXTRA)
@_recipe
@_overrides
def expand(recipe: str, overrides: tuple[str, ...]) -> None:
    """Print RECIPE together with its parents and overrides, and where each value comes from.

    \b
    Example:
      orpo-trl recipes expand mistral_beta_released --learning_rate 1e-5
    """
    from orpo_trl.unused_packages import leave_out_all

    leave_out_all()
    from orpo_trl.recipe.parse import build_settings, load_recipe
    from orpo_trl.recipe.show import expanded

    loaded = load_recipe([recipe, *overrides])
    build_settings(loaded, with_engine=False)
    answer(expanded(loaded), end="")


@recipes.command("import")
@argument("file", type=_ANY_PATH)
@option(
    "--tool",
    type=Choice(["axolotl", "llama_factory", "alignment_handbook", "trl"]),
    help="The tool whose config it is. Default: detected from its keys.",
)
@option("-o", "--output", type=_ANY_PATH, help="Write the recipe here instead of printing it.")
def import_(file: Path, tool: str | None, output: Path | None) -> None:
    """Turn another tool's ORPO config into a recipe.

    Reads axolotl (`rl: orpo`), LLaMA-Factory (`pref_loss: orpo`), alignment-handbook, and TRL's `--config` files. The
    recipe's header and standard error list the keys that have no equal here, and what differs in the objective. For a
    shell script of ORPO's authors, the message names the shipped recipe that was made from it.

    \b
    Example:
      orpo-trl recipes import axolotl.yml -o recipes/mine.yaml
    """
    from orpo_trl.unused_packages import leave_out_all

    leave_out_all()
    from orpo_trl.importers import import_recipe, recipe_text
    from orpo_trl.plain_files import write_text

    if output is not None and os.path.lexists(output):
        raise ValueError(f"--output: {output} exists already")
    imported = import_recipe(file, tool)
    text = recipe_text(imported, file.name)
    if output is None:
        answer(text, end="")
    else:
        write_text(output, text)
    for title, notes in (("Keys without an equal here", imported.no_equal), ("Differences", imported.differences)):
        if notes:
            click.echo(f"{title}:", err=True)
        for note in notes:
            place = f"{file}:{note.line}: " if note.line else ""
            click.echo(printable(f"  {place}{note.text}"), err=True)
    if output is not None:
        click.echo(f"Written to {output}. Next: orpo-trl check {output}", err=True)


@main.command()
@argument("model")
@argument("data")
@option("-o", "--output", type=_ANY_PATH, help="A new .jsonl or .parquet file. Default: print.")
@option("--against", metavar="BASE", help="Also score the same tokens under this model, and show the difference.")
@option("--split", default="train", show_default=True, help="Split of DATA.")
@option("--config", help="Configuration of a Hub dataset.")
@option("--tokenizer", metavar="NAME", help="Hub id or folder. Default: MODEL's own.")
@option("--chat_template_path", metavar="NAME", help="A .jinja file, or a tokenizer. Default: that of the tokenizer.")
@option("--strings_as_messages", is_flag=True, help="Render string prompts and responses through the chat template.")
@choice(
    "--prompt_turns",
    ["auto", "all", "first"],
    "The prompt of a conversation: as `prompt` gives its turns, all but the last answer, or up to the first.",
)
@tokens("--max_length", 2, "Cut responses of longer rows. Default: none is cut.")
@tokens("--max_prompt_length", 1, "Drop rows with prompts as long as this.")
@tokens("--max_completion_length", 1, "Cut longer responses.")
@choice("--on_malformed", ["error", "drop"], "Name rows without an accepted shape and stop, or count and drop them.")
@choice(
    "--on_unrendered",
    ["warn", "error", "drop"],
    "Rows of which the chat template leaves out words: score what is left, name them and stop, or drop them.",
)
@choice(
    "--pair_layout",
    ["auto", "shared_prefix", "padded"],
    "Run each prompt once (shared_prefix), or a row per response. auto: once wherever it is exact.",
)
@option(
    "--max_tokens",
    type=IntRange(1),
    default=8192,
    show_default=True,
    metavar="TOKENS",
    help="Tokens of a forward pass, padding included. They bound its memory.",
)
@choice(
    "--dtype",
    ["auto", "bfloat16", "float16", "float32"],
    "Of the weights. auto: as they are stored. Log-probabilities are float32.",
)
@option("--device", metavar="NAME", help="cpu, cuda, cuda:1, … Default: the GPU if there is one.")
@option("--trust_remote_code", is_flag=True, help="Run code that comes with MODEL.")
def logps(model: str, data: str, output: Path | None, **options: Any) -> None:
    """Score pairs under a model: log-probabilities, odds, accuracy.

    MODEL is a Hub id or a folder, of a causal language model or of a PEFT adapter; DATA a Hub id, a folder, or a .json,
    .jsonl, .parquet or .csv file, with rows as for training. The rows that are kept come in the order of DATA, as JSON
    Lines on standard output or in a file: source and row number, tokens, mean and sum of each response's token
    log-probabilities, its log odds, the log odds ratio of the pair (log_or), odds_ratio_delta = sigmoid(-log_or), and
    whether chosen is more likely than rejected (is_correct). Report and summary go to standard error.

    With --against BASE each record also has BASE's values (base_chosen_logp, …), and a table on standard error shows
    both models and their difference with a paired bootstrap interval of 95 %. MODEL's tokenizer and chat template make
    the rows of both; rows with tokens that are others for BASE are refused.

    \b
    Examples:
      orpo-trl logps outputs/quickstart recipes/quickstart/data --split test | head -n 3
      orpo-trl logps kaist-ai/mistral-orpo-beta pairs.jsonl -o scores.parquet --max_length 2048
      orpo-trl logps outputs/adapter argilla/dpo-mix-7k --split test -o scores.jsonl --dtype bfloat16
      orpo-trl logps outputs/beta pairs.jsonl -o scores.parquet --against mistralai/Mistral-7B-v0.1
    """
    from orpo_trl.scoring.run_logps import json_lines, run_logps

    records = run_logps(model, data, output, **options)
    if output is None:
        for line in json_lines(records):
            answer(line, end="")


@main.command()
@argument("model")
@argument("prompts")
@option("-o", "--output", required=True, type=_FILE, help="The file of answers.")
@option("--data", type=_FILE, help="Prompts of the benchmark. Default: from the Hub.")
@option("--against", metavar="BASE", help="Also answer with this model, and show both.")
@option("--limit", type=IntRange(1), metavar="N", help="The first prompts alone.")
@option("--endpoint", metavar="URL", help="An OpenAI-compatible server that answers, and knows MODEL by this name.")
@_server_options
@tokens("--max_new_tokens", 1, "Longest answer. Default: the benchmark's; 1024 of a file.")
@option("--temperature", type=Number(0), help="0: greedy. Default: the benchmark's; 0 of a file.")
@_sampling_options
@option(
    "--batch_size",
    type=IntRange(1),
    default=16,
    show_default=True,
    metavar="N",
    help="Answers at a time of a model in this process.",
)
def generate(model: str, prompts: str, output: Path, **options: Any) -> None:
    """Write MODEL's answers to PROMPTS.

    MODEL is a Hub id or a folder, of a causal language model or of a PEFT adapter. PROMPTS is a benchmark (alpaca_eval,
    mt_bench, ifeval) or a file: .txt with a prompt a line, .json or .jsonl with `prompt`, `instruction` or `messages`.
    A benchmark has its own format, settings and second turns; prompts of a file get JSON Lines with `response`. The
    same command goes on after a kill. How the answers were made stands in FILE.settings.json. Several GPUs:
    `accelerate launch $(which orpo-trl) generate ...`. A server's key is read from OPENAI_API_KEY.

    \b
    Examples:
      orpo-trl generate outputs/beta alpaca_eval -o beta.json --dtype bfloat16
      orpo-trl generate outputs/beta mt_bench -o beta.jsonl --data question.jsonl
      orpo-trl generate outputs/adapter questions.txt -o answers.jsonl --against mistralai/Mistral-7B-v0.1
      orpo-trl generate beta ifeval -o beta.jsonl --endpoint http://localhost:8000/v1 --workers 64
    """
    from orpo_trl.generate.command import run_generate

    for text in run_generate(model, prompts, output, **options):
        answer(text)


@main.command()
@argument("model")
@tokens("--max_new_tokens", 1, "Longest answer. Default: 1024.")
@option("--temperature", type=Number(0), default=0.7, show_default=True, help="0: greedy.")
@_sampling_options
def chat(model: str, max_new_tokens: int | None, **options: Any) -> None:
    """Talk to MODEL: a Hub id or a folder, of a causal language model or of a PEFT adapter.

    Each line of standard input is a question, asked in the model's own chat template with all that was said before.

    \b
    Examples:
      orpo-trl chat outputs/quickstart
      orpo-trl chat outputs/adapter --temperature 0
    """
    from orpo_trl.generate.chat import run_chat

    run_chat(model, max_new_tokens=max_new_tokens or 1024, **options)


@main.command()
@argument("adapter")
@option("-o", "--output", type=_ANY_PATH, required=True, metavar="DIR", help="The new folder.")
@option("--base", metavar="MODEL", help="Base model, where it is not the one that ADAPTER names.")
@option("--data", metavar="DATA", help="Pairs to compare log-probabilities over. Default: ten short ones.")
@option("--split", default="train", show_default=True, help="Split of DATA.")
@choice("--dtype", ["auto", "bfloat16", "float16", "float32"], "Of the weights. auto: as the base stores them.")
@option("--device", metavar="NAME", help="Where the model is held: cpu, cuda, … Default: cpu.")
@option("--trust_remote_code", is_flag=True, help="Run code that comes with the base model.")
def merge(adapter: str, output: Path, dtype: str, **options: Any) -> None:
    """Turn a PEFT ADAPTER and its base into a plain model.

    ADAPTER is a Hub id or a folder, such as that of a run with `use_peft: true`. The new folder DIR has weights,
    tokenizer, chat template, generation config and model card, and loads without peft. An adapter that was trained on
    quantised weights (QLoRA) is merged into the base's own 16-bit weights.

    Pairs are scored before and after. Where their log-probabilities differ by more than rounding, the exit status is 1
    and DIR is not kept.

    \b
    Examples:
      orpo-trl merge outputs/mistral_qlora -o outputs/merged
      orpo-trl merge outputs/mistral_qlora -o outputs/merged --data recipes/quickstart/data --split test
    """
    from orpo_trl.merge import MergeError, describe, merge_adapter

    try:
        found = merge_adapter(adapter, output, dtype=dtype, **options)
    except MergeError as error:
        click.echo(f"Error: {printable(str(error))}", err=True)
        raise SystemExit(FAILED) from error
    click.echo(printable(describe(found, output, dtype)), err=True)
    answer(str(output))


@main.command()
@argument("target")
@argument("benchmark", required=False)
@option("--data", type=_ANY_PATH, help="Items of BENCHMARK instead of the Hub's: a file, or a folder of NAME.jsonl.")
@option("--limit", type=IntRange(1), metavar="N", help="The first N items alone. Such figures compare with no others.")
@option(
    "-o", "--output", type=_FOLDER, help="Write into DIR/evaluations. Default: TARGET, or outputs/NAME of a Hub id."
)
@option("--batch_size", type=IntRange(1), default=8, show_default=True, metavar="N", help="Rows of a forward pass.")
@choice("--dtype", ["auto", "bfloat16", "float16", "float32"], "Of the weights. auto: as they are stored.")
@option("--device", metavar="NAME", help="cpu, cuda, cuda:1, … Default: the GPU if there is one.")
@option("--seed", type=int, default=1234, show_default=True, help="Of everything that is drawn.")
@tokens("--max_new_tokens", 1, "Longest answer. Default: the benchmark's own.")
@option("--chat_template_path", metavar="NAME", help="A .jinja file, or a tokenizer. Default: that of the model.")
@option("--against", metavar="BASE", help="Also measure this model: preferences.")
@option("--judge", metavar="NAME", help="Model that judges. Default: the benchmark's own.")
@option("--endpoint", metavar="URL", help="OpenAI-compatible server of the judge. Its key: OPENAI_API_KEY.")
@option("--judge_prompts", type=_FILE, help="FastChat's judge_prompts.jsonl: mt_bench.")
@option("--reference_answers", type=_FILE, help="FastChat's reference answers: mt_bench.")
@option("--reference_outputs", type=_FILE, help="Answers to compare with: alpaca_eval.")
@option("--annotations", type=_FILE, help="Score these stored judgements: AlpacaEval's, or FastChat's of one model.")
@_server_options
@option("--price", type=(Number(0), Number(0)), metavar="IN OUT", help="Judge's USD per million tokens, if unknown.")
@option("--yes", is_flag=True, help="Send requests that cost money without asking.")
@option("--trust_remote_code", is_flag=True, help="Run code that comes with TARGET.")
def evaluate(target: str, benchmark: str | None, **options: Any) -> None:
    """Measure TARGET by BENCHMARK, as published figures were measured.

    TARGET is a Hub id, the folder of a model, an adapter or a run, or a file of answers that `generate` has written.
    BENCHMARK is ifeval, open_llm (arc_challenge, hellaswag, mmlu, truthfulqa_mc2, winogrande, gsm8k), preferences,
    alpaca_eval (version 2), alpaca_eval_1, mt_bench, or any task of lm-eval by its name. Default: all that need no
    judge. The figures are printed, and written with every setting and version to evaluations/NAME.json. On several
    GPUs: `accelerate launch $(which orpo-trl) evaluate ...`.

    A judge costs money: what it will cost is shown first. Its replies are kept beside the evaluation, and the same
    command goes on after a kill, or where verdicts are missing (exit status 75).

    \b
    Examples:
      orpo-trl evaluate outputs/mistral_beta
      orpo-trl evaluate kaist-ai/mistral-orpo-beta ifeval --dtype bfloat16
      orpo-trl evaluate outputs/mistral_beta open_llm --data leaderboard --limit 100
      orpo-trl evaluate answers.jsonl ifeval --data ifeval.jsonl
      orpo-trl evaluate beta.json alpaca_eval --reference_outputs alpaca_eval_gpt4_baseline.json
      orpo-trl evaluate beta.jsonl mt_bench --judge_prompts judge_prompts.jsonl --reference_answers gpt-4.jsonl
    """
    from orpo_trl.evaluate.command import run_evaluate
    from orpo_trl.evaluate.options import Options

    for text in run_evaluate(target, benchmark, Options(**options)):
        answer(text)


@main.command()
@argument("runs", nargs=-1, required=True, metavar="RUN...", type=_ANY_PATH)
@option(
    "-o",
    "--output",
    metavar="FILE",
    type=_FILE,
    help="The page. Default: report.html in RUN, of several runs in the current folder.",
)
@option("--png", metavar="DIR", type=_FOLDER, help="Also write each figure as a PNG file.")
@option(
    "--csv",
    metavar="FILE",
    type=_FILE,
    help="Also write all metrics as a CSV file, and evaluations as FILE_evaluations.",
)
def report(runs: tuple[Path, ...], output: Path | None, png: Path | None, csv: Path | None) -> None:
    """Make one page of a RUN's folder, or of several side by side.

    Held-out metrics, evaluations, diagnosis, curves, what the recipes differ in, answers to held-out prompts, and how
    the runs were made, in one HTML file that loads nothing. With `eval_on_start: true` in the recipe, the held-out
    metrics before training stand beside those after it. Evaluations stand beside published ones where judge, template,
    shots and number of items agree. Folders of other trainers are read too: their trainer_state.json is.

    \b
    Examples:
      orpo-trl report outputs/quickstart
      orpo-trl report outputs/lambda-* -o lambda.html --png figures --csv metrics.csv
    """
    from orpo_trl.report.write import write_report

    for path in write_report(runs, output, png, csv):
        answer(str(path))


@main.command()
@argument("names", nargs=-1, metavar="[KEY]...")
def schema(names: tuple[str, ...]) -> None:
    """Print every key of a recipe, or the KEYs given, with type, default and help.

    \b
    Examples:
      orpo-trl schema | less
      orpo-trl schema beta nll_reduction
    """
    from orpo_trl.unused_packages import leave_out_torch

    leave_out_torch()
    from orpo_trl.recipe.keys import recipe_keys, unknown_key
    from orpo_trl.recipe.show import schema_text

    unknown = [name for name in names if name not in recipe_keys()]
    if unknown:
        raise Failure("\n".join(unknown_key(name) for name in unknown))
    answer(schema_text(names or list(recipe_keys())), end="")


@main.command()
@argument("shell", type=Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes orpo-trl's commands and recipes in a shell.

    \b
    Examples:
      orpo-trl completion bash >> ~/.bashrc
      orpo-trl completion zsh >> ~/.zshrc
      orpo-trl completion fish > ~/.config/fish/completions/orpo-trl.fish
    """
    from click import shell_completion

    shells = {
        "bash": shell_completion.BashComplete,
        "zsh": shell_completion.ZshComplete,
        "fish": shell_completion.FishComplete,
    }
    answer(shells[shell](main, {}, "orpo-trl", "_ORPO_TRL_COMPLETE").source())
