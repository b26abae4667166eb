"""Reads an offline `.wandb` file back: a LevelDB log of protobuf records."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32_768, 7


def records(path: Path) -> Iterator[Any]:
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = HEADER, []
    while at + HEADER <= len(data):
        room = BLOCK - at % BLOCK
        if room < HEADER:
            at += room
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0:
            at += room
            continue
        if at + HEADER + size > len(data):
            return  # still being written
        parts.append(data[at + HEADER : at + HEADER + size])
        at += HEADER + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def whole(path: Path, seconds: float = 30.0) -> list[Any]:
    """All records, once W&B has written the last one: its service does so beside the process."""
    end = time.monotonic() + seconds
    while True:
        found = list(records(path))
        if any(r.WhichOneof("record_type") == "exit" for r in found) or time.monotonic() > end:
            return found
        time.sleep(0.1)


def opened(path: Path) -> Any:
    """The run that a piece belongs to: run_id, run_group, display_name, project."""
    return next(r.run for r in whole(path) if r.WhichOneof("record_type") == "run")


def history(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The logged rows and the configuration."""
    rows, config = [], {}
    for record in whole(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = record.history.item
            rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
        for source in (record.run.config, record.config):
            for item in source.update:
                config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return rows, config
