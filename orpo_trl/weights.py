"""Which files of weights and checkpoints are read: safetensors, and of a checkpoint what cannot run code.

`torch.save` writes pickles, and a pickle can run any code when it is loaded. Weights are read from safetensors alone,
which hold numbers and nothing else. A checkpoint also holds the optimizer's state as pickles; transformers reads its
own with `weights_only=True`, which builds no objects but tensors. DeepSpeed and torch's sharded checkpoints are read
without that, so their pickles are looked through first.
"""

import importlib
import json
import pickle
import zipfile
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from orpo_trl.plain_files import MAX_RECORDS, UnsafeFile, check_readable, read_text

_MODEL, _INDEX, _ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# What the Trainer would load in place of safetensors.
_WEIGHTS_OF_CHECKPOINT = {
    "pytorch_model.bin": _MODEL,
    "pytorch_model.bin.index.json": _INDEX,
    "adapter_model.bin": _ADAPTER,
}
# Classes that DeepSpeed and torch write into their checkpoints, beside those that `weights_only` takes.
_KNOWN = {
    "argparse Namespace",
    "deepspeed.runtime.fp16.loss_scaler DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler LossScaler",
    "deepspeed.runtime.zero.config ZeroStageEnum",
    "deepspeed.utils.tensor_fragment fragment_address",
    "numpy dtype",
    "numpy ndarray",
    "numpy.core.multiarray _reconstruct",
    "numpy._core.multiarray _reconstruct",
    "numpy.core.multiarray scalar",
    "numpy._core.multiarray scalar",
    "collections OrderedDict",
    "collections defaultdict",
    "builtins set",
    "builtins dict",
    "builtins list",
    "builtins int",
    "builtins float",
    "__builtin__ set",
    "__builtin__ dict",
    "torch Size",
    "torch Tensor",
    *(f"torch {kind}" for kind in "bfloat16 bool float16 float32 float64 int8 int16 int32 int64 uint8".split()),
    "torch._tensor _rebuild_from_type_v2",
    "torch.nn.parameter Parameter",
    "torch device",
    "torch.serialization _get_layout",
    "torch.distributed.checkpoint.metadata BytesStorageMetadata",
    "torch.distributed.checkpoint.metadata ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.metadata Metadata",
    "torch.distributed.checkpoint.metadata MetadataIndex",
    "torch.distributed.checkpoint.metadata StorageMeta",
    "torch.distributed.checkpoint.metadata TensorProperties",
    "torch.distributed.checkpoint.metadata TensorStorageMetadata",
    "torch.distributed.checkpoint.filesystem _StorageInfo",
    "torch.distributed.checkpoint.filesystem _StoragePrefix",
    "pathlib PosixPath",
    "pathlib PurePosixPath",
    "pathlib WindowsPath",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch.storage UntypedStorage",
}
# Libraries whose classes may be in a checkpoint.
_STATEFUL = ("torch", "deepspeed", "bitsandbytes")
# Bytes of one file of a checkpoint: no limit but that it is one.
MAX_CHECKPOINT = 1 << 60


class UnsafeWeights(UnsafeFile):
    """Weights or a checkpoint that could run code; the message says what to do."""


def refuse_pickles(name: str) -> None:
    """Refuse a model's or adapter's folder whose weights are not safetensors, before anything of it is loaded.

    Args:
        name: a folder, or the Hub id of a model, of which the loader refuses pickles itself (`use_safetensors=True`).

    Raises:
        UnsafeWeights: naming the folder, the files that were found, and how to convert them.
    """
    folder = Path(name).expanduser()
    if folder.is_file():
        raise UnsafeWeights(f"The model {name!r} is a file. Name the folder of a model with safetensors, or a Hub id.")
    if not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir()}
    if _INDEX in names:
        _check_index(folder / _INDEX)
    _check_named_weights(folder / "config.json")
    if names & {_MODEL, _INDEX, _ADAPTER}:
        is_shadowed = "adapter_config.json" in names and _ADAPTER not in names and "adapter_model.bin" in names
        pickles = ["adapter_model.bin"] if is_shadowed else []
    else:
        pickles = sorted(found for found in names if found.endswith(_PICKLES) and found != "training_args.bin")
    if pickles:
        shown = ", ".join(pickles[:3]) + (", …" if len(pickles) > 3 else "")
        raise UnsafeWeights(
            f"The model {name!r} has weights as pickles ({shown}) and not as safetensors. A pickle can run code when "
            "it is loaded, so it is not read. Convert it where you trust it: load the model with transformers (or "
            "peft), and save it with `save_pretrained`, which writes safetensors."
        )


def refuse_pickled_adapter(name: str) -> None:
    """Refuse an adapter on the Hub without safetensors: peft would load its pickle.

    Raises:
        UnsafeWeights: naming the adapter.
    """
    if Path(name).expanduser().is_dir():
        return  # `refuse_pickles` has looked at it
    try:
        hf_hub_download(name, _ADAPTER)
    except (OSError, ValueError) as error:  # the errors of huggingface_hub are among these
        raise UnsafeWeights(f"The adapter {name!r} has no {_ADAPTER}; a pickle is not read. {error}") from error


def _check_index(path: Path) -> None:
    """The shards that an index names must be safetensors beside it."""
    weight_map = _read_json(path).get("weight_map")
    files = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    for file in sorted(map(str, files)):
        if not file.endswith(".safetensors") or Path(file).name != file:
            raise UnsafeWeights(f"{path}: expected names of safetensors beside it, received {file!r:.80}")


def _check_named_weights(path: Path) -> None:
    """A config may name the file of weights."""
    named = _read_json(path).get("transformers_weights") if path.is_file() else None
    if named is not None and not str(named).endswith((".safetensors", ".safetensors.index.json")):
        raise UnsafeWeights(f"{path}: `transformers_weights`: expected safetensors, received {named!r:.80}")


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(read_text(path, MAX_RECORDS))
    except (ValueError, RecursionError) as error:
        raise UnsafeWeights(f"{path}: expected JSON, received: {error}") from error
    return found if isinstance(found, dict) else {}


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def refuse_unsafe_checkpoint(folder: Path) -> None:
    """Refuse to resume from a checkpoint whose files would run code, before any of them is loaded.

    Args:
        folder: a `checkpoint-…` folder of the Trainer.

    Raises:
        UnsafeWeights: naming the file, and what it would call.
    """
    for unsafe, safe in _WEIGHTS_OF_CHECKPOINT.items():
        if (folder / unsafe).exists() and not ((folder / safe).exists() or (folder / _INDEX).exists()):
            raise UnsafeWeights(
                f"The checkpoint {folder} has weights as a pickle ({unsafe}) and no {safe}. A pickle can run code when "
                "it is loaded, so it is not read."
            )
    if (folder / _INDEX).is_file():
        _check_index(folder / _INDEX)
    for path in sorted(_unlimited_pickles(folder)):
        try:
            check_readable(path, MAX_CHECKPOINT)
            _look_through(path)
        except Exception as error:  # a damaged pickle raises anything
            raise UnsafeWeights(f"{path}: this file of the checkpoint is not loaded: {error}") from error


def _unlimited_pickles(folder: Path) -> Iterator[Path]:
    """The files that DeepSpeed and torch load as any pickle."""
    yield from folder.glob("*/*.pt")
    yield from folder.glob("*/.metadata")


class _Inert:
    """Stands for an object of a checkpoint, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any):
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass


def _member(kind: Any, name: Any) -> _Inert:
    """Stands for `getattr`, by which Python 3.11.0 to 3.11.3 pickle the member of an enumeration."""
    if name not in getattr(kind, "members", ()):
        raise UnsafeWeights("it would call builtins.getattr, which no checkpoint of DeepSpeed or torch does")
    return _Inert()


class _Look(pickle.Unpickler):
    """Takes a pickle apart without running anything of it: whatever it calls is replaced by `_Inert`."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name == "getattr":  # the second in the format of `torch.save`
            return _member
        if not _is_known(module, name):
            raise UnsafeWeights(f"it would call {module}.{name}, which no checkpoint of DeepSpeed or torch does")
        found = _own_class(module, name)
        members = frozenset(found.__members__) if found is not None and issubclass(found, Enum) else frozenset()
        return type("_InertClass", (_Inert,), {"members": members})

    def persistent_load(self, pid: Any) -> Any:
        return _Inert()  # the numbers of a tensor


def _look_through(path: Path) -> None:
    """Raises an UnsafeWeights where the pickle calls anything but what a checkpoint is made of."""
    if not zipfile.is_zipfile(path):  # `.metadata`
        with open(path, "rb") as file:
            _Look(file).load()
        return
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".pkl"):
                with archive.open(name) as file:
                    _Look(file).load()


def _is_known(module: str, name: str) -> bool:
    if module == "torch" and name.endswith("Storage"):
        return True
    return f"{module} {name}" in _KNOWN or _own_class(module, name) is not None


def _own_class(module: str, name: str) -> type | None:
    """A class of a library whose states checkpoints hold: optimizers and engines bring their own.

    None for a function, and for what a library has imported from elsewhere: nothing is known of these.
    """
    root = module.split(".")[0]
    if root not in _STATEFUL or "." in name:
        return None
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None
    return found if isinstance(found, type) and found.__module__.split(".")[0] == root else None
