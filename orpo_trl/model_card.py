"""The model card of a run: its front matter for the Hub, and from our own template what the run was and measured.

What `orpo-trl evaluate` measures later stands in one block of the card, between two comments, and in `model-index`.
"""

import html
import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id

from orpo_trl import run_folder
from orpo_trl.evaluations import Evaluation, read_evaluations
from orpo_trl.hidden import hide
from orpo_trl.metrics import held_out_table
from orpo_trl.plain_files import MAX_SETTINGS, check_readable, read_text, replace_whole, write_text
from orpo_trl.printable import printable
from orpo_trl.report.benchmarks import in_order, label, place, shown, template_text, value_text
from orpo_trl.report.run import Run, read_run

logger = logging.getLogger(__name__)

CARD = "README.md"
CURVE = "logps.png"
PAPER = {
    "id": "2403.07691",
    "citation": """\
@inproceedings{hong-etal-2024-orpo,
    title     = {{ORPO}: Monolithic Preference Optimization without Reference Model},
    author    = {Jiwoo Hong and Noah Lee and James Thorne},
    year      = 2024,
    eprint    = {arXiv:2403.07691}
}""",
}
# Around what is replaced when a model is evaluated; the rest of the card is its owner's.
_BEGIN, _END = "<!-- evaluation: begin, made by orpo-trl -->", "<!-- evaluation: end -->"
# By this name results of ours in `model-index` are known from those of others.
_SOURCE, _HOME = "orpo-trl evaluate", "https://pypi.org/project/orpo-trl/"
_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
# What the card shows of a run's record.
_SHOWN = ("seed", "processes", "engine", "device", "git", "datasets")


def write_card(
    folder: Path,
    *,
    model_name: str,
    source: str,
    base_model: str,
    dataset_name: str | list[str] | None,
    tags: Sequence[str],
    is_adapter: bool,
    is_chat: bool,
    remote_code: Sequence[str] = (),
    versions: Mapping[str, str],
    pages: Mapping[str, str],
) -> None:
    """Write the model card of the model in a folder, and draw the curve that it shows.

    A run's files that cannot be read are logged, and left out of the card.

    Args:
        folder: output folder of a run, with the files of `run_folder.py`, or of a model without a run.
        model_name: title of the card.
        source: what the card's example loads, a Hub id or a folder's name.
        base_model: Hub id or folder of the model that training started from; '' where there is none.
        dataset_name: as given to the trainer; by default what the run's recipe names.
        tags: tags of the Hub.
        is_adapter: whether the folder holds a PEFT adapter instead of a whole model.
        is_chat: whether the tokenizer has a chat template.
        remote_code: what code of a model's folder has made: `model NAME`, `tokenizer NAME`.
        versions: version by package.
        pages: address of the run by tracker.
    """
    run, parts = None, {}
    if (folder / run_folder.LOGS).is_file():
        try:
            run = read_run(folder)
            parts = _parts(run)
        except (ValueError, OSError) as error:
            # Such as a metrics.jsonl that somebody has edited. Saving a checkpoint must not fail because of its card.
            logger.warning("The model card lacks the run's recipe, data and figures: %s", error)
    recipe = run.recipe if run is not None else {}
    if recipe.get("from_scratch"):  # only the config came from there, not the weights
        base_model = ""
    hub_base = base_model if _is_hub_id(base_model) else None
    given = [dataset_name] if isinstance(dataset_name, str) else dataset_name
    datasets = [name for name in given or _dataset_names(recipe) if _is_hub_id(name)]
    license_of_base = _license(base_model)
    evaluations = read_evaluations(folder)
    data = ModelCardData(
        base_model=hub_base,
        datasets=datasets or None,
        library_name="peft" if is_adapter else "transformers",
        model_name=model_name,
        tags=list(dict.fromkeys(tags)),
        license=license_of_base.get("license"),
        license_name=license_of_base.get("license_name"),
        license_link=license_of_base.get("license_link"),
        eval_results=_results(evaluations) or None,
    )
    card = ModelCard.from_template(
        data,
        title=_plain(model_name),
        template_path=str(_TEMPLATE),
        base_model=hub_base,
        datasets=datasets,
        source=source,
        is_adapter=is_adapter,
        is_chat=is_chat,
        remote_code=", ".join(map(_plain, remote_code)),
        paper=PAPER,
        versions=versions,
        pages=pages,
        evaluation=_evaluation_block(evaluations),
        **parts,
    )
    write_text(folder / CARD, hide(str(card)))


def write_merged_card(folder: Path, *, model_name: str, adapter: str, base_model: str) -> None:
    """Write the model card of an adapter that was merged into its base, with the text of the adapter's own card.

    Args:
        folder: of the merged model.
        model_name: title of the card.
        adapter: Hub id or folder of the adapter. The curve beside its card is copied.
        base_model: Hub id or folder of the base model.
    """
    own = _card_of(adapter)
    facts: dict[str, Any] = own.data.to_dict() if own else _license(base_model)
    left_out = ("base_model", "library_name", "model_name", "base_model_relation")
    facts = {key: value for key, value in facts.items() if key not in left_out}
    facts["tags"] = [tag for tag in facts.get("tags") or [] if not tag.startswith(("base_model:", "lora", "peft"))]
    facts["base_model"] = base_model if _is_hub_id(base_model) else None
    data = ModelCardData(library_name="transformers", model_name=model_name, **facts)
    adapter_name, base_name = (_plain(name if _is_hub_id(name) else Path(name).name) for name in (adapter, base_model))
    text = (
        f"---\n{data}\n---\n\n# {_plain(model_name)}\n\nThe adapter {adapter_name} merged into the weights of its base "
        f"model {base_name}, by `orpo-trl merge`. It is a plain model: no adapter is needed to load it.\n"
    )
    if own:
        text += f"\nThe card of the adapter:\n\n---\n\n{own.text.strip()}\n"
    curve = Path(adapter, CURVE)
    if curve.is_file() and not curve.is_symlink():
        shutil.copyfile(curve, folder / CURVE)
    write_text(folder / CARD, hide(text))


def refresh_card(folder: Path) -> bool:
    """Put the evaluations of a folder into its model card; all but the marked block and our results stays as it is.

    Returns:
        Whether that was done: False where there is no card, or its owner has removed the block.

    Raises:
        ValueError, OSError: where the card cannot be read or written.
    """
    path = folder / CARD
    text = read_text(path) if path.is_file() else ""
    body = text.find("\n---", 3) if text.startswith("---") else 0  # behind the front matter, which may quote the marks
    begin = text.find(_BEGIN, max(body, 0))
    end = text.find(_END, begin)
    if begin < 0 or end < 0:
        return False
    evaluations = read_evaluations(folder)
    text = f"{text[:begin]}{_evaluation_block(evaluations)}{text[end + len(_END) :]}"
    try:
        text = _with_results(text, _results(evaluations), folder.resolve().name)
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:  # edited by hand
        logger.warning("%s: its front matter is left as it is: %s", path, printable(" ".join(str(error).split())))
    write_text(path, hide(text))
    return True


# ---- Evaluations -----------------------------------------------------------------------------------------------------


def _evaluation_block(evaluations: Sequence[Evaluation]) -> str:
    """The block between its two comments, which are there for later evaluations where there are none yet."""
    if not evaluations:
        return f"{_BEGIN}\n{_END}"
    lines = ["## Evaluation", "", "| benchmark | figure | value | items | judge |", "| --- | --- | ---: | ---: | --- |"]
    notes = []
    for one in sorted(evaluations, key=lambda one: (place(one.benchmark), one.name)):
        title = _plain(shown(one.benchmark).title)
        items = f"{one.answered:,}" if one.answered == one.asked else f"{one.answered:,} of {one.asked:,}"
        items += f", the first {one.limit:,} alone" if one.limit else ""
        for name in in_order(one.benchmark, one.figures):
            cells = [title, _plain(label(one.benchmark, name)), value_text(one.benchmark, one.figures[name])]
            lines.append(f"| {' | '.join([*cells, items, _plain(one.judge or '')])} |")
        made = [f"{one.shots}-shot"] if one.shots is not None else []
        made += [template_text(one), one.date[:10]]
        made += [f"{package} {version}" for package, version in one.versions.items()]
        notes.append(f"- {title}: {_plain(', '.join(made))}.{''.join(f' {_plain(note)}' for note in one.notes)}")
    return "\n".join([_BEGIN, *lines, "", *notes, _END])


def _results(evaluations: Sequence[Evaluation]) -> list[EvalResult]:
    """What `model-index` says of them; not of a part of a benchmark, which would be read as the whole."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=shown(one.benchmark).dataset or one.benchmark,
            dataset_name=shown(one.benchmark).title,
            dataset_config=one.name,  # tells evaluations of one data set apart
            dataset_args=None if one.shots is None else {"num_few_shot": one.shots},
            metric_type=name,
            metric_name=label(one.benchmark, name),
            metric_value=round(one.figures[name].value, 6),
            metric_args={"judge": one.judge} if one.judge else None,
            source_name=_SOURCE,
            source_url=_HOME,
        )
        for one in sorted(evaluations, key=lambda one: (place(one.benchmark), one.name))
        if one.limit is None and one.answered == one.asked
        for name in in_order(one.benchmark, one.figures)
    ]


def _with_results(text: str, results: list[EvalResult], name: str) -> str:
    """The text of a card with our results in the place of earlier ones; those of others stay.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, YAMLError: for a front matter that cannot be read.
    """
    card = ModelCard(text)
    data = cast(ModelCardData, card.data)
    earlier = data.eval_results or []
    found = [result for result in earlier if result.source_name != _SOURCE] + results
    if earlier or found:
        data.model_name = data.model_name or name
        data.eval_results = found or None
    return str(card)


# ---- The run ---------------------------------------------------------------------------------------------------------


def _parts(run: Run) -> dict[str, Any]:
    """What the card says of a run."""
    metrics = run.final_metrics()
    record = {name: run.record[name] for name in _SHOWN if run.record.get(name) is not None}
    return {
        "curve": _draw_curve(run),
        "figures": [
            (_plain(prefix.removesuffix("_")), _plain(heading), value)
            for prefix in run.prefixes
            for heading, value in held_out_table(metrics, prefix)
        ],
        "preparation": [_block(text, "text") for text in run.preparation_texts()],
        # A run from Python names no dataset in its settings, so they are no recipe.
        "is_recipe": bool(_dataset_names(run.recipe)),
        "recipe": _block(run.recipe_text, "yaml") if run.recipe_text else "",
        "run": _block(json.dumps(record, indent=2, ensure_ascii=False), "json") if record else "",
    }


def _draw_curve(run: Run) -> str:
    """Draw the log-probabilities of a run beside its card; returns the name of the file, '' without values."""
    try:
        from orpo_trl.report.draw import draw, drawable
    except ModuleNotFoundError as error:  # matplotlib, which training does not need
        logger.warning(f"The model card has no curve: {error.name} is not installed.")
        return ""
    if "logps" not in drawable([run]):
        return ""
    figure = draw("logps", [run])
    replace_whole(run.folder / CURVE, lambda path: figure.savefig(path, dpi=150))
    return CURVE


def _dataset_names(recipe: Mapping[str, Any]) -> list[str]:
    mixture = recipe.get("datasets")
    sources = [source for source in mixture if isinstance(source, dict)] if isinstance(mixture, list) else []
    # With `data_files`, the path is the name of a file format.
    paths = [source.get("path") for source in sources if "data_files" not in source]
    return [name for name in (recipe.get("dataset_name"), *paths) if isinstance(name, str)]


def _is_hub_id(name: str) -> bool:
    """Whether a name can be a Hub id and is not the path of something on this machine."""
    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return bool(name) and not Path(name).exists()


def _license(base_model: str) -> dict[str, str]:
    """The license in the base model's own card, where that card is on this machine; nothing is asked of the Hub."""
    card = _card_of(base_model)
    data = card.data.to_dict() if card else {}
    return {key: value for key, value in data.items() if key.startswith("license") and isinstance(value, str)}


def _card_of(model: str) -> ModelCard | None:
    """The card of a model, where it is on this machine and can be read; nothing is asked of the Hub."""
    path = try_to_load_from_cache(model, CARD) if _is_hub_id(model) else Path(model, CARD)
    if not model or not isinstance(path, (str, Path)) or not Path(path).is_file():
        return None
    try:
        check_readable(Path(path), MAX_SETTINGS)
        return ModelCard.load(path, ignore_metadata_errors=True)
    except (ValueError, OSError, yaml.YAMLError):
        return None


def _plain(text: str) -> str:
    """A label as one line of Markdown that shows its characters and means nothing: no link, no HTML, no table."""
    text = " ".join(printable(text).split())
    text = html.escape(text, quote=False)
    return re.sub(r"[\\`*\[\]|#!~]|(?<![^\W_])_|_(?![^\W_])", lambda match: f"\\{match[0]}", text)


def _block(text: str, language: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
