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


def python(*arguments, cwd=ROOT, **changes):
    """A Python that imports the package from here, with this process' environment but for the changes."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, **changes}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True)


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


def exact_geglu(x):
    first, gate = np.split(x, 2, axis=-1)
    return wide(first) * exact_gelu(gate)


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
    @pytest.mark.parametrize("batch, queries, keys, heads, size", [
        (1, 1, 1, 1, 1), (2, 1, 5, 3, 7), (1, 7, 1, 2, 40), (2, 65, 77, 8, 40), (1, 33, 289, 2, 64),
        (2, 64, 64, 2, 160), (1, 131, 577, 3, 80), (1, 9, 300, 1, 512), (1, 3, 20, 1, 1021),
    ])  # fmt: skip
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
        x, bias = normal(*shape, scale=3), normal(shape[-1], seed=1)
        # x + bias is rounded as the kernel rounds it. 1e-36: where float32 has few digits left
        for inputs, expected in (([x], exact_geglu(x)), ([x, bias], exact_geglu(x + bias))):
            assert_close(run("Geglu", inputs, expected.shape), expected, 4e-7, 1e-36)

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
        expected = exact_group_norm(x, groups, weight, bias, float(np.float32(1e-6)), shift)
        tensors = [x, weight, bias] + ([shift] if shifted else [])
        plain = run("GroupNorm", [*tensors, [groups, 1e-6, 0]], shape)
        assert_close(plain, expected, 0.51 * ULP, 1e-11)
        # SiLU of the rounded norm: at -5 it has five times the relative error of its input.
        fused = run("GroupNorm", [*tensors, [groups, 1e-6, 1]], shape)
        assert_close(fused, exact_silu(plain), 2e-7)
        for silu, image in enumerate((plain, fused)):
            tokens = run("GroupNormTokens", [*tensors, [groups, 1e-6, silu]], tokens_of(x).shape)
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
        centred = wide(x) - wide(x).mean(-1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + float(np.float32(1e-5)))
        expected = normed * wide(weight) + wide(bias)
        assert_close(run("LayerNorm", [x, weight, bias, [1e-5]], shape), expected, 0.51 * ULP, 1e-11)

    @pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 17, 3, 5), (1, 40, 16, 16), (2, 33, 20, 13)])
    def test_layouts(self, shape):
        image, residual = normal(*shape), normal(*shape, seed=1)
        tokens = np.ascontiguousarray(tokens_of(image))
        assert np.array_equal(run("ImageToTokens", [image], tokens.shape), tokens)
        assert np.array_equal(run("TokensToImage", [tokens, residual], image.shape), image + residual)

    @pytest.mark.parametrize("filters", [1, 4, 5, 19])
    @pytest.mark.parametrize("stride, padding", [(1, 1), (1, 0), (2, 0), (2, 1)])
    @pytest.mark.parametrize("shape, kernel", [
        ((2, 3, 9, 7), (3, 3)), ((1, 65, 5, 67), (3, 3)), ((1, 2, 3, 3), (3, 3)), ((1, 9, 6, 131), (2, 3)),
        ((1, 320, 4, 4), (3, 2)),
    ])  # fmt: skip
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
    code = "from mindiffedit.runtime import native; print(native.instruction_set())"
    assert python("-c", code, MINDIFFEDIT_NATIVE_ISA=isa).stdout.strip() == isa
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::TestKernels")
    done = python(*tests, MINDIFFEDIT_NATIVE_ISA=isa)
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
    code, expected = "import test_native; print(chr(10).join(test_native.digests()))", digests()
    for threads in "123":
        done = python("-c", code, cwd=ROOT / "tests", OMP_NUM_THREADS=threads)
        assert done.stdout.split("\n")[:-1] == expected, done.stderr


REFUSED = [
    ("Silu", [(2, 3)], (3, 2)), ("Silu", [(2, 3), (2, 3)], (2, 3)), ("Geglu", [(2, 7)], (2, 3)),
    ("Attention", [(1, 4, 6), (1, 4, 6), (1, 5, 6), [2, 1.0]], (1, 4, 6)),
    ("Attention", [(1, 4, 6), (1, 4, 6), (1, 4, 6), [4, 1.0]], (1, 4, 6)),
    ("Attention", [(1, 4, 6), (1, 4, 6), (1, 4, 6), [2, 0.0]], (1, 4, 6)),
    ("Attention", [(1, 4, 6), (1, 0, 6), (1, 0, 6), [2, 1.0]], (1, 4, 6)),
    ("Attention", [(1, 4, 1025), (1, 4, 1025), (1, 4, 1025), [1, 1.0]], (1, 4, 1025)),
    ("GroupNorm", [(1, 6, 2), (6,), (6,), [4, 1e-5, 0]], (1, 6, 2)),
    ("GroupNorm", [(1, 6, 2), (6,), (5,), [3, 1e-5, 0]], (1, 6, 2)),
    ("GroupNorm", [(1, 6, 2), (6,), (6,), (6,), [3, 1e-5, 0]], (1, 6, 2)),
    ("GroupNormTokens", [(1, 6, 2), (6,), (6,), [3, 1e-5, 0]], (1, 6, 2)),
    ("LayerNorm", [(3, 6), (3,), (6,), [1e-5]], (3, 6)), ("LayerNorm", [(3, 6), (6,), (6,), [np.nan]], (3, 6)),
    ("TokensToImage", [(1, 6, 4), (1, 4, 2, 2)], (1, 4, 2, 2)), ("ImageToTokens", [(1, 4, 2, 3)], (1, 4, 6)),
    ("Conv2dPrecise", [(1, 3, 8, 8), (2, 4, 3, 3), (1, 2)], (1, 2, 8, 8)),
    ("Conv2dPrecise", [(1, 3, 8, 8), (2, 3, 5, 5), (1, 2)], (1, 2, 6, 6)),
    ("Conv2dPrecise", [(1, 3, 8, 8), (2, 3, 3, 3), (1, 1)], (1, 2, 8, 8)),
    ("Conv2dPrecise", [(1, 3, 2, 2), (2, 3, 3, 3), (1, 1)], (1, 2, 0, 0)),
    ("Conv2dPrecise", [(1, 3, 8, 8), (2, 3, 3, 3), (0, 2)], (1, 2, 8, 8)),
    ("BiasAddResidual", [(1, 3, 8), (4,)], (1, 3, 8)), ("ConcatChannels", [(1, 3, 8), (1, 2, 7)], (1, 5, 8)),
    ("UpsampleNearest2x", [(1, 3, 8, 8)], (1, 3, 8, 16)),
]  # fmt: skip


@built
def test_refuses_what_does_not_fit():
    for name, inputs, output in REFUSED:
        inputs = [np.ones(value) if isinstance(value, tuple) else value for value in inputs]
        with pytest.raises(ValueError, match=name):
            run(name, inputs, output)
    with pytest.raises(ValueError, match="float64"):
        native.call("Silu", [np.ones(4)], np.empty(4, np.float32))


# --- in MindSpore --------------------------------------------------------------------------------------


@built
def test_operators_refuse_wrong_calls():
    """What they compute in MindSpore, in all modes, is compared with torch in test_kernels.py."""
    mindspore = pytest.importorskip("mindspore")
    if not native.available():
        pytest.skip("the device is not the CPU, or MINDIFFEDIT_NATIVE is 0")
    from mindiffedit.runtime.native import operators

    image, rows, five, six = (mindspore.Tensor(normal(*shape)) for shape in ((1, 1, 4, 4), (3, 6), (5,), (6,)))
    with pytest.raises(ValueError, match="stride 3"):
        operators.conv2d_precise(image, image[:, :, :3, :3], stride=3)
    with pytest.raises(RuntimeError):
        operators.layer_norm(rows, five, six).asnumpy()


# --- switching off, and building -------------------------------------------------------------------------


def test_without_the_library(monkeypatch, tmp_path):
    """Switched off, with a missing file, and with one that is no library, which does not raise."""
    path = tmp_path / "lib.so"
    with monkeypatch.context() as patch:
        patch.setenv("MINDIFFEDIT_NATIVE", "0")
        assert native.available() is False
    monkeypatch.setattr(native, "library_path", lambda: path if path.exists() else None)
    cached = (native._works, native._library)
    try:
        for prepare in (lambda: None, lambda: path.write_bytes(b"not a library")):
            prepare()
            for function in cached:
                function.cache_clear()
            assert native.available() is False and native.instruction_set() is None
    finally:
        for function in cached:
            function.cache_clear()


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory):
    """What setup.py needs, without a library."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "demo")
    shutil.copytree(ROOT / "mindiffedit", folder / "mindiffedit", ignore=ignored)
    return folder


BUILD = ("setup.py", "-q", "build_ext", "--inplace")


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")
@pytest.mark.tools
@pytest.mark.parametrize("compiler", ["/bin/false", "/no/such/compiler"])
def test_a_build_that_fails_says_so_and_goes_on(source_copy, compiler):
    library = source_copy / "mindiffedit" / "runtime" / "native" / "libmindiffedit.so"
    library.write_bytes(b"an older build")
    done = python(*BUILD, cwd=source_copy, CXX=compiler, PYTHONPATH=str(source_copy))
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
    done = python(*BUILD, cwd=source_copy, PYTHONPATH=str(source_copy))
    assert done.returncode == 0 and "not built" not in done.stderr, done.stderr
    code = "from mindiffedit.runtime import native; print(native.instruction_set(), native.library_path())"
    name, path = python("-c", code, cwd=source_copy, PYTHONPATH=str(source_copy)).stdout.split()
    assert name in INSTRUCTION_SETS
    assert Path(path) == source_copy / "mindiffedit" / "runtime" / "native" / "libmindiffedit.so"
