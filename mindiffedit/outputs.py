"""What the pipeline's calls return: diffusers' output objects."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import PIL.Image


@dataclass
class _Output:
    """Attributes, and a mapping of those that are not None with access by position: diffusers' outputs."""

    def keys(self) -> list[str]:
        """Names of the values that are not None, in order."""
        named = (f.name for f in fields(self) if not f.metadata.get("beside"))
        return [name for name in named if getattr(self, name) is not None]

    def to_tuple(self) -> tuple:
        """The values that are not None, in order."""
        return tuple(getattr(self, name) for name in self.keys())

    def __getitem__(self, key):
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __contains__(self, key) -> bool:
        return key in self.keys()

    def __iter__(self):
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@dataclass
class DiffEditInversionPipelineOutput(_Output):
    """What ``invert`` returns.

    Attributes:
        latents: mindspore.Tensor (B, T, C, h, w), noisiest first.
        images: decoded latents (list of B * T pictures, or array (B * T, H, W, 3) in [0, 1]), or None.
        clean_latents: mindspore.Tensor (B, C, h, w), where the inversion began; for the call's argument of that name.
            No part of the tuple or the mapping, which are the reference's.
    """

    latents: Any
    images: list[PIL.Image.Image] | np.ndarray | None = None
    clean_latents: Any = field(default=None, metadata={"beside": True})


@dataclass
class StableDiffusionPipelineOutput(_Output):
    """What a call of the pipeline returns.

    Attributes:
        images: list of B pictures, array (B, H, W, 3) in [0, 1], or latents tensor (B, C, h, w).
        nsfw_content_detected: one bool for each picture, or None without a safety checker.
    """

    images: Any
    nsfw_content_detected: list[bool] | None = None


@dataclass
class EditReport:
    """What an edit says about itself. Lists have an entry for each of the B pictures.

    Attributes:
        mask_coverage: share of the latents that the mask marks, 0 to 1.
        inversion_error: how far a step back from the inverted latents misses where the inversion came from, the rms
            error over the rms of the latents, at the noisiest step, times the number of steps; None without an
            inversion.
        reconstruction_psnr: dB between the picture and what inversion and denoising with the source prompt give back;
            None unless ``measure_reconstruction``.
        change_outside: rms difference of result and picture outside the feathered mask, in levels of 255; None
            without a picture in pixels. 0 with ``paste_back``.
        change_outside_before_paste_back: the same of what the model gave.
        seconds: wall time by stage: "mask", "inversion", "edit", and "reconstruction" where it was measured.
        warnings: sentences that say what looks wrong and which option to change.
    """

    mask_coverage: list[float]
    inversion_error: list[float] | None = None
    reconstruction_psnr: list[float] | None = None
    change_outside: list[float] | None = None
    change_outside_before_paste_back: list[float] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass
class DiffEditOutput(_Output):
    """What ``edit`` returns.

    Attributes:
        images: list of B pictures, array (B, H, W, 3) in [0, 1], or latents tensor (B, C, h, w).
        mask_image: array (B, h, w) on the latents' grid, 1 where the picture may change; float32 with soft masks.
        mask_map: float32 (B, h, w), the averaged noise difference that the mask was made of; None with an own mask.
        image_latents: mindspore.Tensor (B, T, C, h, w), what the background was taken from, noisiest first.
        latents: mindspore.Tensor (B, C, h, w), the edited latents.
        report: ``EditReport``.
        nsfw_content_detected: one bool for each picture, or None without a safety checker.
        clean_latents: mindspore.Tensor (B, C, h, w), where the inversion began. With ``image_latents`` it makes the
            ``DiffEditInversionPipelineOutput`` of another edit. No part of the tuple or the mapping.
    """

    images: Any
    mask_image: np.ndarray
    mask_map: np.ndarray | None
    image_latents: Any
    latents: Any
    report: EditReport
    nsfw_content_detected: list[bool] | None = None
    clean_latents: Any = field(default=None, metadata={"beside": True})
