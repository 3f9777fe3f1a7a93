"""Evaluations against quality, for a family of settings: what ``evaluate_editing.py --pareto`` runs.

Every setting edits the same fresh scenes. Rows are counted: samples in evaluations of the whole UNet for one picture,
and beside them those of the step cache, which run its last layer alone. Differences to ``edit(preset="exact")`` are
paired, scene by scene, with intervals of 95 % by bootstrap. Nothing is pasted back, so that all differences show.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import compare_editing
import demo_scenes as scenes
import editing_measures as measures
import numpy as np

FAMILY: dict[str, dict] = {
    "reference": {},
    "exact": dict(preset="exact"),
    "balanced": dict(preset="balanced"),
    "fast": dict(preset="fast"),
    "exact, 10 steps": dict(preset="exact", num_inference_steps=10),
    "balanced, 10 steps": dict(preset="balanced", num_inference_steps=10),
    "fast, 10 steps": dict(preset="fast", num_inference_steps=10),
    "balanced, 40 steps": dict(preset="balanced", num_inference_steps=40),
    "6 points": dict(preset="exact", inversion_points=6),
    "3 points": dict(preset="exact", inversion_points=3),
    "2 points": dict(preset="exact", inversion_points=2),
    "1 point": dict(preset="exact", inversion_points=1),
    "a point at every level": dict(preset="exact", inversion_points=50),
    "3 points, mask of 2": dict(preset="exact", inversion_points=3, inversion_maps=2),
    "3 points, mask of 2, automatic threshold": dict(
        preset="exact", inversion_points=3, inversion_maps=2, mask_options="automatic"
    ),
    "guidance to 0.5": dict(preset="exact", guidance_end=0.5),
    "guidance to 0.4": dict(preset="exact", guidance_end=0.4),
    "guidance to 0.2": dict(preset="exact", guidance_end=0.2),
    "guidance from 0.1": dict(preset="exact", guidance_start=0.1),
    "step cache of 2": dict(preset="exact", unet_cache_interval=2),
    "step cache of 3": dict(preset="exact", unet_cache_interval=3),
}
"""What is compared; the first four on all scenes, the others on the first ones."""

WHOLE = ("reference", "exact", "balanced", "fast")

REBUILT = {
    "DDIM": {},
    "DDIM refined once": dict(inversion_iterations=1),
    "DDIM refined twice": dict(inversion_iterations=2),
    "a point at every level": dict(inversion_points=1000),
    "a point at every second": dict(inversion_points="half"),
    "a point at every third": dict(inversion_points="third"),
}
"""Inversions that are led back over the whole picture."""

REBUILT_STEPS = (6, 10, 20, 50)


def pareto(
    editor,
    classifier,
    settings: Mapping,
    *,
    count: int,
    seed: int,
    batch: int,
    ablation: int,
    rebuilt: int,
    timed: int,
    progress: Callable[[str, int], None],
) -> dict:
    """Everything that is measured.

    Args:
        count: scenes for ``WHOLE``; ``ablation`` of them for the other settings.
        rebuilt: pictures that are led into noise and back; 0: none.
        timed: pictures whose edits are timed, one by one, the settings taking turns.
    """
    edits = [measures.sample_edit(seed, index) for index in range(count)]
    runs = {name: runner(editor, settings, seed, changes) for name, changes in FAMILY.items()}
    seconds = _seconds({name: runs[name] for name in WHOLE}, edits[: timed + 1]) if timed else {}
    usual = editor.pipeline.unet_batch_size
    editor.pipeline.unet_batch_size = batch  # changes nothing but the time
    results: dict = {"settings": {}}
    records = {}
    for name, run in runs.items():
        some = edits if name in WHOLE else edits[:ablation]
        records[name], rows, shallow = _measured(run, editor, some, batch, classifier, partial(progress, name))
        results["settings"][name] = {
            "rows": rows,
            "shallow": shallow,
            "seconds": seconds.get(name),
            **measures.averages(records[name]),
            "against_exact": {
                measure: differences(records[name], records["exact"], measure)
                for measure in ("mask_iou", "target_seen")
                if "exact" in records
            },
        }
    if rebuilt:
        results["rebuilt"] = _rebuilt(editor, edits[:rebuilt], batch, settings, seed, progress)
    editor.pipeline.unet_batch_size = usual
    results["goals"] = goals(results["settings"])
    results["records"] = records
    return results


def runner(editor, settings, seed, changes) -> Callable:
    """A function (edits, pictures) -> (masks, pictures) of one setting."""
    if not changes:
        guided = {**settings, "invert_guidance": settings["guidance"]}  # as in the reference, whose default is one
        return lambda edits, pictures: measures.three_calls(editor, edits, pictures, guided, seed)
    return lambda edits, pictures: compare_editing.one_call(
        editor, edits, pictures, settings, seed, paste_back=False, **changes
    )


def _measured(run, editor, edits, batch, classifier, progress) -> tuple[list[dict], float, float]:
    """Records, and rows and shallow rows of one picture."""
    records, pictures_run = [], 0
    before = editor.pipeline._stages.calls.copy()
    for chunk, filled, pictures in measures.in_batches(edits, batch):
        masks, results = run(filled, pictures)
        records += [measures.judge(*each, classifier) for each in zip(chunk, pictures, masks, results)]
        pictures_run += len(filled)
        progress(len(chunk))
    spent = editor.pipeline._stages.calls - before
    return records, spent["rows"] / pictures_run, spent["shallow_rows"] / pictures_run


def differences(records, others, measure: str, draws: int = 2000) -> list[float]:
    """Mean of the paired differences, and its interval of 95 % by bootstrap over the scenes."""
    pairs = zip(records, others)  # both begin with the same scenes
    values = np.array([float(a[measure]) - float(b[measure]) for a, b in pairs if a[measure] is not None])
    rng = np.random.default_rng(0)
    means = rng.choice(values, (draws, len(values))).mean(1)
    return [float(values.mean()), *(float(x) for x in np.quantile(means, (0.025, 0.975)))]


def _seconds(runs: Mapping[str, Callable], edits) -> dict[str, float]:
    """Median seconds of one picture's edit; the settings take turns, after one edit that compiles."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number, edit in enumerate(edits):
        pictures = [scenes.draw_scene(edit.source).picture]
        for name, run in runs.items():
            start = time.perf_counter()
            run([edit], pictures)
            if number:
                taken[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in taken.items()}


def _rebuilt(editor, edits, batch, settings, seed, progress) -> dict[str, dict[str, float]]:
    """PSNR in dB of the whole pictures, led into noise and back, by inversion and number of steps."""
    table: dict[str, dict[str, float]] = {}
    for name, options in REBUILT.items():
        for steps in REBUILT_STEPS:
            levels = int(steps * settings["strength"])
            values = {"half": -(-levels // 2), "third": -(-levels // 3)}
            chosen = {option: values.get(value, value) for option, value in options.items()}

            def run(some, pictures, steps=steps, chosen=chosen):
                return measures.rebuild(editor, some, pictures, {**settings, "steps": steps}, seed, **chosen)

            table.setdefault(name, {})[str(steps)] = measures.fidelity(run, edits, batch)
            progress(f"{name}, {steps} steps", len(edits))
    return table


def goals(settings: Mapping) -> dict:
    """{goal: {"wanted": text, "reached": text, "passed": bool}}, of the balanced preset."""
    balanced, exact = settings["balanced"], settings["exact"]
    iou, seen = (balanced[name] - exact[name] for name in ("mask_iou", "target_seen"))
    rows = balanced["rows"]
    outcomes = {
        "rows of an edit": ("<= 40", f"{rows:g} (exact: {exact['rows']:g})", rows <= 40),
        "mask IoU against exact": (">= -0.005", f"{iou:+.3f}", iou >= -0.005),
        "target seen against exact": (">= -1%", f"{seen:+.1%}", seen >= -0.01),
    }
    return {
        name: {"wanted": wanted, "reached": reached, "passed": bool(passed)}
        for name, (wanted, reached, passed) in outcomes.items()
    }
