"""Scores of real, dirty rows with the real tokenizer, compared with plain forward passes, in both layouts."""

import json

import pytest
import torch
from support import reference
from support.small import tiny_model

from orpo_trl.config import DataArguments
from orpo_trl.pairs.load import load_pairs
from orpo_trl.pairs.prepare import prepare_pairs
from orpo_trl.pairs.tokenize import PairRules
from orpo_trl.scoring.run_logps import run_logps


def test_scores_equal_plain_forward_passes(data, mistral_tokenizer, tmp_path):
    lines = (data / "ultrafeedback" / "train.jsonl").read_text(encoding="utf-8").split("\n")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines[20:30] + lines[304:308]), encoding="utf-8")  # the 307th has a tie
    tiny_model(32000).save_pretrained(tmp_path / "model")
    mistral_tokenizer.save_pretrained(tmp_path / "model")
    rules = {"max_length": 256, "max_prompt_length": 200}
    packed, padded = (
        run_logps(
            str(tmp_path / "model"),
            str(path),
            tmp_path / f"{layout}.jsonl",
            pair_layout=layout,
            max_tokens=2048,
            **rules,
        )
        for layout in ("shared_prefix", "padded")
    )
    pairs, report = prepare_pairs(
        load_pairs(DataArguments(dataset_name=str(path)), False)[0], mistral_tokenizer, PairRules(**rules)
    )
    assert report.sources[str(path)].dropped["chosen equals rejected"] == 1
    assert len(packed) == len(padded) == len(pairs) > 8
    truth = tiny_model(32000).double().eval()
    for record, other, pair in zip(packed, padded, pairs, strict=True):
        assert record["row"] == other["row"] == pair["orpo_row"]
        with torch.no_grad():
            terms = reference.pair_terms(truth, pair)
        for name, term in {"chosen_logp": "chosen", "rejected_logp": "rejected", "log_or": "log_odds"}.items():
            assert record[name] == pytest.approx(terms[term].item(), rel=1e-5, abs=1e-5)
            assert other[name] == pytest.approx(terms[term].item(), rel=1e-5, abs=1e-5)
    written = (tmp_path / "shared_prefix.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in written] == packed
