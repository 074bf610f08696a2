"""Scores of pairs against plain forward passes in float64, and the command `orpo-trl logps` as its users run it."""

import functools
import json
import math
import shutil
import subprocess
from typing import cast

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset, Features, Value
from datasets import List as ListOf
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from support import reference
from support.models import tiny_of_type
from support.processes import ORPO_TRL, TRAIN_ENVIRONMENT
from support.small import REPOSITORY, make_rows, settings, tiny_model

from orpo_trl import ORPOTrainer
from orpo_trl.batch import PairCollator
from orpo_trl.cli import main
from orpo_trl.metrics import METRICS
from orpo_trl.pairs.prepare import prepare_pairs
from orpo_trl.pairs.tokenize import PairRules
from orpo_trl.scoring import run_logps
from orpo_trl.scoring.logps import RECORD, prepare_model, score_pairs

LAYOUTS = ("shared_prefix", "padded")
QUICKSTART = REPOSITORY / "recipes" / "quickstart"
REJECTED = [name for name in RECORD.names if name.startswith("rejected_")] + [
    "log_or",
    "odds_ratio_delta",
    "is_correct",
]


def expected(model, pair: dict) -> dict:
    """The record of one pair from the logits of the model, float64, one row at a time, and the paper's formulas."""
    record = {"source": pair["orpo_source"], "row": pair["orpo_row"], "prompt_tokens": len(pair["prompt_ids"])}
    record |= dict.fromkeys(REJECTED)
    odds = {}
    for side in ("chosen", "rejected"):
        ids = pair[f"{side}_ids"]
        if ids is not None:
            logps = reference.token_logps(model, pair["prompt_ids"], ids)[len(pair["prompt_ids"]) - 1 :]
            p = math.exp(logps.mean())
            odds[side] = p / (1 - p)
            record |= {f"{side}_tokens": len(ids), f"{side}_logp": logps.mean().item()}
            record |= {f"{side}_logp_sum": logps.sum().item(), f"{side}_log_odds": math.log(odds[side])}
    if len(odds) == 2:
        record |= {
            "log_or": math.log(odds["chosen"] / odds["rejected"]),
            "odds_ratio_delta": 1 / (1 + odds["chosen"] / odds["rejected"]),
            "is_correct": record["chosen_logp"] > record["rejected_logp"],
        }
    return {name: record[name] for name in RECORD.names}


def assert_close(record: dict, other: dict) -> None:
    assert list(record) == list(other)
    for name, value in record.items():
        wanted = pytest.approx(other[name], rel=1e-5, abs=1e-5) if isinstance(other[name], float) else other[name]
        assert value == wanted, name


@torch.no_grad()
def assert_scores(records: list[dict], model, pairs: Dataset) -> None:
    """`model`: in float64."""
    assert len(records) == len(pairs)
    for record, pair in zip(records, cast(list[dict], pairs), strict=True):
        assert list(record) == RECORD.names
        truth = expected(model, pair)
        if truth["log_or"] is not None and abs(truth["log_or"]) < 1e-5:
            record = {**record, "is_correct": truth["is_correct"]}  # a tie up to rounding
        assert_close(record, truth)


def id_pairs(rows: list[tuple]) -> Dataset:
    """Prepared pairs of (prompt, chosen, rejected or None) token ids."""
    ids = {name: ListOf(Value("int32")) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    return Dataset.from_dict(
        {
            "prompt_ids": [row[0] for row in rows],
            "chosen_ids": [row[1] for row in rows],
            "rejected_ids": [row[2] for row in rows],
            "orpo_source": ["rows"] * len(rows),
            "orpo_row": list(range(len(rows))),
        },
        features=Features({**ids, "orpo_source": Value("string"), "orpo_row": Value("int64")}),
    )


@functools.cache
def two_models(model_type: str, layout: str):
    """A model that scores in this layout, and itself in float64."""
    model = tiny_of_type(model_type)
    truth = tiny_of_type(model_type).double().eval()
    assert prepare_model(model, layout) == layout
    return model, truth


# ---- Scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", ["mistral", "gemma2", "gpt2"])
def test_scores_equal_plain_forward_passes(model_type, layout):
    model, truth = two_models(model_type, layout)
    ids = st.lists(st.integers(3, 98), min_size=1, max_size=12)

    @hypothesis_settings(max_examples=12 if model_type == "mistral" else 4)
    @given(st.lists(st.tuples(ids, ids, st.none() | ids), min_size=1, max_size=4), st.integers(1, 120))
    def check(rows, max_tokens):
        pairs = id_pairs(rows)
        assert_scores(score_pairs(model, pairs, PairCollator(0, layout=layout), max_tokens), truth, pairs)

    check()


def prepared(tokenizer, count: int = 23, **kwargs) -> Dataset:
    return cast(Dataset, prepare_pairs(Dataset.from_list(make_rows(count, **kwargs)), tokenizer, PairRules())[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_do_not_depend_on_order_and_passes(layout, tokenizer):
    pairs = prepared(tokenizer, nll_only_every=4)
    model = tiny_model()
    prepare_model(model, layout)
    collator = PairCollator(3, layout=layout)
    whole = score_pairs(model, pairs, collator, max_tokens=100_000)
    for max_tokens in (1, 300):
        for rows in (range(len(pairs)), reversed(range(len(pairs)))):
            shuffled = pairs.select(rows)
            records = score_pairs(model, shuffled, collator, max_tokens)
            for record, pair in zip(records, cast(list[dict], shuffled), strict=True):
                other = next(other for other in whole if other["row"] == pair["orpo_row"])
                assert_close(record, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pass_has_no_more_tokens_than_asked_and_the_longest_rows_come_first(layout, tokenizer, monkeypatch):
    pairs = prepared(tokenizer, nll_only_every=5)
    model = tiny_model()
    prepare_model(model, layout)
    seen, forward = [], model.forward

    def record_shape(input_ids, **kwargs):
        seen.append(input_ids.shape)
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", record_shape)
    score_pairs(model, pairs, PairCollator(3, layout=layout), max_tokens=400)
    assert all(rows * tokens <= 400 for rows, tokens in seen)
    assert sum(rows * tokens for rows, tokens in seen) > 0.7 * 400 * (len(seen) - 1)
    if layout == "padded":
        widths = [tokens for _, tokens in seen]
        assert widths == sorted(widths, reverse=True)


def test_dropout_is_off_while_scoring_and_as_it_was_afterwards(tokenizer):
    pairs = prepared(tokenizer, 3)
    model = tiny_model(attention_dropout=0.5)
    truth = tiny_model(attention_dropout=0.5).double().eval()
    prepare_model(model)
    model.train()
    assert_scores(score_pairs(model, pairs, PairCollator(3, layout="shared_prefix")), truth, pairs)
    assert model.training


def test_bfloat16_weights_give_float32_log_probabilities(tokenizer):
    pairs = prepared(tokenizer, 5)
    model = tiny_model().bfloat16()
    truth = tiny_model().bfloat16().double().eval()
    prepare_model(model)
    records = score_pairs(model, pairs, PairCollator(3, layout="shared_prefix"))
    with torch.no_grad():
        for record, pair in zip(records, cast(list[dict], pairs), strict=True):
            assert record["chosen_logp"] == pytest.approx(expected(truth, pair)["chosen_logp"], abs=0.02)
            # A bfloat16 of this size is a multiple of 1 / 32.
            assert record["chosen_logp_sum"] * 32 % 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_that_are_not_finite_are_null_and_leave_other_rows_alone(layout):
    pairs = id_pairs([([5], [6], [7, 8]), ([5], [6], [9, 8]), ([5], [9, 8], None), ([5], [8], None)])
    model = tiny_model()
    model.model.embed_tokens.weight.data[9] = math.nan
    prepare_model(model, layout)
    records = score_pairs(model, pairs, PairCollator(3, layout=layout))
    assert [record["chosen_logp"] is None for record in records] == [False, False, True, False]
    assert [record["rejected_logp"] is None for record in records] == [False, True, True, True]
    assert [record["is_correct"] is None for record in records] == [False, True, True, True]
    assert "left out of the means: 2 rows" in run_logps.summary(records)
    assert "NaN" not in "".join(run_logps.json_lines(records))


def test_means_are_the_metrics_of_the_trainer(tokenizer, tmp_path):
    dataset, model = Dataset.from_list(make_rows(16, nll_only_every=5)), tiny_model()
    trainer = ORPOTrainer(
        model, settings(tmp_path), train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer
    )
    metrics = trainer.evaluate()
    records = score_pairs(model, cast(Dataset, trainer.eval_dataset), cast(PairCollator, trainer.data_collator))
    pairs = [record for record in records if record["rejected_tokens"]]
    for column, metric in {
        "chosen_logp": "logps/chosen",
        "rejected_logp": "logps/rejected",
        "log_or": "log_odds_chosen",
        "is_correct": "rewards/accuracies",
    }.items():
        mean = sum(record[column] for record in pairs) / len(pairs)
        assert mean == pytest.approx(metrics[f"eval_{metric}"], rel=1e-5, abs=1e-6)
    assert sum(math.log1p(-r["odds_ratio_delta"]) for r in pairs) / len(pairs) == pytest.approx(
        metrics["eval_log_odds_ratio"], rel=1e-5
    )


# ---- Models ----------------------------------------------------------------------------------------------------------


def test_model_that_cannot_read_packed_rows_is_padded(caplog):
    model = tiny_of_type("bloom")
    truth = tiny_of_type("bloom").double().eval()
    with pytest.raises(
        ValueError, match=r"not known to read packed rows exactly\. Set `pair_layout: padded` or `auto`"
    ):
        prepare_model(model, "shared_prefix")
    assert prepare_model(model, "auto") == "padded"
    assert "Pairs are padded" in caplog.text
    pairs = id_pairs([([5, 6, 7], [8, 9], [10]), ([5], [6], None)])
    assert_scores(score_pairs(model, pairs, PairCollator(0)), truth, pairs)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_adapter_folder_scores_as_its_merged_model(options, tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    base = type(tiny_model()).from_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **options)
    adapted = get_peft_model(base, config)
    torch.manual_seed(1)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn_like(weight)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    rows = make_rows(6)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    merged = adapted.merge_and_unload().double().eval()
    pairs = prepare_pairs(Dataset.from_list(rows), tokenizer, PairRules(), str(tmp_path / "rows.jsonl"))[0]
    for layout in LAYOUTS:
        records = run_logps.run_logps(str(tmp_path / "adapter"), str(tmp_path / "rows.jsonl"), pair_layout=layout)
        assert_scores(records, merged, cast(Dataset, pairs))


def test_adapters_that_the_head_or_the_prompt_would_miss_are_refused():
    on_head = get_peft_model(tiny_model(), LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="adapter is on the model's LM head"):
        prepare_model(on_head)
    virtual = get_peft_model(tiny_model(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="PromptTuningConfig puts virtual tokens before the prompt"):
        prepare_model(virtual)


# ---- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model for the quickstart's tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model().save_pretrained(folder)
    for path in (QUICKSTART / "model").iterdir():
        if path.name != "config.json":
            shutil.copy(path, folder)
    return folder


def run(*arguments):
    return CliRunner().invoke(main, ["logps", *map(str, arguments)], prog_name="orpo-trl")


@pytest.mark.slow
def test_output_pipes_and_the_rest_goes_to_standard_error(model_folder):
    command = [ORPO_TRL, "logps", str(model_folder), "recipes/quickstart/data", "--split", "test"]
    done = subprocess.run(command, cwd=REPOSITORY, env=TRAIN_ENVIRONMENT, capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["row"] for record in records] == list(range(67))
    assert {record["source"] for record in records} == {"recipes/quickstart/data:test"}
    accuracy = sum(record["is_correct"] for record in records) / 67
    assert "67 rows read, 67 kept (67 pairs)" in done.stderr
    assert f"{METRICS['rewards/accuracies'].heading}: {accuracy:.4f}" in done.stderr
    assert "unique tokens/s on cpu" in done.stderr
    assert "Scoring" not in done.stderr  # a progress bar is for terminals


def test_files_hold_what_is_printed(model_folder, tmp_path):
    rows = make_rows(9, nll_only_every=3)
    rows[4]["rejected"] = rows[4]["chosen"]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = run(model_folder, data)
    assert printed.exit_code == 0, printed.output
    assert "dropped, chosen equals rejected: 1 (row 4)" in printed.stderr
    records = [json.loads(line) for line in printed.stdout.splitlines()]
    assert [record["row"] for record in records] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert [record["rejected_tokens"] is None for record in records] == [
        row % 3 == 0 for row in (0, 1, 2, 3, 5, 6, 7, 8)
    ]
    for suffix in (".jsonl", ".parquet"):
        done = run(model_folder, data, "-o", tmp_path / f"scores{suffix}")
        assert (done.exit_code, done.stdout) == (0, "")
    assert (tmp_path / "scores.jsonl").read_text() == printed.stdout
    table = pq.read_table(tmp_path / "scores.parquet")
    assert table.schema.equals(RECORD)
    assert table.to_pylist() == records
    assert len(list(tmp_path.iterdir())) == 3


def test_options_are_those_of_the_recipe(model_folder, tmp_path):
    row = {"prompt": "a school:", "chosen": " year year year year year", "rejected": " day"}
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(row) + "\n")
    (tmp_path / "t.jinja").write_text("{% for m in messages %}x{{ m.content }}{{ eos_token }}{% endfor %}")

    def tokens(*options):
        done = run(model_folder, data, *options)
        assert done.exit_code == 0, done.output
        record = json.loads(done.stdout)
        return [record[f"{part}_tokens"] for part in ("prompt", "chosen", "rejected")]

    prompt, chosen, rejected = tokens()
    assert tokens("--max_length", prompt + 3) == [prompt, 3, min(3, rejected)]
    assert tokens("--max-completion-length", 2) == [prompt, 2, min(2, rejected)]
    as_messages = tokens("--strings_as_messages")
    assert as_messages[0] > prompt
    assert tokens("--strings-as-messages", "--chat_template_path", tmp_path / "t.jinja")[0] < as_messages[0]
    assert tokens("--tokenizer", QUICKSTART / "model", "--dtype", "bfloat16", "--device", "cpu") == [
        prompt, chosen, rejected
    ]  # fmt: skip
    dropped = run(model_folder, data, "--max_prompt_length", prompt)
    assert dropped.exit_code == 2
    assert "No row of the train dataset is left to use" in dropped.output


def test_malformed_rows_stop_or_are_dropped(model_folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*make_rows(2), {"chosen": "a", "rejected": "b"}]))
    stopped = run(model_folder, data)
    assert stopped.exit_code == 2
    assert "rows.jsonl, row 2: column `prompt`: expected a prompt" in stopped.output
    assert len(run(model_folder, data, "--on_malformed", "drop").stdout.splitlines()) == 2


def test_killed_run_leaves_no_file(model_folder, tmp_path, monkeypatch):
    def killed(*arguments, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_logps.json, "dumps", killed)
    with pytest.raises(KeyboardInterrupt):
        run_logps.run_logps(str(model_folder), str(QUICKSTART / "data" / "test.jsonl"), tmp_path / "scores.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL"], "Missing argument 'DATA'"),
        (["/no/such/model", "DATA"], "The model '/no/such/model' does not exist (looked for /no/such/model)"),
        (["outputs/absent", "DATA"], "The model 'outputs/absent' could not be loaded"),
        (["recipes/quickstart/model", "DATA"], "no file named model.safetensors"),
        (["NO_TOKENIZER", "DATA"], "no_tokenizer' has no tokenizer that can be loaded. Name one with --tokenizer."),
        (["MODEL", "absent.jsonl"], "The dataset 'absent.jsonl' does not exist"),
        (["MODEL", "recipes/quickstart/data", "--split", "validation"], "The split 'validation' of the dataset"),
        (["MODEL", "DATA", "-o", "scores.csv"], "expected a file ending in .jsonl or .parquet, received scores.csv"),
        (["MODEL", "DATA", "-o", "DATA"], "test.jsonl exists already"),
        (["MODEL", "DATA", "-o", "absent/scores.jsonl"], "the folder absent does not exist"),
        (["MODEL", "DATA", "--device", "abacus"], "--device: torch cannot use 'abacus'"),
        (["MODEL", "DATA", "--chat_template_path", "absent.jinja"], "the file 'absent.jinja' does not exist"),
        (["SMALL", "DATA"], "and the model embeds 99 tokens. Set --tokenizer."),
        (["SHORT", "DATA"], "more than the model's 16 positions. Set --max_length 16"),
        (["MODEL", "DATA", "--max_tokens", "0"], "0 is not in the range x>=1"),
        (["BLOOM", "DATA", "--pair_layout", "shared_prefix"], "Set `pair_layout: padded` or `auto`"),
    ],
)
def test_wrong_input_ends_with_a_message(arguments, message, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    made = {
        "NO_TOKENIZER": lambda: tiny_model(),
        "SMALL": lambda: tiny_model(99),
        "SHORT": lambda: tiny_model(max_position_embeddings=16),
        "BLOOM": lambda: tiny_of_type("bloom", vocab_size=768),
    }
    named = {"MODEL": model_folder, "DATA": QUICKSTART / "data" / "test.jsonl"}
    for name in set(made) & set(arguments):
        named[name] = tmp_path / name.lower()
        made[name]().save_pretrained(named[name])
        if name != "NO_TOKENIZER":
            for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(QUICKSTART / "model" / file, named[name])
    result = run(*(named.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.output
    assert result.stdout == ""


def test_out_of_memory_names_the_option(model_folder, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(run_logps, "score_pairs", full)
    result = run(model_folder, QUICKSTART / "data" / "test.jsonl", "--max_tokens", "99")
    assert result.exit_code == 2
    assert "--max_tokens 99: out of memory on cpu" in result.output
