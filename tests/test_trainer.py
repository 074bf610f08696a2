"""The trainer compared with the paper's formulas written out, and every argument that a user may pass."""

import copy
import json
import logging

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, PromptTuningConfig
from safetensors.torch import load_file
from support.reference import step_metrics
from support.small import make_dataset, make_rows, settings, tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    TrainerCallback,
)

from orpo_trl import ORPOConfig, ORPOTrainer
from orpo_trl.model import disable_dropout

PAIR_METRICS = {
    "nll_loss", "log_odds_ratio", "log_odds_chosen", "logps/chosen", "logps/rejected", "rewards/chosen",
    "rewards/rejected", "rewards/margins", "rewards/accuracies",
}  # fmt: skip


def train(model, tokenizer, dataset, tmp_path, **kwargs):
    trainer = ORPOTrainer(model, settings(tmp_path, **kwargs), train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    return trainer


def train_logs(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# ---- Loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["sequence", "completion"])
@pytest.mark.parametrize("reduction", ["token_mean", "micro_batch_mean", "sequence_mean", "max_length"])
def test_step_equals_the_paper_in_float64(tokenizer, tmp_path, scope, reduction):
    """Loss, every metric, and the step's effect on the weights: 7 rows in micro-batches of 3, 3 and 1.

    The scope is the user's to choose (known failure 6), and rows without a rejected response take part (28).
    """
    model = tiny_model()
    reference = copy.deepcopy(model).double()
    options = {"nll_scope": scope, "nll_reduction": reduction, "max_length": 200, "beta": 0.7}
    trainer = train(
        model, tokenizer, make_dataset(7, nll_only_every=3), tmp_path, **options,
        per_device_train_batch_size=3, gradient_accumulation_steps=3, train_sampling_strategy="sequential",
        num_train_epochs=1, max_steps=-1, optim="sgd", max_grad_norm=0.0, learning_rate=0.1,
    )  # fmt: skip
    rows = list(trainer.train_dataset)
    expected = step_metrics(reference, [rows[:3], rows[3:6], rows[6:]], 0.7, scope, reduction, 200)
    logs = train_logs(trainer)
    assert len(logs) == 1
    for name in PAIR_METRICS | {"loss"}:
        assert logs[0][name] == pytest.approx(expected[name].item(), rel=1e-5, abs=1e-6), name
    expected["loss"].backward()
    for (name, trained), initial in zip(model.named_parameters(), reference.parameters(), strict=True):
        gradient = (initial - trained.double()) / 0.1
        error = (gradient - initial.grad).norm() / initial.grad.norm()
        assert error < 1e-4, name


# Adam divides a gradient by its own size, so that the rounding error of a gradient near 0 becomes an update.
@pytest.mark.parametrize(
    ("optim", "learning_rate", "tolerance"),
    [pytest.param("sgd", 0.1, 1e-5, marks=pytest.mark.slow), ("adamw_torch", 1e-2, 1e-4)],
)
def test_weights_logs_and_metrics_do_not_depend_on_the_split(tokenizer, tmp_path, optim, learning_rate, tolerance):
    """TRL's mean of means gives 5.6635 or 5.6483 for the same rows (known failure 5)."""
    runs = []
    splits = [
        (8, 1, {}),
        (1, 8, {}),
        (2, 4, {}),
        (8, 1, {"max_tokens_per_micro_batch": 60}),
        (4, 2, {"max_tokens_per_micro_batch": 60, "pair_layout": "padded"}),
        (4, 2, {"train_sampling_strategy": "random"}),
    ]
    for batch_size, accumulation, options in splits:
        model = tiny_model()
        trainer = train(
            model, tokenizer, make_dataset(21, nll_only_every=4), tmp_path, max_steps=-1, num_train_epochs=2,
            optim=optim, learning_rate=learning_rate,
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, **options,
        )  # fmt: skip
        runs.append((train_logs(trainer), model.state_dict()))
    (logs, weights), *others = runs
    assert len(logs) == 6
    for other_logs, other_weights in others:
        for entry, other in zip(logs, other_logs, strict=True):
            for name in PAIR_METRICS | {"loss", "grad_norm", "odds_ratio_delta", "num_tokens"}:
                assert other[name] == pytest.approx(entry[name], rel=tolerance, abs=tolerance), name
        for name, weight in weights.items():
            torch.testing.assert_close(other_weights[name], weight, rtol=tolerance, atol=tolerance)


def test_a_pair_over_the_budget_is_named_and_trained(tokenizer, tmp_path, caplog):
    train(tiny_model(), tokenizer, make_dataset(8), tmp_path, max_tokens_per_micro_batch=20)
    (warning,) = [record.getMessage() for record in caplog.records if "micro-batch of its own" in record.getMessage()]
    assert "`max_tokens_per_micro_batch: 20`" in warning


@pytest.mark.parametrize(("options", "expected"), [
    ({}, "batch_rebalance"),
    ({"nll_reduction": "micro_batch_mean"}, "random"),
    ({"train_sampling_strategy": "random"}, "random"),
])  # fmt: skip
def test_steps_are_balanced_where_the_loss_does_not_depend_on_it(options, expected, tokenizer, tmp_path):
    trainer = ORPOTrainer(
        tiny_model(), settings(tmp_path, **options), train_dataset=make_dataset(8), processing_class=tokenizer
    )
    assert trainer._get_train_sampler().strategy == expected


def test_logging_windows_are_weighted_over_their_steps(tokenizer, tmp_path):
    options = {"max_steps": 6, "train_sampling_strategy": "sequential", "learning_rate": 0.0}
    dataset = make_dataset(24, nll_only_every=5)
    each = train_logs(train(tiny_model(), tokenizer, dataset, tmp_path, logging_steps=1, **options))
    window = train_logs(train(tiny_model(), tokenizer, dataset, tmp_path, logging_steps=6, **options))
    trainer = ORPOTrainer(tiny_model(), settings(tmp_path), train_dataset=dataset, processing_class=tokenizer)
    rows = list(trainer.train_dataset)
    whole = step_metrics(tiny_model().double(), [rows], 0.1, "sequence", "token_mean", 1024)
    for name in PAIR_METRICS:
        assert window[0][name] == pytest.approx(whole[name].item(), rel=1e-5, abs=1e-6), name
    assert window[0]["loss"] == pytest.approx(sum(entry["loss"] for entry in each) / 6, rel=1e-5)


def test_steps_after_the_last_logging_step_are_logged_at_the_end(tokenizer, tmp_path):
    """5 steps with `logging_steps: 10` logged no metric."""
    options = {"max_steps": 5, "train_sampling_strategy": "sequential"}
    dataset = make_dataset(20)
    each = train_logs(train(tiny_model(), tokenizer, dataset, tmp_path, logging_steps=1, **options))
    for logging_steps, windows in ((10, [5]), (3, [3, 2])):
        trainer = train(tiny_model(), tokenizer, dataset, tmp_path, logging_steps=logging_steps, **options)
        logs, end = train_logs(trainer), 0
        for entry, steps in zip(logs, windows, strict=True):
            rows, end = each[end : end + steps], end + steps
            assert entry["step"] == end
            assert entry["num_tokens"] == rows[-1]["num_tokens"]
            for name in ("loss", "rewards/margins", "log_odds_ratio"):
                assert entry[name] == pytest.approx(sum(row[name] for row in rows) / steps, rel=1e-4), name
        history = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in history if "loss" in entry] == [entry["step"] for entry in logs]
        assert "train_loss" in history[-1]


def test_run_that_an_evaluation_stops_logs_its_last_steps(tokenizer, tmp_path):
    class Stop(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer = ORPOTrainer(
        tiny_model(), settings(tmp_path, max_steps=9, logging_steps=10, eval_strategy="steps", eval_steps=2),
        train_dataset=make_dataset(8), eval_dataset=make_dataset(2), processing_class=tokenizer, callbacks=[Stop()],
    )  # fmt: skip
    trainer.train()
    assert [entry["step"] for entry in train_logs(trainer)] == [2]


@pytest.mark.parametrize("counted", ["all", "non_padding", True])
def test_counting_input_tokens_leaves_the_lines_of_the_terminal(tokenizer, tmp_path, capsys, counted):
    """The Trainer then adds `train_runtime` to each log, which was taken for the end of the run."""
    train(tiny_model(), tokenizer, make_dataset(8), tmp_path, include_num_input_tokens_seen=counted)
    output = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in output if line.startswith("train ")] == [["train", "1"], ["train", "2"]]
    assert sum(line.startswith("Trained to step 2") for line in output) == 1


def test_evaluation_counts_every_row_once(tokenizer, tmp_path):
    dataset = make_dataset(11, nll_only_every=4)
    results = []
    for batch_size in (2, 11, 16):
        trainer = ORPOTrainer(
            tiny_model(), settings(tmp_path, per_device_eval_batch_size=batch_size), train_dataset=dataset,
            eval_dataset=dataset, processing_class=tokenizer,
        )  # fmt: skip
        results.append(trainer.evaluate())
    rows = list(trainer.eval_dataset)
    expected = step_metrics(tiny_model().double(), [rows], 0.1, "sequence", "token_mean", 1024)
    for result in results:
        for name in PAIR_METRICS | {"loss"}:
            assert result[f"eval_{name}"] == pytest.approx(expected[name].item(), rel=1e-5), name


def test_beta_zero_is_supervised_fine_tuning(tokenizer, tmp_path):
    trainer = train(tiny_model(), tokenizer, make_dataset(8), tmp_path, beta=0.0)
    entry = train_logs(trainer)[0]
    assert entry["loss"] == pytest.approx(entry["nll_loss"], rel=1e-6)
    assert 0 <= entry["rewards/accuracies"] <= 1
    assert entry["log_odds_ratio"] < 0


def test_logits_are_never_built(tokenizer, tmp_path):
    """TRL builds fp32 logits of every position of both rows (known failure 7)."""
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the LM head built logits"))
    trainer = train(model, tokenizer, make_dataset(8), tmp_path)
    assert trainer.state.global_step == 2


def test_log_probabilities_of_bf16_weights_are_averaged_in_fp32(tokenizer, tmp_path):
    """TRL averages them in bf16, which has steps of 0.03 at -6 (known failure 11)."""
    model = tiny_model().bfloat16()
    dataset = Dataset.from_list([{**row, "chosen": row["chosen"] * 8} for row in make_rows(4)])
    trainer = ORPOTrainer(
        model, settings(tmp_path), train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer
    )
    rows = list(trainer.train_dataset)
    result = trainer.evaluate()
    means = []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        logps = logps.gather(-1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :, 0]
        means.append(logps.mean().item())
    assert result["eval_logps/chosen"] == pytest.approx(sum(means) / len(means), abs=5e-3)


def test_mixture_of_experts_adds_its_load_balancing_loss(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=768, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, router_aux_loss_coef=0.5, output_router_logits=True,
        )
    )  # fmt: skip
    trainer = train(model, tokenizer, make_dataset(8), tmp_path, beta=0.2)
    entry = train_logs(trainer)[0]
    expected = entry["nll_loss"] - 0.2 * entry["log_odds_ratio"] + 0.5 * entry["aux_loss"]
    assert entry["loss"] == pytest.approx(expected, rel=1e-5)


def test_load_balancing_loss_is_a_mean_over_micro_batches(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=768, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, router_aux_loss_coef=0.5, output_router_logits=True,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    trainer = train(
        model, tokenizer, make_dataset(7), tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4,
        num_train_epochs=1, max_steps=-1,
    )  # fmt: skip
    (entry,) = train_logs(trainer)
    expected = entry["nll_loss"] - 0.1 * entry["log_odds_ratio"] + 0.5 * entry["aux_loss"]
    assert entry["loss"] == pytest.approx(expected, rel=1e-5)


def test_collectives_of_a_run(tokenizer, tmp_path, monkeypatch):
    """One per optimiser step and one per log; TRL gathers eleven times per micro-batch (known failure 9)."""
    trainer = ORPOTrainer(
        tiny_model(), settings(tmp_path, max_steps=5, logging_steps=5, gradient_accumulation_steps=2),
        train_dataset=make_dataset(16), processing_class=tokenizer,
    )  # fmt: skip
    calls = []
    for name in ("reduce", "gather", "gather_for_metrics"):
        original = getattr(trainer.accelerator, name)
        monkeypatch.setattr(
            trainer.accelerator,
            name,
            lambda *args, call=original, **kwargs: calls.append(call) or call(*args, **kwargs),
        )
    trainer.train()
    assert len(calls) == 5 + 1


def test_dropout_is_off_in_modules_and_in_functional_calls():
    """OPT hands its dropout to `F.dropout`, which TRL's `disable_dropout` does not reach."""
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2)
    config.dropout = config.attention_dropout = 0.5
    model = OPTForCausalLM(config).train()
    ids = torch.arange(12)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


# ---- Rows that break others ------------------------------------------------------------------------------------------


def test_prompt_that_fills_max_length_does_not_reach_the_model(tokenizer, tmp_path):
    """One such row turns all weights of TRL's trainer to NaN (known failure 1)."""
    rows = make_rows(8)
    rows[3]["prompt"] = "cow " * 200
    model = tiny_model()
    trainer = train(model, tokenizer, Dataset.from_list(rows), tmp_path, max_length=150)
    assert trainer.preparation_reports["train"].sources["train"].dropped_rows == {"prompt fills max_length": [3]}
    assert all(entry["loss"] > 0 for entry in train_logs(trainer))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_non_finite_step_is_named_and_left_out_of_the_means(tokenizer, tmp_path, caplog):
    """TRL logs 0.0, and one NaN poisons the window (known failure 10)."""
    rows = make_rows(12)
    rows[5]["chosen"] = " zebra"
    model = tiny_model()
    (zebra,) = set(tokenizer(" zebra")["input_ids"]) - set(tokenizer(" z")["input_ids"])
    model.model.embed_tokens.weight.data[zebra] = torch.nan
    options = {"train_sampling_strategy": "sequential", "learning_rate": 0.0}
    first = train(tiny_model(), tokenizer, Dataset.from_list(rows[:4]), tmp_path, max_steps=1, **options)
    with caplog.at_level(logging.WARNING, "orpo_trl"):
        trainer = train(model, tokenizer, Dataset.from_list(rows), tmp_path, max_steps=2, logging_steps=2, **options)
    (entry,) = train_logs(trainer)
    assert torch.tensor(entry["loss"]).isnan()
    assert torch.tensor(trainer.state.log_history[-1]["train_loss"]).isnan()
    assert entry["nll_loss"] == pytest.approx(train_logs(first)[0]["nll_loss"], rel=1e-6)
    (message,) = [text for text in caplog.messages if "between steps" in text]
    assert "between steps 1 and 2" in message
    assert "nll_loss in 1 micro-batches" in message


# ---- What a user may pass --------------------------------------------------------------------------------------------


def test_model_by_name_without_args(tokenizer, tmp_path, monkeypatch):
    """`args=None` crashes TRL's trainer (known failure 12)."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("farm")
    tokenizer.save_pretrained("farm")
    trainer = ORPOTrainer("farm", train_dataset=make_dataset(4))
    assert trainer.args.output_dir == "farm-ORPO"
    assert trainer.args.beta == 0.1


def test_dict_of_evaluation_sets_and_evaluate_on_raw_rows(tokenizer, tmp_path):
    """Both crash TRL's trainer (known failure 12)."""
    trainer = ORPOTrainer(
        tiny_model(), settings(tmp_path), train_dataset=make_dataset(4),
        eval_dataset={"one": make_dataset(3, seed=1), "two": make_dataset(5, seed=2)}, processing_class=tokenizer,
    )  # fmt: skip
    result = trainer.evaluate()
    one = trainer.evaluate(make_dataset(3, seed=1))
    assert result["eval_one_loss"] == pytest.approx(one["eval_loss"])
    assert result["eval_one_loss"] != result["eval_two_loss"]
    assert set(trainer.preparation_reports) == {"train", "one", "two", "eval"}


def test_streams(tokenizer, tmp_path):
    """Streams crash TRL's trainer (known failure 12)."""
    rows = make_rows(8, nll_only_every=4)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = ORPOTrainer(
        tiny_model(), settings(tmp_path, max_steps=2), train_dataset=stream, eval_dataset=stream,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    streamed = train_logs(trainer)
    loaded = train(
        tiny_model(), tokenizer, Dataset.from_list(rows), tmp_path, train_sampling_strategy="sequential", max_steps=2
    )
    for entry, other in zip(streamed, train_logs(loaded), strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loaded.evaluate(Dataset.from_list(rows))["eval_loss"])


def test_stream_shorter_than_a_run_starts_again_with_full_steps(tokenizer, tmp_path):
    """6 rows for 3 steps of 2 x 2 train as 12 rows would. No gradient is carried over the end of the stream."""
    rows = make_rows(6)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
    streamed = train(tiny_model(), tokenizer, IterableDataset.from_generator(lambda: iter(rows)), tmp_path, **options)
    options["train_sampling_strategy"] = "sequential"
    loaded = train(tiny_model(), tokenizer, Dataset.from_list(rows + rows), tmp_path, **options)
    for entry, other in zip(train_logs(streamed), train_logs(loaded), strict=True):
        for name in ("loss", "grad_norm", "nll_loss", "num_tokens"):
            assert entry[name] == pytest.approx(other[name], rel=1e-5), name


def test_stream_without_lengths_cannot_be_sampled_by_length(tokenizer, tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(make_rows(4)))
    with pytest.raises(ValueError, match="`train_sampling_strategy: batch_rebalance` needs all lengths"):
        train(tiny_model(), tokenizer, stream, tmp_path, train_sampling_strategy="batch_rebalance")


def test_token_id_rows_train_like_their_texts(tokenizer, tmp_path):
    dataset = make_dataset(8, nll_only_every=3)
    texts = train(tiny_model(), tokenizer, dataset, tmp_path)
    ids = texts.train_dataset.remove_columns("length")
    again = train(tiny_model(), tokenizer, ids, tmp_path)
    assert [entry["loss"] for entry in train_logs(again)] == [entry["loss"] for entry in train_logs(texts)]


def test_tokenizer_without_pad_token(tokenizer, tmp_path):
    """TRL fails after it has tokenised the whole set (known failure 15)."""
    tokenizer.pad_token = None
    trainer = train(tiny_model(), tokenizer, make_dataset(8), tmp_path)
    assert trainer.data_collator.pad_token_id == tokenizer.eos_token_id
    assert all(entry["loss"] > 0 for entry in train_logs(trainer))


def test_pad_token_does_not_change_the_loss(tokenizer, tmp_path):
    losses = {
        train(tiny_model(), tokenizer, make_dataset(8), tmp_path, padding_value=value).state.log_history[0]["loss"]
        for value in (3, 5)
    }
    assert len(losses) == 1


def test_samples_with_an_evaluation_set_smaller_than_a_batch(tokenizer, tmp_path):
    """`generate_during_eval` fails in TRL with such a set (known failure 21)."""
    trainer = ORPOTrainer(
        tiny_model(), settings(tmp_path, generate_during_eval=True), train_dataset=make_dataset(4),
        eval_dataset=make_dataset(3, nll_only_every=3), processing_class=tokenizer,
    )  # fmt: skip
    trainer.evaluate()
    records = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in records] == [row["prompt"] for row in make_rows(3)]
    assert records[0]["rejected"] == ""
    assert records[1]["chosen"] == make_rows(3)[1]["chosen"]
    assert records[0]["step"] == 0


def test_samples_say_where_the_last_user_turn_is(tokenizer, tmp_path):
    earlier = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi."},
               {"role": "assistant", "content": "Hello."}]  # fmt: skip
    rows = [
        {"prompt": [*earlier, {"role": "user", "content": f"Is {number} a number?"}],
         "chosen": [{"role": "assistant", "content": "Yes."}], "rejected": [{"role": "assistant", "content": "Go."}]}
        for number in range(3)
    ]  # fmt: skip
    trainer = ORPOTrainer(
        tiny_model(), settings(tmp_path, generate_during_eval=True), train_dataset=make_dataset(4),
        eval_dataset={"chat": Dataset.from_list(rows), "text": make_dataset(2)}, processing_class=tokenizer,
    )  # fmt: skip
    trainer.evaluate()
    chats, texts = [], []
    for line in (tmp_path / "samples.jsonl").read_text().splitlines():
        record = json.loads(line)
        (chats if record["dataset"] == "eval_chat" else texts).append(record)
    assert [record["prompt"][slice(*record["last_turn"])] for record in chats] == [
        row["prompt"][-1]["content"] for row in rows
    ]
    assert chats[0]["special_tokens"] == ["<|system|>", "</s>", "<|user|>", "<|assistant|>"]
    assert [(record["last_turn"], record["special_tokens"]) for record in texts] == [(None, [])] * 2


def test_samples_of_each_evaluation_set(tokenizer, tmp_path):
    trainer = ORPOTrainer(
        tiny_model(), settings(tmp_path, generate_during_eval=True), train_dataset=make_dataset(4),
        eval_dataset={"one": make_dataset(2, seed=1), "two": make_dataset(3, seed=2)}, processing_class=tokenizer,
    )  # fmt: skip
    trainer.evaluate()
    records = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [record["dataset"] for record in records] == ["eval_one"] * 2 + ["eval_two"] * 3
    assert records[-1]["prompt"] == make_rows(3, seed=2)[-1]["prompt"]


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "batch_rebalance"])
def test_sampling_strategies_train_on_each_row_once(tokenizer, tmp_path, strategy):
    trainer = train(
        tiny_model(), tokenizer, make_dataset(11), tmp_path, train_sampling_strategy=strategy, max_steps=-1,
        num_train_epochs=1, gradient_accumulation_steps=2, per_device_train_batch_size=2,
    )  # fmt: skip
    assert train_logs(trainer)[-1]["num_tokens"] == sum(
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in trainer.train_dataset
    )
    assert trainer.state.global_step == 3


def test_resumed_run_ends_where_the_whole_run_does(tokenizer, tmp_path):
    options = {
        "max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 2, "save_strategy": "steps",
        "save_steps": 3, "gradient_accumulation_steps": 2, "lr_scheduler_type": "linear",
    }  # fmt: skip
    whole = train(tiny_model(), tokenizer, make_dataset(15), tmp_path, **options)
    resumed = ORPOTrainer(
        tiny_model(), settings(tmp_path / "again", **options), train_dataset=make_dataset(15),
        processing_class=tokenizer,
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert whole.state.global_step == resumed.state.global_step == 8
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("start", [2, 4])
def test_resumed_run_of_four_steps_trains_none_more(tokenizer, tmp_path, is_stream, start):
    """The Trainer looks at `max_steps` after a step: a run that resumed at its last one trained one more."""
    rows = make_rows(12)  # 3 steps an epoch
    dataset = IterableDataset.from_generator(lambda: iter(rows)) if is_stream else Dataset.from_list(rows)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = train(tiny_model(), tokenizer, dataset, tmp_path, **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{start}")
    resumed = ORPOTrainer(
        model, settings(tmp_path / "again", **options), train_dataset=dataset, processing_class=tokenizer
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{start}"))
    assert resumed.state.global_step == 4
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], weight, rtol=1e-6, atol=1e-7)


def test_gradient_checkpointing_changes_nothing(tokenizer, tmp_path):
    plain = train(tiny_model(), tokenizer, make_dataset(8), tmp_path)
    for kind in ({"use_reentrant": True}, {"use_reentrant": False}, {"selective": True}):
        again = train(
            tiny_model(), tokenizer, make_dataset(8), tmp_path, gradient_checkpointing=True,
            gradient_checkpointing_kwargs=kind,
        )  # fmt: skip
        for entry, other in zip(train_logs(plain), train_logs(again), strict=True):
            assert other["grad_norm"] == pytest.approx(entry["grad_norm"], rel=1e-5)


def test_lora_trains_saves_loads_and_merges(tokenizer, tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    before = copy.deepcopy(base.state_dict())
    trainer = ORPOTrainer(
        str(tmp_path / "base"), settings(tmp_path / "run", max_steps=3), train_dataset=make_dataset(12),
        processing_class=tokenizer, peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "run")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-5)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(merged.state_dict()["model.layers.0.self_attn.q_proj.weight"],
                           before["model.layers.0.self_attn.q_proj.weight"])  # fmt: skip


def test_qlora_of_a_model_by_name(tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_model(hidden_size=64).save_pretrained(tmp_path / "base")
    trainer = ORPOTrainer(
        str(tmp_path / "base"), settings(tmp_path / "run", max_steps=3, gradient_checkpointing=True),
        train_dataset=make_dataset(12), processing_class=tokenizer,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer.base_layer).__name__ == "Linear4bit"
    before = layer.lora_B["default"].weight.clone()
    trainer.train()
    assert all(entry["loss"] > 0 for entry in train_logs(trainer))
    assert not torch.equal(layer.lora_B["default"].weight, before)


def test_saved_model_loads_as_a_plain_model(tokenizer, tmp_path):
    trainer = train(tiny_model(), tokenizer, make_dataset(8), tmp_path)
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)
    assert set(load_file(tmp_path / "model.safetensors")) == set(trainer.model.state_dict())


def test_model_card_cites_orpo(tokenizer, tmp_path):
    trainer = ORPOTrainer(tiny_model(), settings(tmp_path), train_dataset=make_dataset(4), processing_class=tokenizer)
    trainer.create_model_card(model_name="farm")
    card = (tmp_path / "README.md").read_text()
    assert "2403.07691" in card
    assert "hong-etal-2024-orpo" in card


def test_optimizer_class(tokenizer, tmp_path):
    trainer = ORPOTrainer(
        tiny_model(), settings(tmp_path), train_dataset=make_dataset(4), processing_class=tokenizer,
        optimizer_cls_and_kwargs=(torch.optim.Adagrad, {"lr": 0.01}),
    )  # fmt: skip
    trainer.train()
    assert type(trainer.optimizer.optimizer) is torch.optim.Adagrad


# ---- Refusals --------------------------------------------------------------------------------------------------------


def test_arguments_that_need_logits_are_refused(tokenizer, tmp_path):
    for name in ("compute_metrics", "preprocess_logits_for_metrics"):
        with pytest.raises(ValueError, match=f"`{name}`"):
            ORPOTrainer(tiny_model(), settings(tmp_path), train_dataset=make_dataset(4), **{name: lambda *_: {}})


def test_prompt_learning_is_refused(tokenizer, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="PromptTuningConfig"):
        ORPOTrainer(tiny_model(), settings(tmp_path), train_dataset=make_dataset(4), peft_config=config)


def test_misnamed_rejected_column_is_an_error(tokenizer, tmp_path):
    dataset = make_dataset(4).rename_column("rejected", "rejcted")
    with pytest.raises(ValueError, match=r"named `rejected`\? Columns: .*rejcted"):
        ORPOTrainer(tiny_model(), settings(tmp_path), train_dataset=dataset, processing_class=tokenizer)
    trainer = ORPOTrainer(tiny_model(), settings(tmp_path, beta=0.0), train_dataset=dataset, processing_class=tokenizer)
    assert trainer.preparation_reports["train"].pairs == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"train_dataset": None}, "`train_dataset` is required"),
        ({"train_dataset": make_dataset(4), "eval_dataset": make_dataset(4).select([])}, "eval dataset has no rows"),
        ({"train_dataset": Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []})}, "has no rows"),
        (
            {"train_dataset": Dataset.from_list([{"image": "x", "chosen": "a"}])},
            "The train dataset, row 0: column `image`: expected no content",
        ),
    ],
)
def test_datasets_that_are_refused(tokenizer, tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ORPOTrainer(tiny_model(), settings(tmp_path), processing_class=tokenizer, **kwargs)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"chat_template_path": "absent.jinja"}, "`chat_template_path`: the file 'absent.jinja'"),
        ({"padding_value": 5000}, "`padding_value` must be a token id from 0 to 767"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 99}, "`dataloader_drop_last`"),
    ],
)
def test_options_that_do_not_fit_the_run(tokenizer, tmp_path, option, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(tiny_model(), tokenizer, make_dataset(4), tmp_path, **option)


def test_stream_without_a_usable_row_or_a_pair_is_reported(tokenizer, tmp_path, caplog):
    rows = [{**row, "rejected": None} for row in make_rows(8)]
    train(tiny_model(), tokenizer, IterableDataset.from_generator(lambda: iter(rows)), tmp_path, max_steps=1)
    assert any("No row so far has a `rejected` response" in message for message in caplog.messages)
    empty = [{**row, "chosen": ""} for row in rows]
    with pytest.raises(ValueError, match="no row that can be trained on"):
        train(tiny_model(), tokenizer, IterableDataset.from_generator(lambda: iter(empty)), tmp_path, max_steps=1)


def test_tokenizer_without_end_of_sequence_is_refused_before_the_weights_are_loaded(tokenizer, tmp_path):
    """TRL puts None among the token ids (known failure 16)."""
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="`eos_token`"):
        ORPOTrainer("no/such/model", settings(tmp_path), train_dataset=make_dataset(4), processing_class=tokenizer)


def test_config_is_exported():
    assert ORPOConfig.__mro__[1].__name__ == "SFTConfig"


# ---- What a CPU decides ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "runs"), [(None, False), (True, True)])
def test_layers_run_twice_only_where_it_was_asked_for(tokenizer, tmp_path, caplog, asked, runs):
    """`None`: the memory of this machine holds the activations of a tiny model."""
    caplog.set_level(logging.INFO, "orpo_trl")
    trainer = train(tiny_model(), tokenizer, make_dataset(8), tmp_path, gradient_checkpointing=asked, max_steps=1)
    assert trainer.model.is_gradient_checkpointing is runs
    assert ("Gradient checkpointing is off: without it, about" in caplog.text) is not runs


@pytest.mark.parametrize(("learning_rate", "is_low"), [(2e-5, True), (5e-5, False)])
def test_learning_rate_of_full_fine_tuning_is_named_where_an_adapter_is_trained(
    tokenizer, tmp_path, caplog, learning_rate, is_low
):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    for peft_config in (config, None):
        caplog.clear()
        ORPOTrainer(
            tiny_model(), settings(tmp_path, learning_rate=learning_rate), train_dataset=make_dataset(4),
            processing_class=tokenizer, peft_config=peft_config,
        )  # fmt: skip
        said = f"`learning_rate: {learning_rate:g}` is a rate for full fine-tuning" in caplog.text
        assert said is (is_low and peft_config is not None)
