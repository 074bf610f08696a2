"""README.md and the pages of docs/: commands, recipes and tables are those of the code, and the site builds."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from support.small import REPOSITORY

from orpo_trl.cli import main
from orpo_trl.importers import TOOLS, import_recipe
from orpo_trl.importers.foreign_keys import CONVERTED, DROPPED, RENAMED
from orpo_trl.recipe.keys import recipe_keys
from orpo_trl.recipe.library import shipped_recipes
from orpo_trl.recipe.parse import load_recipe

README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
MOVING = REPOSITORY / "docs" / "moving.md"
NOTEBOOK = REPOSITORY / "docs" / "notebooks" / "orpo_in_python.ipynb"
# Commands whose other words are overrides of a recipe.
WITH_OVERRIDES = (("train",), ("check",), ("recipes", "expand"))


def in_pages(found) -> list:
    """What `found` finds in each page, as parameters whose ids name the page."""
    return [pytest.param(item, id=f"{page.stem}-{number}") for page in PAGES for number, item in enumerate(found(page))]


def fenced(page: Path) -> list[tuple[str, str, str]]:
    """Language, title and text of each fenced block."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', text, re.M | re.S)


def of_language(*languages: str, titled: bool = False):
    return lambda page: [
        (title, text) for language, title, text in fenced(page) if language in languages and bool(title) == titled
    ]


# ---- Commands --------------------------------------------------------------------------------------------------------


def command_lines(page: Path) -> list[list[str]]:
    """The words of each command of this project in a block of code, whether it is fenced or indented."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [*re.findall(r"^(?: {4}|\$ +| {4}\$ +)?((?:orpo-trl|accelerate launch) (?!\w+:).*)$", text, re.M)]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        ends = [number for number, word in enumerate(words) if word in (">", ">>", "|", "&&")]
        found.append(words[: ends[0]] if ends else words)
    return [words for words in found if words[0] == "orpo-trl" or "scripts/run_orpo.py" in words]


def inline_commands(page: Path) -> list[list[str]]:
    """The words of each command in a sentence: some are mentioned without their arguments."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    lines = re.findall(r"`orpo-trl ([a-z][^`]*)`", text.replace("\n", " "))
    return [re.split(r" (?:>>?|\||&&) ", line)[0].split() for line in lines]


def resolved(words: list[str]) -> tuple[click.Command, tuple[str, ...], list[str]]:
    """The command that words name, its name, and the words behind it."""
    command, names = main, ()
    words = list(words)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        context = click.Context(command)
        inner = command.get_command(context, words[0])
        if inner is None:
            break
        command, names, words = inner, (*names, words.pop(0)), words
    return command, names, words


def unknown_options(words: list[str]) -> list[str]:
    """Options that a command does not have, and that are no keys of a recipe where it takes these."""
    command, names, rest = resolved(words)
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
    keys = {f"--{name}" for name in recipe_keys()} if names in WITH_OVERRIDES else set()
    given = [re.split(r"[=.]", word)[0].replace("-", "_").replace("__", "--", 1) for word in rest if word[:2] == "--"]
    given += [word for word in rest if re.fullmatch(r"-[a-z]", word)]
    return [word for word in given if word not in known | keys]


@pytest.mark.parametrize("words", in_pages(command_lines))
def test_command_in_a_block_of_code_can_be_given(words):
    if words[0] == "accelerate":
        rest = words[words.index("scripts/run_orpo.py") + 1 :]
        assert unknown_options(["train", *rest]) == []
        return
    _, *words = words
    assert unknown_options(words) == []
    command, names, rest = resolved(words)
    assert names, words
    assert not isinstance(command, click.Group) or not rest, words
    command.make_context(names[-1], rest)  # raises for a missing argument, or a value that an option does not take


@pytest.mark.parametrize("words", in_pages(inline_commands))
def test_command_in_a_sentence_exists_and_has_its_options(words):
    _, names, _ = resolved(words)
    assert names, words
    assert unknown_options(words) == []


def test_commands_are_found():
    assert ["orpo-trl", "chat", "outputs/quickstart"] in command_lines(README)
    assert sum(len(command_lines(page)) for page in PAGES) > 40
    assert sum(len(inline_commands(page)) for page in PAGES) > 20


# ---- Recipes and code ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", in_pages(of_language("yaml", "yml")))
def test_yaml_is_a_recipe(block, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", "data")
    path = tmp_path / "mine.yaml"
    path.write_text(block[1], encoding="utf-8")
    assert [str(problem) for problem in load_recipe([str(path)]).problems] == []


@pytest.mark.parametrize("block", in_pages(of_language("yaml", "yml", titled=True)))
def test_yaml_of_another_tool_is_imported(block, tmp_path):
    title, text = block
    path = tmp_path / title
    path.write_text(text, encoding="utf-8")
    assert import_recipe(path).tool.lower().replace("-", "_") == path.stem


@pytest.mark.parametrize("block", in_pages(of_language("json", "python")))
def test_json_and_python_can_be_read(block):
    text = block[1]
    if text.startswith(("{", "[")):
        json.loads(text)
    else:
        ast.parse(text)


# ---- Tables ----------------------------------------------------------------------------------------------------------


def table_of_keys(name: str, renamed: dict, converted: dict, dropped: dict) -> str:
    """What becomes of each key: renamed ones, converted ones, then those without an equal by their reason."""
    rows = [f"| `{theirs}` | `{ours}` | |" for theirs, ours in renamed.items()]
    rows += [f"| `{theirs}` | {f'`{ours}`' if ours else '–'} | {how} |" for theirs, (ours, how) in converted.items()]
    reasons: dict[str, list[str]] = {}
    for theirs, reason in dropped.items():
        reasons.setdefault(reason, []).append(f"`{theirs}`")
    rows += [f"| {', '.join(keys)} | – | {reason} |" for reason, keys in reasons.items()]
    return "\n".join([f"| {name} | here | |", "| --- | --- | --- |", *rows])


def tables_of_moving() -> dict[str, str]:
    tables = {"shared": table_of_keys("key", RENAMED, CONVERTED, DROPPED)}
    shared = (RENAMED, CONVERTED, DROPPED)
    for tool in TOOLS.values():
        own = [
            {key: value for key, value in table.items() if common.get(key) != value}
            for table, common in zip((tool.renamed, tool.converted, tool.dropped), shared, strict=True)
        ]
        if tool.id == "alignment_handbook":  # beside TRL's
            trl = TOOLS["trl"]
            tables_of_trl = (trl.renamed, trl.converted, trl.dropped)
            own = [{k: v for k, v in table.items() if k not in of_trl}
                   for table, of_trl in zip(own, tables_of_trl, strict=True)]  # fmt: skip
        tables[tool.id] = table_of_keys(tool.name, *own)
    return tables


@pytest.mark.parametrize("name", list(tables_of_moving()))
def test_page_on_moving_has_every_key_of_the_tools(name):
    table = tables_of_moving()[name]
    assert f"\n\n{table}\n\n" in MOVING.read_text(encoding="utf-8"), f"docs/moving.md should hold:\n{table}"


def test_readme_names_recipes_with_the_memory_of_their_headers():
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+`) \| ([\d., ]+) GiB \|$", README.read_text(encoding="utf-8"), re.M)
    shown = {
        name: float(memory)
        for names, figures in rows
        for name, memory in zip(re.findall(r"`([^`]+)`", names), figures.split(", "), strict=True)
    }
    headers = {recipe.name: re.search(r"at most ([\d.]+) GiB", recipe.fields.get("Memory", ""))
               for recipe in shipped_recipes() if not recipe.name.endswith("_released")}  # fmt: skip
    assert shown == {name: float(memory[1]) for name, memory in headers.items() if memory}


def test_readme_is_short_and_pages_are_wrapped():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    for path in PAGES:
        prose = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S).splitlines()
        assert [line for line in prose if len(line) > 120 and not line.startswith(("|", "    "))] == [], path


def test_links_of_the_readme_lead_to_files():
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)]+)\)", README.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (REPOSITORY / target.partition("#")[0]).exists(), target


def test_files_that_pages_name_exist():
    pattern = r"`((?:recipes|scripts|orpo_trl|tests|docs)/[\w./-]+)(?:::\w+)?`"
    for page in PAGES:
        for name in re.findall(pattern, page.read_text(encoding="utf-8")):
            assert (REPOSITORY / name).exists(), (page.name, name)


def test_readme_and_ci_name_the_same_test_command():
    for path in (README, REPOSITORY / "CONTRIBUTING.md", REPOSITORY / ".ci" / "run"):
        assert "pytest -n 2" in path.read_text(encoding="utf-8"), path


# ---- The site --------------------------------------------------------------------------------------------------------


def test_site_builds_without_a_warning_and_loads_nothing(tmp_path):
    pytest.importorskip("mkdocs")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, "CI": "true"})
    assert done.returncode == 0, done.stderr
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(PAGES) - 1
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|link|iframe)\b[^>]*?(?:src|href)="(https?:[^"]+)"', text)
        assert loaded == [], page
    assert "Weight of the odds-ratio term" in (site / "python.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_notebook_runs(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(REPOSITORY)}}).execute()
    texts = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "rewards/accuracies" in "".join(texts)
