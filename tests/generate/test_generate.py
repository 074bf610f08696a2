"""Answers of tiny models: their files, restarts, processes, and what is refused."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from support.hostile_server import HostileServer
from support.processes import ORPO_TRL, TRAIN_ENVIRONMENT
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_trl.commands import Unfinished
from orpo_trl.generate.benchmarks import settings_file
from orpo_trl.generate.engines import LocalModel
from orpo_trl.generate.run import generate_answers

QUESTIONS = [
    {
        "question_id": 81 + k,
        "category": "math" if k % 2 else "writing",
        "turns": [f"{'long ' * (k % 7)}question {k}", f"and {k}?"],
    }
    for k in range(24)
]


@pytest.fixture
def questions(tmp_path) -> Path:
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


def generated(model, questions, output, **options) -> list[dict]:
    options = {"data": questions, "max_new_tokens": 8, "batch_size": 4, "device": "cpu", **options}
    generate_answers(str(model), "mt_bench", output, **options)
    return [json.loads(line) for line in output.read_text().splitlines()]


def without_time(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "tstamp"} for row in rows]


@pytest.fixture(scope="module")
def expected(model_folder, tmp_path_factory) -> list[dict]:
    """Answers of a process that nobody has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return without_time(generated(model_folder, folder / "question.jsonl", folder / "answers.jsonl"))


def test_answers_equal_those_of_plain_generate(model_folder, questions, expected, tmp_path):
    """Greedy questions, one at a time, against transformers' own template, tokens and `generate`."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for k in (1, 3, 23):
        turns, found = [], []
        for question in QUESTIONS[k]["turns"]:
            turns.append({"role": "user", "content": question})
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, return_tensors="pt")
            with torch.no_grad():
                made = model.generate(**ids, max_new_tokens=8, do_sample=False, eos_token_id=tokenizer.eos_token_id)
            found.append(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
            turns.append({"role": "assistant", "content": found[-1]})
        assert expected[k]["choices"] == [{"index": 0, "turns": found}]


def test_a_seed_gives_one_file_and_another_seed_another(model_folder, questions, expected, tmp_path):
    assert without_time(generated(model_folder, questions, tmp_path / "a.jsonl", batch_size=5)) == expected
    other = without_time(generated(model_folder, questions, tmp_path / "b.jsonl", seed=43))
    same = [a["choices"] == b["choices"] for a, b in zip(other, expected, strict=True)]
    assert same == [row["category"] == "math" for row in QUESTIONS]  # these are greedy


@pytest.mark.slow
def test_five_kills_lose_and_double_nothing(model_folder, questions, expected, tmp_path):
    output = tmp_path / "answers.jsonl"
    journal = tmp_path / "answers.jsonl.partial"
    command = [
        ORPO_TRL, "generate", model_folder, "mt_bench", "-o", output, "--data", questions, "--max_new_tokens", "8",
        "--batch_size", "4", "--device", "cpu",
    ]  # fmt: skip
    for kill in range(5):
        process = subprocess.Popen(list(map(str, command)), env=TRAIN_ENVIRONMENT, stderr=subprocess.DEVNULL)
        wanted = 8 * kill + 5  # lines: within the first turn, and within the second
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= wanted):
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        with journal.open("a") as file:
            file.write('{"index": 0, "tur' if kill % 2 else "")
        assert not output.exists()
    before = journal.read_bytes().count(b"\n")
    assert before >= 37
    assert without_time(generated(model_folder, questions, output)) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "answers.jsonl", "answers.jsonl.settings.json", "question.jsonl",
    ]  # fmt: skip


def test_a_finished_file_stays_and_one_made_otherwise_is_refused(model_folder, questions, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    rows = generated(model_folder, questions, output, limit=2)
    (tmp_path / "answers.jsonl.partial").write_text("left by a process that was killed at its end")
    assert generated(model_folder, questions, output, limit=2) == rows
    assert not (tmp_path / "answers.jsonl.partial").exists()
    assert "complete already" in capsys.readouterr().err
    with pytest.raises(ValueError, match="exists already, made otherwise: seed was 42 and is 7"):
        generated(model_folder, questions, output, limit=2, seed=7)
    settings_file(output).unlink()
    with pytest.raises(ValueError, match="exists already"):
        generated(model_folder, questions, output, limit=2)


def test_the_settings_beside_the_answers_say_how_they_were_made(model_folder, questions, tmp_path):
    generated(model_folder, questions, tmp_path / "a.jsonl", limit=2)
    made = json.loads((tmp_path / "a.jsonl.settings.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert made["template"] == tokenizer.chat_template
    assert made["stop_tokens"] == ["</s>"]
    assert made["identity"]["model"] == str(model_folder)
    assert made["identity"]["temperature"] == "by category"
    assert (made["identity"]["seed"], made["identity"]["number_of_prompts"]) == (42, 2)
    assert made["versions"]["transformers"]


def test_an_adapter_answers_as_its_merged_model(model_folder, questions, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "merged")
    found, merged, plain = (
        [row["choices"] for row in generated(folder, questions, tmp_path / f"{number}.jsonl", temperature=0.0)]
        for number, folder in enumerate([tmp_path / "adapter", tmp_path / "merged", model_folder])
    )
    assert found == merged
    assert found != plain


def test_a_model_without_a_template_is_refused_or_asked_in_that_of_another(model_folder, tmp_path):
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(bare)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(bare)
    with pytest.raises(ValueError, match=r"has no chat template\. Set --chat_template_path"):
        LocalModel(str(bare), torch.device("cpu"))
    found = LocalModel(str(bare), torch.device("cpu"), default_template=str(model_folder))
    assert found.tokenizer.chat_template == template


def test_a_prompt_longer_than_the_model_is_named(model_folder, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("short\n" + "long " * 600 + "\n")
    with pytest.raises(ValueError, match=r"Prompt 2: [\d,]+ tokens, and the model takes 512"):
        generate_answers(str(model_folder), str(path), tmp_path / "a.jsonl", device="cpu")


def test_a_limit_that_the_model_does_not_reach_is_told(model_folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("short\n")
    for asked, is_told in ((8, False), (600, True)):
        generate_answers(
            str(model_folder), str(tmp_path / "prompts.txt"), tmp_path / f"{asked}.jsonl", device="cpu",
            max_new_tokens=asked,
        )  # fmt: skip
        said = "takes 512 tokens with the answer: answers in the batch of the longest prompt end after"
        assert (said in capsys.readouterr().err) == is_told


# ---- A server --------------------------------------------------------------------------------------------------------


def test_a_server_gets_the_conversations_and_its_answers_come_in_order(questions, tmp_path):
    pytest.importorskip("openai")

    def reply(body):
        return f"{len(body['messages'])}: {body['messages'][-1]['content']}"

    with HostileServer(reply, faults=["500", "reset", "no JSON"], share=0.2, most=1) as server:
        rows = generated("served", questions, tmp_path / "a.jsonl", device=None, endpoint=server.url)
    for row, question in zip(rows, QUESTIONS, strict=True):
        first, second = question["turns"]
        assert row["choices"][0]["turns"] == [f"1: {first}", f"3: {second}"]
        assert row["model_id"] == "served"
    assert set(server.answered.values()) == {1}
    assert len(server.answered) == 48
    second = next(body for body in server.bodies if len(body["messages"]) == 3)
    assert second["messages"][1] == {"role": "assistant", "content": f"1: {second['messages'][0]['content']}"}
    by_question = {body["messages"][0]["content"]: body["temperature"] for body in server.bodies}
    assert [by_question[question["turns"][0]] for question in QUESTIONS[:2]] == [0.7, 0.0]


def test_what_a_server_does_not_answer_is_named_and_asked_again_alone(questions, tmp_path):
    pytest.importorskip("openai")

    class Refusing(HostileServer):
        refused = "question 3"

        def fault_of(self, content, tries):
            return "400" if self.refused and self.refused in content else None

    with Refusing() as server:
        options = {"device": None, "endpoint": server.url, "limit": 8}
        with pytest.raises(Unfinished, match=r"1 of 8 prompts have no answer.* Prompt 4: .*'served'.*refused"):
            generated("served", questions, tmp_path / "a.jsonl", **options)
        server.refused = ""
        assert len(generated("served", questions, tmp_path / "a.jsonl", **options)) == 8
    assert set(server.answered.values()) == {1}
    assert len(server.answered) == 16


def test_a_wrong_key_ends_at_once(questions, tmp_path):
    pytest.importorskip("openai")
    with (
        HostileServer(faults=["401"], share=1.0, most=99) as server,
        pytest.raises(ValueError, match="refused"),
    ):
        generated("served", questions, tmp_path / "a.jsonl", device=None, endpoint=server.url, workers=1)
    assert sum(server.asked.values()) <= 3


def test_options_of_a_model_are_refused_beside_a_server(questions, tmp_path):
    with pytest.raises(ValueError, match="--device: the server of --endpoint decides this"):
        generated("served", questions, tmp_path / "a.jsonl", endpoint="http://localhost:1/v1")
