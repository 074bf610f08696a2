"""Files around the code: declared dependencies, the list of known failures, and the environment of tests."""

import ast
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
CODE = [path for folder in ("orpo_trl", "scripts") for path in sorted((REPOSITORY / folder).rglob("*.py"))]
TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))
KNOWN_FAILURES = REPOSITORY / "docs" / "known_failures.md"
PROJECT = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli").loads(
    (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
)["project"]


def imported_modules(path: Path) -> set[str]:
    """Full names of the modules that a file imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_names(requirements: list[str]) -> set[str]:
    return {canonical(re.split(r"[\[<>=!~;, ]", requirement, maxsplit=1)[0]) for requirement in requirements}


def test_every_third_party_import_is_declared():
    of_users = [name for extra, names in PROJECT["optional-dependencies"].items() if extra != "dev" for name in names]
    declared = requirement_names(PROJECT["dependencies"] + of_users)
    distributions = importlib.metadata.packages_distributions()
    roots = {module.partition(".")[0] for path in CODE for module in imported_modules(path)}
    third_party = roots - set(sys.stdlib_module_names) - {"orpo_trl"}
    assert {"torch", "numpy", "yaml"} <= third_party
    undeclared = {root for root in third_party if not {*map(canonical, distributions.get(root, [root]))} & declared}
    assert not undeclared


def test_every_dependency_has_a_lowest_version_and_a_pinned_one():
    extras = [name for names in PROJECT["optional-dependencies"].values() for name in names]
    requirements = [name for name in PROJECT["dependencies"] + extras if not name.startswith("orpo-trl[")]
    assert [requirement for requirement in requirements if ">=" not in requirement] == []
    pinned = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert requirement_names(requirements) <= requirement_names(pinned)


def test_package_imports_nothing_experimental():
    """TRL may change or remove `trl.experimental` (known failure 29)."""
    files = [path for path in CODE if path.is_relative_to(REPOSITORY / "orpo_trl")]
    assert {module for path in files for module in imported_modules(path) if "trl.experimental" in module} == set()


def known_failures() -> dict[int, list[str]]:
    """The tests of each row of the list, by its number."""
    rows = {}
    for line in KNOWN_FAILURES.read_text(encoding="utf-8").splitlines():
        number, *cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if number.strip().isdecimal():
            assert len(cells) == 3, line
            rows[int(number)] = re.findall(r"`(tests/[^`]+)`", cells[-1])
    return rows


def test_known_failures_that_tests_mention_are_listed():
    mentioned = {
        int(number)
        for path in TESTS
        for numbers in re.findall(r"[Kk]nown failures? ([\d, and]+)", path.read_text(encoding="utf-8"))
        for number in re.findall(r"\d+", numbers)
    }
    assert {1, 5, 23} <= mentioned
    assert mentioned <= set(known_failures())


def test_known_failures_are_numbered_and_their_tests_exist():
    listed = known_failures()
    assert list(listed) == list(range(1, len(listed) + 1))
    for number, tests in listed.items():
        assert tests, number
        for test in tests:
            path, _, name = test.partition("::")
            assert f"def {name}(" in (REPOSITORY / path).read_text(encoding="utf-8"), f"known failure {number}: {test}"


def test_citation_is_of_this_version_and_names_the_paper():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["title"], citation["version"]) == (PROJECT["name"], PROJECT["version"])
    assert "2403.07691" in citation["preferred-citation"]["url"]


@pytest.mark.parametrize("name", ["WANDB_MODE", "HF_TOKEN", "HF_HOME", "ORPO_STEPS"])
def test_environment_of_the_user_decides_no_test(name):
    hostile = {**os.environ, name: "/absent", "ORPO_TRL_DATA": "/data", "PYTHONPATH": str(REPOSITORY / "tests")}
    code = "import json, os, conftest; print(json.dumps(dict(os.environ)))"
    done = subprocess.run([sys.executable, "-c", code], env=hostile, capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    assert name not in seen
    assert seen["HF_HUB_OFFLINE"] == "1"
    assert seen["ORPO_TRL_DATA"] == "/data"


def test_environment_is_cleared_before_anything_reads_it():
    """huggingface_hub, wandb and others read their variables once, at import."""
    code = "import sys, conftest; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "tests")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert not {"huggingface_hub", "wandb", "transformers", "torch"} & set(done.stdout.split())
