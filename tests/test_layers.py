"""The rooms of the package (its files and folders) import each other in one direction."""

import ast
import graphlib
from pathlib import Path

import orpo_trl

PACKAGE = Path(orpo_trl.__file__).parent


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "orpo_trl":
            is_top = node.module == "orpo_trl"
            found |= {f"orpo_trl.{alias.name}" for alias in node.names} if is_top else {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("orpo_trl.")}
    return found


def test_no_two_rooms_import_each_other():
    rooms: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] not in ("shipped", "__init__"):
            imported = {module.split(".")[1] for module in imported_modules(path)} - {parts[0]}
            rooms.setdefault(parts[0], set()).update(imported)
    order = list(graphlib.TopologicalSorter(rooms).static_order())  # raises CycleError, which names the circle
    assert {"losses", "lengths", "upstream", "trainer", "cli"} <= set(order)


def test_the_objective_and_the_cost_of_a_pair_know_nothing_of_the_package():
    for name in ("losses", "lengths", "metrics", "upstream"):
        assert imported_modules(PACKAGE / f"{name}.py") == set(), name
