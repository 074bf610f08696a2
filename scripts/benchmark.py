"""Measure training steps and data preparation against TRL's experimental ORPOTrainer, on your pairs and tokenizer.

    python scripts/benchmark.py --data pairs.jsonl --tokenizer mistralai/Mistral-7B-v0.1 --json results.json
    python scripts/benchmark.py --data pairs.jsonl --tokenizer DIR --model-size 7b --max-length 2048 --batch-size 1 4 8

Three sides train a Mistral of random weights on the same pairs in the same order: TRL, ours padded, ours with shared
prefixes. Each measurement is a process of its own, so that memory is its own too, and the sides take turns, so that a
machine that slows down slows all of them. Reported are medians over the steps after the first of every round.
"""

import argparse
import gc
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

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

TRL, PADDED, PACKED = "TRL", "ours, padded", "ours, shared prefix"
SIDES = (TRL, PADDED, PACKED)
# hidden size, intermediate size, layers, attention heads, key-value heads
MODEL_SIZES = {
    "10m": (256, 896, 4, 4, 2),
    "60m": (512, 1792, 8, 8, 4),
    "1b": (2048, 5632, 22, 32, 4),
    "7b": (4096, 14336, 32, 32, 8),
}
# Dense bf16 FLOP/s without sparsity, from the makers' data sheets, by a part of torch's device name.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.measure:
        measurement = json.loads(options.measure)
        result = measure_preparation(measurement) if "side" not in measurement else measure_steps(measurement)
        Path(measurement["result"]).write_text(json.dumps(result))
        return 0
    console = Console()
    rows = json.dumps([str(options.data), options.rows])
    settings = {
        "rows": rows,
        "tokenizer": options.tokenizer,
        "model_size": options.model_size,
        "max_length": options.max_length,
        "gradient_checkpointing": options.gradient_checkpointing,
        "optim": options.optim,
        "steps": options.steps + 1,
    }
    sides = [side for side in SIDES if side not in options.without]
    plan = [(batch, side) for batch in options.batch_size for _ in range(options.rounds) for side in sides]
    found: dict[tuple[int, str], list[dict]] = {}
    with Progress(console=console) as progress:
        task = progress.add_task("Measuring", total=len(plan) + 1)
        preparation = run_measurement({"rows": rows, "tokenizer": options.tokenizer, "max_length": options.max_length})
        progress.advance(task)
        for batch, side in plan:
            progress.update(task, description=f"{side}, {batch} pairs")
            found.setdefault((batch, side), []).append(run_measurement({**settings, "batch_size": batch, "side": side}))
            progress.advance(task)
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "settings": {**vars(options), "data": options.data.name, "tokenizer": Path(options.tokenizer).name},
        "preparation": preparation,
        "steps": [summary(batch, found, sides) for batch in options.batch_size],
    }
    for name in ("json", "measure"):
        del report["settings"][name]
    show(report, console)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
        console.print(f"Written to {options.json}.")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    head, example = __doc__.split("\n\n", 2)[:2]
    parser = argparse.ArgumentParser(
        description=head, epilog=f"examples:\n{example}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="JSON lines with the strings `prompt`, `chosen` and `rejected`")
    parser.add_argument("--tokenizer", help="Hub id or folder")
    parser.add_argument("--model-size", choices=MODEL_SIZES, default="60m", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 4, 8], metavar="PAIRS", help="per step")
    parser.add_argument("--max-length", type=int, default=1024, metavar="TOKENS", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=2, help="timed in each round, after one that is not")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=1000, help="of the data, from its start (default: %(default)s)")
    parser.add_argument("--optim", default="adamw_torch", help="of TrainingArguments (default: %(default)s)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations, on every side")
    parser.add_argument("--without", nargs="+", choices=SIDES, default=[], metavar="SIDE", help="leave sides out")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results here")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one measurement, in a process of its own
    options = parser.parse_args(arguments)
    if not options.measure:
        if options.data is None or options.tokenizer is None:
            parser.error("--data and --tokenizer are required")
        if not options.data.is_file():
            parser.error(f"--data: the file {options.data} does not exist")
    return options


def run_measurement(measurement: dict) -> dict:
    """Run one measurement in a new process; where it runs out of memory, the result says so."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        job = json.dumps({**measurement, "result": str(result)})
        environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"}
        done = subprocess.run(
            [sys.executable, __file__, "--measure", job], capture_output=True, text=True, env=environment, cwd=folder
        )
        if result.exists():
            return json.loads(result.read_text())
    if "out of memory" in done.stderr or done.returncode == -9:
        return {"out_of_memory": True}
    raise SystemExit(f"{measurement} failed:\n{done.stderr[-3000:]}")


# ---- In the process of one measurement -------------------------------------------------------------------------------


def load_rows(measurement: dict) -> list[dict]:
    path, count = json.loads(measurement["rows"])
    rows = []
    with open(path) as lines:
        for line in lines:
            row = json.loads(line)
            if not all(isinstance(row.get(name), str) for name in ("prompt", "chosen", "rejected")):
                raise SystemExit(f"{path}, row {len(rows)}: expected the strings `prompt`, `chosen` and `rejected`")
            rows.append({name: row[name] for name in ("prompt", "chosen", "rejected")})
            if len(rows) == count:
                break
    return rows


def load_tokenizer(measurement: dict):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(measurement["tokenizer"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def make_trainer(side: str, rows: list[dict], tokenizer, model, folder: str, **options):
    from datasets import Dataset

    if side == TRL:
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    else:
        from orpo_trl import ORPOConfig, ORPOTrainer

        options |= {"pair_layout": "padded" if side == PADDED else "shared_prefix", "nll_reduction": "micro_batch_mean"}
    on_gpu = torch.cuda.is_available()
    args = ORPOConfig(
        folder, report_to="none", use_cpu=not on_gpu, bf16=False, logging_steps=1, disable_tqdm=True, seed=0,
        save_strategy="no", train_sampling_strategy="sequential", learning_rate=1e-5, lr_scheduler_type="constant",
        **options,
    )  # fmt: skip
    return ORPOTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def make_model(size: str, vocabulary: int):
    """A Mistral of random weights: bf16 on a GPU, fp32 on a CPU, whose bf16 is slow."""
    from transformers import MistralConfig, MistralForCausalLM

    hidden, intermediate, layers, heads, key_value_heads = MODEL_SIZES[size]
    config = MistralConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_value_heads, sliding_window=4096, pad_token_id=None,
        max_position_embeddings=32768,
    )  # fmt: skip
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    config.dtype = torch.bfloat16 if on_gpu else torch.float32
    with torch.device("cuda" if on_gpu else "cpu"):
        return MistralForCausalLM._from_config(config, dtype=config.dtype)


def measure_preparation(measurement: dict) -> dict:
    """Seconds from text to token ids, in one process, on both sides."""
    rows, tokenizer = load_rows(measurement), load_tokenizer(measurement)
    seconds = {TRL: [], PACKED: []}
    # Both sides prepare while they make the trainer: what that takes with one row is not preparation.
    for turn in range(4):
        for side, found in seconds.items():
            times = []
            for count in (1, len(rows)):
                model = make_model("10m", len(tokenizer))
                with tempfile.TemporaryDirectory() as folder:
                    begin = time.perf_counter()
                    make_trainer(side, rows[:count], tokenizer, model, folder, max_length=measurement["max_length"])
                    times.append(time.perf_counter() - begin)
            if turn:  # the first one imports
                found.append(times[1] - times[0])
    return {"rows": len(rows), "seconds": {side: statistics.median(found) for side, found in seconds.items()}}


def measure_steps(measurement: dict) -> dict:
    """Times, losses, tokens and peak memory of a few training steps of one side."""
    from transformers import TrainerCallback

    side, batch, steps = measurement["side"], measurement["batch_size"], measurement["steps"]
    tokenizer = load_tokenizer(measurement)
    rows = comparable(load_rows(measurement), tokenizer, measurement["max_length"])[: batch * steps]
    if len(rows) < batch * steps:
        raise SystemExit(f"{batch * steps} comparable rows are needed, and there are {len(rows)}; raise --rows")

    class Clock(TrainerCallback):
        seconds: list[float] = []  # noqa: RUF012

        def on_step_begin(self, *args, **kwargs):
            synchronize()
            self.begin = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            synchronize()
            self.seconds.append(time.perf_counter() - self.begin)

    model = make_model(measurement["model_size"], len(tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            side, rows, tokenizer, model, folder, max_length=measurement["max_length"], max_steps=steps,
            per_device_train_batch_size=batch, optim=measurement["optim"],
            gradient_checkpointing=measurement["gradient_checkpointing"],
        )  # fmt: skip
        trainer.add_callback(Clock())
        gc.collect()
        trainer.train()
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": Clock.seconds[1:],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "peak_bytes": peak,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": [token_counts(rows[i * batch : (i + 1) * batch]) for i in range(1, steps)],
    }


def comparable(rows: list[dict], tokenizer, max_length: int) -> list[dict]:
    """Rows that TRL reads as we do, with their `lengths`: prompt, chosen, rejected, in tokens.

    TRL cannot train on prompts that fill `max_length`, and scores one token more or less where the first token of a
    response merges with the prompt.
    """
    kept = []
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        sides = [tokenizer(row["prompt"] + row[side], add_special_tokens=False)["input_ids"] for side in SIDES_OF_PAIR]
        fits = len(prompt) < max_length - 8 and row["chosen"] != row["rejected"]
        if fits and all(len(prompt) < len(ids) and ids[: len(prompt)] == prompt for ids in sides):
            # One more token begins the row, and one ends the response.
            begin = int(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
            ends = [min(len(ids) + begin + 1, max_length) for ids in sides]
            kept.append({**row, "lengths": [len(prompt) + begin, *ends]})
    return kept


SIDES_OF_PAIR = ("chosen", "rejected")


def token_counts(rows: list[dict]) -> dict[str, int]:
    """Tokens of a batch: `padded`, as TRL computes them, and `unique`, each prompt once."""
    lengths = [row["lengths"] for row in rows]
    return {
        "padded": 2 * len(rows) * max(max(chosen, rejected) for _, chosen, rejected in lengths),
        "unique": sum(chosen + rejected - prompt for prompt, chosen, rejected in lengths),
    }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- The report ------------------------------------------------------------------------------------------------------


def summary(batch: int, found: dict, sides: list[str]) -> dict:
    """Figures of one batch size, by side; speed-up and efficiency against TRL."""
    tokens = next(r["tokens"] for side in sides for r in found[batch, side] if "tokens" in r)
    padded, unique = (sum(count[name] for count in tokens) for name in ("padded", "unique"))
    bound = padded / unique
    result: dict = {"batch_size": batch, "unique_tokens_per_step": unique / len(tokens), "bound": bound, "sides": {}}
    baseline = [r for r in found[batch, TRL] if "seconds" in r] if TRL in sides else []
    for side in sides:
        runs = [r for r in found[batch, side] if "seconds" in r]
        if not runs:
            result["sides"][side] = {"out_of_memory": True}
            continue
        # Each step has its own pairs: the median is over rounds, then the mean over steps.
        seconds = mean_step(runs)
        entry = {
            "ms_per_step": 1e3 * seconds,
            "pairs_per_s": batch / seconds,
            "unique_tokens_per_s": unique / len(tokens) / seconds,
            "peak_gib": max(r["peak_bytes"] for r in runs) / 2**30,
        }
        flops = peak_flops()
        if flops:
            entry["mfu"] = 6 * runs[0]["parameters"] * entry["unique_tokens_per_s"] / flops
        if baseline:
            entry["speed_up"] = mean_step(baseline) / seconds
            entry["efficiency"] = entry["speed_up"] / bound
            entry["memory_ratio"] = entry["peak_gib"] / (max(r["peak_bytes"] for r in baseline) / 2**30)
            entry["loss_difference"] = abs(runs[0]["losses"][0] - baseline[0]["losses"][0])
        result["sides"][side] = entry
    return result


def mean_step(runs: list[dict]) -> float:
    return statistics.mean(statistics.median(times) for times in zip(*(r["seconds"] for r in runs), strict=True))


def hardware() -> str:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def peak_flops() -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def show(report: dict, console: Console) -> None:
    settings = report["settings"]
    title = f"Mistral {settings['model_size']}, {settings['data']}, max_length {settings['max_length']}"
    table = Table(title=f"{title}\n{report['hardware']}", title_justify="left")
    has_mfu = peak_flops() is not None
    columns = ["pairs", "side", "ms/step", "pairs/s", "unique tokens/s", "speed-up", "bound", "efficiency"]
    columns += ["peak GiB", "of TRL's", "loss difference"] + ["MFU"] * has_mfu
    for column in columns:
        table.add_column(column, justify="left" if column == "side" else "right")
    for step in report["steps"]:
        for side, entry in step["sides"].items():
            if "out_of_memory" in entry:
                table.add_row(str(step["batch_size"]), side, "out of memory")
                continue

            def cell(name: str, form: str, entry=entry) -> str:
                return format(entry[name], form) if name in entry else "–"

            cells = [
                str(step["batch_size"]), side, cell("ms_per_step", ".0f"), cell("pairs_per_s", ".2f"),
                cell("unique_tokens_per_s", ".0f"), cell("speed_up", ".2f"), f"{step['bound']:.2f}",
                cell("efficiency", ".2f"), cell("peak_gib", ".2f"), cell("memory_ratio", ".2f"),
                cell("loss_difference", ".1e"),
            ]  # fmt: skip
            table.add_row(*cells, *([cell("mfu", ".1%")] if has_mfu else []))
        table.add_section()
    console.print(table)
    preparation = report["preparation"]
    rates = {side: preparation["rows"] / seconds for side, seconds in preparation["seconds"].items()}
    ours, theirs = rates[PACKED], rates[TRL]
    console.print(
        f"Preparation of {preparation['rows']:,} rows in one process: ours {ours:,.0f} rows/s, "
        f"TRL {theirs:,.0f} rows/s ({ours / theirs:.1f} times)"
    )


if __name__ == "__main__":
    sys.exit(main())
