"""The C++ beside the ops: built on first use with the machine's compiler, kept in a cache, called by a C interface.

The library is one file for all ops, in a folder named for its sources, compiler and flags, so that a change of any of
them builds anew and nothing stale is ever loaded.  Which vector instructions run is decided inside it, at run time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrosome import env
from pyrosome.ops.seam import Op, Place
from pyrosome.quant import QuantTensor

# No contraction: a product and a sum are fused where the source says so, and nowhere else, or levels would differ.
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-w")
LEVELS = ("portable", "avx2", "avx512")
FORMATS = {"": 0, "fp8": 1, "fp4": 2}
_BF16 = 3

_P, _I, _N, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "linear": (_P, _I, _N, _P, _P, _P, _I, _I, _I, _I, _N),
    "experts_plan": (_P, _I, _I, _I, _I, _P, _P),
    "experts_up": (_P, _I, _P, _P, _I, _P, _N, _P, _P, _N, _P, _P, _P, _I, _I, _F, _N),
    "experts_down": (_P, _I, _I, _P, _P, _I, _I, _I, _N, _P, _P, _P, _I, _I, _N),
    "hyper_connection_in": (_P, _P, _P, _P, _P, _P, _P, _I, _N, _I, _F, _F, _N, _N),
    "hyper_connection_out": (_P, _P, _P, _P, _P, _I, _N, _I, _N),
    "hyper_connection_head": (_P, _P, _P, _P, _P, _I, _N, _I, _F, _F),
    "swiglu": (_P, _P, _P, _I, _F),
    "affinity": (_P, _P, _I),
    "rotation": (_P, _P, _P, _I, _I),
    "rope": (_P, _P, _P, _I, _I, _I, _I, _F, _N),
    "sparse_attention": (_P, _P, _P, _P, _P, _P, _I, _I, _I, _I, _F, _N),
    "finish_attention": (_P, _P, _N, _P, _P, _P, _I, _I, _I, _I, _N),
    "compress": (_P,) * 10 + (_I,) * 6 + (_N,),
    "index_scores": (_P, _P, _P, _P, _I, _I, _I, _I, _N),
}


def why_not(place: Place) -> str:
    """Why no native kernel runs at `place`; "" where they do.  Whether a library can be had is told by `library`."""
    if place.device != "cpu":
        return f"it is for cpu, and this is {place.device}"
    if place.dtype != "float32":
        return f"it is for float32, and this is {place.dtype}"
    return "" if place.format in FORMATS else f"it does not read {place.format}"


def kernel(op: Op, *, any_format: bool = False) -> None:
    """Register the native kernel of an op: the function of its name in the `cpu.py` beside its definition.

    Args:
        any_format: the kernel asks its second argument for float rows, whatever they are stored in.
    """

    def load() -> Callable[..., Any]:
        library()  # an op that cannot have it learns so when it chooses, not in a step
        run: Callable[..., Any] = getattr(importlib.import_module(f"{op.definition.__module__}.cpu"), op.name)
        return run

    op.kernel("cpu", (lambda place: why_not(place._replace(format=""))) if any_format else why_not)(load)


def library() -> ctypes.CDLL:
    """The library, built if need be; tried once per process.

    Raises:
        OSError: there is no compiler, or it failed; the message says what to do.
    """
    found = _library()
    if isinstance(found, ctypes.CDLL):
        return found
    raise OSError(found)


@functools.cache
def _library() -> ctypes.CDLL | str:
    try:
        return _opened(_built())
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        return str(error)


def _opened(path: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    for name, arguments in _SIGNATURES.items():
        function = getattr(lib, f"pyrosome_{name}")
        function.argtypes, function.restype = arguments, _I if name == "experts_plan" else None
    if (level := env.CPU.get()) != "auto":
        if level not in LEVELS:
            raise OSError(f"{env.CPU.name} is {level!r}; it is auto, {', '.join(LEVELS)}")
        lib.pyrosome_force_level(LEVELS.index(level))
        if lib.pyrosome_level() != LEVELS.index(level):
            raise OSError(
                f"{env.CPU.name} asks for {level} and this processor has {LEVELS[lib.pyrosome_level()]} at most"
            )
    return lib


def level() -> str:
    """The vector instructions the library uses: "portable", "avx2" or "avx512"."""
    return LEVELS[library().pyrosome_level()]


def sources() -> list[Path]:
    """Every C++ file of the ops, headers included."""
    home = Path(__file__).parent
    return sorted([*home.glob("*.h"), *home.glob("*.cpp"), *home.glob("*/*.cpp")])


def _built() -> Path:
    if sys.platform == "win32":
        raise OSError("native kernels are not built on Windows; the torch definitions run instead")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        raise OSError("no C++ compiler was found (g++, clang++ or $CXX): install one for native kernels")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    key = hashlib.sha256(
        b"\0".join([*(p.read_bytes() for p in sources()), compiler.encode(), version, *map(str.encode, FLAGS)])
    )
    folder = cache_folder() / key.hexdigest()[:24]
    target = folder / "libpyrosome.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _compile(compiler, target)
    return target


def cache_folder() -> Path:
    """Where built libraries are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pyrosome" / "native"


def _compile(compiler: str, target: Path) -> None:
    handle, part = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    files = [str(p) for p in sources() if p.suffix == ".cpp"]
    command = [compiler, *FLAGS, f"-I{Path(__file__).parent}", "-o", part, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        os.unlink(part)
        raise OSError(f"{compiler} could not build the native kernels: {done.stderr.strip()[-500:]}")
    os.replace(part, target)  # whoever built at the same time made the same bytes


def threads() -> int:
    """As many as torch was told to use: one setting for both."""
    return _lent or torch.get_num_threads()


_lent = 0  # threads that torch has given up for the time being


@contextlib.contextmanager
def one_pool() -> Iterator[None]:
    """Within, only the kernels use several threads.

    torch's own would go on spinning for a while after each of its small operations, on the cores the kernels' threads
    are waiting for: two pools that share two cores made a step five times slower than one thread alone.
    """
    global _lent
    count = torch.get_num_threads()
    if _lent or count == 1:
        yield
        return
    _lent = count
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
        _lent = 0


def stored(weight: Tensor | QuantTensor) -> tuple[int, Tensor, Tensor | None]:
    """(format number, bytes, scales) of a weight as the kernels read it, contiguous."""
    if isinstance(weight, QuantTensor):
        return FORMATS[weight.format], weight.data.contiguous(), weight.scale.contiguous()
    if weight.dtype == torch.bfloat16:
        return _BF16, weight.contiguous(), None
    return 0, weight.float().contiguous(), None


def address(tensor: Tensor | None) -> int:
    """Where a tensor's values are; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


if __name__ == "__main__":  # build ahead of first use, and say what was built
    try:
        print(f"native kernels for {level()}: {_built()}")
    except OSError as error:
        print(f"no native kernels, so the torch definitions will run: {error}")
