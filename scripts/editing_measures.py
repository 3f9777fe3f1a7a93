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
    """One of ``WHATS``."""
    which: int
    """Position of the changed part in the scene."""
    source: scenes.Scene
    target: scenes.Scene

    @property
    def wanted(self) -> tuple[int, int]:
        """Indices of the kind and colour that the classifier has to see."""
        kind, colour = "nothing", None
        if self.what != "removal":
            part = self.target.parts[self.which]
            kind, colour = part.kind, getattr(part, "colour", None)
        return scenes.SEEN_KINDS.index(kind), scenes.SEEN_COLOURS.index(colour or "none")

    def changed(self, source: scenes.Drawing, target: scenes.Drawing) -> tuple[np.ndarray, np.ndarray]:
        """What the old part covers by more than half and what the new one does, boolean (SIZE, SIZE) each.

        Of a bowl or basket that stays, these are its contents.
        """
        stays = self.what == "contents" and (
            self.source.parts[self.which].container == self.target.parts[self.which].container
        )
        old = (source.subject if stays else source.whole)[self.which] > 0.5
        if self.what == "removal":
            return old, np.zeros_like(old)
        return old, (target.subject if stays else target.whole)[self.which] > 0.5


WHATS = ("kind", "colour", "contents", "kind", "removal")
"""What an edit changes, by the remainder of its number."""


def sample_edit(seed: int, index: int) -> Edit:
    """The edit with this number; nothing else decides it."""
    # A sequence of numbers as seed: these streams are none of those that training scenes are drawn from.
    rng = np.random.default_rng((seed, index, 0xED17))
    what = WHATS[index % len(WHATS)]
    while True:
        scene = scenes.sample_scene(rng)
        places = [place for place, part in enumerate(scene.parts) if _suits(part, what)]
        if places:
            break
    which = places[rng.integers(len(places))]
    return Edit(index, what, which, scene, _target(scene, which, what, rng))


def _suits(part: scenes.Item | scenes.Filling, what: str) -> bool:
    if what == "contents":
        return isinstance(part, scenes.Filling)
    return isinstance(part, scenes.Item) and (what != "colour" or part.colour is not None)


def _target(scene: scenes.Scene, which: int, what: str, rng: np.random.Generator) -> scenes.Scene:
    part = scene.parts[which]
    if what == "removal":
        return scene.without(which)

    def another(values, known):
        free = [value for value in values if value not in known]
        return free[rng.integers(len(free))]

    if isinstance(part, scenes.Filling):  # one in four changes the container, too
        container = another(scenes.CONTAINERS, [part.container]) if rng.random() < 0.25 else part.container
        return scene.replaced(which, kind=another(scenes.FRUITS, [part.kind]), container=container)
    if what == "colour":
        return scene.replaced(which, colour=another(scenes.COLOURED[part.kind], [part.colour]))
    kind = another(scenes.KINDS, [item.kind for item in scene.parts])
    colour = another(scenes.COLOURED[kind], []) if kind in scenes.COLOURED else None
    return scene.replaced(which, kind=kind, colour=colour)


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
        yield chunk, filled, [scenes.draw_scene(edit.source).picture for edit in filled]


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
    """Every figure of one edit; None where there is nothing to measure."""
    before, after = np.asarray(picture), np.asarray(edited.convert("RGB"))
    target = scenes.draw_scene(edit.target)
    old, new = edit.changed(scenes.draw_scene(edit.source), target)
    vacated, is_removal = old & ~new, edit.what == "removal"
    covered, drawn = enlarged(mask), np.asarray(target.picture)
    place = old if is_removal else target.subject[edit.which]
    crops = [scene_classifier.object_crop(p, place) for p in (after, before, drawn)]
    kinds, colours = classifier(np.stack(crops))
    seen = [(int(kind), int(colour)) == edit.wanted for kind, colour in zip(kinds, colours)]
    return {
        "index": edit.index,
        "what": edit.what,
        "parts": len(edit.source.parts),
        "source": edit.source.caption,
        "target": edit.target.caption,
        "mask_iou": iou(covered, old | new),
        "mask_iou_old": iou(covered, old),
        "mask_share": float(covered.mean()),
        "target_seen": None if is_removal else seen[0],
        "removed": seen[0] if is_removal else None,
        "seen_unedited": seen[1],
        "seen_drawn": seen[2],
        "psnr_outside": psnr(before, after, ~(old | new)),
        "psnr_vacated": psnr(drawn, after, vacated) if vacated.sum() >= MIN_VACATED else None,
    }


MIN_VACATED = 32
"""Pixels; on fewer, the ground that an edit has to invent is not judged."""

AVERAGED = (
    *("mask_iou", "mask_iou_old", "mask_share", "target_seen", "removed", "seen_unedited", "seen_drawn"),
    *("psnr_outside", "psnr_vacated"),
)


def averages(records: list[dict], names=AVERAGED) -> dict:
    """Means in float64 over the edits that have a value; None for none. One that is not finite is an error."""
    result = {"edits": len(records)}
    for name in names:
        values = np.array([record[name] for record in records if record[name] is not None], np.float64)
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
