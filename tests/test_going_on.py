"""A run that is cut off goes on by the same call, as if nothing had happened; in one process."""

import json

import pytest
import torch
from peft import LoraConfig
from support.small import make_dataset, settings, tiny_model
from transformers import TrainerCallback

from orpo_trl import ORPOTrainer
from orpo_trl.checkpoints import SaveError, checkpoints_of
from orpo_trl.resume import ResumeError
from orpo_trl.run_folder import read_lines, read_settings

OPTIONS = {
    "max_steps": 9, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "resume": "auto",
    "lr_scheduler_type": "cosine", "warmup_steps": 2, "eval_strategy": "steps", "eval_steps": 3,
}  # fmt: skip


class Crash(RuntimeError):
    pass


class CrashAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Crash


def run(tokenizer, folder, crash_at=None, rows=40, peft_config=None, checkpoint=None, **kwargs) -> ORPOTrainer:
    trainer = ORPOTrainer(
        tiny_model(), settings(folder, **{**OPTIONS, **kwargs}), train_dataset=make_dataset(rows),
        eval_dataset=make_dataset(6, seed=1), processing_class=tokenizer, callbacks=[CrashAt(crash_at)],
        peft_config=peft_config,
    )  # fmt: skip
    trainer.output = trainer.train(checkpoint)
    return trainer


def crash(tokenizer, folder, step, **kwargs):
    with pytest.raises(Crash):
        run(tokenizer, folder, step, **kwargs)


def weights(trainer):
    return {name: weight.clone() for name, weight in trainer.model.state_dict().items()}


def logged(folder):
    clock = ("runtime", "per_second", "memory", "flos")
    return [
        {name: value for name, value in log.items() if not any(part in name for part in clock)}
        for log in read_lines(folder / "metrics.jsonl")
    ]


def test_a_run_that_crashes_twice_equals_one_that_does_not(tokenizer, tmp_path):
    whole = run(tokenizer, tmp_path / "whole")
    folder = tmp_path / "out"
    crash(tokenizer, folder, 2)  # before the first checkpoint
    first = json.loads((folder / "run.json").read_text())["id"]
    crash(tokenizer, folder, 8)
    again = run(tokenizer, folder)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, again.model.state_dict()[name]), name
    assert logged(folder) == logged(tmp_path / "whole")
    assert again.output.training_loss == whole.output.training_loss
    record = json.loads((folder / "run.json").read_text())
    assert record["id"] == first
    assert [entry["from_step"] for entry in record["history"]] == [0, 6]
    assert {found.facts["run"] for found in checkpoints_of(folder)} == {first}


def test_train_loss_is_the_mean_over_all_steps(tokenizer, tmp_path):
    trainer = run(tokenizer, tmp_path, logging_steps=1)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 9
    assert trainer.output.training_loss == pytest.approx(sum(losses) / 9, rel=1e-12)
    # With other logging steps, the same up to the fp32 sums of the Trainer.
    other = run(tokenizer, tmp_path / "other", logging_steps=4)
    assert other.output.training_loss == pytest.approx(trainer.output.training_loss, rel=1e-6)


def test_steps_between_the_last_log_and_a_checkpoint_are_logged(tokenizer, tmp_path):
    run(tokenizer, tmp_path)
    assert [log["step"] for log in read_lines(tmp_path / "metrics.jsonl") if "loss" in log] == [2, 3, 4, 6, 8, 9]


def test_a_changed_learning_rate_is_applied_as_if_it_had_been_from_the_beginning(tokenizer, tmp_path):
    """Also weight decay, which the optimizer's state in the checkpoint has as well."""
    changed = {"learning_rate": 3e-3, "weight_decay": 0.1, "warmup_steps": 4}
    whole = run(tokenizer, tmp_path / "whole", **changed)
    folder = tmp_path / "out"
    crash(tokenizer, folder, 7)
    trainer = run(tokenizer, folder, **changed)
    rates = {log["step"]: log["learning_rate"] for log in whole.state.log_history if "learning_rate" in log}
    found = {log["step"]: log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log}
    assert {step: found[step] for step in (8, 9)} == {step: rates[step] for step in (8, 9)}
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.1, 0.0}
    values, text = read_settings(folder)
    assert values["learning_rate"] == 3e-3
    assert "from step 6: learning_rate: 0.01 -> 0.003" in text


def test_changed_intervals_are_those_of_this_start(tokenizer, tmp_path):
    crash(tokenizer, tmp_path, 4)
    run(tokenizer, tmp_path, logging_steps=1, save_steps=2, eval_steps=4)
    logs = read_lines(tmp_path / "metrics.jsonl")
    assert [log["step"] for log in logs if "loss" in log] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert [log["step"] for log in logs if "eval_loss" in log] == [3, 4, 8, 9]
    assert {found.step for found in checkpoints_of(tmp_path)} == {3, 4, 6, 8, 9}


def test_the_best_checkpoint_is_the_best_by_the_metric_of_this_start(tokenizer, tmp_path):
    """The loss falls below 7. A mean log-probability, which rises, stays below 0."""
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    crash(tokenizer, tmp_path / "out", 7, **options)
    other = {"metric_for_best_model": "eval_logps/chosen", "greater_is_better": True}
    trainer = run(tokenizer, tmp_path / "out", **options | other)
    logs = {log["step"]: log["eval_logps/chosen"] for log in trainer.state.log_history if "eval_loss" in log}
    assert trainer.state.best_metric == logs[9] == max(logs.values())
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-9")
    # A run that begins at a checkpoint of another one has no best figure yet.
    named = str(tmp_path / "out" / "checkpoint-6")
    trainer = run(tokenizer, tmp_path / "next", checkpoint=named, learning_rate=10.0, **options)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "next" / "checkpoint-9")


def test_the_recipe_is_not_written_again_where_nothing_has_changed(tokenizer, tmp_path):
    crash(tokenizer, tmp_path, 4)
    (tmp_path / "recipe.yaml").write_text((tmp_path / "recipe.yaml").read_text() + "# my note\n")
    run(tokenizer, tmp_path)
    assert "# my note" in (tmp_path / "recipe.yaml").read_text()


def test_other_rows_are_refused_before_anything_is_trained(tokenizer, tmp_path):
    crash(tokenizer, tmp_path, 4)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ResumeError, match=r"the training pairs: 40 pairs, SHA-256 .* -> 41 pairs"):
        run(tokenizer, tmp_path, rows=41)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    run(tokenizer, tmp_path, rows=41, resume_anyway=True)


def test_another_template_is_refused(tokenizer, tmp_path):
    crash(tokenizer, tmp_path, 4)
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ResumeError, match="the tokenizer or its chat template"):
        run(tokenizer, tmp_path)


def test_a_finished_run_is_not_trained_again(tokenizer, tmp_path):
    run(tokenizer, tmp_path).save_model()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ResumeError, match=r"is finished: step 9.* Nothing to do"):
        run(tokenizer, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_run_that_began_at_a_checkpoint_of_another_goes_on_and_is_finished_by_the_same_call(tokenizer, tmp_path):
    run(tokenizer, tmp_path / "first").save_model()
    named = str(tmp_path / "first" / "checkpoint-3")
    for step in (4, 6):  # before the first checkpoint, and after it
        crash(tokenizer, tmp_path / "second", step, checkpoint=named, save_steps=5)
    assert min(log["step"] for log in read_lines(tmp_path / "second" / "metrics.jsonl")) == 4
    trainer = run(tokenizer, tmp_path / "second", checkpoint=named, save_steps=5)
    assert trainer.start.checkpoint == str(tmp_path / "second" / "checkpoint-5")
    trainer.save_model()
    with pytest.raises(ResumeError, match="is finished: step 9"):
        run(tokenizer, tmp_path / "second", checkpoint=named, save_steps=5)
    # In the folder of a finished run, too, a run begins where the call says.
    trainer = run(tokenizer, tmp_path / "first", checkpoint=str(tmp_path / "second" / "checkpoint-5"))
    assert [log["step"] for log in trainer.state.log_history if "learning_rate" in log][-1] == 9
    assert min(log["step"] for log in read_lines(tmp_path / "first" / "metrics.jsonl")) == 6


def test_a_folder_that_was_moved_keeps_its_best_checkpoint(tokenizer, tmp_path):
    whole = run(tokenizer, tmp_path / "whole", load_best_model_at_end=True)
    crash(tokenizer, tmp_path / "a", 8, load_best_model_at_end=True)
    (tmp_path / "a").rename(tmp_path / "b")
    again = run(tokenizer, tmp_path / "b", load_best_model_at_end=True)
    best = whole.state.best_model_checkpoint
    assert best.startswith(str(tmp_path / "whole"))
    assert again.state.best_model_checkpoint == best.replace(str(tmp_path / "whole"), str(tmp_path / "b"))


def test_another_adapter_is_refused(tokenizer, tmp_path):
    def lora(alpha):
        return LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"], task_type="CAUSAL_LM")

    crash(tokenizer, tmp_path, 4, peft_config=lora(4))
    with pytest.raises(ResumeError, match="the settings of the adapter"):
        run(tokenizer, tmp_path, peft_config=lora(8))
    run(tokenizer, tmp_path, peft_config=lora(4))


def test_the_best_checkpoint_has_its_place_in_the_folder(tokenizer, tmp_path):
    trainer = run(tokenizer, tmp_path, load_best_model_at_end=True, save_total_limit=1)
    best = trainer.state.best_model_checkpoint
    assert best in [str(found.path) for found in checkpoints_of(tmp_path)]
    state = json.loads((tmp_path / "checkpoint-9" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best
    assert not (tmp_path / "_incomplete").exists()


def test_models_alone_are_not_gone_on_from(tokenizer, tmp_path, caplog):
    crash(tokenizer, tmp_path, 7, save_only_model=True)
    caplog.set_level("INFO", "orpo_trl")
    trainer = run(tokenizer, tmp_path, save_only_model=True)
    assert trainer.start.checkpoint is None
    assert "checkpoint-6 has no optimizer state (`save_only_model`): it is not used." in caplog.text


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tokenizer, tmp_path):
    """A file in place of the folder in which checkpoints are made: not even root can write into that."""

    class Block(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                (tmp_path / "_incomplete").write_text("")

    trainer = ORPOTrainer(
        tiny_model(), settings(tmp_path, **OPTIONS), train_dataset=make_dataset(40), processing_class=tokenizer,
        eval_dataset=make_dataset(6, seed=1), callbacks=[Block()],
    )  # fmt: skip
    with pytest.raises(SaveError, match=r"The checkpoint of step 6 could not be written: .*untouched"):
        trainer.train()
    (tmp_path / "_incomplete").unlink()
    assert [found.step for found in checkpoints_of(tmp_path)] == [3]
    assert run(tokenizer, tmp_path).start.checkpoint == str(tmp_path / "checkpoint-3")
