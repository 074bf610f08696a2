"""scripts/benchmark.py on a CPU, run as its help says."""

import json
import os
import runpy
import subprocess
import sys

import pytest
from support.small import REPOSITORY, TOKENIZER, make_rows

SCRIPT = REPOSITORY / "scripts" / "benchmark.py"


def run(*arguments: str, cwd) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=True
    )


@pytest.fixture
def folder(tmp_path):
    """A data file and a tokenizer, named relative to the folder that the command runs in."""
    rows = [{name: row[name].strip() or "a" for name in row} for row in make_rows(40)]
    # Text of the tokenizer's own words, ended so that no token spans prompt and response.
    rows = [{**row, "chosen": "\n" + row["chosen"], "rejected": "\n" + row["rejected"]} for row in rows]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tokenizer").symlink_to(TOKENIZER)
    return tmp_path


@pytest.mark.slow
def test_all_sides_train_on_the_same_pairs(folder):
    done = run(
        *"--data pairs.jsonl --tokenizer tokenizer --model-size 10m --batch-size 2 --pairs 4 --rounds 2".split(),
        *"--max-length 128 --logging-steps 3 --json out.json".split(),
        cwd=folder,
    )
    report = json.loads((folder / "out.json").read_text())
    (step,) = report["steps"]
    assert step["timed_pairs"] == 8
    assert step["bound"] > 1
    assert set(step["sides"]) == {"trl", "padded", "shared_prefix"}
    for entry in step["sides"].values():
        assert entry["loss_difference"] < 1e-5
        assert entry["speed_up"] == pytest.approx(entry["pairs_per_s"] / step["sides"]["trl"]["pairs_per_s"])
        assert entry["efficiency"] == pytest.approx(entry["speed_up"] / step["bound"])
        assert ("estimated_gib" in entry) == (entry is not step["sides"]["trl"])
    assert set(report["preparation"]) == {"one thread", "all threads"}
    assert "ours, shared prefix" in done.stdout
    (logging,) = report["logging"]
    assert {name: len(times) for name, times in logging["seconds"].items()} == {
        "all metrics": 3, "no metrics": 3
    }  # fmt: skip
    assert "ms with all metrics" in done.stdout


@pytest.mark.slow
def test_ladder_has_each_setting_with_the_loss_of_the_first(folder):
    done = run(
        *"--data pairs.jsonl --tokenizer tokenizer --model-size 10m --batch-size 2 --pairs 2 --rounds 1".split(),
        *["--max-length", "128", "--json", "out.json", "--ladder", "checkpointing", "selective checkpointing"],
        cwd=folder,
    )
    (step,) = json.loads((folder / "out.json").read_text())["ladder"]
    assert list(step["sides"]) == ["checkpointing", "selective checkpointing"]
    for entry in step["sides"].values():
        assert entry["loss_difference"] < 1e-5
    assert "memory of the first" in done.stdout


def test_mfu_counts_the_operations_that_a_run_logs():
    """Of two pairs, by hand: 6 for each weight and token, the head's for scored tokens; 12 for each pair of tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    needed_flops = runpy.run_path(str(SCRIPT))["needed_flops"]
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    )
    head = 11 * 8
    body = sum(weight.numel() for weight in model.parameters()) - 2 * head
    # Prompt 3, chosen 2, rejected 1; prompt 2, chosen 1, rejected 2.
    rows = [{"lengths": [3, 5, 4]}, {"lengths": [2, 3, 4]}]
    tokens, scored = 6 + 5, (4 + 1) + (2 + 2)
    seen = (1 + 2 + 3 + 4 + 5) + 4 + (1 + 2 + 3) + (3 + 4)
    assert needed_flops(model, rows) == 6 * body * tokens + 6 * head * scored + 12 * 8 * 2 * seen


@pytest.mark.slow
@pytest.mark.long
def test_a_side_that_fails_is_named_and_the_others_are_reported(folder):
    run(
        *"--data pairs.jsonl --tokenizer tokenizer --model-size 10m --batch-size 2 --pairs 2 --rounds 1".split(),
        *"--max-length 128 --optim nonsense --without trl padded --json out.json".split(),
        cwd=folder,
    )
    report = json.loads((folder / "out.json").read_text())
    assert "nonsense" in report["steps"][0]["sides"]["shared_prefix"]["error"]
    assert report["preparation"]["all threads"]["rows"] == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--data and --tokenizer are required"),
        ("--data absent.jsonl --tokenizer tokenizer", "the file absent.jsonl does not exist"),
        ("--data pairs.jsonl --tokenizer tokenizer --rounds 0", "--rounds must be at least 1"),
        ("--data pairs.jsonl --tokenizer tokenizer --batch-size 32", "comparable rows"),
        ("--data bad.jsonl --tokenizer tokenizer", "row 1: expected the strings"),
        ("--data tokenizer/config.json --tokenizer tokenizer", "config.json, row 0: not JSON"),
        ("--data pairs.jsonl --tokenizer absent", "--tokenizer absent: "),
        ("--data pairs.jsonl --tokenizer tokenizer --json absent/out.json", "the folder absent does not exist"),
    ],
)
def test_wrong_input_is_named(arguments, message, folder, monkeypatch, capsys):
    (folder / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a"}\n')
    monkeypatch.chdir(folder)
    main = runpy.run_path(str(SCRIPT))["main"]
    with pytest.raises(SystemExit) as ended:  # any other exception would be shown with its traceback
        main(arguments.split())
    assert ended.value.code not in (0, None)
    assert message in (ended.value.code if isinstance(ended.value.code, str) else capsys.readouterr().err)
