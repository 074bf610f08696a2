"""Measure training steps and data preparation against TRL's experimental ORPOTrainer, on your pairs and tokenizer.

    python scripts/benchmark.py --data pairs.jsonl --tokenizer mistralai/Mistral-7B-v0.1 --json results.json
    python scripts/benchmark.py --data pairs.jsonl --tokenizer DIR --model-size 7b --max-length 2048 --json results.json

Three sides train a Mistral of random weights on the same pairs in the same order: TRL, ours padded, ours with shared
prefixes. Each measurement is a process of its own, so that its memory is its own too, and the sides take turns, each
round on other pairs, so that a machine that slows down slows all of them. A step is timed from its predecessor's end to
its own: batch, forward, backward, optimizer and log. MFU is that of a run's log (`throughput/mfu_percent`): the
operations of weights and attention that the pairs need, each prompt once, without recomputation.

`--ladder` measures no other trainer, but what single settings of ours give, one after another, each with its loss.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from orpo_trl.devices import find_device
from orpo_trl.flops import flops, matrix_weights
from orpo_trl.lengths import PairLengths

SIDES = {"trl": "TRL", "padded": "ours, padded", "shared_prefix": "ours, shared prefix"}
# hidden size, intermediate size, layers, attention heads, key-value heads
MODEL_SIZES = {
    "10m": (256, 896, 4, 4, 2),
    "90m": (512, 1792, 16, 8, 4),
    "1b": (2048, 5632, 22, 32, 4),
    "7b": (4096, 14336, 32, 32, 8),
}
# Steps of the ladder, each with its settings of `ORPOConfig`. Times and memory are set beside those of the first. What
# speeds up several GPUs (ZeRO's buckets, FSDP2's `reshard_after_forward`) is not here: docs/speed.md.
_CHECKPOINTING = {"gradient_checkpointing": True}
LADDER: dict[str, dict] = {
    "checkpointing": _CHECKPOINTING,
    "selective checkpointing": {**_CHECKPOINTING, "gradient_checkpointing_kwargs": {"selective": True}},
    "no checkpointing": {"gradient_checkpointing": False},
    "checkpointing, Liger's layers": {**_CHECKPOINTING, "use_liger_kernel": True},
    "checkpointing, compiled": {**_CHECKPOINTING, "torch_compile": True},
    "no checkpointing, compiled": {"gradient_checkpointing": False, "torch_compile": True},
    "no checkpointing, padded": {"gradient_checkpointing": False, "pair_layout": "padded"},
}
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.measure:
        job = json.loads(options.measure.read_text())
        measure = {"steps": measure_steps, "logging": measure_logging, "preparation": measure_preparation}
        result = measure[job["what"]](job)
        Path(job["result"]).write_text(json.dumps(result))
        return 0
    console = Console()
    rows = read_rows(options.data, options.rows)
    kept = comparable(rows, load_tokenizer(options.tokenizer), options.max_length)
    if options.ladder is not None:
        return climb(options, kept, console)
    sides = [side for side in SIDES if side not in options.without]
    plan = {batch: pairs_of_rounds(kept, batch, options) for batch in options.batch_size}
    report = {**about(options), "steps": [], "logging": [], "preparation": {}}

    def save() -> None:
        if options.json:
            options.json.write_text(json.dumps(report, indent=2) + "\n")

    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(plan) * (options.rounds * len(sides) + 1) + 2)
        for batch, rounds in plan.items():
            runs = {side: [] for side in sides}
            for pairs in rounds:
                for side in sides:
                    progress.update(task, description=f"{SIDES[side]}, {batch} pairs a step")
                    job = {**job_of(options), "what": "steps", "batch_size": batch, "side": side}
                    runs[side].append(run_measurement(job, pairs))
                    progress.advance(task)
            report["steps"].append(summary(batch, runs))
            progress.update(task, description=f"Logging, {batch} pairs a step")
            job = {**job_of(options), "what": "logging", "batch_size": batch, "steps": options.logging_steps}
            report["logging"].append({"batch_size": batch, **run_measurement(job, rounds[0])})
            progress.advance(task)
            save()
        for threads in ("one thread", "all threads"):
            progress.update(task, description=f"Preparation, {threads}")
            environment = {"RAYON_NUM_THREADS": "1"} if threads == "one thread" else {}
            job = {**job_of(options), "what": "preparation"}
            report["preparation"][threads] = run_measurement(job, rows, environment)
            progress.advance(task)
            save()
    show(report, console)
    if options.json:
        console.print(f"Written to {options.json}.")
    return 0


def about(options: argparse.Namespace) -> dict:
    """Date, hardware, versions and settings of a report."""
    own = ("data", "tokenizer", "json", "measure")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "settings": {
            "data": options.data.name,
            "tokenizer": Path(options.tokenizer).name,
            **{name: value for name, value in vars(options).items() if name not in own},
        },
    }


def climb(options: argparse.Namespace, rows: list[dict], console: Console) -> int:
    """Measure each step of the ladder on the same pairs, and show time, memory and loss beside those of the first."""
    report = {**about(options), "ladder": []}
    steps = {name: LADDER[name] for name in options.ladder or LADDER}
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(options.batch_size) * len(steps) * options.rounds)
        for batch in options.batch_size:
            rounds = pairs_of_rounds(rows, batch, options)
            runs: dict[str, list[dict]] = {name: [] for name in steps}
            for pairs in rounds:
                for name, settings in steps.items():
                    progress.update(task, description=f"{name}, {batch} pairs a step")
                    job = {**job_of(options), "what": "steps", "batch_size": batch, "side": "shared_prefix"}
                    runs[name].append(run_measurement({**job, "settings": settings}, pairs))
                    progress.advance(task)
            report["ladder"].append(summary(batch, runs, beside=next(iter(steps))))
            if options.json:
                options.json.write_text(json.dumps(report, indent=2) + "\n")
    console.print(table_of(report, report["ladder"], "the first"))
    if options.json:
        console.print(f"Written to {options.json}.")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    head, example = (__doc__ or "").split("\n\n", 2)[:2]
    parser = argparse.ArgumentParser(
        description=head, epilog=f"examples:\n{example}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--data", type=Path, help="JSON lines with the strings `prompt`, `chosen` and `rejected`")
    parser.add_argument("--tokenizer", help="Hub id or folder")
    parser.add_argument("--model-size", choices=MODEL_SIZES, default="90m", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 4, 8], metavar="PAIRS", help="per step")
    parser.add_argument("--max-length", type=int, default=1024, metavar="TOKENS", help="default: %(default)s")
    parser.add_argument("--pairs", type=int, default=16, help="timed in each round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: %(default)s)")
    parser.add_argument(
        "--warmup",
        type=int,
        default=3 if on_gpu else 1,
        help="steps of each turn that are not timed (default: 1, GPU 3)",
    )
    parser.add_argument("--rows", type=int, default=1000, help="of the data, from its start (default: %(default)s)")
    parser.add_argument(
        "--optim", default="adamw_torch_fused", help="of TrainingArguments; `sgd` has no states (default: %(default)s)"
    )
    parser.add_argument(
        "--logging-steps", type=int, default=20, metavar="STEPS",
        help="timed with all metrics, and as many without (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations, on every side")
    parser.add_argument(
        "--ladder",
        nargs="*",
        choices=LADDER,
        metavar="SETTING",
        help=f"measure these settings instead of trainers, by default all: {', '.join(LADDER)}",
    )
    parser.add_argument("--without", nargs="+", choices=SIDES, default=[], metavar="SIDE", help=", ".join(SIDES))
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results here, after each batch size")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # one measurement, in a process of its own
    options = parser.parse_args(arguments)
    if options.measure:
        return options
    if options.data is None or options.tokenizer is None:
        parser.error("--data and --tokenizer are required")
    if not options.data.is_file():
        parser.error(f"--data: the file {options.data} does not exist")
    for name in ("batch_size", "max_length", "pairs", "rounds", "warmup", "rows", "logging_steps"):
        value = getattr(options, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: the folder {options.json.parent} does not exist")
    if Path(options.tokenizer).is_dir():  # measurements run in a folder of their own
        options.tokenizer = str(Path(options.tokenizer).resolve())
    return options


def job_of(options: argparse.Namespace) -> dict:
    names = ("tokenizer", "model_size", "max_length", "warmup", "optim", "gradient_checkpointing")
    return {name: getattr(options, name) for name in names}


def pairs_of_rounds(rows: list[dict], batch: int, options: argparse.Namespace) -> list[list[dict]]:
    """Rows of each round, in full steps: those to warm up with, then those that are timed."""
    steps = -(-options.pairs // batch) + options.warmup
    size = steps * batch
    if len(rows) < options.rounds * size:
        raise SystemExit(
            f"benchmark.py: {options.rounds} rounds of {steps} steps of {batch} pairs need {options.rounds * size} "
            f"comparable rows, and the data has {len(rows)}. Raise --rows, or lower --rounds or --pairs."
        )
    return [rows[start : start + size] for start in range(0, options.rounds * size, size)]


def run_measurement(job: dict, rows: list[dict], environment: dict[str, str] | None = None) -> dict:
    """Run one measurement in a new process on one device; where it fails, the result is its `error`."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = {
        **os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": device, **(environment or {})
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path, result = Path(folder, "job.json"), Path(folder, "result.json")
        path.write_text(json.dumps({**job, "rows": rows, "result": str(result)}))
        command = [sys.executable, str(Path(__file__).resolve()), "--measure", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
        if result.exists():
            return json.loads(result.read_text())
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode == -9 or any("out of memory" in line for line in lines):
        return {"error": "out of memory"}
    return {"error": lines[-1] if lines else f"exit status {done.returncode}"}


# ---- The pairs -------------------------------------------------------------------------------------------------------


def read_rows(path: Path, count: int) -> list[dict]:
    rows = []
    with path.open() as lines:
        for number, line in zip(range(count), lines, strict=False):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise SystemExit(f"benchmark.py: {path}, row {number}: not JSON ({error})") from error
            if not isinstance(row, dict) or not all(
                isinstance(row.get(name), str) for name in ("prompt", "chosen", "rejected")
            ):
                raise SystemExit(
                    f"benchmark.py: {path}, row {number}: expected the strings `prompt`, `chosen` and `rejected`"
                )
            rows.append({name: row[name] for name in ("prompt", "chosen", "rejected")})
    return rows


def load_tokenizer(name: str):
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise SystemExit(f"benchmark.py: --tokenizer {name}: {error}") from error
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        tokenizer.bos_token = None  # TRL would put it first, where the tokenizer itself does not
    return tokenizer


def comparable(rows: list[dict], tokenizer, max_length: int) -> list[dict]:
    """Rows that TRL reads as we do, with their `lengths`: prompt, prompt + chosen, prompt + rejected, in tokens.

    TRL cannot train on prompts that fill `max_length`, and scores one token more or less where the first token of a
    response merges with the prompt.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    begin = int(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    kept = []
    for row in rows:
        prompt = ids(row["prompt"])
        sides = [ids(row["prompt"] + row[side]) for side in ("chosen", "rejected")]
        fits = 0 < len(prompt) < max_length - 8 and row["chosen"] != row["rejected"]
        if fits and all(len(prompt) < len(side) and side[: len(prompt)] == prompt for side in sides):
            # A token ends each response.
            ends = [min(begin + len(side) + 1, max_length) for side in sides]
            kept.append({**row, "lengths": [begin + len(prompt), *ends]})
    return kept


def token_counts(rows: list[dict]) -> dict[str, int]:
    """Tokens of a step: `padded`, as TRL computes them, and `unique`, each prompt once."""
    lengths = [row["lengths"] for row in rows]
    return {
        "padded": 2 * len(rows) * max(max(chosen, rejected) for _, chosen, rejected in lengths),
        "unique": sum(chosen + rejected - prompt for prompt, chosen, rejected in lengths),
    }


# ---- In the process of one measurement -------------------------------------------------------------------------------


def make_model(size: str, vocabulary: int):
    """A Mistral of random weights: bf16 on a GPU, fp32 on a CPU, whose bf16 is slow."""
    from transformers import AutoModelForCausalLM, MistralConfig

    hidden, intermediate, layers, heads, key_value_heads = MODEL_SIZES[size]
    config = MistralConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_value_heads, sliding_window=4096, pad_token_id=None,
        max_position_embeddings=32768,
    )  # fmt: skip
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    with torch.device("cuda" if on_gpu else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if on_gpu else torch.float32)


def make_trainer(side: str, rows: list[dict], tokenizer, model, folder: str, **options):
    from datasets import Dataset

    if side == "trl":
        module = importlib.import_module("trl.experimental.orpo")
    else:
        module = importlib.import_module("orpo_trl")
        options = {"pair_layout": side, "nll_reduction": "micro_batch_mean", **options}
    args = module.ORPOConfig(
        folder, report_to="none", use_cpu=not torch.cuda.is_available(), bf16=False, logging_steps=1,
        disable_tqdm=True, seed=0, save_strategy="no", train_sampling_strategy="sequential", learning_rate=1e-5,
        lr_scheduler_type="constant", **options,
    )  # fmt: skip
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    return module.ORPOTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def measure_steps(job: dict) -> dict:
    """Seconds, losses, tokens and peak memory of the training steps of one side."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    rows, batch, warmup = job["rows"], job["batch_size"], job["warmup"]
    tokenizer = load_tokenizer(job["tokenizer"])
    model = make_model(job["model_size"], len(tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            job["side"], rows, tokenizer, model, folder, max_length=job["max_length"],
            max_steps=len(rows) // batch, per_device_train_batch_size=batch, optim=job["optim"],
            **{"gradient_checkpointing": job["gradient_checkpointing"], **job.get("settings", {})},
        )  # fmt: skip
        trainer.add_callback(Clock())
        trainer.train()
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    steps = [token_counts(rows[start : start + batch]) for start in range(0, len(rows), batch)]
    return {
        "seconds": [end - begin for begin, end in zip(ends[warmup - 1 :], ends[warmup:], strict=False)],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "peak_bytes": peak,
        "estimated_bytes": None if job["side"] == "trl" else estimate_peak(trainer, rows, steps, batch),
        "flops": needed_flops(model, rows[warmup * batch :]),
        "tokens": steps[warmup:],
    }


def needed_flops(model, rows: list[dict]) -> float:
    """Floating-point operations that the pairs need, as a run's log counts them."""
    prompt, chosen, rejected = np.array([row["lengths"] for row in rows]).T
    lengths = PairLengths(prompt, chosen - prompt, rejected - prompt)
    scored = (chosen - 1).sum() + lengths.rejected.sum()  # `nll_scope: sequence`
    return flops(matrix_weights(model), int(lengths.unique.sum()), int(lengths.attended.sum()), int(scored))


def measure_logging(job: dict) -> dict:
    """Seconds of steps on the same rows, by turns with all metrics, logged at every step, and with none.

    With none, nothing is summed and nothing is logged. A step's log comes after its end, and counts with the step that
    follows.
    """
    from transformers import TrainerCallback

    seconds: dict[str, list[float]] = {"all metrics": [], "no metrics": []}
    sides = list(seconds)

    class Turns(TrainerCallback):
        def __init__(self):
            self.steps, self.end, self.side = 0, 0.0, "all metrics"

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            if self.steps > job["warmup"]:
                seconds[self.side].append(now - self.end)
            self.steps, self.end = self.steps + 1, now
            self.side = sides[self.steps % len(sides)]
            control.should_log = self.side == "all metrics"
            trainer.pair_metrics.add = add_metrics if self.side == "all metrics" else lambda *args: None

    rows = job["rows"][: job["batch_size"]]
    tokenizer = load_tokenizer(job["tokenizer"])
    model = make_model(job["model_size"], len(tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            "shared_prefix", rows, tokenizer, model, folder, max_length=job["max_length"],
            max_steps=len(sides) * job["steps"] + job["warmup"] + 1, per_device_train_batch_size=job["batch_size"],
            optim=job["optim"], gradient_checkpointing=job["gradient_checkpointing"],
        )  # fmt: skip
        add_metrics = trainer.pair_metrics.add
        trainer.add_callback(Turns())
        trainer.train()
    # Of steps that follow each other, so that a machine that slows down slows both.
    overheads = [100 * (own / bare - 1) for own, bare in zip(*seconds.values(), strict=True)]
    error = statistics.stdev(overheads) / len(overheads) ** 0.5 if overheads[1:] else None
    return {"seconds": seconds, "overhead_percent": statistics.mean(overheads), "standard_error_percent": error}


def estimate_peak(trainer, rows: list[dict], steps: list[dict[str, int]], batch: int) -> int:
    """What `orpo-trl check` says of the peak, in bytes; on a GPU without what torch does not allocate itself."""
    from orpo_trl.activations import MicroBatch
    from orpo_trl.config import ModelArguments
    from orpo_trl.memory import Sharding, estimate_memory

    is_packed, device = trainer.data_collator.layout == "shared_prefix", trainer.args.device.type
    tokens = max(step["unique" if is_packed else "padded"] for step in steps)
    micro_batch = MicroBatch(2 * batch, tokens, max(max(row["lengths"]) for row in rows), is_packed)
    dtype = str(trainer.model.dtype).removeprefix("torch.")
    arguments = ModelArguments(dtype=dtype)
    estimate = estimate_memory(trainer.model.config, arguments, trainer.args, Sharding("single"), micro_batch, device)
    return estimate.total - (estimate.parts["libraries"] if device == "cuda" else 0)


def measure_preparation(job: dict) -> dict:
    """Rows per second from text to token ids, in one process, of both sides."""
    rows, tokenizer = job["rows"], load_tokenizer(job["tokenizer"])
    seconds: dict[str, list[float]] = {"trl": [], "shared_prefix": []}
    # Both sides prepare while they make the trainer: what that takes with one row is not preparation.
    for turn in range(4):
        for side, found in seconds.items():
            times = []
            for count in (1, len(rows)):
                model = make_model("10m", len(tokenizer))
                with tempfile.TemporaryDirectory() as folder:
                    begin = time.perf_counter()
                    make_trainer(side, rows[:count], tokenizer, model, folder, max_length=job["max_length"])
                    times.append(time.perf_counter() - begin)
            if turn:  # the first one imports
                found.append(times[1] - times[0])
    rates = {side: len(rows) / statistics.median(found) for side, found in seconds.items()}
    return {"rows": len(rows), "rows_per_s": rates, "ratio": rates["shared_prefix"] / rates["trl"]}


# ---- The report ------------------------------------------------------------------------------------------------------


def summary(batch: int, runs: dict[str, list[dict]], beside: str = "trl") -> dict:
    """Figures of one batch size, by side, over all rounds; speed-up and efficiency against one side's same steps."""
    result: dict = {"batch_size": batch, "sides": {}}
    for side, rounds in runs.items():
        errors = [run["error"] for run in rounds if "error" in run]
        if errors:
            result["sides"][side] = {"error": errors[0]}
            continue
        padded, unique = (sum(step[name] for run in rounds for step in run["tokens"]) for name in ("padded", "unique"))
        seconds = [second for run in rounds for second in run["seconds"]]
        pairs = batch * len(seconds)
        result |= {"timed_pairs": pairs, "unique_tokens": unique, "bound": padded / unique}
        entry = {
            "ms_per_step": 1e3 * statistics.mean(seconds),
            "pairs_per_s": pairs / sum(seconds),
            "unique_tokens_per_s": unique / sum(seconds),
            "peak_gib": max(run["peak_bytes"] for run in rounds) / 2**30,
            "losses": [run["losses"][0] for run in rounds],
            **({} if side == "trl" else {"estimated_gib": max(run["estimated_bytes"] for run in rounds) / 2**30}),
        }
        peak = peak_flops()
        if peak:
            entry["mfu"] = sum(run["flops"] for run in rounds) / sum(seconds) / peak
        baseline = result["sides"].get(beside, entry if side == beside else {"error": "not run"})
        if "error" not in baseline:
            entry["speed_up"] = entry["pairs_per_s"] / baseline["pairs_per_s"]
            entry["efficiency"] = entry["speed_up"] / result["bound"]
            entry["memory_ratio"] = entry["peak_gib"] / baseline["peak_gib"]
            entry["loss_difference"] = max(
                abs(own - other) for own, other in zip(entry["losses"], baseline["losses"], strict=True)
            )
        result["sides"][side] = entry
    return result


def hardware() -> str:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def peak_flops() -> float | None:
    device = find_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return device and device.peak_flops


# Heading, entry of the summary, format. `{}` is what a side is compared with.
COLUMNS = (
    ("ms/step", "ms_per_step", ".0f"),
    ("pairs/s", "pairs_per_s", ".2f"),
    ("unique tokens/s", "unique_tokens_per_s", ",.0f"),
    ("speed-up", "speed_up", ".2f"),
    ("efficiency", "efficiency", ".2f"),
    ("peak GiB", "peak_gib", ".2f"),
    ("estimate", "estimated_gib", ".2f"),
    ("memory of {}", "memory_ratio", ".2f"),
    ("loss difference", "loss_difference", ".0e"),
    ("MFU", "mfu", ".1%"),
)


def table_of(report: dict, steps: list[dict], beside: str) -> Table:
    settings = report["settings"]
    title = f"Mistral {settings['model_size']}, {settings['data']}, max_length {settings['max_length']}"
    table = Table(title=f"{title}, {report['hardware']}", title_justify="left")
    columns = COLUMNS if peak_flops() else COLUMNS[:-1]
    table.add_column("pairs a step", justify="right")
    table.add_column("side")
    for heading, _, _ in columns:
        table.add_column(heading.format(beside), justify="right")
    for step in steps:
        for side, entry in step["sides"].items():
            cells = [format(entry[name], form) if name in entry else "–" for _, name, form in columns]
            cells = [entry["error"]] if "error" in entry else cells
            table.add_row(str(step["batch_size"]), SIDES.get(side, side), *cells)
        table.add_section()
    return table


def show(report: dict, console: Console) -> None:
    console.print(table_of(report, report["steps"], "TRL"))
    for step in report["steps"]:
        if "bound" in step:
            console.print(
                f"{step['batch_size']} pairs a step: {step['timed_pairs']} pairs timed; TRL's padded tokens / unique "
                f"tokens, the bound on the speed-up that counting tokens gives: {step['bound']:.2f}"
            )
    for found in report["logging"]:
        batch = found["batch_size"]
        if "error" in found:
            console.print(f"Logging, {batch} pairs a step: {found['error']}")
            continue
        parts = [f"{1e3 * statistics.median(times):.1f} ms with {name}" for name, times in found["seconds"].items()]
        error = "" if found["standard_error_percent"] is None else f" ± {found['standard_error_percent']:.2f}"
        overhead = f"{found['overhead_percent']:+.2f}{error} %"
        console.print(f"Logging at every step, {batch} pairs a step: {', '.join(parts)}; {overhead}")
    for threads, found in report["preparation"].items():
        if "error" in found:
            console.print(f"Preparation, {threads}: {found['error']}")
            continue
        ours, theirs = found["rows_per_s"]["shared_prefix"], found["rows_per_s"]["trl"]
        console.print(
            f"Preparation of {found['rows']:,} rows in one process, {threads}: ours {ours:,.0f} rows/s, TRL "
            f"{theirs:,.0f} rows/s ({found['ratio']:.1f} times)"
        )


if __name__ == "__main__":
    sys.exit(main())
