"""The answers that ORPO's authors published for Mistral-ORPO-β, and the files that are written here, side by side."""

import json
from pathlib import Path
from statistics import fmean

import pytest
from support.small import tiny_model
from support.smollm2 import smollm2

from orpo_trl.generate.benchmarks import BENCHMARKS, Answered, read_answers
from orpo_trl.generate.run import generate_answers


@pytest.fixture(scope="session")
def published(data) -> dict[str, Path]:
    folder = data / "orpo_outputs"
    return {
        "alpaca_eval": folder / "alpacaeval_Mistral-ORPO-beta.json",
        "mt_bench": folder / "mtbench_Mistral-ORPO-beta.jsonl",
    }


@pytest.fixture(scope="session")
def questions(data, published) -> dict[str, Path]:
    return {
        "alpaca_eval": published["alpaca_eval"],  # it has each instruction, in the official order
        "mt_bench": data / "mt_bench" / "question.jsonl",
        "ifeval": data / "ifeval" / "ifeval.jsonl",
    }


def rows_of(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line]


def shape(value):
    """Keys in their order, lengths of lists, and types."""
    if isinstance(value, dict):
        return {"keys": list(value), "values": [shape(inner) for inner in value.values()]}
    return [shape(inner) for inner in value] if isinstance(value, list) else type(value)


@pytest.mark.parametrize(
    ("name", "count", "mean", "longest"), [("alpaca_eval", 805, 396, 2018), ("mt_bench", 160, 298, 1023)]
)
def test_published_answers_have_the_published_lengths(name, count, mean, longest, published, mistral_tokenizer):
    texts = [text for answers in read_answers(published[name]) for text in answers]
    lengths = [len(mistral_tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert len(lengths) == count
    assert (round(fmean(lengths)), max(lengths)) == (mean, longest)


@pytest.mark.parametrize("name", ["alpaca_eval", "mt_bench"])
def test_published_answers_are_written_as_the_authors_wrote_them(name, published, questions):
    """Byte for byte, but for what the authors' tools drew: generator, ids and times."""
    benchmark, rows = BENCHMARKS[name], rows_of(published[name])
    answered = [
        Answered(conversation, answers, row.get("tstamp", 0.0), row.get("answer_id", ""))
        for conversation, answers, row in zip(
            benchmark.read(questions[name]), read_answers(published[name]), rows, strict=True
        )
    ]
    assert benchmark.render(answered, "Mistral-ORPO-beta (7B)") == published[name].read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alpaca_eval", "mt_bench"])
def test_a_whole_file_of_a_model_has_the_structure_of_the_published_one(
    name, published, questions, mistral_tokenizer, tmp_path
):
    model = tmp_path / "tiny"
    tiny_model(len(mistral_tokenizer), max_position_embeddings=4096).save_pretrained(model)
    mistral_tokenizer.chat_template = (Path(__file__).parents[2] / "recipes/templates/orpo.jinja").read_text()
    mistral_tokenizer.save_pretrained(model)
    output = tmp_path / published[name].name
    generate_answers(str(model), name, output, data=questions[name], max_new_tokens=2, batch_size=64, device="cpu")
    ours, theirs = rows_of(output), rows_of(published[name])
    assert shape(ours) == shape(theirs)
    for key in ("instruction", "dataset", "datasplit", "question_id"):
        assert [row.get(key) for row in ours] == [row.get(key) for row in theirs]
    assert all(len(row.get("answer_id", "x" * 22)) == 22 for row in ours)


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("name", ["alpaca_eval", "mt_bench", "ifeval"])
def test_a_real_model_answers_in_the_benchmarks_format(name, published, questions, tmp_path):
    output = tmp_path / f"answers{questions[name].suffix}"
    generate_answers(str(smollm2()), name, output, data=questions[name], limit=3, max_new_tokens=16, device="cpu")
    ours = rows_of(output)
    if name == "ifeval":
        expected = [{"prompt": row["prompt"], "response": str} for row in rows_of(questions[name])[:3]]
        assert [{**row, "response": type(row["response"])} for row in ours] == expected
    else:
        assert shape(ours) == shape(rows_of(published[name])[:3])
    assert all(text.strip() for answers in read_answers(output) for text in answers)
    made = json.loads(output.with_name(f"{output.name}.settings.json").read_text())
    assert made["stop_tokens"] == ["<|im_end|>"]
