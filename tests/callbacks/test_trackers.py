"""wandb offline and TensorBoard, read back from their files."""

import json
import math
import os
import socket
import struct
import threading

import pytest
import wandb
import yaml
from support.small import make_dataset, settings, tiny_model
from support.wandb_file import read_offline_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from orpo_trl import ORPOTrainer, trainer_checks
from orpo_trl.callbacks.trackers import TrackerError

SECRETS = {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "HF_TOKEN": "hf_abcdefghijklmnop"}
USER = "carolinemiller"
OPTIONS = {
    "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
    "generate_during_eval": True, "report_to": ["wandb", "tensorboard"], "wandb_mode": "offline", "project": "animals",
    "run_name": "first", "run_group": "pets", "run_tags": ["cat", "dog"],
}  # fmt: skip
SINGLE_VALUES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user with a name, a home, a token and a key."""
    home = tmp_path / "home" / USER
    home.mkdir(parents=True)
    values = {"HOME": str(home), "USER": USER, "LOGNAME": USER, "WANDB_DIR": str(tmp_path), **SECRETS}
    values["WANDB_PROJECT"] = "of the environment"  # the settings have another
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)
    wandb.teardown()
    yield home
    wandb.finish()
    wandb.teardown()
    os.environ.pop("WANDB_DATA_DIR", None)


def run(tokenizer, folder, resume=None, **kwargs) -> ORPOTrainer:
    trainer = ORPOTrainer(
        tiny_model(), settings(folder, **{**OPTIONS, **kwargs}), train_dataset=make_dataset(12),
        eval_dataset=make_dataset(3, seed=1), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    wandb.finish()
    return trainer


def rewritten(log: dict) -> dict:
    """The names that transformers' integrations give: eval/…, train/…."""
    return {f"eval/{k[5:]}" if k.startswith("eval_") else f"train/{k}": v for k, v in log.items() if k != "step"}


def test_wandb_and_tensorboard_hold_every_metric_and_a_run_that_resumes_goes_on(tokenizer, tmp_path, home):
    output = tmp_path / "out"
    trainer = run(tokenizer, output)
    history = trainer.state.log_history
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    found = read_offline_run(folder)
    about = found["run"]
    assert {name: about[name] for name in ("name", "group", "tags", "project")} == {
        "name": "first", "group": "pets", "tags": ["cat", "dog"], "project": "animals"
    }  # fmt: skip
    for log in history:
        expected = {k: v for k, v in rewritten(log).items() if k.removeprefix("train/") not in SINGLE_VALUES}
        assert any(
            entry.get("train/global_step") == log["step"] and expected.items() <= entry.items()
            for entry in found["history"]
        ), log
    assert found["config"]["recipe"] == yaml.safe_load((output / "recipe.yaml").read_text())
    assert (found["config"]["beta"], found["config"]["hidden_size"]) == (0.1, 32)

    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    tables = [json.loads(path.read_text()) for path in folder.rglob("*.table.json")]
    assert len(samples) == 2 * 3
    for sample in samples:  # of the report alone
        assert (sample.pop("last_turn"), sample.pop("special_tokens")) == (None, [])
    assert sorted([list(sample.values()) for sample in samples]) == sorted(row for t in tables for row in t["data"])
    assert {tuple(table["columns"]) for table in tables} == {tuple(samples[0])}

    (events,) = (output / "runs").iterdir()
    check_scalars(events, history)

    again = run(tokenizer, output, resume=str(output / "checkpoint-2"))
    other = next(path for path in tmp_path.glob("wandb/offline-run-*") if path != folder)
    resumed = read_offline_run(other)
    assert resumed["run"] == found["run"]
    # The first start has sent steps 3 and 4 already; they are not doubled.
    assert [entry["train/global_step"] for entry in resumed["history"] if "train/loss" in entry] == []
    assert list((output / "runs").iterdir()) == [events]
    check_scalars(events, again.state.log_history)

    for path in tmp_path.rglob("*"):
        if path.is_file() and home not in path.parents:
            for secret in (*SECRETS.values(), USER):
                assert secret.encode() not in path.read_bytes(), path


def check_scalars(events, history: list[dict]) -> None:
    """TensorBoard keeps a step's last value; it counts in fp32."""
    accumulator = EventAccumulator(str(events)).Reload()
    for log in history:
        for name, value in rewritten(log).items():
            values = {event.step: event.value for event in accumulator.Scalars(name)}
            assert values[log["step"]] == pytest.approx(value, rel=1e-6, abs=1e-7), name
    assert "beta" in accumulator.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()


def test_new_run_is_a_new_wandb_run(tokenizer, tmp_path, home):
    for _ in range(2):
        run(tokenizer, tmp_path / "out", max_steps=1, report_to=["wandb"], save_strategy="no", eval_strategy="no")
    ids = [read_offline_run(folder)["run"]["id"] for folder in tmp_path.glob("wandb/offline-run-*")]
    assert len(set(ids)) == 2


def test_wandb_that_is_disabled_writes_nothing(tokenizer, tmp_path, home):
    trainer = run(tokenizer, tmp_path / "out", wandb_mode="disabled", max_steps=2)
    assert not (tmp_path / "wandb").exists()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    assert (tmp_path / "out" / "metrics.jsonl").exists()


def test_run_is_named_after_its_folder_unless_it_has_a_name(tmp_path):
    assert settings(tmp_path / "pets").run_name == "pets"
    assert settings(tmp_path / "pets", run_name="mine").run_name == "mine"


def test_trackio(tokenizer, tmp_path, monkeypatch):
    """Local, without a Space; read back through trackio's own API."""
    trackio = pytest.importorskip("trackio")
    from trackio import sqlite_storage

    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    trainer = ORPOTrainer(
        tiny_model(), settings(tmp_path / "out", max_steps=2, report_to=["trackio"], project="animals", run_name="t"),
        train_dataset=make_dataset(8), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    logs = sqlite_storage.SQLiteStorage.get_logs("animals", "t")
    assert trackio
    losses = [log["train/loss"] for log in logs if "train/loss" in log]
    assert losses == [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_wandb_that_cannot_start_says_what_to_do(tokenizer, tmp_path, home, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(TrackerError, match=r"`report_to: wandb`: No API key .* `wandb_mode: offline`"):
        run(tokenizer, tmp_path / "out", wandb_mode="online", report_to=["wandb"], eval_strategy="no")


def test_tracker_that_is_not_installed_is_named(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(trainer_checks._TRACKERS, "trackio", lambda: False)
    with pytest.raises(ImportError, match=r"`report_to: trackio` needs the package trackio: pip install"):
        run(tokenizer, tmp_path / "out", report_to=["trackio"])


@pytest.mark.slow
def test_a_run_trains_offline_where_wandb_resets_the_connection(tokenizer, tmp_path, home, monkeypatch, caplog):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        def reset():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # closed at the end of the test
                    return
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()

        threading.Thread(target=reset, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "10")
        trainer = run(tokenizer, tmp_path / "out", wandb_mode="online")
    assert trainer.state.global_step == 4
    assert "wandb cannot be reached, so this run is logged offline: `wandb sync" in caplog.text
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert {entry["train/global_step"] for entry in read_offline_run(folder)["history"]} >= {1, 2, 3, 4}
