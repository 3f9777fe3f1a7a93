"""One measurement in a process of its own: a job as JSON on stdin, its result as the last line of stdout.

`benchmark.py` starts it. Kinds of jobs:

- "edit": a party loads the checkpoint and edits, once (cold) or twice (cold and warm, or a short warm-up and warm);
- "load": a party loads the checkpoint;
- "step": a party runs guided inversion steps, and the time between two steps is taken;
- "checkpoint": make the random checkpoint.

Nothing heavy is imported before the cores are chosen, since the libraries start their threads on import.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

EDITS = {
    "cold": (11, "a bowl of red apples", "a bowl of green pears"),
    "warm": (23, "a house near a river", "a tower near a river"),
}
"""Seed of the picture, source prompt and target prompt of the first and the second edit. They share nothing, so
that no store of earlier results can serve the second; all sizes are the same."""

WARM_UP = {"strength": 1.0, "guidance_end": 0.5}
"""Settings of a short first edit that is not measured. All of its steps run, and half of them are guided whatever the
preset: from four steps on it runs every graph that a longer edit needs, those of the step cache included."""


# --- memory and time ------------------------------------------------------------------------------


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
    """Seconds and peak memory of named stages.

    Attributes:
        seconds: {stage: seconds}.
        peaks: {stage: bytes}; None where the system cannot start a peak anew.
        peak: of the process, over all stages so far.
    """

    def __init__(self):
        self.seconds, self.peaks, self.peak = {}, {}, 0

    @contextlib.contextmanager
    def stage(self, name: str):
        self.peak = max(self.peak, peak_bytes())
        separate = restart_peak()
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.peak = max(self.peak, peak_bytes())
        self.peaks[name] = peak_bytes() if separate else None

    def stages_peak(self, names) -> int | None:
        """The largest of some stages' peaks; None where they are not known."""
        peaks = [self.peaks[name] for name in names]
        return None if None in peaks else max(peaks)


# --- input ----------------------------------------------------------------------------------------


def make_pictures(size: int, count: int, seed: int) -> list:
    """Pictures of `size` pixels: a smooth background, a disc, and grain, all from the seed."""
    import numpy as np
    from PIL import Image

    rows, columns = np.mgrid[0:size, 0:size] / size
    pictures = []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        waves = rng.uniform(1, 6, (3, 2))
        pixels = np.stack([np.sin(a * rows + b * columns) for a, b in waves], -1) * 0.25 + 0.5
        x, y, radius = rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7), rng.uniform(0.1, 0.25)
        pixels[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = rng.uniform(0, 1, 3)
        pixels += rng.normal(0, 0.02, pixels.shape)
        pictures.append(Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8)))
    return pictures


# --- the parties ----------------------------------------------------------------------------------


BARE = dict(safety_checker=None, requires_safety_checker=False, feature_extractor=None, inverse_scheduler=None)
"""What the two reference pipelines are loaded without."""


def with_ddim(pipeline, library):
    """The pipeline with DDIM and its inverse, of the library's own classes."""
    pipeline.scheduler = library.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.inverse_scheduler = library.DDIMInverseScheduler.from_config(pipeline.scheduler.config)
    return pipeline


class Party:
    """What the measurement needs of a library.

    Attributes:
        versions: {library: version}.
        comparable: whether results should be those of torch: the same computation, from the same noise.
        maps_in_shape: whether all maps are evaluated at once, so that their number is compiled into a graph.
    """

    comparable = True
    maps_in_shape = False
    versions: dict

    def __init__(self):
        self._counter = Counter(calls=0, rows=0, shallow_rows=0)

    def load(self, model: str, threads: int):
        """The pipeline of a checkpoint."""
        raise NotImplementedError

    def generator(self, seed: int):
        """What the pipeline takes for a seed."""
        return seed

    def tensor(self, array):
        """A NumPy array as the pipeline takes latents."""
        return array

    def around(self):
        """The context in which everything of this party runs."""
        return contextlib.nullcontext()

    def graphs(self) -> int | None:
        """Number of graphs compiled so far; None for a party that has none."""
        return None

    def counts(self) -> dict:
        """Evaluations of the UNet so far, the samples in them, and those of its last layer alone: {"calls", "rows",
        "shallow_rows"}."""
        return dict(self._counter)

    def count(self, sample) -> None:
        self._counter["calls"] += 1
        self._counter["rows"] += int(sample.shape[0])

    def edit(self, pipeline, pictures, sources, targets, seed, job, clock) -> dict:
        """One edit of pictures: {"seconds", "stages_peak", "mask", "pictures"}. Here by the three calls."""
        import numpy as np

        shared = {
            "num_inference_steps": job["steps"],
            "inpaint_strength": job["strength"],
            "guidance_scale": job["guidance"],
        }
        with clock.stage("mask"):
            mask = pipeline.generate_mask(
                image=pictures,
                source_prompt=sources,
                target_prompt=targets,
                num_maps_per_mask=job["maps"],
                num_inference_steps=job["steps"],
                guidance_scale=job["guidance"],
                generator=self.generator(seed),
            )
        with clock.stage("invert"):
            latents = pipeline.invert(
                prompt=sources, image=pictures, generator=self.generator(seed), return_dict=True, **shared
            ).latents
            require_finite(latents)
        with clock.stage("edit"):
            edited = pipeline(
                prompt=targets,
                negative_prompt=sources,
                mask_image=np.asarray(mask).astype(np.float32),
                image_latents=latents,
                return_dict=True,
                **shared,
            ).images
        stages = ("mask", "invert", "edit")
        seconds = {name: clock.seconds[name] for name in stages}
        return {"seconds": seconds, "stages_peak": clock.stages_peak(stages), "mask": mask, "pictures": edited}


class Torch(Party):
    """diffusers on PyTorch."""

    def __init__(self):
        super().__init__()
        import diffusers
        import torch

        self.torch, self.diffusers = torch, diffusers
        self.versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}

    def load(self, model, threads):
        self.torch.set_num_threads(threads)
        pipeline = self.diffusers.StableDiffusionDiffEditPipeline.from_pretrained(
            model, torch_dtype=self.torch.float32, **BARE
        )
        pipeline.unet.register_forward_pre_hook(lambda unet, inputs: self.count(inputs[0]))
        return with_ddim(pipeline, self.diffusers)

    def generator(self, seed):
        return self.torch.Generator().manual_seed(seed)

    def tensor(self, array):
        return self.torch.from_numpy(array)


class TorchBfloat16(Torch):
    """The same under autocast: float32 weights, products and convolutions in bfloat16."""

    comparable = False

    def around(self):
        return self.torch.autocast("cpu", self.torch.bfloat16)


class MindSporeParty(Party):
    """What the two parties on MindSpore share."""

    def __init__(self):
        super().__init__()
        import mindone
        import mindspore

        from mindiffedit.runtime import devices

        self.mindspore, self.graphs = mindspore, devices.compile_count
        self.graphs()  # starts the count
        mindone_version = getattr(mindone, "__version__", None)
        self.versions = {"mindspore": mindspore.__version__, "mindone": mindone_version}


class Mindone(MindSporeParty):
    """mindone's own pipeline, in graph mode, with only what this device lacks replaced."""

    comparable = False
    maps_in_shape = True

    def __init__(self):
        super().__init__()
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

    def load(self, model, threads):
        from mindone import diffusers

        pipeline = diffusers.StableDiffusionDiffEditPipeline.from_pretrained(
            model, mindspore_dtype=self.mindspore.float32, **BARE
        )
        # The class, not the object: Python looks a call up there. The compiler reads `construct` only.
        kind = type(pipeline.unet)
        call = kind.__call__

        def counted(unet, sample, *args, **kwargs):
            self.count(sample)
            return call(unet, sample, *args, **kwargs)

        kind.__call__ = counted
        return with_ddim(pipeline, diffusers)

    def generator(self, seed):
        import numpy as np

        return np.random.default_rng(seed)

    def tensor(self, array):
        return self.mindspore.Tensor(array)


class Ours(MindSporeParty):
    """The pipeline of this project."""

    def __init__(self):
        # As the command does. Our users have no torch, which transformers imports where it is installed.
        os.environ["USE_TORCH"] = "0"
        super().__init__()
        from mindiffedit.runtime import quick_imports

        quick_imports.install()
        for name in ("diffusers.models.unets.unet_2d_condition", "transformers.models.clip.modeling_clip"):
            importlib.import_module(f"mindone.{name}")

    def load(self, model, threads):
        import mindiffedit

        self.pipeline = mindiffedit.StableDiffusionDiffEditPipeline.from_pretrained(
            model, safety_checker=None, requires_safety_checker=False
        )
        return with_ddim(self.pipeline, mindiffedit)

    def counts(self):
        counter = self.pipeline._stages.calls
        return {"calls": counter["unet"], "rows": counter["rows"], "shallow_rows": counter["shallow_rows"]}


class OneCall(Ours):
    """`edit()` of this project, with the maps, inversion and guidance of a preset."""

    comparable = False

    def __init__(self, preset: str):
        super().__init__()
        self.preset = preset

    def edit(self, pipeline, pictures, sources, targets, seed, job, clock):
        with clock.stage("whole"):
            edited = pipeline.edit(
                pictures,
                sources,
                targets,
                preset=self.preset,
                num_inference_steps=job["steps"],
                inpaint_strength=job["strength"],
                guidance_scale=job["guidance"],
                guidance_end=job.get("guidance_end"),
                generator=seed,
            )
        spent = edited.report.seconds
        seconds = {"mask": spent["mask"], "invert": spent["inversion"], "edit": spent["edit"]}
        seconds["total"] = clock.seconds["whole"]  # pasting and the report are in it, too
        stages_peak = clock.stages_peak(["whole"])
        return {"seconds": seconds, "stages_peak": stages_peak, "mask": edited.mask_image, "pictures": edited.images}


PARTIES = {"torch": Torch, "torch-bfloat16": TorchBfloat16, "mindone": Mindone, "ours": Ours}
PARTIES |= {f"edit-{preset}": functools.partial(OneCall, preset) for preset in ("exact", "balanced", "fast")}


# --- jobs -----------------------------------------------------------------------------------------


def require_finite(latents) -> None:
    """Also waits for what still runs."""
    import numpy as np

    if not np.isfinite(latents.asnumpy() if hasattr(latents, "asnumpy") else latents.float().numpy()).all():
        raise ArithmeticError("the latents are not finite: these times are worth nothing")


def run_edit(party: Party, pipeline, job: dict, what: str, clock: Clock) -> tuple[dict, dict]:
    """One whole edit: what it took, and its mask and pictures."""
    import numpy as np

    seed, source, target = EDITS[what]
    batch = job["batch"]
    pictures = make_pictures(job["size"], batch, seed)
    sources, targets = [source] * batch, [target] * batch
    calls, graphs = party.counts(), party.graphs()
    edited = party.edit(pipeline, pictures, sources, targets, seed, job, clock)
    after = party.counts()
    cost = {
        "seconds": edited["seconds"],
        "stages_peak": edited["stages_peak"],
        "unet_calls": after["calls"] - calls["calls"],
        "samples": after["rows"] - calls["rows"],
        "shallow_rows": after["shallow_rows"] - calls["shallow_rows"],
        "graphs": None if graphs is None else party.graphs() - graphs,
    }
    shown = np.stack([np.asarray(picture) for picture in edited["pictures"]])
    return cost, {f"{what}_mask": np.asarray(edited["mask"]), f"{what}_pictures": shown}


def edit_job(job: dict) -> dict:
    party, clock = PARTIES[job["party"]](), Clock()
    edits, arrays = {}, {}
    with party.around():
        with clock.stage("load"):
            pipeline = party.load(job["model"], job["threads"])
        pipeline.set_progress_bar_config(disable=True)
        if job["warm_up"]:
            maps = job["maps"] if party.maps_in_shape else 1
            run_edit(party, pipeline, {**job, **WARM_UP, "steps": job["warm_up"], "maps": maps}, "cold", clock)
        for what in job["edits"]:
            edits[what], results = run_edit(party, pipeline, job, what, clock)
            arrays |= results
    if party.comparable:
        import numpy as np

        np.savez(job["results"], **arrays)
    return {"load_seconds": clock.seconds["load"], "edits": edits, "peak": clock.peak, "versions": party.versions}


def load_job(job: dict) -> dict:
    party, clock = PARTIES[job["party"]](), Clock()
    with party.around(), clock.stage("load"):
        party.load(job["model"], job["threads"])
    return {"load_seconds": clock.seconds["load"], "peak": clock.peak, "versions": party.versions}


def step_job(job: dict) -> dict:
    """Seconds between the ends of two guided inversion steps; the median of all but the first."""
    import numpy as np

    party, clock, ends = PARTIES[job["party"]](), Clock(), []
    with party.around():
        with clock.stage("load"):
            pipeline = party.load(job["model"], job["threads"])
        pipeline.set_progress_bar_config(disable=True)
        side = job["size"] // pipeline.vae_scale_factor
        latents = np.random.default_rng(7).standard_normal((job["batch"], 4, side, side)).astype(np.float32)
        with clock.stage("steps"):
            start = time.perf_counter()
            latents = pipeline.invert(
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
    require_finite(latents)
    return {
        "load_seconds": clock.seconds["load"],
        "first_seconds": ends[0] - start,
        "step_seconds": statistics.median(after - before for before, after in zip(ends, ends[1:])),
        "graphs": party.graphs(),
        "peak": clock.peak,
        "versions": party.versions,
    }


def checkpoint_job(job: dict) -> dict:
    import benchmark_checkpoint

    return {"folder": str(benchmark_checkpoint.ensure(Path(job["folder"])))}


JOBS = {"edit": edit_job, "load": load_job, "step": step_job, "checkpoint": checkpoint_job}


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
