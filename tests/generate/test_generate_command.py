"""`orpo-trl generate` and `orpo-trl chat` as their users run them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.hostile_server import HostileServer
from support.processes import ORPO_TRL, launch
from support.smollm2 import smollm2

from orpo_trl.cli import main
from orpo_trl.generate.run import generate_answers

PROMPTS = ["What is the capital of France?", "Name three colours.", "Say hello.", "What is two plus two? " * 5]


def run(*arguments, **options):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="orpo-trl", **options)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def test_answers_of_a_model_and_of_another_beside_them(model_folder, prompts, tmp_path):
    output = tmp_path / "answers.jsonl"
    result = run("generate", model_folder, prompts, "-o", output, "--against", model_folder, "--max-new-tokens", "4",
                 "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = lines(output)
    assert [row["prompt"] for row in rows] == PROMPTS
    beside = lines(tmp_path / "answers.beside.jsonl")
    assert [row["questions"] for row in beside] == [[prompt] for prompt in PROMPTS]
    assert [row[str(model_folder)] for row in beside] == [[row["response"]] for row in rows]
    assert lines(tmp_path / "answers.against.jsonl") == rows
    assert result.stdout.count(f"── {model_folder}") == 2 * len(PROMPTS)
    assert PROMPTS[0] in result.stdout


def test_a_server_that_refuses_some_is_status_75(prompts, tmp_path):
    pytest.importorskip("openai")
    with HostileServer(faults=["400"], share=0.5, most=9, seed=1) as server:
        result = run("generate", "served", prompts, "-o", tmp_path / "a.jsonl", "--endpoint", server.url)
    assert result.exit_code == 75
    assert "prompts have no answer; the same command asks for them again" in result.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["no-such/model", "{prompts}", "-o", "{folder}/a"], "could not be loaded"),
        (["{model}", "{folder}/none.txt", "-o", "{folder}/a"], "none.txt does not exist"),
        (["{model}", "{prompts}", "-o", "{folder}/none/a"], "--output: the folder"),
        (["{model}", "{prompts}", "-o", "{folder}/a", "--endpoint", "localhost:8000"], "expected an address"),
        (["{model}", "{prompts}", "-o", "{folder}/a", "--temperature", "nan"], "not a finite number"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(words, expected, model_folder, prompts, tmp_path):
    words = [word.format(model=model_folder, prompts=prompts, folder=tmp_path) for word in words]
    result = run("generate", *words)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "a").exists()


def test_chat_answers_each_line_and_forgets_on_demand(model_folder):
    words = ["chat", model_folder, "--max_new_tokens", "5", "--temperature", "0", "--device", "cpu"]
    said = run(*words, input="hello\nhello\n/new\nhello\n")
    assert said.exit_code == 0, said.output
    first, second, again = [line for line in said.stdout.split("\n") if line][:3]
    assert first == again
    assert first != second


# ---- Slow: several processes, a real model, a real server ------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(model_folder, prompts, tmp_path):
    options = ["--max_new_tokens", "6", "--batch_size", "1", "--temperature", "1", "--device", "cpu"]
    assert run("generate", model_folder, prompts, "-o", tmp_path / "one.jsonl", *options).exit_code == 0
    words = ["generate", str(model_folder), str(prompts), "-o", str(tmp_path / "two.jsonl"), *options]
    launch(ORPO_TRL, *words, engine="ddp")
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()
    assert json.loads((tmp_path / "two.jsonl.settings.json").read_text())["processes"] == 2
    assert not list(tmp_path.glob("*.partial*"))


@contextmanager
def transformers_serve(model: Path):
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1", "--port", str(port),
             "--device", "cpu", "--dtype", "float32", str(model)]  # fmt: skip
    server = subprocess.Popen(
        serve, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ}
    )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            except OSError:
                assert server.poll() is None, server.stdout and server.stdout.read()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.slow
@pytest.mark.real_model
def test_a_real_server_gives_the_greedy_answers_of_this_process(prompts, tmp_path):
    pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    model, options = smollm2(), {"max_new_tokens": 24, "limit": 3}
    generate_answers(str(model), str(prompts), tmp_path / "here.jsonl", device="cpu", batch_size=1, **options)
    with transformers_serve(model) as url:
        generate_answers(str(model), str(prompts), tmp_path / "there.jsonl", endpoint=url, workers=1, **options)
    assert lines(tmp_path / "there.jsonl") == lines(tmp_path / "here.jsonl")
    assert "Paris" in lines(tmp_path / "here.jsonl")[0]["response"]
