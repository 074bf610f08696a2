"""Names of datasets, as a recipe gives them, to datasets whose rows know where they come from."""

import csv
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError

from orpo_trl.config import DataArguments, DatasetSource, SettingsError
from orpo_trl.hidden import hide
from orpo_trl.pairs.broken_files import NO_ROW, fault_of, has_json, may_be_misread
from orpo_trl.pairs.columns import MEDIA_COLUMNS, ROW_COLUMNS

# Columns that name the origin of a row in errors and reports. Row numbers count from 0.
SOURCE_COLUMN = "orpo_source"
ROW_COLUMN = "orpo_row"
# Names of the source's columns that were not read, with commas between them.
UNREAD_COLUMN = "orpo_unread"
ORIGIN_COLUMNS = (SOURCE_COLUMN, ROW_COLUMN, UNREAD_COLUMN)

Rows: TypeAlias = Dataset | IterableDataset

_NOT_LOADED = "The split {!r} of the dataset {!r} could not be loaded: {}"
# Bytes up to which a stream's file is looked through before training.
_MAX_CHECKED = 1 << 30
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_pairs(arguments: DataArguments, with_test: bool, seed: int = 42) -> tuple[Rows, Rows | dict[str, Rows] | None]:
    """The train and, where asked for, the test rows that the arguments name.

    Args:
        arguments: the sources.
        with_test: whether to return rows to evaluate on. Those of `test_split_size` are never trained.
        seed: decides which rows `test_split_size` holds out, the same in every process.

    Returns:
        Train and test datasets, the latter by label where `eval_datasets` names them; rows carry their source and row
        number in `SOURCE_COLUMN` and `ROW_COLUMN`.

    Raises:
        SettingsError: where no source is named, two are, or there is nothing to evaluate on; with the key to set.
        ValueError: where a split or a column does not exist, or sources do not fit together.
        FileNotFoundError: naming a local file or folder that does not exist.
    """
    problems = arguments.problems(with_test)
    if problems:
        raise SettingsError("DataArguments", problems)
    streaming = arguments.dataset_streaming

    def load_split(split: str) -> Rows:
        source = DatasetSource(path=arguments.dataset_name or "", name=arguments.dataset_config, split=split)
        return _load_source(source, streaming)

    if arguments.datasets:
        train = _load_mixture(arguments.datasets, streaming, seed)
    else:
        train = load_split(arguments.dataset_train_split)
    size = arguments.test_split_size
    if size is not None and isinstance(train, Dataset):  # a stream cannot be split, which `problems` says
        split = train.train_test_split(test_size=int(size) if size >= 1 else size, seed=seed)
        # Without evaluation too: it must not decide what is trained.
        return split["train"], split["test"] if with_test else None
    if not with_test:
        return train, None
    if arguments.eval_datasets:
        return train, {label: _load_source(entry, streaming) for label, entry in arguments.eval_datasets.items()}
    try:
        return train, load_split(arguments.dataset_test_split)
    except ValueError as error:
        if not isinstance(error.__cause__, KeyError) and " split" not in str(error.__cause__):
            raise  # it is there, and cannot be read
        raise ValueError(
            f"{error}\nWithout a test split, set `test_split_size`, such as 100 or 0.05: it holds out rows of the "
            "train split."
        ) from error


def _load_mixture(entries: list[DatasetSource], streaming: bool, seed: int) -> Rows:
    sources: list[Any] = [_load_source(entry, streaming) for entry in entries]  # streams have neither share nor weight
    shares = [entry.get("fraction") or 0.0 for entry in entries]
    if all(shares):
        # As in TRL: the largest mixture of these shares that repeats no row.
        shares = [share / sum(shares) for share in shares]
        rows = min(len(source) / share for source, share in zip(sources, shares, strict=True))
        sources = [source.select(range(round(share * rows))) for source, share in zip(sources, shares, strict=True)]
    sources = [
        _repeat(source, weight, seed) if (weight := entry.get("weight")) else source
        for source, entry in zip(sources, entries, strict=True)
    ]
    try:
        return datasets.concatenate_datasets([_without_empty_media(source) for source in sources])
    except ValueError as error:
        paths = ", ".join(entry["path"] for entry in entries)
        raise ValueError(
            f"The sources {paths} cannot be joined, because a column has another type in one than in another (such as "
            f"strings and message lists). Choose columns with `columns`, or bring the rows to one shape.\n{error}"
        ) from error


def _without_empty_media(rows: Any) -> Any:
    """Rows without columns of images and the like that are empty. Their types often differ from source to source."""
    if isinstance(rows, IterableDataset):
        return rows
    held = [name for name in MEDIA_COLUMNS if name in rows.column_names]
    return rows.remove_columns([name for name in held if rows.data.column(name).null_count == len(rows.data)])


def _repeat(dataset: Dataset, weight: float, seed: int) -> Dataset:
    """Every row `weight` times: all of them as often as it goes, and a random part of them once more."""
    whole, part = divmod(round(weight * len(dataset)), len(dataset))
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:part]
    return dataset.select(np.concatenate([np.tile(np.arange(len(dataset)), whole), np.sort(chosen)]).astype(int))


def _load_source(entry: DatasetSource, streaming: bool) -> Rows:
    path, split = entry["path"], entry.get("split") or "train"
    options: dict[str, Any] = {key: entry.get(key) for key in ("name", "data_dir", "data_files")}
    options = {key: value for key, value in options.items() if value is not None}
    local = Path(path).expanduser()
    looks_local = local.suffix in _BUILDERS or path.startswith((".", "/", "~"))
    if looks_local and not local.exists():
        raise FileNotFoundError(f"The dataset {path!r} does not exist (looked for {local.resolve()}).")
    dataset: Any  # `load_dataset` and `load_from_disk` return rows or splits, by their arguments
    files = _data_files(path, local, options)
    names = entry.get("columns") or ROW_COLUMNS
    read = list(names.values()) if isinstance(names, dict) else names
    if PartialState().is_local_main_process:  # which goes first, and ends the run of the others
        _refuse_broken(path, split, [file for file in files if _is_checked_first(file, streaming)], read)
    try:
        if local.is_file():
            dataset = _load_file(local, split, streaming)
        elif (local / "state.json").exists():  # written by `Dataset.save_to_disk`
            if split != "train" or options:
                raise ValueError("a folder of `Dataset.save_to_disk` has all of its rows in one split, `train`")
            dataset = datasets.load_from_disk(str(local))
            dataset = dataset.to_iterable_dataset() if streaming else dataset
        elif (local / "dataset_dict.json").exists():
            if options:
                raise ValueError(f"{_quoted(options)} cannot be chosen from what `save_to_disk` has written")
            dataset = datasets.load_from_disk(str(local))[split]
            dataset = dataset.to_iterable_dataset() if streaming else dataset
        elif files and all(file.suffix == ".csv" for file in files):
            options = {"data_dir": str(local), **options, **_csv_options(files[0])}
            dataset = datasets.load_dataset("csv", split=split, streaming=streaming, **options)
        else:
            dataset = datasets.load_dataset(
                str(local) if local.is_dir() else path, split=split, streaming=streaming, **options
            )
        has = dataset.column_names or list(next(iter(dataset), {}))
        if isinstance(dataset, Dataset) and any(file.suffix in (".json", ".jsonl") for file in files):
            dataset.data.validate(full=True)  # its reader takes any bytes for text
        mixed = {name: dataset.features[name] for name in read if has_json((dataset.features or {}).get(name))}
    except (
        ValueError, KeyError, StopIteration, TypeError, RuntimeError, DatasetGenerationError
    ) as error:  # fmt: skip
        _refuse_broken(path, split, files, None)
        reason = error.__cause__ or error
        reason = NO_ROW if isinstance(reason, StopIteration) else reason
        raise ValueError(_NOT_LOADED.format(split, path, reason)) from error
    if mixed and PartialState().is_local_main_process:
        jsons = [file for file in files if file.suffix in (".json", ".jsonl") and not (streaming and _is_large(file))]
        _refuse_broken(path, split, jsons, read, mixed)
    dataset, unread = _choose_columns(dataset, entry, has)
    path = hide(path)  # the origin of a row stands in reports, metrics and samples
    return _note_origin(dataset, path if split == "train" else f"{path}:{split}", ",".join(unread))


def _data_files(path: str, local: Path, options: dict[str, Any]) -> list[Path]:
    """A local file, or those of a local folder that `datasets` reads."""
    if local.is_file():
        return [local]
    if not local.is_dir() or (local / "state.json").exists() or (local / "dataset_dict.json").exists():
        return []
    try:
        found = datasets.load_dataset_builder(str(local), **options).config.data_files or {}
    except RuntimeError as error:  # a loading script, which `datasets` does not run
        raise ValueError(f"The folder {path!r} is not read: {error}") from error
    except FileNotFoundError as error:
        raise ValueError(
            f"The folder {path!r} has no data that could be loaded: {error}. Expected files ending in "
            f"{', '.join(_BUILDERS)}."
        ) from error
    return [Path(file) for files in found.values() for file in files]


def _is_checked_first(path: Path, streaming: bool) -> bool:
    """Whether a file is looked through before it is loaded: its reader would change what is broken in it in silence, or
    a stream would fail in the middle of training."""
    if path.suffix == ".csv" or (streaming and not _is_large(path)):
        return True
    return path.suffix in (".json", ".jsonl") and may_be_misread(path)


def _is_large(path: Path) -> bool:
    return path.stat().st_size > _MAX_CHECKED


def _refuse_broken(
    path: str,
    split: str,
    files: list[Path],
    columns: Collection[str] | None,
    features: Mapping[str, Any] | None = None,
) -> None:
    for file in files:
        fault = fault_of(file, columns, features)
        if fault:
            name = "" if str(file) == str(Path(path).expanduser()) else f"{file}: "
            raise ValueError(_NOT_LOADED.format(split, path, name + fault))


def _choose_columns(dataset: Rows, entry: DatasetSource, has: list[str]) -> tuple[Rows, list[str]]:
    """The columns that rows are read from, under our names, and those that are left: `columns` of the entry, or all
    that a row may use. `has`: the columns of the dataset, which a stream may not know."""
    columns = entry.get("columns") or _readable(has)
    ours, theirs = list(columns), list(columns.values()) if isinstance(columns, dict) else list(columns)
    missing = [column for column in theirs if has and column not in has]
    if missing:
        raise ValueError(
            f"The dataset {entry['path']!r} has no column {_quoted(missing)}, which `columns` names; it has "
            f"{_quoted(has)}."
        )
    foreign = [column for column in ours if column not in ROW_COLUMNS]
    if foreign:
        raise ValueError(
            f"`columns` of the dataset {entry['path']!r} names {_quoted(foreign)}, which nothing reads; the columns of "
            f"a row are {_quoted(ROW_COLUMNS)}. Write `our_name: name_in_the_file`."
        )
    if theirs:
        dataset = dataset.select_columns(theirs)
    if isinstance(columns, dict):
        dataset = dataset.rename_columns({their: our for our, their in columns.items() if their != our})
    return dataset, [column for column in has if column not in theirs]


def _readable(has: list[str]) -> list[str]:
    """Those of a source's columns that rows are read from. Beside `chosen`, those of other tools' rows are not."""
    others = ("messages", "rejected_response", "rejected_messages") if "chosen" in has else ()
    return [column for column in has if column in ROW_COLUMNS and column not in others]


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _csv_options(path: Path) -> dict[str, Any]:
    """Reads each cell as text, whatever it looks like, and an empty one as absent."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        names = next(csv.reader(file), [])
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return {"features": features, "keep_default_na": False, "na_values": [""]}


def _load_file(path: Path, split: str, streaming: bool) -> Rows:
    builder = _BUILDERS.get(path.suffix)
    if builder is None:
        raise ValueError(f"expected a file ending in {', '.join(_BUILDERS)}")
    options = _csv_options(path) if builder == "csv" else {}
    return datasets.load_dataset(builder, data_files={"train": str(path)}, split=split, streaming=streaming, **options)


def _note_origin(dataset: Rows, source: str, unread: str) -> Rows:
    if isinstance(dataset, IterableDataset):
        return dataset.map(_origin, with_indices=True, fn_kwargs={"source": source, "unread": unread})
    dataset = dataset.add_column(SOURCE_COLUMN, [source] * len(dataset))
    dataset = dataset.add_column(UNREAD_COLUMN, [unread] * len(dataset))
    return dataset.add_column(ROW_COLUMN, list(range(len(dataset))))


def _origin(row: dict, index: int, source: str, unread: str) -> dict:
    return {SOURCE_COLUMN: source, ROW_COLUMN: index, UNREAD_COLUMN: unread}
