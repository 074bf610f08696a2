"""IFEval of a real chat model: our figures are those of lm-eval's own command line, to the last digit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.smollm2 import smollm2

from orpo_trl.evaluations import read_evaluations

pytestmark = [pytest.mark.slow, pytest.mark.real_model]

PROMPTS, TOKENS = 6, 32
ITEMS = [
    ("Write two sentences about rivers without commas.", ["punctuation:no_comma"], [{}]),
    ("Answer in capitals: what is a lake?", ["change_case:english_capital"], [{}]),
    ("Name three fruits in lowercase.", ["change_case:english_lowercase"], [{}]),
    ("Write about the sea and name it twice.", ["keywords:frequency"],
     [{"keyword": "sea", "frequency": 2, "relation": "at least"}]),
    ("Say hello with fewer than 100 words.", ["length_constraints:number_words", "punctuation:no_comma"],
     [{"num_words": 100, "relation": "less than"}, {}]),
    ("Wrap your whole answer in double quotation marks.", ["startend:quotation"], [{}]),
]  # fmt: skip
TASK = """include: {package}/tasks/ifeval/ifeval.yaml
task: ifeval_local
dataset_path: json
dataset_kwargs: {{data_files: {{train: {file}}}}}
"""


@pytest.fixture
def punkt(tmp_path, monkeypatch):
    """These instructions do not split sentences: an empty folder will do."""
    (tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english").mkdir(parents=True)
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "nltk"))


def test_our_figures_are_those_of_lm_evals_command_line(punkt, tmp_path):
    import lm_eval

    keys = {key: None for _, _, kwargs in ITEMS for one in kwargs for key in one}
    items = [
        {"key": n, "prompt": prompt, "instruction_id_list": names, "kwargs": [{**keys, **one} for one in kwargs]}
        for n, (prompt, names, kwargs) in enumerate(ITEMS)
    ]
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    model, commands = str(smollm2()), Path(sys.executable).parent
    subprocess.run(
        [commands / "orpo-trl", "evaluate", model, "ifeval", "--data", file, "--output", tmp_path, "--device", "cpu",
         "--dtype", "float32", "--batch_size", "2", "--max_new_tokens", str(TOKENS)],
        check=True,
    )  # fmt: skip
    (tmp_path / "tasks").mkdir()
    task = TASK.format(package=Path(lm_eval.__file__).parent, file=file)
    (tmp_path / "tasks" / "ifeval_local.yaml").write_text(task, encoding="utf-8")
    subprocess.run(
        [commands / "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--tasks",
         "ifeval_local", "--include_path", tmp_path / "tasks", "--apply_chat_template", "--device", "cpu",
         "--batch_size", "2", "--gen_kwargs", f"max_gen_toks={TOKENS}", "--output_path", tmp_path / "theirs"],
        check=True,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    (written,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(written.read_text(encoding="utf-8"))["results"]["ifeval_local"]
    (ours,) = read_evaluations(tmp_path)
    assert ours.answered == len(ITEMS)
    assert {name: figure.value for name, figure in ours.figures.items()} == {
        "prompt_strict": theirs["prompt_level_strict_acc,none"],
        "instruction_strict": theirs["inst_level_strict_acc,none"],
        "prompt_loose": theirs["prompt_level_loose_acc,none"],
        "instruction_loose": theirs["inst_level_loose_acc,none"],
    }
    assert ours.figures["prompt_strict"].stderr == pytest.approx(theirs["prompt_level_strict_acc_stderr,none"])
