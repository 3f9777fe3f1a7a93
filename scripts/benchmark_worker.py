"""One measurement in a process of its own: a job as JSON on stdin, its result as the last line of stdout.

`benchmark.py` starts it. Kinds of jobs:

- "edit": a party loads the checkpoint and edits, once (cold) or twice (cold and warm);
- "step": a party runs guided inversion steps, and the time between two steps is taken;
- "machine": the rate of this machine's matrix products, and the UNet's floating-point operations;
- "checkpoint": make the random checkpoint;
- "profile-ours", "profile-torch": the halves of `profile_step.py`.

Nothing heavy is imported before the cores are chosen, since the libraries start their threads on import.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

STARTED = time.perf_counter()
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

STAGES = {
    "load": "reading the checkpoint and building the models; imports are not in it",
    "mask": "generate_mask: text encoder, VAE encoder, noise predictions for both prompts",
    "invert": "invert: text encoder, VAE encoder, one guided UNet step for each step kept",
    "edit": "the call: text encoder, one guided UNet step for each step kept, VAE decoder",
}
"""The stages that are timed, and what is in them."""

EDITS = {
    "cold": (11, "a bowl of red apples", "a bowl of green pears"),
    "warm": (23, "a house near a river", "a tower near a river"),
}
"""Seed of the picture, source prompt and target prompt of the first and the second edit. They share nothing, so
that no store of earlier results can serve the second; all sizes are the same."""

GUIDED_ROWS = 2
"""Samples of one guided UNet evaluation for each picture: with the prompt and with the negative."""


# --- memory ---------------------------------------------------------------------------------------


def peak_bytes() -> int:
    """Largest resident memory of this process since its start or the last `restart_peak`.

    VmHWM where there is a /proc: ru_maxrss also counts what the parent held when it made this process.
    """
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def restart_peak() -> bool:
    """Make the peak begin again at what is resident now; False where the system does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


class Clock:
    """Seconds and peak memory of named stages; the peak of the process over all of them."""

    def __init__(self):
        self.seconds, self.peaks, self.highest = {}, {}, 0

    @contextlib.contextmanager
    def stage(self, name: str):
        self.highest = max(self.highest, peak_bytes())
        separate = restart_peak()
        begun = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begun
        self.highest = max(self.highest, peak_bytes())
        self.peaks[name] = peak_bytes() if separate else None


# --- input ----------------------------------------------------------------------------------------


def make_pictures(size: int, count: int, seed: int) -> list:
    """Pictures of `size` pixels: a smooth background, a disc, and grain, all from the seed."""
    import numpy as np
    from PIL import Image

    rows, columns = np.mgrid[0:size, 0:size] / size
    made = []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        waves = rng.uniform(1, 6, (3, 2))
        pixels = np.stack([np.sin(a * rows + b * columns) for a, b in waves], -1) * 0.25 + 0.5
        x, y, radius = rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7), rng.uniform(0.1, 0.25)
        pixels[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = rng.uniform(0, 1, 3)
        pixels += rng.normal(0, 0.02, pixels.shape)
        made.append(Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8)))
    return made


# --- the parties ----------------------------------------------------------------------------------


BARE = dict(safety_checker=None, requires_safety_checker=False, feature_extractor=None, inverse_scheduler=None)
"""What the two reference pipelines are loaded without."""


class Party:
    """What the measurement needs of a library. `samples` and `calls` count what its models were given."""

    same_noise = True
    """Whether a seed gives PyTorch's noise, so that results can be compared."""

    def __init__(self, job: dict):
        self.calls, self.samples = Counter(), Counter()
        self.import_libraries()

    def compilations(self):
        """Number of graphs compiled so far; None for a party that has none."""
        return None

    def around(self):
        """The context in which everything of this party runs."""
        return contextlib.nullcontext()

    def tensor(self, array):
        """A NumPy array as the pipeline takes latents."""
        return array

    def counts(self) -> dict:
        """{"unet": {"calls", "samples"}, "encode": ..., "decode": ...} so far; None where it is not known."""
        return {
            name: {"calls": self.calls[name], "samples": self.samples[name]} for name in ("unet", "encode", "decode")
        }

    def made_ready(self, pipeline, library):
        """The pipeline with DDIM and its inverse, of the library's own classes."""
        config = pipeline.scheduler.config
        pipeline.scheduler = library.DDIMScheduler.from_config(config)
        pipeline.inverse_scheduler = library.DDIMInverseScheduler.from_config(pipeline.scheduler.config)
        return pipeline

    def with_vae_counted(self, pipeline):
        pipeline.vae.encode = self.counted("encode", pipeline.vae.encode)
        pipeline.vae.decode = self.counted("decode", pipeline.vae.decode)
        return pipeline

    def counted(self, name: str, function):
        def call(*args, **kwargs):
            self.calls[name] += 1
            # The UNet gets its latents first and by position or as `sample`, the VAE's halves theirs.
            given = args[0] if args else kwargs.get("sample")
            self.samples[name] += int(given.shape[0])
            return function(*args, **kwargs)

        return call


class Torch(Party):
    """diffusers on PyTorch."""

    def import_libraries(self):
        import diffusers
        import torch

        self.torch = torch
        self.versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}

    def load(self, job):
        import diffusers

        self.torch.set_num_threads(job["threads"])
        pipeline = diffusers.StableDiffusionDiffEditPipeline.from_pretrained(
            job["model"], torch_dtype=self.torch.float32, **BARE
        )
        pipeline.unet.forward = self.counted("unet", pipeline.unet.forward)
        return self.with_vae_counted(self.made_ready(pipeline, diffusers))

    def generator(self, seed: int):
        return self.torch.Generator().manual_seed(seed)

    def tensor(self, array):
        return self.torch.from_numpy(array)


class MindSporeParty(Party):
    """What the two parties on MindSpore share."""

    def import_libraries(self):
        import mindone
        import mindspore

        from mindiffedit.runtime import devices

        self.mindspore, self.compile_count = mindspore, devices.compile_count
        self.compile_count()  # starts the count
        mindone_version = getattr(mindone, "__version__", None)
        self.versions = {"mindspore": mindspore.__version__, "mindone": mindone_version}
        self.prepare()

    def compilations(self):
        return self.compile_count()


class Mindone(MindSporeParty):
    """mindone's own pipeline, in graph mode, with only what this device lacks replaced."""

    same_noise = False

    def prepare(self):
        from mindspore import mint, ops

        from mindiffedit.runtime import kernels

        kernels.KERNELS = tuple(kernel for kernel in kernels.KERNELS if not kernel.improves)

        def stack(tensors, dim=0):
            return ops.stack(tensors, dim)

        # Its pipeline, outside the models, stacks the inverted latents with an operator that CPUs lack.
        if self.mindspore.get_context("device_target") == "CPU":
            mint.stack = stack
        self.mindspore.set_context(mode=self.mindspore.GRAPH_MODE)
        importlib.import_module("mindone.diffusers")  # eight seconds that do not belong to loading

    def around(self):
        from mindiffedit.runtime.kernels import portable_kernels

        return portable_kernels()

    def load(self, job):
        from mindone import diffusers

        pipeline = diffusers.StableDiffusionDiffEditPipeline.from_pretrained(
            job["model"], mindspore_dtype=self.mindspore.float32, **BARE
        )
        # The class, not the object: Python looks a call up there. The compiler reads `construct` only.
        kind = type(pipeline.unet)
        call = kind.__call__

        def counted(unet, sample, *args, **kwargs):
            self.calls["unet"] += 1
            self.samples["unet"] += int(sample.shape[0])
            return call(unet, sample, *args, **kwargs)

        kind.__call__ = counted
        return self.with_vae_counted(self.made_ready(pipeline, diffusers))

    def generator(self, seed: int):
        import numpy as np

        return np.random.default_rng(seed)

    def tensor(self, array):
        return self.mindspore.Tensor(array)


class Ours(MindSporeParty):
    """The pipeline of this project."""

    def prepare(self):
        from mindiffedit.runtime import quick_imports

        quick_imports.install()  # as the command does
        for name in ("diffusers.models.unets.unet_2d_condition", "transformers.models.clip.modeling_clip"):
            importlib.import_module(f"mindone.{name}")
        self.pipeline = None

    def counts(self) -> dict:
        kept = Counter() if self.pipeline is None else self.pipeline._stages.calls
        found = {name: {"calls": kept[name], "samples": kept[name]} for name in ("encode", "decode")}
        return {**found, "unet": {"calls": kept["unet"], "samples": kept["rows"]}}

    def load(self, job):
        import mindiffedit

        pipeline = mindiffedit.StableDiffusionDiffEditPipeline.from_pretrained(
            job["model"], safety_checker=None, requires_safety_checker=False
        )
        self.pipeline = self.made_ready(pipeline, mindiffedit)
        return self.pipeline

    def generator(self, seed: int) -> int:
        return seed


PARTIES = {"torch": Torch, "mindone": Mindone, "ours": Ours}


# --- jobs -----------------------------------------------------------------------------------------


def as_array(tensor):
    import numpy as np

    return np.asarray(tensor.asnumpy() if hasattr(tensor, "asnumpy") else tensor)


def run_edit(party, pipeline, job: dict, which: str, results: dict) -> dict:
    """One whole edit; its seconds, peaks and counts. `results` gets mask and pictures."""
    import numpy as np

    seed, source, target = EDITS[which]
    batch = job["batch"]
    pictures = make_pictures(job["size"], batch, seed)
    sources, targets = [source] * batch, [target] * batch
    clock, before, compiled = Clock(), party.counts(), party.compilations()
    kept = {"num_inference_steps": job["steps"], "inpaint_strength": job["strength"]}
    guided = {"guidance_scale": job["guidance"]}
    with clock.stage("mask"):
        mask = pipeline.generate_mask(
            image=pictures,
            source_prompt=sources,
            target_prompt=targets,
            num_maps_per_mask=job["maps"],
            num_inference_steps=job["steps"],
            generator=party.generator(seed),
            **guided,
        )
    if not job.get("only_mask"):
        with clock.stage("invert"):
            latents = pipeline.invert(
                prompt=sources,
                image=pictures,
                generator=party.generator(seed),
                return_dict=True,
                **kept,
                **guided,
            ).latents
            finite = bool(np.isfinite(as_array(latents)).all())  # also waits for what still runs
        with clock.stage("edit"):
            edited = pipeline(
                prompt=targets,
                negative_prompt=sources,
                mask_image=np.asarray(mask).astype(np.float32),
                image_latents=latents,
                return_dict=True,
                **kept,
                **guided,
            ).images
        if not finite:
            raise ArithmeticError("the latents are not finite: these times are worth nothing")
        results[f"{which}_pictures"] = np.stack([np.asarray(p) for p in edited])
    results[f"{which}_mask"] = np.asarray(mask)
    after = party.counts()
    return {
        "seconds": clock.seconds,
        "peaks": clock.peaks,
        "highest": clock.highest,
        "counts": {
            name: {key: difference(before[name][key], after[name][key]) for key in ("calls", "samples")}
            for name in after
        },
        "compilations": None if compiled is None else party.compilations() - compiled,
    }


def difference(before, after):
    return None if after is None else after - (before or 0)


def edit_job(job: dict) -> dict:
    party = PARTIES[job["party"]](job)
    imported, loading, results = time.perf_counter() - STARTED, Clock(), {}
    edits = {}
    with party.around():
        with loading.stage("load"):
            pipeline = party.load(job)
        pipeline.set_progress_bar_config(disable=True)
        if job.get("vae_tiling"):
            pipeline.enable_vae_tiling()
        for which in job["edits"]:
            edits[which] = run_edit(party, pipeline, job, which, results)
    if job.get("results") and party.same_noise:
        import numpy as np

        np.savez(job["results"], **results)
    return {
        "import_seconds": imported,
        "load_seconds": loading.seconds["load"],
        "edits": edits,
        "peak": max([loading.highest, *(edit.pop("highest") for edit in edits.values())]),
        # None where the system cannot start a peak anew: the process's own would pass for the stages'.
        "peak_stages": highest(peak for edit in edits.values() for peak in edit["peaks"].values()),
        "versions": party.versions,
    }


def highest(values):
    """The largest; None where one is not known."""
    values = list(values)
    return None if None in values or not values else max(values)


def step_job(job: dict) -> dict:
    """Seconds between the ends of two guided inversion steps; the median of all but the first."""
    import numpy as np

    party, clock, ends = PARTIES[job["party"]](job), Clock(), []
    imported = time.perf_counter() - STARTED
    with party.around():
        with clock.stage("load"):
            pipeline = party.load(job)
        pipeline.set_progress_bar_config(disable=True)
        side = job["size"] // pipeline.vae_scale_factor
        shape = (job["batch"], 4, side, side)
        latents = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
        with clock.stage("steps"):
            begun = time.perf_counter()
            stepped = pipeline.invert(
                prompt=["a bowl of red apples"] * job["batch"],
                image=party.tensor(latents),
                generator=party.generator(7),
                num_inference_steps=job["steps"] + 1,
                inpaint_strength=1.0,
                guidance_scale=job["guidance"],
                return_dict=True,
                callback=lambda *_: ends.append(time.perf_counter()),
                callback_steps=1,
            ).latents
    if not np.isfinite(as_array(stepped)).all():
        raise ArithmeticError("the latents are not finite: these times are worth nothing")
    between = [after - before for before, after in zip(ends, ends[1:])]
    return {
        "import_seconds": imported,
        "load_seconds": clock.seconds["load"],
        "first_seconds": ends[0] - begun,
        "step_seconds": statistics.median(between),
        "all_seconds": between,
        "samples": GUIDED_ROWS * job["batch"],
        "compilations": party.compilations(),
        "peak": clock.highest,
        "peak_stages": clock.peaks["steps"],
        "versions": party.versions,
    }


def matrix_rate(threads: int, side: int) -> float:
    """Floating-point operations a second of a float32 product of two (side, side) matrices; the best of five."""
    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(side, side), torch.randn(side, side)
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best


def unet_operations(model: str, size: int) -> int:
    """Floating-point operations of one UNet evaluation of one sample, counted without computing it."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from torch.utils.flop_counter import FlopCounterMode

    factor = 2 ** (len(AutoencoderKL.load_config(model, subfolder="vae")["block_out_channels"]) - 1)
    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(model, subfolder="unet"))
        # Attention as plain products: fused kernels are not counted alike in all releases.
        unet.set_attn_processor(AttnProcessor())
        latents = torch.empty(1, unet.config.in_channels, size // factor, size // factor)
        texts = torch.empty(1, 77, unet.config.cross_attention_dim)
        with FlopCounterMode(display=False) as counter:
            unet(latents, torch.empty((), dtype=torch.int64), texts)
    return counter.get_total_flops()


def machine_job(job: dict) -> dict:
    rate = matrix_rate(job["threads"], job["side"])
    operations = None if job["model"] is None else unet_operations(job["model"], job["size"])
    return {"rate": rate, "operations": operations}


def checkpoint_job(job: dict) -> dict:
    import benchmark_checkpoint

    benchmark_checkpoint.ensure(Path(job["folder"]))
    return {"folder": job["folder"]}


def profile_ours_job(job: dict) -> dict:
    import profile_step

    return profile_step.our_profile(job)


def profile_torch_job(job: dict) -> dict:
    import profile_step

    return profile_step.torch_profile(job)


JOBS = {
    "edit": edit_job,
    "step": step_job,
    "machine": machine_job,
    "checkpoint": checkpoint_job,
    "profile-ours": profile_ours_job,
    "profile-torch": profile_torch_job,
}


def die_with_parent() -> None:
    """Have the system end this process when its parent is gone, where it can (Linux)."""
    with contextlib.suppress(Exception):
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def use_cores(count: int) -> None:
    """Keep this process, and every thread that it starts later, on `count` of the cores that it may use."""
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def main() -> int:
    die_with_parent()
    job = json.loads(sys.stdin.read())
    use_cores(job["threads"])
    result = JOBS[job["kind"]](job)
    sys.stderr.flush()
    print(f"\n{json.dumps(result)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
