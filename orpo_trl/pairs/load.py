"""Names of datasets, as a recipe gives them, to datasets whose rows know where they come from."""

from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset

from orpo_trl.config import DataArguments
from orpo_trl.pairs.rows import ROW_COLUMNS

# Columns that name the origin of a row in errors and reports. Row numbers count from 0.
SOURCE_COLUMN = "orpo_source"
ROW_COLUMN = "orpo_row"

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_MIXTURE_KEYS = {"path", "name", "data_dir", "data_files", "split", "columns", "fraction"}


def load_pairs(
    arguments: DataArguments, with_test: bool, seed: int = 42
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """The train and, where asked for, the test rows that the arguments name.

    Args:
        arguments: the sources.
        with_test: whether to load or split off rows to evaluate on.
        seed: decides which rows `test_split_size` holds out, the same in every process.

    Returns:
        Train and test datasets; rows carry their source and row number in `SOURCE_COLUMN` and `ROW_COLUMN`.

    Raises:
        ValueError: where no source is named, two are, or there is nothing to evaluate on; with the key to set.
        FileNotFoundError: naming a local file or folder that does not exist.
    """
    if bool(arguments.dataset_name) == bool(arguments.datasets):
        given = "both" if arguments.dataset_name else "neither"
        raise ValueError(f"Set one of `dataset_name` and `datasets`; received {given}.")
    if arguments.test_split_size is not None and not with_test:
        raise ValueError("`test_split_size` holds rows out to evaluate on, but `eval_strategy` is 'no'.")
    streaming = arguments.dataset_streaming
    if arguments.datasets:
        train = _load_mixture(arguments.datasets, streaming)
    else:
        source = {"path": arguments.dataset_name, "name": arguments.dataset_config}
        train = _load_source({**source, "split": arguments.dataset_train_split}, streaming)
    if not with_test:
        return train, None
    if arguments.test_split_size is not None:
        if streaming:
            raise ValueError("`test_split_size` cannot split a stream: set `dataset_streaming: false`.")
        size = arguments.test_split_size
        split = train.train_test_split(test_size=int(size) if size >= 1 else size, seed=seed)
        return split["train"], split["test"]
    if arguments.datasets:
        raise ValueError("`datasets` has no test split: set `test_split_size`, or `eval_strategy: 'no'`.")
    return train, _load_source({**source, "split": arguments.dataset_test_split}, streaming)


def _load_mixture(entries: list[dict[str, Any]], streaming: bool) -> Dataset | IterableDataset:
    if not isinstance(entries, list):
        raise ValueError(f"`datasets` must be a list of mappings with `path`, got {type(entries).__name__}.")
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"`datasets` entry {position} must be a mapping with `path`, got {entry!r}.")
        unknown = set(entry) - _MIXTURE_KEYS
        if unknown or "path" not in entry:
            problem = f"has unknown keys {', '.join(sorted(unknown))}" if unknown else "has no `path`"
            raise ValueError(f"`datasets` entry {position} {problem}; its keys are {', '.join(sorted(_MIXTURE_KEYS))}.")
    sources = [_load_source(entry, streaming) for entry in entries]
    fractions = [entry.get("fraction") for entry in entries]
    if any(fraction is not None for fraction in fractions):
        if streaming or None in fractions:
            raise ValueError("`fraction` must be set for all entries of `datasets` or for none, and not for streams.")
        for position, fraction in enumerate(fractions):
            if not isinstance(fraction, (int, float)) or not fraction > 0:
                raise ValueError(f"`fraction` of `datasets` entry {position} must be above 0, got {fraction!r}.")
        # As in TRL: the largest mixture of these shares that repeats no row.
        shares = [fraction / sum(fractions) for fraction in fractions]
        total = min(len(source) / share for source, share in zip(sources, shares, strict=True))
        sources = [source.select(range(round(share * total))) for source, share in zip(sources, shares, strict=True)]
    try:
        return datasets.concatenate_datasets(sources)
    except ValueError as error:
        paths = ", ".join(entry["path"] for entry in entries)
        raise ValueError(
            f"The sources {paths} cannot be joined, because a column has another type in one than in another (such as "
            f"strings and message lists). Choose columns with `columns`, or bring the rows to one shape.\n{error}"
        ) from error


def _load_source(entry: dict[str, Any], streaming: bool) -> Dataset | IterableDataset:
    path, split = entry["path"], entry.get("split") or "train"
    options = {key: entry[key] for key in ("name", "data_dir", "data_files") if entry.get(key) is not None}
    local = Path(path).expanduser()
    looks_local = local.suffix in _BUILDERS or path.startswith((".", "/", "~"))
    if looks_local and not local.exists():
        raise FileNotFoundError(f"The dataset {path!r} does not exist (looked for {local.resolve()}).")
    try:
        if local.is_file():
            dataset = _load_file(local, split, streaming)
        elif (local / "state.json").exists():  # written by `Dataset.save_to_disk`
            dataset = datasets.load_from_disk(str(local))
            dataset = dataset.to_iterable_dataset() if streaming else dataset
        elif (local / "dataset_dict.json").exists():
            dataset = datasets.load_from_disk(str(local))[split]
        else:
            dataset = datasets.load_dataset(
                str(local) if local.is_dir() else path, split=split, streaming=streaming, **options
            )
    except (ValueError, KeyError, StopIteration, datasets.exceptions.DatasetGenerationError) as error:
        reason = error.__cause__ or error
        reason = "it has no rows" if isinstance(reason, StopIteration) else reason
        raise ValueError(f"The split {split!r} of the dataset {path!r} could not be loaded: {reason}") from error
    columns = entry.get("columns") or [column for column in dataset.column_names or [] if column in ROW_COLUMNS]
    if columns:
        dataset = dataset.select_columns(columns)
    return _note_origin(dataset, path if split == "train" else f"{path}:{split}")


def _load_file(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    builder = _BUILDERS.get(path.suffix)
    if builder is None:
        raise ValueError(f"expected a file ending in {', '.join(_BUILDERS)}")
    return datasets.load_dataset(builder, data_files={"train": str(path)}, split=split, streaming=streaming)


def _note_origin(dataset: Dataset | IterableDataset, source: str) -> Dataset | IterableDataset:
    if isinstance(dataset, IterableDataset):
        return dataset.map(_origin, with_indices=True, fn_kwargs={"source": source})
    dataset = dataset.add_column(SOURCE_COLUMN, [source] * len(dataset))
    return dataset.add_column(ROW_COLUMN, list(range(len(dataset))))


def _origin(row: dict, index: int, source: str) -> dict:
    return {SOURCE_COLUMN: source, ROW_COLUMN: index}
