"""Other tools' ORPO configs as recipes: axolotl, LLaMA-Factory, alignment-handbook, TRL, and the authors' scripts.

`tables` holds the keys that tools share, `draft` turns keys into settings and notes, one module for each tool says what
its own keys become, `read` and `text` are the ways in and out.
"""

from pathlib import Path
from typing import Any

from orpo_trl.importers.authors import AUTHORS, read_script
from orpo_trl.importers.axolotl import AXOLOTL
from orpo_trl.importers.draft import Draft, Imported, ImportProblem, Note, Tool
from orpo_trl.importers.hugging_face import HANDBOOK, TRL
from orpo_trl.importers.llama_factory import LLAMA_FACTORY
from orpo_trl.importers.read import read_text, read_yaml
from orpo_trl.importers.tables import CONVERTED, DROPPED, OURS, REFUSED, RENAMED
from orpo_trl.importers.text import recipe_text

__all__ = ["FOREIGN_KEYS", "TOOLS", "ImportProblem", "Imported", "Note", "import_recipe", "recipe_text"]

TOOLS = {tool.id: tool for tool in (AXOLOTL, LLAMA_FACTORY, HANDBOOK, TRL, AUTHORS)}
# Keys that tell whose a config is; the first tool with one of them has it.
_MARKS = {
    "axolotl": ("rl", "base_model", "orpo_alpha", "sequence_len", "micro_batch_size"),
    "llama-factory": ("stage", "pref_loss", "pref_beta", "finetuning_type", "cutoff_len", "lora_target"),
    "alignment-handbook": (
        "dataset_mixer", "dataset_mixture", "dataset_splits", "chat_template", "use_flash_attention_2",
    ),
    "trl": ("model_name_or_path", "dataset_name", "datasets"),
}  # fmt: skip


def import_recipe(path: Path, tool: str | None = None) -> Imported:
    """A recipe from another tool's ORPO config.

    Args:
        path: a YAML file, or a shell script of the authors'.
        tool: one of `TOOLS`; None sees it from the content.

    Raises:
        ImportProblem: where the file cannot be read, the tool is not recognised, or the config is not ORPO's; with what
            was expected and what was found.
    """
    path = Path(path)
    if tool is not None and tool not in TOOLS:
        raise ImportProblem(f"unknown tool {tool!r}; expected one of {', '.join(TOOLS)}")
    text = read_text(path)
    if tool == "authors" or (tool is None and _is_script(path, text)):
        return Draft(AUTHORS, read_script(path, text)).fill().done()
    config = read_yaml(path, text)
    chosen = TOOLS[tool] if tool else _detect(path, config.values)
    problem = chosen.check(config.values)
    if problem:
        raise ImportProblem(f"{path}: not an ORPO config of {chosen.name}: {problem}")
    return Draft(chosen, config).fill().done()


def _is_script(path: Path, text: str) -> bool:
    return path.suffix in (".sh", ".bash") or text.startswith("#!") or "accelerate launch" in text


def _detect(path: Path, values: dict[str, Any]) -> Tool:
    if {"nll_scope", "nll_reduction", "extends"} & set(values):
        raise ImportProblem(f"{path}: a recipe of orpo-trl already; expected another tool's config")
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
        possessive = f"{tool.name}'s" if tool is not AUTHORS else "the authors'"
        keys = set(tool.renamed) | set(tool.converted) | set(tool.dropped)
        for key in sorted(keys - OURS - set(REFUSED) - set(found)):
            whose = "older transformers'" if key in shared else possessive
            if key in tool.renamed:
                found[key] = (tool.renamed[key], f"{whose} name")
            elif key in tool.converted:
                ours, how = tool.converted[key]
                found[key] = (ours, f"{whose}; {how}" if how else f"{whose} name")
            else:
                found[key] = (None, f"{whose}; {tool.dropped[key]}")
    return found


# Their keys to ours, or None where there is no equal, and whose they are with a phrase of advice.
FOREIGN_KEYS = _foreign_keys()
