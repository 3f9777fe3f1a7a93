"""Measures how well a checkpoint edits: mask, target, background and reconstruction, in numbers.

    python scripts/evaluate_editing.py --scenes 200 --seed 7 --json results.json

Fresh scenes are drawn with ``demo_scenes`` (their true object masks are known), one object of each is given
another kind (every second scene) or another colour (the others) by changing the prompt, and the three calls
of ``StableDiffusionDiffEditPipeline`` do the edit with the reference's behaviour and the demo's settings: the
source prompt is the caption for ``invert`` and the negative prompt of the edit. Progress goes to stderr, the
table to stdout. ``--reference`` runs the same edits with diffusers (needs torch). ``--compare`` sets the
reference's behaviour against ``edit()``, see ``compare_editing.py``; ``--pareto`` the presets of ``edit()`` and each
of their savings against each other, see ``pareto_editing.py``.

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
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import compare_editing
import editing_measures as measures
import numpy as np
import pareto_editing
import reports
import scene_classifier
from PIL import Image

from mindiffedit import demo

GOALS = {"mask_iou": 0.62, "target_seen": 0.85, "psnr_outside": 27.0}
"""What the demo checkpoint has to reach."""


# --- the evaluation -------------------------------------------------------------------------------


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
    edits = [measures.sample_edit(seed, index) for index in range(count)]
    records, kept = [], []
    for chunk, filled, pictures in measures.in_batches(edits, batch):
        masks, results = measures.three_calls(editor, filled, pictures, settings, seed)
        for each in zip(chunk, pictures, masks, results):
            records.append(measures.judge(*each, classifier))
            if len(kept) < keep_pictures:
                kept.append(each)
        progress(len(records), count)

    def rebuild(some, pictures):
        return measures.rebuild(editor, some, pictures, settings, seed)

    results = {
        "all": measures.averages(records),
        **{
            what: measures.averages([record for record in records if record["what"] == what])
            for what in dict.fromkeys(measures.WHATS)
        },
    }
    part = edits[:reconstructions]
    results["reconstruction"] = {
        "pictures": len(part),
        "psnr_vae": measures.fidelity(lambda _, pictures: editor.vae_round_trip(pictures), part, batch),
        "psnr_inversion": measures.fidelity(rebuild, part, batch),
    }
    results["goals"] = {
        name: {"goal": goal, "reached": results["all"][name], "passed": bool(results["all"][name] >= goal)}
        for name, goal in GOALS.items()
    }
    results["records"] = records
    return results, kept


ROWS = (
    ("mask IoU, what changes", "mask_iou", "{:.3f}"),
    ("mask IoU, old object", "mask_iou_old", "{:.3f}"),
    ("share of the picture masked", "mask_share", "{:.1%}"),
    ("target seen (kind and colour)", "target_seen", "{:.1%}"),
    ("removed object gone", "removed", "{:.1%}"),
    ("  judge on unedited pictures", "seen_unedited", "{:.1%}"),
    ("  judge on drawn targets", "seen_drawn", "{:.1%}"),
    ("PSNR outside what changes, dB", "psnr_outside", "{:.2f}"),
    ("PSNR of vacated ground, dB", "psnr_vacated", "{:.2f}"),
)


def table(results: dict) -> str:
    """The results as lines of text."""

    groups = ("all", *dict.fromkeys(measures.WHATS))
    lines = [f"{'':34}" + "".join(f"{name:>9}" for name in groups) + "   goal"]
    lines.append(f"{'edits':34}" + "".join(f"{results[g]['edits']:>9}" for g in groups))
    for label, name, pattern in ROWS:
        line = f"{label:34}" + "".join(f"{reports.show(results[g][name], pattern):>9}" for g in groups)
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
    from mindiffedit import masks

    rows = []
    for edit, picture, mask, edited in kept:
        shown = Image.fromarray(measures.enlarged(mask).astype(np.uint8) * 255)
        rows.append([picture, shown, edited, measures.scenes.draw_scene(edit.target).picture])
    captions = [edit.target.caption for edit, *_ in kept]
    return masks.contact_sheet(rows, captions, ["original", "mask", "edited", "as drawn"])


class Progress:
    """One line on stderr that counts up."""

    def __init__(self):
        self.started = time.monotonic()

    def __call__(self, done: int, of: int) -> None:
        left = (time.monotonic() - self.started) / done * (of - done)
        end = "\n" if done == of or not sys.stderr.isatty() else ""
        start = "\r" if sys.stderr.isatty() else ""
        print(f"{start}{done}/{of} edits, about {left:.0f} s left   ", end=end, file=sys.stderr, flush=True)


KNOBS = (
    ("steps", measures.positive, "denoising steps of the whole schedule"),
    ("strength", float, "inpaint_strength of inversion and edit"),
    ("guidance", float, "guidance scale of mask and edit"),
    ("invert_guidance", float, "guidance scale of the inversion"),
    ("maps", measures.positive, "noise maps per mask"),
    ("mask_strength", float, "noise level of the mask"),
    ("mask_threshold", float, "mask_thresholding_ratio"),
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = demo.SETTINGS
    add = parser.add_argument
    add("--scenes", type=measures.positive, default=200, help="number of scenes, each edited once (200)")
    add("--seed", type=measures.natural, default=7, help="decides scenes, edits and noise (7)")
    add("--model", default="demo", help="'demo' or a checkpoint folder")
    add("--classifier", type=Path, default=scene_classifier.WEIGHTS, help="weights of the judge")
    add("--batch", type=measures.positive, default=8, help="pictures inverted and edited together (8)")
    add("--reconstructions", type=measures.natural, default=16, help="pictures to measure reconstruction on (16)")
    add("--mode", choices=("graph", "pynative"), default="graph")
    add("--reference", action="store_true", help="use diffusers and torch instead of this project")
    for name, kind, text in KNOBS:
        default = known.get(name)
        shown = "that of --guidance" if default is None else default
        add(f"--{name.replace('_', '-')}", type=kind, default=default, help=f"{text} ({shown})")
    add("--compare", action="store_true", help="the three calls against edit(), with an ablation")
    add("--pareto", action="store_true", help="rows, seconds and quality of edit()'s presets and of each saving")
    add(
        "--ablation",
        type=measures.natural,
        default=100,
        help="with --compare or --pareto: scenes of what is changed alone (100)",
    )
    add(
        "--timed",
        type=measures.natural,
        default=20,
        help="with --compare or --pareto: edits whose seconds are measured (20)",
    )
    add("--json", type=Path, metavar="FILE", help="write settings, means and every edit's figures")
    add(
        "--sheet",
        type=Path,
        metavar="PNG",
        help="write the first twelve edits as one picture; with --compare the first four of each party",
    )
    add(
        "--write",
        action="store_true",
        help="with --compare or --pareto: add the run to docs/benchmarks.json, and to the page",
    )
    add("--check", action="store_true", help="exit with 1 when a goal is missed")
    return parser


def shown_command(args) -> str:
    """The command that was run with --compare or --pareto, without the folders of this machine."""
    words = [
        "--pareto" if args.pareto else "--compare",
        f"--scenes {args.scenes}",
        f"--seed {args.seed}",
        f"--ablation {args.ablation}",
    ]
    words.append(f"--timed {args.timed}")
    if args.pareto:
        words.append(f"--reconstructions {args.reconstructions}")
    return " ".join(["python scripts/evaluate_editing.py", *words])


def scope(args) -> dict:
    """What is measured with --compare or --pareto."""
    return dict(
        count=args.scenes,
        seed=args.seed,
        batch=args.batch,
        ablation=min(args.ablation, args.scenes),
        rebuilt=min(args.reconstructions, args.scenes),
        timed=min(args.timed, args.scenes - 1),
        progress=lambda name, done: print(f"{name}: {done} edits", file=sys.stderr, flush=True),
    )


def compare(args, editor, classifier, settings) -> tuple[dict, str]:
    """``--compare``: what was measured, and as text."""
    results, sheet = compare_editing.compare(editor, classifier, settings, **scope(args))
    if args.sheet:
        sheet.quantize(256, dither=Image.Dither.NONE).save(args.sheet, optimize=True)
    if args.write:
        write_run(args, "comparison", results)
    return results, "\n\n".join(reports.comparison_tables(results).values())


def pareto(args, editor, classifier, settings) -> tuple[dict, str]:
    """``--pareto``: the same."""
    results = pareto_editing.pareto(editor, classifier, settings, **scope(args))
    if args.write:
        write_run(args, "pareto", results)
    return results, "\n\n".join(reports.pareto_tables(results).values())


def write_run(args, kind: str, results: dict) -> None:
    """Adds a run to the data, but for the single edits' figures."""
    from importlib.metadata import version

    versions = {name: version(name) for name in ("mindspore", "mindone")}
    measured = {name: value for name, value in results.items() if name != "records"}
    reports.add_run({**reports.heading(kind, shown_command(args), versions), **measured})


def evaluated(args, editor, classifier, settings) -> tuple[dict, str]:
    """Without ``--compare``: the same."""
    start = time.monotonic()
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
    library = "diffusers" if args.reference else "mindiffedit"
    results = {"library": library, "seconds": round(time.monotonic() - start, 1)} | results
    if args.sheet:
        contact_sheet(kept).save(args.sheet)
    scope = f"{library}, model {args.model}, seed {args.seed}, {results['seconds']:.0f} s, "
    return results, scope + ", ".join(f"{name} {value:g}" for name, value in settings.items()) + "\n" + table(results)


def main(arguments=None) -> int:
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.compare and args.pareto:
        parser.error("--compare and --pareto are two evaluations: give one.")
    if (args.compare or args.pareto) and args.reference:
        parser.error("--compare and --pareto are of this project's ways, and diffusers has one: give one.")
    settings = {name: getattr(args, name) for name, _, _ in KNOBS}
    if settings["invert_guidance"] is None:  # as in the reference, where both have one default
        settings["invert_guidance"] = settings["guidance"]
    classifier = scene_classifier.SceneClassifier.load(args.classifier)
    model = demo.checkpoint_folder() if args.model == "demo" else Path(args.model)
    editor = (measures.ReferenceEditor if args.reference else measures.MindSporeEditor)(model, args.mode)
    results, text = (pareto if args.pareto else compare if args.compare else evaluated)(
        args, editor, classifier, settings
    )
    print(text)
    if args.json:
        results = {"scenes": args.scenes, "seed": args.seed, "model": args.model, "settings": settings} | results
        reports.write_whole(args.json, json.dumps(results, indent=1) + "\n")
    missed = [name for name, goal in results["goals"].items() if not goal["passed"]]
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
