"""Metrics of a real run, compared with a recomputation from its rows under the weights of each checkpoint."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from support.processes import cpu_engine, train
from support.small import TOKENIZER, make_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_trl.batch import PairCollator
from orpo_trl.metric_sums import length_bucket
from orpo_trl.pairs.prepare import prepare_pairs
from orpo_trl.pairs.tokenize import PairRules
from orpo_trl.scoring.logps import prepare_model, score_pairs

BETA = 0.3
# 19 rows in optimiser steps of 8: the last step has 3 rows, two for one process and one for the other.
ROWS, STEP, HELD_OUT = 19, 8, 7
SOURCES = ["data/farm.jsonl", "data/zoo.jsonl"]
JOB = {
    "rows": ROWS, "eval_rows": HELD_OUT, "nll_only_every": 5, "sources": SOURCES,
    "config": {
        "beta": BETA, "max_steps": 3, "learning_rate": 3e-3, "optim": "adamw_torch", "logging_steps": 1,
        "per_device_eval_batch_size": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
        "save_steps": 1, "save_only_model": True, "train_sampling_strategy": "sequential",
    },
}  # fmt: skip


def log_softmax_of(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return logits.log_softmax(-1)


def expected_metrics(folder: Path, rows: list[dict], sources: list[str], tokenizer) -> dict[str, float]:
    """Metrics of rows under the weights of a folder, in float64. The NLL is from a plain forward pass of each row."""
    pairs, _ = prepare_pairs(Dataset.from_list(rows), tokenizer, PairRules(max_length=1024))
    assert len(pairs) == len(rows)
    model = AutoModelForCausalLM.from_pretrained(folder)
    nll, tokens = 0.0, 0
    for pair in pairs:
        ids = pair["prompt_ids"] + pair["chosen_ids"]
        logps = log_softmax_of(model, ids)
        nll -= logps[range(len(ids) - 1), ids[1:]].sum().item()
        tokens += len(ids) - 1
    layout = prepare_model(model)
    scores = list(score_pairs(model, pairs, PairCollator(0, layout=layout)))
    held = [(score, source) for score, source in zip(scores, sources, strict=True) if score["log_or"] is not None]
    mean = {
        name: math.fsum(score[name] for score, _ in held) / len(held)
        for name in ("chosen_logp", "rejected_logp", "log_or", "is_correct")
    }
    sigmoids = [1 / (1 + math.exp(-score["log_or"])) for score, _ in held]
    log_sigmoid = math.fsum(map(math.log, sigmoids)) / len(held)
    metrics = {
        "nll_loss": nll / tokens,
        "logps/chosen": mean["chosen_logp"],
        "logps/rejected": mean["rejected_logp"],
        "log_odds_chosen": mean["log_or"],
        "log_odds_ratio": log_sigmoid,
        "odds_ratio_delta": math.fsum(1 - value for value in sigmoids) / len(held),
        "rewards/chosen": BETA * mean["chosen_logp"],
        "rewards/rejected": BETA * mean["rejected_logp"],
        "rewards/margins": BETA * (mean["chosen_logp"] - mean["rejected_logp"]),
        "rewards/accuracies": mean["is_correct"],
        "loss": nll / tokens - BETA * log_sigmoid,
    }
    groups = {f"sources/{Path(source).name}": source for source in set(sources)} if len(set(sources)) > 1 else {}
    groups |= {
        f"lengths/{bucket}": bucket
        for bucket in {length_bucket(max(s["chosen_tokens"], s["rejected_tokens"])) for s, _ in held}
    }
    for label, group in groups.items():
        of_group = [
            score
            for score, source in held
            if group in (source, length_bucket(max(score["chosen_tokens"], score["rejected_tokens"])))
        ]
        margins = [score["chosen_logp"] - score["rejected_logp"] for score in of_group]
        metrics[f"{label}/pairs"] = len(of_group)
        metrics[f"{label}/margins"] = BETA * math.fsum(margins) / len(margins)
        metrics[f"{label}/accuracies"] = sum(margin > 0 for margin in margins) / len(margins)
    return metrics


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "options"),
    [
        (None, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        ("zero3", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
        ("ddp", {"per_device_train_batch_size": 4, "pair_layout": "padded"}),
    ],
)
def test_metrics_equal_their_recomputation_from_rows(engine, options, base, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    job = {**JOB, "config": {**JOB["config"], **options}, "model": base, "output_dir": output}
    result = train(job, cpu_engine(engine, tmp_path) if engine == "zero3" else engine)
    assert result["ranks"] == (1 if engine is None else 2)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    rows, held_out = make_rows(ROWS, JOB["nll_only_every"]), make_rows(HELD_OUT, 3, seed=1)
    sources = [SOURCES[row % 2] for row in range(HELD_OUT)]
    logs = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    weights = [base, *(output / f"checkpoint-{step}" for step in (1, 2, 3))]
    for step in (1, 2, 3):
        trained = rows[(step - 1) * STEP : step * STEP]
        (log,) = [log for log in logs if log["step"] == step and "loss" in log]
        for name, value in expected_metrics(weights[step - 1], trained, ["train"] * len(trained), tokenizer).items():
            if not name.startswith("lengths/"):
                assert log[name] == pytest.approx(value, abs=1e-5, rel=1e-5), (step, name)
        log = next(log for log in logs if log["step"] == step and "eval_loss" in log)
        expected = expected_metrics(weights[step], held_out, sources, tokenizer)
        for name, value in expected.items():
            assert log[f"eval_{name}"] == pytest.approx(value, abs=1e-5, rel=1e-5), (step, name)
        logged = {name for name in log if name.startswith(("eval_sources/", "eval_lengths/"))}
        assert logged == {f"eval_{name}" for name in expected if name.startswith(("sources/", "lengths/"))}
        assert {"eval_sources/farm.jsonl/margins", "eval_lengths/1-64/accuracies"} <= logged
