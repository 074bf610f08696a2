"""Kills a run again and again, starts it by the same command, and compares it with one that nobody has killed.

    python tests/support/kills.py DIR --kills 30 --engine zero3 --seed 1

Not a test itself; tests/distributed/test_kills.py runs a short version. Every third kill falls into the writing of a
checkpoint. Prints one line per kill, and at the end what is equal; the exit status is 1 where something is not.
"""

import argparse
import json
import random
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from orpo_trl.checkpoints import INCOMPLETE
from orpo_trl.run_folder import LOGS, read_lines, read_record
from support.processes import ENGINES, TRAIN_ENVIRONMENT
from support.small import REPOSITORY
from support.wandb_file import read_offline_run

# Times and speeds differ in every start.
_OF_CLOCK = ("per_second", "runtime", "memory", "mfu", "_time")


def command(engine: str | None, steps: int, output: Path, more: list[str]) -> list[str]:
    start = [sys.executable]
    if engine == "ddp":
        start += ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    elif engine:
        config = ENGINES / f"cpu_{engine}.yaml"
        start += ["-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
    return [
        *start, str(REPOSITORY / "scripts" / "run_orpo.py"), "recipes/quickstart.yaml",
        *f"--max_steps {steps} --save_strategy steps --save_steps 4 --logging_steps 2 --eval_strategy steps".split(),
        *"--eval_steps 8 --save_total_limit 2 --report_to wandb tensorboard --wandb_mode offline".split(),
        *"--per_device_train_batch_size 8 --log_level error".split(), "--output_dir", str(output), *more,
    ]  # fmt: skip


def environment(folder: Path) -> dict[str, str]:
    return {**TRAIN_ENVIRONMENT, "WANDB_DIR": str(folder), "DS_ACCELERATOR": "cpu", "WANDB_SILENT": "true"}


def start(words: list[str], folder: Path, log: Path) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        words, cwd=REPOSITORY, env=environment(folder), stdout=log.open("ab"), stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def kill_at_a_moment(process: subprocess.Popen, output: Path, moment: str, chance: random.Random) -> str:
    """Waits for the moment and kills the process with all that it has started. Returns where the run was."""
    left = _writing(output, set())  # by a start that was killed
    if moment == "at once":
        _wait(process, lambda: False, chance.uniform(0, 8))
    elif moment == "training":
        # A start logs from its checkpoint on, and has cut off what the one before had logged after it.
        known, steps = process_starts(output), chance.randint(1, 14)
        _wait(process, lambda: process_starts(output) != known, 300)
        begin = _logged(output)
        _wait(process, lambda: _logged(output) >= begin + steps, 300)
        _wait(process, lambda: False, chance.uniform(0, 0.2))
    for _ in range(100):
        if moment == "checkpoint":
            _wait(process, lambda: bool(_writing(output, left)), 300)
            _wait(process, lambda: False, chance.uniform(0, 0.06))
        family = _stopped(process.pid)
        half = sorted(name for name, _ in _writing(output, left))
        if half or moment != "checkpoint":
            break
        _send(family, signal.SIGCONT)  # the checkpoint was written already: the next one
    if not family:
        return "over"
    _send(family, signal.SIGKILL)
    process.wait()
    return f"{moment}, logged to step {_logged(output)}" + (f", in {half[0]}" if half else "")


def _writing(output: Path, known: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """Names of the checkpoints that are being written, and when they last changed, without those that are known."""
    found = set()
    for path in (output / INCOMPLETE).glob("*"):
        with suppress(OSError):
            found.add((path.name, path.stat().st_ctime_ns))
    return found - known


def _stopped(pid: int) -> list[psutil.Process]:
    """A process and all that it has started, stopped at one moment: a rank would answer its launcher's death."""
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    _send(family, signal.SIGSTOP)
    return family


def _send(family: list[psutil.Process], number: int) -> None:
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.send_signal(number)


def process_starts(output: Path) -> float:
    """Changes when a start has begun to train."""
    try:
        return (output / "run.json").stat().st_mtime
    except OSError:
        return 0


def _wait(process, is_time, longest: float) -> None:
    end = time.monotonic() + longest
    while time.monotonic() < end and process.poll() is None and not is_time():
        time.sleep(0.001)


def _logged(output: Path) -> int:
    try:
        lines = (output / LOGS).read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, ValueError):
        return 0


# ---- Comparing -------------------------------------------------------------------------------------------------------


def logs(output: Path) -> list[dict]:
    return [
        {name: value for name, value in log.items() if not any(part in name for part in _OF_CLOCK)}
        for log in read_lines(output / LOGS)
    ]


def curve(output: Path) -> list[int]:
    """Steps of the loss that a reader of TensorBoard's files shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (output / "runs").iterdir()
    return [event.step for event in EventAccumulator(str(folder)).Reload().Scalars("train/loss")]


def wandb_steps(folder: Path) -> tuple[set[str], list[int]]:
    """Ids of the wandb runs of all starts, and the steps of the loss in them."""
    ids, steps = set(), []
    for run in sorted(folder.glob("wandb/offline-run-*")):
        ids.add(run.name.rsplit("-", 1)[1])
        steps += [
            entry["train/global_step"]
            for entry in read_offline_run(run, is_over=False)["history"]
            if "train/loss" in entry
        ]
    return ids, sorted(steps)


def differences(whole: Path, killed: Path) -> list[str]:
    """What a run that was killed has other than one that was not; empty where it is the same."""
    found = []
    one, other = whole / "out", killed / "out"
    for name in ("model.safetensors",):
        if (one / name).read_bytes() != (other / name).read_bytes():
            found.append(f"{name} differs")
    expected, received = logs(one), logs(other)
    if [log["step"] for log in expected] != [log["step"] for log in received]:
        found.append(f"steps in {LOGS}: expected {[log['step'] for log in expected]}, received "
                     f"{[log['step'] for log in received]}")  # fmt: skip
    else:
        for a, b in zip(expected, received, strict=True):
            if {k: v for k, v in a.items() if k != "train_loss"} != {k: v for k, v in b.items() if k != "train_loss"}:
                found.append(f"{LOGS} differs at step {a['step']}")
                break
        means = [logged[-1].get("train_loss") for logged in (expected, received)]
        if None in means or abs(means[0] - means[1]) > 1e-9 * abs(means[0]):
            found.append(f"train_loss: {means[0]} and {means[1]}")
    if curve(one) != curve(other):
        found.append(f"TensorBoard: expected {curve(one)}, received {curve(other)}")
    ids, steps = wandb_steps(killed)
    if len(ids) > 1:
        found.append(f"wandb: runs {ids}")
    if len(steps) != len(set(steps)):
        found.append(f"wandb: doubled steps in {steps}")
    missing = set(wandb_steps(whole)[1]) - set(steps)
    if missing:
        print(f"(wandb had not written steps {sorted(missing)} when it was killed as well)")
    if read_record(other).get("saved") is None:
        found.append("run.json does not say that the model was saved")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--engine", choices=["zero2", "zero3", "fsdp2", "ddp"], help="two processes; default: one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of the run; default: enough for all kills")
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args(arguments)
    chance = random.Random(asked.seed)
    steps = asked.steps or asked.kills * (8 if asked.engine else 20)
    whole, killed = asked.folder / "whole", asked.folder / "killed"
    words = command(asked.engine, steps, whole / "out", asked.overrides)
    print(shlex.join(words), flush=True)
    if not (whole / "out" / "model.safetensors").exists() and start(words, whole, whole.with_suffix(".log")).wait():
        print(whole.with_suffix(".log").read_text()[-3000:])
        return 1
    words = command(asked.engine, steps, killed / "out", asked.overrides)
    log = killed.with_suffix(".log")
    for number in range(asked.kills):
        moment = ("training", "checkpoint", "training", "training", "checkpoint", "at once")[number % 6]
        process = start(words, killed, log)
        was = kill_at_a_moment(process, killed / "out", moment, chance)
        print(f"kill {number + 1}: {was}", flush=True)
        if was == "over" or process.returncode not in (-signal.SIGKILL,):
            if process.returncode == 0:
                print("The run was over before all kills.")
                break
            print(log.read_text()[-3000:])
            return 1
    status = start(words, killed, log).wait()
    if status:
        print(f"status {status}\n{log.read_text()[-3000:]}")
        return 1
    found = differences(whole, killed)
    print("\n".join(found) or f"Equal: weights, {LOGS}, TensorBoard, train_loss; one wandb run without doubled steps.")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
