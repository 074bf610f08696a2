"""AlpacaEval through its package and our sender: figures by hand, hostile servers, kills, missing files."""

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pytest
from click.testing import CliRunner
from support.hostile_server import FAULTS
from support.judges import JudgeServer, prefer, share_of_second, write_answers
from support.processes import ORPO_TRL, TRAIN_ENVIRONMENT
from support.small import tiny_model

from orpo_trl.cli import main
from orpo_trl.evaluate.alpaca_eval import evaluate_alpaca_eval
from orpo_trl.evaluate.options import Options, find_target
from orpo_trl.evaluations import OWN_TEMPLATE, read_evaluations
from orpo_trl.published import differences, published_figures

# lm-eval and alpaca_eval take long to import, and slow down all tests after them in their process.
pytestmark = pytest.mark.slow

pytest.importorskip("openai")


def evaluate(answers: Path, benchmark: str = "alpaca_eval", **options):
    return evaluate_alpaca_eval(find_target(str(answers)), Options(benchmark=benchmark, yes=True, **options))


def wins(server: JudgeServer) -> list[float]:
    """By each request alone: how much the judge prefers `mine`."""
    found = []
    for content in server.asked:
        body = {"messages": json.loads(content)}
        shown = body["messages"][-1]["content"]
        is_second = shown.index("mine says") > shown.index("reference says")
        second = share_of_second(body)
        found.append(second if is_second else 1 - second)
    return found


def test_the_win_rate_is_the_mean_preference_by_hand(tmp_path):
    answers, references = write_answers(tmp_path, 30)
    with JudgeServer() as server:
        found = evaluate(answers, reference_outputs=references, endpoint=server.url)
        by_hand = wins(server)
    assert len(by_hand) == 30

    assert found.figures["win_rate"].value == pytest.approx(100 * mean(by_hand))
    assert found.figures["win_rate"].stderr == pytest.approx(100 * stdev(by_hand) / 30**0.5)
    assert (found.benchmark, found.model) == ("alpaca_eval_2", "mine")
    assert (found.asked, found.answered, found.figures["win_rate"].n) == (30, 30, 30)
    # A name alone does not say that OpenAI's model has judged.
    model = f"gpt-4-1106-preview at {server.url.removeprefix('http://')}"
    assert found.judge == f"{model} with the prompt of weighted_alpaca_eval_gpt4_turbo"
    for published in published_figures(found.benchmark):
        assert f"judged by {model} with" in differences(found, published)[0]
    assert found.template == "unknown"
    [sampling] = {json.dumps({k: v for k, v in b.items() if k != "messages"}, sort_keys=True) for b in server.bodies}
    assert json.loads(sampling) == {
        "model": "gpt-4-1106-preview", "max_tokens": 1, "temperature": 1, "top_p": 1.0, "logprobs": True,
        "top_logprobs": 5,
    }  # fmt: skip
    assert "length-controlled" in found.notes[0]


def test_alpaca_eval_1_reads_ranks(tmp_path):
    def ranks(body) -> str:
        shown = body["messages"][-1]["content"]
        is_second = shown.index("mine says") > shown.index("reference says")
        is_mine_better = int(shown.split("mine says ")[1].split('"')[0]) % 3 == 0
        best = 2 if is_second == is_mine_better else 1
        return str([{"model": f"model_{n}", "rank": 1 if n == best else 2} for n in (1, 2)])

    answers, references = write_answers(tmp_path, 20)
    with JudgeServer(ranks) as server:
        found = evaluate(answers, "alpaca_eval_1", reference_outputs=references, endpoint=server.url)
    assert found.figures["win_rate"].value == pytest.approx(100 * 7 / 20)
    assert list(found.figures) == ["win_rate"]
    judge = f"gpt-4 at {server.url.removeprefix('http://')} with the prompt of alpaca_eval_gpt4"
    assert (found.benchmark, found.judge) == ("alpaca_eval_1", judge)
    assert {(body["model"], body["max_tokens"], body["temperature"]) for body in server.bodies} == {("gpt-4", 100, 0)}


def test_rows_without_a_verdict_are_named_and_do_not_count(tmp_path):
    def some(body) -> str:
        return "neither" if 'mine says 7"' in body["messages"][-1]["content"] else prefer(body)

    answers, references = write_answers(tmp_path, 12)
    with JudgeServer(some) as server:
        command = ["evaluate", str(answers), "alpaca_eval", "--reference-outputs", str(references), "--yes"]
        result = CliRunner().invoke(main, [*command, "--endpoint", server.url])
        by_hand = [win for win, content in zip(wins(server), server.asked, strict=True) if 'says 7\\"' not in content]
    assert result.exit_code == 75
    assert "alpaca_eval: 1 of 12 have no verdict." in result.stderr
    [found] = read_evaluations(tmp_path)
    assert (found.asked, found.answered, found.figures["win_rate"].n) == (12, 11, 11)
    assert found.figures["win_rate"].value == pytest.approx(100 * mean(by_hand))
    assert found.notes[0].startswith("No verdict for 1 rows: 8.")


def test_another_judge_is_named(tmp_path):
    answers, references = write_answers(tmp_path, 3)
    with JudgeServer() as server:
        found = evaluate(answers, reference_outputs=references, endpoint=server.url, judge="local-judge", limit=2)
    where = server.url.removeprefix("http://")
    assert found.judge == f"local-judge at {where} with the prompt of weighted_alpaca_eval_gpt4_turbo"
    assert {body["model"] for body in server.bodies} == {"local-judge"}
    assert (found.asked, found.limit) == (2, 2)


@pytest.mark.parametrize(
    ("benchmark", "file"),
    [("alpaca_eval", "alpaca_eval_gpt4_baseline.json"), ("alpaca_eval_1", "alpaca_eval.json")],
)
def test_without_reference_outputs_the_file_on_the_hub_is_named(tmp_path, benchmark, file):
    answers, _ = write_answers(tmp_path, 2)
    with pytest.raises(ValueError, match=rf"--reference_outputs FILE: {file} of the dataset tatsu-lab/alpaca_eval"):
        evaluate(answers, benchmark)


def test_answers_in_another_order_are_refused(tmp_path):
    answers, references = write_answers(tmp_path, 3)
    rows = json.loads(answers.read_text())
    answers.write_text(json.dumps(rows[::-1]))
    with pytest.raises(ValueError, match=r"answers.json, row 1: expected the instruction 'Tell me about 0.'"):
        evaluate(answers, reference_outputs=references)
    answers.write_text(json.dumps(rows[:2]))
    with pytest.raises(ValueError, match="expected 3 answers"):
        evaluate(answers, reference_outputs=references)


def hostile(count: int, tmp_path: Path, **options) -> tuple[JudgeServer, object]:
    answers, references = write_answers(tmp_path, count)
    with JudgeServer(faults=FAULTS, share=0.2, silence=6, wrong="?", wrong_first=1, **options) as server:
        found = evaluate(answers, reference_outputs=references, endpoint=server.url, workers=8, timeout=3)
    return server, found


def test_a_hostile_server_gets_each_request_until_it_is_judged(tmp_path):
    server, found = hostile(25, tmp_path, seed=2, most=1)
    assert found.answered == 25
    assert set(server.answered.values()) == {2}  # one that cannot be read, and one that can
    assert found.figures["win_rate"].value == pytest.approx(100 * mean(wins(server)))


def test_805_rows_and_8_workers_against_a_hostile_server(tmp_path):
    server, found = hostile(805, tmp_path, seed=1, most=2)
    assert set(server.failed) == set(FAULTS)
    assert found.answered == len(server.asked) == 805
    assert set(server.answered.values()) == {2}
    assert server.most_at_once <= 8 + server.failed["silence"]
    assert found.figures["win_rate"].value == pytest.approx(100 * mean(wins(server)))


def test_after_a_kill_nothing_is_sent_again_that_has_a_judgement(tmp_path):
    def slowly(body) -> str:
        time.sleep(0.03)
        return prefer(body)

    answers, references = write_answers(tmp_path, 805)
    kept = tmp_path / "evaluations" / "alpaca_eval_2.judgements.jsonl"
    with JudgeServer(slowly) as server:
        command = [ORPO_TRL, "evaluate", str(answers), "alpaca_eval", "--reference-outputs", str(references), "--yes"]
        command += ["--endpoint", server.url, "--workers", "8"]
        for kills, number in ((1, 200), (2, 500)):
            with subprocess.Popen(command, env=TRAIN_ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
                while sum(server.answered.values()) < number:
                    assert process.poll() is None
                    time.sleep(0.01)
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(1)  # requests that are on their way end
            before = dict(server.asked)
            lines = len(kept.read_text().splitlines())
            # What had no reply yet: at most one request of each worker, and of each kill.
            assert sum(before.values()) - 8 * kills <= lines <= sum(before.values())
        done = subprocess.run(command, env=TRAIN_ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert len(server.asked) == 805
    twice = [content for content, times in server.asked.items() if times > 1]
    assert len(twice) <= 2 * 8
    assert max(server.asked.values()) <= 3
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(rows) == len({row["key"] for row in rows}) == 805
    [found] = read_evaluations(tmp_path)
    assert (found.asked, found.answered) == (805, 805)
    assert found.figures["win_rate"].value == pytest.approx(100 * mean(wins(server)))
    again = subprocess.run(
        [argument for argument in command if argument != "--yes"], env=TRAIN_ENVIRONMENT, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert "judgements by" not in again.stderr


# ---- Length control --------------------------------------------------------------------------------------------------


def annotations(path: Path, mine_longer_by, preference) -> Path:
    rows = [
        {
            "instruction": f"Tell me about {i}.", "output_1": "r" * 100, "output_2": "m" * (100 + mine_longer_by(i)),
            "generator_1": "reference", "generator_2": "mine", "annotator": "weighted_alpaca_eval_gpt4_turbo",
            "preference": preference(i),
        }
        for i in range(805)
    ]  # fmt: skip
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def gamed(tmp_path) -> dict[str, str]:
    """The environment with a stand-in for the Hub's df_gamed.csv: two models that win by length alone."""
    folder = tmp_path / "hub" / "datasets--tatsu-lab--alpaca_eval"
    (folder / "snapshots" / "0").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0")
    lines = ["model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    for model, length, preference in (("concise", 1.0, 0.3), ("verbose", -1.0, 0.7)):
        lines += [f"{model},{i},{preference},{length},{(i % 11 - 5) / 5},False" for i in range(805)]
    (folder / "snapshots" / "0" / "df_gamed.csv").write_text("\n".join(lines) + "\n")
    return {**TRAIN_ENVIRONMENT, "HF_HUB_CACHE": str(tmp_path / "hub")}


def test_the_length_controlled_win_rate_takes_away_what_length_has_won(tmp_path, gamed):
    def figures(name: str, longer, preference) -> tuple[float, float]:
        path = annotations(tmp_path / "annotations.json", longer, preference)
        output = tmp_path / name
        done = subprocess.run(
            [ORPO_TRL, "evaluate", "someone/mine", "alpaca_eval", "--annotations", str(path), "-o", str(output)],
            env=gamed, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        [found] = read_evaluations(output)
        assert found.notes == []
        assert found.figures["lc_win_rate"].stderr is not None
        return found.figures["win_rate"].value, found.figures["lc_win_rate"].value

    # The winner does not depend on the length: both figures are the same but for the regularisation.
    raw, controlled = figures("fair", lambda i: 60 if i % 2 else -60, lambda i: 1.4)
    assert raw == pytest.approx(40)
    assert controlled == pytest.approx(40, abs=2)
    # The longer answer wins, and mine is longer three times of four.
    raw, controlled = figures("longer", lambda i: 60 if i % 4 else -60, lambda i: 1.9 if i % 4 else 1.1)
    assert raw == pytest.approx(70, abs=0.2)
    assert controlled < 60


def test_stored_annotations_of_other_answers_are_refused(tmp_path):
    path = annotations(tmp_path / "annotations.json", lambda i: 1, lambda i: 1.5)
    answers, _ = write_answers(tmp_path, 805)
    with pytest.raises(ValueError, match="expected annotations of the answers in"):
        evaluate(answers, annotations=path)
    assert evaluate_alpaca_eval(
        find_target("someone/mine"), Options(benchmark="alpaca_eval", annotations=path, limit=10)
    ).figures["win_rate"].value == pytest.approx(50)


def test_a_model_answers_first(tmp_path, tokenizer):
    model_folder = tmp_path / "tiny"
    tiny_model(len(tokenizer), max_position_embeddings=512).save_pretrained(model_folder)
    tokenizer.save_pretrained(model_folder)
    _, references = write_answers(tmp_path, 3)
    options = Options(
        benchmark="alpaca_eval", reference_outputs=references, limit=2, max_new_tokens=4, device="cpu", yes=True,
        output=tmp_path / "out",
    )  # fmt: skip
    with JudgeServer() as server:
        found = evaluate_alpaca_eval(find_target(str(model_folder)), replace(options, endpoint=server.url))
    written = json.loads((tmp_path / "out" / "evaluations" / "alpaca_eval.first-2.answers.json").read_text())
    assert [row["instruction"] for row in written] == ["Tell me about 0.", "Tell me about 1."]
    shown = " ".join(body["messages"][-1]["content"] for body in server.bodies)
    assert all(row["output"].strip() in shown for row in written)
    assert (found.model, found.template, found.answered) == (model_folder.name, OWN_TEMPLATE, 2)
