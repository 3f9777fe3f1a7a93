"""An animation of everything that an edit goes through, to see where it goes wrong."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import PIL.Image

from mindiffedit import options
from mindiffedit.errors import InputError, InputTypeError
from mindiffedit.images import pictures, sheets, writing

EXTENSIONS = (".gif", ".png", ".webp")
MAX_MILLISECONDS = 60000
MAX_TILE = 256  # pixels of a tile's longer side

_LOOPS = {"inverted_latents": "inversion", "edited_latents": "edit"}

__all__ = ["AnimatedStrip", "EXTENSIONS"]


@dataclass
class _Frame:
    """A step: latents (C, h, w) after it, and the noiseless latents it predicted, or None."""

    loop: str
    step: int
    latents: np.ndarray
    clean: np.ndarray | None


class AnimatedStrip:
    """Writes what an edit goes through as an animation: [map | mask | latents | predicted picture], a frame a step.

    A context manager around calls of the pipeline, which writes the file when the block ends well and nothing when it
    fails:

        with AnimatedStrip(pipeline, "strip.gif"):
            pipeline.edit(image, source_prompt, target_prompt)

    It is also a debugging callback, for ``pipeline.debugging(strip)`` and ``edit(debug_callback=strip)``; ``save()``
    then writes the file. Of a batch it shows picture 0. Map and mask are missing where none was computed; white in the
    map is where it is clamped.

    Args:
        pipeline: the ``StableDiffusionDiffEditPipeline`` that is watched.
        path: of the file: .gif, .png (animated PNG) or .webp.
        every: one frame for so many steps; the last of each loop is always there.
        milliseconds: time of a frame, 1 to 60000; GIF knows tens only.
        decode: show latents and prediction through the VAE, two decodings for each frame; otherwise their first three
            channels, each from its 1st to its 99th percentile over black to white.

    Raises:
        ValueError, TypeError: an argument that does not fit, a path that cannot be written.
    """

    def __init__(self, pipeline, path, *, every: int = 1, milliseconds: int = 200, decode: bool = True):
        if not callable(getattr(pipeline, "debugging", None)):
            raise InputTypeError(
                "{parameter} has to be a StableDiffusionDiffEditPipeline, but is {value!t}.", "pipeline", value=pipeline
            )
        self.path = writing.check_output_path(path, EXTENSIONS)
        self.every = options.check_positive_int("every", every)
        self.milliseconds = options.check_steps(milliseconds, "milliseconds", MAX_MILLISECONDS)
        self.decode = options.check_switch(decode, "decode")
        self.pipeline = pipeline
        self._forget()

    def _forget(self) -> None:
        self._map: np.ndarray | None = None
        self._clamp: float | None = None  # of the map
        self._mask: np.ndarray | None = None
        self._clean: tuple[int | None, np.ndarray] | None = None  # of the step under way
        self._loops: list[list[_Frame]] = []
        self._watching = contextlib.ExitStack()

    # --- watching ------------------------------------------------------------------------------------------------

    def __call__(self, stage: str, array: np.ndarray, step: int | None) -> None:
        """Keeps what an animation needs of an intermediate; see ``StableDiffusionDiffEditPipeline.debugging``.

        Args:
            stage: name of the intermediate.
            array: its values, of a batch.
            step: counts from 0 within a loop, None outside.
        """
        if stage == "map":
            self._map, self._clamp = np.array(array[0]), None
        elif stage == "clamp_magnitude":
            self._clamp = float(np.ravel(array)[0])
        elif stage == "mask":
            self._mask = np.array(array[0])
        elif stage == "clean_predictions":
            self._clean = (step, np.array(array[0]))
        elif stage in _LOOPS and step is not None:
            if step == 0 or not self._loops:
                self._loops.append([])
            clean = self._clean[1] if self._clean is not None and self._clean[0] == step else None
            self._clean = None
            self._loops[-1].append(_Frame(_LOOPS[stage], step, np.array(array[0]), clean))

    def __enter__(self) -> AnimatedStrip:
        self._forget()
        self._watching.enter_context(self.pipeline.debugging(self))
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._watching.close()
        if kind is None:
            self.save()
        self._forget()

    # --- drawing -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes what was seen, whole or not at all.

        Raises:
            ValueError: nothing was seen.
        """
        drawn = self._drawn()
        kind = {".gif": "GIF", ".png": "PNG", ".webp": "WEBP"}[self.path.suffix.lower()]
        with writing.atomic_path(self.path) as draft:
            drawn[0].save(
                draft, format=kind, save_all=True, append_images=drawn[1:], duration=self.milliseconds, loop=0
            )

    def _drawn(self) -> list[PIL.Image.Image]:
        """The frames, all of one size."""
        shown = [
            (frame, len(loop))
            for loop in self._loops
            for frame in loop
            if frame.step % self.every == 0 or frame is loop[-1]
        ]
        grids = [x for x in (self._map, self._mask, *(frame.latents for frame, _ in shown)) if x is not None]
        if not grids:
            raise InputError(
                "there is nothing to animate: no call of the pipeline was watched; call it within the block."
            )
        width, height = self._tile_size(grids[0].shape[-2:])
        masks = []
        if self._map is not None:
            clamp = self._clamp or float(self._map.max()) or 1
            masks.append(("map", np.clip(self._map / clamp, 0, 1)))
        if self._mask is not None:
            masks.append(("mask", self._mask))
        nearest = PIL.Image.Resampling.NEAREST
        head = [(name, pictures.mask_to_pil(values)[0].resize((width, height), nearest)) for name, values in masks]
        strips = []
        for frame, count in shown:
            where = f"{frame.loop}, step {frame.step + 1} of {count}"
            tiles = [
                (f"{where}: {what}", self._picture(latents).resize((width, height), self._resample))
                for what, latents in (("latents", frame.latents), ("predicted picture", frame.clean))
                if latents is not None
            ]
            strips.append(sheets.labelled_grid([*head, *tiles], smallest_side=1))
        if not strips:
            strips = [sheets.labelled_grid(head, smallest_side=1)]
        return _one_size(strips)

    def _tile_size(self, grid: tuple[int, ...]) -> tuple[int, int]:
        """Width and height of a tile: the picture's, made smaller or, by a whole factor, larger for the captions."""
        height, width = (side * self.pipeline.vae_scale_factor for side in grid)
        longer = max(width, height)
        if longer > MAX_TILE:
            return max(1, width * MAX_TILE // longer), max(1, height * MAX_TILE // longer)
        factor = max(1, MAX_TILE // longer)
        return width * factor, height * factor

    @property
    def _resample(self) -> int:
        return PIL.Image.Resampling.LANCZOS if self.decode else PIL.Image.Resampling.NEAREST

    def _picture(self, latents: np.ndarray) -> PIL.Image.Image:
        """Latents (C, h, w) decoded, or their first three channels."""
        if self.decode:
            # Straight to the stage: what is only looked at does not cross to observers again.
            unscaled = latents[None] / np.float32(self.pipeline.vae.config.scaling_factor)
            return pictures.postprocess_image(self.pipeline._stages.decode_latents(unscaled), "pil")[0]
        channels = latents[:3] if len(latents) >= 3 else np.repeat(latents[:1], 3, axis=0)
        low, high = np.percentile(channels, (1, 99), axis=(1, 2), keepdims=True)
        levels = (channels - low) / np.maximum(high - low, 1e-6)
        return pictures.of_arrays(np.clip(levels, 0, 1).transpose(1, 2, 0)[None])[0]


def _one_size(strips: list[PIL.Image.Image]) -> list[PIL.Image.Image]:
    """The frames on white of the largest's size, tiles over tiles: a caption may take a line more in one of them."""
    width, height = (max(strip.size[i] for strip in strips) for i in range(2))
    framed = []
    for strip in strips:
        frame = PIL.Image.new("RGB", (width, height), "white")
        frame.paste(strip, (0, height - strip.height))
        framed.append(frame)
    return framed
