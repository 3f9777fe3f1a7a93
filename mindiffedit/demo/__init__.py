"""The demo: a small Stable-Diffusion-layout checkpoint, pictures to edit, and settings that suit both.

Nothing is imported here but the standard library, so the command line can print these as defaults without
starting MindSpore.
"""

from __future__ import annotations

from pathlib import Path

__all__ = [
    *("EDIT_SETTINGS", "EXAMPLES", "SAMPLE_PROMPTS", "SETTINGS"),
    *("checkpoint_folder", "golden_file", "sample_picture"),
]

_HERE = Path(__file__).resolve().parent

EXAMPLES = {
    "fruits": ("fruits", "a bowl of fruits", "a bowl of pears"),
    "basket": ("fruits", "a bowl of fruits", "a basket of pears"),
    "strawberries": ("strawberries", "a bowl of strawberries", "a bowl of apples"),
    "cat": ("cat", "a cat on grass", "a dog on grass"),
    "car": ("car", "a red car on sand", "a blue car on sand"),
    "removal": ("cat", "a cat on grass", "grass"),
}
"""Edits that the demo knows, by name: a picture, what it shows, and what the demo turns it into."""

SAMPLE_PROMPTS = dict(zip(("source", "target"), EXAMPLES["fruits"][1:]))
"""What the sample picture shows, and what the demo turns it into: the texts of the first example."""

SETTINGS = {
    "steps": 20,
    "strength": 0.9,
    "guidance": 5.0,
    "invert_guidance": 1.0,
    "maps": 10,
    "mask_strength": 0.8,
    "mask_threshold": 3.0,
}
"""Settings that suit the demo checkpoint, under the command line's names.

They map to the pipeline's parameters as follows: ``steps`` is ``num_inference_steps`` everywhere;
``strength`` is ``inpaint_strength`` of ``invert`` and of the call; ``guidance`` is ``guidance_scale``
of the mask and the edit, ``invert_guidance`` that of ``invert`` (the paper inverts without guidance);
``maps``, ``mask_strength`` and ``mask_threshold`` are ``num_maps_per_mask``,
``mask_encode_strength`` and ``mask_thresholding_ratio`` of ``generate_mask``.
"""

EDIT_SETTINGS = {**SETTINGS, "maps": 2, "mask_strength": 0.7, "mask_threshold": 2.0}
"""The same for ``edit``, whose masks are smoothed and follow the edges: fewer maps at a lower noise level do."""


def checkpoint_folder() -> Path:
    """The folder of the demo checkpoint, to be given to ``from_pretrained``."""
    return _found(_HERE / "checkpoint")


def golden_file() -> Path:
    """What PyTorch diffusers computed for a short edit of the sample, a golden file of ``mindiffedit parity``."""
    return _found(_HERE / "golden.safetensors")


def sample_picture(example: str = "fruits") -> Path:
    """The picture of an example, a PNG file, described by the second entry of ``EXAMPLES[example]``.

    Raises:
        KeyError: there is no such example.
    """
    return _found(_HERE / f"{EXAMPLES[example][0]}.png")


def _found(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing from this installation of mindiffedit. Install the package again; in a "
            "working copy, make it with scripts/train_demo_checkpoint.py."
        )
    return path
