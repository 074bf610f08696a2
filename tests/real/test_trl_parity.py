"""Compared with TRL's trainer, on real UltraFeedback rows, with the real Mistral tokenizer and a small Mistral."""

import copy

import pytest
import torch
from datasets import load_dataset
from support.small import settings, tiny_model
from trl.experimental.orpo import ORPOConfig as TRLConfig
from trl.experimental.orpo import ORPOTrainer as TRLTrainer

from orpo_trl import ORPOTrainer

STEPS = 3
# `logits/chosen` and `logits/rejected` are means over logits that ORPOTrainer never builds.
SHARED = {
    "loss", "grad_norm", "nll_loss", "log_odds_ratio", "log_odds_chosen", "logps/chosen", "logps/rejected",
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
}  # fmt: skip


class Gradients:
    """Keeps the gradient of each optimiser step."""

    def __init__(self, trainer):
        self.steps = []
        step = trainer.create_optimizer

        def create_optimizer(*args, **kwargs):
            optimizer = step(*args, **kwargs)
            optimizer.register_step_pre_hook(self.keep)
            return optimizer

        trainer.create_optimizer = create_optimizer

    def keep(self, optimizer, *_):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.steps.append([parameter.grad.clone() for parameter in parameters])


@pytest.fixture(scope="module")
def rows(data):
    """UltraFeedback rows that TRL can train on, and whose tokens merge nowhere across the end of the prompt."""
    return load_dataset("json", data_files=str(data / "ultrafeedback" / "train.jsonl"), split="train[:40]")


def clean(rows, tokenizer, max_length, count):
    """TRL scores one token more or less where a response merges with its prompt, and breaks on long prompts."""

    def fits(row):
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        whole = [
            tokenizer(row["prompt"] + row[side], add_special_tokens=False)["input_ids"]
            for side in ("chosen", "rejected")
        ]
        return len(prompt) < max_length - 8 and all(ids[: len(prompt)] == prompt for ids in whole)

    kept = rows.select_columns(["prompt", "chosen", "rejected"]).filter(fits)
    assert len(kept) >= count
    return kept.select(range(count))


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 2)])
def test_loss_metrics_and_gradients_equal_trl(rows, mistral_tokenizer, tmp_path, batch_size, accumulation):
    mistral_tokenizer.pad_token = mistral_tokenizer.eos_token
    dataset = clean(rows, mistral_tokenizer, 256, 4 * STEPS)
    model = tiny_model(32000, hidden_size=64)
    options = {
        "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation, "max_steps": STEPS,
        "max_length": 256, "train_sampling_strategy": "sequential", "learning_rate": 1e-3, "max_grad_norm": 0.0,
        "eval_strategy": "steps", "eval_steps": STEPS, "beta": 0.25,
    }  # fmt: skip
    own_args = settings(tmp_path, nll_reduction="micro_batch_mean", **options)
    own = ORPOTrainer(
        copy.deepcopy(model), own_args, train_dataset=dataset, eval_dataset=dataset, processing_class=mistral_tokenizer
    )
    names = {name: getattr(own_args, name) for name in options} | {
        "use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "logging_steps": 1,
        "per_device_eval_batch_size": 4, "lr_scheduler_type": "constant", "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    trl = TRLTrainer(
        copy.deepcopy(model), TRLConfig(str(tmp_path), **names), train_dataset=dataset, eval_dataset=dataset,
        processing_class=mistral_tokenizer,
    )  # fmt: skip
    own_gradients, trl_gradients = Gradients(own), Gradients(trl)
    own.train()
    trl.train()

    own_logs = [entry for entry in own.state.log_history if "loss" in entry]
    trl_logs = [entry for entry in trl.state.log_history if "loss" in entry]
    assert len(own_logs) == len(trl_logs) == STEPS
    for entry, other in zip(own_logs, trl_logs, strict=True):
        for name in SHARED:
            assert entry[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), name
    for mine, theirs in zip(own_gradients.steps, trl_gradients.steps, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm()
    own_eval = next(entry for entry in own.state.log_history if "eval_loss" in entry)
    trl_eval = next(entry for entry in trl.state.log_history if "eval_loss" in entry)
    for name in SHARED - {"grad_norm"}:
        assert own_eval[f"eval_{name}"] == pytest.approx(trl_eval[f"eval_{name}"], rel=1e-5, abs=1e-5), name


@pytest.mark.slow
def test_a_prompt_that_fills_max_length_breaks_trl_and_not_us(rows, mistral_tokenizer, tmp_path):
    """Known failure 1, on both sides: UltraFeedback's row 28 has a prompt of more than 512 tokens."""
    mistral_tokenizer.pad_token = mistral_tokenizer.eos_token
    dataset = rows.select_columns(["prompt", "chosen", "rejected"]).select([26, 27, 28, 29])
    options = {"max_length": 512, "max_steps": 1, "train_sampling_strategy": "sequential"}
    own = ORPOTrainer(
        tiny_model(32000), settings(tmp_path, **options), train_dataset=dataset, processing_class=mistral_tokenizer
    )
    own.train()
    assert own.preparation_reports["train"].sources["train"].dropped == {"prompt fills max_length": 1}
    assert all(parameter.isfinite().all() for parameter in own.model.parameters())
    trl = TRLTrainer(
        tiny_model(32000),
        TRLConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
            per_device_train_batch_size=4, disable_tqdm=True, **options,
        ),
        train_dataset=dataset, processing_class=mistral_tokenizer,
    )  # fmt: skip
    trl.train()
    assert any(parameter.isnan().any() for parameter in trl.model.parameters())


def test_tokens_equal_trl(rows, mistral_tokenizer, tmp_path):
    mistral_tokenizer.pad_token = mistral_tokenizer.eos_token
    dataset = clean(rows, mistral_tokenizer, 512, 20)
    args = {"max_length": 512}
    own = ORPOTrainer(
        tiny_model(32000), settings(tmp_path, **args), train_dataset=dataset, processing_class=mistral_tokenizer
    )
    trl = TRLTrainer(
        tiny_model(32000), TRLConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **args),
        train_dataset=dataset, processing_class=mistral_tokenizer,
    )  # fmt: skip
    for mine, theirs in zip(own.train_dataset, trl.train_dataset, strict=True):
        assert mine["prompt_ids"] + mine["chosen_ids"] == theirs["chosen_input_ids"]
        assert mine["prompt_ids"] + mine["rejected_ids"] == theirs["rejected_input_ids"]


def test_loss_is_finite_where_the_model_is_certain(mistral_tokenizer, tmp_path):
    """A model that gives each next token probability 1: log p = 0, where TRL's loss is NaN (known failure 3)."""
    model = tiny_model(32000, tie_word_embeddings=False)
    model.lm_head.weight.data.zero_()
    model.lm_head = torch.nn.Linear(32, 32000, bias=True)
    model.lm_head.weight.data.zero_()
    model.lm_head.bias.data.zero_()
    text = "moo moo moo moo"
    (moo,) = set(mistral_tokenizer(text, add_special_tokens=False)["input_ids"][-1:])
    model.lm_head.bias.data[moo] = 200.0
    dataset = [{"prompt_ids": [1, moo], "chosen_ids": [moo, moo], "rejected_ids": [moo, moo, moo]}] * 4
    from datasets import Dataset

    trainer = ORPOTrainer(
        model, settings(tmp_path, max_steps=1), train_dataset=Dataset.from_list(dataset),
        processing_class=mistral_tokenizer,
    )  # fmt: skip
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["logps/chosen"] == 0.0
    assert torch.tensor(entry["grad_norm"]).isfinite()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
