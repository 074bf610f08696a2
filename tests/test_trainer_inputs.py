"""What users bring to the trainer from elsewhere: models, subclasses, arguments and rows."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from support.reference import step_metrics
from support.small import make_dataset, make_rows, settings, tiny_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralForSequenceClassification,
    MistralModel,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)
from trl import DPOConfig, SFTConfig
from trl.experimental.orpo import ORPOConfig as TRLConfig
from trl.experimental.orpo import ORPOTrainer as TRLTrainer

from orpo_trl import ORPOConfig, ORPOTrainer
from orpo_trl.config import SettingsError
from orpo_trl.trainer_checks import TRL_HOOKS

LORA = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")


def make_trainer(model, tokenizer, tmp_path, cls=ORPOTrainer, **options) -> ORPOTrainer:
    given = {name: options.pop(name) for name in ("args", "train_dataset", "eval_dataset") if name in options}
    given = {"args": settings(tmp_path, **options), "train_dataset": make_dataset(4)} | given
    return cls(model, processing_class=tokenizer, **given)


# ---- Models ----------------------------------------------------------------------------------------------------------


def adapter_for_use(tmp_path) -> PeftModel:
    get_peft_model(tiny_model(), LORA).save_pretrained(tmp_path / "adapter")
    return PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")


def test_a_model_of_which_nothing_is_trained_is_refused(tokenizer, tmp_path):
    """With gradient checkpointing such a run goes on to its end and trains nothing (known failure 37)."""
    options: Any = {"gradient_checkpointing": True}
    with pytest.raises(ValueError, match="`is_trainable=True`"):
        make_trainer(adapter_for_use(tmp_path), tokenizer, tmp_path, **options)
    with pytest.raises(ValueError, match=r"`requires_grad_\(True\)`"):
        make_trainer(tiny_model().requires_grad_(False), tokenizer, tmp_path, **options)
    asleep = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", inference_mode=True)
    with pytest.raises(ValueError, match="`inference_mode=False`"):
        ORPOTrainer(
            tiny_model(), settings(tmp_path, **options), train_dataset=make_dataset(4), processing_class=tokenizer,
            peft_config=asleep,
        )  # fmt: skip


def test_a_model_with_virtual_tokens_is_refused(tokenizer, tmp_path):
    """Packed rows do not see the prefix as padded ones do: 10.896 against 10.904."""
    model = get_peft_model(tiny_model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="`model`: PrefixTuningConfig puts virtual tokens"):
        make_trainer(model, tokenizer, tmp_path)


def adapter_of_tokens(tokens: Any, **options) -> LoraConfig:
    return LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False, trainable_token_indices=tokens,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_adapter_that_trains_some_tokens_is_as_its_own_forward_pass(module, tied, layout, tokenizer, tmp_path):
    """TRL's fused head asks peft's wrapper of a tied head for a bias, and stopped in the first step."""
    tokens = [tokenizer.eos_token_id, *tokenizer(" people day")["input_ids"]]
    trainer = ORPOTrainer(
        tiny_model(tie_word_embeddings=tied), settings(tmp_path, pair_layout=layout), train_dataset=make_dataset(4),
        processing_class=tokenizer, peft_config=adapter_of_tokens({module: tokens}),
    )  # fmt: skip
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    (rows,) = [weight for name, weight in trained.items() if "trainable_tokens_delta" in name]
    rows.data.add_(torch.randn_like(rows))  # apart from the base model's rows
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    gradients = torch.autograd.grad(loss, list(trained.values()))
    expected = step_metrics(trainer.model, [list(trainer.train_dataset)], 0.1, "sequence", "token_mean", 1024)["loss"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, list(trained.values())), strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(tiny_model(tie_word_embeddings=tied), tmp_path)
    ids = torch.tensor([[5, *tokens, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_a_tied_head_that_is_trained_twice_is_refused(tokenizer, tmp_path):
    """peft's own forward pass fails; SFTTrainer asks for it where a tokenizer as template adds tokens."""
    tied, twice = tiny_model(tie_word_embeddings=True), adapter_of_tokens([5], modules_to_save=["lm_head"])
    message = "`trainable_token_indices` with `modules_to_save` of the LM head"
    with pytest.raises(ValueError, match=message):
        make_trainer(get_peft_model(tied, twice), tokenizer, tmp_path)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<extra>"])
    other.save_pretrained(tmp_path / "other")
    for is_tied, outcome in ((True, pytest.raises(ValueError, match=message)), (False, nullcontext())):
        with outcome:
            trainer = ORPOTrainer(
                tiny_model(tie_word_embeddings=is_tied), settings(tmp_path, chat_template_path=str(tmp_path / "other")),
                train_dataset=make_dataset(8), processing_class=copy.deepcopy(tokenizer),
                peft_config=copy.deepcopy(LORA),
            )  # fmt: skip
            trainer.train()
            assert trainer.state.global_step == 2


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_a_head_with_a_bias_of_which_an_adapter_trains_some_tokens_is_refused(layout, tokenizer, tmp_path):
    """peft's wrapper of the head has the weight alone: the loss would be that of a model without the bias."""
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=True)
    with pytest.raises(ValueError, match="`trainable_token_indices`: the LM head has a bias"):
        ORPOTrainer(
            model, settings(tmp_path, pair_layout=layout), train_dataset=make_dataset(4), processing_class=tokenizer,
            peft_config=adapter_of_tokens({"lm_head": [5]}),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            T5ForConditionalGeneration(T5Config(vocab_size=768, d_model=8, d_ff=8, num_layers=1)),
            "encoder-decoder",
        ),
        (MistralModel(tiny_model().config), "MistralModel, which has no language-model head"),
        (MistralForSequenceClassification(tiny_model().config), "Classification, which has no language-model head"),
    ],
    ids=["encoder-decoder", "no-head", "classifier"],
)
def test_models_that_are_no_causal_language_models_are_refused(model, message, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(model, tokenizer, tmp_path)


def test_an_encoder_decoder_is_refused_by_name_before_its_weights_are_loaded(tokenizer, tmp_path):
    T5Config(vocab_size=768).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="encoder-decoder"):
        make_trainer(str(tmp_path / "t5"), tokenizer, tmp_path)


def test_an_adapter_folder_as_model_says_how_to_load_it(tokenizer, tmp_path):
    adapter_for_use(tmp_path)
    with pytest.raises(ValueError, match=r"AutoPeftModel.*'.*adapter', is_trainable=True\)"):
        make_trainer(str(tmp_path / "adapter"), tokenizer, tmp_path)


@pytest.mark.parametrize("is_stream", [False, True])
def test_rows_beyond_the_positions_of_a_model(is_stream, tokenizer, tmp_path, caplog):
    """A table of learned positions ends in an IndexError in the middle of the run; rotary positions go on."""
    rows: dict[str, Any] = {"train_dataset": make_dataset(4).to_iterable_dataset()} if is_stream else {}
    learned = GPT2LMHeadModel(GPT2Config(vocab_size=768, n_embd=8, n_layer=1, n_head=2, n_positions=32))
    with pytest.raises(ValueError, match=r"the model has 32 positions\. Set `max_length: 32`"):
        make_trainer(learned, tokenizer, tmp_path, max_length=None, **rows)
    make_trainer(learned, tokenizer, tmp_path, max_length=32, **rows).train()
    assert not any("positions" in message for message in caplog.messages)
    make_trainer(tiny_model(max_position_embeddings=32), tokenizer, tmp_path, **rows).train()
    assert any("the model has 32 positions" in message for message in caplog.messages)


# ---- Subclasses ------------------------------------------------------------------------------------------------------


def test_hooks_of_another_trainer_are_refused_by_name(tokenizer, tmp_path):
    class Ported(ORPOTrainer):
        def odds_ratio_loss(self, *_):
            raise AssertionError("it was never called")

        def tokenize_row(self, *_):
            raise AssertionError("it was never called")

    with pytest.raises(TypeError, match="Ported") as refusal:
        make_trainer(tiny_model(), tokenizer, tmp_path, cls=Ported)
    assert "`odds_ratio_loss`: override `compute_loss`" in str(refusal.value)
    assert "`tokenize_row`: override `prepare_dataset`" in str(refusal.value)


def test_every_hook_that_is_refused_is_one_of_that_trainer():
    for name in TRL_HOOKS:
        assert callable(getattr(TRLTrainer, name))
        assert not hasattr(ORPOTrainer, name)


def test_hooks_of_this_trainer_are_not_refused(tokenizer, tmp_path):
    class Own(ORPOTrainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    assert make_trainer(tiny_model(), tokenizer, tmp_path, cls=Own).train().training_loss > 0


# ---- Arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TRLConfig, SFTConfig, TrainingArguments])
def test_args_of_other_trainers_keep_their_values(kind, tokenizer, tmp_path):
    args = kind(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1, hub_token="secret", seed=7)
    trainer = make_trainer(tiny_model(), tokenizer, tmp_path, args=args)
    assert type(trainer.args) is ORPOConfig
    kept = ("learning_rate", "bf16", "gradient_checkpointing", "logging_steps", "seed", "hub_token", "report_to")
    assert {name: getattr(trainer.args, name) for name in kept} == {name: getattr(args, name) for name in kept}
    assert trainer.train().global_step == 1


def test_tokens_of_other_args_are_not_hidden():
    args = ORPOConfig.of(SFTConfig("unused", use_cpu=True, eos_token="</s>", max_length=77))
    assert (args.eos_token, args.max_length) == ("</s>", 77)


def test_a_set_value_of_other_args_is_refused_as_ours_is():
    with pytest.raises(SettingsError, match="`packing` has no meaning"):
        ORPOConfig.of(SFTConfig("unused", use_cpu=True, packing=True))
    with pytest.raises(SettingsError, match="`label_smoothing_factor` has no meaning"):
        ORPOConfig.of(TrainingArguments("unused", use_cpu=True, label_smoothing_factor=0.1))


def test_args_of_another_kind_are_refused(tokenizer, tmp_path):
    with pytest.raises(TypeError, match="ORPOConfig, got DPOConfig, which has fields of its own"):
        make_trainer(tiny_model(), tokenizer, tmp_path, args=DPOConfig(str(tmp_path), use_cpu=True))
    with pytest.raises(TypeError, match="ORPOConfig, got dict"):
        make_trainer(tiny_model(), tokenizer, tmp_path, args={"beta": 0.1})


# ---- Rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "name"), [("train_dataset", "train"), ("eval_dataset", "eval")])
def test_a_list_of_rows_is_refused_with_what_to_pass(option, name, tokenizer, tmp_path):
    message = rf"The {name} dataset is a list of rows; pass `Dataset.from_list\(rows\)`"
    given: dict[str, Any] = {option: make_rows(4)}
    with pytest.raises(TypeError, match=message):
        make_trainer(tiny_model(), tokenizer, tmp_path, **given)
    if option == "eval_dataset":
        with pytest.raises(TypeError, match="The polite dataset is a list"):
            make_trainer(tiny_model(), tokenizer, tmp_path, eval_dataset={"polite": make_rows(4)})
        with pytest.raises(TypeError, match=message):
            make_trainer(tiny_model(), tokenizer, tmp_path).evaluate(make_rows(4))


def test_a_dict_of_splits_as_train_set_names_them(tokenizer, tmp_path):
    splits = DatasetDict({"train": make_dataset(4), "test": make_dataset(4)})
    with pytest.raises(TypeError, match=r"got DatasetDict\. Pass one of its splits: train, test"):
        make_trainer(tiny_model(), tokenizer, tmp_path, train_dataset=splits)


def with_media(rows: list[dict], values: dict[str, list]) -> Dataset:
    return Dataset.from_list(
        [{**row, **{name: these[i] for name, these in values.items()}} for i, row in enumerate(rows)]
    )


@pytest.mark.parametrize("is_stream", [False, True])
def test_columns_of_media_without_content_are_no_media(is_stream, tokenizer, tmp_path):
    """SFTTrainer takes a set whose first row has a key `image` for one of a vision model."""
    rows = with_media(make_rows(4), {"image": [None] * 4, "images": [[], None, [], None], "audio": [None] * 4})
    rows = rows.to_iterable_dataset() if is_stream else rows
    trainer = make_trainer(tiny_model(), tokenizer, tmp_path, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    plain = make_trainer(tiny_model(), tokenizer, tmp_path, train_sampling_strategy="sequential")
    plain.train()
    if is_stream:
        assert trainer.state.log_history[0]["loss"] == pytest.approx(plain.state.log_history[0]["loss"])
    expected = plain.evaluate(make_dataset(4))["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected)
    assert (trainer.predict(rows).metrics or {})["test_loss"] == pytest.approx(expected)


@pytest.mark.parametrize("is_stream", [False, True])
def test_media_with_content_are_refused_by_row(is_stream, tokenizer, tmp_path):
    rows = with_media(make_rows(4), {"image": [None, None, "cow.png", None]})
    given = rows.to_iterable_dataset() if is_stream else rows
    named = "row 2: column `image`: expected no content"
    with pytest.raises(ValueError, match=f"train, {named}"):
        make_trainer(tiny_model(), tokenizer, tmp_path, train_dataset=given).train()
    trainer = make_trainer(tiny_model(), tokenizer, tmp_path)
    for evaluate in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match=named):
            evaluate(given)
    dropping = make_trainer(tiny_model(), tokenizer, tmp_path, train_dataset=rows, on_malformed="drop")
    assert dropping.preparation_reports["train"].sources["train"].dropped_rows == {"malformed": [2]}


def test_media_in_the_first_row_are_refused_before_the_weights_are_loaded(tokenizer, tmp_path):
    rows = with_media(make_rows(2), {"images": [["cow.png"], None]})
    with pytest.raises(ValueError, match="The train dataset, row 0: column `images`"):
        make_trainer("no/such/model", tokenizer, tmp_path, train_dataset=rows)


def test_rows_beyond_the_positions_are_looked_for_in_every_set(tokenizer, tmp_path):
    """`evaluate` and `predict` on longer rows than those of training ended in an IndexError."""
    learned = GPT2LMHeadModel(GPT2Config(vocab_size=768, n_embd=8, n_layer=1, n_head=2, n_positions=32))
    short = Dataset.from_list([{"prompt": "a cow:", "chosen": " moo", "rejected": " oink"}] * 4)
    trainer = make_trainer(learned, tokenizer, tmp_path, train_dataset=short, max_length=None)
    calls = (
        (lambda: trainer.evaluate(make_dataset(4)), "eval"),
        (lambda: trainer.evaluate({"long": make_dataset(4)}), "long"),
        (lambda: trainer.predict(make_dataset(4)), "test"),
    )
    for call, name in calls:
        with pytest.raises(ValueError, match=f"longest row of the {name} dataset .* the model has 32 positions"):
            call()
    with pytest.raises(ValueError, match="`max_length: None` lets rows of a stream be longer"):
        trainer.evaluate(make_dataset(4).to_iterable_dataset())
    assert trainer.evaluate(short)["eval_loss"] > 0


def test_predict_takes_the_rows_that_evaluate_takes(tokenizer, tmp_path):
    trainer = make_trainer(tiny_model(), tokenizer, tmp_path)
    evaluated = trainer.evaluate(make_dataset(5))
    given: list[Any] = [make_dataset(5), make_dataset(5).to_iterable_dataset()]
    for rows in given:
        metrics = trainer.predict(rows).metrics or {}
        for name in ("loss", "nll_loss", "rewards/accuracies"):
            assert metrics[f"test_{name}"] == pytest.approx(evaluated[f"eval_{name}"]), name
