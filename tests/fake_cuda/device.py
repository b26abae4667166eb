"""Builds the shim once and loads it; comes before torch is imported."""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.cpp")
NEEDED = ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so")
"""Libraries of torch that the shim refers to, in the order in which they are loaded."""


def compiler() -> str | None:
    """A C++ compiler, if there is one."""
    wanted = os.environ.get("CXX")
    return next((c for c in (wanted, "g++", "clang++", "c++") if c and shutil.which(c)), None)


def unavailable() -> str | None:
    """Why there can be no fake device here; None if there can."""
    if sys.platform != "linux":
        return f"the shim is built for Linux, and this is {sys.platform}"
    if compiler() is None:
        return "no C++ compiler (CXX, g++, clang++ or c++)"
    if not (torch_folder() / "include").is_dir():
        return "this torch came without its headers"
    if (torch_folder() / "lib" / "libtorch_cuda.so").exists():
        return "this torch is built with CUDA, and has a device guard of its own"
    return None


def torch_folder() -> Path:
    """Where torch is, without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def build() -> Path:
    """The compiled shim; from the cache where this source was compiled for this torch before."""
    torch_, cxx = torch_folder(), compiler()
    assert cxx is not None
    key = hashlib.sha256(SOURCE.read_bytes() + (torch_ / "version.py").read_bytes() + cxx.encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    library = cache / "kanllama-fake-cuda" / f"{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        includes = [f"-I{torch_ / 'include'}", f"-I{torch_ / 'include/torch/csrc/api/include'}"]
        flags = ["-shared", "-fPIC", "-std=c++20", "-O0", f"-L{torch_ / 'lib'}"]
        subprocess.run(
            [cxx, *flags, *includes, str(SOURCE), "-o", str(made), "-lc10", "-ltorch_cpu"],
            check=True,
        )
        os.replace(made, library)  # another process may have been as far
    return library


def load() -> None:
    """Put the fake device into this process."""
    assert "torch" not in sys.modules, "torch was imported before its device was there"
    library = build()
    for path in (*(torch_folder() / "lib" / name for name in NEEDED), library):
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
