"""PyTorch's random streams in NumPy: ``Generator`` draws what a ``torch.Generator`` of the same seed draws.

A seed means the same picture here as in a pipeline on PyTorch only if the noise behind it is the same.
Neither PyTorch nor MindSpore is imported.

What is drawn follows PyTorch 2.13: ``ATen/core/MT19937RNGEngine.h``, ``ATen/core/DistributionsHelper.h`` and
``ATen/native/{cpu,cuda}/DistributionTemplates.h``. By their source, older releases draw ``float32`` and
``float64`` alike, and differ in two places: on the CPU 16 or more values of ``float16`` or ``bfloat16`` were
computed in half precision (see PyTorch's issue 166853, of November 2025), and ``randint`` with ``high`` from
2**28 up to 2**32 took one word for a number and not two (see its pull request 143787, of December 2024).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable

import numpy as np

from mindiffedit.errors import InputError, InputTypeError

DEFAULT_SEED = 67280421310721  # of a torch.Generator that nobody has seeded
DTYPES = ("float32", "float64", "float16", "bfloat16")


def check_seed(seed, name: str = "seed") -> int:
    """``seed`` as an int from 0 to 2**64 - 1, a negative one counted from 2**64 down as PyTorch does.

    Args:
        seed: a whole number (Python's or NumPy's) from -2**63 to 2**64 - 1.
        name: what the errors call it.

    Raises:
        TypeError: for anything that is no whole number; True and False are none.
        ValueError: for one out of that range.
    """
    return _whole(seed, name, -(2**63), 2**64 - 1, "from -2**63 to 2**64 - 1, as PyTorch's seeds") % 2**64


def _whole(value, name: str, least: int, most: int, bounds: str) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise InputTypeError(
            "{parameter} has to be a whole number {bounds}, but is {value!r} ({value!t}).",
            name,
            bounds=bounds,
            value=value,
        )
    if not least <= value <= most:
        raise InputError(
            "{parameter} has to be a whole number {bounds}, but is {value!r}.", name, bounds=bounds, value=value
        )
    return int(value)


def dtype_name(dtype) -> str:
    """One of ``DTYPES``, from such a name or from a NumPy dtype.

    Raises:
        ValueError: for any other.
    """
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        name = None
    if name not in DTYPES:
        raise InputError(
            "{parameter} has to be one of {known}, but is {value!r}.", "dtype", known=", ".join(DTYPES), value=dtype
        )
    return name


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 ``values`` rounded to the nearest (ties to even) that ``dtype`` can hold, as a float32 array.

    "float32" and "float64" change nothing. Values must be finite.
    """
    values = np.asarray(values, np.float32)
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":  # the upper half of a float32's bits
        bits = values.view(np.uint32)
        bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return (bits & np.uint32(0xFFFF0000)).view(np.float32)
    return values


class Generator:
    """A stream of random numbers, number for number that of ``torch.Generator(device)``.

    It can be given wherever the pipeline takes ``generator=``, alone or in a list; there the int seed ``0`` means the
    same as ``Generator().manual_seed(0)``:

        generator = Generator().manual_seed(0)  # device="cpu"; or Generator("cuda")
        noise = generator.randn(1, 4, 64, 64)   # float32; dtype="float16", "bfloat16", "float64"
        state = generator.get_state()           # uint8 array
        generator.set_state(state).initial_seed()
        pipeline.invert(..., generator=generator)

    ``device="cpu"`` is complete: ``randn`` of four dtypes and ``randint``, in any order, and states that
    PyTorch takes and gives byte for byte. ``float32``, ``float16`` and ``bfloat16`` values equal those of
    PyTorch for x86-64 Linux with AVX2 or more in every bit, for its arithmetic is followed; builds for other
    processors differ from that one in the last bits (``float32``: within 1e-6). ``float64`` values agree
    within 1e-14.

    ``device="cuda"`` is **experimental**: it computes on the host what PyTorch draws on an NVIDIA GPU. The
    words of Philox4x32-10 are the same, but a GPU has fast approximations for sines and cosines, so
    ``float32`` values are expected to differ by some 1e-6, and ``float16`` and ``bfloat16`` values seldom, by
    one step. It was never run beside a GPU, but checked against the known answers of Random123, against 212
    ``float32`` and 81 ``float16`` values and 64 numbers of ``randint`` that others printed from PyTorch on GPUs
    (all agree to the last decimal), and against NVIDIA's cuRAND headers compiled for the host, called in PyTorch's
    loop (18.7 million values of 156 sizes, grids, seeds and offsets agree within 5e-7).

    On a GPU, large draws depend on its model, because PyTorch starts at most
    ``256 * multiprocessors * (threads_per_multiprocessor // 256)`` threads and lets each of them draw again
    where more numbers are wanted: 221,184 threads for an A100 (108 and 2048, the default), 270,336 for an H100 SXM
    (132 and 2048), 196,608 for an RTX 4090 (128 and 1536), 125,952 for an RTX 3090 (82 and 1536), 163,840 for a
    V100 (80 and 2048), 40,960 for a T4 (40 and 1024). The latents of one picture of 512 x 512 are 16,384 numbers; up
    to the GPU's limit the two options change nothing.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        multiprocessors: streaming multiprocessors of the imitated GPU; None is 108. Only for "cuda".
        threads_per_multiprocessor: threads that one of them holds at most; None is 2048. Only for "cuda".

    Raises:
        TypeError, ValueError: for another device, an option that the device has not, or numbers out of range.
    """

    def __init__(
        self, device: str = "cpu", *, multiprocessors: int | None = None, threads_per_multiprocessor: int | None = None
    ):
        self.device = str(device)
        kind, colon, index = self.device.partition(":")
        if kind not in ("cpu", "cuda") or (colon and not index.isdigit()):
            raise InputError(
                "{parameter} has to be 'cpu', 'cuda' or 'cuda:N', but is {value!r}.", "device", value=device
            )
        options = {"multiprocessors": multiprocessors, "threads_per_multiprocessor": threads_per_multiprocessor}
        self._options = {name: value for name, value in options.items() if value is not None}
        if kind == "cpu" and self._options:
            raise InputError(
                "{parameter} describes a GPU; it goes with {device='cuda'}, not 'cpu'.",
                parameter=next(iter(self._options)),
            )
        self._stream = _CudaStream(**self._options) if kind == "cuda" else _CpuStream()
        self._stream.start(DEFAULT_SEED)

    def __repr__(self) -> str:
        return f"<mindiffedit.Generator device={self.device!r} initial_seed={self.initial_seed()}>"

    def manual_seed(self, seed: int) -> Generator:
        """Starts the stream of ``seed`` (``-2**63`` to ``2**64 - 1``) at its beginning and returns the generator.

        The CPU's stream uses the seed's lowest 32 bits only, as PyTorch's does.

        Raises:
            TypeError, ValueError: see ``check_seed``.
        """
        self._stream.start(check_seed(seed))
        return self

    def seed(self) -> int:
        """Starts the stream of a seed from the system's entropy and returns that seed, 0 to ``2**53 - 1``."""
        seed = secrets.randbits(53)  # PyTorch too keeps to what a double holds exactly
        self.manual_seed(seed)
        return seed

    def initial_seed(self) -> int:
        """The seed that the stream was started with, 0 to ``2**64 - 1``; a negative one shows as ``2**64`` + seed."""
        return self._stream.seed

    def get_state(self) -> np.ndarray:
        """The stream's position, uint8, as ``torch.Generator.get_state`` gives it.

        5056 bytes for "cpu", 16 for "cuda"; PyTorch's ``set_state`` takes them after ``torch.from_numpy``.
        """
        return self._stream.get_state()

    def set_state(self, state) -> Generator:
        """Continues from ``state``, of ``get_state`` here or of PyTorch on the same kind of device.

        Args:
            state: uint8 array of one axis, or what NumPy turns into one, such as PyTorch's ByteTensor.

        Raises:
            TypeError: for other kinds of data.
            ValueError: for another size or bytes that are no such state; the stream is left as it was.
        """
        state = np.asarray(state)
        if state.dtype != np.uint8:
            raise InputTypeError(
                "{parameter} has to be an array of uint8, but its type is {dtype}.",
                parameter="state",
                dtype=state.dtype,
            )
        expected = (self._stream.STATE.itemsize,)
        if state.shape != expected:
            raise InputError(
                "{parameter} of a generator on {device!r} has to have the shape {expected}, but has {shape}.",
                parameter="state",
                device=self.device,
                expected=expected,
                shape=state.shape,
            )
        self._stream.set_state(np.ascontiguousarray(state).view(self._stream.STATE)[0])
        return self

    def clone_state(self) -> Generator:
        """A generator of its own at the same position, as ``torch.Generator.clone_state`` gives it."""
        clone = Generator(self.device, **self._options)
        return clone.set_state(self.get_state())

    def __getstate__(self):  # for copy and pickle: a copy must not share the position
        return {"device": self.device, "options": self._options, "state": self.get_state()}

    def __setstate__(self, kept):
        Generator.__init__(self, kept["device"], **kept["options"])
        self.set_state(kept["state"])

    def randn(self, *size, dtype="float32") -> np.ndarray:
        """Standard normal numbers, as ``torch.randn(size, generator=self, dtype=dtype)`` draws them.

        Args:
            *size: the shape, as whole numbers or as one tuple or list of them.
            dtype: "float32", "float64", "float16" or "bfloat16". On "cpu" the dtypes move the stream
                differently; on "cuda" the half types are ``float32`` draws, rounded.

        Returns:
            Array of that shape and dtype; for "bfloat16", which NumPy lacks, a float32 array of such values.

        Raises:
            TypeError, ValueError: for a shape or dtype that is none of these.
            NotImplementedError: for "float64" on "cuda".
        """
        shape = _shape(size[0] if len(size) == 1 and isinstance(size[0], (tuple, list)) else size)
        name = dtype_name(dtype)
        return self._stream.normals(math.prod(shape), name).reshape(shape)

    def randint(self, high: int, size=()) -> np.ndarray:
        """Whole numbers from 0 to ``high - 1``, as ``torch.randint(high, size, generator=self)`` draws them.

        Args:
            high: 1 to ``2**63 - 1``.
            size: the shape, a tuple, list or whole number.

        Returns:
            int64 array of that shape.

        Raises:
            TypeError, ValueError: for a bound or shape that is none of these.
        """
        high = _whole(high, "high", 1, 2**63 - 1, "from 1 to 2**63 - 1")
        shape = _shape(size if isinstance(size, (tuple, list)) else (size,))
        return self._stream.integers(high, math.prod(shape)).reshape(shape)

    def standard_normal(self, size=(), dtype=np.float32) -> np.ndarray:
        """``randn`` under the name that ``numpy.random.Generator`` has for it.

        Args:
            size: the shape, a tuple, list or whole number.
            dtype: as ``randn``'s.
        """
        return self.randn(tuple(size) if isinstance(size, (tuple, list)) else (size,), dtype=dtype)

    def integers(self, high: int) -> int:
        """One number of ``randint`` under the name that ``numpy.random.Generator`` has for it.

        Args:
            high: 1 to ``2**63 - 1``.
        """
        return int(self.randint(high))


def _shape(size) -> tuple[int, ...]:
    return tuple(_whole(side, "size", 0, 2**63 - 1, "of at least 0, or several") for side in size)


def _no_state(why: str) -> InputError:
    return InputError("{parameter} is no state of PyTorch's generator on this device: {why}.", "state", why=why)


def _cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 ``values`` as ``Generator.randn`` hands them out for a ``dtype`` of at most 32 bits."""
    return values.astype(np.float16) if dtype == "float16" else rounded(values, dtype)


# -----------------------------------------------------------------------------------------------------------
# CPU: MT19937


class _CpuStream:
    """MT19937 and what PyTorch's ``CPUGeneratorImpl`` keeps beside it."""

    # CPUGeneratorImplState as C lays it out; the words of the twister take 64 bits each.
    STATE = np.dtype(
        [
            *(("seed", "u8"), ("left", "i4"), ("seeded", "i4"), ("next", "u8"), ("words", "u8", 624)),
            *(("normal_x", "f8"), ("normal_y", "f8"), ("normal_rho", "f8"), ("normal_is_valid", "i4")),
            *(("unused", "i4"), ("next_float", "f4"), ("next_float_is_valid", "u1")),
        ],
        align=True,
    )

    def start(self, seed: int) -> None:
        self.seed = seed
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)  # Knuth's initialiser, the same as PyTorch's
        self._untouched = True  # no word taken yet; a state tells this from 624 words taken
        # Second number of a pair by Box and Muller, for the next draw. PyTorch keeps one of float32 likewise;
        # no draw here makes or takes it, but it is part of a state.
        self._next_double: float | None = None
        self._next_float: np.float32 | None = None

    def _raw(self, count: int) -> np.ndarray:
        """The next ``count`` words, uint32."""
        self._untouched = self._untouched and count == 0
        return self._twister.randint(0, 2**32, count, dtype=np.uint32)

    def _raw_pairs(self, count: int) -> np.ndarray:
        """The next ``count`` numbers of 64 bits, uint64; the first word of a pair is the upper half."""
        words = self._raw(2 * count).astype(np.uint64)
        return (words[0::2] << np.uint64(32)) | words[1::2]

    def get_state(self) -> np.ndarray:
        state = np.zeros(self.STATE.itemsize, np.uint8)
        fields = state.view(self.STATE)[0]
        twister = self._twister.get_state(legacy=False)["state"]
        fields["seed"] = self.seed
        # PyTorch counts the words left before it renews them, one too many: 1 for an untouched stream also.
        fields["left"] = 625 - twister["pos"]
        fields["seeded"] = 1
        fields["next"] = 0 if self._untouched else twister["pos"]
        fields["words"] = twister["key"]
        if self._next_double is not None:
            fields["normal_is_valid"] = 1
            fields["normal_y"] = self._next_double
        if self._next_float is not None:
            fields["next_float_is_valid"] = 1
            fields["next_float"] = self._next_float
        return state

    def set_state(self, fields) -> None:
        left, position = int(fields["left"]), int(fields["next"])
        untouched = left == 1 and position == 0
        if fields["seeded"] != 1 or not (untouched or (1 <= position <= 624 and left == 625 - position)):
            raise _no_state(f"seeded {fields['seeded']}, left {left} and next {position} do not go together")
        if fields["words"].max() > 0xFFFFFFFF:
            raise _no_state("a word has more than 32 bits")
        if not fields["words"][1:].any() and int(fields["words"][0]) >> 31 == 0:
            raise _no_state("all of its words are 0")
        flags = [int(fields[name]) for name in ("normal_is_valid", "next_float_is_valid")]
        if not set(flags) <= {0, 1}:
            raise _no_state(f"its flags are {flags}")
        kept = [float(fields[name]) for name, flag in zip(("normal_y", "next_float"), flags) if flag]
        if not all(map(math.isfinite, kept)):
            raise _no_state(f"the kept numbers are {kept}")
        self.seed = int(fields["seed"])
        twister = {"key": fields["words"].astype(np.uint32), "pos": 625 - left}
        self._twister.set_state({"bit_generator": "MT19937", "state": twister})
        self._untouched = untouched
        self._next_double = float(fields["normal_y"]) if flags[0] else None
        self._next_float = np.float32(fields["next_float"]) if flags[1] else None

    def normals(self, count: int, dtype: str) -> np.ndarray:
        if count < 16:
            values = np.array([self._normal() for _ in range(count)], np.float64)
            # A double becomes a float before it becomes half: rounded twice.
            return values if dtype == "float64" else _cast(values.astype(np.float32), dtype)
        whole = count - count % 16
        make = self._blocks_double if dtype == "float64" else self._blocks_single
        # Words are taken for all `count` numbers, though those of a last incomplete block are drawn anew from
        # 16 more; the half types, which are made block by block, skip the former.
        taken = whole if dtype in ("float16", "bfloat16") else count
        values = np.empty(count, np.float64 if dtype == "float64" else np.float32)
        values[:whole] = make(taken)[:whole]
        if whole < count:
            values[-16:] = make(16)
        return values if dtype == "float64" else _cast(values, dtype)

    def _normal(self) -> float:
        """One number, by Box and Muller in double precision; the second of a pair waits for the next call."""
        if self._next_double is not None:
            value, self._next_double = self._next_double, None
        else:
            u = (self._raw_pairs(2) & np.uint64(2**53 - 1)) * 2.0**-53
            # Python's functions are the C library's, as PyTorch's here; NumPy's may differ in the last bit.
            radius = math.sqrt(-2.0 * math.log1p(-float(u[1])))
            angle = 2.0 * math.pi * float(u[0])
            self._next_double = radius * math.sin(angle)
            value = radius * math.cos(angle)
        return value + 0.0  # the mean is added, so there is no -0

    def _blocks_double(self, taken: int) -> np.ndarray:
        """The whole blocks of 16 within ``taken`` numbers of the stream, float64."""
        u = (self._raw_pairs(taken) & np.uint64(2**53 - 1)) * 2.0**-53
        u = u[: taken - taken % 16].reshape(-1, 2, 8)
        radius = np.sqrt(-2.0 * np.log(1.0 - u[:, 0]))
        angle = 2.0 * math.pi * u[:, 1]
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1) + 0.0

    def _blocks_single(self, taken: int) -> np.ndarray:
        """The same of float32, made of one word each."""
        words = self._raw(taken)[: taken - taken % 16].reshape(-1, 2, 8)
        values = np.empty(words.shape, np.float32)
        for start in range(0, len(words), _CHUNK // 8):
            part = slice(start, start + _CHUNK // 8)
            u = (words[part] & np.uint32(0xFFFFFF)) * 2.0**-24
            values[part, 0], values[part, 1] = _box_muller(u[:, 0], u[:, 1])
        return values.reshape(-1)

    def integers(self, high: int, count: int) -> np.ndarray:
        words = self._raw(count).astype(np.uint64) if high < 2**28 else self._raw_pairs(count)
        return (words % np.uint64(high)).astype(np.int64)


_CHUNK = 8192  # pairs, or threads of a GPU, at a time: the steps between stay in the processor's cache


# PyTorch's float32 normal numbers come from a SIMD header (ATen/native/cpu/avx_mathfun.h, after Julien
# Pommier's sse_mathfun, zlib licence) with the logarithm, sine and cosine of the Cephes library. To equal
# them to the last bit the steps below round where that header rounds: to float32 after every operation,
# except that a product which is added at once is rounded only after the addition (compilers for AVX2 fuse the
# two). Numbers are held in float64, where a product of two float32 is exact.


def _to_single(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).astype(np.float64)


def _singles(*values: float) -> tuple[float, ...]:
    return tuple(float(np.float32(value)) for value in values)


_LOG = _singles(
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_LN2 = _singles(-2.12194440e-4, 0.693359375)  # ln 2 as a small and a large part
_SINE = _singles(-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COSINE = _singles(2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_QUARTER_PI = _singles(-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)  # minus it, in parts
_SQRT_HALF, _FOUR_OVER_PI, _TWO_PI = _singles(math.sqrt(0.5), 4.0 / math.pi, 2.0 * math.pi)


def _polynomial(x: np.ndarray, coefficients) -> np.ndarray:
    """Horner's scheme with fused multiply-adds; the highest power comes first."""
    value = coefficients[0]
    for coefficient in coefficients[1:]:
        value = _to_single(value * x + coefficient)
    return value


def _log_single(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of float32 values above 0, held in float64."""
    x, exponent = np.frexp(x)
    low = x < _SQRT_HALF
    exponent = exponent - low.astype(np.float64)
    x = np.where(low, x + x, x) - 1.0
    square = _to_single(x * x)
    y = _to_single(_polynomial(x, _LOG) * x)
    y = _to_single(y * square + _to_single(exponent * _LN2[0]))
    y = _to_single(y - 0.5 * square)
    return _to_single(_to_single(x + y) + exponent * _LN2[1])


def _sine_cosine_single(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sine and cosine of float32 values from 0 to 2 pi, held in float64."""
    octant = (_to_single(x * _FOUR_OVER_PI).astype(np.int32) + 1) & ~1
    for part in _QUARTER_PI:
        x = _to_single(x + octant * part)
    square = _to_single(x * x)
    cosine = _to_single(_polynomial(square, _COSINE) * square)
    cosine = _to_single(_to_single(cosine * square - 0.5 * square) + 1.0)
    sine = _to_single(_polynomial(square, _SINE) * square)
    sine = _to_single(sine * x + x)
    swapped = (octant & 2) != 0
    sine, cosine = np.where(swapped, cosine, sine), np.where(swapped, sine, cosine)
    sine = np.where((octant & 4) != 0, -sine, sine)
    return sine, np.where((~(octant - 2) & 4) != 0, -cosine, cosine)


def _box_muller(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of float32 normal numbers, held in float64, of two uniform arrays (0 <= u < 1)."""
    radius = _to_single(np.sqrt(-2.0 * _log_single(1.0 - first)))
    sine, cosine = _sine_cosine_single(_to_single(second * _TWO_PI))
    return radius * cosine + 0.0, radius * sine + 0.0


# -----------------------------------------------------------------------------------------------------------
# CUDA: Philox4x32-10


def philox4x32_10(counter, key) -> np.ndarray:
    """Four words of 32 bits from a counter of four and a key of two.

    Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.

    Args:
        counter: four whole numbers or arrays of them, 0 to 2**32 - 1, of shapes that broadcast.
        key: two whole numbers, likewise.

    Returns:
        uint32 array, 4 x that shape.
    """
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, np.uint64) for c in counter))
    k0, k1 = (int(k) for k in key)
    for _ in range(10):
        left, right = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (right >> shift) ^ c1 ^ np.uint64(k0), right & low
        c2, c3 = (left >> shift) ^ c3 ^ np.uint64(k1), left & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


class _CudaStream:
    """The seed and offset that PyTorch's ``CUDAGeneratorImpl`` keeps, and the way its kernels spend them."""

    STATE = np.dtype([("seed", "u8"), ("offset", "i8")])

    def __init__(self, multiprocessors: int = 108, threads_per_multiprocessor: int = 2048):
        _whole(multiprocessors, "multiprocessors", 1, 2**31, "from 1 to 2**31")
        _whole(threads_per_multiprocessor, "threads_per_multiprocessor", 256, 2**31, "from 256 to 2**31")
        self._max_blocks = int(multiprocessors) * (int(threads_per_multiprocessor) // 256)

    def start(self, seed: int) -> None:
        self.seed, self._offset = seed, 0

    def get_state(self) -> np.ndarray:
        return np.array([(self.seed, self._offset)], self.STATE).view(np.uint8)

    def set_state(self, fields) -> None:
        offset = int(fields["offset"])
        if offset < 0 or offset % 4:
            raise _no_state(f"its offset is {offset}, not a multiple of 4 of at least 0")
        self.seed, self._offset = int(fields["seed"]), offset

    def _draw(self, count: int, dtype, at_once: int, make: Callable) -> np.ndarray:
        """``count`` numbers as PyTorch's grid of threads draws them.

        A thread takes four words at a time and makes ``at_once`` numbers of them, which lie as many places
        apart in the result as there are threads. ``make(words, i)`` gives number i of these.
        """
        values = np.empty(count, dtype)
        if count == 0:
            return values
        if count >= 2**31:
            raise NotImplementedError("PyTorch splits draws of 2**31 numbers and more; draw fewer at once.")
        threads = 256 * min(-(-count // 256), self._max_blocks)
        key = (self.seed & 0xFFFFFFFF, self.seed >> 32)
        for start in range(0, count, threads * at_once):
            turn = self._offset // 4
            for first in range(0, min(threads, count - start), _CHUNK):
                last = min(first + _CHUNK, threads)
                counter = (turn & 0xFFFFFFFF, turn >> 32, np.arange(first, last), 0)
                words = philox4x32_10(counter, key)
                for i in range(at_once):
                    part = values[start + i * threads :][first:last]
                    if part.size == 0:
                        break
                    part[:] = make(words[:, : part.size], i)
            self._offset += 4
        return values

    def normals(self, count: int, dtype: str) -> np.ndarray:
        if dtype == "float64":
            raise NotImplementedError("float64 is not drawn on 'cuda'; draw float32, or use device='cpu'.")
        return _cast(self._draw(count, np.float32, 4, _curand_normal), dtype)

    def integers(self, high: int, count: int) -> np.ndarray:
        def small(words, i):
            return words[i] % np.uint32(high)

        def large(words, i):
            pair = words[2 * i : 2 * i + 2].astype(np.uint64)
            return ((pair[0] << np.uint64(32)) | pair[1]) % np.uint64(high)

        at_once, make = (4, small) if high < 2**28 else (2, large)
        return self._draw(count, np.int64, at_once, make)


def _curand_normal(words: np.ndarray, i: int) -> np.ndarray:
    """Number i (0 to 3) of cuRAND's ``curand_normal4``, float32, from four words; it puts the sine first."""
    first, second = (_to_single(words[i - i % 2 + k]) for k in (0, 1))
    radius = _to_single(np.log(_to_single(first * 2.0**-32 + 2.0**-33)))
    radius = _to_single(np.sqrt(-2.0 * radius))
    step = _TWO_PI * 2.0**-32
    angle = _to_single(second * step + step / 2.0)  # fused, as GPUs do
    return (radius * _to_single(np.cos(angle) if i % 2 else np.sin(angle))).astype(np.float32)
