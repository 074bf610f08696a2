"""`model_init` and searches: each model that is made is trained as the same model would be that is passed."""

import copy
import json
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.optuna_stand_in import stand_in
from support.small import make_dataset, settings, tiny_model
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from orpo_trl import ORPOTrainer


def tiny() -> PreTrainedModel:
    return tiny_model()


def tiny_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=768, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, router_aux_loss_coef=0.5, output_router_logits=True,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def make_trainer(tokenizer, tmp_path, model=None, model_init=None, peft_config=None, **options) -> ORPOTrainer:
    dataset = make_dataset(8)
    return ORPOTrainer(
        model, settings(tmp_path, **options), train_dataset=dataset, eval_dataset=dataset,
        processing_class=copy.deepcopy(tokenizer), model_init=model_init, peft_config=peft_config,
    )  # fmt: skip


def outcome(trainer: ORPOTrainer) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Metrics of each step, and the weights."""
    names = ("loss", "grad_norm", "logps/chosen", "rewards/margins", "num_tokens")
    logs = [{name: log[name] for name in names} for log in trainer.state.log_history if "loss" in log]
    return logs, trainer.model.state_dict()


def assert_same(trainer: ORPOTrainer, other: ORPOTrainer) -> None:
    (logs, weights), (other_logs, other_weights) = outcome(trainer), outcome(other)
    assert logs
    assert logs == other_logs
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, other_weights[name]), name


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("make", "peft_config", "options"),
    [
        (tiny, None, {}),
        (tiny, lora, {"gradient_checkpointing": True}),
        (lambda: tiny_model(attention_dropout=0.5), None, {"pair_layout": "padded", "eos_token": "<|system|>"}),
        (tiny_mixtral, None, {"max_tokens_per_micro_batch": 200}),
    ],
    ids=["plain", "adapter", "dropout", "experts"],
)
def test_each_run_trains_as_with_the_model_itself(make, peft_config, options, tokenizer, tmp_path):
    """`train` makes the model anew, and once trained it without the fused head."""
    adapter = peft_config or (lambda: None)
    plain = make_trainer(tokenizer, tmp_path, make(), peft_config=adapter(), **options)
    plain.train()
    trainer = make_trainer(tokenizer, tmp_path, model_init=make, peft_config=adapter(), **options)
    for _ in range(2):
        first = trainer.model
        trainer.train()
        assert trainer.model is not first
        assert_same(trainer, plain)
        assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert trainer.layout == plain.layout
    assert trainer.model.config.to_dict() == plain.model.config.to_dict()
    assert trainer.model.generation_config.to_dict() == plain.model.generation_config.to_dict()


def test_tokens_of_another_template_are_added_to_each_model(tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<extra>", "<more>"])
    other.save_pretrained(tmp_path / "other")
    options: dict[str, Any] = {"chat_template_path": str(tmp_path / "other")}
    plain = make_trainer(tokenizer, tmp_path / "run", tiny_model(), **options)
    plain.train()
    trainer = make_trainer(tokenizer, tmp_path / "run", model_init=tiny, **options)
    trainer.train()
    assert trainer.model.config.vocab_size == len(trainer.processing_class) == 704
    assert_same(trainer, plain)


def test_a_run_replaces_the_files_of_the_one_before(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, model_init=tiny)
    trainer.train()
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]


def test_one_of_model_and_model_init_is_needed(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="either `model` or `model_init`, not both"):
        make_trainer(tokenizer, tmp_path, tiny_model(), model_init=tiny)
    with pytest.raises(ValueError, match=r"either `model` or `model_init`\."):
        make_trainer(tokenizer, tmp_path)
    with pytest.raises(TypeError, match="what `model_init` returns, must be a model of transformers, got 'org/model'"):
        make_trainer(tokenizer, tmp_path, model_init=lambda: "org/model")
    optimizer = torch.optim.SGD(tiny_model().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="`optimizers` would hold the weights of one model"):
        ORPOTrainer(
            args=settings(tmp_path), train_dataset=make_dataset(4), processing_class=tokenizer, model_init=tiny,
            optimizers=(optimizer, None),
        )  # fmt: skip


def test_later_models_are_checked_as_the_first(tokenizer, tmp_path):
    models = [tiny_model(), tiny_model().requires_grad_(False)]
    trainer = make_trainer(tokenizer, tmp_path, model_init=lambda: models.pop(0))
    with pytest.raises(ValueError, match="Every weight of `model` is frozen"):
        trainer.train()


# ---- Search ----------------------------------------------------------------------------------------------------------


def space(*names: str):
    return lambda trial: {name: trial.suggest_float(name, 0.0, 1.0) for name in names}


def test_each_trial_starts_from_new_weights_with_its_settings(tokenizer, tmp_path, monkeypatch):
    values = [{"learning_rate": 0.0, "beta": 0.1}, {"learning_rate": 0.05, "beta": 1.0}]
    study = stand_in(monkeypatch, values)
    ended = []

    class Watched(ORPOTrainer):
        def evaluate(self, *args, **kwargs):
            ended.append(outcome(self))
            return super().evaluate(*args, **kwargs)

    dataset = make_dataset(8)
    trainer = Watched(
        args=settings(tmp_path), train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer,
        model_init=lambda trial: tiny_model(),
    )  # fmt: skip
    best = trainer.hyperparameter_search(space("learning_rate", "beta"), n_trials=2)
    for number, (chosen, (logs, weights)) in enumerate(zip(values, ended, strict=True)):
        plain = make_trainer(tokenizer, tmp_path / "plain", tiny_model(), **chosen)
        plain.train()
        expected_logs, expected_weights = outcome(plain)
        assert logs == expected_logs
        for name, weight in weights.items():
            assert torch.equal(weight, expected_weights[name]), name
        assert study.results[number] == plain.evaluate()["eval_loss"]
        folder = tmp_path / f"run-{number}"
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2]
        assert lines[-1]["eval_loss"] == study.results[number]
        assert json.loads((folder / "run.json").read_text())["beta"] == chosen["beta"]
        assert f"beta: {chosen['beta']}" in (folder / "recipe.yaml").read_text() or chosen["beta"] == 0.1
    assert isinstance(best.run_id, str)
    assert best.objective == min(study.results)


def test_a_trial_is_reported_as_it_is_evaluated(tokenizer, tmp_path, monkeypatch):
    study = stand_in(monkeypatch, [{"learning_rate": 0.01}])
    trainer = make_trainer(tokenizer, tmp_path, model_init=tiny, eval_strategy="steps", eval_steps=1)
    trainer.hyperparameter_search(space("learning_rate"), n_trials=1)
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert study.trials[0].reported == [(1, losses[0]), (2, losses[1])]


def test_what_a_search_cannot_change_is_refused(tokenizer, tmp_path, monkeypatch):
    stand_in(monkeypatch, [{"learning_rate": 0.01}])
    trainer = make_trainer(tokenizer, tmp_path, model_init=tiny)
    with pytest.raises(ValueError, match="A search cannot change `max_length`, which the trainer has read"):
        trainer.hyperparameter_search(lambda trial: {"max_length": 64}, n_trials=1)


def test_several_evaluation_sets_need_an_objective():
    from orpo_trl.trainer_checks import evaluation_loss

    with pytest.raises(ValueError, match=r"`compute_objective` is needed.*eval_one_loss, eval_two_loss"):
        evaluation_loss({"eval_one_loss": 1.0, "eval_two_loss": 2.0, "eval_one_runtime": 3.0})


def test_a_search_without_model_init_is_refused(tokenizer, tmp_path, monkeypatch):
    stand_in(monkeypatch, [])
    with pytest.raises(RuntimeError, match="model_init"):
        make_trainer(tokenizer, tmp_path, tiny_model()).hyperparameter_search(space("beta"))


def test_trial_that_is_not_finite_has_no_result_and_the_search_goes_on(tokenizer, tmp_path, monkeypatch):
    study = stand_in(monkeypatch, [{"learning_rate": 0.01}, {"learning_rate": 1.0}, {"learning_rate": 0.02}])
    rates = lambda trial: {"learning_rate": 1e5 if trial.suggest_float("learning_rate", 0.0, 1.0) == 1 else 0.01}  # noqa: E731
    trainer = make_trainer(tokenizer, tmp_path, model_init=tiny, max_steps=6)
    trainer.hyperparameter_search(rates, n_trials=3)
    assert [math.isnan(result) for result in study.results] == [False, True, False]
