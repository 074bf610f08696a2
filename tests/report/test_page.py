import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.run_folders import MISTRAL, Page, history, metrics, sample

from orpo_trl.metrics import METRICS
from orpo_trl.pairs.preparation import LengthStats, PreparationReport, SourceReport
from orpo_trl.report.page import render
from orpo_trl.report.prompts import read_prompt
from orpo_trl.report.run import Run
from orpo_trl.report.tables import differences, groups, summary

EVIL = "</pre></div><script>alert('x')</script><img src=https://e.vil/x onerror=\"a()\"> & **bold** {{ 7*7 }} \n\n end"
REPORT = PreparationReport(
    "train", {"data": SourceReport(9, 8, 0, {"empty": 1}, {"empty": [4]})}, {"prompt": LengthStats(3, 3, 5, 6, 24)}
)
RECORD = {
    "started": "2025-03-01T10:00:00+00:00", "finished": "2025-03-01T11:22:04+00:00", "seed": 42, "beta": 0.1,
    "max_steps": 100, "warmup_steps": 0, "processes": 4, "device": "NVIDIA H100 80GB HBM3", "layout": "shared_prefix",
    "model": {"name": "base", "parameters": 7_241_732_096}, "versions": {"torch": "2.13.0"},
    "git": {"revision": "abc123", "changed": True}, "datasets": {"train": {"rows": 9, "sha256": "fff"}},
}  # fmt: skip


def make_run(name="run", logs=None, **kwargs):
    return Run(Path("runs") / name, name, history() if logs is None else logs, **kwargs)


def full_run(name="run", text="text"):
    grouped = {f"eval_{kind}/{text}/accuracies": 0.5 for kind in ("sources", "lengths")}
    return make_run(
        name,
        [*history(), {"step": 6, **grouped}],
        recipe={"model_name_or_path": text, text: text, "beta": 0.5 if name == "run" else 1},
        recipe_text=f"# {text}",
        record={**RECORD, "device": text, "versions": {text: text}, "git": {"revision": text}},
        preparation={text: replace(REPORT, name=text).to_dict(), "other": {"of": "another version"}},
        samples=[
            sample(step, dataset=text, prompt=text, completion=text, chosen=text, rejected=text) for step in (3, 6)
        ],
    )


def test_page_holds_summary_curves_samples_and_how_it_was_made():
    page = Page(render([full_run()]))
    rows = page.rows()
    assert rows["λ (beta)"] == ["0.1"]
    assert rows["optimiser steps"] == ["6 of 100"]
    assert rows["log-probability of chosen (nats per token)"] == ["−0.9940"]
    assert rows["margin of log-probabilities (nats per token)"] == ["0.2060"]
    assert rows[METRICS["rewards/accuracies"].heading] == ["0.6250"]
    assert rows["time"] == ["1 h 22 min"]
    assert rows["peak memory (GiB)"] == ["3.5"]
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 9
    assert all(image["alt"] and image["src"].startswith("data:image/svg+xml;base64,") for image in images)
    assert "9 rows read, 8 kept" in page.text
    assert "9 rows, SHA-256 fff" in page.text


def test_facts_name_device_model_and_uncommitted_changes():
    text = Page(render([make_run(record=RECORD)])).text
    for part in ("4 × NVIDIA H100 80GB HBM3", "base, 7,242 million parameters", "abc123, with uncommitted changes"):
        assert part in text


@pytest.mark.parametrize("names", [("run",), ("run", "other")])
def test_nothing_that_a_run_says_becomes_part_of_the_page(names):
    plain = Page(render([full_run(name, "text") for name in names]))
    evil = Page(render([full_run(name, EVIL) for name in names]))
    assert evil.skeleton == plain.skeleton
    assert evil.of("text") == [text.replace("text", EVIL) for text in plain.of("text")]
    assert evil.text.count("7*7") == evil.text.count(EVIL)


@settings(max_examples=25)
@given(st.text(max_size=60))
def test_any_text_is_shown_as_it_stands(text):
    page = Page(render([make_run(f"run {text}", [{"step": 3}], samples=[sample(completion=text, prompt=text + "?")])]))
    assert page.of("text")[:2] == [text + "?", text]
    assert f"run {text}" in page.of("bdi")
    assert page.skeleton == Page(render([make_run(logs=[{"step": 3}], samples=[sample()])])).skeleton


def test_page_loads_nothing_and_runs_nothing():
    page = Page(render([full_run("run", EVIL), full_run("other", EVIL)]))
    assert not {tag for tag, _ in page.elements} & {"script", "iframe", "object", "embed", "base", "form", "video"}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "data", "action"):
            assert re.match(r"#|data:", attributes.get(name, "#")), (tag, attributes)
    style = "".join(page.of("style")) + "".join(attributes.get("style", "") for _, attributes in page.elements)
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = [attributes["content"] for tag, attributes in page.elements if "http-equiv" in attributes]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline';")


def test_findings_are_sentences():
    logs = history()
    logs[0]["loss"] = None
    page = Page(render([make_run("good"), make_run("bad", logs)]))
    assert [text for text in page.of("li") if "not finite" in text]
    (good,) = [Page(render([make_run()]))]
    assert "The metrics show no problem." in good.text


def test_recipes_are_compared_by_what_differs():
    first = make_run("a", recipe={"beta": 0.1, "seed": 1, "output_dir": "x", "datasets": [{"path": "p"}]})
    second = make_run("b", recipe={"beta": 0.5, "seed": 1, "output_dir": "y", "bf16": True})
    without = make_run("c")
    table = differences([first, second, without])
    assert table.runs == ["a", "b"]
    assert table.rows == [("beta", ["0.1", "0.5"]), ("datasets", ['[{"path": "p"}]', "–"]), ("bf16", ["–", "true"])]
    assert "Fewer than two of the runs have a recipe." in Page(render([first, without])).text


def test_groups_are_tables_of_the_last_evaluation_with_lengths_in_order():
    values = {"eval_lengths/129-256/accuracies": 0.5, "eval_lengths/1-128/accuracies": 0.25}
    values |= {"eval_lengths/129-256/pairs": 1200.0, "eval_sources/a/b/margins": 0.125, "eval_loss": 1.0}
    logs = [{"step": 1, **dict.fromkeys(values, 0.0)}, {"step": 2, **values}]
    sources, lengths = groups([make_run(logs=logs), make_run("empty", [])])
    assert (sources.columns, sources.rows) == (("margin",), [("a/b", ["0.1250", "–"])])
    assert lengths.columns == ("accuracy", "pairs")
    assert lengths.rows == [("1-128", ["0.2500", "–", "–", "–"]), ("129-256", ["0.5000", "1,200", "–", "–"])]


def test_groups_of_several_evaluation_sets_have_a_table_each():
    logs = [
        {"step": 1, f"eval_{label}_logps/chosen": -1.0, f"eval_{label}_sources/s/accuracies": 0.5} for label in "ab"
    ]
    assert [table.title for table in groups([make_run(logs=logs)])] == ["By source: a", "By source: b"]
    page = Page(render([make_run(logs=logs)]))
    assert "the mean over the evaluation sets" in page.text


def test_summary_leaves_out_what_no_run_has():
    (settings_table,) = summary([make_run(logs=[])])
    assert [name for name, _ in settings_table.rows] == ["optimiser steps"]
    tables = summary([make_run(logs=[]), make_run(logs=[{"step": 1, **metrics(1, prefix="eval_")}])])
    assert [table.title for table in tables] == ["Settings", "Held out, last evaluation"]
    assert dict(tables[1].rows)[METRICS["rewards/accuracies"].heading] == ["–", "0.6250"]


def test_answers_of_all_runs_stand_beside_one_prompt_and_earlier_steps_are_folded():
    runs = [make_run(name, samples=[sample(3, completion=f"{name} early"), sample(6, completion=f"{name} late")])
            for name in ("a", "b")]  # fmt: skip
    page = Page(render(runs))
    assert page.of("text")[:5] == ["a prompt", "good", "bad", "a late", "b late"]
    assert [tag for tag, attributes in page.elements if attributes.get("class") == "earlier"] == ["details"] * 2
    assert page.of("text").count("a early") == 1


CHAT = sample(
    prompt="<|system|>\nBe kind.</s>\n<|user|>\nA cow?</s>\n<|assistant|>\n",
    last_turn=[33, 39],
    special_tokens=["</s>", "<|user|>", "<|system|>", "<|assistant|>", ""],
)


def test_prompt_shows_the_last_user_turn_and_folds_the_rest():
    page = Page(render([make_run(samples=[CHAT])]))
    assert page.of("text")[0] == "A cow?"
    rest = page.texts[page.texts.index(("summary", "The rest of the prompt")) :]
    rest = rest[: rest.index(("h4", "Answer at step 3"))]
    assert "".join(text for name, text in rest if name in ("text", "special", "turn")).replace("\n", "") == (
        "<|system|>Be kind.</s><|user|>[the turn above]</s><|assistant|>"
    )
    assert [text for name, text in rest if name == "special"] == [
        "<|system|>", "</s>", "<|user|>", "</s>", "<|assistant|>"
    ]  # fmt: skip
    assert ("details", {"class": "rest"}) in page.elements


def test_prompt_that_is_no_conversation_or_of_an_earlier_version_is_shown_as_it_is():
    no_turn = {"last_turn": None, "special_tokens": ["<s>"]}
    page = Page(render([make_run(samples=[sample(prompt="a <s>school:", **no_turn), sample(prompt="as it was</s>")])]))
    assert page.of("text")[0] == "a "
    assert page.of("special") == ["<s>"]
    assert "as it was</s>" in page.of("text")
    assert ("details", {"class": "rest"}) not in page.elements


_WRONG = (
    st.none() | st.integers() | st.text(max_size=3) | st.lists(st.none() | st.integers(-9, 99) | st.text(max_size=2))
)


@settings(max_examples=60, deadline=None)
@given(_WRONG, _WRONG, st.none() | st.integers() | st.text(max_size=40))
def test_no_record_of_a_prompt_breaks_or_loses_its_text(last_turn, special_tokens, prompt):
    found = read_prompt({"prompt": prompt, "last_turn": last_turn, "special_tokens": special_tokens})
    pieces = [*found.before, *found.turn, *found.after]
    assert "".join(piece.text for piece in pieces) == ("–" if prompt is None else str(prompt))


def test_text_of_a_prompt_becomes_no_part_of_the_page():
    samples = [{**CHAT, "prompt": EVIL + "x", "last_turn": [3, 30], "special_tokens": ["<img", EVIL[:5], EVIL[-9:]]}]
    page = Page(render([make_run(samples=samples)]))
    assert not {tag for tag, _ in page.elements} & {"script", "pre"}
    assert not [attributes for tag, attributes in page.elements if "e.vil" in str(attributes)]


# ---- Before training -------------------------------------------------------------------------------------------------


def evaluated(step: int, accuracy: float, prefix: str = "eval_") -> dict:
    return {"step": step, **metrics(step, prefix=prefix), f"{prefix}rewards/accuracies": accuracy}


def test_figures_before_training_stand_beside_those_after():
    heading = METRICS["rewards/accuracies"].heading
    page = Page(render([make_run(logs=[evaluated(0, 0.25), *history()])]))
    assert page.rows()[heading] == ["0.2500", "0.6250"]
    assert page.of("column") == ["before", "after"]
    assert page.rows()["optimiser steps"] == ["6"]
    logs = [evaluated(0, 0.25), *history()]
    page = Page(render([make_run("a", logs), make_run("b"), make_run("c", logs[:1])]))
    assert page.rows()[heading] == ["0.2500", "0.6250", "–", "0.6250", "0.2500", "–"]
    assert page.of("column") == ["before", "after"] * 3
    assert page.rows()["optimiser steps"] == ["6", "6", "0"]


def test_figures_before_training_are_means_over_the_evaluation_sets():
    logs = [evaluated(0, 0.2, "eval_a_"), evaluated(0, 0.4, "eval_b_"), *history(labels=("a", "b"))]
    page = Page(render([make_run(logs=logs)]))
    assert page.rows()[METRICS["rewards/accuracies"].heading] == ["0.3000", "0.6250"]


def test_evaluation_before_training_alone_is_called_so():
    (_, table) = summary([make_run(logs=[evaluated(0, 0.25)])])
    assert (table.title, table.columns) == ("Held out, before training", ())


def test_rows_of_the_summary_have_as_many_columns_each():
    html = render([make_run("a", [evaluated(0, 0.25), *history()], record=RECORD), make_run("b")])
    (table,) = re.findall(r'<section id="runs">.*?<table>(.*?)</table>', html, re.DOTALL)
    widths = {
        sum(int((re.search(r'colspan="(\d+)"', cell) or [0, 1])[1]) for cell in re.findall(r"<t[hd][^>]*>", row))
        for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    }
    assert widths == {5}


def test_held_out_accuracy_below_chance_is_told_with_the_pairs_of_the_preparation():
    report = {"sources": {"x": {"rows": 900, "pairs": 800, "nll_only": 90}}, "tokens": {}, "name": "eval"}
    tokens = {part: vars(LengthStats(1.0, 1.0, 1.0, 1, 1)) for part in ("prompt", "chosen", "rejected")}
    run = make_run(logs=[*history(), evaluated(6, 0.45)], preparation={"eval": {**report, "tokens": tokens}})
    (text,) = [text for text in Page(render([run])).of("li") if "below 0.5" in text]
    assert "0.450 at step 6 (800 pairs)" in text


def test_very_long_answers_are_cut_and_many_evaluations_thinned():
    samples = [sample(step, completion=str(step)) for step in range(100)] + [sample(100, completion="x" * 50_000)]
    page = Page(render([make_run(logs=[], samples=samples)]))
    assert page.of("text")[1].endswith("x… (40,000 more characters)")
    shown = [int(text) for text in page.of("text") if text.isdigit()]
    assert len(shown) == 8
    assert (shown[0], shown[-1]) == (99, 0)


@pytest.mark.parametrize(
    "logs", [[], [{}], [{"step": 1, "loss": 2.5}], [{"step": None, "loss": None}], [{"step": 1, "eval_loss": None}]]
)
def test_hardly_any_logs_make_a_page(logs):
    page = Page(render([make_run(logs=logs)]))
    images = [attributes["alt"] for tag, attributes in page.elements if tag == "img"]
    assert bool(images) == (logs == [{"step": 1, "loss": 2.5}])
    assert ("Nothing has been logged yet." in page.text) != bool(images)


def test_incomplete_records_make_a_page():
    record = {"model": None, "git": None, "versions": [], "datasets": {"train": None}, "started": 3, "finished": None}
    text = Page(render([make_run(record={**record, "beta": "x", "max_steps": "y"}, samples=[{"step": None}])])).text
    assert "– rows" in text


def test_published_runs_are_named_where_they_are_drawn():
    assert "batch 64" in Page(render([make_run(recipe={"model_name_or_path": MISTRAL})])).text
    assert "batch 64" not in Page(render([make_run(recipe={"model_name_or_path": "gpt2"})])).text


def test_long_runs_make_a_small_page():
    assert len(render([make_run(logs=history(8_000)), make_run("b", history(8_000))])) < 1_000_000


def test_preparation_report_survives_its_dictionary():
    assert PreparationReport.from_dict(REPORT.to_dict()) == REPORT
