"""Real rows raise no alarm: each is read, and nothing about it is worth a warning."""

import json

from orpo_trl.pairs.rows import row_to_pair


def turns(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_rows_of_ultrafeedback_and_polite(data):
    lines = [line for name in ("train", "eval") for line in (data / "ultrafeedback" / f"{name}.jsonl").open()]
    for row in map(json.loads, lines):
        whole = {side: turns(row["prompt"], row[side]) for side in ("chosen", "rejected")}
        pairs = [row_to_pair(row), row_to_pair(row, strings_as_messages=True), row_to_pair({**row, **whole})]
        assert not any(pair.notes for pair in pairs)
        assert (pairs[0].prompt, pairs[0].chosen, pairs[0].rejected) == (row["prompt"], row["chosen"], row["rejected"])
        assert pairs[1] == pairs[2]
    polite = json.loads((data / "polite" / "instruction-data-with-preference.json").read_text())
    assert not any(row_to_pair(row).notes for row in polite)
    assert (len(lines), len(polite)) == (1200, 1100)
