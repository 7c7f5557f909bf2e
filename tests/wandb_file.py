"""Reading a W&B run's own file, which offline mode leaves behind: a LevelDB log of protobufs."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK = 32768
_FILE_HEADER, _CHUNK_HEADER = 7, 7
_FULL, _LAST = 1, 4


def _records(data: bytes) -> Iterator[bytes]:
    record, position = b"", _FILE_HEADER
    while position + _CHUNK_HEADER <= len(data):
        if _BLOCK - position % _BLOCK < _CHUNK_HEADER:  # a header never spans two blocks
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += _CHUNK_HEADER
        record += data[position : position + length]
        position += length
        if kind in (_FULL, _LAST):
            yield record
            record = b""


def history(folder: Path, timeout_s: float = 60) -> list[dict[str, Any]]:
    """The rows that the one finished run below `folder` logged, in order."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + timeout_s
    while True:
        rows, complete = [], False
        for raw in _records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(raw)
            complete |= record.WhichOneof("record_type") == "exit"
            if record.WhichOneof("record_type") == "history":
                rows.append(
                    {
                        item.key or "/".join(item.nested_key): json.loads(item.value_json)
                        for item in record.history.item
                    }
                )
        if complete:
            return rows
        # W&B's own process writes the file, and may be behind
        assert time.monotonic() < deadline, f"{file} has no end after {timeout_s} s"
        time.sleep(0.2)
