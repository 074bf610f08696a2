"""`orpo-trl check`: each step finds the faults of its own part, and the next steps go on."""

import json
import re

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from support.recipes import parse_recipe
from support.small import REPOSITORY, make_rows
from transformers import AutoTokenizer

from orpo_trl import ORPOTrainer
from orpo_trl.check.scored_tokens import scores, show_pair
from orpo_trl.cli import main
from orpo_trl.config import ORPOConfig
from orpo_trl.model import build_from_scratch, load_tokenizer
from orpo_trl.pairs.load import load_pairs
from orpo_trl.paths import RECIPES

MODEL = RECIPES / "quickstart" / "model"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def check(*arguments):
    """Exit status, and what each step said: sign and text by title."""
    result = CliRunner().invoke(main, ["check", *map(str, arguments)], catch_exceptions=False)
    found = re.split(r"^\d\. (.*): (✓|✗|skipped)\n", result.stdout, flags=re.MULTILINE)
    steps = {title: (sign, text) for title, sign, text in zip(found[1::3], found[2::3], found[3::3], strict=True)}
    assert len(steps) == 9
    return result.exit_code, steps


def number(pattern, text):
    found = re.search(pattern, text)
    assert found, (pattern, text)
    return found[1]


def test_all_steps_pass_on_the_quickstart():
    status, steps = check("quickstart")
    assert status == 0
    assert {sign for sign, _ in steps.values()} == {"✓"}
    assert "No step needs the network." in steps["Recipe"][1]
    assert "984,192 weights" in steps["Model config and tokenizer"][1]
    assert "521 rows read, 521 kept" in steps["Data"][1]
    assert "67 rows read, 67 kept" in steps["Data"][1]
    assert re.search(r"about [\d.e-]+ seconds an optimiser step, \d+:\d\d:\d\d in all", steps["Time and cost"][1])


def test_steps_and_warm_up_are_those_of_the_run(tmp_path):
    overrides = [
        "--max_length",
        "64",
        "--num_train_epochs",
        "1.4",
        "--warmup_steps",
        "0.1",
        "--gradient_accumulation_steps",
        "3",
    ]
    text = check("quickstart", *overrides)[1]["Optimiser steps and tokens"][1]
    model, data, training = parse_recipe(["quickstart", *overrides, "--output_dir", str(tmp_path)])
    tokenizer = load_tokenizer(model)
    train, _ = load_pairs(data, False)
    training.eval_strategy = "no"
    trainer = ORPOTrainer(
        build_from_scratch(model, tokenizer), training, train_dataset=train, processing_class=tokenizer
    )
    trainer.train()
    warmup = training.get_warmup_steps(trainer.state.max_steps)
    assert f"{trainer.state.max_steps} optimiser steps" in text
    assert f"warm-up {warmup} " in text
    batches = list(trainer.get_train_dataloader())
    branches = sum(batch["num_pairs"] for batch in batches)
    unique = sum(batch["input_ids"].numel() for batch in batches) - branches
    assert f"{unique:,} tokens an epoch" in text


def test_broken_recipe_is_reported_and_the_rest_skipped(tmp_path):
    (tmp_path / "r.yaml").write_text("extends: quickstart.yaml\nlerning_rate: 1\nbeta: true\n")
    status, steps = check(tmp_path / "r.yaml")
    assert status == 1
    assert [sign for sign, _ in steps.values()] == ["✗", *["skipped"] * 8]
    for text in ("r.yaml:2: unknown key `lerning_rate`", "r.yaml:3: `beta`"):
        assert text in steps["Recipe"][1]


def test_model_that_is_not_here_fails_and_says_that_the_network_is_needed():
    status, steps = check("quickstart", "--model_name_or_path", "nobody/nothing")
    assert status == 1
    assert "`model_name_or_path` nobody/nothing" in steps["Recipe"][1].split("Needs the network")[1]
    assert steps["Model config and tokenizer"][0] == "✗"
    assert "nobody/nothing" in steps["Model config and tokenizer"][1]
    assert [steps[title][0] for title in ("Chat template", "Data", "Memory")] == ["skipped"] * 3


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}", "never writes the end-of-sequence"),
        (
            "{% for m in messages %}{{ loop.length }}{{ m.content }}{{ eos_token }}{% endfor %}",
            "system turn rendered otherwise once a response follows",
        ),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{{ eos_token }}{% endfor %}",
            "answer shortened: 'That is 4.'",
        ),
    ],
)
def test_template_that_would_train_something_else_is_reported(tmp_path, template, message):
    (tmp_path / "t.jinja").write_text(template)
    status, steps = check("quickstart", "--chat_template_path", tmp_path / "t.jinja")
    assert status == 1
    assert steps["Chat template"][0] == "✗"
    assert message in steps["Chat template"][1]


CHATML = """{% for m in messages %}<s>{{ m.role }}
{{ m.content }}</s>
{% endfor %}{% if add_generation_prompt %}<s>assistant
{% endif %}"""
CALLING = """{% if tools %}<s>tools
{{ tools | tojson }}</s>
{% endif %}{% for m in messages %}<s>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}</s>
{% endfor %}{% if add_generation_prompt %}<s>assistant
{% endif %}"""
REFUSING = "{% if tools %}{{ raise_exception('No tools.') }}{% endif %}" + CHATML


def check_template(tmp_path, template, row):
    (tmp_path / "t.jinja").write_text(template)
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
    overrides = ["--dataset_name", tmp_path / "rows.jsonl", "--eval_strategy", "no"]
    return check("quickstart", *overrides, "--chat_template_path", tmp_path / "t.jinja")[1]["Chat template"]


TURNS = [{"role": "user", "content": "Add 1 and 1."}]
ROW = {"prompt": TURNS, "chosen": [{"role": "assistant", "content": "2"}],
       "rejected": [{"role": "assistant", "content": "3"}]}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "sum", "description": "Sums.", "parameters": {"type": "object"}}}]
CALLS = [{"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}]
CALLED = [*TURNS, {"role": "assistant", "content": "", "tool_calls": CALLS}, {"role": "tool", "content": "2"}]


@pytest.mark.parametrize("row", [ROW | {"tools": TOOLS}, ROW | {"tools": json.dumps(TOOLS)}, ROW | {"prompt": CALLED}])
def test_template_is_tried_with_a_tool_call_where_rows_have_tools(tmp_path, row):
    sign, text = check_template(tmp_path, CALLING, row)
    assert sign == "✓"
    assert "Adds two numbers." in text
    assert "The sum is 4." in text
    sign, text = check_template(tmp_path, CHATML, row)
    assert sign == "✗"
    assert "tool call lost: 'add'" in text
    assert "tools not rendered: 'Adds two numbers.'" in text
    sign, text = check_template(tmp_path, REFUSING, row | {"tools": TOOLS})
    assert sign == "✓"
    assert "the template refuses a tool call: a row with one is malformed (TemplateError: No tools.)" in text


def test_template_without_tools_is_no_fault_where_no_row_has_them(tmp_path):
    sign, text = check_template(tmp_path, CHATML, ROW)
    assert sign == "✓"
    assert "Adds two numbers." not in text


def test_template_that_loses_the_system_turn_is_reported(tmp_path):
    template = CHATML.replace("in messages %}", "in messages if m.role != 'system' %}")
    sign, text = check_template(tmp_path, template, ROW)
    assert sign == "✗"
    assert "system text lost: 'Count with care.'" in text
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}" + CHATML
    sign, text = check_template(tmp_path, refusing, ROW)
    assert sign == "✓"
    assert "the template refuses a system turn" in text


def test_header_of_an_answer_that_training_leaves_out_is_shown(tmp_path):
    """Some templates open the thoughts where they ask for an answer, and not where one follows."""
    template = CHATML.replace("<s>assistant\n{% endif %}", "<s>assistant\n<think>{% endif %}")
    sign, text = check_template(tmp_path, template, ROW)
    assert sign == "✓"
    assert "the prompt ends with '<think>' only where no answer follows" in text


def test_template_of_another_tokenizer_is_taken_as_in_training():
    _, steps = check("quickstart", "--chat_template_path", MODEL)
    assert steps["Chat template"][0] == "✓"
    status, steps = check("quickstart", "--chat_template_path", "absent.jinja")
    assert (status, steps["Model config and tokenizer"][0]) == (1, "✗")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--max_length", "512"], "`max_length: 512` is more than the model's 256 positions"),
        (["--eos_token", "<nope>"], "`eos_token: <nope>` is not in the tokenizer's vocabulary"),
    ],
)
def test_model_and_settings_that_do_not_fit_are_reported(overrides, message):
    status, steps = check("quickstart", *overrides)
    assert status == 1
    assert message in steps["Model config and tokenizer"][1]


def test_rows_are_prepared_with_their_report(tmp_path):
    rows = [*make_rows(30), {"prompt": "q", "chosen": "a", "rejected": "a"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, steps = check("quickstart", "--dataset_name", path, "--eval_strategy", "no")
    assert "31 rows read, 30 kept" in steps["Data"][1]
    assert "dropped, chosen equals rejected: 1 (row 30)" in steps["Data"][1]
    path.write_text(path.read_text() + json.dumps({"prompt": "q", "rejected": "a"}) + "\n")
    status, steps = check("quickstart", "--dataset_name", path, "--eval_strategy", "no")
    assert status == 1
    assert "row 31: column `chosen`" in steps["Data"][1]
    assert steps["Memory"][0] == "skipped"


def test_data_that_would_not_teach_to_stop_is_reported():
    status, steps = check("quickstart", "--max_length", "20")
    assert status == 1
    assert "521 of 521 chosen responses are cut" in steps["Data"][1]


def test_budget_below_a_pair_is_reported():
    text = check("quickstart", "--max_tokens_per_micro_batch", "10")[1]["Memory"][1]
    assert re.search(r"a pair of \d+ tokens is more than `max_tokens_per_micro_batch: 10`", text)


def test_engine_that_does_not_start_on_a_cpu_is_reported():
    status, steps = check("quickstart", "--engine", "ddp", "--num_processes", "2")
    assert status == 1
    assert "On a CPU, processes start under" in steps["Memory"][1]


def test_colour_is_kept_in_a_pipe_where_it_is_asked_for():
    result = CliRunner().invoke(main, ["check", "quickstart", "--color"])
    assert "\x1b[" in result.output
    assert "\x1b[" not in CliRunner().invoke(main, ["check", "quickstart"]).output


def test_sample_stands_for_all_rows_unless_full(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(500)) * 5)
    arguments = ["quickstart", "--dataset_name", path, "--eval_strategy", "no"]
    sample, full = check(*arguments)[1], check(*arguments, "--full")[1]
    assert "2,000 rows at random out of 2,500" in sample["Data"][1]
    assert "2,500 rows read" in full["Data"][1]
    steps = [number(r"([\d,]+) optimiser steps", found["Optimiser steps and tokens"][1]) for found in (sample, full)]
    assert steps == ["2,355", "2,355"]


def test_warm_up_that_never_ends_is_reported():
    status, steps = check("quickstart", "--max_steps", "10", "--warmup_steps", "10")
    assert status == 1
    assert "leaves no step after the warm-up" in steps["Optimiser steps and tokens"][1]
    assert "10 optimiser steps" in steps["Optimiser steps and tokens"][1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [(["--lr_scheduler_kwargs.nonsense", "3"], "nonsense"),
     (["--dataloader_drop_last", "--per_device_train_batch_size", "600"], "leaves no step")],
)  # fmt: skip
def test_schedule_that_would_fail_in_the_run_is_reported(overrides, message):
    status, steps = check("quickstart", *overrides)
    assert status == 1
    assert message in steps["Optimiser steps and tokens"][1]


def test_stream_has_no_epochs():
    _, steps = check("quickstart", "--dataset_streaming", "--eval_strategy", "no", "--max_steps", "30")
    assert "30 optimiser steps, of a stream" in steps["Optimiser steps and tokens"][1]
    assert "epoch" not in steps["Optimiser steps and tokens"][1]


@pytest.mark.parametrize(
    ("arguments", "engine"),
    [
        ([], "single, processes 1"), (["--num_processes", "2"], "ddp, processes 2"),
        (["--num_processes", "2", "--deepspeed", "zero2"], "zero2, processes 2"),
        (["--num_processes", "2", "--deepspeed", "recipes/deepspeed/zero3.json"], "zero3, processes 2"),
        (["--num_processes", "2", "--fsdp", "full_shard"], "fsdp2, processes 2"),
        (["--engine", "zero3"], "zero3, processes 1"),
        (["--engine", "zero2", "--num_processes", "2", "--deepspeed", "zero3"], "zero2, processes 2"),
    ],
)  # fmt: skip
def test_memory_is_estimated_for_the_strategy_of_the_launch(arguments, engine):
    steps = check("quickstart", *arguments, "--gpu_memory", "24")[1]
    assert f"strategy {engine};" in steps["Memory"][1]


def test_memory_step_is_skipped_for_an_unknown_optimizer():
    steps = check("quickstart", "--optim", "rmsprop_bnb_32bit", "--gpu_memory", "24")[1]
    assert steps["Memory"][0] == "✓"
    steps = check("quickstart", "--optim", "lomo", "--gpu_memory", "24")[1]
    assert steps["Memory"] == ("skipped", steps["Memory"][1])
    assert "`optim: lomo` is not known" in steps["Memory"][1]


def test_memory_is_compared_with_the_gpu():
    status, steps = check("quickstart", "--gpu_memory", "0.5")
    assert status == 1
    assert "more than the 0.5 GiB of --gpu_memory" in steps["Memory"][1]
    assert "weights" in steps["Memory"][1]
    assert check("quickstart", "--gpu", "h100")[1]["Memory"][0] == "✓"


def test_a_faster_setting_that_fits_is_proposed():
    checkpointing = ("quickstart", "--gradient_checkpointing", "true")
    text = check(*checkpointing, "--gpu", "h100")[1]["Memory"][1]
    assert "Faster, and it fits too: --gradient_checkpointing false takes" in text
    # The layers' forward pass of three passes, in a model that is nearly all LM head and embeddings.
    assert 0 < int(number(r"(\d+)% fewer operations", text)) <= 25
    needs = float(number(r"at the peak +([\d.]+) GiB", text))
    assert "Faster" not in check(*checkpointing, "--gpu_memory", needs * 1.02)[1]["Memory"][1]
    assert "Faster" not in check("quickstart", "--gpu", "h100")[1]["Memory"][1]  # it has no checkpointing


def test_cost_follows_from_time_gpus_and_price():
    assert check("quickstart", "--gpu", "h100")[1]["Time and cost"][0] == "skipped"  # in 32 bits
    steps = check(
        "quickstart", "--bf16", "--gpu", "h100", "--price", "1e9", "--num_processes", "2", "--utilisation", "0.5"
    )[1]
    text = steps["Time and cost"][1]
    operations = float(number(r"([\d.e-]+) TFLOP a pair", text)) * 1e12
    steps_of_run = int(number(r"([\d,]+) optimiser steps", steps["Optimiser steps and tokens"][1]))
    hours = operations * steps_of_run * 32 / (2 * 0.5 * 989e12) / 3600
    assert float(number(r"(\d+) USD", text)) == pytest.approx(hours * 2 * 1e9, rel=0.01)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [(["--attn_implementation", "flash_attention_2"], "pip install flash-attn"),
     (["--optim", "adamw_torch_8bit"], "pip install torchao"),
     (["--optim", "galore_adamw"], "pip install galore-torch"),
     (["--use_liger_kernel"], "pip install liger-kernel"),
     (["--report_to", "comet_ml"], "comet_ml")],
)  # fmt: skip
def test_missing_packages_are_reported_with_the_way_to_install_them(overrides, message):
    status, steps = check("quickstart", *overrides)
    assert status == 1
    assert message in steps["Installed"][1]


def test_wandb_without_a_login_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert "wandb login" in check("quickstart", "--report_to", "wandb")[1]["Installed"][1]
    assert check("quickstart", "--report_to", "wandb", "--wandb_mode", "offline")[1]["Installed"][0] == "✓"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert check("quickstart", "--report_to", "wandb")[1]["Installed"][0] == "✓"


lengths = st.integers(1, 9)


@given(lengths, lengths, lengths, st.sampled_from(["sequence", "completion"]))
def test_each_token_is_scored_by_the_terms_that_the_paper_says(prompt, chosen, rejected, scope):
    pair = {"prompt_ids": [1] * prompt, "chosen_ids": [2] * chosen, "rejected_ids": [3] * rejected}
    training = ORPOConfig("out", nll_scope=scope, report_to="none")
    in_prompt = scope == "sequence"
    # Nothing predicts the first token of a row.
    expected = [(1, False, False), *[(1, in_prompt, False)] * (prompt - 1), *[(2, True, True)] * chosen]
    assert scores(pair, training) == [expected, [(1, False, False)] * prompt + [(3, False, True)] * rejected]


def test_pair_is_shown_whole_in_colour_and_as_plain_text():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    pair = {
        side: tokenizer(text)["input_ids"]
        for side, text in (
            ("prompt_ids", "What does an owl eat?\n"),
            ("chosen_ids", "mice " * 60),
            ("rejected_ids", "No."),
        )
    }
    training = ORPOConfig("out", report_to="none")
    plain = show_pair(pair, training, tokenizer, color=False)
    coloured = show_pair(pair, training, tokenizer, color=True)
    assert not any("\x1b" in line for line in plain)
    assert re.sub(r"\x1b\[\d+m", "", "\n".join(coloured)) == "\n".join(plain)
    assert sum("\x1b" in line for line in coloured) > 3
    shown = "".join(
        line[25:].replace("·", "") for line in plain[1 : next(i for i, x in enumerate(plain) if x[:8] == "rejected")]
    )
    text = "".join(tokenizer.convert_ids_to_tokens(pair["prompt_ids"] + pair["chosen_ids"]))
    assert shown == text.replace("\n", "⏎").replace("Ġ", "▁").replace("Ċ", "⏎")
    assert all(len(line) <= 25 + 100 for line in plain)
