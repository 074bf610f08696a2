"""`orpo-trl evaluate TARGET preferences`: which of two responses a model finds more likely, on held-out pairs.

Pairs are scored in packed rows, as in training. Of a run, they are the run's own evaluation set under its recipe's
rules, so that the figures are those that the run has logged, with intervals, by source and length, and beside those of
another model.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from orpo_trl import run_folder
from orpo_trl.callbacks.record import installed_versions, token_digest
from orpo_trl.config import DataArguments, ModelArguments, ORPOConfig
from orpo_trl.devices import this_process, torch_device
from orpo_trl.evaluate.options import Options, Target
from orpo_trl.evaluations import Evaluation, Figure
from orpo_trl.pairs.load import load_pairs
from orpo_trl.pairs.preparation import PreparationReport
from orpo_trl.pairs.prepare import prepare_pairs
from orpo_trl.pairs.tokenize import PairRules
from orpo_trl.printable import printable
from orpo_trl.recipe.parse import build_settings, load_recipe
from orpo_trl.scoring.intervals import bootstrap
from orpo_trl.scoring.models import load_scoring_tokenizer, require_model
from orpo_trl.scoring.run_logps import load_and_score

RESAMPLES = 2000
_VERSIONS = ("orpo-trl", "torch", "transformers", "trl", "datasets", "tokenizers", "peft")

Record = dict[str, Any]
# Each figure from the records of `score_pairs`. `margin` and `log_odds` compare the two responses: the difference of
# their mean token log-probabilities, and the log of their odds ratio. The rewards of a run are beta times the first.
FIGURES: dict[str, Callable[[Record], float]] = {
    "accuracy": lambda record: float(record["is_correct"]),
    "margin": lambda record: record["chosen_logp"] - record["rejected_logp"],
    "log_odds": lambda record: record["log_or"],
    "chosen": lambda record: record["chosen_logp"],
    "rejected": lambda record: record["rejected_logp"],
}


def evaluate_preferences(target: Target, options: Options) -> Evaluation | None:
    """Accuracy, margin and log odds of held-out pairs, with bootstrap intervals of 95 %.

    Args:
        target: a model, an adapter or a run.
        options: `data` names a file of pairs; without it the target must be a run, of which the evaluation set is
            taken. `against` names a model that scores the same pairs; `seed` is that of the intervals.

    Returns:
        Figures of all pairs; groups by `source`, by `chosen_length` (quartiles of tokens) and by `longer` (which
        response has more tokens), and with several evaluation sets by `dataset`. With `against`, the same of that model
        in groups that begin with `against`, and of the paired difference in groups that begin with `difference`, each
        with a group of `all`. None in all processes but the first.

    Raises:
        ValueError, OSError: for what the user can fix.
    """
    model = target.need_model("preferences")
    if not this_process().is_main_process:
        return None
    held_out = _held_out(target, options)
    scored = _score(model, held_out, options)
    figures, groups = summarise(scored.records, options.seed)
    notes = [*scored.notes, *_recorded_notes(held_out, scored, options.limit)]
    if options.against is not None:
        other, of_other = _score_against(options.against, held_out, scored, options)
        groups |= compare(scored.records, other, options.seed)
        notes += [*of_other, _difference(options.against, groups)]
    lost = len(scored.asked) - len(scored.records)
    if lost:
        notes.append(f"{lost:,} pairs have log-probabilities that are not finite, and are left out")
    return Evaluation(
        benchmark="preferences",
        model=target.name,
        figures=figures,
        groups=groups,
        asked=len(scored.asked),
        answered=len(scored.records),
        template=scored.template,
        shots=None,
        judge=None,
        limit=options.limit,
        settings={
            "data": held_out.name,
            "against": options.against,
            "dtype": options.dtype,
            "seed": options.seed,
            "resamples": RESAMPLES,
            **{name: value for name, value in vars(held_out.rules).items() if value is not None},
        },
        versions={name: version for name, version in installed_versions().items() if name in _VERSIONS},
        date=run_folder.now(),
        notes=notes,
    )


# ---- The pairs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """Rows to score, and how they become tokens.

    Attributes:
        name: what to call them.
        rows: by label of the evaluation set; `eval` where there is one set.
        rules, on_malformed, on_unrendered, pair_layout: as in training.
        recorded: what the run's record says of each set: `rows` and `sha256`, the digest of its tokens.
        shuffle_seed: of the order that the digest is of; None for that of the rows.
    """

    name: str
    rows: dict[str, Any]
    rules: PairRules
    on_malformed: str = "error"
    on_unrendered: str = "warn"
    pair_layout: str = "auto"
    recorded: dict[str, Any] = field(default_factory=dict)
    shuffle_seed: int | None = None


def _held_out(target: Target, options: Options) -> HeldOut:
    """The pairs of `--data`, or the evaluation set of a run.

    Raises:
        ValueError, OSError: where there are none, or they cannot be loaded.
    """
    path = options.data_file("preferences")
    settings = _recipe_of(target, needed=path is None)
    found = HeldOut("", {}, PairRules())
    if settings is not None:
        _, args = settings
        ways = (args.on_malformed, args.on_unrendered, args.pair_layout)
        found = HeldOut("", {}, PairRules.of(args), *ways)
    if path is not None:
        rows, _ = load_pairs(DataArguments(dataset_name=str(path)), with_test=False)
        return replace(found, name=path.name, rows={"eval": rows})
    data_args, args = cast(tuple[DataArguments, ORPOConfig], settings)
    try:
        _, test = load_pairs(replace(data_args, dataset_streaming=False), with_test=True, seed=args.seed)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}\nOther pairs can be named with --data FILE.") from error
    return replace(
        found,
        name=f"evaluation set of {target.name}",
        rows=test if isinstance(test, dict) else {"eval": test},
        recorded=run_folder.read_record(target.folder).get("datasets") or {},
        shuffle_seed=args.seed if args.shuffle_dataset else None,
    )


def _recipe_of(target: Target, needed: bool) -> tuple[DataArguments, ORPOConfig] | None:
    """Settings of the run's recipe; None where the target is no run, or has no recipe that can be read.

    Raises:
        ValueError: where `needed` and there is none, or it names no pairs to evaluate on.
    """
    path = Path(target.folder, run_folder.RECIPE)
    advice = "Name held-out pairs with --data FILE."
    if not target.is_run or not path.is_file():
        if needed:
            raise ValueError(f"preferences: {target.name} is no run with a {run_folder.RECIPE}. {advice}")
        return None
    try:
        _, data_args, args = build_settings(load_recipe([str(path)]), with_engine=False)
    except ValueError as error:
        if needed:
            raise ValueError(f"preferences: the run's recipe names no held-out pairs. {advice}\n{error}") from error
        return None
    if needed and args.eval_strategy == "no":
        raise ValueError(f"preferences: the run has no evaluation set (`eval_strategy: no` in {path}). {advice}")
    return data_args, args


# ---- Scores ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """Records of pairs under one model.

    Attributes:
        asked: which pairs were to be scored: label, source, row.
        records: of the pairs whose log-probabilities are finite, with `dataset`, the label of their set.
        pairs: prepared pairs, by label.
        tokenizer: has made them.
        template: what rendered the prompts; None where rows are text.
        notes: what was left out.
    """

    asked: list[tuple[str, str, int]]
    records: list[Record]
    pairs: dict[str, Dataset]
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    notes: list[str]


def _score(name: str, held_out: HeldOut, options: Options, made: Scored | None = None) -> Scored:
    """Prepare the rows by a model's own tokenizer, or take the pairs that are `made`, and score them."""
    arguments = ModelArguments(model_name_or_path=name, dtype=options.dtype)
    require_model(arguments, options.trust_remote_code)
    if made is None:
        tokenizer = load_scoring_tokenizer(arguments, options.chat_template_path, options.trust_remote_code)
        pairs, template, notes = _prepare(held_out, tokenizer, options.limit)
    else:
        tokenizer, pairs, template, notes = made.tokenizer, made.pairs, made.template, []
    whole = concatenate_datasets(list(pairs.values()))
    labels = [label for label, part in pairs.items() for _ in range(len(part))]
    records, _ = load_and_score(
        arguments, tokenizer, whole, torch_device(options.device), held_out.pair_layout,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    records = [{"dataset": label, **record} for label, record in zip(labels, records, strict=True)]
    paired = [record for record in records if record["rejected_tokens"] is not None]
    if not paired:
        raise ValueError(f"preferences: no row of the {held_out.name} has a rejected response")
    finite = [record for record in paired if record["is_correct"] is not None and record["log_or"] is not None]
    if not finite:
        raise ValueError(f"preferences: {name} gives no pair log-probabilities that are finite")
    return Scored([_key(record) for record in paired], finite, pairs, tokenizer, template, notes)


def _prepare(
    held_out: HeldOut, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> tuple[dict[str, Dataset], str | None, list[str]]:
    """Prepared pairs by label, what rendered them, and notes of the rows that are left out."""
    pairs, notes, is_rendered, left = {}, [], False, limit
    for label, rows in held_out.rows.items():
        prepared, report = prepare_pairs(
            rows, tokenizer, held_out.rules, label, held_out.on_malformed, held_out.on_unrendered
        )
        report = cast(PreparationReport, report)  # of rows that are no stream
        print(printable(str(report)), file=sys.stderr)
        for source, found in report.sources.items():
            is_rendered |= found.text_rows < found.kept
            notes += [f"{source}: {count:,} rows left out, {reason}" for reason, count in found.dropped.items()]
        prepared = prepared if left is None else prepared.select(range(min(left, len(prepared))))
        left = None if left is None else left - len(prepared)
        if len(prepared):
            pairs[label] = prepared
    return pairs, "chat template of the model" if is_rendered else None, notes


def _recorded_notes(held_out: HeldOut, scored: Scored, limit: int | None) -> list[str]:
    """A note for each set of which the run has recorded other tokens: its rows or the tokenizer have changed since."""
    notes = []
    for label, pairs in scored.pairs.items() if limit is None else ():
        recorded = held_out.recorded.get(label)
        digest = recorded.get("sha256") if isinstance(recorded, dict) else None
        pairs = pairs if held_out.shuffle_seed is None else pairs.shuffle(seed=held_out.shuffle_seed)
        if digest and digest != token_digest(pairs):
            notes.append(f"{label}: these are not the pairs that the run has recorded ({run_folder.RUN})")
    return notes


def _score_against(name: str, held_out: HeldOut, scored: Scored, options: Options) -> tuple[list[Record], list[str]]:
    """Records of the other model: of the very same tokens where it knows them, else of its own."""
    arguments = ModelArguments(model_name_or_path=name)
    require_model(arguments, options.trust_remote_code)
    own = load_scoring_tokenizer(arguments, None, options.trust_remote_code)
    if own.get_vocab() == scored.tokenizer.get_vocab():
        return _score(name, held_out, options, scored).records, []
    note = f"{name} has another vocabulary, so its own tokenizer and template made its tokens"
    return _score(name, held_out, options).records, [note]


def _difference(name: str, groups: "Groups") -> str:
    figure = groups["difference"]["all"]["accuracy"]
    between = f", 95 % between {figure.low:+.4f} and {figure.high:+.4f}" if figure.low is not None else ""
    return f"accuracy against {Path(name).name}: {figure.value:+.4f}{between} ({figure.n:,} pairs)"


def _key(record: Record) -> tuple[str, str, int]:
    return record["dataset"], record["source"], record["row"]


# ---- Figures ---------------------------------------------------------------------------------------------------------

Figures = dict[str, Figure]
Groups = dict[str, dict[str, Figures]]


def summarise(records: Sequence[Record], seed: int) -> tuple[Figures, Groups]:
    """Figures of pairs, and of their groups.

    Args:
        records: of `score_pairs`, of pairs with finite values, with `dataset`.
        seed: of the resamples.
    """
    values = _values(records)
    return _intervals(values, seed), _of_groups(values, group_names(records), seed)


def compare(records: Sequence[Record], others: Sequence[Record], seed: int) -> Groups:
    """Figures of another model, and of the difference to it, over the pairs that both have.

    The groups of a pair are those of the first model's tokens.

    Raises:
        ValueError: where there is no such pair.
    """
    of_key = {_key(record): record for record in others}
    shared = [record for record in records if _key(record) in of_key]
    if not shared:
        raise ValueError("--against: the two models have no pair in common that both give finite log-probabilities")
    names = {"all": ["all"] * len(shared), **group_names(shared)}
    ours, theirs = _values(shared), _values([of_key[_key(record)] for record in shared])
    found: Groups = {}
    for prefix, values in (("against", theirs), ("difference", ours - theirs)):
        of_prefix = _of_groups(values, names, seed)
        found |= {prefix if kind == "all" else f"{prefix}_{kind}": groups for kind, groups in of_prefix.items()}
    return found


def group_names(records: Sequence[Record]) -> dict[str, list[str]]:
    """The group of each pair, by kind of group."""
    chosen = np.array([record["chosen_tokens"] for record in records])
    rejected = np.array([record["rejected_tokens"] for record in records])
    ends = np.unique(np.quantile(chosen, [0.25, 0.5, 0.75, 1], method="lower"))
    starts = [int(chosen.min()), *(int(end) + 1 for end in ends[:-1])]
    spans = [f"{start}-{int(end)} tokens" for start, end in zip(starts, ends, strict=True)]
    names = {
        "source": [record["source"] for record in records],
        "chosen_length": [spans[index] for index in np.searchsorted(ends, chosen)],
        "longer": [("rejected", "equal", "chosen")[sign + 1] for sign in np.sign(chosen - rejected)],
    }
    labels = [record["dataset"] for record in records]
    return names | ({"dataset": labels} if len(set(labels)) > 1 else {})


def _intervals(values: np.ndarray, seed: int) -> Figures:
    """`values`: `[pairs, figures]`, as `_values` makes them."""
    return bootstrap(values, list(FIGURES), seed, RESAMPLES)


def _of_groups(values: np.ndarray, names: dict[str, list[str]], seed: int) -> Groups:
    found: Groups = {}
    for kind, of_pairs in names.items():
        labels = np.array(of_pairs, dtype=object)
        ordered = sorted(set(of_pairs), key=_natural)
        found[kind] = {label: _intervals(values[labels == label], seed) for label in ordered}
    return found


def _natural(label: str) -> list[tuple[bool, int, str]]:
    """Sorts `9-12 tokens` before `13-20 tokens`."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", label)]


def _values(records: Sequence[Record]) -> np.ndarray:
    """`[pairs, figures]`."""
    return np.array([[figure(record) for figure in FIGURES.values()] for record in records], dtype=np.float64)
