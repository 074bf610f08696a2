"""Whether a run may write to its output folder."""

import os
import stat
from pathlib import Path


def folder_problem(folder: Path) -> str | None:
    """Why a run must not write to a folder; None where it may.

    transformers writes the model's files, checkpoints and curves by name, and would follow a link of such a name to a
    file of somebody else. The folder itself may be a link.

    Args:
        folder: the output folder; it need not exist.
    """
    try:
        problem = _problem(folder)
    except OSError as error:  # a name too long, a folder that may not be read
        problem = error.strerror or str(error)
    return None if problem is None else f"`output_dir: {folder}`: {problem}"


def _problem(folder: Path) -> str | None:
    if "\0" in str(folder):
        return "expected the name of a folder, received one with a null character"
    if not os.path.lexists(folder):
        above = next(parent for parent in folder.absolute().parents if os.path.lexists(parent))
        if not above.is_dir():
            return f"expected the name of a folder, and {above} is a file"
        return None if os.access(above, os.W_OK) else f"{above} is read-only"
    if not folder.exists():
        return f"expected a folder, received a link to {os.readlink(folder)}, which does not exist"
    if not folder.is_dir():
        return "expected a folder, received a file"
    if folder.resolve() == Path(folder.resolve().anchor):
        return "expected a folder for this run, received the root of the file system"
    if not os.access(folder, os.W_OK):
        return "the folder is read-only"
    strange = sorted(path.name for path in folder.iterdir() if not _is_own(path, folder.resolve()))
    if strange:
        names = ", ".join(map(repr, strange[:5])) + (f" and {len(strange) - 5} more" if len(strange) > 5 else "")
        return (
            f"it holds links to other folders, pipes or devices: {names}. A run would write through them. Remove them, "
            "or set another `output_dir`"
        )
    return None


def _is_own(path: Path, folder: Path) -> bool:
    """A file, a folder, or a link to another one of this folder, such as `best` to `checkpoint-500`."""
    if path.is_symlink():
        return path.resolve().is_relative_to(folder) and path.resolve() != folder
    mode = path.lstat().st_mode
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)
