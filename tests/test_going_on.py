"""A run that is cut off goes on by the same call, as if nothing had happened; in one process."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig
from support.small import make_dataset, settings, tiny_model
from transformers import TrainerCallback

from orpo_trl import ORPOTrainer
from orpo_trl.checkpoints import SaveError, checkpoints_of, read, seal
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


class StopAt(TrainerCallback):
    """Stops at the end of a step, as a signal before it does."""

    trainer: ORPOTrainer

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.trainer._stop._limit = 0


def run(
    tokenizer, folder, crash_at=None, rows=40, peft_config=None, checkpoint=None, stop_at=None, eval_rows=6, **kwargs
) -> ORPOTrainer:
    stop = StopAt(stop_at)
    trainer = stop.trainer = ORPOTrainer(
        tiny_model(), settings(folder, **{**OPTIONS, **kwargs}), train_dataset=make_dataset(rows),
        eval_dataset=make_dataset(eval_rows, seed=1), processing_class=tokenizer,
        callbacks=[CrashAt(crash_at), stop], peft_config=peft_config,
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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_steps": -1, "num_train_epochs": 0.5}, "optimiser steps: 9 -> 5"),
        ({"max_steps": -1, "num_train_epochs": 0.5, "resume_anyway": True}, "Nothing would be trained"),
    ],
)
def test_fewer_steps_than_before_are_refused_however_they_are_set(tokenizer, tmp_path, options, said):
    crash(tokenizer, tmp_path, 7, num_train_epochs=0.5)
    with pytest.raises(ResumeError, match=said):
        run(tokenizer, tmp_path, **options)
    assert "finished" not in json.loads((tmp_path / "run.json").read_text())


def test_a_run_that_begins_at_the_last_step_of_another_is_not_finished_untrained(tokenizer, tmp_path):
    run(tokenizer, tmp_path / "first")
    named = str(tmp_path / "first" / "checkpoint-9")
    for steps in (6, 9):
        with pytest.raises(ResumeError, match=f"checkpoint-9 is of step 9, and this run has {steps} steps"):
            run(tokenizer, tmp_path / str(steps), checkpoint=named, max_steps=steps)
    run(tokenizer, tmp_path / "done", max_steps=3).save_model()
    with pytest.raises(ResumeError, match="Nothing would be trained"):
        run(tokenizer, tmp_path / "done", checkpoint=named, max_steps=6)
    assert (tmp_path / "done" / "model.safetensors").is_file()  # not set aside
    trainer = run(tokenizer, tmp_path / "more", checkpoint=named, max_steps=12)
    assert trainer.state.global_step == 12


@pytest.mark.parametrize("changed", ["rows", "beta", "folder"])
def test_the_best_figure_of_something_else_does_not_stand(tokenizer, tmp_path, changed):
    """A loss of 0, which nothing can beat, stands in the checkpoint."""
    crash(tokenizer, tmp_path, 8, load_best_model_at_end=True)
    path = tmp_path / "checkpoint-6" / "trainer_state.json"
    state = json.loads(path.read_text()) | {"best_metric": 0.0, "best_global_step": 3}
    path.write_text(json.dumps(state))
    seal(tmp_path / "checkpoint-6", read(tmp_path / "checkpoint-6").facts)
    options = {"load_best_model_at_end": True}
    if changed == "folder":
        shutil.rmtree(tmp_path / "checkpoint-3")
    elif changed == "beta":
        options |= {"beta": 0.9, "resume_anyway": True}
    trainer = run(tokenizer, tmp_path, eval_rows=5 if changed == "rows" else 6, **options)
    assert trainer.state.best_global_step == 9
    assert trainer.state.best_metric > 0


def test_a_best_figure_of_the_same_stands(tokenizer, tmp_path):
    crash(tokenizer, tmp_path, 8, load_best_model_at_end=True, learning_rate=10.0)
    before = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    trainer = run(tokenizer, tmp_path, load_best_model_at_end=True, learning_rate=10.0)
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (3, before["best_metric"])


def test_a_stop_at_the_end_of_an_epoch_keeps_its_evaluation(tokenizer, tmp_path):
    """The same best model as without the stop."""
    epochs = {"max_steps": -1, "num_train_epochs": 3, "eval_strategy": "epoch", "save_strategy": "epoch"}
    options = {**epochs, "load_best_model_at_end": True}
    whole = run(tokenizer, tmp_path / "whole", rows=12, **options)
    for step in (3, 9):  # of 3 in an epoch
        stopped = run(tokenizer, tmp_path / "out", rows=12, stop_at=step, **options)
        assert stopped.interruption is not None
        assert stopped.state.global_step == step
        assert "eval_loss" in stopped.state.log_history[-1]
    again = run(tokenizer, tmp_path / "out", rows=12, **options)
    assert again.state.best_global_step == whole.state.best_global_step
    for name, weight in weights(whole).items():
        assert torch.equal(weight, again.model.state_dict()[name]), name
    assert logged(tmp_path / "out") == logged(tmp_path / "whole")


def test_a_stop_has_a_checkpoint_where_the_best_alone_are_saved(tokenizer, tmp_path):
    """A loss that rises is no new best one."""
    options = {
        "save_strategy": "best", "metric_for_best_model": "eval_loss", "learning_rate": 10.0, "eval_steps": 2,
        "warmup_steps": 0,
    }  # fmt: skip
    stopped = run(tokenizer, tmp_path, stop_at=4, **options)
    assert stopped.state.best_global_step < 4
    assert checkpoints_of(tmp_path)[0].step == 4


def test_a_run_of_fp16_goes_on_without_its_loss_scale(tokenizer, tmp_path):
    crash(tokenizer, tmp_path, 4)
    torch.save({"scale": 65536.0}, tmp_path / "checkpoint-3" / "scaler.pt")
    seal(tmp_path / "checkpoint-3", read(tmp_path / "checkpoint-3").facts)
    assert run(tokenizer, tmp_path).state.global_step == 9


def test_a_retry_of_auto_find_batch_size_does_not_train_trained_weights_again(tokenizer, tmp_path):
    class OutOfMemory(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    trainer = ORPOTrainer(
        tiny_model(), settings(tmp_path, max_steps=4, auto_find_batch_size=True), train_dataset=make_dataset(16),
        processing_class=tokenizer, callbacks=[OutOfMemory()],
    )  # fmt: skip
    with pytest.raises(ResumeError, match="After 2 steps a batch did not fit into memory"):
        trainer.train()


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
