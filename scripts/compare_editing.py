"""The reference's behaviour against ``edit``, on the same fresh scenes: what ``evaluate_editing.py --compare`` runs.

Three parties, on one checkpoint, with the same scenes, prompts, steps, strength and guidance:

- *reference*: the three calls with every default of the reference, so the inversion is guided as the edit is, and the
  mask settings that suit it (``demo.SETTINGS``);
- *edit()*: the one call, with those that suit it (``demo.EDIT_SETTINGS``);
- *edit(), no paste-back*: the same run without the last step, so that the background is what the model made of it.

Then edit() again with one correction at a time switched off, on a part of the scenes. All of it by the preset "exact";
what the others save, ``pareto_editing.py`` measures. Quality is measured in batches;
seconds are measured apart, one picture at a time, the parties taking turns, on graphs that are compiled already.
"""

from __future__ import annotations

import dataclasses
import time

import demo_scenes as scenes
import editing_measures as measures
import numpy as np
from editing_measures import three_calls
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


def one_call(editor, edits, pictures, settings, seed, preset="exact", **changes):
    """(masks (B, h, w), pictures) of ``edit``, with the mask settings that suit it."""
    from mindiffedit import MaskOptions, demo, inputs

    suited = demo.EDIT_SETTINGS
    values = {
        "reference": MaskOptions(),
        # With what suits it: smoothing alone needs a higher threshold under a lower clamp.
        "blurred": dataclasses.replace(inputs.EDIT_MASK, edges=0, threshold=0.84),
        "automatic": dataclasses.replace(inputs.INVERSION_MASK, threshold="auto"),
        "soft": dataclasses.replace(inputs.EDIT_MASK, soft=True),
        "guidance": settings["guidance"],
    }
    options = dict(
        preset=preset,
        num_inference_steps=settings["steps"],
        inpaint_strength=settings["strength"],
        guidance_scale=settings["guidance"],
        mask_thresholding_ratio=suited["mask_threshold"],
        generator=[editor.generator(g) for g in measures.generators(seed, edits, 2)],
    )
    if preset == "exact" and "inversion_maps" not in changes:
        options |= dict(num_maps_per_mask=suited["maps"], mask_encode_strength=suited["mask_strength"])
    options |= {name: values.get(value, value) for name, value in changes.items()}
    sources, targets = [edit.source.caption for edit in edits], [edit.target.caption for edit in edits]
    result = editor.pipeline.edit(pictures, sources, targets, **options)
    return result.mask_image, result.images


def pasted(pictures, latent_masks, results):
    """What paste-back makes of unpasted results: one run serves both parties."""
    from mindiffedit import masks

    weights = masks.feathered(latent_masks, (scenes.SIZE, scenes.SIZE), FEATHER)
    before, after = (np.stack([np.asarray(p.convert("RGB")) for p in some]) for some in (pictures, results))
    return [Image.fromarray(pixels) for pixels in masks.paste_back(before, after, weights)]


def judged(edit, picture, mask, result, classifier) -> dict:
    """``editing_measures.judge``, and the PSNR where the feathered mask is 0."""
    from mindiffedit import masks

    record = measures.judge(edit, picture, mask, result, classifier)
    outside = masks.feathered(mask, (scenes.SIZE, scenes.SIZE), FEATHER)[0] == 0
    before, after = np.asarray(picture), np.asarray(result.convert("RGB"))
    record["psnr_outside_mask"] = measures.psnr(before, after, outside) if outside.any() else measures.EXACT
    return record


def measured(run, edits, batch, classifier, progress) -> tuple[list[dict], list[dict], list[tuple]]:
    """Records of the results as they are, and of the same pasted back; (mask, result) of the first ones as they are."""
    records, again, shown = [], [], []
    for chunk, filled, pictures in measures.in_batches(edits, batch):
        masks, results = run(filled, pictures)
        records += [judged(*each, classifier) for each in zip(chunk, pictures, masks, results)]
        shown += list(zip(masks, results))[: max(0, min(len(chunk), SHOWN - len(shown)))]
        results = pasted(pictures, masks, results)
        again += [judged(*each, classifier) for each in zip(chunk, pictures, masks, results)]
        progress(len(chunk))
    return records, again, shown


AVERAGED = (*measures.AVERAGED, "psnr_outside_mask")


def means(records) -> dict:
    return measures.averages(records, AVERAGED)


def seconds(editor, edits, settings, seed) -> dict:
    """Median seconds of one picture's edit by either party; they take turns, after one that compiles."""
    settings = {**settings, "invert_guidance": settings["guidance"]}
    taken = {"reference": [], "edit()": []}
    for number, edit in enumerate(edits):
        picture = [scenes.draw_scene(edit.source).picture]
        for name, run in (("reference", three_calls), ("edit()", one_call)):
            start = time.perf_counter()
            run(editor, [edit], picture, settings, seed)
            if number:
                taken[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in taken.items()}


def compare(editor, classifier, settings, *, count, seed, batch, ablation, rebuilt, timed, progress):
    """(everything that is measured, the sheet of pictures).

    ``ablation``, ``rebuilt``, ``timed``: scenes of these parts; 0 leaves one out.
    """
    edits = [measures.sample_edit(seed, index) for index in range(count)]
    # First, in a process that has compiled nothing else.
    taken = seconds(editor, edits[: timed + 1], settings, seed) if timed else None

    usual = editor.pipeline.unet_batch_size
    editor.pipeline.unet_batch_size = batch  # changes nothing but the time

    def run(name, some, **changes):
        def edit(pictures_of, pictures):
            return one_call(editor, pictures_of, pictures, settings, seed, paste_back=False, **changes)

        return measured(edit, some, batch, classifier, lambda n: progress(name, n))

    def reference(some, pictures):
        guided = {**settings, "invert_guidance": settings["guidance"]}  # as in the reference, whose default is one
        return three_calls(editor, some, pictures, guided, seed)

    def rebuilt_by(scale, **options):
        def run(some, pictures):
            return measures.rebuild(editor, some, pictures, settings, seed, guidance_scale=scale, **options)

        return measures.fidelity(run, edits[:rebuilt], batch)

    theirs, _, shown = measured(reference, edits, batch, classifier, lambda n: progress("reference", n))
    sheet = {"reference": shown}
    unpasted, ours, sheet["edit()"] = run("edit()", edits)
    records = {"reference": theirs, "edit()": ours, "edit(), no paste-back": unpasted}
    results = {"parties": {name: means(rows) for name, rows in records.items()}, "ablation": {}}
    if ablation:
        part = edits[:ablation]
        results["ablation"]["edit(), no paste-back"] = means(unpasted[:ablation])
        changed = {f"without: {name}": changes for name, changes in CORRECTIONS.items()}
        changed |= {f"with: {name}": changes for name, changes in EXTRAS.items()}
        for name, changes in changed.items():
            rows, _, sheet[name] = run(name, part, **changes)
            results["ablation"][name] = means(rows)
        results["ablation"]["with: pasted back (C5)"] = means(ours[:ablation])
        results["ablation"]["reference"] = means(theirs[:ablation])
    if rebuilt:
        results["reconstruction"] = {
            "reference (guided)": rebuilt_by(settings["guidance"]),
            "edit() (not guided)": rebuilt_by(1.0),
            "refined once": rebuilt_by(1.0, inversion_iterations=1),
            "refined twice": rebuilt_by(1.0, inversion_iterations=2),
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

    columns = min(len(pairs) for pairs in shown.values())
    rows = [[scenes.draw_scene(scene).picture for edit in edits[:columns] for scene in (edit.source, edit.target)]]
    size = (scenes.SIZE, scenes.SIZE)
    for pairs in shown.values():
        rows.append([])
        for mask, result in pairs[:columns]:
            grey = np.round(255 * masks.enlarged(mask, size)).astype(np.uint8).reshape(size)
            rows[-1] += [Image.fromarray(grey), result]
    labels = [edit.source.caption if i == 0 else edit.target.caption for edit in edits[:columns] for i in (0, 1)]
    return masks.contact_sheet(rows, ["as drawn", *shown], labels)


def goals(results) -> dict:
    """{goal: {"wanted": text, "reached": text, "passed": bool}}."""
    theirs, ours = results["parties"]["reference"], results["parties"]["edit()"]
    unpasted = results["parties"]["edit(), no paste-back"]
    outcomes = {
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
            "exact" if ours["psnr_outside_mask"] == measures.EXACT else f"{ours['psnr_outside_mask']:.1f} dB",
            ours["psnr_outside_mask"] == measures.EXACT,
        ),
        "outside the object, no paste-back": (
            f">= {theirs['psnr_outside'] + 3:.2f} dB",
            f"{unpasted['psnr_outside']:.2f} dB",
            unpasted["psnr_outside"] >= theirs["psnr_outside"] + 3,
        ),
    }
    if "seconds" in results:
        ratio = results["seconds"]["edit()"] / results["seconds"]["reference"]
        outcomes["seconds"] = ("<= 0.75 x the three calls", f"{ratio:.2f} x", ratio <= 0.75)
    return {
        name: {"wanted": wanted, "reached": reached, "passed": bool(passed)}
        for name, (wanted, reached, passed) in outcomes.items()
    }
