"""Checkpoints on disk: whole ones, cut ones, and what becomes of them."""

import json
import os

import pytest

from orpo_trl import checkpoints
from orpo_trl.checkpoints import COMPLETE, INCOMPLETE, SET_ASIDE


def written(folder, step, run="a", seal=True):
    path = folder / f"checkpoint-{step}"
    (path / "global_step").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"x" * 100)
    (path / "global_step" / "shard.pt").write_bytes(b"y" * 50)
    (path / "trainer_state.json").write_text("{}")
    if seal:
        checkpoints.seal(path, {"run": run, "step": step})
    return path


def test_a_sealed_checkpoint_is_whole_and_keeps_its_facts(tmp_path):
    (found,) = checkpoints.checkpoints_of(written(tmp_path, 4).parent)
    assert (found.step, found.problem, found.facts) == (4, None, {"run": "a", "step": 4})


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: (path / "model.safetensors").write_bytes(b"x" * 99), "expected 100 bytes, found 99"),
        (lambda path: (path / "global_step" / "shard.pt").unlink(), "global_step/shard.pt is missing"),
        (lambda path: (path / COMPLETE).unlink(), "complete.json is missing"),
        (lambda path: (path / COMPLETE).write_text('{"files": '), "complete.json cannot be read"),
        (lambda path: (path / COMPLETE).write_text("[1]"), "complete.json cannot be read"),
        (lambda path: (path / COMPLETE).write_text("{}"), "complete.json cannot be read"),
    ],
    ids="cut deleted unsealed half-json list empty".split(),
)
def test_a_damaged_checkpoint_is_not_whole_and_is_set_aside_by_name(tmp_path, damage, problem):
    path = written(tmp_path, 4)
    damage(path)
    (found,) = checkpoints.checkpoints_of(tmp_path)
    assert problem in (found.problem or "")
    place = checkpoints.set_aside(path)
    assert place == tmp_path / SET_ASIDE / "checkpoint-4"
    assert not path.exists()
    assert checkpoints.checkpoints_of(tmp_path) == []
    assert checkpoints.set_aside(written(tmp_path, 4)).name == "checkpoint-4.2"


def test_the_latest_comes_first_by_number(tmp_path):
    for step in (100, 9, 20):
        written(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert [found.step for found in checkpoints.checkpoints_of(tmp_path)] == [100, 20, 9]


def test_a_link_is_not_a_checkpoint(tmp_path):
    written(tmp_path / "other", 4)
    os.symlink(tmp_path / "other" / "checkpoint-4", tmp_path / "checkpoint-4")
    (found,) = checkpoints.checkpoints_of(tmp_path)
    assert found.problem == "it is a symbolic link"


def test_publish_takes_the_place_of_a_checkpoint_of_the_same_step(tmp_path):
    written(tmp_path, 4, run="old")
    new = written(tmp_path / INCOMPLETE, 4, run="new")
    checkpoints.publish(new, tmp_path / "checkpoint-4")
    (found,) = checkpoints.checkpoints_of(tmp_path)
    assert found.facts["run"] == "new"
    assert list((tmp_path / INCOMPLETE).iterdir()) == []


def test_a_sealed_checkpoint_that_was_not_renamed_is_recovered_and_others_are_not(tmp_path):
    written(tmp_path / INCOMPLETE, 8)
    written(tmp_path / INCOMPLETE, 12, seal=False)
    assert checkpoints.recover(tmp_path) == [tmp_path / "checkpoint-8"]
    assert [found.step for found in checkpoints.checkpoints_of(tmp_path)] == [8]


@pytest.mark.parametrize(
    ("limit", "kept", "expected"),
    [
        (None, [], [40, 30, 20, 10]),
        (0, [], [40, 30, 20, 10]),
        (2, [], [40, 30]),
        (2, ["/elsewhere/checkpoint-10"], [40, 10]),
        (1, ["checkpoint-10"], [40, 10]),
        (1, [None], [40]),
        (9, [], [40, 30, 20, 10]),
    ],
)
def test_the_oldest_go_beyond_the_limit_but_never_the_latest_or_the_best(tmp_path, limit, kept, expected):
    for step in (10, 20, 30, 40):
        written(tmp_path, step)
    checkpoints.remove_old(tmp_path, limit, kept)
    assert [found.step for found in checkpoints.checkpoints_of(tmp_path)] == expected
    assert not list(tmp_path.glob(f"{INCOMPLETE}/*"))


def test_files_of_a_model_move_with_the_config_last(tmp_path, monkeypatch):
    made = tmp_path / INCOMPLETE / "model"
    (made / "adapter").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "adapter/adapter_config.json", "adapter/weights"):
        (made / name).write_text(name)
    (tmp_path / "run.json").write_text("{}")
    moved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(b.name), replace(a, b)))
    checkpoints.move_model(made, tmp_path)
    assert set(moved[:2]) == {"weights", "model.safetensors"}
    assert (tmp_path / "adapter" / "weights").read_text() == "adapter/weights"
    assert json.loads((tmp_path / "run.json").read_text()) == {}
    assert not made.exists()
