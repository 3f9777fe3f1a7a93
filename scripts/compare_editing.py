"""The reference's behaviour against ``edit``, on the same fresh scenes: what ``evaluate_editing.py --compare`` runs.

Three parties, on one checkpoint, with the same scenes, prompts, steps, strength and guidance:

- *reference*: the three calls with every default of the reference, so the inversion is guided as the edit is, and the
  mask settings that suit it (``demo.SETTINGS``);
- *edit()*: the one call as it comes, with those that suit it (``demo.EDIT_SETTINGS``);
- *edit(), no paste-back*: the same run without the last step, so that the background is what the model made of it.

Then edit() again with one correction at a time switched off, on a part of the scenes. Quality is measured in batches;
seconds are measured apart, one picture at a time, the parties taking turns, on graphs that are compiled already.
"""

from __future__ import annotations

import dataclasses
import time

import demo_scenes as scenes
import evaluate_editing as evaluation
import numpy as np
from PIL import Image

FEATHER = 4
"""Pixels around the mask within which edit() blends; the demo model's pixels per latent."""

CORRECTIONS = {
    "outliers removed (C2)": dict(outlier_quantile=None),
    "mask to the picture's edges (C9)": dict(mask_options="blurred", mask_thresholding_ratio=1.5),
    "mask shaped at all": dict(mask_options="reference", mask_thresholding_ratio=3.0),
    "clamp per image (C4)": dict(per_image_clamp=False),
    "background at its own noise level (C3)": dict(aligned_background=False),
    "inversion without guidance (C6)": dict(inversion_guidance_scale="guidance"),
}
"""Each correction, and what switches it off."""

EXTRAS = {
    "inverse steps refined twice (C6)": dict(inversion_iterations=2),
    "soft mask in place of the hard one (C7)": dict(mask_options="soft"),
    "noise in place of the inversion (C8)": dict(inversion="noise"),
}
"""What is off by default, and what switches it on."""

SHOWN = 4
"""Scenes that the sheet of pictures shows."""

GOALS = (
    "mask IoU",
    "target seen",
    "outside the feathered mask",
    "outside the object, no paste-back",
    "seconds",
)


def one_call(editor, edits, pictures, settings, seed, **changes):
    """(masks (B, h, w), pictures, report) of ``edit``, with the mask settings that suit it."""
    from mindiffedit import MaskOptions, demo, inputs

    suited = demo.EDIT_SETTINGS
    settings_of = dict(
        num_inference_steps=settings["steps"],
        inpaint_strength=settings["strength"],
        guidance_scale=settings["guidance"],
        num_maps_per_mask=suited["maps"],
        mask_encode_strength=suited["mask_strength"],
        mask_thresholding_ratio=suited["mask_threshold"],
        generator=[editor.generator(g) for g in evaluation.generators(seed, edits, 2)],
    )
    shapes = {
        "reference": MaskOptions(),
        # With what suits it: smoothing alone needs a higher threshold under a lower clamp.
        "blurred": dataclasses.replace(inputs.EDIT_MASK, edges=0, threshold=0.84),
        "soft": dataclasses.replace(inputs.EDIT_MASK, soft=True),
    }
    for name, value in changes.items():
        if name == "mask_options":
            value = shapes[value]
        elif value == "guidance":
            value = settings["guidance"]
        settings_of[name] = value
    done = editor.pipeline.edit(
        pictures,
        [edit.source.caption for edit in edits],
        [edit.target.caption for edit in edits],
        **settings_of,
    )
    return done.mask_image, done.images, done.report


def pasted(pictures, found, results):
    """What paste-back makes of unpasted results: one run serves both parties."""
    from mindiffedit import masks

    weights = masks.feathered(found, (scenes.SIZE, scenes.SIZE), FEATHER)
    before, after = (np.stack([np.asarray(p.convert("RGB")) for p in some]) for some in (pictures, results))
    return [Image.fromarray(pixels) for pixels in masks.paste_back(before, after, weights)]


def three_calls(editor, edits, pictures, settings, seed):
    """(masks (B, h, w), pictures) of the mirrored calls."""
    guided = {**settings, "invert_guidance": settings["guidance"]}
    found = evaluation.find_masks(editor, edits, pictures, guided, seed)
    return found, evaluation.make_edits(editor, edits, pictures, found, guided, seed)


def judged(edit, picture, mask, result, classifier) -> dict:
    """``evaluate_editing.judge``, and the PSNR where the feathered mask is 0."""
    from mindiffedit import masks

    record = evaluation.judge(edit, picture, mask, result, classifier)
    outside = masks.feathered(mask, (scenes.SIZE, scenes.SIZE), FEATHER)[0] == 0
    before, after = np.asarray(picture), np.asarray(result.convert("RGB"))
    record["psnr_outside_mask"] = evaluation.psnr(before, after, outside) if outside.any() else evaluation.HIGHEST_PSNR
    return record


def in_batches(edits, batch):
    """(edits, those filled up to a whole batch, their pictures): another size would be compiled anew."""
    for start in range(0, len(edits), batch):
        chunk = edits[start : start + batch]
        filled = (chunk + [chunk[-1]] * batch)[:batch] if len(edits) > batch else chunk
        yield chunk, filled, [scenes.draw_scene(edit.source)[0] for edit in filled]


def measured(run, edits, batch, classifier, progress) -> tuple[list[dict], list[dict], list[tuple]]:
    """Records of the results as they are, and of the same pasted back; (mask, result) of the first ones as they are."""
    records, again, shown = [], [], []
    for chunk, filled, pictures in in_batches(edits, batch):
        found, results, *_ = run(filled, pictures)
        records += [judged(*each, classifier) for each in zip(chunk, pictures, found, results)]
        shown += list(zip(found, results))[: max(0, min(len(chunk), SHOWN - len(shown)))]
        results = pasted(pictures, found, results)
        again += [judged(*each, classifier) for each in zip(chunk, pictures, found, results)]
        progress(len(chunk))
    return records, again, shown


AVERAGED = (*evaluation.AVERAGED, "psnr_outside_mask")


def means(records) -> dict:
    return {name: float(np.mean([record[name] for record in records], dtype=np.float64)) for name in AVERAGED}


def reconstructions(editor, edits, batch, settings, seed, **options) -> float:
    """Mean PSNR in dB of inversion and denoising with one guidance scale, no mask; ``options`` of the inversion."""
    shared = dict(num_inference_steps=settings["steps"], inpaint_strength=settings["strength"])
    scale = options.pop("guidance_scale", 1.0)
    found = []
    for chunk, filled, pictures in in_batches(edits, batch):
        sources = [edit.source.caption for edit in filled]
        own = [editor.generator(g) for g in evaluation.generators(seed, filled, 3)]
        latents = editor.pipeline.invert(
            sources, pictures, generator=own, guidance_scale=scale, **shared, **options
        ).latents
        everywhere = np.ones((len(filled), *latents.shape[-2:]), np.float32)
        rebuilt = editor.pipeline(sources, everywhere, latents, guidance_scale=scale, **shared).images
        found += [evaluation.psnr(np.asarray(a), np.asarray(b)) for a, b in list(zip(pictures, rebuilt))[: len(chunk)]]
    return float(np.mean(found, dtype=np.float64))


def seconds(editor, edits, settings, seed) -> dict:
    """Median seconds of one picture's edit by either party; they take turns, after one that compiles."""
    taken = {"reference": [], "edit()": []}
    for number, edit in enumerate(edits):
        picture = [scenes.draw_scene(edit.source)[0]]
        for name, run in (("reference", three_calls), ("edit()", one_call)):
            begun = time.perf_counter()
            run(editor, [edit], picture, settings, seed)
            if number:
                taken[name].append(time.perf_counter() - begun)
    return {name: float(np.median(values)) for name, values in taken.items()}


def compare(editor, classifier, settings, *, count, seed, batch, ablation, rebuilt, timed, progress):
    """(everything that is measured, the sheet of pictures).

    ``ablation``, ``rebuilt``, ``timed``: scenes of these parts; 0 leaves one out.
    """
    edits = [evaluation.sample_edit(seed, index) for index in range(count)]
    # First, in a process that has compiled nothing else.
    taken = seconds(editor, edits[: timed + 1], settings, seed) if timed else None

    usual = editor.pipeline.unet_batch_size
    editor.pipeline.unet_batch_size = batch  # changes nothing but the time

    def run(name, some, **changes):
        def edit(pictures_of, pictures):
            return one_call(editor, pictures_of, pictures, settings, seed, paste_back=False, **changes)

        return measured(edit, some, batch, classifier, lambda n: progress(name, n))

    def reference(some, pictures):
        return three_calls(editor, some, pictures, settings, seed)

    theirs, _, shown = measured(reference, edits, batch, classifier, lambda n: progress("reference", n))
    sheet = {"reference": shown}
    unpasted, ours, sheet["edit()"] = run("edit()", edits)
    records = {"reference": theirs, "edit()": ours, "edit(), no paste-back": unpasted}
    results = {"parties": {name: means(found) for name, found in records.items()}, "ablation": {}}
    if ablation:
        part = edits[:ablation]
        results["ablation"]["edit(), no paste-back"] = means(unpasted[:ablation])
        changed = {f"without: {name}": changes for name, changes in CORRECTIONS.items()}
        changed |= {f"with: {name}": changes for name, changes in EXTRAS.items()}
        for name, changes in changed.items():
            found, _, sheet[name] = run(name, part, **changes)
            results["ablation"][name] = means(found)
        results["ablation"]["with: pasted back (C5)"] = means(ours[:ablation])
        results["ablation"]["reference"] = means(theirs[:ablation])
    if rebuilt:
        part, scale = edits[:rebuilt], settings["guidance"]
        results["reconstruction"] = {
            "reference (guided)": reconstructions(editor, part, batch, settings, seed, guidance_scale=scale),
            "edit() (not guided)": reconstructions(editor, part, batch, settings, seed),
            "refined once": reconstructions(editor, part, batch, settings, seed, inversion_iterations=1),
            "refined twice": reconstructions(editor, part, batch, settings, seed, inversion_iterations=2),
        }
    editor.pipeline.unet_batch_size = usual
    if timed:
        results["seconds"] = taken
    results["goals"] = goals(results)
    results["records"] = records
    return results, sheet_of(edits, sheet)


def sheet_of(edits, shown) -> Image.Image:
    """Mask and unpasted result of the first scenes, a row for each of ``shown``; above them the drawn scenes.

    ``shown``: {label: [(mask (h, w), result), ...]}.
    """
    from mindiffedit import masks

    columns = min(len(found) for found in shown.values())
    rows = [[scenes.draw_scene(scene)[0] for edit in edits[:columns] for scene in (edit.source, edit.target)]]
    size = (scenes.SIZE, scenes.SIZE)
    for found in shown.values():
        rows.append([])
        for mask, result in found[:columns]:
            grey = np.round(255 * masks.enlarged(mask, size)).astype(np.uint8).reshape(size)
            rows[-1] += [Image.fromarray(grey), result]
    labels = [edit.source.caption if i == 0 else edit.target.caption for edit in edits[:columns] for i in (0, 1)]
    return masks.contact_sheet(rows, ["as drawn", *shown], labels)


def goals(results) -> dict:
    """{goal: {"wanted": text, "reached": text, "passed": bool}}."""
    theirs, ours = results["parties"]["reference"], results["parties"]["edit()"]
    unpasted = results["parties"]["edit(), no paste-back"]
    exact = evaluation.HIGHEST_PSNR
    found = {
        "mask IoU": (
            f">= 0.80, or {theirs['mask_iou'] + 0.1:.3f}",
            f"{ours['mask_iou']:.3f}",
            ours["mask_iou"] >= min(0.80, theirs["mask_iou"] + 0.10),
        ),
        "target seen": (
            f">= {theirs['target_seen']:.1%}",
            f"{ours['target_seen']:.1%}",
            ours["target_seen"] >= theirs["target_seen"],
        ),
        "outside the feathered mask": (
            "exact",
            "exact" if ours["psnr_outside_mask"] == exact else f"{ours['psnr_outside_mask']:.1f} dB",
            ours["psnr_outside_mask"] == exact,
        ),
        "outside the object, no paste-back": (
            f">= {theirs['psnr_outside'] + 3:.2f} dB",
            f"{unpasted['psnr_outside']:.2f} dB",
            unpasted["psnr_outside"] >= theirs["psnr_outside"] + 3,
        ),
    }
    if "seconds" in results:
        ratio = results["seconds"]["edit()"] / results["seconds"]["reference"]
        found["seconds"] = ("<= 0.75 x the three calls", f"{ratio:.2f} x", ratio <= 0.75)
    return {
        name: {"wanted": wanted, "reached": reached, "passed": bool(passed)}
        for name, (wanted, reached, passed) in found.items()
    }


COLUMNS = (
    ("mask IoU", "mask_iou", "{:.3f}"),
    ("target seen", "target_seen", "{:.1%}"),
    ("kind seen", "kind_seen", "{:.1%}"),
    ("colour seen", "colour_seen", "{:.1%}"),
    ("PSNR outside object, dB", "psnr_outside", "{:.2f}"),
    ("PSNR outside mask, dB", "psnr_outside_mask", "{:.2f}"),
)


def tables(results) -> str:
    """The results as Markdown."""

    def shown(pattern, name, value):
        exact = name.startswith("psnr") and value == evaluation.HIGHEST_PSNR
        return "exact" if exact else pattern.format(value)

    def table(rows):
        lines = [f"| | {' | '.join(label for label, _, _ in COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
        for label, row in rows.items():
            cells = [shown(pattern, name, row[name]) for _, name, pattern in COLUMNS]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        return lines

    lines = table(results["parties"])
    if results["ablation"]:
        lines += ["", *table(results["ablation"])]
    if "reconstruction" in results:
        lines += ["", "| inversion and denoising of the whole picture | PSNR, dB |", "|---|---|"]
        lines += [f"| {name} | {value:.2f} |" for name, value in results["reconstruction"].items()]
    if "seconds" in results:
        lines += ["", "| seconds of one edit, median | |", "|---|---|"]
        lines += [f"| {name} | {value:.3f} |" for name, value in results["seconds"].items()]
    lines += ["", "| goal | wanted | reached | |", "|---|---|---|---|"]
    for name, goal in results["goals"].items():
        verdict = "passed" if goal["passed"] else "missed"
        lines.append(f"| {name} | {goal['wanted']} | {goal['reached']} | {verdict} |")
    return "\n".join(lines)
