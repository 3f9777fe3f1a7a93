"""Schedulers against diffusers: timesteps, noise tables, coefficients of every step, and the fused step's results.

What is exact and what is not. Torch takes float32 square roots, exponentials and logarithms from a vector library, also
those of single numbers, and some come out with their last bit wrong: about one in a hundred on the Intel processor that
was tried, more on the AMD one. Ours are correctly rounded. With
these functions correctly rounded in torch as well, everything below is equal bit for bit: tables, coefficients, and
whole DDIM and first-order steps. Without, a wrong bit of a noise level moves what is computed from it; those tests have
bounds. The reference's own float32 is a few times further from float64 than ours is from it.
"""

import contextlib
import platform
from functools import partial
from unittest import mock

import diffusers
import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import nn

from mindiffedit.parity.formulas import ddim_row, rows_of
from mindiffedit.runtime import devices
from mindiffedit.runtime.kernels import portable_kernels
from mindiffedit.solvers import schedulers, schedules
from mindiffedit.solvers.schedulers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
)
from mindiffedit.solvers.solver import solver_of
from mindiffedit.stages import Stages, host, tensor

F32 = np.float32
FORWARD = (DDIMScheduler, DPMSolverMultistepScheduler)
INVERSE = (DDIMInverseScheduler, DPMSolverMultistepInverseScheduler)
CLASSES = FORWARD + INVERSE
COUNTS = (1, 2, 5, 10, 14, 15, 20, 50)

SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
DDIM = dict(SD, clip_sample=False, set_alpha_to_one=False)
BETAS = {
    "scaled_linear": SD,
    "linear": dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    "squaredcos": dict(beta_schedule="squaredcos_cap_v2"),
    "trained": dict(trained_betas=np.linspace(0.0001, 0.03, 1000).tolist()),
}
SOME_BETAS = [
    name if name in ("scaled_linear", "squaredcos") else pytest.param(name, marks=pytest.mark.slow) for name in BETAS
]

# Each option on its own around Stable Diffusion's configuration; the slow tests take products.
DDIM_OPTIONS = {
    "sd": {},
    "alpha-one": dict(set_alpha_to_one=True),
    "offset-0": dict(steps_offset=0),
    "trailing": dict(timestep_spacing="trailing", set_alpha_to_one=True),
    "v": dict(prediction_type="v_prediction"),
    "sample": dict(prediction_type="sample"),
    "clip": dict(clip_sample=True),
    "clip-v": dict(clip_sample=True, clip_sample_range=1.5, prediction_type="v_prediction"),
    "clip-sample": dict(clip_sample=True, clip_sample_range=0.8, prediction_type="sample"),
    "linear": BETAS["linear"],
    "squaredcos": BETAS["squaredcos"],
    "trained": BETAS["trained"],
    "zero-snr": dict(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"),
}
FORWARD_DDIM_OPTIONS = {
    "linspace": dict(timestep_spacing="linspace", steps_offset=0),
    "linspace-zero-snr": dict(timestep_spacing="linspace", rescale_betas_zero_snr=True, prediction_type="sample"),
}
DPM_OPTIONS = {
    "sd": {},
    "order-1": dict(solver_order=1),
    "heun": dict(solver_type="heun"),
    "euler-at-final": dict(euler_at_final=True),
    "no-lower-order": dict(lower_order_final=False),
    "karras": dict(use_karras_sigmas=True),
    "karras-heun": dict(use_karras_sigmas=True, solver_type="heun"),
    "leading": dict(timestep_spacing="leading"),
    "trailing-offset-0": dict(timestep_spacing="trailing", steps_offset=0),
    "v": dict(prediction_type="v_prediction"),
    "v-order-1": dict(prediction_type="v_prediction", solver_order=1),
    "sample": dict(prediction_type="sample"),
    "linear": BETAS["linear"],
    "squaredcos": dict(BETAS["squaredcos"], lambda_min_clipped=-5.1),
    "trained": BETAS["trained"],
}
FORWARD_DPM_OPTIONS = {
    "sigma-min": dict(final_sigmas_type="sigma_min"),
    "sigma-min-heun": dict(final_sigmas_type="sigma_min", solver_type="heun"),
    "sigma-min-euler": dict(final_sigmas_type="sigma_min", euler_at_final=True),
    "sigma-min-no-lower": dict(final_sigmas_type="sigma_min", lower_order_final=False),
    "zero-snr": dict(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"),
}
OPTIONS = {
    DDIMScheduler: {**DDIM_OPTIONS, **FORWARD_DDIM_OPTIONS},
    DDIMInverseScheduler: DDIM_OPTIONS,
    DPMSolverMultistepScheduler: {**DPM_OPTIONS, **FORWARD_DPM_OPTIONS},
    DPMSolverMultistepInverseScheduler: DPM_OPTIONS,
}


def is_ddim(scheduler) -> bool:
    return "DDIM" in (scheduler if isinstance(scheduler, type) else type(scheduler)).__name__


def is_inverse(scheduler) -> bool:
    return "Inverse" in (scheduler if isinstance(scheduler, type) else type(scheduler)).__name__


def short(cls) -> str:
    return cls.__name__.replace("Scheduler", "").replace("SolverMultistep", "")


def configurations(classes=CLASSES, names=None):
    """pytest parameters (class, options) of every single option, or of those that are named."""
    return [
        pytest.param(cls, dict(DDIM if is_ddim(cls) else SD, **options), id=f"{short(cls)}-{name}")
        for cls in classes
        for name, options in OPTIONS[cls].items()
        if names is None or name in names
    ]


def theirs_of(cls, options):
    return getattr(diffusers, cls.__name__)(**options)


def both(cls, options, count=None):
    """Our scheduler and diffusers', with timesteps where a count is given."""
    pair = cls(**options), theirs_of(cls, options)
    if count is not None:
        for scheduler in pair:
            scheduler.set_timesteps(count)
    return pair


def run_of(scheduler, timesteps, count, strength=1.0):
    """What the pipeline takes of a schedule."""
    skipped = count - min(int(count * strength), count)
    if is_inverse(scheduler):
        return timesteps[: len(timesteps) - skipped]
    return timesteps[skipped:]


def plan_of(scheduler, timesteps, eta=0.0):
    """The plan; the inverses have no eta."""
    return scheduler.plan(timesteps) if is_inverse(scheduler) else scheduler.plan(timesteps, eta)


def ulps(one, other) -> np.ndarray:
    """How many float32 numbers two arrays are apart, element by element."""
    ranks = []
    for values in (one, other):
        bits = np.ascontiguousarray(values, F32).view(np.int32).astype(np.int64)
        ranks.append(np.where(bits < 0, -(bits & 0x7FFFFFFF), bits))
    return np.abs(ranks[0] - ranks[1])


@contextlib.contextmanager
def torch_rounds_correctly():
    """Torch with float32 square roots, exponentials and logarithms computed in float64 and rounded once."""
    power = torch.Tensor.__pow__

    def rounded(function):
        return lambda x: function(x.double()).float() if x.dtype == torch.float32 else function(x)

    root = rounded(torch.Tensor.sqrt)

    def rounded_power(x, exponent):
        return root(x) if isinstance(exponent, float) and exponent == 0.5 else power(x, exponent)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.Tensor, "__pow__", rounded_power))
        stack.enter_context(mock.patch.object(torch.Tensor, "sqrt", root))
        for name in ("sqrt", "exp", "log"):
            stack.enter_context(mock.patch.object(torch, name, rounded(getattr(torch, name))))
        yield


# --- timesteps ---------------------------------------------------------------------------------------------------


def assert_same_timesteps(mine, theirs, count, case):
    """Equal whole numbers of the same type, or the same complaint."""
    complaints = []
    for scheduler in (mine, theirs):
        try:
            scheduler.set_timesteps(count)
            complaints.append(None)
        except ValueError as error:
            complaints.append(str(error))
    assert complaints[0] == complaints[1], case
    if complaints[0] is None:
        expected = theirs.timesteps.numpy()
        for timesteps in (mine.timesteps.asnumpy(), mine.exact_timesteps):
            assert timesteps.dtype == expected.dtype == np.int64, case
            assert np.array_equal(timesteps, expected), case


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("cls", CLASSES, ids=short)
def test_timesteps_are_the_references(cls, spacing, offset):
    """Every count, with and without a clipped noise table; 61 trailing steps end at -1, 1000 come with duplicates."""
    if cls is DDIMInverseScheduler and spacing == "linspace":
        pytest.skip("the reference's class refuses this spacing; tests/test_solvers.py")
    options = dict(SD, timestep_spacing=spacing, steps_offset=offset)
    mine, theirs = both(cls, options)
    for count in COUNTS + (61, 999, 1000):
        assert_same_timesteps(mine, theirs, count, count)
    if not is_ddim(cls):
        mine, theirs = both(cls, {**options, **BETAS["squaredcos"], "lambda_min_clipped": -5.1})
        for count in (2, 15, 50, 999):
            assert_same_timesteps(mine, theirs, count, ("clipped", count))


@pytest.mark.parametrize("betas", SOME_BETAS)
@pytest.mark.parametrize("kind", ["karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas"])
@pytest.mark.parametrize("cls", [c for c in CLASSES if not is_ddim(c)], ids=short)
def test_timesteps_of_rescaled_levels_are_the_references(cls, kind, betas):
    """They are found by searching the noise table, so a level off could move them."""
    if kind == "lu_lambdas" and is_inverse(cls):
        pytest.skip("the inverse has no such option")
    mine, theirs = both(cls, {**BETAS[betas], f"use_{kind}": True})
    for count in (1, 7, 20, 50):
        assert_same_timesteps(mine, theirs, count, count)


@pytest.mark.slow
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("cls", CLASSES, ids=short)
def test_timesteps_of_every_count_are_the_references(cls, spacing):
    if cls is DDIMInverseScheduler and spacing == "linspace":
        pytest.skip("the reference's class refuses this spacing; tests/test_solvers.py")
    mine, theirs = both(cls, dict(SD, timestep_spacing=spacing))
    for count in range(1, 1001):
        assert_same_timesteps(mine, theirs, count, count)


# --- tables ------------------------------------------------------------------------------------------------------

LINEAR_TABLES = (
    "betas",
    "alphas",
    "alphas_cumprod",
    "final_alpha_cumprod",
    "initial_alpha_cumprod",
)
ROOT_TABLES = ("alpha_t", "sigma_t", "lambda_t", "sigmas")


def tables_of(scheduler, names):
    return {
        name: np.asarray(value.asnumpy() if isinstance(value, ms.Tensor) else value.numpy())
        for name, value in vars(scheduler).items()
        if name in names
    }


@pytest.mark.parametrize("zero_snr", [False, True], ids=["plain", "zero-snr"])
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("cls", CLASSES, ids=short)
def test_tables_are_the_references(cls, betas, zero_snr):
    """Bit for bit with torch's square roots and logarithms correctly rounded, within a few bits of torch's own."""
    options = dict(BETAS[betas])
    if is_ddim(cls):
        options["set_alpha_to_one"] = zero_snr
    if zero_snr:
        if cls is DPMSolverMultistepInverseScheduler:
            pytest.skip("the inverse has no such option")
        options["rescale_betas_zero_snr"] = True
    mine, theirs = both(cls, options)
    with torch_rounds_correctly():
        rounded = tables_of(theirs_of(cls, options), LINEAR_TABLES + ROOT_TABLES)
    ours = tables_of(mine, LINEAR_TABLES + ROOT_TABLES)
    assert set(ours) == set(rounded) and len(ours) == (4 if is_ddim(cls) else 7)
    for name, table in ours.items():
        assert table.dtype == F32 and np.array_equal(table, rounded[name]), name
    assert np.array_equal(mine.exact_alphas_cumprod, rounded["alphas_cumprod"])
    if (
        zero_snr
    ):  # betas are 1 minus ratios of squared roots here: what torch's wrong bits make of them is its machine's
        return
    # Torch as it is: only what a root went into may differ.
    plain = tables_of(theirs, LINEAR_TABLES + ROOT_TABLES)
    for name, table in ours.items():
        if name == "lambda_t":  # a difference of logarithms, near 0 in the middle
            np.testing.assert_allclose(table, plain[name], rtol=0, atol=1e-6)
        elif name in ROOT_TABLES:
            assert ulps(table, plain[name]).max() <= 1, name
        else:
            assert np.array_equal(table, plain[name]), name


def test_our_square_roots_are_the_nearest_numbers_and_torchs_next_to_them():
    """Squares of the midpoints to both neighbours are exact in float64 and enclose the argument."""
    bar = DDIMScheduler(**SD).exact_alphas_cumprod
    for x in (bar, F32(1) - bar, (F32(1) - bar) / bar):
        root = np.sqrt(x)
        below, above = (
            (root.astype(np.float64) + np.nextafter(root, F32(end)).astype(np.float64)) / 2 for end in (0, 9e9)
        )
        assert (below**2 <= x).all() and (x <= above**2).all()
        one_by_one = np.array([torch.tensor(value).sqrt().item() for value in x], F32)
        for theirs in (torch.from_numpy(x).sqrt().numpy(), one_by_one):
            assert ulps(root, theirs).max() <= 1


def test_float32_recipes_are_torchs():
    """``linspace`` and the cumulative product, on ranges and lengths of all kinds."""
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 7, 8, 15, 16, 17, 100, 999, 1000, 1001, 4000):
        for start, end in rng.uniform(0.0001, 0.2, (20, 2)):
            expected = torch.linspace(start, end, count, dtype=torch.float32).numpy()
            assert np.array_equal(schedules.linspace(start, end, count), expected), (count, start, end)
            betas = rng.uniform(0, 0.05, count).astype(F32)
            expected = torch.cumprod(1.0 - torch.from_numpy(betas), 0).numpy()
            assert np.array_equal(schedules.alphas_cumprod(betas), expected)


@pytest.mark.parametrize("extra", [{}, dict(use_karras_sigmas=True)], ids=["plain", "karras"])
@pytest.mark.parametrize("betas", SOME_BETAS)
@pytest.mark.parametrize("cls", [c for c in CLASSES if not is_ddim(c)], ids=short)
def test_noise_levels_of_runs_are_the_references(cls, betas, extra):
    """``sigmas`` after ``set_timesteps``; 1000 steps of the inverse keep levels of timesteps that it drops."""
    options = {**BETAS[betas], **extra}
    ends = [{}] if is_inverse(cls) else [dict(final_sigmas_type="zero"), dict(final_sigmas_type="sigma_min")]
    for end in ends:
        mine, theirs = both(cls, {**options, **end})
        with torch_rounds_correctly():
            rounded = theirs_of(cls, {**options, **end})
        for count in COUNTS if extra else COUNTS + (999, 1000):
            for scheduler in (mine, theirs):
                scheduler.set_timesteps(count)
            with torch_rounds_correctly():
                rounded.set_timesteps(count)
            assert np.array_equal(mine.exact_sigmas, rounded.sigmas.numpy()), (end, count)
            assert np.array_equal(mine.sigmas.asnumpy(), mine.exact_sigmas)
            assert ulps(mine.exact_sigmas, theirs.sigmas.numpy()).max() <= 1, (end, count)


# --- coefficients ------------------------------------------------------------------------------------------------


def attempt(function):
    """A result, or the kind of index error that a schedule beyond its noise table is on both sides."""
    try:
        return function()
    except IndexError:
        return IndexError


def assert_same_rows(mine, theirs, timesteps, eta, case, raw):
    """The plan's rows against diffusers' own step: exact where torch rounds correctly; ``raw``: of torch as it is."""
    plan = attempt(lambda: plan_of(mine, timesteps, eta))
    with torch_rounds_correctly():
        rows = attempt(lambda: rows_of(theirs, timesteps, eta))
    if plan is IndexError or rows is IndexError:
        assert plan is rows, case
        return
    got, skipped = plan.coefficients, 0
    assert got.dtype == F32 and got.shape == rows.shape and plan.prediction_type == theirs.config.prediction_type
    if is_ddim(mine):
        assert plan.noisy == (eta > 0)
        # A negative remainder of rounding, whose root is NaN there, is 0 here.
        rows = np.where(np.isnan(rows), F32(0), rows)
    elif plan.prediction_type == "sample":
        skipped = 2  # the formula has no such numbers
    assert np.array_equal(got[:, skipped:], rows[:, skipped:], equal_nan=True), case
    if raw is not None:
        bound = raw_bound(mine.config, eta)
        np.testing.assert_allclose(got[:, skipped:], raw[:, skipped:], bound, bound, err_msg=str(case))


def raw_bound(config, eta):
    """How far torch's wrong last bits carry in 50 steps: heun's weight makes more of them the smaller the steps."""
    if config.get("rescale_betas_zero_snr"):
        return 5e-4 if eta > 0 else 1e-5  # with eta 1 the root of a remainder of rounding is among the numbers
    return 3e-6


def check_coefficients(cls, options, counts, strengths, etas, with_raw=()):
    mine = cls(**options)
    with torch_rounds_correctly():
        theirs = theirs_of(cls, options)
    plain = theirs_of(cls, options)
    for count in counts:
        for strength in strengths:
            for eta in etas if cls is DDIMScheduler else (0.0,):
                mine.set_timesteps(count)
                with torch_rounds_correctly():
                    theirs.set_timesteps(count)
                timesteps = run_of(mine, mine.exact_timesteps, count, strength)
                if len(timesteps) == 0:
                    continue
                raw = None
                if count in with_raw:
                    plain.set_timesteps(count)
                    raw = attempt(partial(rows_of, plain, timesteps, eta))
                    raw = None if raw is IndexError or np.isnan(raw).any() else raw
                assert_same_rows(mine, theirs, timesteps, eta, (count, strength, eta), raw)


@pytest.mark.parametrize("cls, options", configurations())
def test_coefficients_are_the_references(cls, options):
    """Every number of every step, read out of diffusers' own ``step``; whole runs and those that start later."""
    check_coefficients(cls, options, COUNTS, [1.0], [0.0], with_raw=[50])
    check_coefficients(cls, options, [5, 15], [0.6], [0.3, 1.0], with_raw=[15])


@pytest.mark.parametrize(
    "cls, options, count, strength",
    [
        (DDIMScheduler, dict(DDIM, timestep_spacing="trailing"), 61, 0.5),
        (DDIMInverseScheduler, dict(DDIM, timestep_spacing="trailing"), 61, 0.5),
        (DDIMInverseScheduler, dict(DDIM, steps_offset=0), 1000, 0.3),
        (DPMSolverMultistepInverseScheduler, SD, 1000, 0.6),
        (DPMSolverMultistepInverseScheduler, dict(SD, timestep_spacing="leading"), 1000, 1.0),
    ],
    ids=["DDIM-61", "DDIMInverse-61", "DDIMInverse-1000", "DPMInverse-1000", "DPMInverse-leading-1000"],
)
def test_coefficients_of_odd_schedules_are_the_references(cls, options, count, strength):
    """A timestep of -1, which indexes the noisiest level; every timestep; levels and timesteps out of step."""
    check_coefficients(cls, options, [count], [strength], [0.0])


def test_full_noise_from_a_pure_noise_start_is_a_number():
    """The first step's remainder 1 - alpha - sigma^2 is 0, rounded to either side; the reference takes its root."""
    options = dict(DDIM, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    mine, theirs = DDIMScheduler(**options), theirs_of(DDIMScheduler, options)
    theirs_fail = 0
    for count in range(2, 60):
        mine.set_timesteps(count)
        theirs.set_timesteps(count)
        row = mine.plan(mine.exact_timesteps[:1], 1.0).coefficients[0]
        assert np.isfinite(row).all() and 0 <= row[3] < 1e-3
        theirs_fail += np.isnan(ddim_row(theirs, theirs.timesteps[0], 1.0)).any()
    assert theirs_fail > 0


@pytest.mark.slow
@pytest.mark.parametrize("zero_snr", [False, True], ids=["plain", "zero-snr"])
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("cls", CLASSES, ids=short)
def test_coefficients_of_all_combinations_are_the_references(cls, spacing, betas, zero_snr):
    if cls is DDIMInverseScheduler and spacing == "linspace":
        pytest.skip("the reference's class refuses this spacing")
    if cls is DPMSolverMultistepInverseScheduler and zero_snr:
        pytest.skip("the inverse has no such option")
    base = {**BETAS[betas], "timestep_spacing": spacing}
    if zero_snr:
        base["rescale_betas_zero_snr"] = True
    kinds = ("epsilon", "v_prediction", "sample")
    if is_ddim(cls):
        more = [
            dict(steps_offset=offset, set_alpha_to_one=one, prediction_type=kind, clip_sample=offset == 1)
            for offset in (0, 1)
            for one in (False, True)
            for kind in kinds
        ]
    else:
        ends = [dict(euler_at_final=a, lower_order_final=b) for a in (False, True) for b in (False, True)]
        if not is_inverse(cls):
            ends = [dict(end, final_sigmas_type=last) for end in ends for last in ("zero", "sigma_min")]
        more = [
            dict(
                end,
                solver_type=solver,
                use_karras_sigmas=karras,
                prediction_type=kinds[i % 3],
                steps_offset=i % 2,
            )
            for i, end in enumerate(ends)
            for solver in ("midpoint", "heun")
            for karras in (False, True)
        ]
        more += [dict(solver_order=1, prediction_type=kind) for kind in kinds]
    for options in more:
        check_coefficients(cls, {**base, **options}, (1, 2, 5, 14, 15, 20), [1.0, 0.5], [0.0, 0.3, 1.0])
    check_coefficients(cls, {**base, **more[0]}, (50, 999, 1000), [1.0, 0.8], [0.0])


# --- the fused step ----------------------------------------------------------------------------------------------

SHAPE = (2, 4, 8, 8)


class Stub(nn.Cell):
    """A UNet whose output is given in the place of the embeddings."""

    dtype = ms.float32

    def construct(self, sample, timestep, encoder_hidden_states, cross_attention_kwargs=None):
        return (encoder_hidden_states.reshape(sample.shape),)


@pytest.fixture(scope="module")
def stages():
    """The compiled and the eager steps, shared: solver, prediction and clip choose a graph, nothing else does."""
    unet = Stub()
    return {mode: Stages(unet, None, None, mode) for mode in ("graph", "pynative")}


class Fused:
    """Our step with a plan, on NumPy arrays."""

    def __init__(self, stages, plan):
        self.plan, self._update = plan, stages.update(plan, False)

    def __call__(self, i, timestep, latents, previous_clean, output, noise):
        ones, zeros = np.ones((SHAPE[0], 1, *SHAPE[2:]), F32), np.zeros(SHAPE, F32)
        row = self.plan.coefficients[i]
        values = (latents, previous_clean, output, 1.0, row, ones, zeros, noise)
        return [host(value) for value in self._update(*map(tensor, values))]


def relative(got, expected) -> float:
    """Largest difference over the root mean square of the expected values."""
    difference = np.abs(got.astype(np.float64) - expected).max()
    return difference / np.sqrt(np.mean(np.square(expected, dtype=np.float64)))


def steps_of(mine, count, strength=1.0, eta=0.0, seed=0):
    """Plan, and (index, timestep, model output, noise) of every step of a run."""
    mine.set_timesteps(count)
    timesteps = run_of(mine, mine.exact_timesteps, count, strength)
    rng = np.random.default_rng(seed)
    drawn = [(i, t, *rng.standard_normal((2, *SHAPE), F32)) for i, t in enumerate(timesteps)]
    return plan_of(mine, timesteps, eta), drawn, rng.standard_normal(SHAPE, F32)


def against_diffusers(stages, cls, options, count, strength=1.0, eta=0.0):
    """Yields each step's data; both sides start every step from the reference's latents and clean prediction."""
    mine, theirs = both(cls, options)
    theirs.set_timesteps(count)
    plan, drawn, latents = steps_of(mine, count, strength, eta)
    fused, previous = Fused(stages, plan), np.zeros(SHAPE, F32)
    for i, t, output, noise in drawn:
        got, clean = fused(i, t, latents, previous, output, noise)
        extra = {}
        if eta > 0:
            extra = dict(eta=eta, variance_noise=torch.from_numpy(noise))
        result = theirs.step(torch.from_numpy(output), torch.tensor(t), torch.from_numpy(latents), **extra)
        expected = result.prev_sample.numpy()
        expected_clean = (result.pred_original_sample if is_ddim(cls) else theirs.model_outputs[-1]).numpy()
        yield i, t, (latents, previous, output, noise), (got, clean), (expected, expected_clean)
        latents, previous = expected, expected_clean


def exact_step(plan, row, latents, previous, output, noise):
    """The step in float64 with float64 coefficients."""
    x, m, e = (array.astype(np.float64) for array in (latents, previous, output))
    scale, spread = row[:2]
    clean, direction = {
        "epsilon": lambda: ((x - spread * e) / scale, e),
        "v_prediction": lambda: (scale * x - spread * e, scale * e + spread * x),
        "sample": lambda: (e, (x - scale * e) / spread),
    }[plan.prediction_type]()
    if plan.clip is not None:
        clean = np.clip(clean, -plan.clip, plan.clip)
    if plan.solver == "ddim":
        return row[2] * clean + row[3] * direction + row[4] * noise
    return row[2] * x + row[3] * clean + row[4] * (clean - m)


def exact_rows(cls, options, count, timesteps, eta):
    """Coefficients in float64 throughout, from the float32 cumulative alphas that both sides share."""
    theirs = theirs_of(cls, options)
    theirs.set_timesteps(count)
    bar = theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    for name in ("final_alpha_cumprod", "initial_alpha_cumprod"):
        if hasattr(theirs, name):
            setattr(theirs, name, getattr(theirs, name).double())
    if not is_ddim(cls):
        levels = ((1 - bar) / bar) ** 0.5
        if is_inverse(cls):
            last = levels[theirs.noisiest_timestep]
        else:
            last = levels[0] if theirs.config.final_sigmas_type == "sigma_min" else levels[0] * 0
        theirs.sigmas = torch.stack([*levels[theirs.timesteps], last])
    return rows_of(theirs, timesteps, eta, np.float64)


PLAIN = ("sd", "clip", "v", "clip-v", "sample", "clip-sample")
FUSED = PLAIN + ("zero-snr", "order-1", "heun", "v-order-1", "karras", "sigma-min-heun")


@pytest.mark.parametrize("cls, options", configurations(names=FUSED))
def test_compiled_step_is_the_references(cls, options, stages):
    """Bit for bit (DDIM, first order) or to 4e-7 (second order adds in another order), torch rounding correctly."""
    same_bits = (is_ddim(cls) or options.get("solver_order") == 1) and platform.machine() in (
        "x86_64",
        "AMD64",
    )
    for count, strength, eta in ((15, 1.0, 0.0), (10, 0.6, 0.3 if cls is DDIMScheduler else 0.0)):
        with torch_rounds_correctly():
            for i, _, _, ours, theirs in against_diffusers(stages["graph"], cls, options, count, strength, eta):
                assert relative(ours[0], theirs[0]) <= (0 if same_bits else 4e-7), (count, i)
                assert relative(ours[1], theirs[1]) <= (0 if same_bits else 4e-7), (count, i)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("cls, options", configurations([DDIMScheduler], PLAIN + ("alpha-one",)))
def test_compiled_step_adds_the_references_noise(cls, options, eta, stages):
    with torch_rounds_correctly():
        for i, _, _, ours, theirs in against_diffusers(stages["graph"], cls, options, 10, 1.0, eta):
            assert relative(ours[0], theirs[0]) <= 1e-6, i


@pytest.mark.parametrize(
    "cls, options", configurations(names=("sd", "v", "sample", "clip", "zero-snr", "heun", "sigma-min-heun"))
)
def test_compiled_step_is_near_torch_as_it_is(cls, options, stages):
    """Within 1e-5 of torch as it is, of which wrong last bits of its noise levels are all but 4e-7 (the test above).

    Neither side is nearer to float64 than the other: a wrong last bit is that of a root halfway between two numbers.
    """
    count = 50
    mine = cls(**options)
    mine.set_timesteps(count)
    plan = plan_of(mine, mine.exact_timesteps)
    exact = exact_rows(cls, options, count, mine.exact_timesteps, 0.0)
    apart, ours_off, theirs_off = [], [], []
    for i, _, data, ours, theirs in against_diffusers(stages["graph"], cls, options, count):
        truth = exact_step(plan, exact[i], *data)
        apart.append(relative(ours[0], theirs[0]))
        ours_off.append(relative(ours[0], truth))
        theirs_off.append(relative(theirs[0], truth))
    assert max(apart) <= 1e-5
    if options.get("rescale_betas_zero_snr"):  # the sides do not share their cumulative alphas, bit for bit
        return
    assert np.sqrt(np.mean(np.square(ours_off))) <= 1.5 * np.sqrt(np.mean(np.square(theirs_off)))


@pytest.mark.parametrize("cls, options", configurations(names=PLAIN + ("order-1", "heun")))
def test_eager_step_is_the_compiled_one(cls, options, stages):
    """PyNative runs the same operators."""
    plan, drawn, latents = steps_of(cls(**options), 3, eta=0.3)
    runs = [Fused(stages[mode], plan) for mode in ("graph", "pynative")]
    previous = np.zeros(SHAPE, F32)
    for i, t, output, noise in drawn:
        (compiled, clean), (eager, eager_clean) = (run(i, t, latents, previous, output, noise) for run in runs)
        assert relative(eager, compiled) <= 3e-7 and relative(eager_clean, clean) <= 3e-7
        latents, previous = compiled, clean


def mindones_step(scheduler, timestep, latents, output, noise=None, eta=0.0):
    """mindone's own ``step`` of a scheduler, as the pipeline calls it."""
    extra = {} if noise is None else dict(variance_noise=ms.Tensor(noise))
    if eta > 0:
        extra["eta"] = eta
    with portable_kernels(), devices.eager():
        return scheduler.step(
            ms.Tensor(output), solver_of(scheduler)._own(timestep), ms.Tensor(latents), **extra, return_dict=False
        )[0].asnumpy()


@pytest.mark.parametrize("cls, options", configurations(names=PLAIN + ("order-1", "heun", "karras", "zero-snr")))
def test_compiled_step_is_mindones_own(cls, options, stages):
    """Where a run cannot use the plan it takes mindone's ``step``; both have to agree."""
    mine, eta = cls(**options), 0.3 if cls is DDIMScheduler else 0.0
    plan, drawn, latents = steps_of(mine, 4, eta=eta)
    fused, previous = Fused(stages["graph"], plan), np.zeros(SHAPE, F32)
    for i, t, output, noise in drawn:
        got, clean = fused(i, t, latents, previous, output, noise)
        expected = mindones_step(mine, t, latents, output, noise if eta else None, eta)
        assert relative(got, expected) <= 1e-6, i
        latents, previous = expected, clean


@pytest.mark.parametrize(
    "cls, extra",
    [
        (DPMSolverMultistepScheduler, dict(solver_order=3)),
        (DPMSolverMultistepScheduler, dict(algorithm_type="sde-dpmsolver++")),
        (DPMSolverMultistepScheduler, dict(thresholding=True)),
        (DPMSolverMultistepInverseScheduler, dict(solver_order=3)),
        (DPMSolverMultistepInverseScheduler, {}),
        (DDIMScheduler, dict(clip_sample=False, thresholding=True)),
    ],
    ids=["order-3", "sde", "thresholding", "inverse-order-3", "inverse", "DDIM-thresholding"],
)
def test_mindones_step_is_diffusers(cls, extra):
    """Without a plan too; MindSpore's float32 exp on a CPU would leave it up to 2e-4 away."""
    with torch_rounds_correctly():
        mine, theirs = both(cls, dict(SD, **extra), 6)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal(SHAPE, F32)
    stochastic = "sde" in extra.get("algorithm_type", "")
    for t in mine.exact_timesteps:
        output, noise = rng.standard_normal((2, *SHAPE), F32)
        got = mindones_step(mine, t, latents, output, noise if stochastic else None)
        drawn = dict(variance_noise=torch.from_numpy(noise)) if stochastic else {}
        with torch_rounds_correctly():
            expected = theirs.step(
                torch.from_numpy(output), torch.tensor(t), torch.from_numpy(latents), **drawn
            ).prev_sample.numpy()
        assert relative(got, expected) <= 1e-6
        latents = expected


def test_compiled_step_guides_and_blends(stages):
    """The rest of the compiled step: guidance over both halves of the batch, the background outside the mask."""
    with torch_rounds_correctly():
        mine, theirs = both(DDIMScheduler, DDIM, 5)
    plan = mine.plan(mine.exact_timesteps)
    update = stages["graph"].update(plan, True)
    rng = np.random.default_rng(0)
    latents, negative, positive, background, noise = rng.standard_normal((5, *SHAPE), F32)
    mask = (rng.random((SHAPE[0], 1, *SHAPE[2:])) > 0.5).astype(F32)
    both_halves = np.concatenate([negative, positive])
    t, row = mine.exact_timesteps[1], plan.coefficients[1]
    values = (latents, latents * 0, both_halves, 7.5, row, mask, background, noise)
    got = host(update(*map(tensor, values))[0])
    guided = negative + F32(7.5) * (positive - negative)
    with torch_rounds_correctly():
        inside = theirs.step(torch.from_numpy(guided), torch.tensor(t), torch.from_numpy(latents)).prev_sample.numpy()
    assert relative(got, inside * mask + background * (1 - mask)) <= 1e-6


# --- noise, missing plans, configurations ------------------------------------------------------------------------


@pytest.mark.parametrize("cls, options", configurations(FORWARD, ("sd", "karras", "sigma-min", "zero-snr")))
def test_noise_is_added_as_in_the_reference(cls, options):
    mine, theirs = both(cls, options, 20)
    latents, noise = np.random.default_rng(0).standard_normal((2, 1, 4, 5, 3), F32)
    for t in mine.exact_timesteps:
        scale, spread = mine.noise_scale(t)
        expected = theirs.add_noise(torch.from_numpy(latents), torch.from_numpy(noise), torch.tensor([t]))
        assert relative(scale * latents + spread * noise, expected.numpy()) <= 1e-6


@pytest.mark.parametrize(
    "options",
    [
        dict(SD, solver_order=3),
        dict(SD, algorithm_type="sde-dpmsolver++"),
        dict(SD, thresholding=True),
    ],
)
def test_options_outside_the_compiled_formulas_have_no_plan(options):
    scheduler = DPMSolverMultistepScheduler(**options)
    scheduler.set_timesteps(10)
    assert scheduler.plan(scheduler.exact_timesteps) is None


def test_configurations_travel_between_the_classes_and_to_diffusers(tmp_path):
    scheduler = DDIMScheduler(**dict(DDIM, prediction_type="v_prediction"))
    inverse = schedulers.inverse_of(scheduler)
    assert type(inverse) is DDIMInverseScheduler and inverse.config.prediction_type == "v_prediction"
    assert type(schedulers.inverse_of(DPMSolverMultistepScheduler(**SD))) is DPMSolverMultistepInverseScheduler
    inverse.save_pretrained(str(tmp_path))
    assert diffusers.DDIMInverseScheduler.from_pretrained(str(tmp_path)).config.prediction_type == "v_prediction"


def test_a_scheduler_without_an_inverse_is_an_error_that_helps():
    from mindone.diffusers import EulerDiscreteScheduler

    from mindiffedit.runtime.kernels import portable_kernels

    with portable_kernels():
        scheduler = EulerDiscreteScheduler(**{k: v for k, v in SD.items()})
    with pytest.raises(ValueError, match="EulerDiscreteScheduler has no inverse.*DDIMInverseScheduler"):
        schedulers.inverse_of(scheduler)
