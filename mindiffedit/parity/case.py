"""One edit to record and to replay: the arguments of the three calls, and the observer that keeps their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mindiffedit import solvers

Seeds = int | list[int]

CALLS = ("mask", "invert", "edit")
"""``generate_mask``, ``invert`` and the pipeline's ``__call__``, in the order in which they are run."""


@dataclass
class Case:
    """What is given to both implementations.

    Attributes:
        image: picture(s) as the calls take them.
        mask, invert, edit: keyword arguments of the three calls but for pictures, masks, latents, generators and output
            kinds; embeddings as float32 arrays. None leaves a call out. ``edit`` may bring ``mask_image`` (an array)
            where there is no mask call.
        seeds: for each call a seed, or a list of seeds for as many generators.
        scheduler: class name of the denoising scheduler; the inversion's belongs to it, or is DDIM's.
        scheduler_options: set on top of the model's own scheduler configuration.
    """

    image: Any
    mask: dict[str, Any] | None = None
    invert: dict[str, Any] | None = None
    edit: dict[str, Any] | None = None
    seeds: dict[str, Seeds] = field(default_factory=lambda: {call: 0 for call in CALLS})
    scheduler: str = solvers.CLASSES["ddim"][0]
    scheduler_options: dict[str, Any] = field(default_factory=dict)

    @property
    def inverse_scheduler(self) -> str:
        """Class name of the inversion's scheduler."""
        return solvers.inverse_name(self.scheduler)

    def described(self) -> dict[str, Any]:
        """All but the pictures, for a manifest: plain values that JSON can hold."""
        return {name: value for name, value in vars(self).items() if name != "image"}


class Tape:
    """An observer of the pipeline: keeps every array that crosses a stage, and can put others in their place.

    Args:
        substitutes: values by name (loops: stacked by step); a stage that has one is left with it instead of its own.
    """

    def __init__(self, substitutes: Mapping[str, np.ndarray] | None = None):
        self.call = ""
        self._substitutes = substitutes or {}
        self._whole: dict[str, Any] = {}

    def __call__(self, stage: str, array, step: int | None = None) -> np.ndarray:
        """Keeps a copy of ``array`` under the current call's name; returns it or its substitute."""
        array = np.asarray(array)
        self.keep(stage, array, step)
        other = self.substitute(stage, step)
        return array if other is None or other.shape != array.shape else other.astype(array.dtype)

    def keep(self, stage: str, array: np.ndarray, step: int | None = None) -> None:
        """Keeps a copy, no more."""
        name = f"{self.call}/{stage}"
        if step is None:
            self._whole[name] = np.array(array)
        else:
            self._whole.setdefault(name, []).append(np.array(array))

    def substitute(self, stage: str, step: int | None = None) -> np.ndarray | None:
        """What is to stand in place of a stage's value; None where nothing is."""
        other = self._substitutes.get(f"{self.call}/{stage}")
        if other is None or step is None:
            return other
        return other[step] if step < len(other) else None

    def trace(self) -> dict[str, np.ndarray]:
        """Name -> array in the order of first appearance; what came step by step is stacked along a new first axis."""
        return {name: np.stack(value) if isinstance(value, list) else value for name, value in self._whole.items()}
