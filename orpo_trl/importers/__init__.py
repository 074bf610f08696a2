"""Other tools' ORPO configs as recipes: axolotl, LLaMA-Factory, alignment-handbook and TRL.

`foreign_keys` has the keys that tools share, `draft` turns keys into settings and notes, `conversions` is what several
tools need, and each tool has a module on what becomes of its own keys. `read` reads a config, `recipe_text` writes the
recipe. `authors_scripts` answers to a script of ORPO's authors with the shipped recipe.
"""

from pathlib import Path
from typing import Any

from orpo_trl.importers.authors_scripts import refuse_name, refuse_script
from orpo_trl.importers.axolotl import AXOLOTL
from orpo_trl.importers.draft import Draft, Imported, ImportProblem, Note, Tool
from orpo_trl.importers.foreign_keys import AUTHORS_NAMES, CONVERTED, DROPPED, OURS, REFUSED, RENAMED
from orpo_trl.importers.hugging_face import HANDBOOK, TRL
from orpo_trl.importers.llama_factory import LLAMA_FACTORY
from orpo_trl.importers.read import read_text, read_yaml
from orpo_trl.importers.recipe_text import recipe_text

__all__ = ["FOREIGN_KEYS", "TOOLS", "ImportProblem", "Imported", "Note", "import_recipe", "recipe_text"]

TOOLS = {tool.id: tool for tool in (AXOLOTL, LLAMA_FACTORY, HANDBOOK, TRL)}
# Keys that show whose a config is: that of the first tool with one of them.
_MARKS = {
    "axolotl": ("rl", "base_model", "orpo_alpha", "sequence_len", "micro_batch_size"),
    "llama_factory": ("stage", "pref_loss", "pref_beta", "finetuning_type", "cutoff_len", "lora_target"),
    "alignment_handbook": (
        "dataset_mixer", "dataset_mixture", "dataset_splits", "chat_template", "use_flash_attention_2",
    ),
    "trl": ("model_name_or_path", "dataset_name", "datasets"),
}  # fmt: skip


def import_recipe(path: Path, tool: str | None = None) -> Imported:
    """A recipe from another tool's ORPO config.

    Args:
        path: a YAML file.
        tool: one of `TOOLS`; None detects it from the keys.

    Raises:
        ImportProblem: where the file cannot be read, the tool is not recognised, or the config is not ORPO's, with what
            was expected and what was found; for a script of ORPO's authors, with the shipped recipe of its settings.
    """
    path = Path(path)
    if tool is not None and tool not in TOOLS:
        raise ImportProblem(f"unknown tool {tool!r}; expected one of {', '.join(TOOLS)}")
    refuse_name(path)
    text = read_text(path)
    refuse_script(path, text)
    config = read_yaml(path, text)
    chosen = TOOLS[tool] if tool else _detect(path, config.values)
    problem = chosen.check(config.values)
    if problem:
        raise ImportProblem(f"{path}: not an ORPO config of {chosen.name}: {problem}")
    return Draft(chosen, config).fill().done()


def _detect(path: Path, values: dict[str, Any]) -> Tool:
    if {"nll_scope", "nll_reduction", "extends"} & set(values):
        raise ImportProblem(f"{path}: already a recipe of orpo-trl; expected another tool's config")
    for tool, marks in _MARKS.items():
        if any(mark in values for mark in marks):
            return TOOLS[tool]
    expected = "; ".join(f"{TOOLS[tool].name}: {', '.join(marks[:3])}" for tool, marks in _MARKS.items())
    found = ", ".join(f"`{key}`" for key in list(values)[:5]) or "none"
    raise ImportProblem(f"{path}: no tool is recognised: expected keys of one of ({expected}), found {found}")


def _foreign_keys() -> dict[str, tuple[str | None, str]]:
    shared = {*DROPPED, *RENAMED, *CONVERTED}
    found: dict[str, tuple[str | None, str]] = {}
    for tool in TOOLS.values():
        names = set(tool.renamed) | set(tool.converted) | set(tool.dropped)
        for name in sorted(names - OURS - set(REFUSED) - set(found)):
            whose = "older transformers'" if name in shared else f"{tool.name}'s"
            if name in tool.renamed:
                found[name] = (tool.renamed[name], f"{whose} name")
            elif name in tool.converted:
                ours, how = tool.converted[name]
                found[name] = (ours, f"{whose}; {how}" if how else f"{whose} name")
            else:
                found[name] = (None, f"{whose}; {tool.dropped[name]}")
    return {**{name: (ours, "the authors' name") for name, ours in AUTHORS_NAMES.items()}, **found}


# Keys of other tools: ours, or None where there is no equal, and whose the key is, with a phrase of advice.
FOREIGN_KEYS = _foreign_keys()
