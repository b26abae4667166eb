"""What a GPU is asked to do, op by op: waits, copies, launches, bytes moved and bytes held.

Import `tests.fake_cuda.device` and call its `load` before this.
"""

import linecache
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
PACKAGE = str(Path(__file__).resolve().parents[2] / "kanllama_lightning")
LM = f"{PACKAGE}/lm/"
VIEWS = {
    *("view", "t", "detach", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze"),
    *("alias", "as_strided", "permute", "_unsafe_view", "unbind", "split", "narrow", "reshape"),
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh"),
    *("_reshape_alias", "split_with_sizes", "view_as", "unfold", "diagonal", "chunk"),
}
"""Operations that launch nothing."""
LARGE = 32 << 20
"""Bytes from which a tensor is named where memory is at its peak."""


class Place(NamedTuple):
    """A line of ours."""

    where: str
    """File, within the package, and line number; "autograd" where none of ours is running."""
    text: str
    in_lm: bool


def place() -> Place:
    """The innermost line of ours that is running in this thread."""
    frame, found, in_lm = sys._getframe(1), None, False
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE):
            found = found or (file, frame.f_lineno)
            in_lm = in_lm or file.startswith(LM)
        frame = frame.f_back  # type: ignore[assignment]
    if found is None:
        return Place("autograd", "", False)
    file, line = found
    text = linecache.getline(file, line).strip()
    return Place(f"{file[len(PACKAGE) + 1 :]}:{line}", text, in_lm)


class Counts:
    """What was seen since this began, the LM's own launches and bytes apart."""

    def __init__(self) -> None:
        self.syncs: Counter[str] = Counter()
        """Where the host waited for the device."""
        self.copies: Counter[str] = Counter()
        """Where it waited for a copy from the host to the device to be taken over."""
        self.launches: Counter[str] = Counter()
        self.lm_launches = 0
        self.traffic: Counter[str] = Counter()
        """Bytes of all operands, each counted once for every operation; see `moved`."""


def moved(func: Any, args: tuple[Any, ...], tensors: list[Tensor], out: Any) -> int:
    """Bytes that an operation reads and writes: of what it looks up, no more than it looks up."""

    def size(*some: Any) -> int:
        return sum(t.numel() * t.element_size() for t in some if isinstance(t, Tensor))

    name = str(func).split(".")[1]
    if name in ("index", "index_select", "gather", "embedding"):
        return 2 * size(out) + size(*tree_leaves(args[1:]))
    if name.startswith("_embedding_bag"):
        first = 1 if "backward" in name else 0  # the gradient comes before the table
        table, index = args[first : first + 2]
        rows = index.numel() * table.shape[1] * table.element_size()
        return rows + size(*args[:first], *args[first + 1 :], *(out if first == 0 else [out]))
    if name in ("index_add_", "index_put_", "_index_put_impl_", "scatter_add_"):
        return 3 * size(args[-1] if isinstance(args[-1], Tensor) else args[2]) + size(
            *tree_leaves(args[1:])
        )
    return size(*tensors)


class FakeEvent:
    """`torch.cuda.Event`: waiting for one counts, unless it was recorded in an earlier step."""

    recorder: "Recorder"

    def __init__(self, **_: Any) -> None:
        self.step = -1

    def record(self, *_: Any) -> None:
        self.step = self.recorder.step

    def synchronize(self) -> None:
        if self.step >= self.recorder.step:
            self.recorder.waited("event")

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: "FakeEvent") -> float:
        return 1.0


class Recorder(TorchDispatchMode):
    """Counts what happens on tensors of device cuda; enter it inside a FakeTensorMode.

    Args:
        values: What reading a number gives, from the line that reads it and the tensor.
        sizes: How many entries an operation finds whose result's size depends on values.
    """

    def __init__(
        self, values: Callable[[Place, Tensor], Any], sizes: Callable[[Place, Tensor], int]
    ) -> None:
        super().__init__()
        self.values, self.sizes = values, sizes
        self.step = 0
        self.counts = Counts()
        self._fused = 0
        self._holding: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self._state: dict[int, StorageWeakRef] = {}
        self._live = self.peak = 0
        self.tracking = False
        self.at_peak: list[tuple[int, str]] = []

    # ------------------------------------------------------------------ memory

    def is_state(self, tensors: list[Tensor]) -> None:
        """Do not count these: they are there before the step and after it."""
        for tensor in tensors:
            ref = StorageWeakRef(tensor.untyped_storage())
            self._state[ref.cdata] = ref
            held = self._holding.pop(ref.cdata, None)
            if held is not None:
                self._live -= held[1]

    def restart_peak(self) -> None:
        """The peak from here on, of what is held already and what comes."""
        self._forget_freed()
        self.peak = self._live

    def _forget_freed(self) -> None:
        for key in [k for k, (ref, _, _) in self._holding.items() if ref.expired()]:
            self._live -= self._holding.pop(key)[1]

    def _hold(self, tensor: Tensor, what: str) -> None:
        storage = tensor.untyped_storage()
        ref = StorageWeakRef(storage)
        state = self._state.get(ref.cdata)
        if state is not None and not state.expired():
            return
        self._forget_freed()
        if ref.cdata not in self._holding:
            at = place()
            if at.in_lm:
                return
            self._holding[ref.cdata] = (ref, storage.nbytes(), f"{what} {at.where}")
            self._live += storage.nbytes()
        if self._live > self.peak:
            self.peak = self._live
            held = [(n, name) for _, n, name in self._holding.values() if n >= LARGE]
            self.at_peak = sorted(held, reverse=True)[:12]

    # ------------------------------------------------------------------- waits

    def waited(self, kind: str) -> Place:
        """The host waited for the device."""
        at = place()
        self.counts.syncs[f"{kind} {at.where} {at.text[:70]}"] += 1
        return at

    def _find(self, kind: str, mask: Tensor) -> int:
        at = self.waited(kind) if mask.is_cuda else place()
        return self.sizes(at, mask)

    @contextmanager
    def fused(self) -> Iterator[None]:
        """What happens inside is one kernel: nothing of it but its results is counted."""
        self._fused += 1
        try:
            yield
        finally:
            self._fused -= 1

    def compiled(self, function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        """`torch.compile`: one launch, which reads its arguments and writes its results."""

        def call(*args: Any) -> Any:
            with self.fused():
                out = function(*args)
            tensors = [t for t in tree_leaves((args, out)) if isinstance(t, Tensor) and t.is_cuda]
            if tensors and not self._fused:
                self._launched("compiled", sum(t.numel() * t.element_size() for t in tensors))
                for tensor in tree_leaves(out):
                    if isinstance(tensor, Tensor) and self.tracking:
                        self._hold(tensor, "compiled")
            return out

        return call

    def _launched(self, name: str, moved: int) -> None:
        at = place()
        if at.in_lm:
            self.counts.lm_launches += 1
            return
        key = f"{at.where} {name}"
        self.counts.launches[key] += 1
        self.counts.traffic[key] += moved

    # ---------------------------------------------------------------- dispatch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)  # there is no memory to be pinned
        if func is aten._local_scalar_dense.default:
            at = self.waited("item") if args[0].is_cuda else place()
            return self.values(at, args[0])
        if func is aten.nonzero.default:
            shape = self._find("nonzero", args[0]), args[0].dim()
            return torch.empty(shape, dtype=torch.int64, device=args[0].device)
        if func is aten.masked_select.default:
            return args[0].new_empty(self._find("masked_select", args[1]))
        if func is aten.bincount.default:
            at = self.waited("bincount")
            least = args[2] if len(args) > 2 else kwargs.get("minlength", 0)
            return torch.empty(least, dtype=torch.int64, device=args[0].device)
        if func is aten.equal.default:
            self.waited("equal")
            return True
        if func in INDEXED:
            args = (args[0], self._without_masks(args[1]), *args[2:])
        self._note_copies(func, args, kwargs)
        if func is aten.mm.dtype:  # has no form without numbers
            out = args[0].new_empty(len(args[0]), args[1].shape[1], dtype=args[2])
        else:
            out = func(*args, **kwargs)
        leaves = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        name = str(func).split(".")[1]
        if not self._fused and name not in VIEWS and not str(func).startswith("prim"):
            tensors = [t for t in leaves if t.is_cuda]
            if tensors:
                self._launched(name, moved(func, args, tensors, out))
        if self.tracking and not self._fused:
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and tensor.is_cuda:
                    kind = f"{list(tensor.shape)} {str(tensor.dtype)[6:]}"
                    self._hold(tensor, f"{name} {kind}")
        return out

    def _without_masks(self, index: list[Tensor | None]) -> list[Tensor | None]:
        """Each mask as the places that it would be turned into, which is waited for."""
        found: list[Tensor | None] = []
        for one in index:
            if one is None or one.dtype not in (torch.bool, torch.uint8):
                found.append(one)
                continue
            n = self._find("mask", one)
            found += [torch.empty(n, dtype=torch.int64, device=one.device) for _ in one.shape]
        return found

    def _note_copies(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if func is aten._to_copy.default and kwargs.get("device") is not None:
            source, target = args[0].device.type, torch.device(kwargs["device"]).type
            waits = not kwargs.get("non_blocking", False)
        elif func is aten.copy_.default:
            source, target = args[1].device.type, args[0].device.type
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            return
        if waits and source == "cuda" and target == "cpu":
            self.waited("copy")
        if waits and source == "cpu" and target == "cuda":
            at = place()
            self.counts.copies[f"{at.where} {at.text[:70]}"] += 1


INDEXED = (
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
)


def pretend(recorder: Recorder) -> None:
    """Let the rest of torch believe in the device, in this process and for good."""
    import torch.cuda.amp.common

    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True  # type: ignore[assignment]
    FakeEvent.recorder = weakref.proxy(recorder)
    torch.cuda.Event = FakeEvent  # type: ignore[assignment,misc]
    torch.compile = recorder.compiled  # type: ignore[assignment]
