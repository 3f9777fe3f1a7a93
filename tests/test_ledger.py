"""docs/differences.md against the code: its ids, its tests, and what it says is not here."""

import re
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from test_pipeline import PICTURE, SOURCE, TARGET, our_pipeline

from mindiffedit import StableDiffusionDiffEditPipeline, options
from mindiffedit.runtime import devices
from mindiffedit.solvers import schedules

ROOT = Path(__file__).resolve().parent.parent
LEDGER = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in LEDGER.splitlines()
    if re.match(r"\| [DWEBCN]\d", line)
]


@pytest.fixture(scope="module")
def ours(sd1_folder):
    return our_pipeline(sd1_folder)


@pytest.fixture(scope="module")
def inverted(ours):
    return ours.invert(SOURCE, PICTURE, num_inference_steps=4, inpaint_strength=0.5, generator=0).latents


def edit(ours, inverted, **arguments):
    mask = np.ones((1, 8, 10), np.float32)
    arguments = dict(dict(output_type="latent", inpaint_strength=0.5, num_inference_steps=4), **arguments)
    return ours(TARGET, mask, inverted, **arguments)


def test_every_line_has_an_id_a_reason_and_a_test():
    ids = [row[0] for row in ROWS]
    assert len(ids) == len(set(ids)) > 30
    for letter in "DWEBCN":
        numbers = [int(one[1:]) for one in ids if one[0] == letter]
        assert numbers == list(range(1, len(numbers) + 1)), letter
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for row in ROWS:
        assert len(row) == 4 and all(row), row
        name = re.fullmatch(r"`(test_\w+)`", row[3])
        assert name and f"def {name[1]}(" in tests, row


def test_ids_in_the_code_are_in_the_ledger():
    ids, used = {row[0] for row in ROWS}, set()
    for path in (ROOT / "mindiffedit").rglob("*.py"):
        used |= set(re.findall(r"#.*?\b([DWEBCN]\d{1,2})\b", path.read_text(encoding="utf-8")))
    assert used and used <= ids
    in_docstrings = {"D5", "D6"}  # defaults and arguments
    assert {one for one in ids if one.startswith("D")} - in_docstrings <= used


def test_the_references_helpers_are_not_mirrored():
    ledger = next(row for row in ROWS if row[0] == "N2")[1]
    for name in re.findall(r"`(\w+)`", ledger):
        assert not hasattr(StableDiffusionDiffEditPipeline, name), f"{name} is here now: correct the ledger"


@pytest.mark.skipif(devices.device_target() != "CPU", reason="about CPUs")
@pytest.mark.parametrize("name", ["KDPM2DiscreteScheduler", "DDPMScheduler"])
def test_schedulers_that_a_cpu_cannot_run(ours, inverted, name):
    import mindone.diffusers

    from mindiffedit.runtime.kernels import portable_kernels

    before = ours.scheduler
    try:
        with pytest.raises(RuntimeError, match="unregistered"):
            with portable_kernels():
                ours.scheduler = getattr(mindone.diffusers, name).from_config(before.config)
            images = edit(ours, inverted).images
            assert np.isfinite(images.asnumpy()).all()
    finally:
        ours.scheduler = before


def test_a_callback_gets_a_copy(ours, inverted):
    def zeroed(step, timestep, latents):
        latents[:] = 0

    plain = edit(ours, inverted).images.asnumpy()
    assert np.array_equal(edit(ours, inverted, callback=zeroed).images.asnumpy(), plain)


def test_outputs_have_the_unets_dtype(ours, inverted):
    assert inverted.dtype == edit(ours, inverted).images.dtype == ours.unet.dtype


def test_output_type_pt_is_refused(ours, inverted):
    with pytest.raises(ValueError, match="output_type"):
        edit(ours, inverted, output_type="pt")


def test_attention_kwargs_are_plain_values():
    plain = {"a": 1, "b": 0.5, "c": "x", "d": None}
    assert options.check_attention_kwargs(plain) == plain
    with pytest.raises((TypeError, ValueError)):
        options.check_attention_kwargs({"a": np.zeros(3)})


def test_steps_are_computed_in_float32():
    """B3: with a UNet in float16, guidance, solver update and blend are float32."""
    from mindiffedit.solvers.schedules import StepPlan
    from mindiffedit.stages import Stages, host, tensor

    class Half(ms.nn.Cell):
        dtype = ms.float16

        def construct(self, sample, timestep, encoder_hidden_states, cross_attention_kwargs=None):
            assert sample.dtype == encoder_hidden_states.dtype == ms.float16
            return (sample,)

    stages = Stages(Half(), None, None, "pynative")
    latents = np.linspace(-1, 1, 32, dtype=np.float32).reshape(1, 2, 4, 4)
    predictions = host(stages.predictor(np.zeros((2, 3, 4), np.float32), {}, 2)(tensor(latents), 5))
    assert predictions.dtype == np.float32
    assert np.array_equal(predictions[0], latents[0].astype(np.float16).astype(np.float32))
    row = schedules.ddim_row(np.float32(0.5), np.float32(0.6))
    plan = StepPlan("ddim", "epsilon", None, row[None])
    zeros, ones = latents * 0, np.ones((1, 1, 4, 4), np.float32)
    values = (latents, zeros, predictions, 2.0, row, ones, zeros, zeros)
    updated, clean = (host(value) for value in stages.update(plan, True)(*map(tensor, values)))
    exact = (latents - row[1] * predictions[:1].astype(np.float64)) / row[0]
    assert np.abs(clean - exact).max() < 1e-6  # float16 would be off by 1e-3
    assert np.abs(updated - (row[2] * exact + row[3] * predictions[:1])).max() < 1e-6
