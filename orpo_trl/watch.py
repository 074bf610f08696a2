"""Ends a run that has lost a rank or a machine, where its other processes would wait for it in a collective.

torch's agent sees at once when a process of its own machine ends. It does not see one that is stopped, nor a machine
that is switched off or cut off: gloo and NCCL wait for those until `ddp_timeout`, half an hour by default.

The watch runs in the launcher, not in the ranks, where a long call of a library that holds Python's lock would look
like a lost rank. Machines tell each other that they are there, over the TCPStore of torch's agent on machine 0.
"""

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from orpo_trl import processes

# Seconds of silence after which a process or a machine is lost.
SILENCE = 40
_TICK = 1.0
_BEAT = 3.0
_KEY = "orpo_trl"


@dataclass(frozen=True)
class Machines:
    """The machines of a run: how many, this one's number, and the address of number 0."""

    number: int = 1
    rank: int = 0
    address: str = ""
    port: int = 0


class Watch(threading.Thread):
    """Looks after the ranks of this machine, and after the other machines.

    Time is counted in ticks of this thread: while this machine itself is suspended, none pass.

    Args:
        reports: the folder of the ranks' reports.
        machines: of the run.
        lose: called once with a sentence, when a rank or a machine is lost.
        silence: seconds after which it is.
    """

    def __init__(self, reports: Path, machines: Machines, lose: Callable[[str], None], silence: float = SILENCE):
        super().__init__(daemon=True, name="orpo-trl-watch")
        self._reports = reports
        self._machines = machines
        self._lose = lose
        self._silence = silence
        self._stopped: dict[int, float] = {}
        self._ended = threading.Event()
        self._others = _Others(machines) if machines.number > 1 else None

    def run(self) -> None:
        if self._others is not None:
            self._others.start()
        while not self._ended.wait(_TICK):
            lost = self._lost_rank() or (self._others.lost(self._silence) if self._others is not None else None)
            if lost is not None:
                self._ended.set()
                self.tell(lost)
                self._lose(lost)

    def end(self) -> None:
        """Look no longer. `tell` can still be called."""
        self._ended.set()

    def close(self) -> None:
        self._ended.set()
        if self._others is not None:
            self._others.ended.set()

    def tell(self, text: str) -> None:
        """Let the other machines know why the run has ended here."""
        if self._others is not None:
            self._others.tell(text)

    def _lost_rank(self) -> str | None:
        reports = [report for report in processes.read_reports(self._reports) if report.status is None]
        if len(reports) < 2 and self._others is None:
            return None  # nobody waits for the only process: who stops it, as by Ctrl-Z, will continue it
        for report in reports:
            self._stopped[report.pid] = self._stopped.get(report.pid, 0) + _TICK if _is_stopped(report.pid) else 0
            if self._stopped[report.pid] >= self._silence:
                return f"{report} has been stopped (SIGSTOP) for {self._silence:.0f} seconds."
        return None


@dataclass
class _Machine:
    """What is known of another machine: its name, its latest beat, and for how long that has been the latest."""

    name: str = ""
    beat: int = 0
    silent: float = 0.0


@dataclass
class _Others:
    """The other machines, by their beats in the store of machine 0."""

    machines: Machines
    ended: threading.Event = field(default_factory=threading.Event)
    _known: dict[int, _Machine] = field(default_factory=dict)
    _rounds: int = 0
    _reason: str | None = None
    _to_tell: str | None = None
    _seen_rounds: int = 0
    _without_round: float = 0.0

    def start(self) -> None:
        # A call to a store that is cut off blocks for long, so another thread makes them.
        threading.Thread(target=self._beat, daemon=True, name="orpo-trl-beat").start()

    def tell(self, text: str) -> None:
        self._to_tell = text
        if self._rounds:
            time.sleep(2 * _BEAT)  # until it is written, and until the others have read it if the store is ours

    def lost(self, silence: float) -> str | None:
        """Why the run is lost, if it is. Called once a tick."""
        if self._reason is not None:
            return self._reason
        if not self._rounds:
            return None  # the store is not there yet; torch's rendezvous has time-outs of its own
        self._without_round = self._without_round + _TICK if self._rounds == self._seen_rounds else 0.0
        self._seen_rounds = self._rounds
        if self._without_round >= silence:
            where = f"machine 0 ({self.machines.address}:{self.machines.port})"
            return f"{where} has not answered for {silence:.0f} seconds: it is down, or cut off from the network."
        for number, machine in self._known.items():
            machine.silent += _TICK
            # While the store itself does not answer, nothing is known of the others.
            if machine.beat and machine.silent >= silence and not self._without_round:
                where = f"machine {number} ({machine.name})"
                return f"{where} has not answered for {silence:.0f} seconds: it is down, or cut off from the network."
        return None

    def _beat(self) -> None:
        store: Any = None
        while not self.ended.is_set():
            try:
                store = store or self._connect()
                self._round(store)
            except Exception:  # torch's own kinds of error; the count of rounds tells
                store = None
            self.ended.wait(_BEAT)

    def _connect(self) -> Any:
        from torch.distributed import TCPStore

        own = self.machines
        store = TCPStore(own.address, own.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
        store.set(f"{_KEY}/name/{own.rank}", socket.gethostname())
        return store

    def _round(self, store: Any) -> None:
        own = self.machines
        store.add(f"{_KEY}/beat/{own.rank}", 1)
        for number in set(range(own.number)) - {own.rank}:
            machine = self._known.setdefault(number, _Machine())
            beat = store.add(f"{_KEY}/beat/{number}", 0)  # `get` would wait for the key
            if beat != machine.beat:
                machine.beat, machine.silent = beat, 0.0
                machine.name = machine.name or store.get(f"{_KEY}/name/{number}").decode()
        if self._to_tell is not None:
            store.set(f"{_KEY}/lost", self._to_tell)
        elif store.check([f"{_KEY}/lost"]):
            self._reason = store.get(f"{_KEY}/lost").decode()
        self._rounds += 1


def _is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:  # it has ended
        return False
