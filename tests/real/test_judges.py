"""Judges over the answers that ORPO's authors published for Mistral-ORPO-β, and over stored annotations."""

import json
import re
from pathlib import Path
from statistics import fmean

import pytest
from support.hostile_server import FAULTS
from support.judges import JudgeServer, number_of, prefer, with_logprobs

from orpo_trl.evaluate.alpaca_eval import evaluate_alpaca_eval
from orpo_trl.evaluate.mt_bench import evaluate_mt_bench
from orpo_trl.evaluate.options import Options, find_target

pytest.importorskip("openai")


@pytest.fixture
def count_tokens(mistral_tokenizer):
    """A response whose usage is counted by the tokenizer of Mistral."""

    def complete(body, text):
        response = with_logprobs(body, text)
        texts = [message["content"] for message in body["messages"]]
        prompt = sum(len(ids) for ids in mistral_tokenizer(texts, add_special_tokens=False)["input_ids"])
        response["usage"] = {"prompt_tokens": prompt, "completion_tokens": len(mistral_tokenizer(text)["input_ids"])}
        return response

    return complete


def grade_of(body) -> int:
    return 1 + number_of(body, 10)


def mt_bench(data: Path, tmp_path: Path, server: JudgeServer, **options):
    folder = data / "mt_bench"
    return evaluate_mt_bench(
        find_target(str(data / "orpo_outputs" / "mtbench_Mistral-ORPO-beta.jsonl")),
        Options(
            benchmark="mt_bench", data=folder / "question.jsonl", judge_prompts=folder / "judge_prompts.jsonl",
            reference_answers=folder / "reference_answers_gpt-4.jsonl", endpoint=server.url, output=tmp_path, yes=True,
            **options,
        ),
    )  # fmt: skip


def test_published_answers_to_mt_bench_are_judged_as_fastchat_judges(data, tmp_path):
    with JudgeServer(lambda body: f"It is good. Rating: [[{grade_of(body)}]]") as server:
        found = mt_bench(data, tmp_path, server)
    assert (found.asked, found.answered, len(server.asked)) == (160, 160, 160)
    assert found.judge == f"gpt-4 at {server.url.removeprefix('http://')}"
    assert {name: figures["score"].n for name, figures in found.groups["category"].items()} == dict.fromkeys(
        ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"], 20
    )
    assert found.figures["score"].value == pytest.approx(fmean(grade_of(body) for body in server.bodies))
    answers = (data / "orpo_outputs" / "mtbench_Mistral-ORPO-beta.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in answers.split("\n") if line]
    shown = [body["messages"][1]["content"] for body in server.bodies]
    for row in rows:
        first, second = row["choices"][0]["turns"]
        [both] = [text for text in shown if f"### Assistant A:\n{first}\n\n### User:" in text]
        assert f"### Assistant A:\n{second}\n\n<|The End of Assistant A's Conversation" in both
    assert sum("The Start of Reference Answer" in text for text in shown) == 2 * 30


def test_the_tokens_of_mt_bench_are_about_what_was_estimated(data, tmp_path, count_tokens, capsys):
    with JudgeServer(lambda body: "It is good. " * 49 + "[[7]]", complete=count_tokens) as server:
        found = mt_bench(data, tmp_path, server, judge="a-judge")
    used = found.settings["judge_tokens"]
    estimated = int(re.search(r"about ([\d,]+) tokens of prompts", capsys.readouterr().err)[1].replace(",", ""))
    assert used["prompt"] == pytest.approx(estimated, rel=0.1)


@pytest.mark.slow
def test_805_published_answers_against_a_hostile_server(data, tmp_path, count_tokens, capsys):
    """All judged once, and the tokens of what is paid for are within 10 % of the estimate."""
    answers = data / "orpo_outputs" / "alpacaeval_Mistral-ORPO-beta.json"
    rows = json.loads(answers.read_text(encoding="utf-8"))
    references = tmp_path / "references.json"
    # A stand-in for the reference outputs of the Hub: other answers of about the same length.
    outputs = [row["output"] for row in rows]
    stand_ins = [
        {"instruction": row["instruction"], "output": output, "generator": "stand-in"}
        for row, output in zip(rows, outputs[1:] + outputs[:1], strict=True)
    ]
    references.write_text(json.dumps(stand_ins))
    with JudgeServer(prefer, complete=count_tokens, faults=FAULTS, share=0.1, most=1, seed=4, silence=8) as server:
        found = evaluate_alpaca_eval(
            find_target(str(answers)),
            Options(
                benchmark="alpaca_eval", reference_outputs=references, endpoint=server.url, output=tmp_path,
                judge="a-judge", timeout=4, yes=True,
            ),
        )  # fmt: skip
    assert (found.asked, found.answered, len(server.asked)) == (805, 805, 805)
    assert set(server.answered.values()) == {1}
    assert found.model == "Mistral-ORPO-beta (7B)"
    estimated = int(re.search(r"about ([\d,]+) tokens of prompts", capsys.readouterr().err)[1].replace(",", ""))
    assert found.settings["judge_tokens"]["prompt"] == pytest.approx(estimated, rel=0.1)


# Of the package's leaderboards, and of tatsu-lab/alpaca_eval, `results/MODEL/CONFIGURATION/annotations.json`.
STORED = {
    "OpenHermes-2.5-Mistral-7B/weighted_alpaca_eval_gpt4_turbo": ("alpaca_eval", 10.340415705751552, 805),
    "mistral-orpo-beta/weighted_alpaca_eval_gpt4_turbo": ("alpaca_eval", 12.565408794559003, 805),
    "mistral-orpo-beta/alpaca_eval_gpt4": ("alpaca_eval_1", 91.15815691158157, 803),
}


@pytest.mark.parametrize("entry", STORED)
def test_stored_annotations_give_the_published_win_rate(data, entry):
    path = data / "alpaca_eval" / "results" / entry / "annotations.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there: a copy of results/ of tatsu-lab/alpaca_eval")
    benchmark, win_rate, answered = STORED[entry]
    found = evaluate_alpaca_eval(find_target(entry), Options(benchmark=benchmark, annotations=path))
    assert found.figures["win_rate"].value == pytest.approx(win_rate, abs=1e-9)
    assert (found.asked, found.answered) == (805, answered)
    assert found.judge == entry.split("/")[1]
