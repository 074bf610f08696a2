"""Reads what an offline wandb run wrote: a log of protobuf records in LevelDB's format, behind a header of 7 bytes."""

import json
import struct
import time
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_MESSAGES: Any = wandb_internal_pb2  # its classes are made while it loads
_BLOCK, _HEADER = 32 * 1024, 7


def records(path: Path):
    data, position, whole = path.read_bytes(), _HEADER, b""
    while position + _HEADER <= len(data):
        if _BLOCK - position % _BLOCK < _HEADER:  # too short for another part: padding
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if position + _HEADER + length > len(data):  # a part that is being written
            return
        whole += data[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length
        if kind in (1, 4):  # the whole record, or its last part
            record = _MESSAGES.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def read_offline_run(folder: Path, is_over: bool = True) -> dict:
    """`run` (id, name, group, tags, project), `config`, `history` (a dict per log), of one offline-run folder.

    Args:
        folder: of the run.
        is_over: wait until it is whole; False for a run that was killed.
    """
    (path,) = folder.glob("*.wandb")
    deadline = time.monotonic() + 60  # wandb's own process goes on writing when `wandb.finish` has returned
    while is_over and "exit" not in {record.WhichOneof("record_type") for record in records(path)}:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    found = {"run": None, "config": {}, "history": []}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            found["run"] = {
                "id": run.run_id, "name": run.display_name, "group": run.run_group, "tags": list(run.tags),
                "project": run.project,
            }  # fmt: skip
            found["config"] |= _items(run.config.update)
        elif kind == "config":
            found["config"] |= _items(record.config.update)
        elif kind == "history":
            found["history"].append(_items(record.history.item))
    return found


def _items(updates) -> dict:
    return {".".join(update.nested_key) or update.key: json.loads(update.value_json) for update in updates}
