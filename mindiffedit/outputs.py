"""What the pipeline's calls return: diffusers' output objects."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, List, Optional, Union

import numpy as np
import PIL.Image


class _Output:
    """Attributes, and a mapping of those that are not None with access by position: diffusers' outputs."""

    def keys(self) -> List[str]:
        """Names of the values that are not None, in order."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]

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
    """

    latents: Any
    images: Optional[Union[List[PIL.Image.Image], np.ndarray]] = None


@dataclass
class StableDiffusionPipelineOutput(_Output):
    """What a call of the pipeline returns.

    Attributes:
        images: list of B pictures, array (B, H, W, 3) in [0, 1], or latents tensor (B, C, h, w).
        nsfw_content_detected: one bool for each picture, or None without a safety checker.
    """

    images: Any
    nsfw_content_detected: Optional[List[bool]] = None
