"""The lock on a run's folder, between real processes."""

import os
import signal
import subprocess
import sys

import pytest

from orpo_trl.run_lock import LOCK, LockedError, RunLock

# Holds the lock until its standard input ends; a child, forked while it is held, lives on.
HOLDER = """
import os, sys, time
from pathlib import Path
from orpo_trl.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
if os.fork() == 0:
    os.close(1)
    time.sleep(30)
    os._exit(0)
print("held", flush=True)
sys.stdin.read()
"""


def hold(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_process_that_is_killed_does_not_hold_the_folder_and_its_children_do_not_either(tmp_path):
    process = hold(tmp_path)
    try:
        with pytest.raises(LockedError, match=f"another run is in this folder: process {process.pid} on "):
            RunLock(tmp_path)
        process.kill()
        process.wait()
        RunLock(tmp_path).release()
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_link_in_place_of_the_lock_is_not_written_through(tmp_path):
    (tmp_path / "mine").write_text("keep me")
    (tmp_path / "run").mkdir()
    os.symlink(tmp_path / "mine", tmp_path / "run" / LOCK)
    RunLock(tmp_path / "run").release()
    assert (tmp_path / "mine").read_text() == "keep me"


def test_a_fifo_in_place_of_the_lock_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / LOCK)
    RunLock(tmp_path).release()
    assert (tmp_path / LOCK).is_file()


@pytest.mark.parametrize("text", ["", "no json", "[1]", '{"pid": "x"}'])
def test_whatever_stands_in_the_file_of_a_dead_process_is_no_obstacle(tmp_path, text):
    (tmp_path / LOCK).write_text(text)
    RunLock(tmp_path).release()
