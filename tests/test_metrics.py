import ast
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small import REPOSITORY

from orpo_trl.metrics import (
    METRICS,
    evaluation_label,
    evaluation_prefixes,
    group_metric,
    held_out_table,
    number,
    prefixes,
    split_group_metric,
)

# What an evaluation of `ORPOTrainer` logs, and one of TRL's SFTTrainer, which knows no pairs.
OURS = [*(name for name in METRICS if name.startswith(("loss", "nll", "log", "odds", "reward"))),
        "runtime", "samples_per_second", "steps_per_second", "sources/a_runtime/pairs"]  # fmt: skip
SFT = ["loss", "runtime", "samples_per_second", "steps_per_second", "entropy", "mean_token_accuracy"]
# Labels that look like parts of metrics' names, and any others.
LABELS = st.lists(
    st.lists(st.sampled_from(["nll", "nll_loss", "loss", "logps/chosen", "runtime", "eval", "train", "a", "/", ""]))
    .map("_".join)
    .filter(bool)
    | st.text(min_size=1, max_size=8),
    unique=True,
    max_size=4,
)


@given(LABELS, st.sampled_from([OURS, SFT]), st.booleans())
def test_prefixes_are_those_of_the_evaluation_sets_whatever_their_labels(labels, names, with_training):
    logged = [f"eval_{label}_{name}" for label in labels for name in names]
    found = prefixes([*logged, *(("loss", "grad_norm") if with_training else ()), "epoch"])
    assert found == [f"eval_{label}_" for label in labels] + ([""] if with_training else [])
    assert [evaluation_label(prefix) for prefix in found if prefix] == labels


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], []),
        (["epoch", "tokens_seen"], []),
        (["train_runtime", "train_loss", "train_steps_per_second"], []),
        (["my_runtime"], []),
        (["loss"], [""]),
        (["logps/chosen", "nll_loss"], [""]),
        (["eval_loss"], ["eval_"]),
        (["eval_nll_loss", "eval_runtime"], ["eval_"]),
        (["eval_nll_loss", "eval_nll_runtime"], ["eval_nll_"]),
        (["test_nll_loss", "test_loss", "test_runtime"], ["test_"]),
    ],
)
def test_prefixes(names, expected):
    assert prefixes(names) == expected
    assert evaluation_prefixes(names) == [prefix for prefix in expected if prefix.startswith("eval_")]


def test_held_out_table_has_finite_values_of_one_set():
    metrics = {"eval_a_loss": 1.0, "eval_a_nll_loss": math.nan, "eval_b_loss": 2.0, "eval_a_rewards/chosen": 3.0}
    assert held_out_table(metrics, "eval_a_") == [("loss (nats per token)", "1.0000")]


@given(st.sampled_from(["sources", "lengths"]), st.text(), st.sampled_from(["accuracies", "margins", "pairs"]))
def test_group_metric_is_split_as_it_was_put_together(kind, name, statistic):
    assert split_group_metric(group_metric(kind, name, statistic)) == (kind, name, statistic)
    assert split_group_metric(name) is None or name.startswith(("sources/", "lengths/"))


@given(st.none() | st.booleans() | st.text() | st.floats() | st.integers(-(10**400), 10**400))
def test_number_is_a_finite_float_or_nothing(value):
    found = number(value)
    assert found is None or (isinstance(found, float) and math.isfinite(found) and found == float(value))


# ---- One home for each metric ----------------------------------------------------------------------------------------


def metrics_table() -> str:
    better = {True: "higher", False: "lower", None: ""}
    rows = [
        f"| `{metric.name}` | {metric.unit} | {better[metric.higher_is_better]} | {metric.meaning} |"
        for metric in METRICS.values()
        if metric.is_logged
    ]
    return "\n".join(["| metric | unit | better | meaning |", "| --- | --- | --- | --- |", *rows])


def test_page_on_metrics_has_the_table_of_all_logged_metrics():
    page = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert f"\n\n{metrics_table()}\n\n" in page, f"docs/metrics.md should hold:\n{metrics_table()}"


def test_labels_titles_and_headings_are_distinct_and_meanings_are_sentences():
    for values in ([m.label for m in METRICS.values()], [m.title for m in METRICS.values() if m.title]):
        assert len(set(values)) == len(values)
    for name, metric in METRICS.items():
        assert name == metric.name
        assert re.fullmatch(r"[A-Z].*\.", metric.meaning)
        format(1.0, metric.format)


def sources() -> list[Path]:
    return [path for folder in ("orpo_trl", "scripts") for path in (REPOSITORY / folder).rglob("*.py")]


def texts(path: Path) -> list[str]:
    """String constants of a module, without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]


def test_only_one_module_names_the_label_of_a_metric():
    """As a text of its own, with or without a unit behind it; a label of four words in any text.

    Labels of one word, `loss` and `NLL`, are also keys of logs and terms of the objective.
    """
    labels = {metric.label.lower() for metric in METRICS.values() if " " in metric.label}
    found = {
        (path.relative_to(REPOSITORY).as_posix(), label)
        for path in sources()
        for text in texts(path)
        for label in labels
        if re.fullmatch(re.escape(label) + r"([,:]? *[(\[].*|,.*)?", text.strip().lower())
        or (label.count(" ") > 2 and label in text.lower())
    }
    assert {path for path, _ in found} == {"orpo_trl/metrics.py"}, found
    assert {label for _, label in found} == labels


def test_metrics_load_no_other_library():
    code = "import sys, orpo_trl.metrics; print({'torch', 'numpy', 'transformers', 'trl'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
