"""Optional CPU kernels in C++: attention, norms, activations, layout changes and a precise convolution.

MindSpore's CPU kernels for these are single-threaded, or store what need not be stored. The library is built
when the project is installed, if there is a C++ compiler; without it `available()` is False and the callers
use MindSpore's own operators. All kernels are float32.

Environment variables:

- MINDIFFEDIT_NATIVE: '0' leaves the library unused.
- MINDIFFEDIT_NATIVE_ISA: 'baseline', 'avx2' or 'avx512': at most this instruction set. The default is the best that
  the processor has. Read when the library is first used.
- OMP_NUM_THREADS: the number of threads, as for OpenMP programs; the cores that the process may use without it. It
  does not change the results.

The operators themselves are in `mindiffedit.runtime.native.operators`; import it only where `available()` is True.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mindiffedit.runtime import machine

__all__ = ["available", "call", "identity", "instruction_set", "library_path"]

LIBRARY = "libmindiffedit.so"


def library_path() -> Path | None:
    """The library's file, or None where it was not built."""
    path = Path(__file__).resolve().parent / LIBRARY
    return path if path.is_file() else None


def identity() -> tuple:
    """What tells the operators in use from others: the file that a compiled graph names, its time and its size."""
    path = library_path()
    if path is None or not available():
        return ("none",)
    state = path.stat()
    return str(path), state.st_mtime_ns, state.st_size


def available() -> bool:
    """Whether the kernels can be used here: built, working, not switched off, and the device is the CPU."""
    if os.environ.get("MINDIFFEDIT_NATIVE") == "0" or not _works():
        return False
    from mindiffedit.runtime import devices

    return devices.device_target() == "CPU"


def instruction_set() -> str | None:
    """'baseline', 'avx2' or 'avx512': which kernels are used; None where the library does not work."""
    if not _works():
        return None
    name = _library().mindiffedit_instruction_set
    name.restype = ctypes.c_char_p
    return name().decode()


def call(name: str, inputs: Sequence[np.ndarray], output: np.ndarray) -> None:
    """Run an operator of the library on NumPy arrays, without MindSpore.

    Args:
        name: the C function's, such as 'Silu'.
        inputs: float32 arrays, numbers that are no tensors as the last one; see operators.cpp.
        output: C-contiguous, writeable float32 array that is filled.

    Raises:
        ValueError: the operator refuses the types or shapes, or `output` is not as above.
        MemoryError: no memory for its scratch space.
        AttributeError: the library has no operator of that name.
    """
    if not (output.flags.c_contiguous and output.flags.writeable):
        raise ValueError("call: output expected C-contiguous and writeable")
    arrays = [np.ascontiguousarray(array) for array in inputs] + [output]
    count = len(arrays)
    shapes = [(ctypes.c_int64 * max(array.ndim, 1))(*array.shape) for array in arrays]
    code = getattr(_library(), name)(
        count,
        (ctypes.c_void_p * count)(*[array.ctypes.data for array in arrays]),
        (ctypes.c_int * count)(*[array.ndim for array in arrays]),
        (ctypes.POINTER(ctypes.c_int64) * count)(
            *[ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)) for shape in shapes]
        ),
        (ctypes.c_char_p * count)(*[array.dtype.name.encode() for array in arrays]),
        None,
        None,
    )
    if code == 2:
        raise MemoryError(f"{name}: no memory for its scratch space")
    if code:
        found = ", ".join(f"{array.dtype.name} {array.shape}" for array in arrays)
        raise ValueError(f"{name} refuses these types, shapes or numbers: {found}")


@functools.cache
def _library() -> ctypes.CDLL:
    """The library, with its number of threads set; MindSpore finds the same one by its path."""
    library = ctypes.CDLL(str(library_path()))
    library.mindiffedit_threads(_number_of_threads())
    return library


def _number_of_threads() -> int:
    # os.environ is what the process was started with: in C the variable is MindSpore's by now.
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return machine.cores()


@functools.cache
def _works() -> bool:
    """Whether the library is there, loads, and computes: a file for another system does not."""
    if library_path() is None:
        return False
    values = np.array([-3.5, -0.25, 0.0, 1.0, 20.0], np.float32)
    expected = [value / (1 + math.exp(-value)) for value in values.tolist()]
    output = np.empty_like(values)
    try:
        call("Silu", [values], output)
    except (OSError, AttributeError, ValueError, MemoryError):
        return False
    return np.allclose(output, expected, rtol=1e-6, atol=0)
