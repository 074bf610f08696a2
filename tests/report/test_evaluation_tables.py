"""Evaluations in the report: what stands beside what, and what is said of the rest."""

import csv
import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from support.evaluations import evaluation, measured, mt_bench, preferences
from support.run_folders import Page, write_run

from orpo_trl.evaluations import Evaluation, Figure, write_evaluation
from orpo_trl.report.evaluations import compare, parts
from orpo_trl.report.page import render
from orpo_trl.report.run import Run
from orpo_trl.report.write import write_report

EVIL = "</td><script>alert('x')</script><img src=https://e.vil/x onerror=\"a()\"> | **bold** {{ 7*7 }} $x_{$"
IFEVAL = {"prompt_strict": {"value": 0.49, "stderr": 0.0215}, "instruction_strict": 0.6, "prompt_loose": 0.5}


def make_run(*evaluations, name="run"):
    return Run(Path(name), name, [], evaluations=list(evaluations))


def rows(comparison):
    """Cells by benchmark and label: those of runs and of published models, by name."""
    return {
        (table.title, label): dict(zip(table.runs, values, strict=True))
        for table in comparison.tables
        for label, values in table.rows
    }


def test_figures_stand_beside_the_published_ones_in_the_order_of_the_paper():
    run = make_run(
        preferences(), evaluation("gsm8k", {"exact_match": 0.3}), evaluation("ifeval", IFEVAL), mt_bench(6.25),
        evaluation("alpaca_eval_2", {"lc_win_rate": 13.5, "win_rate": {"value": 11, "stderr": 1.02}}),
        evaluation("alpaca_eval_1", {"win_rate": 88.3}), evaluation("a_task", {"acc": 0.1}),
    )  # fmt: skip
    found = compare([run])
    assert [table.title for table in found.tables] == [
        "AlpacaEval 1", "AlpacaEval 2", "MT-Bench", "IFEval", "GSM8K", "a_task", "Held-out pairs",
    ]  # fmt: skip
    cells = rows(found)
    win_rate = cells["AlpacaEval 2", "win rate (%)"]
    assert win_rate["run"] == "11.00 ± 1.02"
    assert (win_rate["Mistral-ORPO-β"], win_rate["Zephyr-β 7B"], win_rate["Phi-2 ORPO"]) == ("12.20", "10.99", "6.35")
    assert [label for title, label in cells if title == "IFEval"] == [
        "prompts, strict [1]", "prompts, loose [1]", "instructions, strict [1]",
    ]  # fmt: skip
    assert cells["IFEval", "prompts, strict [1]"]["Mistral-ORPO-β"] == "0.5287"
    assert cells["IFEval", "prompts, strict [1]"]["Zephyr-β 7B"] == "–"
    assert "template of the published figure is not recorded (Zephyr-β 7B, " in found.notes[0]
    assert "The authors recorded no settings for MT-Bench; those of FastChat are assumed." in found.notes
    assert cells["Held-out pairs", "log odds ratio (nats)"]["Mistral-ORPO-β"] == "–"


def test_what_differs_stands_in_a_row_of_its_own_without_published_figures():
    whole = evaluation("alpaca_eval_2", {"win_rate": 11.0})
    other = evaluation("alpaca_eval_2", {"win_rate": 31.2}, judge="alpaca_eval_gpt4_turbo_fn", answered=800, asked=805)
    found = compare([make_run(whole, name="one"), make_run(other, name="two")])
    cells = rows(found)
    assert cells["AlpacaEval 2", "win rate (%)"]["two"] == "–"
    own = cells["AlpacaEval 2", "win rate (%) [1]"]
    assert own.pop("two") == "31.20"
    assert set(own.values()) == {"–"}
    assert found.notes[0] == (
        "[1] AlpacaEval 2: not set beside the published ones: judged by alpaca_eval_gpt4_turbo_fn, not by "
        "weighted_alpaca_eval_gpt4_turbo; 800 items answered, not 805."
    )
    assert "AlpacaEval 2 of two: 5 of 805 items have no figure." in found.notes


def test_no_published_model_is_named_where_nothing_agrees():
    found = compare([make_run(evaluation("ifeval", IFEVAL, answered=60, limit=60))])
    assert (found.published, found.sources) == ([], [])
    assert found.tables[0].runs == ["run"]
    assert "60 items answered, not 541;" in found.notes[0]


def test_runs_of_other_settings_do_not_share_a_row_where_nothing_is_published():
    short, long = (evaluation("mmlu", {"acc": 0.5}, shots=5, answered=answered) for answered in (100, 14_042))
    cells = rows(found := compare([make_run(short, name="a"), make_run(long, name="b")]))
    assert [(row["a"], row["b"]) for row in cells.values()] == [("–", "0.5000"), ("0.5000", "–")]
    assert found.notes == [
        "[1] MMLU: 14,042 items answered; 5 examples in the prompt; no template.",
        "[2] MMLU: 100 items answered; 5 examples in the prompt; no template.",
    ]


def test_parts_of_a_benchmark_have_tables_with_their_intervals():
    tables = parts([make_run(preferences(), mt_bench(6.0), name="a"), make_run(name="b")])
    assert [table.title for table in tables] == [
        "MT-Bench by category", "Held-out pairs by source", "Held-out pairs by length of chosen",
        "Held-out pairs, of the model compared with", "Held-out pairs, difference to that model by source",
    ]  # fmt: skip
    assert tables[0].rows[0] == ("writing", ["6.00", "–"])
    assert tables[1].columns == ("accuracy", "margin", "items")
    assert tables[1].rows[0] == ("ultrachat", ["0.6591 [0.6100, 0.7030]", "0.2500", "200", "–", "–", "–"])


def test_runs_without_evaluations_have_no_such_section():
    assert compare([make_run()]) is None
    assert "Evaluations" not in Page(render([make_run()])).text


def full_run(text, name):
    groups = {text: {text: measured({text: 0.5})}}
    return make_run(
        evaluation(text, {text: 0.5}, judge=text, template=text, notes=[text], groups=groups),
        evaluation("alpaca_eval_2", {"win_rate": 11.0, text: 1.0}, notes=[text]),
        mt_bench(judge=text),
        name=name,
    )


def test_nothing_that_an_evaluation_says_becomes_part_of_the_page():
    plain, evil = (Page(render([full_run(text, f"{text} {index}") for index in range(2)])) for text in ("text", EVIL))
    assert evil.skeleton == plain.skeleton
    assert "e.vil" not in "".join(str(attributes.get("src", "")) for _, attributes in evil.elements)


@settings(max_examples=15, deadline=None)
@given(
    text=st.text(max_size=80),
    value=st.floats(allow_nan=False, allow_infinity=False),
    answered=st.integers(0, 10**15),
)
def test_any_evaluation_makes_a_page(text, value, answered):
    groups = {text: {text: measured({text: value})}}
    odd = evaluation(text, {text: value}, answered=answered, judge=text or None, notes=[text], groups=groups)
    run = make_run(odd, mt_bench(value, judge=text))
    Page(render([run]))


def test_report_reads_the_folder_and_writes_figures_and_table(tmp_path, capsys):
    folder = write_run(tmp_path / "run", [{"step": 1}])
    for one in (evaluation("alpaca_eval_2", {"win_rate": 11.0}), mt_bench(), preferences()):
        write_evaluation(folder, one)
    (folder / "evaluations" / "damaged.json").write_text('{"benchmark": "ifeval", "figures": ')
    (folder / "evaluations" / "other.json").write_text(json.dumps({"benchmark": EVIL}))
    written = write_report([folder], png=tmp_path / "png", table=tmp_path / "m.csv")
    names = {path.name for path in written}
    assert {"alpaca_eval_methods.png", "mt_bench_categories.png", "m_evaluations.csv"} <= names
    assert "Mistral-ORPO-β" in (folder / "report.html").read_text(encoding="utf-8")
    error = capsys.readouterr().err
    assert "damaged.json" in error
    assert "other.json" in error
    with open(tmp_path / "m_evaluations.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["value"] for line in lines if line["benchmark"] == "alpaca_eval_2"] == ["11.0"]
    part = next(line for line in lines if line["kind"] == "source" and line["figure"] == "accuracy")
    assert [part[key] for key in ("part", "value", "low", "high", "n", "stderr")] == [
        "ultrachat", "0.6591", "0.61", "0.703", "200", "",
    ]  # fmt: skip


def test_model_that_was_not_trained_here_stands_beside_runs(tmp_path):
    base = tmp_path / "base"
    write_evaluation(base, evaluation("ifeval", IFEVAL))
    (page,) = write_report([write_run(tmp_path / "run", [{"step": 1}]), base], tmp_path / "report.html")
    assert "0.4900 ± 0.0215" in page.read_text(encoding="utf-8")


def test_tables_are_the_same_when_read_back(tmp_path):
    one = preferences()
    path = write_evaluation(tmp_path, one)
    again = Evaluation.model_validate_json(path.read_text())
    assert compare([make_run(again)]) == compare([make_run(one)])
    assert again.figures["accuracy"] == Figure(value=0.6591, low=0.61, high=0.703, n=200)
