"""The matrix of cases that our pipeline is compared to live diffusers on: checkpoint, schedulers, arguments, inputs.

Each case is a function of a seed, which also shapes the pictures and embeddings. Pictures are non-square and coloured,
prompts of a batch differ, strengths are below 1 and negatives differ where that matters: symmetry would hide much.
"""

import numpy as np
import parity

from mindiffedit import demo, load_image
from mindiffedit.parity.case import Case

SOURCES = ["a red apple on a table", "a cat in the grass", "a yellow bowl of fruits"]
TARGETS = ["a blue cup on a table", "a dog in the grass", "a green bowl of pears"]
DPM = "DPMSolverMultistepScheduler"


def _pictures(checkpoint, count, seed):
    if checkpoint != "demo":
        return [parity.picture(seed=seed % 2**32 + i) for i in range(count)]
    sample = load_image(str(demo.sample_picture()))
    return [sample, sample.transpose(0), sample.transpose(1)][:count]  # itself, mirrored, upside down


def make(
    checkpoint,
    seed,
    *,
    batch=1,
    pictures=None,
    guidance=2.0,
    invert_guidance=None,
    steps=5,
    strength=0.8,
    mask_strength=0.5,
    maps=2,
    generators=False,
    image=None,
    embeds=False,
    mask_options=None,
    invert_options=None,
    edit_options=None,
    scheduler="DDIMScheduler",
    **scheduler_options,
):
    """A case; ``image`` is "array", "tensor", "latents" or "odd" (a picture of no fitting size)."""
    images = _pictures(checkpoint, batch if pictures is None else pictures, seed)
    if checkpoint == "demo":
        sources, targets = [[demo.SAMPLE_PROMPTS[side]] * batch for side in ("source", "target")]
    else:
        sources, targets = SOURCES[:batch], TARGETS[:batch]
    rng = np.random.default_rng(seed % 2**32)

    def said(texts):
        return texts[0] if batch == 1 else texts

    def vectors():
        return rng.standard_normal((batch, 77, 32)).astype(np.float32)

    mask = dict(target_prompt=said(targets), source_prompt=said(sources), num_maps_per_mask=maps)
    mask.update(num_inference_steps=steps, guidance_scale=guidance, mask_encode_strength=mask_strength)
    inner = guidance if invert_guidance is None else invert_guidance
    common = dict(num_inference_steps=steps, inpaint_strength=strength)
    invert = dict(prompt=said(sources), guidance_scale=inner, **common)
    edit = dict(prompt=said(targets), negative_prompt=said(sources), guidance_scale=guidance, **common)
    if embeds:
        for given, names in ((mask, ("target_", "source_")), (invert, ("",)), (edit, ("",))):
            for name in names:
                given[f"{name}prompt"], given[f"{name}prompt_embeds"] = None, vectors()
                if embeds == "both":
                    given.pop("negative_prompt", None)
                    given[f"{name}negative_prompt_embeds"] = vectors()
    mask.update(mask_options or {})
    invert.update(invert_options or {})
    edit.update(edit_options or {})
    seeds = dict.fromkeys(("mask", "invert", "edit"), seed)
    if generators:
        copies = edit.get("num_images_per_prompt", 1)
        counts = {"mask": batch * maps, "invert": batch, "edit": batch * copies}
        seeds = {call: [seed + 7 * i for i in range(count)] for call, count in counts.items()}
    return Case(_kind(images, image, rng), mask, invert, edit, seeds, scheduler, scheduler_options)


def _kind(images, kind, rng):
    arrays = np.stack([np.asarray(picture, np.float32) / 255 for picture in images])
    if kind == "array":
        return arrays
    if kind == "odd":
        return images[0].resize((85, 67))
    if kind in ("tensor", "latents"):
        import torch

        if kind == "tensor":
            return torch.tensor(arrays.transpose(0, 3, 1, 2))
        return torch.tensor(rng.standard_normal((len(images), 4, 8, 10)).astype(np.float32))
    return images if len(images) > 1 else images[0]


NEGATIVES = dict(source_negative_prompt="sky", target_negative_prompt="a house")
BATCH_NEGATIVES = dict(source_negative_prompt=["sky", "tree"], target_negative_prompt=["a house", "a photo"])
REGULARISED = dict(num_reg_steps=1, num_auto_corr_rolls=2)

_SD1 = {
    "plain": {},
    "guidance 1": dict(guidance=1.0),
    "guidance 7.5": dict(guidance=7.5),
    "strength 0.3": dict(steps=10, strength=0.3, mask_strength=0.3),
    "strength 1": dict(strength=1.0, mask_strength=1.0),
    "1 map": dict(maps=1),
    "3 maps": dict(maps=3),
    "10 maps": dict(maps=10, guidance=7.5),
    "batch of 2": dict(batch=2),
    "batch of 3": dict(batch=3, maps=3),
    "2 prompts, 1 picture": dict(batch=2, pictures=1),
    "generators": dict(batch=2, generators=True),
    "other negatives": dict(mask_options=NEGATIVES),
    "batch of 2, other negatives, guidance 7.5": dict(batch=2, guidance=7.5, mask_options=BATCH_NEGATIVES),
    "2 images": dict(edit_options=dict(num_images_per_prompt=2, eta=0.5)),
    "batch of 2, 2 images": dict(batch=2, edit_options=dict(num_images_per_prompt=2)),
    "eta 0.3": dict(edit_options=dict(eta=0.3)),
    "eta 1, generators": dict(batch=2, generators=True, edit_options=dict(eta=1.0)),
    "embeddings": dict(embeds=True),
    "batch of 2, all embeddings": dict(batch=2, embeds="both"),
    "clip_skip 1": dict(edit_options=dict(clip_skip=1)),
    "clip_skip 2, no negative": dict(edit_options=dict(clip_skip=2, negative_prompt=None)),
    "decode_latents": dict(invert_options=dict(decode_latents=True)),
    "regularised": dict(invert_options=REGULARISED, invert_guidance=1.0),
    "regularised, guided": dict(invert_options=dict(REGULARISED, lambda_auto_corr=5.0)),
    "regularised by KL alone": dict(invert_options=dict(REGULARISED, lambda_auto_corr=0.0)),
    "array": dict(image="array"),
    "tensor": dict(image="tensor", batch=2),
    "latents": dict(image="latents"),
    "picture of no fitting size": dict(image="odd"),
    "threshold 1.5": dict(mask_options=dict(mask_thresholding_ratio=1.5)),
    "20 steps": dict(steps=20),
    "DPM": dict(scheduler=DPM),
    "DPM, order 1": dict(scheduler=DPM, solver_order=1, steps=8),
    "DPM, Heun, batch of 2": dict(scheduler=DPM, solver_type="heun", batch=2),
    "DPM, 16 steps, guidance 7.5": dict(scheduler=DPM, steps=16, guidance=7.5),
    "Euler": dict(scheduler="EulerDiscreteScheduler"),
    "Euler ancestral": dict(scheduler="EulerAncestralDiscreteScheduler"),
    "LMS": dict(scheduler="LMSDiscreteScheduler", batch=2),
}
_SD2 = {
    "plain": {},
    "guidance 1": dict(guidance=1.0),
    "guidance 7.5, 3 maps": dict(guidance=7.5, maps=3),
    "batch of 2, other negatives": dict(batch=2, mask_options=BATCH_NEGATIVES),
    "generators, eta 0.5": dict(batch=2, generators=True, edit_options=dict(eta=0.5)),
    "regularised, guided": dict(invert_options=REGULARISED),
    "clip_skip 1, strength 1": dict(strength=1.0, edit_options=dict(clip_skip=1)),
    "DPM": dict(scheduler=DPM, steps=8),
    "DPM, order 1, batch of 3": dict(scheduler=DPM, solver_order=1, batch=3),
    "Euler": dict(scheduler="EulerDiscreteScheduler"),
}
_DEMO = {
    "plain": dict(guidance=7.5, steps=10),
    "its own settings": dict(guidance=5.0, invert_guidance=1.0, steps=20, strength=0.9, mask_strength=0.8),
    "10 maps": dict(guidance=7.5, maps=10),
    "guidance 1, strength 1": dict(guidance=1.0, strength=1.0, mask_strength=0.8),
    "batch of 2, generators": dict(guidance=5.0, batch=2, generators=True, mask_strength=0.8),
    "DPM": dict(guidance=5.0, scheduler=DPM, steps=10),
}

MATRIX = {
    f"{checkpoint}: {name}": (checkpoint, options)
    for checkpoint, cases in (("sd1", _SD1), ("sd2", _SD2), ("demo", _DEMO))
    for name, options in cases.items()
}
"""{name: (checkpoint, arguments of ``make``)}."""

SEEDS = (0, 20260, -1)

QUICK = (
    "sd1: plain",
    "sd1: batch of 2, other negatives, guidance 7.5",
    "sd1: eta 1, generators",
    "sd1: embeddings",
    "sd1: regularised, guided",
    "sd1: tensor",
    "sd1: DPM",
    "sd1: Euler ancestral",
    "sd2: plain",
    "sd2: guidance 1",
    "sd2: DPM",
    "demo: plain",
    "demo: DPM",
)
"""What the default run of the tests compares, one seed each; the slow run compares all."""
QUICK_EAGER = ("sd1: plain",)
"""Those of them that the default run also compares operator by operator."""


def case(name, seed):
    """Checkpoint and case of that name."""
    checkpoint, options = MATRIX[name]
    return checkpoint, make(checkpoint, seed, **options)
