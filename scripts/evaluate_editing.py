"""Measures how well a checkpoint edits: mask, target, background and reconstruction, in numbers.

    python scripts/evaluate_editing.py --scenes 200 --seed 7 --json results.json

Fresh scenes are drawn with ``demo_scenes`` (their true object masks are known), one object of each is given
another kind (every second scene) or another colour (the others) by changing the prompt, and the three calls
of ``StableDiffusionDiffEditPipeline`` do the edit with the reference's behaviour and the demo's settings: the
source prompt is the caption for ``invert`` and the negative prompt of the edit. Progress goes to stderr, the
table to stdout. ``--reference`` runs the same edits with diffusers (needs torch). ``--compare`` sets the
reference's behaviour against ``edit()``, see ``compare_editing.py``.

What is measured, each as a mean over the edits:

- mask IoU: the mask, enlarged to pixels by nearest neighbour, against the pixels that the object covers by
  more than half;
- target seen: an independent classifier sees both the kind and the colour that were asked for, at the place
  where the target scene has the object. Its verdicts on the unedited pictures (nothing should pass) and on
  drawn target scenes (everything should) are printed beside it, so that a blind judge shows;
- PSNR outside: original against edited picture, on pixels outside the original object. Where the kind
  changes, the new object may rightly reach over the old one's edge; a second figure leaves out the pixels of
  both;
- PSNR of reconstruction, on a part of the scenes: through the VAE alone, and through inversion and denoising
  with the same prompt and no guidance. Over the whole picture.

PSNR is the mean of the pictures' PSNRs in dB, from 8-bit pictures, computed in float64.

Masks are made one picture at a time: their clamp is a mean over the whole batch, so in a batch each picture's
mask would depend on the others. Inversion and edit treat the pictures of a batch independently; there each
picture has a generator of its own, so the results do not depend on ``--batch``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
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

from mindiffedit import demo  # noqa: E402  (imports nothing but the standard library)

GOALS = {"mask_iou": 0.55, "target_seen": 0.80, "psnr_outside": 26.0}
"""What the demo checkpoint has to reach."""

HIGHEST_PSNR = 100.0
"""Stands for equal pictures, whose PSNR is infinite, in dB; a 128 x 128 picture with one wrong bit has 95."""


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
    return HIGHEST_PSNR if error == 0 else min(HIGHEST_PSNR, 10 * math.log10(255.0**2 / error))


def enlarged(mask: np.ndarray, size: int = scenes.SIZE) -> np.ndarray:
    """A mask on the latents' grid (h, w) as a boolean array (size, size); size is a multiple of h and w."""
    height, width = mask.shape
    if size % height or size % width:
        raise ValueError(f"a mask of {mask.shape} does not divide {size} pixels")
    return np.repeat(np.repeat(mask > 0.5, size // height, 0), size // width, 1)


# --- the edits ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """One scene and what it shall become."""

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
        from mindiffedit.images.pictures import postprocess_image, preprocess_image

        pixels = preprocess_image(pictures, self.pipeline.vae_scale_factor)
        means = np.split(self.pipeline._stages.encode_image(pixels), 2, axis=1)[0]
        return postprocess_image(self.pipeline._stages.decode_latents(means), "pil")

    def array(self, tensor) -> np.ndarray:
        return tensor.asnumpy()


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

    def array(self, tensor) -> np.ndarray:
        return tensor.numpy()


def find_masks(editor, edits, pictures, settings, seed) -> np.ndarray:
    """Masks (B, h, w) of 0 and 1, made one picture at a time (see the module's text)."""
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
    return np.stack(masks)


def make_edits(editor, edits, pictures, masks, settings, seed) -> list[Image.Image]:
    """Inversion and edit of a batch."""
    shared = dict(num_inference_steps=settings["steps"], inpaint_strength=settings["strength"])
    sources = [edit.source.caption for edit in edits]
    latents = editor.pipeline.invert(
        prompt=sources,
        image=pictures,
        guidance_scale=settings["invert_guidance"],
        generator=[editor.generator(g) for g in generators(seed, edits, 2)],
        **shared,
    ).latents
    return editor.pipeline(
        prompt=[edit.target.caption for edit in edits],
        negative_prompt=sources,
        mask_image=masks.astype(np.float32),
        image_latents=latents,
        guidance_scale=settings["guidance"],
        **shared,
    ).images


def rebuild(editor, edits, pictures, settings, seed) -> list[Image.Image]:
    """Inversion and denoising of the whole picture with its own caption and without guidance."""
    shared = dict(num_inference_steps=settings["steps"], inpaint_strength=settings["strength"], guidance_scale=1.0)
    sources = [edit.source.caption for edit in edits]
    own = [editor.generator(g) for g in generators(seed, edits, 3)]
    latents = editor.pipeline.invert(prompt=sources, image=pictures, generator=own, **shared).latents
    everywhere = np.ones((len(edits), *editor.array(latents).shape[-2:]), np.float32)
    return editor.pipeline(prompt=sources, mask_image=everywhere, image_latents=latents, **shared).images


# --- the evaluation -------------------------------------------------------------------------------


def judge(edit: Edit, picture, mask, edited, classifier) -> dict:
    """Every figure of one edit."""
    before, after = np.asarray(picture), np.asarray(edited.convert("RGB"))
    drawn_target, target_masks = scenes.draw_scene(edit.target)
    old = scenes.draw_scene(edit.source)[1][edit.which] > 0.5
    new = target_masks[edit.which] > 0.5
    found = enlarged(mask)
    crops = [scene_classifier.object_crop(p, new) for p in (after, before, np.asarray(drawn_target))]
    kinds, colours = classifier(np.stack(crops))
    seen = [(int(kind), int(colour)) == edit.wanted for kind, colour in zip(kinds, colours)]
    return {
        "index": edit.index,
        "what": edit.what,
        "objects": len(edit.source.objects),
        "source": edit.source.caption,
        "target": edit.target.caption,
        "mask_iou": iou(found, old),
        "mask_iou_either": iou(found, old | new),
        "mask_share": float(found.mean()),
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


def averages(records: list[dict]) -> dict:
    """Means in float64 over some edits; None for none. A value that is not finite is an error."""
    result = {"edits": len(records)}
    for name in AVERAGED:
        values = np.array([record[name] for record in records], np.float64)
        if not np.isfinite(values).all():
            raise ArithmeticError(f"{name} is not finite for {int((~np.isfinite(values)).sum())} edits")
        result[name] = float(values.mean()) if len(values) else None
    return result


def evaluate(
    editor,
    classifier,
    settings,
    *,
    count,
    seed,
    batch,
    reconstructions,
    progress=lambda done, of: None,
    keep_pictures=0,
):
    """Runs everything; returns (results, pictures), the latter for the first ``keep_pictures`` edits."""
    edits = [sample_edit(seed, index) for index in range(count)]
    records, kept, rebuilt = [], [], {"vae": [], "inversion": []}
    for start in range(0, count, batch):
        chunk = edits[start : start + batch]
        # A last batch that is not full is filled up, since another size would be compiled anew.
        filled = (chunk + [chunk[-1]] * batch)[:batch] if count > batch else chunk
        pictures = [scenes.draw_scene(edit.source)[0] for edit in filled]
        masks = find_masks(editor, chunk, pictures, settings, seed)
        spread = np.concatenate([masks, np.repeat(masks[-1:], len(filled) - len(chunk), 0)])
        edited = make_edits(editor, filled, pictures, spread, settings, seed)
        for edit, picture, mask, result in zip(chunk, pictures, masks, edited):
            records.append(judge(edit, picture, mask, result, classifier))
            if len(kept) < keep_pictures:
                kept.append((edit, picture, mask, result))
        if start < reconstructions:
            again = {
                "vae": editor.vae_round_trip(pictures),
                "inversion": rebuild(editor, filled, pictures, settings, seed),
            }
            for name, results in again.items():
                pairs = list(zip(pictures, results))[: min(len(chunk), reconstructions - start)]
                rebuilt[name] += [psnr(np.asarray(a), np.asarray(b.convert("RGB"))) for a, b in pairs]
        progress(start + len(chunk), count)
    groups = {
        "all": records,
        "kind": [r for r in records if r["what"] == "kind"],
        "colour": [r for r in records if r["what"] == "colour"],
    }
    results = {name: averages(group) for name, group in groups.items()}
    results["reconstruction"] = {"pictures": len(rebuilt["vae"])} | {
        f"psnr_{name}": float(np.mean(values, dtype=np.float64)) if values else None for name, values in rebuilt.items()
    }
    results["goals"] = {
        name: {"goal": goal, "reached": results["all"][name], "passed": bool(results["all"][name] >= goal)}
        for name, goal in GOALS.items()
    }
    results["records"] = records
    return results, kept


ROWS = (
    ("mask IoU, true object", "mask_iou", "{:.3f}"),
    ("mask IoU, old or new object", "mask_iou_either", "{:.3f}"),
    ("share of the picture masked", "mask_share", "{:.1%}"),
    ("target seen (kind and colour)", "target_seen", "{:.1%}"),
    ("  kind seen", "kind_seen", "{:.1%}"),
    ("  colour seen", "colour_seen", "{:.1%}"),
    ("  judge on unedited pictures", "seen_unedited", "{:.1%}"),
    ("  judge on drawn targets", "seen_drawn", "{:.1%}"),
    ("PSNR outside the old object, dB", "psnr_outside", "{:.2f}"),
    ("PSNR outside old and new, dB", "psnr_outside_either", "{:.2f}"),
)


def table(results: dict) -> str:
    """The results as lines of text."""

    def shown(pattern, value):
        return "-" if value is None else pattern.format(value)

    groups = ("all", "kind", "colour")
    lines = [f"{'':34}" + "".join(f"{name:>9}" for name in groups) + "   goal"]
    lines.append(f"{'edits':34}" + "".join(f"{results[g]['edits']:>9}" for g in groups))
    for label, name, pattern in ROWS:
        line = f"{label:34}" + "".join(f"{shown(pattern, results[g][name]):>9}" for g in groups)
        if name in results["goals"]:
            goal = results["goals"][name]
            line += f"   >= {pattern.format(goal['goal'])}  {'PASS' if goal['passed'] else 'MISS'}"
        lines.append(line)
    again = results["reconstruction"]
    if again["pictures"]:
        lines.append(
            f"reconstruction of {again['pictures']} pictures, PSNR: VAE alone {again['psnr_vae']:.2f} dB, "
            f"inversion and denoising {again['psnr_inversion']:.2f} dB"
        )
    return "\n".join(lines)


def contact_sheet(kept) -> Image.Image:
    """One row for each edit: original, mask, edited, and the target scene as drawn."""
    size, gap = scenes.SIZE, 4
    sheet = Image.new("RGB", (4 * (size + gap) + gap, len(kept) * (size + gap) + gap), "white")
    for row, (edit, picture, mask, edited) in enumerate(kept):
        shown = Image.fromarray(enlarged(mask).astype(np.uint8) * 255)
        for column, tile in enumerate((picture, shown, edited, scenes.draw_scene(edit.target)[0])):
            sheet.paste(tile.convert("RGB"), (gap + column * (size + gap), gap + row * (size + gap)))
    return sheet


class Progress:
    """One line on stderr that counts up."""

    def __init__(self):
        self.started = time.monotonic()

    def __call__(self, done: int, of: int) -> None:
        left = (time.monotonic() - self.started) / done * (of - done)
        end = "\n" if done == of or not sys.stderr.isatty() else ""
        start = "\r" if sys.stderr.isatty() else ""
        print(f"{start}{done}/{of} edits, about {left:.0f} s left   ", end=end, file=sys.stderr, flush=True)


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


KNOBS = (
    ("steps", positive, "denoising steps of the whole schedule"),
    ("strength", float, "inpaint_strength of inversion and edit"),
    ("guidance", float, "guidance scale of mask and edit"),
    ("invert_guidance", float, "guidance scale of the inversion"),
    ("maps", positive, "noise maps per mask"),
    ("mask_strength", float, "noise level of the mask"),
    ("mask_threshold", float, "mask_thresholding_ratio"),
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = demo.SETTINGS
    add = parser.add_argument
    add("--scenes", type=positive, default=200, help="number of scenes, each edited once (200)")
    add("--seed", type=natural, default=7, help="decides scenes, edits and noise (7)")
    add("--model", default="demo", help="'demo' or a checkpoint folder")
    add("--classifier", type=Path, default=scene_classifier.WEIGHTS, help="weights of the judge")
    add("--batch", type=positive, default=8, help="pictures inverted and edited together (8)")
    add("--reconstructions", type=natural, default=16, help="pictures to measure reconstruction on (16)")
    add("--mode", choices=("graph", "pynative"), default="graph")
    add("--reference", action="store_true", help="use diffusers and torch instead of this project")
    for name, kind, text in KNOBS:
        default = known.get(name)
        shown = "that of --guidance" if default is None else default
        add(f"--{name.replace('_', '-')}", type=kind, default=default, help=f"{text} ({shown})")
    add("--compare", action="store_true", help="the three calls against edit(), with an ablation")
    add("--ablation", type=natural, default=100, help="with --compare: scenes of the ablation (100)")
    add("--timed", type=natural, default=20, help="with --compare: edits whose seconds are measured (20)")
    add("--json", type=Path, metavar="FILE", help="write settings, means and every edit's figures")
    add(
        "--sheet",
        type=Path,
        metavar="PNG",
        help="write the first twelve edits as one picture; with --compare the first four of each party",
    )
    add("--check", action="store_true", help="exit with 1 when a goal is missed")
    return parser


def compare(args, editor, classifier, settings) -> int:
    """``--compare``; returns the exit code."""
    import compare_editing

    def progress(name, done):
        print(f"{name}: {done} edits", file=sys.stderr, flush=True)

    results, sheet = compare_editing.compare(
        editor,
        classifier,
        settings,
        count=args.scenes,
        seed=args.seed,
        batch=args.batch,
        ablation=min(args.ablation, args.scenes),
        rebuilt=min(args.reconstructions, args.scenes),
        timed=min(args.timed, args.scenes - 1),
        progress=progress,
    )
    print(compare_editing.tables(results))
    if args.sheet:
        sheet.quantize(256, dither=Image.Dither.NONE).save(args.sheet, optimize=True)
    if args.json:
        results = {"scenes": args.scenes, "seed": args.seed, "model": args.model, "settings": settings} | results
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    missed = [name for name, goal in results["goals"].items() if not goal["passed"]]
    return 1 if args.check and missed else 0


def main(arguments=None) -> int:
    args = build_parser().parse_args(arguments)
    settings = {name: getattr(args, name) for name, _, _ in KNOBS}
    if settings["invert_guidance"] is None:  # as in the reference, where both have one default
        settings["invert_guidance"] = settings["guidance"]
    classifier = scene_classifier.SceneClassifier.load(args.classifier)
    model = demo.checkpoint_folder() if args.model == "demo" else Path(args.model)
    editor = (ReferenceEditor if args.reference else MindSporeEditor)(model, args.mode)
    started = time.monotonic()
    if args.compare:
        return compare(args, editor, classifier, settings)
    results, kept = evaluate(
        editor,
        classifier,
        settings,
        count=args.scenes,
        seed=args.seed,
        batch=args.batch,
        reconstructions=args.reconstructions,
        progress=Progress(),
        keep_pictures=12 if args.sheet else 0,
    )
    results = {
        "scenes": args.scenes,
        "seed": args.seed,
        "model": args.model,
        "library": "diffusers" if args.reference else "mindiffedit",
        "settings": settings,
        "seconds": round(time.monotonic() - started, 1),
    } | results
    print(
        f"{results['library']}, model {args.model}, seed {args.seed}, {results['seconds']:.0f} s, "
        + ", ".join(f"{name} {value:g}" for name, value in settings.items())
    )
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.sheet:
        contact_sheet(kept).save(args.sheet)
    missed = [name for name, goal in results["goals"].items() if not goal["passed"]]
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
