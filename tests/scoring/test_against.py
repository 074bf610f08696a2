"""`orpo-trl logps MODEL DATA --against BASE`: both models on the same tokens, and the difference between them."""

import gc
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.small import TOKENIZER, make_rows, save_model, tiny_model
from transformers import AutoTokenizer, PreTrainedModel

from orpo_trl.cli import main
from orpo_trl.metrics import METRICS
from orpo_trl.scoring import run_logps
from orpo_trl.scoring.against import OF_THE_MODEL, RECORD_AGAINST, with_base
from orpo_trl.scoring.logps import RECORD
from orpo_trl.scoring.summary import COMPARED, SUMMARY, comparison


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models, and rows of which some have no rejected response and some are conversations."""
    folder = tmp_path_factory.mktemp("against")
    save_model(folder / "model")
    save_model(folder / "base", seed=1)
    rows = make_rows(40, nll_only_every=8)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(*arguments):
    return CliRunner().invoke(main, ["logps", *map(str, arguments)], prog_name="orpo-trl")


def scores(*arguments) -> list[dict]:
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def table(text: str) -> dict[str, list[float]]:
    """Base, model, difference, low and high by heading, of the table on standard error."""
    found = {}
    for metric in SUMMARY.values():
        (line,) = [line for line in text.splitlines() if line.startswith(metric.heading) and " to " in line]
        found[metric.heading] = [float(word) for word in line.removeprefix(metric.heading).replace(" to ", " ").split()]
    return found


# ---- Records ---------------------------------------------------------------------------------------------------------


def test_records_are_those_of_the_model_and_of_the_base_alone(place, tmp_path):
    model, base = (scores(place / name, place / "rows.jsonl") for name in ("model", "base"))
    both = scores(place / "model", place / "rows.jsonl", "--against", place / "base")
    assert both == with_base(model, base)
    assert list(both[1]) == RECORD_AGAINST.names
    assert both[1]["base_chosen_logp"] == base[1]["chosen_logp"] != both[1]["chosen_logp"]
    assert (both[0]["base_chosen_logp"] is None, both[0]["base_rejected_logp"]) == (False, None)
    for suffix in (".jsonl", ".parquet"):
        done = run(place / "model", place / "rows.jsonl", "--against", place / "base", "-o", tmp_path / f"s{suffix}")
        assert (done.exit_code, done.stdout) == (0, "")
    assert [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()] == both
    stored = pq.read_table(tmp_path / "s.parquet")
    assert stored.schema.equals(RECORD_AGAINST)
    assert stored.to_pylist() == both


def test_columns_of_the_base_are_all_that_a_model_decides():
    assert [name for name in RECORD.names if name not in OF_THE_MODEL] == [
        "source", "row", "prompt_tokens", "chosen_tokens", "rejected_tokens"
    ]  # fmt: skip
    assert RECORD_AGAINST.names == [*RECORD.names, *(f"base_{name}" for name in OF_THE_MODEL)]


# ---- The table -------------------------------------------------------------------------------------------------------


def test_table_holds_means_and_paired_intervals_of_the_difference(place):
    stats = pytest.importorskip("scipy.stats")
    done = run(place / "model", place / "rows.jsonl", "--against", place / "base")
    pairs = [json.loads(line) for line in done.stdout.splitlines()]
    pairs = [record for record in pairs if record["rejected_tokens"] is not None]
    assert f"against {place / 'base'}, over 35 pairs; 95 % interval: paired bootstrap, 10,000 resamples" in done.stderr
    found = table(done.stderr)
    for name in COMPARED:
        base, model, difference, low, high = found[SUMMARY[name].heading]
        ours, theirs = (np.array([pair[prefix + name] for pair in pairs], float) for prefix in ("", "base_"))
        assert base == pytest.approx(theirs.mean(), abs=1e-4)
        assert model == pytest.approx(ours.mean(), abs=1e-4)
        assert difference == pytest.approx((ours - theirs).mean(), abs=1e-4)
        truth = stats.bootstrap(
            (ours, theirs), lambda a, b, axis=-1: (a - b).mean(axis=axis), paired=True, n_resamples=10_000,
            method="percentile", rng=1,
        )  # fmt: skip
        noise = 0.1 * truth.standard_error
        assert low == pytest.approx(truth.confidence_interval.low, abs=noise + 1e-4)
        assert high == pytest.approx(truth.confidence_interval.high, abs=noise + 1e-4)
    # The summary of the model alone is as without a base.
    alone = run(place / "model", place / "rows.jsonl").stderr
    for metric in SUMMARY.values():
        (line,) = [line for line in alone.splitlines() if line.startswith(f"{metric.heading}: ")]
        assert line in done.stderr.splitlines()


def test_a_model_does_not_differ_from_itself_and_the_table_is_repeated(place):
    text = run(place / "model", place / "rows.jsonl", "--against", place / "model").stderr
    assert {tuple(values[2:]) for values in table(text).values()} == {(0.0, 0.0, 0.0)}
    first, second = (
        table(run(place / "model", place / "rows.jsonl", "--against", place / "base").stderr) for _ in range(2)
    )
    assert first == second


_VALUE = st.none() | st.floats(-20, 0)
_SIDES = st.tuples(_VALUE, _VALUE)
_Sides = tuple[float | None, float | None]


def _record(sides: _Sides, is_pair: bool) -> dict:
    chosen, rejected = sides
    values = {"rejected_tokens": 3 if is_pair else None, "chosen_logp": chosen}
    if is_pair:
        values |= {"rejected_logp": rejected}
    if is_pair and chosen is not None and rejected is not None:
        values |= {"log_or": chosen - rejected, "is_correct": chosen > rejected}
    return dict.fromkeys(RECORD.names) | values


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(_SIDES, _SIDES, st.booleans()), max_size=12))
def test_any_scores_make_a_table_of_what_is_finite_under_both(rows: list[tuple[_Sides, _Sides, bool]]):
    ours, theirs = ([_record(row[model], row[2]) for row in rows] for model in (0, 1))
    text = comparison(with_base(ours, theirs), "BASE")
    pairs = [row for row in rows if row[2]]
    kept = [row for row in pairs if None not in row[0] + row[1]]
    if not pairs:
        kept = [row for row in rows if row[0][0] is not None and row[1][0] is not None]
    assert text.startswith(f"against BASE, over {len(kept)} {'pairs' if pairs else 'rows'};")
    assert ("left out: " in text) == (len(kept) < len(pairs or rows))
    assert text.count(METRICS["logps/chosen"].heading) == bool(kept)
    assert text.count(METRICS["rewards/accuracies"].heading) == bool(kept and pairs)
    assert "nan" not in text


# ---- Models ----------------------------------------------------------------------------------------------------------


def test_one_model_is_in_memory_at_a_time(place, monkeypatch):
    alive, load = [], run_logps.load_model

    def count_before(*arguments):
        alive.append(sum(isinstance(one, PreTrainedModel) for one in gc.get_objects()))
        return load(*arguments)

    gc.collect()
    monkeypatch.setattr(run_logps, "load_model", count_before)
    run_logps.run_logps(str(place / "model"), str(place / "rows.jsonl"), against=str(place / "base"))
    assert len(alive) == 2
    assert alive[0] == alive[1]


def test_rows_are_rendered_by_the_models_template_for_both(place, tmp_path):
    """The base has another template, which would make other tokens."""
    base = save_model(tmp_path / "base", seed=1)
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} year{% endfor %}")
    options = ("--strings_as_messages", "--against", base)
    with_other = scores(place / "model", place / "rows.jsonl", *options)
    with_same = scores(place / "model", place / "rows.jsonl", "--strings_as_messages", "--against", place / "base")
    assert with_other == with_same


def swapped(folder: Path, one: str, other: str) -> Path:
    """A base whose vocabulary has two tokens under each other's ids."""
    path = save_model(folder) / "tokenizer.json"
    stored = json.loads(path.read_text())
    vocabulary = stored["model"]["vocab"]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(stored))
    return folder


def test_base_with_other_tokens_is_refused_before_anything_is_scored(place, tmp_path):
    vocabulary = AutoTokenizer.from_pretrained(TOKENIZER).get_vocab()
    first, second = sorted(["p", "y"], key=vocabulary.__getitem__)
    base = swapped(tmp_path / "base", first, second)
    done = run(place / "model", place / "rows.jsonl", "--against", base, "-o", tmp_path / "scores.jsonl")
    assert done.exit_code == 2
    words = f"the rows have token {vocabulary[first]}, which is {first!r} for MODEL's tokenizer and {second!r} for that"
    assert words in done.output
    assert "orpo-trl evaluate MODEL preferences --against BASE" in done.output
    assert "unique tokens/s" not in done.output
    assert not (tmp_path / "scores.jsonl").exists()


def test_tokens_that_no_row_has_may_differ(place, tmp_path):
    """As with a model that was given a token for padding, which its base lacks."""
    model = save_model(tmp_path / "model", vocabulary=769)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    tokenizer.save_pretrained(model)
    rows = tmp_path / "rows.jsonl"
    rows.write_text((place / "rows.jsonl").read_text())
    assert len(scores(model, rows, "--against", place / "base")) == 40
    with rows.open("a") as file:
        file.write(json.dumps({"prompt": "a <extra> school:", "chosen": " year", "rejected": " day"}) + "\n")
    done = run(model, rows, "--against", place / "base")
    assert done.exit_code == 2
    assert "which is '<extra>' for MODEL's tokenizer and no token for that of" in done.output


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("/no/such/model", "The model '/no/such/model' does not exist"),
        ("BARE", "has no tokenizer that can be loaded to compare vocabularies"),
    ],
)
def test_wrong_base_ends_with_a_message(base, message, place, tmp_path):
    tiny_model().save_pretrained(tmp_path / "bare")
    done = run(place / "model", place / "rows.jsonl", "--against", tmp_path / "bare" if base == "BARE" else base)
    assert done.exit_code == 2
    assert message in done.output
    assert done.stdout == ""
