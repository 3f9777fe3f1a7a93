"""Edits of drawn scenes, and what is measured of them; `evaluate_editing.py` and `make_gallery.py` rest on it.

Masks are made one picture at a time: their clamp is a mean over the whole batch, so in a batch each picture's
mask would depend on the others. Inversion and edit treat the pictures of a batch independently; there each
picture has a generator of its own, so the results do not depend on the size of a batch.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import demo_scenes as scenes  # noqa: E402
import scene_classifier  # noqa: E402
from reports import EXACT  # noqa: E402

# --- metrics --------------------------------------------------------------------------------------


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two boolean arrays of one shape; 0 where both are empty."""
    mask, truth = np.asarray(mask), np.asarray(truth)
    if mask.dtype != bool or truth.dtype != bool or mask.shape != truth.shape:
        raise ValueError(
            f"expected two boolean arrays of one shape, got {mask.dtype} {mask.shape} and {truth.dtype} {truth.shape}"
        )
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 0.0


def psnr(a: np.ndarray, b: np.ndarray, where: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures (H, W, 3), at the pixels of ``where`` (H, W)."""
    a, b = np.asarray(a), np.asarray(b)
    # Differences of uint8 wrap around and floats would be of an unknown range: insist.
    if a.dtype != np.uint8 or b.dtype != np.uint8 or a.shape != b.shape:
        given = f"{a.dtype} {a.shape} and {b.dtype} {b.shape}"
        raise ValueError(f"expected two uint8 pictures of one shape, got {given}")
    squares = (a.astype(np.float64) - b.astype(np.float64)) ** 2
    if where is not None:
        if not where.any():
            raise ValueError("there is no pixel to compare")
        squares = squares[where]
    error = squares.mean()
    return EXACT if error == 0 else min(EXACT, 10 * math.log10(255.0**2 / error))


def enlarged(mask: np.ndarray, size: int = scenes.SIZE) -> np.ndarray:
    """A mask on the latents' grid (h, w) as a boolean array (size, size); size is a multiple of h and w."""
    height, width = mask.shape
    if size % height or size % width:
        raise ValueError(f"a mask of {mask.shape} does not divide {size} pixels")
    return np.repeat(np.repeat(mask > 0.5, size // height, 0), size // width, 1)


# --- the edits ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """One scene and what it should become."""

    index: int
    what: str
    """"kind" or "colour"."""
    which: int
    """Position of the changed object in the scene."""
    source: scenes.Scene
    target: scenes.Scene

    @property
    def wanted(self) -> tuple[int, int]:
        """Indices of the kind and colour that the classifier has to see."""
        item = self.target.objects[self.which]
        return scenes.KINDS.index(item.kind), list(scenes.COLOURS).index(item.colour)


def sample_edit(seed: int, index: int) -> Edit:
    """The edit with this number; nothing else decides it. Kinds at even numbers, colours at odd ones."""
    # A sequence of numbers as seed: these streams are none of those that training scenes are drawn from.
    rng = np.random.default_rng((seed, index, 0xED17))
    scene = scenes.sample_scene(rng)
    which = int(rng.integers(len(scene.objects)))
    what = "kind" if index % 2 == 0 else "colour"
    taken = {getattr(item, what) for item in scene.objects}
    free = [name for name in (scenes.KINDS if what == "kind" else scenes.COLOURS) if name not in taken]
    target = scene.replaced(which, **{what: free[rng.integers(len(free))]})
    return Edit(index, what, which, scene, target)


def generators(seed: int, edits: list[Edit], stage: int) -> list[np.random.Generator]:
    return [np.random.default_rng((seed, edit.index, stage)) for edit in edits]


class MindSporeEditor:
    """The pipeline of this project."""

    def __init__(self, model: Path, mode: str):
        from mindiffedit import StableDiffusionDiffEditPipeline

        self.pipeline = StableDiffusionDiffEditPipeline.from_pretrained(
            str(model), mode=mode, safety_checker=None, requires_safety_checker=False
        )
        self.pipeline.set_progress_bar_config(disable=True)

    def generator(self, source: np.random.Generator):
        return source

    def vae_round_trip(self, pictures: list[Image.Image]) -> list[Image.Image]:
        """Encode (the posterior's mean) and decode."""
        import mindspore

        from mindiffedit.runtime.kernels import eagerly

        pixels = np.stack([np.asarray(picture, np.float32) for picture in pictures]).transpose(0, 3, 1, 2) / 127.5 - 1
        vae = self.pipeline.vae
        with eagerly():
            moments = vae.encode(mindspore.Tensor(pixels))[0]
            rebuilt = vae.decode(vae.diag_gauss_dist.mode(moments))[0].asnumpy()
        shown = np.round(np.clip(rebuilt / 2 + 0.5, 0, 1) * 255).astype(np.uint8)
        return [Image.fromarray(pixels) for pixels in shown.transpose(0, 2, 3, 1)]


class ReferenceEditor:
    """diffusers' pipeline on torch."""

    def __init__(self, model: Path, mode: str):
        import torch
        from diffusers import DDIMInverseScheduler, StableDiffusionDiffEditPipeline

        self.torch = torch
        self.pipeline = StableDiffusionDiffEditPipeline.from_pretrained(
            str(model),
            torch_dtype=torch.float32,
            safety_checker=None,
            requires_safety_checker=False,
            feature_extractor=None,
            inverse_scheduler=None,
        )
        self.pipeline.inverse_scheduler = DDIMInverseScheduler.from_config(self.pipeline.scheduler.config)
        self.pipeline.set_progress_bar_config(disable=True)

    def generator(self, source: np.random.Generator):
        return self.torch.Generator().manual_seed(int(source.integers(2**31)))

    def vae_round_trip(self, pictures: list[Image.Image]) -> list[Image.Image]:
        with self.torch.no_grad():
            vae, processor = self.pipeline.vae, self.pipeline.image_processor
            means = vae.encode(processor.preprocess(pictures)).latent_dist.mode()
            return processor.postprocess(vae.decode(means).sample, output_type="pil")


def in_batches(edits, batch):
    """(edits, those filled up to a whole batch, their pictures): another size would be compiled anew."""
    for start in range(0, len(edits), batch):
        chunk = edits[start : start + batch]
        filled = (chunk + [chunk[-1]] * batch)[:batch] if len(edits) > batch else chunk
        yield chunk, filled, [scenes.draw_scene(edit.source)[0] for edit in filled]


def three_calls(editor, edits, pictures, settings, seed) -> tuple[np.ndarray, list[Image.Image]]:
    """Masks (B, h, w) of 0 and 1, made one picture at a time (see the module's text), and the edited pictures."""
    masks = []
    for edit, picture in zip(edits, pictures):
        mask = editor.pipeline.generate_mask(
            image=picture,
            source_prompt=edit.source.caption,
            target_prompt=edit.target.caption,
            num_maps_per_mask=settings["maps"],
            mask_encode_strength=settings["mask_strength"],
            mask_thresholding_ratio=settings["mask_threshold"],
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance"],
            generator=editor.generator(generators(seed, [edit], 1)[0]),
        )
        masks.append(np.asarray(mask)[0])
    masks = np.stack(masks)
    shared = dict(num_inference_steps=settings["steps"], inpaint_strength=settings["strength"])
    sources = [edit.source.caption for edit in edits]
    latents = editor.pipeline.invert(
        prompt=sources,
        image=pictures,
        guidance_scale=settings["invert_guidance"],
        generator=[editor.generator(g) for g in generators(seed, edits, 2)],
        **shared,
    ).latents
    images = editor.pipeline(
        prompt=[edit.target.caption for edit in edits],
        negative_prompt=sources,
        mask_image=masks.astype(np.float32),
        image_latents=latents,
        guidance_scale=settings["guidance"],
        **shared,
    ).images
    return masks, images


def rebuild(editor, edits, pictures, settings, seed, guidance_scale=1.0, **options) -> list[Image.Image]:
    """Inversion and denoising of the whole pictures with their own captions; ``options`` are the inversion's."""
    shared = dict(
        num_inference_steps=settings["steps"], inpaint_strength=settings["strength"], guidance_scale=guidance_scale
    )
    sources = [edit.source.caption for edit in edits]
    rngs = [editor.generator(g) for g in generators(seed, edits, 3)]
    latents = editor.pipeline.invert(prompt=sources, image=pictures, generator=rngs, **shared, **options).latents
    everywhere = np.ones((len(edits), *latents.shape[-2:]), np.float32)
    return editor.pipeline(prompt=sources, mask_image=everywhere, image_latents=latents, **shared).images


def fidelity(run, edits, batch) -> float | None:
    """Mean PSNR in dB of what ``run(edits, pictures)`` makes of the whole pictures; None for no edits."""
    values = []
    for chunk, filled, pictures in in_batches(edits, batch):
        pairs = list(zip(pictures, run(filled, pictures)))[: len(chunk)]
        values += [psnr(np.asarray(a), np.asarray(b.convert("RGB"))) for a, b in pairs]
    return float(np.mean(values, dtype=np.float64)) if values else None


# --- the judgement -------------------------------------------------------------------------------


def judge(edit: Edit, picture, mask, edited, classifier) -> dict:
    """Every figure of one edit."""
    before, after = np.asarray(picture), np.asarray(edited.convert("RGB"))
    drawn_target, target_masks = scenes.draw_scene(edit.target)
    old = scenes.draw_scene(edit.source)[1][edit.which] > 0.5
    new = target_masks[edit.which] > 0.5
    covered = enlarged(mask)
    crops = [scene_classifier.object_crop(p, new) for p in (after, before, np.asarray(drawn_target))]
    kinds, colours = classifier(np.stack(crops))
    seen = [(int(kind), int(colour)) == edit.wanted for kind, colour in zip(kinds, colours)]
    return {
        "index": edit.index,
        "what": edit.what,
        "objects": len(edit.source.objects),
        "source": edit.source.caption,
        "target": edit.target.caption,
        "mask_iou": iou(covered, old),
        "mask_iou_either": iou(covered, old | new),
        "mask_share": float(covered.mean()),
        "target_seen": seen[0],
        "kind_seen": int(kinds[0]) == edit.wanted[0],
        "colour_seen": int(colours[0]) == edit.wanted[1],
        "seen_unedited": seen[1],
        "seen_drawn": seen[2],
        "psnr_outside": psnr(before, after, ~old),
        "psnr_outside_either": psnr(before, after, ~(old | new)),
    }


AVERAGED = (
    "mask_iou",
    "mask_iou_either",
    "mask_share",
    "target_seen",
    "kind_seen",
    "colour_seen",
    "seen_unedited",
    "seen_drawn",
    "psnr_outside",
    "psnr_outside_either",
)


def averages(records: list[dict], names=AVERAGED) -> dict:
    """Means in float64 over some edits; None for none. A value that is not finite is an error."""
    result = {"edits": len(records)}
    for name in names:
        values = np.array([record[name] for record in records], np.float64)
        if not np.isfinite(values).all():
            raise ArithmeticError(f"{name} is not finite for {int((~np.isfinite(values)).sum())} edits")
        result[name] = float(values.mean()) if len(values) else None
    return result


# --- options --------------------------------------------------------------------------------------


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("has to be at least 1")
    return value


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("has to be at least 0")
    return value
