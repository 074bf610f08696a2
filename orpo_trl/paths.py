"""Where the recipes and the training script are: at the top of a checkout, or inside the package of a wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_HOME = _PACKAGE / "shipped" if (_PACKAGE / "shipped").is_dir() else _PACKAGE.parent

RECIPES = _HOME / "recipes"
RUN_SCRIPT = _HOME / "scripts" / "run_orpo.py"

SLURM_SCRIPT = _HOME / "scripts" / "slurm" / "train.sbatch"


def relative(path: Path) -> Path:
    """The path as the user would write it: relative, if it is below the current folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
