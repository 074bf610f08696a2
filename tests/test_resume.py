"""What a start does with its output folder, and what may change when a run goes on: the rules of docs/resuming.md."""

import json
import os
from pathlib import Path

import pytest
from support.small import REPOSITORY

from orpo_trl import ORPOConfig, checkpoints, resume_rules, run_folder
from orpo_trl.config import DataArguments, ModelArguments
from orpo_trl.recipe.keys import recipe_keys
from orpo_trl.resume import Asked, ResumeError, claim, make_room
from orpo_trl.resume_rules import settings_changes
from orpo_trl.yaml_text import to_yaml

SETTINGS = {"learning_rate": 1e-3, "beta": 0.5, "max_steps": 40, "dataset_name": "rows.jsonl", "seed": 42}


def write_run(folder: Path, settings=SETTINGS, steps=(4, 8), run="first", inputs=None, **record) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"id": run, "processes": 1, "inputs": inputs or {}, **record}
    run_folder.write_origin(folder, to_yaml(settings), {}, record)
    for step in steps:
        path = folder / f"checkpoint-{step}"
        path.mkdir()
        (path / "trainer_state.json").write_text("{}")
        checkpoints.seal(path, {"run": run, "step": step})
    return folder


def begin(folder: Path, settings=SETTINGS, resume="auto", **kwargs):
    start, lock = make_room(folder, *claim(Asked(folder, to_yaml(settings), resume, **kwargs)))
    lock.release()
    return start


def others(folder: Path) -> list[Path]:
    return [path for path in folder.parent.iterdir() if path != folder]


# ---- What a start does -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", None])
def test_a_new_folder_and_one_with_other_files_begin_a_run(tmp_path, mode):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for name in ("out", "absent/below"):
        start = begin(tmp_path / name, resume=mode)
        assert (start.checkpoint, start.is_continued, start.finished) == (None, False, "")
    assert (tmp_path / "out" / "notes.txt").exists()


def test_the_same_command_goes_on_from_the_latest_checkpoint(tmp_path):
    folder = write_run(tmp_path / "out")
    start = begin(folder)
    assert (start.run_id, start.checkpoint) == ("first", str(folder / "checkpoint-8"))
    assert start.record["id"] == "first"
    assert f"Going on with the run in {folder} from checkpoint-8." in start.notes


def test_a_cut_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path):
    folder = write_run(tmp_path / "out")
    (folder / "checkpoint-8" / "trainer_state.json").write_text("")
    start = begin(folder)
    assert start.checkpoint == str(folder / "checkpoint-4")
    assert any("checkpoint-8 is not whole (trainer_state.json: expected 2 bytes, found 0)" in x for x in start.notes)
    assert (folder / "_set_aside" / "checkpoint-8").is_dir()


def test_a_run_without_a_whole_checkpoint_begins_again_under_its_id(tmp_path):
    start = begin(write_run(tmp_path / "out", steps=()))
    assert (start.run_id, start.checkpoint, start.is_continued) == ("first", None, True)


def test_a_finished_run_with_the_same_settings_is_left_as_it_is(tmp_path):
    folder = write_run(tmp_path / "out", saved="2026-01-01", last_step=40)
    start = begin(folder)
    assert start.finished.startswith(f"The run in {folder} is finished: step 40, saved 2026-01-01. Nothing to do.")
    assert others(folder) == []


def test_a_finished_run_of_other_settings_is_set_aside_with_a_line_that_says_so(tmp_path):
    folder = write_run(tmp_path / "out", saved="2026-01-01")
    start = begin(folder, {**SETTINGS, "beta": 0.1})
    assert (start.is_continued, start.checkpoint, start.finished) == (False, None, "")
    assert start.run_id != "first"
    (moved,) = others(folder)
    assert moved.name.startswith("out_20")
    assert (moved / "checkpoint-8").is_dir()
    assert any("has a finished run of other settings (beta: 0.5 -> 0.1). It is now in" in note for note in start.notes)
    assert [path.name for path in folder.iterdir()] == ["_lock"]


def test_an_output_folder_that_is_a_link_stays_one(tmp_path):
    write_run(tmp_path / "disk" / "out", saved="2026-01-01")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    begin(tmp_path / "out", {**SETTINGS, "beta": 0.1})
    assert (tmp_path / "out").is_symlink()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["_lock"]
    assert len(others(tmp_path / "disk" / "out")) == 1


def test_a_finished_run_whose_data_file_has_changed_is_not_taken_for_the_same(tmp_path):
    rows = tmp_path / "data" / "rows.jsonl"
    rows.parent.mkdir()
    rows.write_text("{}\n")
    named = {"dataset_name": str(rows)}
    folder = write_run(tmp_path / "runs" / "out", saved="2026-01-01", inputs=resume_rules.digests_of(named))
    assert begin(folder, inputs=named).finished
    rows.write_text("{}\n{}\n")
    start = begin(folder, inputs=named)
    assert not start.finished
    assert any("the files of `dataset_name`" in note for note in start.notes)


def test_every_local_file_that_a_dataset_names_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    files = {name: tmp_path / name for name in ("a.jsonl", "_b.jsonl", "c.jsonl", "d/e.jsonl")}
    (tmp_path / "d").mkdir()
    data = DataArguments(
        datasets=[
            {"path": "~/a.jsonl"}, {"path": str(files["_b.jsonl"])},
            {"path": "json", "data_files": [str(files["c.jsonl"])]}, {"path": "json", "data_dir": str(tmp_path / "d")},
        ]
    )  # fmt: skip
    digests = []
    for changed in (None, *files):
        for name, path in files.items():
            path.write_text("changed\n" if name == changed else "{}\n")
        named = resume_rules.named_files(ModelArguments(), data, ORPOConfig("out"))
        digests.append(tuple(resume_rules.digests_of(named).items()))
    assert [len(found) for found in digests] == [4] * 5
    assert len(set(digests)) == 5


def test_an_unfinished_run_is_refused_without_resume_and_the_message_has_three_ways_out(tmp_path):
    folder = write_run(tmp_path / "out")
    with pytest.raises(ResumeError) as raised:
        begin(folder, resume=None)
    for way in ("`--resume auto`", "another `output_dir`", "`--overwrite_output_dir`", "checkpoint-8"):
        assert way in str(raised.value)
    assert (folder / "checkpoint-8").is_dir()


def test_overwrite_sets_the_old_run_aside(tmp_path):
    folder = write_run(tmp_path / "out")
    assert not begin(folder, resume=None, is_overwritten=True).is_continued
    assert len(others(folder)) == 1


def test_overwrite_with_resume_does_not_begin_again_at_each_requeue(tmp_path):
    folder = write_run(tmp_path / "out")
    assert begin(folder, is_overwritten=True).checkpoint == str(folder / "checkpoint-8")
    assert begin(folder, {**SETTINGS, "beta": 0.1}, is_overwritten=True).checkpoint is None
    assert len(others(folder)) == 1


def test_an_unfinished_run_without_checkpoints_gives_way_to_other_settings(tmp_path):
    folder = write_run(tmp_path / "out", steps=())
    assert not begin(folder, {**SETTINGS, "beta": 0.1}).is_continued
    assert len(others(folder)) == 1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"beta": 0.1}, "beta: 0.5 -> 0.1"),
        ({"seed": 1}, "seed: 42 -> 1"),
        ({"max_length": 64}, "max_length: 1024 -> 64"),
        ({"dataset_name": "other.jsonl"}, "dataset_name: rows.jsonl -> other.jsonl"),
        ({"nll_reduction": "sequence_mean"}, "nll_reduction: token_mean -> sequence_mean"),
        ({"use_peft": True}, "use_peft: false -> true"),
        ({"per_device_train_batch_size": 16}, "pairs of an optimiser step"),
        ({"global_batch_size": 16}, "pairs of an optimiser step"),
        ({"max_steps": 20}, "max_steps: 40 -> 20"),
        ({"learning_rate": 0.1, "lr_scheduler_type": "reduce_lr_on_plateau"}, "learning_rate: 0.001 -> 0.1"),
        ({"lr_scheduler_type": "greedy"}, "lr_scheduler_type: linear -> greedy"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size: false -> true"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_changes_the_training_is_refused_by_name_and_allowed_by_resume_anyway(tmp_path, changed, words):
    folder = write_run(tmp_path / "out")
    with pytest.raises(ResumeError) as raised:
        begin(folder, {**SETTINGS, **changed})
    assert words in str(raised.value)
    assert "--resume_anyway" in str(raised.value)
    start = begin(folder, {**SETTINGS, **changed}, is_anyway=True)
    assert start.checkpoint == str(folder / "checkpoint-8")
    assert any(words in note for note in start.notes)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"learning_rate": 1e-4}, "Changed: learning_rate: 0.001 -> 0.0001"),
        ({"lr_scheduler_type": "cosine"}, "Changed: lr_scheduler_type: linear -> cosine"),
        ({"max_steps": 60}, "Changed: max_steps: 40 -> 60"),
        ({"logging_steps": 7}, None),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, None),
        ({"per_device_train_batch_size": 4, "global_batch_size": 8}, None),
        ({"deepspeed": "zero3"}, "Changed: deepspeed: null -> zero3"),
        ({"load_best_model_at_end": True}, "Changed: load_best_model_at_end: false -> true"),
        ({"save_strategy": "epoch"}, None),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_may_change_is_applied_and_told_where_it_touches_the_weights(tmp_path, changed, told):
    folder = write_run(tmp_path / "out")
    start = begin(folder, {**SETTINGS, **changed})
    assert start.checkpoint == str(folder / "checkpoint-8")
    assert [note for note in start.notes if note.startswith("Changed")] == ([told] if told else [])
    assert {change.name for change in start.changes} == set(changed)


@pytest.mark.parametrize(
    ("kept", "changed"),
    [
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, {"lr_scheduler_kwargs": {"factor": 0.1}}),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, {"eval_steps": 7}),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, {"lr_scheduler_type": "linear"}),
        ({"lr_scheduler_type": "greedy"}, {"metric_for_best_model": "eval_nll_loss"}),
        ({"auto_find_batch_size": True}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        ({"train_sampling_strategy": "group_by_length"}, {"pair_layout": "padded"}),
        ({"train_sampling_strategy": "group_by_length"}, {"attn_implementation": "eager"}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_what_is_free_elsewhere_is_refused_where_it_decides_the_training(tmp_path, kept, changed):
    before = SETTINGS | kept
    with pytest.raises(ResumeError, match=next(iter(changed))):
        begin(write_run(tmp_path / "out", before), before | changed)
    begin(write_run(tmp_path / "same", before), before)


def test_another_number_of_processes_is_fine_at_the_same_pairs_a_step(tmp_path):
    folder = write_run(tmp_path / "out")
    start = begin(folder, {**SETTINGS, "per_device_train_batch_size": 4}, processes=2)
    assert start.checkpoint
    with pytest.raises(ResumeError, match="pairs of an optimiser step"):
        begin(folder, processes=2)


def test_a_checkpoint_of_another_run_in_the_folder_is_refused(tmp_path):
    folder = write_run(tmp_path / "out")
    other = write_run(tmp_path / "other", steps=(12,), run="second")
    (other / "checkpoint-12").rename(folder / "checkpoint-12")
    for how in ({}, {"checkpoint": str(folder / "checkpoint-12")}):
        with pytest.raises(ResumeError, match=r"checkpoint-12 is a checkpoint of another run \(second"):
            begin(folder, **how)


def test_checkpoints_of_another_program_are_not_taken_by_auto_but_by_hand(tmp_path):
    folder = tmp_path / "out"
    (folder / "checkpoint-4").mkdir(parents=True)
    with pytest.raises(ResumeError, match="checkpoints of another program"):
        begin(folder)
    assert begin(folder, checkpoint=True).checkpoint == str(folder / "checkpoint-4")


def test_a_checkpoint_of_another_folder_begins_a_run_by_its_path_alone(tmp_path):
    named = str(write_run(tmp_path / "other") / "checkpoint-4")
    start = begin(tmp_path / "out", checkpoint=named)
    assert (start.checkpoint, start.is_continued) == (named, False)
    folder = write_run(tmp_path / "mine", run="mine", began_at=named)
    with pytest.raises(ResumeError, match="has a run that did not finish"):
        begin(folder, checkpoint=named, resume=None)
    # The same command goes on with the run that it has begun, and says when that is finished.
    assert begin(folder, checkpoint=named).checkpoint == str(folder / "checkpoint-8")
    assert begin(write_run(tmp_path / "done", began_at=named, saved="2026-01-01"), checkpoint=named).finished


@pytest.mark.parametrize("began_at", [None, "checkpoint-4"])
def test_a_run_that_began_elsewhere_than_it_is_asked_to_is_not_gone_on_with(tmp_path, began_at):
    other = write_run(tmp_path / "other")
    named, folder = str(other / "checkpoint-8"), tmp_path / "out"
    write_run(folder, began_at=began_at and str(other / began_at))
    for is_anyway in (False, True):
        with pytest.raises(ResumeError, match=r"did not begin at .*checkpoint-8\. Leave the key out to go on"):
            begin(folder, checkpoint=named, is_anyway=is_anyway)
    # Without a way to go on, a run begins where the user says.
    start = begin(folder, checkpoint=named, is_overwritten=True)
    assert (start.checkpoint, start.is_continued) == (named, False)
    start = begin(write_run(tmp_path / "done", saved="2026-01-01"), checkpoint=named)
    assert (start.checkpoint, start.finished) == (named, "")
    assert len(others(folder)) == 4  # the two that were set aside, too


def test_a_checkpoint_in_a_folder_that_must_be_set_aside_is_not_lost_with_it(tmp_path):
    folder = write_run(tmp_path / "out", saved="2026-01-01")
    kept = folder / "kept" / "checkpoint-4"
    kept.parent.mkdir()
    (folder / "checkpoint-4").rename(kept)
    with pytest.raises(ResumeError, match="Move it out of there"):
        begin(folder, checkpoint=str(kept))
    assert kept.is_dir()


def test_a_run_that_began_elsewhere_and_has_no_checkpoint_yet_begins_there_again(tmp_path):
    named = str(write_run(tmp_path / "other") / "checkpoint-4")
    folder = write_run(tmp_path / "mine", run="mine", steps=(), began_at=named)
    for checkpoint in (named, None):
        start = begin(folder, checkpoint=checkpoint)
        assert (start.run_id, start.checkpoint) == ("mine", named)


def test_nothing_is_set_aside_before_there_is_something_to_train(tmp_path):
    folder = write_run(tmp_path / "out", saved="2026-01-01")
    start, lock = claim(Asked(folder, to_yaml({**SETTINGS, "beta": 0.1}), "auto"))
    assert "has a finished run" in start.in_the_way
    assert others(folder) == []
    begun, held = make_room(folder, start, lock)
    assert (begun.in_the_way, len(others(folder))) == ("", 1)
    assert json.loads((folder / "_lock").read_text())["pid"] == os.getpid()
    held.release()


@pytest.mark.parametrize("how", [{}, {"checkpoint": True}], ids=["auto", "by hand"])
def test_later_checkpoints_of_steps_that_are_taken_back_are_set_aside(tmp_path, how):
    folder = write_run(tmp_path / "out", steps=(4, 8, 12))
    start = begin(folder, checkpoint=str(folder / "checkpoint-4"))
    assert start.checkpoint == str(folder / "checkpoint-4")
    assert any("checkpoint-12 is of a later step" in note for note in start.notes)
    assert sorted(path.name for path in (folder / "_set_aside").iterdir()) == ["checkpoint-12", "checkpoint-8"]
    assert begin(folder, **how).checkpoint == str(folder / "checkpoint-4")


@pytest.mark.parametrize("checkpoint", [True, "checkpoint-8"])
def test_a_damaged_checkpoint_is_not_taken_by_hand_either(tmp_path, checkpoint):
    folder = write_run(tmp_path / "out", steps=(8,))
    (folder / "checkpoint-8" / "trainer_state.json").unlink()
    named = checkpoint if checkpoint is True else str(folder / checkpoint)
    with pytest.raises(ResumeError, match=r"is not whole: trainer_state.json is missing|found none"):
        begin(folder, checkpoint=named)


def test_a_run_of_an_earlier_version_is_not_begun_again(tmp_path):
    folder = write_run(tmp_path / "out", steps=())
    record = run_folder.read_record(folder)
    run_folder.write_record(folder, {key: value for key, value in record.items() if key != "id"})
    (folder / "checkpoint-4").mkdir()
    with pytest.raises(ResumeError, match="or of an earlier version"):
        begin(folder)
    assert (folder / "checkpoint-4").is_dir()
    run_folder.write_record(folder, {"processes": 1, "finished": "2025-01-01", "last_step": 40})
    assert "saved 2025-01-01" in begin(folder).finished


def test_names_of_environment_variables_are_compared_as_they_stand(tmp_path):
    named = {**SETTINGS, "per_device_train_batch_size": "${BS}", "gradient_accumulation_steps": "${GA}"}
    folder = write_run(tmp_path / "out", {**named, "max_steps": "${N}"})
    assert begin(folder, {**named, "max_steps": "${N}"}).checkpoint
    with pytest.raises(ResumeError, match="pairs of an optimiser step"):
        begin(folder, {**named, "per_device_train_batch_size": 8, "max_steps": "${N}"})


def test_the_split_of_a_batch_is_part_of_the_loss_with_micro_batch_mean(tmp_path):
    before = {**SETTINGS, "nll_reduction": "micro_batch_mean"}
    folder = write_run(tmp_path / "out", before)
    with pytest.raises(ResumeError, match="8 in micro-batches of 8 -> 8 in micro-batches of 4"):
        begin(folder, {**before, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2})


def test_a_changed_file_of_a_stream_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    named = {"dataset_name": str(tmp_path / "rows.jsonl")}
    stream = {**SETTINGS, "dataset_streaming": True}
    folder = write_run(tmp_path / "out", stream, inputs=resume_rules.digests_of(named))
    (tmp_path / "rows.jsonl").write_text("{} ")
    with pytest.raises(ResumeError, match="the files of `dataset_name`"):
        begin(folder, stream, inputs=named)


def test_fewer_steps_than_epochs_gave_are_refused(tmp_path):
    folder = write_run(tmp_path / "out", {**SETTINGS, "max_steps": -1})
    run_folder.write_record(folder, {**run_folder.read_record(folder), "max_steps": 40})
    with pytest.raises(ResumeError, match="max_steps: -1 -> 5"):
        begin(folder, {**SETTINGS, "max_steps": 5})
    assert begin(folder, {**SETTINGS, "max_steps": 50}).checkpoint


@pytest.mark.parametrize("checkpoint", [True, "absent"])
def test_a_checkpoint_that_is_asked_for_and_absent_is_an_error(tmp_path, checkpoint):
    with pytest.raises(ResumeError, match="`resume_from_checkpoint`: expected "):
        begin(tmp_path / "out", checkpoint=checkpoint)


def test_a_damaged_record_is_named(tmp_path):
    folder = write_run(tmp_path / "out")
    (folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json: expected JSON"):
        begin(folder)


def test_the_folder_that_we_are_in_is_not_set_aside(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "out", saved="2026-01-01")
    monkeypatch.chdir(folder)
    with pytest.raises(ResumeError, match="holds the current folder"):
        begin(folder, {**SETTINGS, "beta": 0.1})


# ---- What differs ----------------------------------------------------------------------------------------------------


def test_every_name_in_the_rules_is_a_key():
    newer = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # than transformers 5.17
    assert (resume_rules.FREE | resume_rules.REPORTED) - set(recipe_keys()) <= newer
    assert not resume_rules.FREE & resume_rules.REPORTED


def test_a_key_that_the_rules_do_not_name_is_refused():
    (change,) = settings_changes({}, {"some_new_key": 1})
    assert change.is_refused


def test_a_value_that_is_written_out_is_the_default():
    assert list(settings_changes({}, {"beta": 0.1, "learning_rate": 5e-6, "max_length": 1024})) == []


def test_the_table_of_the_docs_is_the_rules():
    text = (REPOSITORY / "docs" / "resuming.md").read_text(encoding="utf-8")
    for name in resume_rules.REPORTED:
        assert f"`{name}`" in text, name


def test_pairs_and_tokenizer_that_differ_are_refused():
    before = {"datasets": {"train": {"rows": 5, "sha256": "a" * 64}}, "tokenizer": "c" * 64}
    assert list(resume_rules.facts_changes(before, before)) == []
    after = {"datasets": {"train": {"rows": 6, "sha256": "b" * 64}}, "tokenizer": "d" * 64}
    changes = list(resume_rules.facts_changes(before, after))
    assert [change.name for change in changes] == ["the training pairs", "the tokenizer or its chat template"]
    assert all(change.is_refused for change in changes)
    # A stream has no fingerprint, and runs of earlier versions have none of the tokenizer.
    assert list(resume_rules.facts_changes({}, after)) == []


@pytest.mark.parametrize(
    ("facts", "sharding", "processes", "words"),
    [
        ({"sharding": "none", "processes": 2}, "none", 1, None),
        ({"sharding": "fsdp", "processes": 2}, "fsdp", 4, None),
        ({"sharding": "zero3", "processes": 2}, "zero3", 2, None),
        ({"sharding": "zero3", "processes": 2}, "zero3", 4, "with 2 processes only, and this start has 4"),
        ({"sharding": "zero3", "processes": 2}, "none", 2, "it was written under zero3"),
        ({}, "zero3", 4, None),
    ],
    ids=str,
)
def test_a_checkpoint_that_the_engine_cannot_read_is_named(facts, sharding, processes, words):
    problem = resume_rules.sharding_problem(facts, sharding, processes)
    assert problem is None if words is None else words in (problem or "")


def test_digests_know_content_and_the_head_of_weights(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(2 * 2**20))
    (tmp_path / "model" / "config.json").write_text(json.dumps({"a": 1}))
    named = {"model_name_or_path": str(tmp_path / "model"), "dataset_name": "a/hub-id"}
    first = resume_rules.digests_of(named)
    assert list(first) == ["model_name_or_path"]
    (tmp_path / "model" / "_lock").write_text("x")
    assert resume_rules.digests_of(named) == first
    (tmp_path / "model" / "config.json").write_text(json.dumps({"a": 2}))
    assert resume_rules.digests_of(named) != first
