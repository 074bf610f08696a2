"""The watch over ranks and machines, with a store and processes of its own and short times."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from orpo_trl import watch
from orpo_trl.watch import Machines, Watch


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(watch, "_TICK", 0.05)
    monkeypatch.setattr(watch, "_BEAT", 0.05)


@pytest.fixture
def ranks(tmp_path):
    """Two processes that sleep, and their reports."""
    found = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
    for number, process in enumerate(found):
        (tmp_path / f"{number}.json").write_text(json.dumps({"rank": number, "pid": process.pid, "host": "here"}))
    yield found
    for process in found:
        process.kill()
        process.wait()


def test_stopped_rank_is_named_and_one_that_goes_on_again_is_not(quick, ranks, tmp_path):
    lost = queue.Queue()
    looking = Watch(tmp_path, Machines(), lost.put, silence=0.5)
    looking.start()
    os.kill(ranks[0].pid, signal.SIGSTOP)
    with pytest.raises(queue.Empty):
        lost.get(timeout=0.3)
    os.kill(ranks[0].pid, signal.SIGCONT)
    with pytest.raises(queue.Empty):
        lost.get(timeout=0.8)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    assert lost.get(timeout=5).startswith(f"rank 1 (process {ranks[1].pid} on here) has been stopped (SIGSTOP)")


def store_of_machine_0() -> tuple[TCPStore, int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    return server, port


@pytest.mark.parametrize("what", ["silence", "word"])
def test_machine_that_falls_silent_and_the_word_of_another_end_the_run(what, quick, tmp_path):
    server, port = store_of_machine_0()
    lost = queue.Queue()
    looking = Watch(tmp_path, Machines(2, 0, "127.0.0.1", port), lost.put, silence=1.0)
    looking.start()
    server.set("orpo_trl/name/1", "host-b")
    server.add("orpo_trl/beat/1", 1)  # one beat, and no other
    if what == "word":
        server.set("orpo_trl/lost", "rank 3 is lost")
        assert lost.get(timeout=5) == "rank 3 is lost"
    else:
        assert lost.get(timeout=5).startswith("machine 1 (host-b) has not answered for 1 seconds")
    looking.close()


def test_machine_that_has_not_started_yet_is_not_lost(quick, tmp_path):
    _server, port = store_of_machine_0()
    lost = queue.Queue()
    looking = Watch(tmp_path, Machines(2, 0, "127.0.0.1", port), lost.put, silence=0.3)
    looking.start()
    with pytest.raises(queue.Empty):
        lost.get(timeout=1)
    looking.close()
