"""The portable kernels against torch: one by one, in layers and in blocks of models, eager and compiled.

Errors are max|difference| / rms(reference). Beside each tolerance stands what was measured (CPU, MindSpore
2.7.2 and 2.8.0, the worse of the two); the tolerance is a few times that.
"""

import os
import pathlib
import re
import subprocess
import sys
import threading
import types

import mindspore
import numpy as np
import pytest
import torch
from mindspore import mint, nn

from mindiffedit.runtime import devices, kernels, native, portable
from mindiffedit.runtime.kernels import portable_kernels

F = mint.nn.functional
PIPES = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)


def relative_error(got, expected) -> float:
    """max|got - expected| / rms(expected); infinite for another shape or a value that is not finite."""
    got, expected = _float64(got), _float64(expected)
    if got.shape != expected.shape or not np.isfinite(got).all() or not expected.size:
        return float("inf")
    return float(np.abs(got - expected).max() / np.sqrt(np.mean(expected**2)))


def _float64(value) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    elif isinstance(value, mindspore.Tensor):
        value = value.asnumpy()
    return np.asarray(value, np.float64)


def noise(*shape, seed=0, scale=1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def run(function, *arrays, mode):
    """`function` of tensors, inside the context, in PyNative ("eager"), under jit or in global graph mode."""
    tensors = [mindspore.Tensor(array) for array in arrays]
    before = mindspore.get_context("mode")
    mindspore.set_context(mode=mindspore.GRAPH_MODE if mode == "graph" else mindspore.PYNATIVE_MODE)
    try:
        with portable_kernels():
            return (mindspore.jit(function) if mode == "jit" else function)(*tensors)
    finally:
        mindspore.set_context(mode=before)


@pytest.fixture(params=["plain", "native"])
def operators(request, monkeypatch):
    """What the tests that use it run on: MindSpore's operators, as on other devices, or the project's own for CPUs."""
    if request.param == "plain":
        monkeypatch.setenv("MINDIFFEDIT_NATIVE", "0")
    elif not native.available():
        pytest.skip("the C++ operators were not built")
    return request.param


MODES = ["eager", "jit", "graph"]
in_all_modes = pytest.mark.parametrize("mode", MODES)
in_two_modes = pytest.mark.parametrize("mode", ["eager", "jit"])


# --- single kernels: functions --------------------------------------------------------------------------
#
# Called through mint's names with the arguments that mindone passes. Plain functions, because the graph
# compiler reads their source. mint's names are torch's: `in_torch` runs the same source on torch's modules.


def _activations(x):
    return F.silu(x), mint.tanh(x), F.gelu(x), F.gelu(x, approximate="tanh")


def _convolutions(x, weight, bias, pixel):
    return (
        F.conv2d(x, weight, bias, stride=1, padding=1),
        F.conv2d(x, weight, bias, stride=(2, 2), padding=(1, 0)),
        mint.conv2d(x, pixel),
    )


def _norms(x, weight, bias, rows):
    bare = F.layer_norm(x, (5, 8))
    return F.layer_norm(x, (8,), weight, bias, 1e-6), bare, F.normalize(rows), F.normalize(rows, 1.0, -1, 1e-6)


def _moves(x, rows):
    return (
        F.pad(x, (0, 1, 0, 1), mode="constant", value=0),
        F.pad(x, (2, 1), value=0.25),
        F.pad(x, (1, 2, 2, 1), mode="reflect"),
        mint.stack([rows, -rows], dim=1),
    )


def _numbers(rows):
    return (
        rows * mint.arange(start=0, end=11, dtype=mindspore.float32),
        rows * mint.arange(11),
        rows + mint.zeros_like(rows, dtype=mindspore.float32),
        mint.round(rows, decimals=3),
        mint.round(rows * 2),
    )


def _parts(rows):
    first, second = mint.split(rows, [4, 7], dim=1), mint.split(rows, 4, dim=-1)
    third, uneven = mint.chunk(rows, 2, dim=1), mint.chunk(rows, 4, dim=0)
    first, second = mint.cat([first[1], first[0]], dim=-1), mint.cat([second[2], second[0]], dim=-1)
    return first, second, mint.cat([third[1], third[0]], dim=-1), mint.cat([uneven[2], uneven[0]], dim=0)


def _products(a, b, ids):
    return mint.mm(a, b.t()), F.embedding(ids, b)


T = torch.nn.functional
TINY = noise(3, 5, 8, seed=3, scale=1e-3)  # variance about eps: a wrong eps shows
ROWS = noise(3, 8) * np.array([[1.0], [0.0], [1e-3]], np.float32)
CONVOLVED = [noise(2, 4, 7, 9), noise(5, 4, 3, 3, seed=1), noise(5, seed=2), noise(5, 4, 1, 1, seed=1)]

FUNCTIONS = [
    # function, arguments, tolerance; measured
    (_activations, [noise(2, 7, 12, scale=2.0)], 1e-6),  # 4.0e-7
    (_convolutions, CONVOLVED, 2e-6),  # 7.5e-7
    (_norms, [TINY, noise(8, seed=1), noise(8, seed=2), ROWS], 1e-6),  # 1.9e-7
    (_moves, [noise(2, 3, 4, 5), ROWS], 0.0),
    (_numbers, [noise(3, 11)], 1e-6),  # 0
    (_parts, [noise(10, 11)], 0.0),
    (_products, [noise(3, 8), noise(5, 8, seed=1), np.array([[1, 0], [4, 1]])], 1e-6),  # 2.3e-7
]


def in_torch(function, *arrays):
    names = {"mint": torch, "F": T, "mindspore": torch}
    return types.FunctionType(function.__code__, names)(*[torch.from_numpy(array) for array in arrays])


def require_equal_torch(mode):
    for function, arrays, tolerance in FUNCTIONS:
        for number, (ours, theirs) in enumerate(zip(run(function, *arrays, mode=mode), in_torch(function, *arrays))):
            error = relative_error(ours, theirs)
            assert ours.dtype == mindspore.float32 and error <= tolerance, f"{function.__name__} {number}: {error:.1e}"


@in_two_modes
def test_functions_equal_torch(mode, operators):
    require_equal_torch(mode)


def test_replacements_are_tested_where_the_original_is_there_too(monkeypatch, operators):
    """Which names are missing depends on the version; the replacements of the others are checked as well."""
    monkeypatch.setattr(kernels, "_missing", {devices.device_target(): kernels.KERNELS})
    monkeypatch.setattr(kernels, "_plan_key", None)
    require_equal_torch("eager")
    monkeypatch.setattr(kernels, "_plan_key", None)


def test_the_measure_fails_what_it_should():
    x = noise(2, 7, 12, scale=2.0)
    _, _, _, other_gelu = run(_activations, x, mode="eager")
    assert relative_error(other_gelu, T.gelu(torch.from_numpy(x))) > 1e-4
    other_eps = T.layer_norm(torch.from_numpy(TINY), (8,), eps=1e-7)
    assert relative_error(T.layer_norm(torch.from_numpy(TINY), (8,), eps=1e-6), other_eps) > 1e-2
    assert relative_error(x[:1], x) == float("inf")
    assert relative_error(np.full_like(x, np.nan), x) == float("inf")


def test_what_a_replacement_does_not_do_it_refuses():
    with portable_kernels(), pytest.raises(ValueError, match="max_norm"):
        F.embedding(mindspore.Tensor([0]), mindspore.Tensor(noise(2, 3)), max_norm=1.0)
    with portable_kernels(), pytest.raises(ValueError, match="inplace"):
        portable.silu(mindspore.Tensor(noise(3)), inplace=True)


# --- accuracy -------------------------------------------------------------------------------------------
#
# Against float64. Rounding the exact results to float32 makes 2.5e-8 (rms of the relative error), torch 4e-8.


def rms_error(got, expected) -> float:
    """rms(got - expected) / rms(expected)."""
    got, expected = _float64(got), _float64(expected)
    assert got.shape == expected.shape
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


on_cpu = pytest.mark.skipif(devices.device_target() != "CPU", reason="what the CPU kernels are like")


# function, exact one in float64, values, how far MindSpore's own is off on a CPU
# function, exact one in float64, values, how far MindSpore's own is off on a CPU
def _silu(x):
    return F.silu(x)


def _tanh(x):
    return mint.tanh(x)


# function, exact one in float64, values, how far MindSpore's own is off on a CPU
INACCURATE = {
    "mint.nn.functional.silu": (_silu, lambda x: x / (1 + np.exp(-x)), np.linspace(-3, 3, 1000), 4e-7),
    "mint.tanh": (_tanh, np.tanh, np.linspace(-9, 9, 1000), 2e-5),
}


@pytest.mark.parametrize("name", INACCURATE)
def test_activations_are_accurate(name, operators):
    function, exact, values, _ = INACCURATE[name]
    values = values.astype(np.float32)
    for mode in MODES:
        result = run(function, values, mode=mode)
        differences = _float64(result) / exact(values.astype(np.float64)) - 1
        assert result.dtype == mindspore.float32
        assert np.sqrt(np.mean(differences**2)) < 5e-8  # plain 2.6e-8, native 4.1e-8
        assert abs(differences.mean()) < 1e-8  # without a bias
    for dtype, limit in (("float16", 3e-4), ("bfloat16", 2.5e-3), ("float64", 1e-12)):  # 1.9e-4, 1.6e-3, 1e-16
        x = mindspore.Tensor(values, getattr(mindspore, dtype))
        with portable_kernels():
            result = function(x)
        assert result.dtype == x.dtype
        assert rms_error(result.astype(mindspore.float64), exact(_float64(x.astype(mindspore.float64)))) < limit


@on_cpu
@pytest.mark.parametrize("name", INACCURATE)
def test_the_original_activations_fail_the_bound(name):
    function, exact, values, error = INACCURATE[name]
    differences = _float64(function(mindspore.Tensor(values, mindspore.float32))) / exact(values) - 1
    assert np.sqrt(np.mean(differences**2)) > error / 2
    assert name in kernels.missing_kernels()


def test_an_accurate_silu_is_kept(monkeypatch):
    (kernel,) = (kernel for kernel in kernels.KERNELS if kernel.name == "mint.nn.functional.silu")
    monkeypatch.setattr(F, "silu", portable.silu)
    assert not kernels._fails(kernel.probe)
    monkeypatch.setattr(F, "silu", lambda x: portable.silu(x) * (1 + 3e-7))
    assert kernels._fails(kernel.probe)


@in_two_modes
def test_layer_norm_in_sixteen_bits_is_computed_in_float32(mode):
    """A mean of 100 leaves float16 two digits of the differences; the result is as good as its input."""
    x = mindspore.Tensor(noise(3, 8) * 0.5 + 100, mindspore.float16)
    ones = mindspore.Tensor(np.ones(8, np.float16))

    def normalise(x, weight, bias):
        return F.layer_norm(x, (8,), weight, bias, 1e-5)

    with portable_kernels():
        got = (mindspore.jit(normalise) if mode == "jit" else normalise)(x, ones, ones * 0)
    exact = T.layer_norm(torch.from_numpy(x.asnumpy().astype(np.float64)), (8,))
    assert got.dtype == mindspore.float16 and relative_error(got.astype(mindspore.float32), exact) < 2e-3


CONVOLUTIONS = {
    "first": (noise(2, 4, 10, 12), noise(32, 4, 3, 3, seed=1), 1, 1, 1),
    "last": (noise(2, 32, 10, 12), noise(8, 32, 3, 3, seed=1), (1, 1), (1, 1), (1, 1)),
    "posterior": (noise(2, 8, 10, 12), noise(8, 8, 1, 1, seed=1), 1, 0, 1),
    "downsampling of the VAE": (noise(2, 32, 11, 12), noise(32, 32, 3, 3, seed=1), (2, 2), (0, 0), (1, 1)),
    "uneven": (noise(1, 4, 11, 12), noise(6, 4, 3, 2, seed=1), (1, 2), (2, 1), (2, 1)),
}


@in_two_modes
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_on_the_main_path_are_accurate(name, mode, operators):
    x, weight, stride, padding, dilation = CONVOLUTIONS[name]
    bias = noise(len(weight), seed=2)

    def convolve(x, weight, bias):
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    doubles = [torch.from_numpy(array).double() for array in (x, weight, bias)]
    exact = T.conv2d(*doubles, stride=stride, padding=padding, dilation=dilation)
    got = run(convolve, x, weight, bias, mode=mode)
    assert got.dtype == mindspore.float32
    if "mint.nn.functional.conv2d" in kernels.missing_kernels():
        assert rms_error(got, exact) < 4e-8  # 2.5e-8; ops.Conv2D's is 5e-8 (1 x 1) to 3e-7


def test_most_convolutions_stay_in_float32():
    x, weight = mindspore.Tensor(noise(1, 16, 8, 8)), mindspore.Tensor(noise(16, 16, 3, 3))
    picture, patches = mindspore.Tensor(noise(3, 16, 3, 3)), mindspore.Tensor(noise(16, 3, 4, 4))
    assert portable.goes_through_float64(x, weight, 2, 0, 1)  # the VAE encoder's downsampling
    for arguments in (
        (x, weight, 1, 1, 1),
        (x, weight, 2, 1, 1),  # the UNet's downsampling
        (x, picture, 1, 1, 1),  # the decoder's last
        (x[:, :3], patches, 4, 0, 1),
        (x.astype(mindspore.float16), weight, 2, 0, 1),
        (x, weight, 2, "valid", 1),
    ):
        assert not portable.goes_through_float64(*arguments)


# --- single kernels: layers -----------------------------------------------------------------------------


def _copy_weights(layer: nn.Cell, reference: torch.nn.Module) -> None:
    """Perturb torch's parameters and copy them by name: the names and shapes must be the same."""
    with torch.no_grad():
        for i, parameter in enumerate(reference.parameters()):
            parameter.add_(torch.from_numpy(noise(*parameter.shape, seed=20 + i, scale=0.1)))
    ours = {parameter.name: parameter for parameter in layer.get_parameters()}
    theirs = dict(reference.named_parameters())
    assert {n: p.shape for n, p in ours.items()} == {n: tuple(p.shape) for n, p in theirs.items()}
    for name, parameter in theirs.items():
        ours[name].set_data(mindspore.Tensor(parameter.detach().numpy()))


IMAGE = noise(2, 4, 9, 12, seed=5)
LAYERS = {
    "3x3": ("Conv2d", (4, 6, 3), dict(padding=1), IMAGE),
    "1x1": ("Conv2d", (4, 6, 1), {}, IMAGE),
    "downsampling of the UNet": ("Conv2d", (4, 6, 3), dict(stride=2, padding=1), IMAGE),
    "downsampling of the VAE": ("Conv2d", (4, 6, 3), dict(stride=2, padding=0), IMAGE),
    "patches": ("Conv2d", (4, 6), dict(kernel_size=3, stride=3, bias=False), IMAGE),
    "groups": ("Conv2d", (4, 6, (3, 1)), dict(padding=(2, 0), groups=2, dilation=(2, 1)), IMAGE),
    "same": ("Conv2d", (4, 6, 3), dict(padding="same"), IMAGE),
    "reflect": ("Conv2d", (4, 6, 3), dict(padding=(1, 2), padding_mode="reflect"), IMAGE),
    "layer norm": ("LayerNorm", (8,), dict(eps=1e-5), TINY),
    "layer norm, bare": ("LayerNorm", (8,), dict(eps=1e-6, elementwise_affine=False), TINY),
    "embedding": ("Embedding", (7, 8), {}, np.array([[1, 6], [0, 1]])),
    "linear": ("Linear", (8, 5), {}, TINY),
    "linear without bias": ("Linear", (8, 5), dict(bias=False), TINY),
    "group norm": ("GroupNorm", (2, 4), dict(eps=1e-6), IMAGE),
    "gelu": ("GELU", (), {}, noise(2, 7, 12, scale=2.0)),
    "silu": ("SiLU", (), {}, noise(2, 7, 12, scale=2.0)),
}


@in_all_modes
@pytest.mark.parametrize("name", [*LAYERS, "GEGLU"])
def test_layer_equals_torch(name, mode, operators):
    if name == "GEGLU":
        from diffusers.models.activations import GEGLU as Reference
        from mindone.diffusers.models.activations import GEGLU

        layer, reference, x = GEGLU(6, 10), Reference(6, 10), noise(2, 5, 6)
    else:
        cls, args, kwargs, x = LAYERS[name]
        layer, reference = (getattr(module.nn, cls)(*args, **kwargs) for module in (mint, torch))
    _copy_weights(layer, reference)  # built outside the context, runs inside it

    def call(x):
        return layer(x)

    error = relative_error(run(call, x, mode=mode), reference(torch.from_numpy(x)))
    assert error <= 4e-6, f"{error:.1e}"  # 1.3e-6


RESIDUALS = {
    "of the UNet": dict(in_channels=8, out_channels=16, temb_channels=12, groups=4),
    "of the VAE": dict(in_channels=16, temb_channels=None, groups=4, eps=1e-6),
    "scaled": dict(in_channels=8, out_channels=8, temb_channels=12, groups=4, output_scale_factor=1.5),
    "other activation": dict(in_channels=8, temb_channels=12, groups=4, non_linearity="gelu"),
    "scale and shift": dict(in_channels=8, temb_channels=12, groups=4, time_embedding_norm="scale_shift"),
    "without activation of the time": dict(in_channels=8, temb_channels=12, groups=4, skip_time_act=True),
    "upsampling": dict(in_channels=8, temb_channels=12, groups=4, up=True),
}


@in_two_modes
@pytest.mark.parametrize("name", RESIDUALS)
def test_residual_block_equals_diffusers(name, mode, operators):
    from diffusers.models.resnet import ResnetBlock2D as Reference
    from mindone.diffusers.models.resnet import ResnetBlock2D

    options = RESIDUALS[name]
    with portable_kernels():
        layer = ResnetBlock2D(**options)
    layer.set_train(False)
    reference = Reference(**options).eval()
    _copy_weights(layer, reference)
    x, times = noise(2, options["in_channels"], 6, 10), noise(2, 12, seed=1)

    def with_time(x, times):
        return layer(x, times)

    def without_time(x):
        return layer(x, None)

    timed = bool(options["temb_channels"])
    got = run(with_time, x, times, mode=mode) if timed else run(without_time, x, mode=mode)
    expected = reference(torch.from_numpy(x), torch.from_numpy(times) if timed else None)
    assert relative_error(got, expected) < 4e-6


@in_two_modes
@pytest.mark.parametrize("linear", [False, True], ids=["convolution", "linear"])
def test_transformer_equals_diffusers(linear, mode, operators):
    """Attention with itself and with a text, GEGLU, norms, and the way from picture to tokens and back."""
    from diffusers.models.transformers.transformer_2d import Transformer2DModel as Reference
    from mindone.diffusers.models.transformers.transformer_2d import Transformer2DModel

    options = dict(num_attention_heads=2, attention_head_dim=8, in_channels=16, num_layers=1, norm_num_groups=4,
                   cross_attention_dim=12, use_linear_projection=linear)  # fmt: skip
    with portable_kernels():
        layer = Transformer2DModel(**options)
    layer.set_train(False)
    reference = Reference(**options).eval()
    _copy_weights(layer, reference)
    x, text = noise(2, 16, 6, 10), noise(2, 7, 12, seed=1)

    def transform(x, text):
        return layer(x, text)[0]

    with torch.no_grad():
        expected = reference(torch.from_numpy(x), torch.from_numpy(text)).sample
    assert relative_error(run(transform, x, text, mode=mode), expected) < 5e-6


@pytest.mark.parametrize("mode, tokens, keys", [("eager", 9, 5), ("eager", 1, 3), ("jit", 9, 5)])
def test_attention_in_slices_is_attention(mode, tokens, keys, monkeypatch):
    """The plain attention with room for the scores of two rows, of all, with a mask and without."""
    from mindone.diffusers.models.attention_processor import Attention

    monkeypatch.setenv("MINDIFFEDIT_NATIVE", "0")
    with portable_kernels():
        layer = Attention(8, heads=2, dim_head=4)
    arrays = [noise(3, 2, n, 4, seed=i) for i, n in enumerate((tokens, keys, keys))]
    bias = noise(3, 2, tokens, keys, seed=9)
    doubles = [torch.from_numpy(array).double() for array in (*arrays, bias)]

    def attend(query, key, value):
        return layer.math_attention_op(query, key, value)

    def attend_with(query, key, value, bias):
        return layer.math_attention_op(query, key, value, bias)

    for room in (6 * keys * 2, 6 * keys * 1000):
        monkeypatch.setattr(portable, "SCORES", room)
        exact = T.scaled_dot_product_attention(*doubles[:3])
        assert relative_error(run(attend, *arrays, mode=mode), exact) < 5e-6  # 2.5e-6
        exact = T.scaled_dot_product_attention(*doubles[:3], attn_mask=doubles[3])
        assert relative_error(run(attend_with, *arrays, bias, mode=mode), exact) < 5e-6  # 2.5e-6


# --- what is replaced, and for how long ---------------------------------------------------------------------


def snapshot() -> dict:
    """Every name on mint's modules, and every class's construct, by identity."""
    names = {}
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("mindspore.mint"):
            for attribute, value in vars(module).items():
                names[module.__name__, attribute] = value
                if isinstance(value, type) and "construct" in vars(value):
                    names[module.__name__, attribute, "construct"] = vars(value)["construct"]
    return names


def changed(before: dict, after: dict) -> set:
    return {name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)}


needs_gaps = pytest.mark.skipif(not kernels.missing_kernels(), reason="this device has every kernel")


def test_the_table_of_replacements_is_sound():
    names = [kernel.name for kernel in kernels.KERNELS]
    assert len(set(names)) == len(names) and set(kernels.missing_kernels()) <= set(names)
    replaced = {kernel.name: kernel.replacement for kernel in kernels.KERNELS}
    if native.available():
        replaced.update(kernels._replacements())
    for name, replacement in replaced.items():
        # Another name than the method's own would break `jit` over a layer compiled before in graph mode.
        if ":" in name:
            assert replacement.__name__ == name.partition(":")[2]
        elif not name.rpartition(".")[2].islower():
            assert replacement.__name__ == "construct", name
    # docs/devices.md names them, between backticks in the last columns of two tables.
    page = (pathlib.Path(__file__).parent.parent / "docs" / "devices.md").read_text(encoding="utf-8")
    for headings, expected in (
        ("| why | names |", names),
        ("| | | in place of |", [name.rpartition(".")[2] for name in kernels.NATIVE]),
    ):
        rows = page.partition(f"{headings}\n")[2].partition("\n\n")[0].splitlines()
        named = re.findall(r"`([^`]+)`", "".join(row.split(" | ")[-1] for row in rows))
        assert sorted(named) == sorted(expected)


@on_cpu
def test_what_the_cpu_has_not():
    missing = set(kernels.missing_kernels())
    elsewhere = {"mint.split", "mint.chunk", "mindone.transformers.activations.NewGELUActivation"}
    everywhere = {kernel.name for kernel in kernels.KERNELS} - elsewhere
    assert missing == everywhere or everywhere <= missing and mindspore.__version__.startswith("2.7")


@needs_gaps
def test_missing_kernels_fail_outside_the_context_and_nothing_lingers():
    with devices.eager():
        with pytest.raises(RuntimeError):
            F.gelu(mindspore.Tensor([1.0]))
            devices.synchronize()
        devices.synchronize()
        assert (mindspore.Tensor([1.0]) + 1).asnumpy() == [2.0]


@needs_gaps
def test_names_come_back():
    before = snapshot()
    with portable_kernels():
        inside = changed(before, snapshot())
        assert {("mindspore.mint.nn.functional", "gelu"), ("mindspore.mint.nn", "Conv2d", "construct")} <= inside
        assert ("mindspore.mint.nn", "Conv2d") not in inside
        with portable_kernels():
            assert changed(before, snapshot()) == inside
        assert changed(before, snapshot()) == inside
    assert not changed(before, snapshot())
    with pytest.raises(KeyError), portable_kernels(), portable_kernels():
        raise KeyError("inside")
    assert not changed(before, snapshot())


@needs_gaps
def test_only_missing_names_are_replaced(monkeypatch):
    monkeypatch.setenv("MINDIFFEDIT_NATIVE", "0")
    with portable_kernels():
        pass
    missing = tuple(kernel for kernel in kernels.KERNELS if kernel.name == "mint.arange")
    monkeypatch.setattr(kernels, "_missing", {devices.device_target(): missing})
    monkeypatch.setattr(kernels, "_plan_key", None)
    before = snapshot()
    with portable_kernels():
        assert changed(before, snapshot()) == {("mindspore.mint", "arange")}
    monkeypatch.setattr(kernels, "_plan_key", None)


def test_gelu_of_a_tanh():
    """What Flan-T5 has; float16 is computed in float32."""
    array, ours = noise(5, 7, scale=3), portable.NewGELUActivation.construct
    expected = torch.nn.functional.gelu(torch.from_numpy(array), approximate="tanh")
    x = mindspore.Tensor(array)
    with portable_kernels(), devices.eager():
        assert relative_error(ours(None, x), expected) < 1e-6  # measured: 3e-7
        halves = ours(None, x.astype(mindspore.float16))
    assert halves.dtype == mindspore.float16 and relative_error(halves, expected) < 3e-3  # measured: 1e-3


def test_on_ascend_attention_and_split_are_replaced(monkeypatch):
    """It has every kernel, but none that keeps float32 attention from holding all its scores; a split is one launch."""
    monkeypatch.setenv("MINDIFFEDIT_NATIVE", "0")
    monkeypatch.setattr(kernels.devices, "device_target", lambda: "Ascend")
    from mindone.diffusers.models.attention_processor import Attention

    before, original = snapshot(), Attention.math_attention_op
    assert kernels.missing_kernels() == ["mindone.diffusers.models.attention_processor.Attention:math_attention_op"]
    with portable_kernels():
        assert changed(before, snapshot()) == {("mindspore.mint", "split")}
        assert Attention.math_attention_op is portable.Attention.math_attention_op
    assert Attention.math_attention_op is original and not changed(before, snapshot())


@needs_gaps
def test_names_come_back_when_the_last_of_two_threads_leaves():
    before = snapshot()
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    seen = {}

    def first():
        with portable_kernels():
            first_is_in.set()
            second_is_in.wait(30)
        first_is_out.set()

    def second():
        first_is_in.wait(30)
        with portable_kernels():
            second_is_in.set()
            first_is_out.wait(30)
            seen["after the first left"] = changed(before, snapshot())
            seen["value"] = F.gelu(mindspore.Tensor([1.0], mindspore.float32)).asnumpy()

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen["after the first left"]
    assert relative_error(seen["value"], T.gelu(torch.tensor([1.0]))) < 1e-6
    assert not changed(before, snapshot())


@needs_gaps
def test_copies_in_mindone_are_replaced_and_come_back(monkeypatch):
    original = F.pad
    early, late = types.ModuleType("mindone._early"), types.ModuleType("mindone._late")
    early.copy = original
    monkeypatch.setitem(sys.modules, "mindone._early", early)
    with portable_kernels():
        assert early.copy is portable.pad
        late.copy = F.pad  # as `from mindspore.mint.nn.functional import pad` in a module imported here
        monkeypatch.setitem(sys.modules, "mindone._late", late)
    assert early.copy is late.copy is original
    with portable_kernels():
        assert late.copy is portable.pad
    assert late.copy is original


@pytest.mark.parametrize("mode", ["PYNATIVE_MODE", "GRAPH_MODE"])
def test_probing_is_quiet_and_leaves_the_context_and_the_count(mode, tmp_path):
    program = f"""
import mindspore
from mindiffedit.runtime import devices, kernels
mindspore.set_context(mode=mindspore.{mode})
with devices.CompileCounter() as compiled:
    names = kernels.missing_kernels()
assert mindspore.get_context("mode") == mindspore.{mode}
assert compiled.count == 0, compiled.count
assert names == {kernels.missing_kernels()}, names
"""
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, text=True, **PIPES)
    assert (done.returncode, done.stdout, done.stderr, [*tmp_path.iterdir()]) == (0, "", "", [])


@needs_gaps
def test_a_graph_compiled_inside_runs_outside():
    compiled = mindspore.jit(_activations)
    x = mindspore.Tensor(noise(3, 4, seed=9))
    with portable_kernels():
        inside = [result.asnumpy() for result in compiled(x)]
    with devices.CompileCounter() as counter:
        outside = [result.asnumpy() for result in compiled(x)]
    assert counter.count == 0
    assert all(map(np.array_equal, inside, outside))


@needs_gaps
@pytest.mark.parametrize("name", ["1x1", "layer norm", "embedding"])
def test_a_layer_compiled_alone_is_compiled_again_in_a_function(name):
    """In global graph mode first, then under jit: what a VAE with its two 1x1 convolutions goes through."""
    cls, args, kwargs, x = LAYERS[name]
    layer = getattr(mint.nn, cls)(*args, **kwargs)

    def twice(x):
        return layer(x) + layer(x)

    alone = run(layer, x, mode="graph").asnumpy()
    assert relative_error(run(twice, x, mode="jit"), 2 * alone) < 1e-6


# --- mindone's models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eager", pytest.param("jit", marks=pytest.mark.slow)])
def test_text_encoder_with_a_mask_equals_transformers(sd1_folder, mode):
    """The whole models without one, in both modes, are in test_models.py and test_parity.py."""
    from transformers import CLIPTextModel as Reference

    path = str(sd1_folder / "text_encoder")
    with portable_kernels():
        from mindone.transformers import CLIPTextModel

        model = CLIPTextModel.from_pretrained(path)
    reference = Reference.from_pretrained(path, attn_implementation="eager").eval()
    length = reference.config.max_position_embeddings
    ids = np.random.default_rng(0).integers(1, reference.config.vocab_size - 2, (2, length)).astype(np.int32)
    ids[:, 0], ids[0, 5:], ids[1, 40:] = reference.config.bos_token_id, *[reference.config.eos_token_id] * 2
    attended = (np.arange(length) < np.array([[6], [41]])).astype(np.int32)

    def encode(ids, attended):
        return model(ids, attention_mask=attended)

    with torch.no_grad():
        expected = reference(torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(attended))
    last, pooled = run(encode, ids, attended, mode=mode)
    errors = relative_error(last, expected.last_hidden_state), relative_error(pooled, expected.pooler_output)
    assert max(errors) <= 1e-5, f"{errors}"  # 2.4e-6


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_schedulers_run(name):
    """Nearly all need no replacement (UniPC stacks); their tables differ from diffusers' in the last bits."""
    import diffusers
    import mindone.diffusers

    options = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    reference = getattr(diffusers, name)(**options)
    reference.set_timesteps(6)
    sample, expected = mindspore.Tensor(noise(1, 4, 8, 8)), torch.from_numpy(noise(1, 4, 8, 8))
    with portable_kernels():
        scheduler = getattr(mindone.diffusers, name)(**options)
        scheduler.set_timesteps(6)
        assert np.array_equal(scheduler.timesteps.asnumpy(), reference.timesteps.numpy())
        for i, (timestep, reference_timestep) in enumerate(zip(scheduler.timesteps, reference.timesteps)):
            output = noise(1, 4, 8, 8, seed=i)
            sample = scheduler.scale_model_input(sample, timestep)
            expected = reference.scale_model_input(expected, reference_timestep)
            sample = scheduler.step(mindspore.Tensor(output), timestep, sample)[0]
            expected = reference.step(torch.from_numpy(output), reference_timestep, expected).prev_sample
    error = relative_error(sample, expected)
    assert error <= 2e-5, f"{error:.1e}"  # 4.4e-6
