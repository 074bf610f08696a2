"""Two machines of one: network namespaces that a virtual cable joins. Needs root and `ip` (iproute2).

    two_hosts.py FOLDER [zero3 zero2 fsdp2 ddp] [--no_cut]

For each strategy: trains with one process on each host and with two on one host, and compares the final weights; cuts
the cable in the middle of another run, waits until both sides have ended, and starts both again by the same commands.
Exit status 1 where something is not as it must be. Not a test itself.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

from support.processes import ORPO_TRL, TRAIN_ENVIRONMENT
from support.runs import QUIET
from support.small import REPOSITORY

ADDRESSES = ("10.99.0.1", "10.99.0.2")
# On a CPU, accelerate runs DDP where a config says FSDP, unless it is told that CPUs are accelerators.
ENGINES = {"zero3": "zero3", "zero2": "zero2", "fsdp2": "fsdp2", "ddp": "fsdp2"}
STEPS = 6


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class TwoHosts:
    """Two namespaces and the cable between them; `with` removes them at its end."""

    def __init__(self):
        self.names = [f"orpo-{os.getpid()}-{side}" for side in "ab"]
        self.cable = [f"v{os.getpid() % 100000}{side}" for side in "ab"]

    def __enter__(self) -> "TwoHosts":
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", self.cable[0], "type", "veth", "peer", "name", self.cable[1])
        for name, end, address in zip(self.names, self.cable, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
        return self

    def __exit__(self, *error: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def cut(self) -> None:
        """Neither side gets another packet, and neither is told."""
        ip("-n", self.names[0], "link", "set", self.cable[0], "down")

    def mend(self) -> None:
        ip("-n", self.names[0], "link", "set", self.cable[0], "up")

    def start(self, rank: int, log: Path, engine: str, *words: str) -> subprocess.Popen:
        """`orpo-trl train` on one host, as one of two machines with a process each."""
        flags = [
            "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank), "--main_process_ip",
            ADDRESSES[0], "--main_process_port", "29511",
        ]  # fmt: skip
        return start(["ip", "netns", "exec", self.names[rank]], log, engine, *flags, *words)


def start(prefix: list[str], log: Path, engine: str, *words: str) -> subprocess.Popen:
    environment = dict(TRAIN_ENVIRONMENT)
    if engine == "fsdp2":
        hook = str(REPOSITORY / "tests" / "support" / "fsdp_on_cpu")
        environment["PYTHONPATH"] = os.pathsep.join([hook, environment["PYTHONPATH"]])
    command = [*prefix, ORPO_TRL, "train", "quickstart", "--engine", ENGINES[engine], *QUIET, *words]
    with open(log, "a") as file:
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT)


def farthest(one: Path, other: Path) -> float:
    """The largest difference between the final weights of two folders."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def compare(hosts: TwoHosts, engine: str, folder: Path) -> bool:
    """Train on two hosts and on one; whether the weights are equal to 1e-6."""
    words = ["--max_steps", str(STEPS), "--save_strategy", "no", "--output_dir"]
    together = [
        hosts.start(rank, folder / f"{engine}-{rank}.log", engine, *words, str(folder / f"{engine}-two"))
        for rank in (0, 1)
    ]
    statuses = [process.wait(300) for process in together]
    one = start([], folder / f"{engine}-one.log", engine, "--num_processes", "2", *words, str(folder / f"{engine}-one"))
    statuses.append(one.wait(300))
    difference = farthest(folder / f"{engine}-two", folder / f"{engine}-one") if not any(statuses) else float("nan")
    print(f"{engine}: two hosts {statuses[:2]}, one host {statuses[2]}; weights differ by {difference:.1e}", flush=True)
    return difference < 1e-6


def cut(hosts: TwoHosts, engine: str, folder: Path) -> bool:
    """Cut the cable in a run, and start both sides again; whether both end within a minute, and go on then."""
    output, logs = folder / f"{engine}-cut", [folder / f"{engine}-cut-{rank}.log" for rank in (0, 1)]
    words = ["--max_steps", "60", "--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "3"]
    words += ["--output_dir", str(output)]
    sides = [hosts.start(rank, logs[rank], engine, *words) for rank in (0, 1)]
    while not (output / "checkpoint-4").is_dir() and all(side.poll() is None for side in sides):
        time.sleep(0.2)
    hosts.cut()
    began = time.monotonic()
    ends = []
    for side in sides:
        status = side.wait(120)
        ends.append((status, round(time.monotonic() - began)))
    hosts.mend()
    said = [[line for line in log.read_text().splitlines() if "orpo-trl train:" in line][-1:] for log in logs]
    print(f"{engine}: cable cut; status and seconds: {ends}; {said}", flush=True)
    again = [hosts.start(rank, logs[rank], engine, *words) for rank in (0, 1)]
    statuses = [side.wait(300) for side in again]
    print(f"{engine}: started again: {statuses}", flush=True)
    return all(status == 1 and seconds <= 60 for status, seconds in ends) and not any(statuses)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("engines", nargs="*", default=list(ENGINES))
    parser.add_argument("--no_cut", action="store_true", help="Compare only.")
    args = parser.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    good = True
    for engine in args.engines:
        with TwoHosts() as hosts:
            good &= compare(hosts, engine, args.folder)
            good &= args.no_cut or cut(hosts, engine, args.folder)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
