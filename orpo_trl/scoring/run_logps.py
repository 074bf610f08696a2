"""The command `orpo-trl logps`: from the names of a model and a dataset to records, a file and a summary."""

import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from orpo_trl.attention import without_adapter
from orpo_trl.batch import PairCollator
from orpo_trl.config import DataArguments, ModelArguments
from orpo_trl.devices import torch_device
from orpo_trl.model import model_name
from orpo_trl.pairs.load import load_pairs
from orpo_trl.pairs.prepare import pair_lengths, prepare_pairs
from orpo_trl.pairs.tokenize import PairRules
from orpo_trl.plain_files import replace_whole, write_text
from orpo_trl.printable import printable
from orpo_trl.scoring.against import RECORD_AGAINST, check_same_tokens, with_base
from orpo_trl.scoring.logps import RECORD, prepare_model, score_pairs
from orpo_trl.scoring.models import load_model, load_scoring_tokenizer, require_model
from orpo_trl.scoring.summary import comparison, summary
from orpo_trl.upstream import is_remote_code

FORMATS = (".jsonl", ".parquet")


def run_logps(
    model: str,
    data: str,
    output: Path | None = None,
    *,
    against: str | None = None,
    split: str = "train",
    config: str | None = None,
    tokenizer: str | None = None,
    chat_template_path: str | None = None,
    on_malformed: str = "error",
    on_unrendered: str = "warn",
    pair_layout: str = "auto",
    max_tokens: int = 8192,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    **rules: Any,
) -> list[dict[str, Any]]:
    """Score the pairs of a dataset; report and summary go to standard error.

    Args:
        model: Hub id or folder, of a model or a PEFT adapter.
        data: as in `DataArguments.dataset_name`.
        against: Hub id or folder of another model or adapter, the base, that scores the same tokens.
        split, config: split and configuration of the dataset.
        output: .jsonl or .parquet file, which is written whole at the end.
        tokenizer: Hub id or folder of the tokenizer; by default the model's own.
        device: torch's name of the device; by default the GPU where there is one.
        chat_template_path, on_malformed, on_unrendered, pair_layout, trust_remote_code: as in `ORPOConfig`.
        dtype: as in `ModelArguments`.
        max_tokens: as in `score_pairs`.
        rules: fields of `PairRules`.

    Returns:
        Records as `score_pairs` makes them; with `against`, those of `with_base`.

    Raises:
        ValueError, OSError: for what the user can fix; before the weights are loaded where it is known by then.
    """
    if output is not None:
        _check_output(output)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
    where = torch_device(device)
    model_args = ModelArguments(model_name_or_path=model, tokenizer_name_or_path=tokenizer, dtype=dtype)
    base_args = ModelArguments(model_name_or_path=against, tokenizer_name_or_path=None, dtype=dtype)
    for arguments in (model_args, *([base_args] if against is not None else [])):
        require_model(arguments, trust_remote_code)
    encoder = load_scoring_tokenizer(model_args, chat_template_path, trust_remote_code)
    data_args = DataArguments(dataset_name=data, dataset_config=config, dataset_train_split=split)
    rows, _ = load_pairs(data_args, with_test=False)
    prepared, report = prepare_pairs(rows, encoder, PairRules(**rules), split, on_malformed, on_unrendered)
    pairs = cast(Dataset, prepared)  # as only `dataset_streaming` makes streams
    print(printable(str(report)), file=sys.stderr)
    if against is not None:
        check_same_tokens(pairs, encoder, _base_tokenizer(base_args, trust_remote_code))
    records, seconds = load_and_score(model_args, encoder, pairs, where, pair_layout, max_tokens, trust_remote_code)
    text = summary(records)
    if against is not None:
        of_base, _ = load_and_score(base_args, encoder, pairs, where, pair_layout, max_tokens, trust_remote_code)
        records = with_base(records, of_base)
        text += f"\n{printable(comparison(records, against))}"
    if output is not None:
        write_records(records, output, RECORD if against is None else RECORD_AGAINST)
    print(text, file=sys.stderr)
    tokens = sum(pairs["length"])
    print(f"time: {seconds:.1f} s, {tokens / seconds:,.0f} unique tokens/s on {where}", file=sys.stderr)
    return records


def load_and_score(
    model_args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    device: torch.device,
    pair_layout: str = "auto",
    max_tokens: int = 8192,
    trust_remote_code: bool = False,
) -> tuple[list[dict[str, Any]], float]:
    """Records of prepared pairs, as `score_pairs` makes them, and the seconds that scoring took without loading.

    Args:
        tokenizer: has made the pairs.
        model_args, device, pair_layout, max_tokens, trust_remote_code: as in `run_logps`.

    Raises:
        ValueError, OSError: for what the user can fix.
    """
    loaded = load_model(model_args, device, trust_remote_code)
    if is_remote_code(without_adapter(loaded)) or is_remote_code(tokenizer):
        print(printable(f"Code of {model_name(model_args)} was run (--trust_remote_code)."), file=sys.stderr)
    _check_fits(pairs, cast(PreTrainedModel, loaded).config.get_text_config())
    padding = cast(int, tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    # Prompts are not scored, so that a GPU's head leaves them out.
    collator = PairCollator(padding, nll_scope="completion", layout=prepare_model(loaded, pair_layout))
    start = time.perf_counter()
    try:
        return score_pairs(loaded, pairs, collator, max_tokens), time.perf_counter() - start
    except torch.OutOfMemoryError as error:
        raise ValueError(f"--max_tokens {max_tokens}: out of memory on {device}, set fewer. {error}") from error
    finally:
        # A model refers to itself, so that its memory is free for the next one only when the collector has run.
        del loaded
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _base_tokenizer(arguments: ModelArguments, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return load_scoring_tokenizer(arguments, None, trust_remote_code)
    except ValueError as error:
        problem = f"--against: {model_name(arguments)!r} has no tokenizer that can be loaded to compare vocabularies."
        raise ValueError(f"{problem}\n{error}") from error


def json_lines(records: list[dict[str, Any]]) -> Iterator[str]:
    """Records as JSON Lines."""
    return (json.dumps(record) + "\n" for record in records)


def write_records(records: list[dict[str, Any]], path: Path, schema: pa.Schema = RECORD) -> None:
    """Write records with the keys of a schema to a .jsonl or .parquet file, whole or not at all."""
    if path.suffix == ".parquet":
        replace_whole(path, lambda file: pq.write_table(pa.Table.from_pylist(records, schema), file))
    else:
        write_text(path, "".join(json_lines(records)))


def _check_output(path: Path) -> None:
    if path.suffix not in FORMATS:
        raise ValueError(f"--output: expected a file ending in {' or '.join(FORMATS)}, received {path}")
    if os.path.lexists(path):
        raise ValueError(f"--output: {path} exists already")
    if not path.parent.is_dir():
        raise ValueError(f"--output: the folder {path.parent} does not exist")


def _check_fits(pairs: Dataset, config: PreTrainedConfig) -> None:
    """Refuse tokens and positions for which the model has no weights."""
    vocabulary, positions = config.vocab_size, getattr(config, "max_position_embeddings", None)
    table = pairs.with_format("arrow")[:]
    ids = (pc.call_function("list_flatten", [table[f"{part}_ids"]]) for part in ("prompt", "chosen", "rejected"))
    largest = max(pc.call_function("max", [part]).as_py() or 0 for part in ids)
    if largest >= vocabulary:
        raise ValueError(
            f"The rows have token id {largest}, and the model embeds {vocabulary:,} tokens. Set --tokenizer."
        )
    longest = pair_lengths(pairs).longest_row.max()
    if positions is not None and longest > positions:
        raise ValueError(
            f"The longest row has {longest:,} tokens, more than the model's {positions:,} positions. Set --max_length "
            f"{positions} to cut responses, and --max_prompt_length to leave out rows with long prompts."
        )
