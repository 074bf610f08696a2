"""What the trainer's import loads: each process of a run pays for it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import orpo_trl

HEAVY = ("matplotlib", "jinja2", "wandb", "deepspeed", "tensorboard", "torch.utils.tensorboard")


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()) if done.stdout.strip() else set()


@pytest.mark.slow
def test_trainer_loads_nothing_heavy_that_its_libraries_do_not_load():
    """transformers itself loads jinja2, and TRL's base trainer wandb where it is installed."""
    libraries = loaded_by("from trl import SFTTrainer")
    assert libraries <= {"jinja2", "wandb"}
    assert loaded_by("import orpo_trl.trainer") <= libraries


def test_heavy_packages_are_imported_where_they_are_used():
    """Not at the top of a file: only the files that draw and render do so, and they are imported when used."""
    package = Path(orpo_trl.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if {name.split(".")[0] for name in names} & {"matplotlib", "jinja2", "wandb", "deepspeed", "tensorboard"}:
                found.add(path.relative_to(package).as_posix())
    assert found == {"report/draw.py", "report/evaluation_figures.py", "report/page.py"}
