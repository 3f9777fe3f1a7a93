"""Devices, dtypes, modes and the count of compilations."""

import os
import pathlib
import subprocess
import sys

import mindspore
import numpy as np
import pytest
from mindspore import nn

from mindiffedit.runtime import devices

ROOT = str(pathlib.Path(__file__).parent.parent)


def in_new_process(program: str) -> str:
    """Output of a program that starts with a fresh MindSpore."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(params=["PYNATIVE_MODE", "GRAPH_MODE"])
def mode(request):
    """Either global mode; the one from before comes back."""
    before = mindspore.get_context("mode")
    wanted = getattr(mindspore, request.param)
    mindspore.set_context(mode=wanted)
    yield wanted
    mindspore.set_context(mode=before)


absent = [target for target in devices.DEVICE_TARGETS if target not in devices._available_targets()]


# --- the target -------------------------------------------------------------------------------------


def test_importing_does_not_import_mindspore():
    out = in_new_process("import sys, mindiffedit.runtime.devices; print('mindspore' in sys.modules)")
    assert out.strip() == "False"


def test_target():
    assert devices.device_target() in devices.DEVICE_TARGETS
    assert devices.device_target() == mindspore.get_context("device_target")


def test_the_present_device_can_be_asked_for():
    target = devices.device_target()
    for name in (None, target, target.lower(), f" {target.upper()} "):
        assert devices.require_device(name) == target
    assert devices.device_target() == target


def test_what_is_no_name_of_a_device_is_an_error():
    for name, error in [
        *((name, ValueError) for name in ("TPU", "", "cuda", "CPU:0")),
        (0, TypeError),
        (b"CPU", TypeError),
    ]:
        with pytest.raises(error, match="expected one of CPU, GPU, Ascend"):
            devices.require_device(name)


@pytest.mark.skipif(not absent, reason="all devices are here")
@pytest.mark.parametrize("name", absent)
def test_an_absent_device_is_an_error_and_changes_nothing(name, mode, capfd):
    target = devices.device_target()
    capfd.readouterr()
    with pytest.raises(RuntimeError) as caught:
        devices.require_device(name.lower())
    message = str(caught.value)
    assert f"device {name} was asked for" in message
    assert f"Available here: {target}" in message
    assert "Ask for one of these" in message
    assert devices.device_target() == target
    assert mindspore.get_context("mode") == mode
    assert (mindspore.Tensor([1.0]) + 1).asnumpy() == [2.0]
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not absent, reason="all devices are here")
def test_an_absent_device_is_an_error_before_the_first_operator_too():
    out = in_new_process(f"""
import mindspore
from mindiffedit.runtime import devices
before = devices.device_target()
try:
    devices.require_device({absent[-1]!r})
except RuntimeError as error:
    print(str(error).startswith("device {absent[-1]} was asked for"))
print(devices.device_target() == before, devices.require_device(before) == before)
print((mindspore.Tensor([1.0]) + 1).asnumpy())
""")
    assert out.split("\n")[:3] == ["True", "True True", "[2.]"]


def test_a_device_on_which_nothing_runs_is_an_error(monkeypatch):
    def broken():
        raise RuntimeError("----\n\nno kernel image is available")

    monkeypatch.setattr(devices, "_run_one_operator", broken)
    with pytest.raises(RuntimeError, match="an addition failed on it: no kernel image is available"):
        devices.require_device(None)


def test_the_device_cannot_change_once_operators_have_run(monkeypatch):
    """What a process on one device sees when another one, which is there, is asked for."""
    target = devices.device_target()
    other = next(name for name in devices.DEVICE_TARGETS if name != target)
    (mindspore.Tensor([1.0]) + 1).asnumpy()
    monkeypatch.setattr(devices, "_available_targets", lambda: [target, other])
    with pytest.raises(RuntimeError, match=f"device {other} was asked for.*already runs on {target}"):
        devices.require_device(other)
    assert devices.device_target() == target


# --- dtypes -------------------------------------------------------------------------------------------------


def test_dtypes(monkeypatch):
    float16_on = {"CPU": "float32", "GPU": "float16", "Ascend": "float16"}
    bfloat16_on = {"CPU": "float32", "GPU": "float32", "Ascend": "bfloat16"}
    for target in devices.DEVICE_TARGETS:
        monkeypatch.setattr(devices, "device_target", lambda: target)  # noqa: B023 (called in this round)
        used = {"float32": "float32", "float16": float16_on[target], "bfloat16": bfloat16_on[target]}
        for asked, expected in used.items():
            for spelling in (asked, getattr(mindspore, asked)):
                dtype, reason = devices.supported_dtype(spelling)
                assert dtype == getattr(mindspore, expected)
                if asked == expected:
                    assert reason is None
                else:
                    assert reason.startswith(f"{asked} was asked for, {expected} is used: ") and target in reason
    for dtype in ("int8", "Float32", None, mindspore.int32, mindspore.float64, np.float32):
        with pytest.raises(ValueError, match="expected one of float32, float16, bfloat16"):
            devices.supported_dtype(dtype)


def test_float32_with_all_its_bits(monkeypatch):
    from mindspore import device_context

    said = []
    for target, kind in (("ascend", "hf32"), ("gpu", "tf32")):
        for product in ("conv", "matmul"):
            name = f"{product}_allow_{kind}"
            precision = getattr(device_context, target).op_precision
            monkeypatch.setattr(precision, name, lambda on, name=name: said.append((name, on)))
    assert devices.exact_float32() is None and not said
    monkeypatch.setattr(devices, "device_target", lambda: "Ascend")
    assert devices.exact_float32() == "HF32 is off for convolutions and matrix products"
    assert said == [("conv_allow_hf32", False), ("matmul_allow_hf32", False)]
    monkeypatch.setattr(devices, "device_target", lambda: "GPU")
    assert devices.exact_float32() == "TF32 is off for convolutions and matrix products"
    assert said[2:] == [("conv_allow_tf32", False), ("matmul_allow_tf32", False)]


# --- modes --------------------------------------------------------------------------------------------------


def test_eager(mode):
    with devices.eager():
        assert mindspore.get_context("mode") == mindspore.PYNATIVE_MODE
        with devices.eager():
            assert mindspore.get_context("mode") == mindspore.PYNATIVE_MODE
        assert mindspore.get_context("mode") == mindspore.PYNATIVE_MODE
    assert mindspore.get_context("mode") == mode
    with pytest.raises(KeyError):
        with devices.eager():
            raise KeyError("inside")
    assert mindspore.get_context("mode") == mode


def test_eager_runs_cells_without_compiling():
    before = mindspore.get_context("mode")
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    try:
        layer = nn.Dense(3, 2)
        with devices.CompileCounter() as compiled, devices.eager():
            layer(ones(1, 3))
        assert compiled.count == 0
    finally:
        mindspore.set_context(mode=before)


# --- counting -----------------------------------------------------------------------------------------------


def ones(*shape):
    return mindspore.Tensor(np.ones(shape, np.float32))


def test_compilations_of_a_function_are_counted(mode):
    @mindspore.jit
    def scaled(x, factor):
        return x * factor

    with devices.CompileCounter() as compiled:
        scaled(ones(2), 2.0)
        assert compiled.count == 1
        scaled(ones(2) + 1, 2.0)
        assert compiled.count == 1  # other values, same shape
        scaled(ones(3), 2.0)
        assert compiled.count == 2  # another shape
        scaled(ones(3), 3.0)
        assert compiled.count == 3  # another Python number
        scaled(ones(2), 2.0)
        assert compiled.count == 3  # the first graph is still there
        scaled(ones(3), mindspore.Tensor(3.0))
        scaled(ones(3), mindspore.Tensor(4.0))
        assert compiled.count == 4  # a number in a tensor is a value
    scaled(ones(5), 2.0)
    assert compiled.count == 4


def test_compilations_of_cells_are_counted():
    class Jitted(nn.Cell):
        def __init__(self):
            super().__init__()
            self.layer = nn.Dense(3, 2)

        @mindspore.jit
        def construct(self, x):
            return self.layer(x)

    plain, jitted = nn.Dense(3, 2), Jitted()
    before = mindspore.get_context("mode")
    try:
        with devices.CompileCounter() as compiled:
            mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
            plain(ones(1, 3))
            assert compiled.count == 0
            jitted(ones(1, 3))
            jitted(ones(1, 3))
            assert compiled.count == 1
            mindspore.set_context(mode=mindspore.GRAPH_MODE)
            plain(ones(1, 3))
            plain(ones(1, 3))
            assert compiled.count == 2
            plain(ones(4, 3))
            assert compiled.count == 3
    finally:
        mindspore.set_context(mode=before)


def test_the_total_goes_up_and_counters_nest():
    @mindspore.jit
    def doubled(x):
        return x + x

    start = devices.compile_count()
    outer = devices.CompileCounter()
    assert outer.count == 0
    with outer:
        doubled(ones(2))
        with devices.CompileCounter() as inner:
            doubled(ones(3))
        doubled(ones(4))
    assert (outer.count, inner.count, devices.compile_count() - start) == (3, 1, 3)


def test_failed_compilations_are_not_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MindSpore writes its account of the failure here

    @mindspore.jit
    def wrong(x):
        return x.no_such_method()

    with devices.CompileCounter() as compiled:
        with pytest.raises(Exception, match="no_such_method"):
            wrong(ones(2))
    assert compiled.count == 0


def test_what_a_compilation_took_is_given_back(monkeypatch):
    calls = []
    monkeypatch.setattr(devices, "give_memory_back", lambda: calls.append(devices.compile_count()))
    double = mindspore.jit(doubled)
    count = devices.compile_count()
    for _ in range(2):
        assert double(ones(3)).asnumpy().tolist() == [2, 2, 2]
    assert calls == [count], "once, between compiling and running"


def doubled(x):
    return x + x
