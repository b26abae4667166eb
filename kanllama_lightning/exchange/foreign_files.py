"""Weights of other projects, read with suspicion: tensors of the shapes asked for, and numbers."""

import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from kanllama_lightning.heads.head import FLOATS, LARGEST, MOST_LOG
from kanllama_lightning.storage.files import replacing
from kanllama_lightning.storage.small_files import ordinary_size
from kanllama_lightning.types import InputError

ANEW = "copy the folder anew from where it came from"
RECORD = "eval"
"""Where `evaluate.py` writes in a folder that it is given: that may be there."""
KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Number formats of `FLOATS`."""
PART = ".part"
"""Where an export is written before it is known to be right; that of one that was killed may be
there."""
ZIP = b"PK\x03\x04"
"""How files of `torch.save` begin since 2020; what came before is a bare pickle."""
Dims = tuple[int, ...]


def unfit(path: Path, why: str) -> InputError:
    """The error of a file that cannot be used."""
    return InputError(f"{path}: {why}; {ANEW}")


def from_safetensors(path: Path, wanted: Mapping[str, Dims]) -> dict[str, Tensor]:
    """The tensors wanted, fp32; shapes and formats are compared before anything is read.

    Args:
        path: The file; it holds these tensors and no others.
        wanted: Shapes by name.

    Raises:
        InputError: It is damaged, or holds something else.
    """
    ordinary_size(path, ANEW)
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            said = {n: (tuple(s.get_shape()), str(s.get_dtype())) for n, s in slices.items()}
            _compare(path, {n: shape for n, (shape, _) in said.items()}, wanted)
            for name, (_, kind) in said.items():
                if kind not in FLOATS:
                    raise unfit(path, f"{name} holds {kind}, not numbers of {', '.join(FLOATS)}")
            found = {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as e:
        raise unfit(path, f"is damaged or cannot be read ({e})") from e
    return _numbers(path, found)


def shapes_of(path: Path) -> dict[str, Dims]:
    """Shapes of the tensors in a safetensors file; raises InputError if it is damaged."""
    ordinary_size(path, ANEW)
    try:
        with safe_open(path, "pt") as file:
            return {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise unfit(path, f"is damaged or cannot be read ({e})") from e


def from_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save`; nothing in it is run.

    Raises:
        InputError: It is damaged, holds something else than tensors by name, or is an old file,
            which is a bare pickle.
    """
    size = ordinary_size(path, ANEW)
    try:
        with path.open("rb") as file:
            begins = file.read(len(ZIP))
        if begins != ZIP:
            raise unfit(path, "is no file of `torch.save` (a bare pickle is not opened)")
        held: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except InputError:
        raise
    except pickle.UnpicklingError as e:
        raise unfit(path, "holds more than tensors and plain values: it is not opened") from e
    except (RuntimeError, ValueError, TypeError, LookupError, EOFError, OSError,
            AttributeError, AssertionError, OverflowError, MemoryError) as e:  # fmt: skip
        said = str(e).splitlines() or [type(e).__name__]
        raise unfit(path, f"is damaged or cannot be read ({said[0][:200]})") from e
    if not isinstance(held, dict):
        raise unfit(path, f"holds a {type(held).__name__}, not tensors by name")
    for name, one in held.items():
        if not (isinstance(name, str) and isinstance(one, Tensor)):
            raise unfit(path, f"{name!r:.60} is no tensor ({type(one).__name__})")
        if one.is_meta or one.is_nested or type(one) not in (Tensor, Parameter):
            raise unfit(path, f"{name!r:.60} has a shape and no numbers of that shape")
        # one number may stand for as many as a shape likes
        if one.layout != torch.strided or one.numel() * one.element_size() > size:
            raise unfit(path, f"{name} has {one.numel():,} numbers, more than the file holds")
    return held


def chosen(path: Path, held: Mapping[str, Tensor], wanted: Mapping[str, Dims]) -> dict[str, Tensor]:
    """These tensors, fp32.

    Args:
        path: Where they are from, for messages.
        held: What there is; no others than are wanted.
        wanted: Shapes by name.

    Raises:
        InputError: One is missing, too many, of another shape, or no finite numbers.
    """
    _compare(path, {name: tuple(one.shape) for name, one in held.items()}, wanted)
    for name, one in held.items():
        if one.dtype not in KINDS:
            kinds = ", ".join(str(kind)[6:] for kind in KINDS)
            raise unfit(path, f"{name} holds {str(one.dtype)[6:]}, not numbers of {kinds}")
    return _numbers(path, held)


def _compare(path: Path, said: Mapping[str, Dims], wanted: Mapping[str, Dims]) -> None:
    for name in sorted(said.keys() ^ wanted.keys()):
        how = "is missing" if name in wanted else "is nothing that belongs there"
        raise unfit(path, f"{name} {how}")
    for name, shape in wanted.items():
        if said[name] != shape:
            raise unfit(path, f"{name} has the shape {list(said[name])} instead of {list(shape)}")


def _numbers(path: Path, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    made = {}
    for name, one in found.items():
        largest = one.abs().amax() if one.numel() else torch.zeros(())
        if not largest <= LARGEST:
            raise unfit(
                path, f"{name} holds {float(largest):.3g}; finite numbers up to {LARGEST:g} may be"
            )
        made[name] = one.detach().float().contiguous().clone()
    return made


def gains(path: Path, logarithms: Tensor) -> Tensor:
    """The logarithms of gains, `r_mag`, if none of them makes a number too large.

    Raises:
        InputError: One does.
    """
    largest = float(logarithms.amax())
    if not largest <= MOST_LOG:
        raise unfit(
            path, f"r_mag holds {largest:.3g}; {MOST_LOG:.3g} is the most: a gain of {LARGEST:g}"
        )
    return logarithms


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole."""
    whole = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    with replacing(path) as part:
        save_file(whole, part)


def refuse_others(folder: Path, mine: Collection[str], folders: bool = False) -> None:
    """Refuse to write into a folder that holds something else than files of these names.

    Args:
        folder: It need not be there.
        mine: Names of what is written.
        folders: Whether these are folders.

    Raises:
        InputError: It does, or is no folder.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"--out {str(folder)!r}: is no folder; choose another")
    here = [path for path in folder.iterdir() if path.name not in (RECORD, PART)]
    other = sorted(
        path.name
        for path in here
        if path.name not in mine or path.is_dir() != folders or folders and path.is_symlink()
    )
    if other:
        shown = other[0] if other[0].isprintable() else repr(other[0])
        raise InputError(
            f"--out {str(folder)!r}: holds {shown} already; give a folder that is new, empty or "
            "left by an earlier export to the same format"
        )
