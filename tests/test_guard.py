"""Steps that are not finite, in one process, and models that they break."""

import copy
import logging
import math
import runpy

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from safetensors.torch import load_file
from support.small import REPOSITORY, make_rows, settings, tiny_model
from transformers import TrainerCallback

from orpo_trl import ORPOTrainer
from orpo_trl.exit_codes import FAILED
from orpo_trl.guard import SPIKE_LEAST, NonFiniteError, StepGuard
from orpo_trl.run_folder import read_history, read_record, read_trouble
from orpo_trl.upstream import get_last_checkpoint, skip_next_step

ACCUMULATION = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
BUDGET = {"max_tokens_per_micro_batch": 60}
SEQUENTIAL = {"train_sampling_strategy": "sequential"}
# All of the learning rates; two of them by default.
RATES = [pytest.param(10.0**n, id=f"1e{n}", marks=[] if n in (3, 9) else pytest.mark.slow) for n in range(2, 10)]


def rows_with_zebras(count: int, zebras: list[int]) -> list[dict]:
    rows = make_rows(count)
    for row in zebras:
        rows[row]["chosen"] = " zebra"
    return rows


def model_without_zebra(tokenizer):
    """A model that gives NaN for each row with a zebra, and finite numbers for all others."""
    (zebra,) = set(tokenizer(" zebra")["input_ids"]) - set(tokenizer(" z")["input_ids"])
    model = tiny_model()
    model.model.embed_tokens.weight.data[zebra] = torch.nan
    return model, zebra


class SetZebraAt(TrainerCallback):
    """Sets the embedding of the zebra after a step."""

    def __init__(self, step: int, zebra: int, value: float):
        self.step, self.zebra, self.value = step, zebra, value

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            model.model.embed_tokens.weight.data[self.zebra] = self.value


def make_trainer(model, tokenizer, rows, folder, eval_rows=None, **kwargs) -> ORPOTrainer:
    held_out = eval_rows and Dataset.from_list(eval_rows)
    return ORPOTrainer(
        model, settings(folder, **kwargs), train_dataset=Dataset.from_list(rows), eval_dataset=held_out,
        processing_class=tokenizer,
    )  # fmt: skip


def train(*args, **kwargs) -> ORPOTrainer:
    trainer = make_trainer(*args, **kwargs)
    trainer.train()
    return trainer


def train_until_it_stops(trainer, **kwargs) -> str:
    with pytest.raises(NonFiniteError) as stopped:
        trainer.train(**kwargs)
    return str(stopped.value)


def assert_files_are_finite(folder, least: int = 0) -> None:
    """Of the models in a folder, which are `least` or more."""
    files = list(folder.rglob("*.safetensors"))
    assert len(files) >= least
    for path in files:
        assert all(weight.isfinite().all() for weight in load_file(path).values()), path
    assert not [path for path in files if path.parent == folder]  # no final model
    assert "finished" not in read_record(folder)


# ---- One bad row -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow, id="plain"),
        pytest.param(ACCUMULATION, marks=pytest.mark.slow, id="accumulation"),
        pytest.param(BUDGET, marks=pytest.mark.slow, id="budget"),
        pytest.param({**ACCUMULATION, **BUDGET}, id="accumulated budget"),
        pytest.param({"max_grad_norm": 0.0, "pair_layout": "padded"}, id="padded, no clipping"),
    ],
)
def test_run_with_a_bad_row_equals_the_run_without_its_step(tokenizer, tmp_path, options):
    """Weights and the optimizer's state, bit by bit; step 2 of 3 has the bad row (known failure 42)."""
    rows = rows_with_zebras(12, [5])
    options = {**SEQUENTIAL, **options}
    found = train(model_without_zebra(tokenizer)[0], tokenizer, rows, tmp_path / "a", max_steps=3, **options)
    expected = train(model_without_zebra(tokenizer)[0], tokenizer, rows[:4] + rows[8:], tmp_path / "b", **options)
    assert found.state.global_step == 3
    for (name, weight), other in zip(found.model.named_parameters(), expected.model.state_dict().values(), strict=True):
        torch.testing.assert_close(weight.detach(), other, rtol=0, atol=0, equal_nan=True, msg=name)
    steps = {state["step"].item() for state in found.optimizer.state_dict()["state"].values()}
    assert steps == {2}
    trouble = read_trouble(tmp_path / "a")
    assert [(row["step"], row["rank"], row["source"]) for row in trouble] == [(2, 0, "train")] * 4
    assert [row["row"] for row in trouble if not row["is_finite"]] == [5]
    assert {row["row"] for row in trouble} == {4, 5, 6, 7}
    assert trouble[0]["logps/chosen"] is None
    assert all(-50 < row["logps/chosen"] < 0 for row in trouble[1:])
    assert read_trouble(tmp_path / "b") == []


def test_rows_of_a_bad_step_have_the_numbers_of_the_model(tokenizer, tmp_path):
    """Compared with a forward pass of each response by itself, in both layouts, with a row for the NLL alone."""
    rows = rows_with_zebras(4, [1])
    rows[2]["rejected"] = None
    for layout in ("shared_prefix", "padded"):
        model, _ = model_without_zebra(tokenizer)
        reference = copy.deepcopy(model)
        trainer = train(model, tokenizer, rows, tmp_path / layout, max_steps=1, pair_layout=layout)
        for found in read_trouble(tmp_path / layout):
            pair = trainer.train_dataset[found["row"]]
            assert found["prompt_tokens"] == len(pair["prompt_ids"])
            sides = ["chosen", "rejected"] if pair["rejected_ids"] else ["chosen"]
            assert ("logps/rejected" in found) == (found["rejected_tokens"] is not None) == ("rejected" in sides)
            for side in sides:
                ids = torch.tensor(pair["prompt_ids"] + pair[f"{side}_ids"])[None]
                assert found[f"{side}_tokens"] == len(pair[f"{side}_ids"])
                with torch.no_grad():
                    logps = reference(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
                if found["row"] == 1:  # attention of weight 0 to NaN is NaN: it spreads to all of the pair
                    assert found["nll"] is None
                    assert found["logps/chosen"] is None
                    continue
                of_response = logps[len(pair["prompt_ids"]) - 1 :].mean().item()
                assert found[f"logps/{side}"] == pytest.approx(of_response, rel=1e-4)
                if side == "chosen":
                    assert found["nll"] == pytest.approx(-logps.mean().item(), rel=1e-4)


def test_schedule_waits_and_the_step_is_logged_and_named(tokenizer, tmp_path, caplog):
    model, _ = model_without_zebra(tokenizer)
    options = {"lr_scheduler_type": "linear", "max_steps": 4, "logging_steps": 4}
    with caplog.at_level(logging.WARNING, "orpo_trl"):
        train(model, tokenizer, rows_with_zebras(16, [5]), tmp_path, **SEQUENTIAL, **options)
    bad, last = [log for log in read_history(tmp_path) if "loss" in log]
    assert (bad["step"], bad["loss"], bad["grad_norm"]) == (2, None, None)
    assert last["learning_rate"] == pytest.approx(1e-2 * (1 - 2 / 4))  # of the third step that is taken
    (message,) = [text for text in caplog.messages if "not taken" in text]
    assert "Step 2: the loss is not finite. The step is not taken (1 in a row, the run stops at 3)" in message
    assert "Worst of its 4 rows: train, row 5 (nll nan, chosen nan" in message
    assert any("Weights of the model are not finite: model.embed_tokens.weight" in text for text in caplog.messages)


def test_checkpoint_that_is_due_at_a_bad_step_is_written_after_the_next_good_one(tokenizer, tmp_path):
    model, _ = model_without_zebra(tokenizer)
    rows = rows_with_zebras(16, [5, 6, 9])  # steps 2 and 3
    train(model, tokenizer, rows, tmp_path, **SEQUENTIAL, max_steps=4, save_strategy="steps", save_steps=2)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4"}


def test_evaluation_that_is_due_at_a_bad_step_is_made_with_its_checkpoint(tokenizer, tmp_path):
    """The best of them is loaded at the end, so each evaluation needs a checkpoint of its step."""
    model, _ = model_without_zebra(tokenizer)
    trainer = train(
        model, tokenizer, rows_with_zebras(16, [5]), tmp_path, eval_rows=make_rows(4), **SEQUENTIAL, max_steps=4,
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
    )  # fmt: skip
    losses = {log["step"]: log["eval_loss"] for log in read_history(tmp_path) if "eval_loss" in log}
    assert set(losses) == {3, 4}
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    best = min(losses, key=losses.get)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")


def test_bad_row_in_the_last_step_is_no_broken_model(tokenizer, tmp_path):
    model, _ = model_without_zebra(tokenizer)
    rows = rows_with_zebras(8, [5])
    train(model, tokenizer, rows, tmp_path, **SEQUENTIAL, save_strategy="steps", save_steps=2)
    assert (tmp_path / "checkpoint-2").is_dir()
    assert read_record(tmp_path)["finished"]


def test_bad_steps_in_a_row_end_the_run_and_it_resumes_from_the_checkpoint_before(tokenizer, tmp_path):
    rows = rows_with_zebras(28, [8, 13, 18])  # steps 3, 4 and 5 of 7
    options = {**SEQUENTIAL, "max_steps": 7, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(model_without_zebra(tokenizer)[0], tokenizer, rows, tmp_path / "a", **options)
    message = train_until_it_stops(trainer)
    assert "Step 5: the loss or the gradient norm was not finite in 3 steps in a row" in message
    assert f"Newest checkpoint: {tmp_path / 'a' / 'checkpoint-2'}." in message
    assert "finished" not in read_record(tmp_path / "a")
    assert {row["step"] for row in read_trouble(tmp_path / "a")} == {3, 4, 5}
    assert [log["step"] for log in read_history(tmp_path / "a")] == [1, 2, 3, 4, 5]
    options["max_nonfinite_steps"] = 4
    resumed = make_trainer(model_without_zebra(tokenizer)[0], tokenizer, rows, tmp_path / "a", **options)
    resumed.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path / "a")))
    whole = train(model_without_zebra(tokenizer)[0], tokenizer, rows, tmp_path / "b", **options)
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], weight, rtol=0, atol=0, equal_nan=True)
    assert read_trouble(tmp_path / "a") == read_trouble(tmp_path / "b")


def test_good_step_between_bad_ones_starts_the_count_again(tokenizer, tmp_path):
    model, _ = model_without_zebra(tokenizer)
    rows = rows_with_zebras(20, [0, 5, 12, 17])  # steps 1, 2, 4 and 5
    trainer = train(model, tokenizer, rows, tmp_path, **SEQUENTIAL, max_steps=5)
    assert trainer.state.global_step == 5


# ---- Broken models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({**ACCUMULATION, **BUDGET}, marks=pytest.mark.slow, id="accumulated budget"),
    ],
)
def test_learning_rate_that_explodes_ends_the_run_and_leaves_finite_files(tokenizer, tmp_path, rate, options):
    options = {**options, "learning_rate": rate, "max_steps": 8, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tiny_model(), tokenizer, make_rows(24), tmp_path, **options)
    train_until_it_stops(trainer)
    assert_files_are_finite(tmp_path, least=1 if rate < 1e9 else 0)  # else the first step breaks the weights


@pytest.mark.parametrize("steps", [1, 2], ids=["last step", "step before"])
def test_model_that_its_last_steps_break_is_not_called_finished(tokenizer, tmp_path, steps):
    """Without a checkpoint: the first step breaks the weights, the second sees it."""
    rate = 1e30 if steps == 1 else 1e3
    trainer = make_trainer(tiny_model(), tokenizer, make_rows(8), tmp_path, learning_rate=rate, max_steps=steps)
    assert "lower `learning_rate`" in train_until_it_stops(trainer).lower()
    assert_files_are_finite(tmp_path)


def test_weights_that_become_infinite_are_named_and_not_saved(tokenizer, tmp_path):
    """Of a token that no row has: the losses stay finite."""
    _, zebra = model_without_zebra(tokenizer)
    options = {"learning_rate": 1e-3, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tiny_model(), tokenizer, make_rows(16), tmp_path, **options)
    trainer.add_callback(SetZebraAt(3, zebra, math.inf))
    message = train_until_it_stops(trainer)
    assert "Step 4: Weights of the model are not finite: model.embed_tokens.weight, though" in message
    assert f"Newest checkpoint: {tmp_path / 'checkpoint-2'}." in message
    assert_files_are_finite(tmp_path, least=1)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param(ACCUMULATION, marks=pytest.mark.slow, id="accumulation"),
        pytest.param(BUDGET, marks=pytest.mark.slow, id="budget"),
    ],
)
def test_infinite_logits_train_nothing(tokenizer, tmp_path, options):
    model = tiny_model()
    model.lm_head.weight.data.fill_(3e38)
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(
        model, tokenizer, make_rows(40), tmp_path, max_steps=10, save_strategy="steps", save_steps=1, **options
    )
    assert "No step of this run was finite: is the given model sound?" in train_until_it_stops(trainer)
    assert trainer.state.global_step == 3
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert_files_are_finite(tmp_path)


def test_given_weights_of_nan_are_named_before_the_first_step(tokenizer, tmp_path):
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    trainer = make_trainer(model, tokenizer, make_rows(40), tmp_path, max_steps=10, max_nonfinite_steps=2)
    message = train_until_it_stops(trainer)
    assert "Step 2: " in message
    assert "model.layers.1.mlp.up_proj.weight, and were not when training began" in message


def test_loss_without_a_number_has_no_finite_gradient(tokenizer, tmp_path):
    trainer = make_trainer(tiny_model(), tokenizer, make_rows(2), tmp_path)
    for constant, expected in ((1.0, 1.0), (math.inf, math.nan), (math.nan, math.nan)):
        weight = torch.ones((), requires_grad=True)
        loss = trainer.guarded(weight + constant, {}, weight)
        loss.backward()
        torch.testing.assert_close(weight.grad, torch.tensor(expected), equal_nan=True)
        assert loss.isfinite() == math.isfinite(constant)


def test_entry_point_ends_with_status_1_and_no_traceback(tmp_path, capsys):
    main = runpy.run_path(str(REPOSITORY / "scripts" / "run_orpo.py"))["main"]
    logger = logging.getLogger("orpo_trl")
    level, handlers = logger.level, list(logger.handlers)
    with pytest.raises(SystemExit) as ended:
        main(["recipes/quickstart.yaml", "--learning_rate", "1e6", "--max_steps", "9", "--warmup_steps", "0",
              "--eval_strategy", "no", "--output_dir", str(tmp_path)])  # fmt: skip
    logger.level, logger.handlers = level, handlers
    assert ended.value.code == FAILED
    assert "run_orpo.py: Step " in capsys.readouterr().err
    assert_files_are_finite(tmp_path)


# ---- Evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "greater_is_better"),
    [
        ("loss", False),
        ("rewards/accuracies", True),
        pytest.param("loss", True, marks=pytest.mark.slow),
        pytest.param("rewards/accuracies", False, marks=pytest.mark.slow),
        pytest.param("rewards/margins", True, marks=pytest.mark.slow),
    ],
)
def test_evaluation_that_is_not_finite_is_nan_and_never_the_best(tokenizer, tmp_path, metric, greater_is_better):
    """The first two of four evaluations; one bad pair of three is enough."""
    model, zebra = model_without_zebra(tokenizer)
    trainer = make_trainer(
        model, tokenizer, make_rows(16), tmp_path, eval_rows=rows_with_zebras(3, [1]), max_steps=4,
        learning_rate=1e-4, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model=metric, greater_is_better=greater_is_better,
        per_device_eval_batch_size=1,
    )  # fmt: skip
    trainer.add_callback(SetZebraAt(3, zebra, 0.01))
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    for log in evaluations[:2]:
        for name in ("loss", "nll_loss", "log_odds_ratio", "rewards/accuracies", "rewards/margins", "logps/chosen"):
            assert math.isnan(log[f"eval_{name}"]), name
    assert all(math.isfinite(log["eval_loss"]) for log in evaluations[2:])
    assert trainer.state.best_global_step in (3, 4)
    assert math.isfinite(trainer.state.best_metric)
    written = [log["eval_loss"] for log in read_history(tmp_path) if "eval_loss" in log]
    assert written[:2] == [None, None]


def test_evaluation_of_a_model_of_nan_is_nan(tokenizer, tmp_path):
    model = tiny_model()
    for weight in model.parameters():
        weight.data.fill_(torch.nan)
    trainer = make_trainer(model, tokenizer, make_rows(4), tmp_path, eval_rows=make_rows(4))
    assert math.isnan(trainer.evaluate()["eval_loss"])


# ---- Spikes and fp16 -------------------------------------------------------------------------------------------------


def test_spike_is_ten_times_the_running_median(tokenizer, tmp_path, caplog):
    guard = StepGuard()
    assert [guard.good_step(step, 1.0) for step in range(SPIKE_LEAST - 1)] == [0.0] * (SPIKE_LEAST - 1)
    assert guard.good_step(SPIKE_LEAST, 50.0) == 0  # too few to know
    assert guard.good_step(SPIKE_LEAST + 1, 9.9) == 0
    assert guard.good_step(SPIKE_LEAST + 2, 10.1) == 1.0
    trainer = make_trainer(tiny_model(), tokenizer, make_rows(2), tmp_path)
    trainer.begin_run(False)
    with caplog.at_level(logging.WARNING, "orpo_trl"):
        assert all(trainer.may_step(norm) for norm in [2.0] * SPIKE_LEAST + [30.0])
    assert "Step 1: the gradient norm is 30, more than 10 times its running median of 2." in caplog.messages


def test_falling_scale_of_fp16_is_no_trouble_until_it_has_fallen(tokenizer, tmp_path):
    """Steps with the scaler of fp16 on a CPU, whose gradient never becomes finite."""
    weight = torch.nn.Parameter(torch.ones(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer = make_trainer(tiny_model(), tokenizer, make_rows(2), tmp_path)
    trainer.begin_run(False)
    trainer.optimizer = AcceleratedOptimizer(torch.optim.SGD([weight], lr=1.0), device_placement=False, scaler=scaler)
    counts = []
    for _ in range(4):
        scaler.scale(weight.sum() * math.inf).backward()
        scaler.unscale_(trainer.optimizer.optimizer)
        assert not trainer.may_step(math.inf)
        counts.append(trainer.guard.bad_in_a_row)
        skip_next_step(trainer.optimizer)
        trainer.optimizer.step()
        assert trainer.optimizer.step_was_skipped
        trainer.optimizer.zero_grad()
    assert counts == [0, 0, 1, 2]  # at scales of 4, 2, 1 and 0.5
    assert weight.tolist() == [1, 1]
    scaler.scale(weight.sum()).backward()
    trainer.optimizer.step()
    assert weight.tolist() == [0, 0]
    assert not trainer.optimizer.step_was_skipped
