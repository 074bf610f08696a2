"""Interrupts runs at random moments, starts each again by the same command until it is finished, and compares.

    interruptions.py FOLDER [--engine zero3] [--seed N] [--steps N] 'SIGTERM*20' 'SIGUSR1*5' 'stop_after*2'

One line for each run: what interrupted it, at which step, how long it took to end, its exit status, and whether final
weights and steps of metrics.jsonl equal those of the uninterrupted run. Exit status 1 if one does not. Not a test.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from support.runs import ZERO3, Run, last_step, same_weights


def settings(steps: int) -> list[str]:
    """Short runs with checkpoints of their own."""
    return ["--max_steps", str(steps), "--save_strategy", "steps", "--save_steps", "7", "--save_total_limit", "2"]


def logs(output: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [(log["step"], log["loss"]) for log in lines if "loss" in log]


def interrupt(output: Path, words: list[str], what: str, at: float) -> tuple[Run, float, int]:
    """Start a run and interrupt it some seconds after its first step; returns it, seconds to its end, and its status.

    The clock of `stop_after` starts with the process, so its seconds are counted from there.
    """
    if what == "stop_after":
        run = Run(output, *words, "--stop_after", f"{at:.1f}")
        return run, 0.0, run.wait()
    run = Run(output, *words)
    run.wait_for_step(1)
    time.sleep(at)
    run.send(getattr(signal, what))
    began = time.monotonic()
    status = run.wait()
    return run, time.monotonic() - began, status


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("interruptions", nargs="+", metavar="WHAT*COUNT")
    parser.add_argument("--engine", choices=["zero3"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(arguments)
    choose = random.Random(args.seed)
    words = [*settings(args.steps), *(ZERO3 if args.engine else [])]
    args.folder.mkdir(parents=True, exist_ok=True)
    whole = args.folder / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    began = time.monotonic()
    run = Run(whole, *words)
    run.wait_for_step(1)
    to_first = time.monotonic() - began
    run.wait_for_step(args.steps)
    training = time.monotonic() - began - to_first
    assert run.wait() == 0, run.log()
    failed = 0
    for word in args.interruptions:
        what, _, count = word.partition("*")
        for number in range(int(count or 1)):
            output = args.folder / f"{what}-{number}"
            shutil.rmtree(output, ignore_errors=True)
            at = choose.uniform(0, 0.8) * training + (to_first if what == "stop_after" else 0)
            run, seconds, status = interrupt(output, words, what, at)
            while "Saved the model" in run.log():  # the machine was faster this time: the run was over
                at *= 0.8
                shutil.rmtree(output)
                run, seconds, status = interrupt(output, words, what, at)
            stopped = last_step(output) if status == 75 else None
            again = Run(output, *words).wait()
            is_equal = again == 0 and same_weights(whole, output) and logs(whole) == logs(output)
            is_good = is_equal and status == 75
            failed += not is_good
            end = f"stopped at step {stopped}, {seconds:4.1f} s to the end, status {status}"
            print(f"{what:<10} after {at:4.1f} s, {end}; again {again}, {'equal' if is_equal else 'DIFFERENT'}")
            sys.stdout.flush()
            if is_good:
                shutil.rmtree(output)
            else:
                print(run.log()[-2000:])
    print(f"{failed} of {sum(int(w.partition('*')[2] or 1) for w in args.interruptions)} failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
