"""What crosses between host and device while a loop runs, and what it leaves behind."""

import re
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from test_pipeline import PICTURE, SOURCE, TARGET, our_pipeline

import mindiffedit
from mindiffedit import pipeline, stages
from mindiffedit.runtime import devices


@pytest.fixture(scope="module")
def pipe(sd1_folder):
    return our_pipeline(sd1_folder)


@pytest.fixture
def copies(monkeypatch):
    """Names of copies, "up" and "down" with their sizes, and "unet" where the UNet is evaluated, in their order."""
    events = []
    make, bring, evaluate = ms.Tensor.__init__, ms.Tensor.asnumpy, stages.Predictor._evaluate

    def up(self, *arguments, **options):
        if arguments and not isinstance(arguments[0], ms.Tensor):
            events.append(("up", np.size(arguments[0])))
        make(self, *arguments, **options)

    def down(self):
        events.append(("down", self.size))
        return bring(self)

    def unet(*arguments):
        events.append(("unet", 0))
        return evaluate(*arguments)

    def finite(latents):
        events.append(("down", 1))  # the one number that the check brings from a device
        return bool(np.isfinite(bring(latents)).all())

    monkeypatch.setattr(ms.Tensor, "__init__", up)
    monkeypatch.setattr(ms.Tensor, "asnumpy", down)
    monkeypatch.setattr(stages.Predictor, "_evaluate", unet)
    monkeypatch.setattr(pipeline, "is_finite", finite)
    return events


def in_each_step(events):
    """Copies between one evaluation of the UNet and the next."""
    places = [i for i, (kind, _) in enumerate(events) if kind == "unet"]
    return [events[a + 1 : b] for a, b in zip(places, places[1:])]


def test_latents_stay_on_the_device(pipe, copies):
    def in_each_step_of(call, *arguments, **options):
        call(*arguments, **options)  # what is compiled for the first time makes tensors
        copies.clear()
        result = call(*arguments, **options)
        return result, in_each_step(copies)

    for scheduler in (mindiffedit.DDIMScheduler, mindiffedit.DPMSolverMultistepScheduler):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        schedule, one_number = dict(num_inference_steps=5, generator=0), 3 * [[("down", 1)]]
        inverted, copied = in_each_step_of(pipe.invert, SOURCE, PICTURE, guidance_scale=2.0, **schedule)
        assert copied == one_number, scheduler
        edit = dict(prompt=TARGET, mask_image=np.ones((8, 10)), image_latents=inverted.latents, output_type="latent")
        assert in_each_step_of(pipe, **edit, negative_prompt=SOURCE, **schedule)[1] == one_number, scheduler
        callback = dict(callback=lambda step, timestep, latents: None)  # which gets tensors
        assert in_each_step_of(pipe, **edit, negative_prompt=SOURCE, **callback, **schedule)[1] == one_number


@pytest.mark.parametrize("target", ["CPU", "Ascend"])
def test_numbers_are_told_from_others(copies, monkeypatch, target):
    monkeypatch.setattr(devices, "device_target", lambda: target)
    latents = [ms.Tensor(np.append(np.ones(63, np.float32), last)) for last in (1, np.nan, -np.inf)]
    copies.clear()
    assert [stages.is_finite(values) for values in latents] == [True, False, False]
    assert (copies == []) == (target != "CPU")


def test_what_each_step_does_on_a_cpu_leaves_no_memory_behind():
    latents = ms.Tensor(np.arange(2 * 4 * 8 * 10, dtype=np.float32).reshape(2, 4, 8, 10))
    assert np.array_equal(stages.repeated(latents, 3).asnumpy(), np.concatenate(3 * [latents.asnumpy()]))

    def kibibytes():
        return int(re.search(r"Private_Dirty:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text())[1])

    def calls(count):
        for _ in range(count):
            assert stages.is_finite(stages.repeated(latents, 2))
        return kibibytes()

    before = calls(100)
    assert calls(200) - before < 60  # a reduction, or `ops.cat`, leaves 130


def test_an_observer_costs_copies_and_changes_nothing(pipe, copies):
    arguments = dict(prompt=SOURCE, image=PICTURE, num_inference_steps=5, generator=0)
    plain = pipe.invert(**arguments).latents.asnumpy()
    copies.clear()
    with pipe.debugging(lambda stage, array, step: None):
        watched = pipe.invert(**arguments).latents.asnumpy()
    assert np.array_equal(plain, watched)
    assert all(sum(kind == "down" for kind, _ in step) >= 3 for step in in_each_step(copies))


def test_what_an_observer_returns_is_gone_on_with(pipe):
    arguments = dict(prompt=SOURCE, image=PICTURE, num_inference_steps=5, guidance_scale=1.0, generator=0)

    def run(observer):
        pipe.observer = observer
        try:
            return pipe.invert(**arguments).latents.asnumpy()
        finally:
            pipe.observer = None

    plain = run(None)
    assert np.array_equal(run(lambda stage, array, step: None), plain)
    for stage in ("predictions", "inverted_latents"):
        changed = run(lambda name, array, step: array * 1.5 if (name, step) == (stage, 2) else array)  # noqa: B023
        assert np.array_equal(changed[:, 2:], plain[:, 2:]) and not np.array_equal(changed[:, 1], plain[:, 1])


def test_what_an_observer_writes_into_its_array_counts_as_returned(pipe, monkeypatch):
    """On every device: on a CPU the array happens to share the tensor's memory, elsewhere it is a copy."""
    monkeypatch.setattr(pipeline, "host", lambda tensor: stages.host(tensor).copy())

    def inverted(observer):
        monkeypatch.setattr(pipe, "observer", observer)
        return pipe.invert(SOURCE, PICTURE, num_inference_steps=5, guidance_scale=1.0, generator=0).latents.asnumpy()

    def halved(stage, array, step):
        if stage == "inverted_latents":
            array *= 0.5
        return array

    replaced = inverted(lambda stage, array, step: array * 0.5 if stage == "inverted_latents" else array)
    assert np.array_equal(inverted(halved), replaced)


def test_another_call_may_set_the_scheduler_up_anew_while_an_observer_looks_on(pipe, monkeypatch):
    """Another thread's call on the same pipeline may run then, with another number of steps."""
    for scheduler in (mindiffedit.DDIMScheduler, mindiffedit.DPMSolverMultistepScheduler):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)

        def noised_and_edited():
            background = pipe.noise_image(PICTURE, num_inference_steps=5, generator=0).latents
            edit = dict(prompt=TARGET, mask_image=np.ones((8, 10)), image_latents=background, output_type="latent")
            edited = pipe(**edit, num_inference_steps=5, generator=0).images
            return background.asnumpy(), edited.asnumpy()

        alone = noised_and_edited()
        with monkeypatch.context() as patch:
            patch.setattr(pipe, "observer", lambda stage, array, step: pipe.scheduler.set_timesteps(50))
            assert all(map(np.array_equal, noised_and_edited(), alone)), scheduler
