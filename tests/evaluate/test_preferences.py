"""Figures of held-out pairs against plain recomputations, a simulation with a known truth, and a run's own metrics."""

import json
from pathlib import Path
from statistics import fmean

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.recipes import parse_recipe
from support.small import TOKENIZER, make_rows, save_model, tiny_model
from transformers import AutoTokenizer

from orpo_trl import ORPOTrainer, run_folder
from orpo_trl.cli import main
from orpo_trl.evaluate.options import Options, find_target
from orpo_trl.evaluate.preferences import FIGURES, compare, evaluate_preferences, summarise
from orpo_trl.evaluations import Evaluation
from orpo_trl.model import load_tokenizer
from orpo_trl.pairs.load import load_pairs
from orpo_trl.recipe.parse import load_recipe
from orpo_trl.recipe.show import expanded
from orpo_trl.scoring.run_logps import run_logps


def save_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate(target: Path, **options) -> Evaluation:
    found = evaluate_preferences(find_target(str(target)), Options("preferences", **options))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two models and rows, of which some have no rejected response."""
    folder = tmp_path_factory.mktemp("preferences")
    save_model(folder / "model")
    save_model(folder / "base", seed=1)
    save_rows(folder / "rows.jsonl", make_rows(31, nll_only_every=10))
    return folder


# ---- Figures ---------------------------------------------------------------------------------------------------------


def test_figures_are_means_over_the_records_of_logps(place):
    found = evaluate(place / "model", data=place / "rows.jsonl")
    records = run_logps(str(place / "model"), str(place / "rows.jsonl"))
    pairs = [record for record in records if record["rejected_tokens"] is not None]
    assert (found.benchmark, found.model) == ("preferences", "model")
    assert found.asked == found.answered == len(pairs) == 27
    expected = {
        "accuracy": fmean(pair["chosen_logp"] > pair["rejected_logp"] for pair in pairs),
        "margin": fmean(pair["chosen_logp"] - pair["rejected_logp"] for pair in pairs),
        "log_odds": fmean(pair["chosen_log_odds"] - pair["rejected_log_odds"] for pair in pairs),
        "chosen": fmean(pair["chosen_logp"] for pair in pairs),
        "rejected": fmean(pair["rejected_logp"] for pair in pairs),
    }
    assert {name: figure.value for name, figure in found.figures.items()} == pytest.approx(expected)
    for figure in found.figures.values():
        assert figure.low is not None
        assert figure.high is not None
        assert figure.low <= figure.value <= figure.high
    assert Evaluation.model_validate_json(found.model_dump_json()) == found


def test_groups_are_those_of_the_pairs_and_add_up(place):
    found = evaluate(place / "model", data=place / "rows.jsonl")
    assert set(found.groups) == {"source", "chosen_length", "longer"}
    for groups in found.groups.values():
        assert sum(figures["accuracy"].n for figures in groups.values()) == found.answered
        for name, whole in found.figures.items():
            parts = [figures[name] for figures in groups.values()]
            assert sum(part.value * part.n for part in parts) / found.answered == pytest.approx(whole.value)
    records = run_logps(str(place / "model"), str(place / "rows.jsonl"))
    pairs = [record for record in records if record["rejected_tokens"] is not None]
    longer = [pair["is_correct"] for pair in pairs if pair["chosen_tokens"] > pair["rejected_tokens"]]
    assert found.groups["longer"]["chosen"]["accuracy"].value == pytest.approx(fmean(longer))
    for span, figures in found.groups["chosen_length"].items():
        low, high = map(int, span.removesuffix(" tokens").split("-"))
        inside = [pair["chosen_logp"] for pair in pairs if low <= pair["chosen_tokens"] <= high]
        assert figures["chosen"].n == len(inside)
        assert figures["chosen"].value == pytest.approx(fmean(inside))
    assert [*found.groups["source"]] == [str(place / "rows.jsonl")]


def record(row: int, chosen: float, rejected: float, chosen_tokens: int, rejected_tokens: int, source: str) -> dict:
    return {
        "dataset": "eval", "source": source, "row": row, "chosen_logp": chosen, "rejected_logp": rejected,
        "log_or": 2 * (chosen - rejected), "is_correct": chosen > rejected, "chosen_tokens": chosen_tokens,
        "rejected_tokens": rejected_tokens,
    }  # fmt: skip


_PAIRS = st.lists(
    st.tuples(
        st.floats(-9, -0.01), st.floats(-9, -0.01), st.integers(1, 40), st.integers(1, 40), st.sampled_from("ab")
    ),
    min_size=1,
    max_size=40,
)


@hypothesis_settings(max_examples=25)
@given(_PAIRS)
def test_every_pair_is_in_one_group_of_each_kind(values):
    records = [record(row, *value) for row, value in enumerate(values)]
    figures, groups = summarise(records, seed=0)
    assert set(figures) == set(FIGURES)
    for parts in groups.values():
        assert sum(part["margin"].n for part in parts.values()) == len(records)
        total = sum(part["margin"].value * part["margin"].n for part in parts.values())
        assert total / len(records) == pytest.approx(figures["margin"].value, abs=1e-9)
    assert len(groups["chosen_length"]) <= 4


# ---- Intervals -------------------------------------------------------------------------------------------------------


def test_a_single_pair_has_no_interval():
    figures, _ = summarise([record(0, -1.0, -2.0, 3, 4, "a")], seed=0)
    assert {(figure.n, figure.low, figure.stderr) for figure in figures.values()} == {(1, None, None)}


# ---- Against another model -------------------------------------------------------------------------------------------


def test_difference_is_paired(place):
    found = evaluate(place / "model", data=place / "rows.jsonl", against=str(place / "base"))
    alone = evaluate(place / "base", data=place / "rows.jsonl")
    assert found.groups["against"]["all"] == alone.figures
    assert {kind for kind in found.groups if kind.startswith("against")} == {
        "against", "against_source", "against_chosen_length", "against_longer"
    }  # fmt: skip
    for name, figure in found.groups["difference"]["all"].items():
        assert figure.value == pytest.approx(found.figures[name].value - alone.figures[name].value)
    same = evaluate(place / "model", data=place / "rows.jsonl", against=str(place / "model"))
    assert {(figure.low, figure.high) for figure in same.groups["difference"]["all"].values()} == {(0.0, 0.0)}
    assert any(note.startswith("accuracy against base: ") for note in found.notes)


def test_pairs_that_one_model_lacks_are_left_out_of_the_difference():
    ours = [record(row, -1.0 - row, -2.0, 3, 4, "a") for row in range(4)]
    theirs = [record(row, -3.0, -2.0, 3, 4, "a") for row in (1, 3, 5)]
    groups = compare(ours, theirs, seed=0)
    assert groups["difference"]["all"]["chosen"].n == 2
    assert groups["difference"]["all"]["chosen"].value == pytest.approx(fmean([-2.0, -4.0]) + 3.0)
    with pytest.raises(ValueError, match="no pair in common"):
        compare(ours, [record(9, -1.0, -2.0, 3, 4, "a")], seed=0)


def test_another_vocabulary_makes_its_own_tokens(place, tmp_path):
    other = save_model(tmp_path / "other", vocabulary=769)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_tokens(["school"])
    tokenizer.save_pretrained(other)
    found = evaluate(place / "model", data=place / "rows.jsonl", against=str(other))
    alone = evaluate(other, data=place / "rows.jsonl")
    assert found.groups["against"]["all"] == alone.figures
    assert any("another vocabulary" in note for note in found.notes)


# ---- Runs ------------------------------------------------------------------------------------------------------------


def train(folder: Path, **settings) -> tuple[Path, dict[str, float]]:
    """A run of one step as `orpo-trl train` makes it; returns its folder, and the last evaluation in its logs."""
    recipe = {
        "model_name_or_path": str(save_model(folder / "base")),
        "dataset_name": str(save_rows(folder / "rows.jsonl", make_rows(40))), "test_split_size": 0.3,
        "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none",
        "max_length": 24, "beta": 0.5, "learning_rate": 1e-2, "disable_tqdm": True, "seed": 7, "save_strategy": "no",
        "gradient_checkpointing": False, "output_dir": str(folder / "run"), **settings,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    model_args, data_args, args = parse_recipe([str(path)])
    rows, held_out = load_pairs(data_args, args.eval_strategy != "no", seed=args.seed)
    trainer = ORPOTrainer(
        str(model_args.model_name_or_path), args, train_dataset=rows, eval_dataset=held_out,
        processing_class=load_tokenizer(model_args),
    )  # fmt: skip
    trainer.recipe = expanded(load_recipe([str(path)]))
    trainer.train()
    trainer.write_model()
    logs = [log for log in run_folder.read_history(folder / "run") if any(name.startswith("eval_") for name in log)]
    return folder / "run", {name: value for log in logs for name, value in log.items()}


@pytest.mark.parametrize("shuffled", [False, True])
def test_figures_of_a_run_are_those_that_it_has_logged(shuffled, tmp_path):
    run, logged = train(tmp_path, shuffle_dataset=shuffled)
    found = evaluate(run)
    for name, metric in {
        "accuracy": "rewards/accuracies", "log_odds": "log_odds_chosen", "chosen": "logps/chosen",
        "rejected": "logps/rejected",
    }.items():  # fmt: skip
        assert found.figures[name].value == pytest.approx(logged[f"eval_{metric}"], rel=1e-4, abs=1e-5), name
    assert 0.5 * found.figures["margin"].value == pytest.approx(logged["eval_rewards/margins"], rel=1e-4, abs=1e-5)
    assert found.settings["max_length"] == 24
    assert not [note for note in found.notes if "recorded" in note]
    # Rows that have changed since are told.
    save_rows(tmp_path / "rows.jsonl", make_rows(40, seed=5))
    assert [note for note in evaluate(run).notes if "not the pairs that the run has recorded" in note]


def test_evaluation_sets_of_a_run_are_groups(tmp_path):
    sets = {"one": {"path": str(save_rows(tmp_path / "one.jsonl", make_rows(9, seed=1)))},
            "two": {"path": str(save_rows(tmp_path / "two.jsonl", make_rows(5, seed=2)))}}  # fmt: skip
    run, logged = train(tmp_path, test_split_size=None, eval_datasets=sets)
    found = evaluate(run)
    for label in sets:
        of_set = found.groups["dataset"][label]
        assert of_set["chosen"].value == pytest.approx(logged[f"eval_{label}_logps/chosen"], rel=1e-4)
    assert not [note for note in found.notes if "recorded" in note]


def test_runs_without_held_out_pairs_need_data(tmp_path):
    run, _ = train(tmp_path, test_split_size=None, eval_strategy="no")
    with pytest.raises(ValueError, match=r"`eval_strategy: no` in .*recipe.yaml.*--data FILE"):
        evaluate(run)
    assert evaluate(run, data=save_rows(tmp_path / "more.jsonl", make_rows(6, seed=3))).settings["max_length"] == 24
    with pytest.raises(ValueError, match=r"base is no run with a recipe.yaml.*--data FILE"):
        evaluate(tmp_path / "base")


def test_limit_takes_the_first_pairs(place):
    found = evaluate(place / "model", data=place / "rows.jsonl", limit=6)
    rows = make_rows(31, nll_only_every=10)[:6]
    save_rows(place / "first.jsonl", rows)
    alone = evaluate(place / "model", data=place / "first.jsonl")
    assert found.figures == alone.figures
    assert (found.limit, found.asked) == (6, 5)


def test_pairs_that_are_not_finite_are_counted(place, tmp_path):
    model = tiny_model()
    rows = make_rows(12)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    used = {token for row in rows for text in row.values() for token in tokenizer(text)["input_ids"]}
    rare = next(token for token in tokenizer(" zebra")["input_ids"] if token not in used)
    model.model.embed_tokens.weight.data[rare] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    rows[3]["rejected"] += " zebra zebra"
    found = evaluate(tmp_path / "broken", data=save_rows(tmp_path / "rows.jsonl", rows))
    assert (found.asked, found.answered) == (12, 11)
    assert "1 pairs have log-probabilities that are not finite, and are left out" in found.notes


def test_command_prints_figures_and_groups(place):
    done = CliRunner().invoke(
        main, ["evaluate", str(place / "model"), "preferences", "--data", str(place / "rows.jsonl")]
    )
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Held-out pairs of model (27 of 27 items")
    stored = json.loads((place / "model" / "evaluations" / "preferences.json").read_text())
    assert stored["answered"] == 27
    longer = stored["groups"]["longer"]["chosen"]
    row = next(line.split() for line in lines if line.startswith("  chosen ") and str(longer["margin"]["n"]) in line)
    assert row[:3] == ["chosen", str(longer["accuracy"]["n"]), f"{longer['accuracy']['value']:.4f}"]
