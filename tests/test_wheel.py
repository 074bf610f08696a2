"""The files of an installed package that are no code."""

import os
import subprocess
import sys
import zipfile

import pytest
from support.small import REPOSITORY

from orpo_trl.paths import RECIPES


@pytest.mark.slow
def test_wheel_holds_recipes_launch_configs_the_script_and_the_page(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(REPOSITORY),
    ]
    subprocess.run(command, check=True, capture_output=True)
    installed = tmp_path / "installed"
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(installed)
    assert (installed / "orpo_trl" / "py.typed").is_file()
    for script in ("run_orpo.py", "benchmark.py", "slurm/train.sbatch"):
        shipped = installed / "orpo_trl" / "shipped" / "scripts" / script
        assert shipped.read_bytes() == (REPOSITORY / "scripts" / script).read_bytes()
    for path in RECIPES.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            shipped = installed / "orpo_trl" / "shipped" / "recipes" / path.relative_to(RECIPES)
            assert shipped.read_bytes() == path.read_bytes()

    def run(*arguments):
        code = "from orpo_trl.cli import main; main(prog_name='orpo-trl')"
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    assert run("recipes", "mistral_beta") == (RECIPES / "mistral_beta.yaml").read_text(encoding="utf-8")
    line = run("train", "quickstart", "--dry-run")
    assert "installed/orpo_trl/shipped/scripts/run_orpo.py installed/orpo_trl/shipped/recipes/quickstart.yaml" in line
    assert "Nothing to fix." in run("check", "quickstart")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert run("report", ".") == "report.html\n"
    assert '<h2 id="curves">Curves</h2>' in (tmp_path / "report.html").read_text(encoding="utf-8")
