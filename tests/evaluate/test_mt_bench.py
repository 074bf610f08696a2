"""MT-Bench: grades by turn and category, what the judge is shown, and what is said where a grade is missing."""

import json
from statistics import mean

import pytest
from click.testing import CliRunner
from support.judges import JudgeServer, number_of

from orpo_trl.cli import main
from orpo_trl.evaluate.mt_bench import evaluate_mt_bench, read_rating
from orpo_trl.evaluate.options import Options, find_target
from orpo_trl.evaluations import read_evaluations

QUESTIONS = {81: "writing", 101: "reasoning", 111: "math", 112: "math"}
# FastChat's names and fields, in words of these tests.
PROMPTS = {
    "single-v1": "Q: {question} A: {answer}",
    "single-math-v1": "Q: {question} REF: {ref_answer_1} A: {answer}",
    "single-v1-multi-turn": "Q1: {question_1} A1: {answer_1} Q2: {question_2} A2: {answer_2}",
    "single-math-v1-multi-turn": "R1: {ref_answer_1} R2: {ref_answer_2} Q1: {question_1} A1: {answer_1} "
    "Q2: {question_2} A2: {answer_2}",
    "pair-v2": "{answer_a} {answer_b}",
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turns_of(kind: str, number: int) -> list[str]:
    return [f"{kind} {number}.{turn} with {{braces}}" for turn in (1, 2)]


@pytest.fixture
def files(tmp_path):
    """Options by name, and the folder with the answers."""
    answers = [{"question_id": n, "choices": [{"index": 0, "turns": turns_of("answer", n)}]} for n in QUESTIONS]
    references = [{"question_id": n, "choices": [{"index": 0, "turns": turns_of("reference", n)}]} for n in QUESTIONS]
    prompts = [{"name": n, "system_prompt": f"system of {n}", "prompt_template": t} for n, t in PROMPTS.items()]
    write(tmp_path / "mine.jsonl", answers)
    return {
        "data": write(
            tmp_path / "question.jsonl",
            [{"question_id": n, "category": c, "turns": turns_of("question", n)} for n, c in QUESTIONS.items()],
        ),
        "judge_prompts": write(tmp_path / "prompts.jsonl", prompts),
        "reference_answers": write(tmp_path / "references.jsonl", references),
    }


def evaluate(tmp_path, **options):
    return evaluate_mt_bench(
        find_target(str(tmp_path / "mine.jsonl")), Options(benchmark="mt_bench", yes=True, **options)
    )


def grade_of(body) -> int:
    return 1 + number_of(body, 10)


def test_fixed_judgements_give_the_averages_by_hand(files, tmp_path):
    grades = {(81, 1): 8, (81, 2): 7.5, (101, 1): 4, (101, 2): 3, (111, 1): 10, (111, 2): 1, (112, 1): 6, (112, 2): -1}
    rows = [
        {"question_id": question, "model": "mine", "judge": ["gpt-4", "single-v1"], "score": score, "turn": turn}
        for (question, turn), score in grades.items()
    ]
    found = evaluate(tmp_path, data=files["data"], annotations=write(tmp_path / "gpt-4_single.jsonl", rows))
    # The grade that FastChat could not read (-1) is left out, and named.
    assert found.figures["score"].value == pytest.approx((8 + 7.5 + 4 + 3 + 10 + 1 + 6) / 7)
    assert found.figures["turn_1"].value == pytest.approx((8 + 4 + 10 + 6) / 4)
    assert found.figures["turn_2"].value == pytest.approx((7.5 + 3 + 1) / 3)
    by_category = {name: figures["score"].value for name, figures in found.groups["category"].items()}
    assert by_category == pytest.approx({"writing": 7.75, "reasoning": 3.5, "math": (10 + 1 + 6) / 3})
    assert (found.asked, found.answered, found.judge) == (8, 7, "gpt-4")
    assert found.settings["judge_prompts"] == "FastChat"
    assert found.notes == ["No verdict for 1 turns: 112 turn 2."]


def test_the_judge_is_shown_what_fastchat_shows(files, tmp_path):
    with JudgeServer(lambda body: f"Rating: [[{grade_of(body)}]]") as server:
        found = evaluate(tmp_path, endpoint=server.url, **files)
    shown = {tuple(message["content"] for message in body["messages"]) for body in server.bodies}
    q, a, r = (lambda number, kind=kind: turns_of(kind, number) for kind in ("question", "answer", "reference"))
    expected = set()
    for number, category in QUESTIONS.items():
        (q1, q2), (a1, a2), (r1, r2) = q(number), a(number), r(number)
        if category == "writing":
            expected.add(("system of single-v1", f"Q: {q1} A: {a1}"))
            expected.add(("system of single-v1-multi-turn", f"Q1: {q1} A1: {a1} Q2: {q2} A2: {a2}"))
        else:
            expected.add(("system of single-math-v1", f"Q: {q1} REF: {r1} A: {a1}"))
            expected.add(
                ("system of single-math-v1-multi-turn", f"R1: {r1} R2: {r2} Q1: {q1} A1: {a1} Q2: {q2} A2: {a2}")
            )
    assert shown == expected
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in server.bodies} == {("gpt-4", 0, 2048)}
    assert found.figures["score"].value == pytest.approx(mean(grade_of(body) for body in server.bodies))
    assert found.judge == f"gpt-4 at {server.url.removeprefix('http://')}"
    assert found.settings["judge_prompts"] == "FastChat"


def test_our_own_wording_holds_both_turns_and_never_passes_for_fastchats(files, tmp_path):
    del files["judge_prompts"]
    with JudgeServer(lambda body: "[[5]]") as server:
        found = evaluate(tmp_path, endpoint=server.url, **files)
    seconds = [body for body in server.bodies if "question 111.2" in body["messages"][1]["content"]]
    [turns] = [json.loads(body["messages"][1]["content"]) for body in seconds]
    q, a, r = (turns_of(kind, 111) for kind in ("question", "answer", "reference"))
    assert turns == [{"user": q[n], "assistant": a[n], "known solution": r[n]} for n in (0, 1)]
    [writing] = [body for body in server.bodies if "question 81.2" in body["messages"][1]["content"]]
    assert "reference" not in writing["messages"][1]["content"]
    assert found.judge == f"gpt-4 at {server.url.removeprefix('http://')} with our own wording"
    assert found.settings["judge_prompts"] == "own"


@pytest.mark.parametrize(
    ("text", "grade"),
    [("[[7]]", 7), ("so [[7.5]] it is", 7.5), ("[[10]] or [[2]]", 10), ("[[1]]", 1), ("[[9.]]", 9)],
)
def test_grades_that_are_read(text, grade):
    assert read_rating({"text": text}) == grade


@pytest.mark.parametrize(
    "text", ["", "[[11]]", "[[0]]", "[[0.9]]", "[[-3]]", "[[ten]]", "[7]", "7", "[[10.5]]", "[[]]"]
)
def test_grades_that_are_none(text):
    with pytest.raises(ValueError, match="grade"):
        read_rating({"text": text})


def test_turns_without_a_grade_are_named_and_the_same_command_asks_again(files, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")

    def grades(body) -> str:
        return "[[11]]" if "answer 101.2" in body["messages"][1]["content"] else "[[6]]"

    with JudgeServer(grades) as server:
        command = ["evaluate", str(tmp_path / "mine.jsonl"), "mt_bench", "--yes", "--endpoint", server.url]
        command += [text for name, path in files.items() for text in (f"--{name}", str(path))]
        first = CliRunner().invoke(main, command)
        assert first.exit_code == 75
        assert "mt_bench: 1 of 8 have no verdict. The same command goes on from here" in first.stderr
        [found] = read_evaluations(tmp_path)
        assert (found.asked, found.answered) == (8, 7)
        assert found.figures["score"].value == 6  # and not (7 * 6 + 0) / 8
        assert "No verdict for 1 turns: 101 turn 2." in found.notes[0]
        server.verdict = lambda body: "[[10]]"
        second = CliRunner().invoke(main, command)
        assert second.exit_code == 0
        [found] = read_evaluations(tmp_path)
    assert found.figures["score"].value == (7 * 6 + 10) / 8
    assert sorted(server.asked.values()) == [1] * 7 + [3 + 1]
    assert server.keys == {"Bearer sk-secret-123"}
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes()
    assert "secret" not in first.output + second.output


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("reference_answers", "expected --reference_answers FILE"),
        ("data", "set --data FILE"),
    ],
)
def test_a_missing_file_is_named(files, tmp_path, left_out, message):
    files.pop(left_out)
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path, **files)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("data", [{"question_id": 1, "category": "math", "turns": ["one"]}], "expected two turns of question 1"),
        ("data", [{"question_id": 1, "turns": ["a", "b"]}], "'category' is missing"),
        ("judge_prompts", [{"name": "single-v1", "system_prompt": "", "prompt_template": "{other}"}], "single-v1"),
        ("reference_answers", [{"question_id": 101, "choices": [{"turns": ["a", "b"]}]}], "111, 112 are missing"),
    ],
)  # fmt: skip
def test_files_of_another_form_are_named(files, tmp_path, name, rows, message):
    write(files[name], rows)
    with pytest.raises(ValueError, match=message) as error:
        evaluate(tmp_path, **files)
    assert str(files[name]) in str(error.value)


def test_judgements_of_two_models_are_refused(files, tmp_path):
    rows = [
        {"question_id": 81, "model": model, "judge": ["gpt-4", "single-v1"], "score": 5, "turn": 1} for model in "ab"
    ]
    with pytest.raises(ValueError, match="of one model by one judge"):
        evaluate(tmp_path, data=files["data"], annotations=write(tmp_path / "two.jsonl", rows))
