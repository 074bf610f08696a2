"""The model card of a run: TRL's own, with the run's recipe, data, figures and curve."""

import json
import re
from pathlib import Path

from huggingface_hub import ModelCard

from orpo_trl import run_folder
from orpo_trl.pairs.preparation import PreparationReport
from orpo_trl.report.draw import draw
from orpo_trl.report.run import Run, read_run

CURVE = "logps.png"
# Held-out metrics that the card shows, in this order.
_FIGURES = {
    "rewards/accuracies": "accuracy: chosen more likely than rejected",
    "logps/chosen": "log-probability of chosen, per token",
    "logps/rejected": "log-probability of rejected, per token",
    "log_odds_chosen": "log odds ratio",
    "nll_loss": "NLL",
    "loss": "loss",
}
# Of TRL's template: the line on the base model, and the heading that the run's own parts go before.
_BASE = re.compile(r"^This model is a fine-tuned version of .*$", re.MULTILINE)
_VERSIONS = "### Framework versions"


def complete_card(folder: Path, model_source: str, is_on_hub: bool) -> None:
    """Add to the README.md that TRL wrote what it does not know of the run, and draw the curve beside it.

    Args:
        folder: output folder of a run, with the files of `run_folder.py`.
        model_source: what to load in the card's example: a Hub id, or the folder's name.
        is_on_hub: the base model has a page there; one that was built or loaded from a folder has none, and is not
            linked to.
    """
    path = folder / "README.md"
    card = ModelCard.load(path)
    text = card.text
    if not is_on_hub:
        text = _BASE.sub("This model was trained on pairs of a chosen and a rejected response.", text)
    text = text.replace('model="None"', f'model="{model_source}"')
    parts = []
    if (folder / run_folder.METRICS).is_file():
        run = read_run(folder)
        draw("logps", [run]).savefig(folder / CURVE, dpi=150)
        curve = f"![Log-probabilities of chosen and rejected responses over the optimiser steps]({CURVE})"
        parts = [curve, _figures(run), _data(run), _recipe(run), _made_with(run)]
    card.text = text.replace(_VERSIONS, "\n\n".join([*filter(None, parts), _VERSIONS]), 1)
    card.save(path)


def _figures(run: Run) -> str:
    metrics = run.final_metrics()
    prefixes = sorted({name.removesuffix("nll_loss") for name in metrics if name.endswith("_nll_loss")})
    rows = [
        f"| {prefix.strip('_')} | {label} | {metrics[prefix + name]:.4f} |"
        for prefix in prefixes
        for name, label in _FIGURES.items()
        if prefix + name in metrics
    ]
    if not rows:
        return ""
    return "\n".join(["### Figures on held-out pairs", "", "| pairs | metric | value |", "| --- | --- | --- |", *rows])


def _data(run: Run) -> str:
    reports = [str(PreparationReport.from_dict(report)) for report in run.preparation.values()]
    return "\n\n".join(["### Data", *(_block(report, "text") for report in reports)]) if reports else ""


def _recipe(run: Run) -> str:
    command = "Saved as `recipe.yaml`, this trains the model again: `orpo-trl train recipe.yaml`"
    return f"### Recipe\n\n{command}\n\n{_block(run.recipe_text, 'yaml')}"


def _made_with(run: Run) -> str:
    kept = ("seed", "processes", "engine", "device", "git", "datasets")
    about = {name: run.record[name] for name in kept if run.record.get(name) is not None}
    return f"### Run\n\n{_block(json.dumps(about, indent=2, ensure_ascii=False), 'json')}"


def _block(text: str, language: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
