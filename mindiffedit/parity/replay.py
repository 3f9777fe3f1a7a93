"""Our pipeline over a recorded case: each stage's tensors under the names of the reference's trace. Needs MindSpore."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mindiffedit import options, solvers
from mindiffedit.noise.generator import Generator
from mindiffedit.parity.case import Case, Tape


def load(folder, case: Case, mode: str = "graph", dtype: str = "float32", compile_cache=None):
    """Our pipeline of a checkpoint folder through the ordinary loader, with the case's schedulers."""
    from mindiffedit.pipeline import StableDiffusionDiffEditPipeline

    pipe = StableDiffusionDiffEditPipeline.from_pretrained(
        str(folder),
        mode=mode,
        compile_cache=compile_cache,
        mindspore_dtype=dtype,
        safety_checker=None,
        requires_safety_checker=False,
    )
    return with_schedulers(pipe, case)


def with_schedulers(pipe, case: Case):
    """The pipeline with the schedulers that a case asks for."""
    from mindiffedit.solvers import schedulers

    config = getattr(pipe, "own_scheduler_config", None) or pipe.scheduler.config
    pipe.own_scheduler_config = config
    # DDIM's default, which the reference runs with: said, so that nobody has to be warned of it.
    says_clip = case.scheduler != solvers.CLASSES["ddim"][0] or "clip_sample" in config
    options_ = {**({} if says_clip else {"clip_sample": True}), **case.scheduler_options}
    pipe.scheduler = schedulers.make(case.scheduler, config, **options_)
    pipe.inverse_scheduler = schedulers.make(case.inverse_scheduler, config, **options_)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(
    pipe, case: Case, reference: Mapping[str, np.ndarray] | None = None, isolate: bool = False
) -> dict[str, np.ndarray]:
    """All calls of a case; returns their trace (see ``case.Tape``), float32.

    Args:
        reference: the reference's trace. The edit then takes the mask from it (whether ours is the same is compared by
            itself), so that one pixel on the threshold does not hide everything behind it.
        isolate: every stage takes its input from ``reference``; otherwise errors add up, as in use.

    Raises:
        options.NumericalError: for NaN or inf in a stage; its ``trace`` is what there was before.
    """
    tape = Tape(reference if isolate else None)
    known = reference or {}
    mask = latents = None
    before, pipe.observer = pipe.observer, tape
    try:
        if case.mask is not None:
            tape.call = "mask"
            mask = pipe.generate_mask(
                image=case.image, generator=_generators(case.seeds["mask"]), **_arguments(case.mask)
            )
            mask = known.get("mask/mask", mask)
        if case.invert is not None:
            tape.call = "invert"
            latents = pipe.invert(
                image=case.image,
                generator=_generators(case.seeds["invert"]),
                output_type="pil",
                **_arguments(case.invert),
            ).latents
        if case.edit is not None:
            tape.call = "edit"
            arguments = {"mask_image": mask, "image_latents": latents, **_arguments(case.edit)}
            edited = pipe(generator=_generators(case.seeds["edit"]), output_type="pil", **arguments)
            tape.keep("picture", np.stack([np.asarray(picture) for picture in edited.images]))
    except options.NumericalError as error:
        error.trace = tape.trace()
        raise
    finally:
        pipe.observer = before
    return tape.trace()


def _generators(seeds):
    if isinstance(seeds, list):
        return [Generator().manual_seed(seed) for seed in seeds]
    return Generator().manual_seed(seeds)


def _arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments with arrays of embeddings as tensors."""
    import mindspore as ms

    return {
        name: ms.Tensor(value) if isinstance(value, np.ndarray) and name.endswith("embeds") else value
        for name, value in arguments.items()
    }
