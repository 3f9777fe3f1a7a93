"""The optional C++ kernels: accuracy against float64, every instruction set, MindSpore, building, fallback."""

import hashlib
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mindiffedit.runtime import native

ROOT = Path(__file__).resolve().parent.parent
ISA = native.instruction_set()
INSTRUCTION_SETS = ["baseline", "avx2", "avx512"]

built = pytest.mark.skipif(ISA is None, reason="the C++ kernels were not built, or do not work here")

ULP = 2.0**-23  # of a float32 near 1; a correctly rounded result is off by half of it at most


def environment(**changes):
    """This process' environment for a Python that imports the package from here."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, **changes}


def run(name, inputs, shape):
    """The operator's result; the output starts as a value that no kernel may leave."""
    output = np.full(shape, 12345.678, np.float32)
    native.call(name, [np.asarray(value, np.float32) for value in inputs], output)
    return output


def how(stride, padding):
    """What the convolution reads these from: a shape."""
    return np.zeros((stride, padding + 1))


def normal(*shape, seed=0, scale=1.0, mean=0.0):
    values = np.random.default_rng(seed).standard_normal(shape) * scale + mean
    return values.astype(np.float32)


def wide(values):
    return np.asarray(values, np.float64)


def assert_close(got, expected, relative, absolute=0.0):
    error = np.abs(wide(got) - expected)
    bound = relative * np.abs(expected) + absolute
    assert got.shape == expected.shape
    assert np.all(error <= bound), f"off by up to {np.max(error / np.maximum(bound, 1e-300)):.2f} of the bound"


# --- formulas, in float64 ----------------------------------------------------------------------------


def exact_silu(x):
    return wide(x) / (1 + np.exp(-wide(x)))


def exact_gelu(x):
    x = wide(x)
    return x * 0.5 * np.vectorize(math.erfc, otypes=[float])(-x / math.sqrt(2))


def exact_attention(query, key, value, heads, scale):
    batch, queries, width = query.shape

    def split(x):
        return wide(x).reshape(batch, -1, heads, width // heads).transpose(0, 2, 1, 3)

    scores = split(query) @ split(key).transpose(0, 1, 3, 2) * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ split(value)).transpose(0, 2, 1, 3).reshape(batch, queries, width)


def exact_group_norm(x, groups, weight, bias, eps, shift=None):
    x = wide(x)
    channels = (1, x.shape[1]) + (1,) * (x.ndim - 2)
    if shift is not None:
        x = x + wide(shift).reshape(shift.shape + (1,) * (x.ndim - 2))
    grouped = x.reshape(x.shape[0], groups, -1)
    mean = grouped.mean(-1, keepdims=True)
    variance = ((grouped - mean) ** 2).mean(-1, keepdims=True)
    normed = ((grouped - mean) / np.sqrt(variance + eps)).reshape(x.shape)
    return normed * wide(weight).reshape(channels) + wide(bias).reshape(channels)


def exact_conv2d(x, weight, bias, stride, padding):
    x = np.pad(wide(x), ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(2, 3))
    windows = windows[:, :, ::stride, ::stride]
    return np.einsum("bchwij,fcij->bfhw", windows, wide(weight), optimize=True) + wide(bias).reshape(1, -1, 1, 1)


def tokens_of(x):
    return x.reshape(x.shape[0], x.shape[1], -1).transpose(0, 2, 1)


# --- each kernel: these run once more in a process for each other instruction set ----------------------


@built
class TestKernels:
    @pytest.mark.parametrize(
        "batch, queries, keys, heads, size",
        [
            (1, 1, 1, 1, 1),
            (2, 1, 5, 3, 7),
            (1, 7, 1, 2, 40),
            (2, 65, 77, 8, 40),
            (1, 33, 289, 2, 64),
            (2, 64, 64, 2, 160),
            (1, 131, 577, 3, 80),
            (1, 9, 300, 1, 512),
            (1, 3, 20, 1, 1021),
        ],
    )
    @pytest.mark.parametrize("magnitude", [1e-3, 1.0, 4.0])
    def test_attention(self, batch, queries, keys, heads, size, magnitude):
        query = normal(batch, queries, heads * size, seed=1, scale=magnitude)
        key = normal(batch, keys, heads * size, seed=2, scale=magnitude)
        value = normal(batch, keys, heads * size, seed=3)
        scale = np.float32(size**-0.5)
        got = run("Attention", [query, key, value, [heads, scale]], query.shape)
        expected = exact_attention(query, key, value, heads, float(scale))
        # An absolute error of a score is a relative one of its weight. torch is as far off.
        largest = np.max(np.linalg.norm(query.reshape(-1, size), axis=1)) * magnitude
        assert_close(got, expected, 0, ULP * (4 + 4 * largest))

    def test_attention_with_scores_far_apart(self):
        # One key dominates each query by 1e4 and more: its value comes out, the others weigh nothing.
        query = np.eye(4, dtype=np.float32)[None] * 1e4
        key = np.concatenate([np.eye(4, dtype=np.float32), -np.ones((300, 4), np.float32)])[None] * 1e3
        value = normal(1, 304, 4)
        got = run("Attention", [query, key, value, [1, 1.0]], query.shape)
        assert np.array_equal(got, value[:, :4])
        got = run("Attention", [query, -key, value, [1, -1.0]], query.shape)
        assert np.array_equal(got, value[:, :4])

    def test_attention_passes_nan_on(self):
        query, key, value = (normal(1, 70, 24, seed=seed) for seed in range(3))
        query[0, 66, 12] = np.nan
        got = run("Attention", [query, key, value, [2, 0.3]], query.shape)
        assert np.isnan(got[0, 66, 12:]).all()
        assert np.isfinite(got[0, 66, :12]).all() and np.isfinite(got[0, :66]).all()
        key[0, 69, 0] = np.nan
        got = run("Attention", [query, key, value, [2, 0.3]], query.shape)
        assert np.isnan(got[..., :12]).all() and np.isfinite(got[0, :66, 12:]).all()

    def test_silu(self):
        x = np.concatenate([np.linspace(-87, 100, 40001), normal(999, scale=1e-3), [0.0]]).astype(np.float32)
        assert_close(run("Silu", [x], x.shape), exact_silu(x), 2e-7, 2e-38)

    @pytest.mark.parametrize("name", ["Silu", "Gelu"])
    def test_ends_of_the_range(self, name):
        x = np.array([-3e38, -1e9, -150, 0, 150, 1e9, 3e38, np.inf, np.nan, 1], np.float32)
        got = run(name, [x], x.shape)
        assert np.array_equal(got[:8], [0, 0, 0, 0, 150, np.float32(1e9), np.float32(3e38), np.inf])
        assert np.isnan(got[8]) and np.isfinite(got[9])

    def test_gelu(self):
        x = np.concatenate([np.linspace(-12, 12, 48001), normal(1001, scale=1e-4)]).astype(np.float32)
        assert_close(run("Gelu", [x], x.shape), exact_gelu(x), 3.5e-7)

    @pytest.mark.parametrize("shape", [(1, 2), (3, 5, 14), (7, 34), (2, 4096, 18), (5, 128)])
    def test_geglu(self, shape):
        x = normal(*shape, scale=3)
        half = shape[-1] // 2
        expected = wide(x[..., :half]) * exact_gelu(x[..., half:])
        # 1e-36: where float32 has few digits left
        assert_close(run("Geglu", [x], expected.shape), expected, 4e-7, 1e-36)
        bias = normal(shape[-1], seed=1)
        both = x + bias  # rounded as the kernel rounds it
        expected = wide(both[..., :half]) * exact_gelu(both[..., half:])
        assert_close(run("Geglu", [x, bias], expected.shape), expected, 4e-7, 1e-36)

    @pytest.mark.parametrize("shape", [(7,), (1, 1), (3, 5, 33), (2, 4096, 18)])
    def test_bias_add_tokens(self, shape):
        x, bias, residual = normal(*shape), normal(shape[-1], seed=1), normal(*shape, seed=2)
        assert np.array_equal(run("BiasAddTokens", [x, bias], shape), x + bias)
        assert np.array_equal(run("BiasAddTokens", [x, bias, residual], shape), (x + bias) + residual)

    @pytest.mark.parametrize(
        "shape, groups",
        [((1, 1, 1, 1), 1), ((2, 6, 3, 5), 3), ((1, 32, 1), 4), ((2, 64, 17, 19), 32), ((2, 50, 33), 5)],
    )
    @pytest.mark.parametrize("scale, mean", [(1.0, 0.0), (1e-4, 0.0), (1e4, -3e3), (1.0, 1e3)])
    @pytest.mark.parametrize("shifted", [False, True])
    def test_group_norm(self, shape, groups, scale, mean, shifted):
        x = normal(*shape, scale=scale, mean=mean)
        weight, bias = normal(shape[1], seed=1, mean=1), normal(shape[1], seed=2)
        shift = normal(*shape[:2], seed=3, scale=scale) if shifted else None
        eps = np.float32(1e-6)
        expected = exact_group_norm(x, groups, weight, bias, float(eps), shift)
        tensors = [x, weight, bias] + ([shift] if shifted else [])
        plain = run("GroupNorm", [*tensors, [groups, eps, 0]], shape)
        assert_close(plain, expected, 0.51 * ULP, 1e-11)
        # SiLU of the rounded norm: at -5 it has five times the relative error of its input.
        fused = run("GroupNorm", [*tensors, [groups, eps, 1]], shape)
        assert_close(fused, exact_silu(plain), 2e-7)
        for silu, image in enumerate((plain, fused)):
            tokens = run("GroupNormTokens", [*tensors, [groups, eps, silu]], tokens_of(x).shape)
            assert np.array_equal(tokens, tokens_of(image))

    def test_group_norm_passes_nan_on(self):
        x = normal(2, 8, 40)
        x[1, 5, 3] = np.nan
        got = run("GroupNorm", [x, np.ones(8), np.zeros(8), [4, 1e-5, 0]], x.shape)
        assert np.isnan(got[1, 4:6]).all()
        assert np.isfinite(got[0]).all() and np.isfinite(np.delete(got[1], [4, 5], 0)).all()

    @pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 40), (70, 320), (3, 1283)])
    @pytest.mark.parametrize("scale, mean", [(1.0, 0.0), (1e-4, 0.0), (1e4, 0.0), (1.0, 1e3)])
    def test_layer_norm(self, shape, scale, mean):
        x = normal(*shape, scale=scale, mean=mean)
        weight, bias = normal(shape[-1], seed=1, mean=1), normal(shape[-1], seed=2)
        eps = np.float32(1e-5)
        centred = wide(x) - wide(x).mean(-1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + float(eps))
        expected = normed * wide(weight) + wide(bias)
        assert_close(run("LayerNorm", [x, weight, bias, [eps]], shape), expected, 0.51 * ULP, 1e-11)

    @pytest.mark.parametrize(
        "batch, channels, height, width", [(1, 1, 1, 1), (2, 17, 3, 5), (1, 40, 16, 16), (2, 33, 20, 13)]
    )
    def test_layouts(self, batch, channels, height, width):
        image = normal(batch, channels, height, width)
        tokens = np.ascontiguousarray(tokens_of(image))
        residual = normal(batch, channels, height, width, seed=1)
        assert np.array_equal(run("ImageToTokens", [image], tokens.shape), tokens)
        assert np.array_equal(run("TokensToImage", [tokens, residual], image.shape), image + residual)

    @pytest.mark.parametrize("filters", [1, 4, 5, 19])
    @pytest.mark.parametrize("stride, padding", [(1, 1), (1, 0), (2, 0), (2, 1)])
    @pytest.mark.parametrize(
        "shape, kernel",
        [
            ((2, 3, 9, 7), (3, 3)),
            ((1, 65, 5, 67), (3, 3)),
            ((1, 2, 3, 3), (3, 3)),
            ((1, 9, 6, 131), (2, 3)),
            ((1, 320, 4, 4), (3, 2)),
        ],
    )
    def test_conv2d(self, shape, kernel, filters, stride, padding):
        x = normal(*shape, mean=3)  # a mean that makes float32 sums lose digits
        weight, bias = normal(filters, shape[1], *kernel, seed=1), normal(filters, seed=2)
        expected = exact_conv2d(x, weight, bias, stride, padding)
        got = run("Conv2dPrecise", [x, weight, bias, how(stride, padding)], expected.shape)
        assert_close(got, expected, 0.51 * ULP, 1e-11)
        got = run("Conv2dPrecise", [x, weight, how(stride, padding)], expected.shape)
        assert_close(got, expected - wide(bias).reshape(1, -1, 1, 1), 0.51 * ULP, 1e-11)

    def test_conv2d_of_one_pixel(self):
        x, weight = normal(2, 5, 6, 35), normal(3, 5, 1, 1, seed=1)
        expected = exact_conv2d(x, weight, np.zeros(3), 1, 0)
        assert_close(run("Conv2dPrecise", [x, weight, how(1, 0)], expected.shape), expected, 0.51 * ULP, 1e-12)

    def test_conv2d_passes_nan_on(self):
        x = normal(1, 4, 8, 8)
        x[0, 2, 3, 3] = np.nan
        got = run("Conv2dPrecise", [x, np.ones((5, 4, 3, 3)), how(1, 1)], (1, 5, 8, 8))
        assert np.isnan(got[:, :, 2:5, 2:5]).all() and np.isnan(got).sum() == 5 * 9

    @pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 3, 7), (2, 33, 40, 21)])
    def test_moves(self, shape):
        x, other = normal(*shape), normal(*shape, seed=1)
        bias = normal(shape[1], seed=2)
        biased = x + bias.reshape(1, -1, 1, 1)
        assert np.array_equal(run("BiasAddResidual", [x, bias], shape), biased)
        assert np.array_equal(run("BiasAddResidual", [x, bias, other], shape), biased + other)
        doubled = x.repeat(2, axis=2).repeat(2, axis=3)
        assert np.array_equal(run("UpsampleNearest2x", [x], doubled.shape), doubled)
        joined = np.concatenate([x, other[:, :1]], 1)
        assert np.array_equal(run("ConcatChannels", [x, other[:, :1]], joined.shape), joined)


@built
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set(isa):
    """All of TestKernels with less than the best instruction set; the other tests ran with the best."""
    if INSTRUCTION_SETS.index(isa) >= INSTRUCTION_SETS.index(ISA):
        pytest.skip(f"{isa} is not below {ISA}, which the processor or MINDIFFEDIT_NATIVE_ISA sets")
    changed = environment(MINDIFFEDIT_NATIVE_ISA=isa)
    asked = [sys.executable, "-c", "from mindiffedit import native; print(native.instruction_set())"]
    assert subprocess.run(asked, env=changed, capture_output=True, text=True).stdout.strip() == isa
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::TestKernels"]
    done = subprocess.run(command, env=changed, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


def digests():
    """One line for each kernel, on shapes large enough for several threads."""
    image, tokens = normal(2, 64, 33, 35), normal(2, 500, 120)
    calls = [
        ("Attention", [tokens, tokens * 2, tokens, [3, 0.2]], tokens.shape),
        ("Geglu", [tokens], (2, 500, 60)),
        ("Gelu", [tokens], tokens.shape),
        ("Silu", [tokens], tokens.shape),
        ("GroupNorm", [image, np.ones(64), np.ones(64), [16, 1e-5, 1]], image.shape),
        ("GroupNormTokens", [image, np.ones(64), np.ones(64), [16, 1e-5, 1]], (2, 33 * 35, 64)),
        ("LayerNorm", [tokens, np.ones(120), np.ones(120), [1e-5]], tokens.shape),
        ("TokensToImage", [tokens, normal(2, 120, 20, 25)], (2, 120, 20, 25)),
        ("ImageToTokens", [image], (2, 33 * 35, 64)),
        ("Conv2dPrecise", [image, normal(20, 64, 3, 3), how(1, 1)], (2, 20, 33, 35)),
        ("BiasAddResidual", [image, np.ones(64), image], image.shape),
        ("ConcatChannels", [image, image], (2, 128, 33, 35)),
        ("UpsampleNearest2x", [image], (2, 64, 66, 70)),
    ]
    return [f"{name} {hashlib.sha256(run(name, *rest).tobytes()).hexdigest()}" for name, *rest in calls]


@built
def test_the_number_of_threads_does_not_change_the_values():
    code = "import test_native; print(chr(10).join(test_native.digests()))"
    for threads in "123":
        changed = environment(OMP_NUM_THREADS=threads)
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=changed, cwd=ROOT / "tests", capture_output=True, text=True)
        assert done.stdout.split("\n")[:-1] == digests(), done.stderr


REFUSED = [
    ("Silu", [(2, 3)], (3, 2)),
    ("Silu", [(2, 3), (2, 3)], (2, 3)),
    ("Geglu", [(2, 7)], (2, 3)),
    ("Attention", [(1, 4, 6), (1, 4, 6), (1, 5, 6), [2, 1.0]], (1, 4, 6)),
    ("Attention", [(1, 4, 6), (1, 4, 6), (1, 4, 6), [4, 1.0]], (1, 4, 6)),
    ("Attention", [(1, 4, 6), (1, 4, 6), (1, 4, 6), [2, 0.0]], (1, 4, 6)),
    ("Attention", [(1, 4, 6), (1, 0, 6), (1, 0, 6), [2, 1.0]], (1, 4, 6)),
    ("Attention", [(1, 4, 1025), (1, 4, 1025), (1, 4, 1025), [1, 1.0]], (1, 4, 1025)),
    ("GroupNorm", [(1, 6, 2), (6,), (6,), [4, 1e-5, 0]], (1, 6, 2)),
    ("GroupNorm", [(1, 6, 2), (6,), (5,), [3, 1e-5, 0]], (1, 6, 2)),
    ("GroupNorm", [(1, 6, 2), (6,), (6,), (6,), [3, 1e-5, 0]], (1, 6, 2)),
    ("GroupNormTokens", [(1, 6, 2), (6,), (6,), [3, 1e-5, 0]], (1, 6, 2)),
    ("LayerNorm", [(3, 6), (3,), (6,), [1e-5]], (3, 6)),
    ("LayerNorm", [(3, 6), (6,), (6,), [np.nan]], (3, 6)),
    ("TokensToImage", [(1, 6, 4), (1, 4, 2, 2)], (1, 4, 2, 2)),
    ("ImageToTokens", [(1, 4, 2, 3)], (1, 4, 6)),
    ("Conv2dPrecise", [(1, 3, 8, 8), (2, 4, 3, 3), (1, 2)], (1, 2, 8, 8)),
    ("Conv2dPrecise", [(1, 3, 8, 8), (2, 3, 5, 5), (1, 2)], (1, 2, 6, 6)),
    ("Conv2dPrecise", [(1, 3, 8, 8), (2, 3, 3, 3), (1, 1)], (1, 2, 8, 8)),
    ("Conv2dPrecise", [(1, 3, 2, 2), (2, 3, 3, 3), (1, 1)], (1, 2, 0, 0)),
    ("Conv2dPrecise", [(1, 3, 8, 8), (2, 3, 3, 3), (0, 2)], (1, 2, 8, 8)),
    ("BiasAddResidual", [(1, 3, 8), (4,)], (1, 3, 8)),
    ("ConcatChannels", [(1, 3, 8), (1, 2, 7)], (1, 5, 8)),
    ("UpsampleNearest2x", [(1, 3, 8, 8)], (1, 3, 8, 16)),
]


@built
def test_refuses_what_does_not_fit():
    for name, inputs, output in REFUSED:
        inputs = [np.ones(value) if isinstance(value, tuple) else value for value in inputs]
        with pytest.raises(ValueError, match=name):
            run(name, inputs, output)
    with pytest.raises(ValueError, match="float64"):
        native.call("Silu", [np.ones(4)], np.empty(4, np.float32))


# --- in MindSpore --------------------------------------------------------------------------------------


native_ops = None  # mindiffedit.runtime.native.operators, which needs the library: the graph compiler reads a global


def import_operators():
    global native_ops
    pytest.importorskip("mindspore")
    if not native.available():
        pytest.skip("the device is not the CPU, or MINDIFFEDIT_NATIVE is 0")
    from mindiffedit.runtime.native import operators as native_ops


def everything(x, tokens, weight, bias, shift, kernel):
    """Every function of operators.py, each checked below; traced by the graph compiler."""
    return (
        native_ops.attention(tokens, tokens[:, :5], tokens[:, 2:7], 2, 0.25),
        native_ops.geglu(tokens),
        native_ops.geglu(tokens, bias),
        native_ops.bias_add_tokens(tokens, bias),
        native_ops.bias_add_tokens(tokens, bias, tokens),
        native_ops.gelu(x),
        native_ops.silu(x),
        native_ops.group_norm(x, 4, weight, bias, 1e-6),
        native_ops.group_norm(x, 2, weight, bias, 1e-5, True, shift),
        native_ops.group_norm_tokens(x, 4, weight, bias, eps=1e-5, silu=True),
        native_ops.group_norm_tokens(x, 2, weight, bias, 1e-5, False, shift),
        native_ops.layer_norm(tokens, weight, bias, 1e-5),
        native_ops.tokens_to_image(tokens, x),
        native_ops.image_to_tokens(x),
        native_ops.conv2d_precise(x, kernel),
        native_ops.conv2d_precise(x, kernel, padding=1),
        native_ops.conv2d_precise(x, kernel, None, 2),
        native_ops.conv2d_precise(x, kernel, None, 2, 1),
        native_ops.conv2d_precise(x, kernel, bias[:3]),
        native_ops.conv2d_precise(x, kernel, bias[:3], padding=1),
        native_ops.conv2d_precise(x, kernel, bias[:3], 2),
        native_ops.conv2d_precise(x, kernel, bias[:3], 2, 1),
        native_ops.bias_add_residual(x, bias),
        native_ops.bias_add_residual(x, bias, x),
        native_ops.concat_channels(x, x[:, :3]),
        native_ops.upsample_nearest_2x(x),
    )


@built
def test_operators_in_pynative_and_graph_mode():
    import_operators()
    import mindspore

    x, tokens = normal(2, 8, 4, 6), normal(2, 24, 8, seed=1)
    weight, bias, shift = normal(8, seed=2), normal(8, seed=3), normal(2, 8, seed=4)
    kernel = normal(3, 8, 3, 3, seed=5)

    normed = exact_group_norm(x, 4, weight, bias, 1e-6)
    softened = exact_group_norm(x, 2, weight, bias, 1e-5, shift)
    layer = wide(tokens) - wide(tokens).mean(-1, keepdims=True)
    layer = layer / np.sqrt((layer**2).mean(-1, keepdims=True) + 1e-5) * weight + bias
    again = exact_group_norm(x, 4, weight, bias, 1e-5)
    none = np.zeros(3)
    expected = [
        exact_attention(tokens, tokens[:, :5], tokens[:, 2:7], 2, 0.25),
        wide(tokens[..., :4]) * exact_gelu(tokens[..., 4:]),
        wide(tokens + bias)[..., :4] * exact_gelu((tokens + bias)[..., 4:]),
        tokens + bias,
        tokens + bias + tokens,
        exact_gelu(x),
        exact_silu(x),
        normed,
        exact_silu(softened),
        tokens_of(exact_silu(again)),
        tokens_of(softened),
        layer,
        tokens.transpose(0, 2, 1).reshape(x.shape) + x,
        tokens_of(x),
        *[exact_conv2d(x, kernel, none, *pair) for pair in [(1, 0), (1, 1), (2, 0), (2, 1)]],
        *[exact_conv2d(x, kernel, bias[:3], *pair) for pair in [(1, 0), (1, 1), (2, 0), (2, 1)]],
        x + bias.reshape(1, -1, 1, 1),
        x + bias.reshape(1, -1, 1, 1) + x,
        np.concatenate([x, x[:, :3]], 1),
        x.repeat(2, 2).repeat(2, 3),
    ]
    inputs = [mindspore.Tensor(value) for value in (x, tokens, weight, bias, shift, kernel)]
    eager = [value.asnumpy() for value in everything(*inputs)]
    graph = [value.asnumpy() for value in mindspore.jit(everything)(*inputs)]
    assert len(eager) == len(graph) == len(expected)
    for one, other, exact in zip(eager, graph, expected):
        assert np.array_equal(one, other)
        assert_close(one, wide(exact), 4e-7, 2e-6)


@built
def test_operators_refuse_wrong_calls():
    import_operators()
    import mindspore

    with pytest.raises(ValueError, match="stride 3"):
        image = mindspore.Tensor(normal(1, 1, 4, 4))
        native_ops.conv2d_precise(image, image[:, :, :3, :3], stride=3)
    with pytest.raises(RuntimeError):
        native_ops.layer_norm(
            mindspore.Tensor(normal(3, 6)), mindspore.Tensor(normal(5)), mindspore.Tensor(normal(6))
        ).asnumpy()


# --- switching off, and building -------------------------------------------------------------------------


def test_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("MINDIFFEDIT_NATIVE", "0")
    assert native.available() is False


def test_without_the_library(monkeypatch, tmp_path):
    """Neither a missing file nor one that is no library raises."""
    path = tmp_path / "lib.so"
    monkeypatch.setattr(native, "library_path", lambda: path if path.exists() else None)
    cached = (native._works, native._library)
    try:
        for prepare in (lambda: None, lambda: path.write_bytes(b"not a library")):
            prepare()
            for function in cached:
                function.cache_clear()
            assert native.available() is False
            assert native.instruction_set() is None
    finally:
        for function in cached:
            function.cache_clear()


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory):
    """What setup.py needs, without a library."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(
        ROOT / "mindiffedit",
        folder / "mindiffedit",
        ignore=shutil.ignore_patterns("*.so", "__pycache__", "demo"),
    )
    return folder


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")
@pytest.mark.tools
@pytest.mark.parametrize("compiler", ["/bin/false", "/no/such/compiler"])
def test_a_build_that_fails_says_so_and_goes_on(source_copy, compiler):
    library = source_copy / "mindiffedit" / "runtime" / "native" / "libmindiffedit.so"
    library.write_bytes(b"an older build")
    changed = environment(CXX=compiler)
    changed["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        env=changed,
        cwd=source_copy,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "mindiffedit" in line and "not built" in line]
    assert len(lines) == 1 and compiler in lines[0], done.stderr
    assert "Traceback" not in done.stderr
    assert not library.exists() and not list(source_copy.rglob("*.so"))


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")
@pytest.mark.skipif(
    not any(map(shutil.which, [os.environ.get("CXX") or "c++", "g++", "clang++"])), reason="no compiler"
)
@pytest.mark.tools
def test_builds(source_copy):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=source_copy,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "not built" not in done.stderr, done.stderr
    code = "from mindiffedit.runtime import native; print(native.instruction_set(), native.library_path())"
    changed = environment(PYTHONPATH=str(source_copy))
    shown = subprocess.run([sys.executable, "-c", code], cwd=source_copy, env=changed, capture_output=True, text=True)
    name, path = shown.stdout.split()
    assert name in INSTRUCTION_SETS
    assert Path(path) == source_copy / "mindiffedit" / "runtime" / "native" / "libmindiffedit.so"
