"""Every question about the device target is answered here.

MindSpore is imported inside the functions: importing this module costs nothing, so that the command line
can answer `--help` at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading

from mindiffedit.errors import InputError, InputTypeError, first_line
from mindiffedit.runtime.notices import say_once

DEVICE_TARGETS = ("CPU", "GPU", "Ascend")
FLOATS = ("float32", "float16", "bfloat16")

__all__ = [
    "DEVICE_TARGETS",
    "CompileCounter",
    "compile_count",
    "device_memory",
    "device_target",
    "eager",
    "exact_float32",
    "float_type",
    "give_memory_back",
    "loadable_dtype",
    "not_counted",
    "require_device",
    "supported_dtype",
    "synchronize",
    "watch_compilations",
]


def device_target() -> str:
    """Name of the device MindSpore runs on in this process: 'CPU', 'GPU' or 'Ascend'."""
    import mindspore

    return mindspore.get_context("device_target")


# --- the device ------------------------------------------------------------------------------------


def require_device(name: str | None) -> str:
    """Select a device target, or fail; a device that is absent is never replaced by another one.

    Args:
        name: 'CPU', 'GPU' or 'Ascend' in any case, or None for the one that is already selected.

    Returns:
        The selected target, in MindSpore's spelling, after a small operator has really run on it.

    Raises:
        TypeError: `name` is neither None nor a string.
        ValueError: `name` is none of the three targets.
        RuntimeError: the device is absent, or the process already runs on another one. The context is left as found.
    """
    import mindspore

    if name is not None and not isinstance(name, str):
        raise InputTypeError(
            "{parameter}: expected one of {known} or None, got {name!r}",
            parameter="device",
            known=", ".join(DEVICE_TARGETS),
            name=name,
        )
    before = device_target()
    spellings = {target.lower(): target for target in DEVICE_TARGETS}
    wanted = before if name is None else spellings.get(name.strip().lower())
    if wanted is None:
        raise InputError(
            "{parameter}: expected one of {known}, got {name!r}",
            parameter="device",
            known=", ".join(DEVICE_TARGETS),
            name=name,
        )

    if wanted != before:
        available = _available_targets()
        if wanted not in available:
            raise RuntimeError(_absent(wanted, available, "this MindSpore found no such device"))
        try:
            mindspore.set_device(wanted)
        except RuntimeError as error:
            _restore_device(before)
            raise RuntimeError(
                f"device {wanted} was asked for, but this process already runs on {before}: MindSpore takes "
                f"the device before the first operator only. Select {wanted} at the start of the program, "
                f"or ask for {before}. ({first_line(error)})"
            ) from error
    try:
        _run_one_operator()
    except Exception as error:
        _restore_device(before)
        others = [target for target in _available_targets() if target != wanted]
        why = f"an addition failed on it: {first_line(error)}"
        raise RuntimeError(_absent(wanted, others, why)) from error
    return wanted


def _absent(wanted: str, available: list[str], why: str) -> str:
    return (
        f"device {wanted} was asked for and cannot be used ({why}). "
        f"Available here: {', '.join(available) or 'none'}. "
        f"Ask for one of these, or install the driver and the MindSpore package for {wanted}."
    )


def _available_targets() -> list[str]:
    """The targets whose plugin loads and which have at least one device. Asks; selects nothing."""
    from mindspore import device_context

    found = []
    with _quiet_log():
        for target in DEVICE_TARGETS:
            try:
                if getattr(device_context, target.lower()).is_available():
                    found.append(target)
            except Exception:  # a plugin that breaks while loading is a device that is not there
                continue
    return found


def _run_one_operator() -> None:
    import mindspore

    with eager():
        total = mindspore.Tensor([1.0, 2.0], mindspore.float32) + 1.0
        if total.asnumpy().tolist() != [2.0, 3.0]:
            raise RuntimeError(f"1 + 1 and 2 + 1 came out as {total}")


def _restore_device(before: str) -> None:
    import mindspore

    if device_target() == before:
        return
    with contextlib.suppress(RuntimeError), _quiet_log():
        mindspore.set_device(before)


@contextlib.contextmanager
def _quiet_log():
    """Hold back MindSpore's Python log below CRITICAL: asking for an absent device is not worth 20 lines."""
    from mindspore import log

    logger = log._get_logger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def synchronize() -> None:
    """Wait until every operator launched so far has run; a failure of one of them is raised here.

    `mindspore.runtime.synchronize` logs an error on CPU, so the executor is asked directly.
    """
    from mindspore.common.api import _pynative_executor

    _pynative_executor.sync()


# --- memory ----------------------------------------------------------------------------------------


def device_memory() -> int | None:
    """Bytes of the device's own memory; None on a CPU, and where MindSpore does not say."""
    import mindspore

    if device_target() == "CPU":
        return None
    with contextlib.suppress(Exception):  # a driver that cannot be asked, or Ascend's dry run
        return mindspore.hal.get_device_properties(mindspore.get_context("device_id")).total_memory or None
    return None


# --- dtypes ----------------------------------------------------------------------------------------


def float_type(dtype):
    """The mindspore dtype that is meant by mindspore.float32, float16 or bfloat16, or by one of these names.

    Raises:
        ValueError: anything else.
    """
    import mindspore

    for name in FLOATS:
        known = getattr(mindspore, name)
        if dtype == (name if isinstance(dtype, str) else known):
            return known
    raise InputError(
        "{parameter}: expected one of {known}, got {given!r}", parameter="dtype", known=", ".join(FLOATS), given=dtype
    )


def supported_dtype(dtype):
    """The dtype to compute in on the current device when `dtype` was asked for.

    Args:
        dtype: mindspore.float32, float16 or bfloat16, or one of these names as a string.

    Returns:
        A mindspore dtype, and None where it is the one asked for, else a sentence that says why it is another.

    Raises:
        ValueError: any other dtype.
    """
    import mindspore

    dtype, target = float_type(dtype), device_target()
    name = str(dtype).lower()
    if target == "CPU" and name != "float32":
        return mindspore.float32, (
            f"{name} was asked for, float32 is used: MindSpore's CPU kernels for convolution and matrix "
            f"products are float32."
        )
    if target == "GPU" and name == "bfloat16":
        # float16 would be as fast but has not bfloat16's range: values that fit one overflow the other.
        return mindspore.float32, (
            "bfloat16 was asked for, float32 is used: MindSpore's GPU kernels have no bfloat16, and float16 "
            "has not its range. Ask for float16 by name where the model is known to fit it."
        )
    return dtype, None


def loadable_dtype(dtype):
    """The dtype to load models in: what was asked for, or float32 with one warning where the device has not got it.

    Args:
        dtype: as for `supported_dtype`, or None.

    Returns:
        A mindspore dtype; None for None, which models take for float32.

    Raises:
        ValueError: any other dtype.
    """
    if dtype is None:
        return None
    dtype, reason = supported_dtype(dtype)
    if reason:
        say_once(reason)
    return dtype


def exact_float32() -> str | None:
    """Has products computed with all bits of float32, for the rest of the process, where a device would take fewer.

    By default convolutions are in HF32 on Ascend and in TF32 on a GPU, with 11 bits of 24.

    Returns:
        A sentence that says what was switched off; None on a CPU, which has nothing of the kind.

    Raises:
        RuntimeError: the program has switched it on by itself, on Ascend.
    """
    from mindspore import device_context

    target = device_target()
    if target == "CPU":
        return None
    kind = {"Ascend": "HF32", "GPU": "TF32"}[target]
    precision = getattr(device_context, target.lower()).op_precision
    for product in ("conv", "matmul"):
        getattr(precision, f"{product}_allow_{kind.lower()}")(False)
    return f"{kind} is off for convolutions and matrix products"


# --- the mode --------------------------------------------------------------------------------------


@contextlib.contextmanager
def eager():
    """Run the body in PyNative mode, then give the caller's global mode back. No-op if it is PyNative."""
    import mindspore

    before = mindspore.get_context("mode")
    if before == mindspore.PYNATIVE_MODE:
        yield
        return
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    try:
        yield
    finally:
        mindspore.set_context(mode=before)


# --- counting compilations -------------------------------------------------------------------------

# Every graph compilation of a `mindspore.jit` function or of a cell in graph mode goes through `compile` of
# one of MindSpore's two C++ executors; a call that finds its graph in the cache never gets there. Neither
# offers a count, so the two methods are wrapped, once, by a wrapper that counts, and gives back what compiling took:
# glibc keeps what is freed, 0.2 GB of the 0.5 for a UNet of Stable Diffusion, beside what the graph then needs to run.
_count_lock = threading.Lock()
_count = 0
_counting = False
_uncounted = threading.local()


def compile_count() -> int:
    """Number of graphs compiled in this process since this function was first called.

    Counted are functions under `mindspore.jit` and cells in graph mode. A graph found in memory is not
    counted; one that is compiled with the help of MindSpore's compile cache on disk is. Failed
    compilations are not counted.
    """
    watch_compilations()
    return _count


def give_memory_back() -> None:
    """Gives memory that this process has freed back to the system, where its C library would keep it (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class CompileCounter:
    """Count the graphs compiled in a block, see `compile_count`.

    >>> with CompileCounter() as compiled:
    ...     step(x)
    >>> compiled.count
    1
    """

    def __init__(self) -> None:
        self._first: int | None = None
        self._last: int | None = None

    def __enter__(self) -> CompileCounter:
        self._first, self._last = compile_count(), None
        return self

    def __exit__(self, *_exc) -> None:
        self._last = compile_count()

    @property
    def count(self) -> int:
        """Compilations from the start of the block to now, or to its end once it has been left."""
        if self._first is None:
            return 0
        return (compile_count() if self._last is None else self._last) - self._first


@contextlib.contextmanager
def not_counted():
    """Compilations of this thread in the body are our own probes, not the program's."""
    before = getattr(_uncounted, "on", False)
    _uncounted.on = True
    try:
        yield
    finally:
        _uncounted.on = before


def watch_compilations() -> None:
    """Counts compilations from now on, and gives the memory that each took back to the system."""
    global _counting
    from mindspore import _c_expression

    with _count_lock:
        if _counting:
            return
        for name in ("GraphExecutor_", "JitExecutor_"):
            executor = getattr(_c_expression, name, None)
            if executor is not None:
                executor.compile = _counted(executor.compile)
        _counting = True


def _counted(compile_graph):
    def compile(self, *args, **kwargs):
        global _count
        done = compile_graph(self, *args, **kwargs)
        give_memory_back()
        if done and not getattr(_uncounted, "on", False):
            with _count_lock:
                _count += 1
        return done

    return compile
