"""Checkpoints written beside training: a copy is taken at once, a thread makes files of it."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from kanllama_lightning.runs.seals import Written
from kanllama_lightning.storage.files import SummedFile, replacing

SAFETENSORS = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
"""What safetensors calls the number formats of a buffer."""


def copied(state: Any) -> Any:
    """A copy of tensors, in dicts, lists and tuples, that training does not change any more.

    It is in the host's memory. Off the CPU it is pinned, and the copy is only ordered behind what
    the device does already: `arrived()` says what to wait for before it is read.
    """
    if isinstance(state, Tensor):
        own = state.detach()
        if own.device.type == "cpu":
            return own.clone()
        return torch.empty_like(own, device="cpu", pin_memory=True).copy_(own, non_blocking=True)
    if isinstance(state, Mapping):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)([copied(value) for value in state])
    return state


def arrived() -> Callable[[], None]:
    """What waits, in whatever thread, for the copies ordered so far."""
    if not torch.cuda.is_initialized():
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


class Capture(CheckpointIO):
    """Takes a copy of what a trainer would write, and writes nothing."""

    def __init__(self) -> None:
        self.state: dict[str, Any] | None = None
        """The copy; None in processes that write nothing."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Copy it."""
        self.state = copied(checkpoint)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing is read through it."""
        raise NotImplementedError

    def remove_checkpoint(self, path: Any) -> None:
        """Nothing is removed through it."""
        raise NotImplementedError


def write_state(state: dict[str, Any], path: Path) -> Written:
    """Write what `torch.load` reads, into the place of `path` once it is whole.

    Raises:
        OSError: It cannot be written; `path` is as it was.
    """
    return _written(path, lambda file: torch.save(state, file))


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> Written:
    """Write a safetensors file, without a second copy in memory; into the place of `path`.

    The format: the length of a JSON header, the header, the bytes of the tensors. (What
    safetensors' own writer writes would have to be read again to be summed.)

    Args:
        tensors: In the host's memory, of the formats of `SAFETENSORS`.
        path: The file.

    Raises:
        OSError: It cannot be written; `path` is as it was.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        kind, shape = SAFETENSORS[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(file: SummedFile) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().view(torch.uint8).numpy().reshape(-1).data)

    return _written(path, write)


def _written(path: Path, write: Callable[[Any], None]) -> Written:
    """Let a file be written, summed meanwhile, and renamed once it is on the disk."""
    with replacing(path) as part:
        file = SummedFile(part)
        try:
            write(file)
        finally:
            file.close()
    return Written(path.name, file.size, file.crc32)


class Writer:
    """Does one thing at a time in a thread of its own; what goes wrong there is raised here."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._cpu_seconds = 0.0
        self.seconds = 0.0
        """What the last thing took, waits for a disk included."""

    @property
    def busy(self) -> bool:
        """Whether something is being done."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Callable[[], None]) -> None:
        """Begin something, behind what is being done.

        Raises:
            Exception: What ended the thing before.
        """
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint")
        self._thread.start()

    def cpu_seconds(self) -> float:
        """What has ended since the last call took of a processor."""
        if self.busy:
            return 0.0
        seconds, self._cpu_seconds = self._cpu_seconds, 0.0
        return seconds

    def check(self) -> None:
        """Raise what ended the last thing, if it has ended and something did; once."""
        if self.busy or self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait for what is being done; raises what ended it."""
        if self._thread is not None:
            self._thread.join()
        self.check()

    def _run(self, job: Callable[[], None]) -> None:
        began, on_processor = time.perf_counter(), time.thread_time()
        try:
            job()
        except BaseException as e:
            self._error = e
        self._cpu_seconds += time.thread_time() - on_processor
        self.seconds = time.perf_counter() - began
