"""Makes the gallery of the documentation: fresh scenes, each edited by one call on the demo checkpoint.

    python scripts/make_gallery.py --scenes 8 --seed 11

Scenes and edits are those of ``evaluate_editing.py`` with the same seed: every second one changes an object's kind, the
others its colour. Nothing is chosen by its result. Writes ``gallery.md`` and ``gallery/NN.png`` into the output folder,
all or none: original, map, mask and edited picture, side by side. ``--dry`` prints the page, loads no model and writes
nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import demo_scenes as scenes  # noqa: E402
from editing_measures import Edit, natural, positive, sample_edit  # noqa: E402

from mindiffedit import demo  # noqa: E402
from mindiffedit.images.sheets import make_image_grid  # noqa: E402
from mindiffedit.images.writing import atomic_path  # noqa: E402

OPTIONS = {
    "num_inference_steps": demo.EDIT_SETTINGS["steps"],
    "inpaint_strength": demo.EDIT_SETTINGS["strength"],
    "guidance_scale": demo.EDIT_SETTINGS["guidance"],
    "mask_thresholding_ratio": demo.EDIT_SETTINGS["mask_threshold"],
}
"""What every ``edit`` is given besides picture, prompts and generator."""

_GAP = 4  # white pixels between the tiles


def load_pipeline():
    from mindiffedit import StableDiffusionDiffEditPipeline

    pipeline = StableDiffusionDiffEditPipeline.from_pretrained(
        demo.checkpoint_folder(), safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tile(values) -> Image.Image:
    """A map or mask (1, h, w) at the scenes' size, black where it is 0 and white at its maximum."""
    values = np.asarray(values, np.float64).squeeze()
    bright = (255 * values / max(values.max(), 1e-12)).round().astype(np.uint8)
    return Image.fromarray(bright).resize((scenes.SIZE, scenes.SIZE), Image.Resampling.NEAREST)


def strip(picture: Image.Image, edited) -> Image.Image:
    """Original, map, mask and edited picture side by side, in at most 256 colours to keep the file small.

    Without dithering one colour stays one colour, so what the edit has not touched looks the same in both pictures.
    """
    tiles = [picture, tile(edited.mask_map), tile(edited.mask_image), edited.images[0]]
    framed = []
    for one in tiles:
        frame = Image.new("RGB", (scenes.SIZE + _GAP, scenes.SIZE), "white")
        frame.paste(one.convert("RGB"), (0, 0))
        framed.append(frame)
    grid = make_image_grid(framed, rows=1, cols=len(framed))
    grid = grid.crop((0, 0, grid.width - _GAP, grid.height))
    return grid.quantize(256, dither=Image.Dither.NONE)


def page(edits: list[Edit], command: str) -> str:
    """``gallery.md``."""
    lines = [
        "# Gallery",
        "",
        "Scenes of rendered objects, edited by one call of `pipeline.edit` each with the demo model (128 × 128",
        "pixels). They are the first of their seed, whatever came out. From left to right: picture, map, mask, and",
        "the edited picture; in 256 colours.",
        "",
        "```bash",
        command,
        "```",
        "",
        "makes this page, with these options in every call: "
        + ", ".join(f"`{name}={value}`" for name, value in OPTIONS.items())
        + ".",
    ]
    for edit in edits:
        lines += [
            "",
            f"**{edit.source.caption}** → **{edit.target.caption}** (`generator={edit.index}`)",
            "",
            f"![picture, map, mask and edited picture]({picture_name(edit)})",
        ]
    return "\n".join(lines) + "\n"


def picture_name(edit: Edit) -> str:
    return f"gallery/{edit.index:02d}.png"


def write(folder: Path, text: str, strips: dict[str, Image.Image]) -> None:
    """Everything or nothing; pictures of an earlier, longer gallery are removed."""
    (folder / "gallery").mkdir(exist_ok=True)
    with contextlib.ExitStack() as drafts:
        for name, picture in strips.items():
            picture.save(drafts.enter_context(atomic_path(folder / name)), format="PNG", optimize=True)
        drafts.enter_context(atomic_path(folder / "gallery.md")).write_text(text, encoding="utf-8")
    for old in (folder / "gallery").iterdir():
        if re.fullmatch(r"\d+\.png", old.name) and f"gallery/{old.name}" not in strips:
            old.unlink()


def main(argv=None, load=load_pipeline) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=positive, default=8, metavar="N", help="how many (default: 8)")
    parser.add_argument("--seed", type=natural, default=11, metavar="N", help="of the scenes (default: 11)")
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE.parent / "docs",
        metavar="DIR",
        help="existing folder of gallery.md and gallery/ (default: docs)",
    )
    parser.add_argument("--dry", action="store_true", help="print the page; load no model, write nothing")
    args = parser.parse_args(argv)
    if not args.output.is_dir():
        parser.error(f"--output has to be an existing folder, but {args.output} is none; create it first")

    edits = [sample_edit(args.seed, index) for index in range(args.scenes)]
    numbers = ["--scenes", str(args.scenes), "--seed", str(args.seed)]
    text = page(edits, shlex.join(["python", "scripts/make_gallery.py", *numbers]))
    if args.dry:
        print(text, end="")
        return 0
    pipeline, strips = load(), {}
    for edit in edits:
        picture = scenes.draw_scene(edit.source).picture
        edited = pipeline.edit(picture, edit.source.caption, edit.target.caption, generator=edit.index, **OPTIONS)
        strips[picture_name(edit)] = strip(picture, edited)
        print(f"{len(strips)}/{len(edits)} {edit.source.caption} -> {edit.target.caption}", file=sys.stderr)
    write(args.output, text, strips)
    print(f"wrote {args.output / 'gallery.md'} and {len(strips)} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
