"""The command as its users run it: help, completion, recipes, and messages for wrong input."""

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner
from support.recipes import parse_recipe
from support.small import REPOSITORY

from orpo_trl.cli import main
from orpo_trl.config import ORPOConfig
from orpo_trl.importers import TOOLS
from orpo_trl.paths import RECIPES

ORPO_TRL = str(Path(sys.executable).with_name("orpo-trl"))


def run(*arguments):
    return CliRunner().invoke(main, list(arguments), prog_name="orpo-trl")


def commands(command: click.Command = main, path: tuple[str, ...] = ()):
    yield path
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from commands(inner, (*path, name))


def options(*path: str) -> dict[str, click.Option]:
    """The options of a command by name."""
    command: click.Command = main
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    return {option.name: option for option in command.params if isinstance(option, click.Option) and option.name}


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_help_has_an_example_of_the_command(path):
    result = run(*path, "--help")
    assert result.exit_code == 0
    examples = result.output.split("Example", 1)[1].split("Options:")[0]
    assert f"  {' '.join(('orpo-trl', *path))}" in examples


def test_examples_of_help_name_options_that_there_are():
    for path in commands():
        text = run(*path, "--help").output
        example, options = text.split("Example", 1)[1].split("Options:")
        for word in example.split():
            if word.startswith("--") and word not in ("--learning_rate",):
                assert word in options, (path, word)


def test_help_loads_no_training_library():
    code = (
        "import sys; from orpo_trl.cli import main; main(['--help'], standalone_mode=False);"
        "assert not {'torch', 'transformers', 'trl', 'datasets', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("words", "completed"),
    [("orpo-trl tr", "train"), ("orpo-trl train quick", "quickstart"), ("orpo-trl recipes mistral_b", "mistral_beta"),
     ("orpo-trl recipes exp", "expand"), ("orpo-trl train x --eng", "--engine")],
)  # fmt: skip
def test_shell_completion(words, completed):
    shown = {"_ORPO_TRL_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run([ORPO_TRL], env={**os.environ, **shown}, capture_output=True, text=True, check=True)
    assert f"plain,{completed}" in done.stdout.splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_is_one_that_the_shell_reads(shell, tmp_path):
    script = run("completion", shell).output
    assert "_ORPO_TRL_COMPLETE" in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_tools_to_import_from_are_those_that_are_read():
    tool = options("recipes", "import")["tool"].type
    assert isinstance(tool, click.Choice)
    assert set(tool.choices) == set(TOOLS)


def test_options_of_logps_have_the_choices_of_the_config():
    config = {field.name: field for field in dataclasses.fields(ORPOConfig)}
    for name in ("prompt_turns", "on_malformed", "on_unrendered", "pair_layout"):
        option = options("logps")[name]
        assert isinstance(option.type, click.Choice)
        assert list(option.type.choices) == config[name].metadata["choices"]
        assert option.default == config[name].default


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_help_shows_one_spelling(path):
    for option in options(*path).values():
        for name in (*option.opts, *option.secondary_opts):
            assert "-" not in name.lstrip("-"), name


def test_every_option_takes_both_spellings():
    one, other = (run("train", "quickstart", flag) for flag in ("--dry_run", "--dry-run"))
    assert (one.exit_code, other.exit_code) == (0, 0)
    assert "run_orpo.py" in one.stdout
    assert one.stdout == other.stdout


def test_overrides_keep_their_text():
    words = ["--run-name", "a-b --c-d", "--model_init_kwargs.some-part", "1", "--beta=0.5", "--num_processes", "1"]
    line = run("train", "quickstart", "--dry-run", *words).stdout
    assert shlex.split(line)[-5:] == ["--run-name", "a-b --c-d", "--model_init_kwargs.some-part", "1", "--beta=0.5"]


def test_recipes_are_listed_and_printed():
    listed = run("recipes").output
    for path in RECIPES.glob("*.yaml"):
        assert f"{path.stem} " in listed
        assert run("recipes", path.stem).output == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["quickstart", "mistral_capybara_released"])
def test_expanded_recipe_is_the_same_run(name, tmp_path):
    result = run("recipes", "expand", name, "--beta", "0.7", "--model_init_kwargs.subfolder", "a")
    assert result.exit_code == 0
    path = tmp_path / "expanded.yaml"
    path.write_text(result.stdout)
    assert "extends" not in yaml.safe_load(result.stdout)
    ours = parse_recipe([name, "--beta", "0.7", "--model_init_kwargs.subfolder", "a"])
    for expected, found in zip(ours, parse_recipe([str(path)]), strict=True):
        assert repr(expected) == repr(found)


def test_expanded_recipe_names_places_and_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hf_secret")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("extends: quickstart.yaml\nhub_token: ${SOME_TOKEN}\n")
    text = run("recipes", "expand", str(recipe), "--beta", "1").stdout
    assert "hub_token: ${SOME_TOKEN}" in text
    assert "hf_secret" not in text
    assert f"# {recipe}:2" in text
    assert next(line for line in text.splitlines() if line.startswith("beta:")).endswith("# command line")


def test_schema_has_every_key_with_type_default_and_help():
    result = run("schema", "beta", "eval_strategy")
    assert "beta\n    a finite number; default 0.1\n    Weight of the odds-ratio term" in result.output
    assert "one of no, steps, epoch; default 'no'" in result.output
    everything = run("schema").output
    assert "lora_r\n" in everything
    assert "class '" not in everything


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["train", "quickstrat"], 2, "did you mean the shipped recipe `quickstart`?"),
        (["train", "quickstart", "--bta", "1"], 2, "command line: unknown key `bta`; did you mean `beta`?"),
        (["train", "quickstart", "--num_processes", "two"], 2, "'two' is not a valid integer"),
        (
            ["train", "quickstart", "--engine", "zero4"],
            2,
            "--engine: expected zero2, zero3, zero3_offload, fsdp2, ddp or",
        ),
        (["train", "quickstart", "--num_machines", "2"], 2, "--num_machines 2 also needs --num_processes"),
        (["train"], 2, "Missing argument 'RECIPE'"),
        (["recipes", "mistral_bet"], 2, "did you mean the shipped recipe `mistral_beta`?"),
        (["recipes", "nonesuch"], 2, "`orpo-trl recipes` lists the shipped ones"),
        (
            ["train", "quickstart", "--use_peft", "--load_in_4bit"],
            2,
            "`load_in_4bit` quantises loaded weights; `from_scratch`",
        ),
        (["train", "mistral_beta", "--load_in_4bit"], 2, "`load_in_4bit`: quantised weights cannot be trained; set"),
        (["recipes", "expand", "quickstart", "--extends", "x"], 2, "`extends` stands in a recipe's file"),
        (["recipes", "expand", "absent.yaml"], 2, "absent.yaml: there is no such recipe"),
        (["recipes", "import", "absent.yaml"], 2, "absent.yaml"),
        (["schema", "betta"], 2, "unknown key `betta`; did you mean `beta`?"),
        (["check", "quickstart", "--gpu", "abacus"], 2, "--gpu: expected"),
        (["check", "quickstart", "--engine", "zero4"], 2, "--engine: expected"),
        (["nonesuch"], 2, "No such command 'nonesuch'"),
    ],
)
def test_wrong_input_ends_with_a_message(arguments, status, message, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    result = run(*arguments)
    assert result.exit_code == status
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_pipe_that_is_closed_early_is_no_error_of_the_user():
    command = f"{ORPO_TRL} recipes expand mistral_beta | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Broken pipe" not in done.stderr
    assert done.stdout.startswith("# ")


def test_dry_run_prints_a_command_line_and_nothing_else(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    result = run("train", "quickstart", "--beta", "0.3", "--run_name", "a b", "--dry-run", "--max_steps", "-1")
    line = result.stdout.strip()
    command, overrides = line.split(" --beta ")
    assert command.endswith("single.yaml --num_processes 1 scripts/run_orpo.py recipes/quickstart.yaml")
    assert overrides == "0.3 --run_name 'a b' --max_steps -1"


@pytest.mark.slow
def test_slurm_script_starts_one_launcher_on_each_machine(tmp_path):
    """SLURM's own programs are stood in for: what they are asked for, and what they set, is from its manual."""
    for name, text in {
        "scontrol": 'echo "host-a"; echo "host-b"',
        "srun": 'while [[ $1 == --* ]]; do shift; done; for node in 0 1; do SLURM_NODEID=$node "$@"; done',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{Path(ORPO_TRL).parent}:{os.environ['PATH']}", "SLURM_NNODES": "2",
        "SLURM_GPUS_PER_NODE": "h100:8", "SLURM_JOB_NODELIST": "host-[a-b]", "SLURM_JOB_ID": "41234", "DRY_RUN": "1",
    }  # fmt: skip
    script = REPOSITORY / "scripts" / "slurm" / "train.sbatch"
    done = subprocess.run(
        ["bash", str(script), "mistral_beta", "--run_name", "a b"],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        flags = f"--num_processes 16 --machine_rank {rank} --main_process_ip host-a --main_process_port 21234"
        assert f"{flags} --num_machines 2 scripts/run_orpo.py recipes/mistral_beta.yaml --run_name 'a b'" in line
    assert subprocess.run(["bash", str(script)], env=environment, capture_output=True).returncode == 2
