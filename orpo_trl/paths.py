"""Where the recipes and the training script lie: in a checkout at its top, in an installed wheel inside the package."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_HOME = _PACKAGE / "shipped" if (_PACKAGE / "shipped").is_dir() else _PACKAGE.parent

RECIPES = _HOME / "recipes"
RUN_SCRIPT = _HOME / "scripts" / "run_orpo.py"


def relative(path: Path) -> Path:
    """As the user would write it, where it lies below the current folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
