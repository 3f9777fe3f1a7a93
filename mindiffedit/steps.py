"""The compiled stages: pure functions, tensors in and out, over the models of one pipeline.

Whatever changes between steps, prompts, seeds or guidance values is a tensor argument, so nothing compiles again
while shapes stay the same. What selects a formula (solver, prediction type, guidance on or off) is fixed when a stage
is built. In mode "pynative" the same functions run operator by operator.
"""

from __future__ import annotations

from typing import Callable, Dict, Optional

import mindspore as ms
import numpy as np
from mindspore import ops

from . import devices
from .kernels import portable_kernels
from .schedules import StepPlan


class Stages:
    """The stages over one set of models, each built once for every combination of its fixed choices.

    Args:
        unet, vae, text_encoder: mindone models.
        mode: "graph" (each stage is one compiled graph) or "pynative".
    """

    def __init__(self, unet, vae, text_encoder, mode: str):
        self.unet, self.vae, self.text_encoder, self.mode = unet, vae, text_encoder, mode
        self._built: Dict[tuple, Callable] = {}

    def serves(self, unet, vae, text_encoder, mode: str) -> bool:
        """Whether these stages were built over exactly these models, in this mode."""
        same = self.unet is unet and self.vae is vae and self.text_encoder is text_encoder
        return same and self.mode == mode

    def forget(self) -> None:
        """Drops every built stage; for a change inside a model that its graph would not notice."""
        self._built.clear()

    # --- the stages, called with NumPy arrays or tensors ---------------------------------------------------------

    def encode_text(
        self, token_ids: np.ndarray, attention_mask: Optional[np.ndarray], skip: Optional[int]
    ) -> np.ndarray:
        """Hidden states (B, L, D) float32 of token ids (B, L).

        One row at a time: the graph then serves every batch size. ``skip`` takes the output ``skip`` layers before
        the last, with the final layer norm (``clip_skip``).
        """
        stage = self._stage(
            ("text", skip, attention_mask is not None), lambda: _text(self.text_encoder, skip)
        )
        rows, known = [], {}
        for i, row in enumerate(token_ids):
            mask = None if attention_mask is None else attention_mask[i : i + 1]
            key = (row.tobytes(), None if mask is None else mask.tobytes())
            if key not in known:
                arguments = [ms.Tensor(row[None], ms.int32)]
                if mask is not None:
                    arguments.append(ms.Tensor(mask, ms.int32))
                known[key] = _host(stage(*arguments))
            rows.append(known[key])
        return np.concatenate(rows)

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """VAE posterior moments (B, 2 C, h, w) float32 (mean, then log-variance) of pixels (B, 3, H, W) in [-1, 1].

        One picture at a time, which bounds the memory and serves every batch size with one graph.
        """
        # Tiling runs operator by operator: mindone blends tiles in place and reads them again, which a graph does not
        # reproduce (it compiles, and gives other values).
        stage = self._stage(
            ("encode",), lambda: _encoder(self.vae), eager=bool(getattr(self.vae, "use_tiling", False))
        )
        return np.concatenate(
            [_host(stage(self._sample(pixels[i : i + 1], self.vae))) for i in range(len(pixels))]
        )

    def decode_latents(self, latents: np.ndarray) -> np.ndarray:
        """Pixels (B, 3, H, W) float32, about [-1, 1], of unscaled latents (B, C, h, w); one at a time."""
        stage = self._stage(
            ("decode",), lambda: _decoder(self.vae), eager=bool(getattr(self.vae, "use_tiling", False))
        )
        return np.concatenate(
            [_host(stage(self._sample(latents[i : i + 1], self.vae))) for i in range(len(latents))]
        )

    def predict(self, latents, timestep, prompt_embeds, attention_kwargs) -> np.ndarray:
        """Bare model output, float32, of latents (N, C, h, w) at one timestep with embeddings (N, L, D)."""
        stage = self._stage(
            ("predict", _key(attention_kwargs)), lambda: _predictor(self.unet, attention_kwargs)
        )
        return _host(
            stage(
                self._sample(latents, self.unet), _timestep(timestep), self._sample(prompt_embeds, self.unet)
            )
        )

    def guided(
        self, latents, timestep, prompt_embeds, guidance_scale, is_guided, attention_kwargs
    ) -> ms.Tensor:
        """Model output after guidance, float32 (B, C, h, w); for schedulers that step by themselves."""
        stage = self._stage(
            ("guided", is_guided, _key(attention_kwargs)),
            lambda: _guided(self.unet, is_guided, attention_kwargs),
        )
        return stage(
            latents, _timestep(timestep), self._sample(prompt_embeds, self.unet), _scalar(guidance_scale)
        )

    def step(self, plan: StepPlan, is_guided: bool, attention_kwargs) -> Callable:
        """The whole step: UNet, guidance, solver update, blend. See ``_step`` for its arguments."""
        choices = (plan.solver, plan.prediction_type, plan.clip, is_guided)
        return self._stage(
            ("step", *choices, _key(attention_kwargs)), lambda: _step(self.unet, *choices, attention_kwargs)
        )

    # --- building ------------------------------------------------------------------------------------------------

    def _stage(self, key: tuple, build: Callable[[], Callable], eager: bool = False) -> Callable:
        eager = eager or self.mode == "pynative"
        key = (*key, eager)
        if key not in self._built:
            self._built[key] = _run_eagerly(build()) if eager else _run_compiled(build())
        return self._built[key]

    @staticmethod
    def _sample(array, model) -> ms.Tensor:
        """A tensor in the model's dtype."""
        tensor = array if isinstance(array, ms.Tensor) else ms.Tensor(np.ascontiguousarray(array))
        return tensor.astype(model.dtype) if tensor.dtype != model.dtype else tensor


def _run_compiled(function: Callable) -> Callable:
    compiled = ms.jit(function)

    def run(*arguments):
        with portable_kernels():  # a call with new shapes compiles
            return compiled(*arguments)

    return run


def _run_eagerly(function: Callable) -> Callable:
    def run(*arguments):
        with portable_kernels(), devices.eager():
            return function(*arguments)

    return run


def _host(tensor: ms.Tensor) -> np.ndarray:
    return tensor.astype(ms.float32).asnumpy()


def _scalar(value) -> ms.Tensor:
    return ms.Tensor(float(value), ms.float32)


def _timestep(value) -> ms.Tensor:
    return ms.Tensor(value.item() if hasattr(value, "item") else value, ms.float32)


def _key(attention_kwargs: dict):
    """A hashable key for constants that are compiled in; ``options.check_attention_kwargs`` has seen to the types."""
    return tuple(sorted((k, type(v).__name__, v) for k, v in attention_kwargs.items()))


# --- pure functions ----------------------------------------------------------------------------------------------


def _text(text_encoder, skip):
    def hidden(token_ids, attention_mask=None):
        if skip is None:
            return text_encoder(token_ids, attention_mask=attention_mask)[0]
        layers = text_encoder(token_ids, attention_mask=attention_mask, output_hidden_states=True)[-1]
        return text_encoder.text_model.final_layer_norm(layers[-(skip + 1)])

    return hidden


def _encoder(vae):
    def moments(pixels):
        return vae.encode(pixels)[0]

    return moments


def _decoder(vae):
    def pixels(latents):
        return vae.decode(latents)[0]

    return pixels


def _predictor(unet, attention_kwargs):
    kwargs = attention_kwargs or None

    def predict(latents, timestep, prompt_embeds):
        return unet(latents, timestep, prompt_embeds, cross_attention_kwargs=kwargs)[0]

    return predict


def _guided(unet, is_guided, attention_kwargs):
    predict = _predictor(unet, attention_kwargs)

    def guided(latents, timestep, prompt_embeds, guidance_scale):
        # The update is computed in float32 whatever the UNet's dtype: a few small operators, no loss of accuracy.
        samples = latents.astype(prompt_embeds.dtype)
        if not is_guided:
            return predict(samples, timestep, prompt_embeds).astype(ms.float32)
        batch = latents.shape[0]
        both = predict(ops.cat((samples, samples), axis=0), timestep, prompt_embeds).astype(ms.float32)
        unconditional, conditional = both[:batch], both[batch:]
        return unconditional + guidance_scale * (conditional - unconditional)

    return guided


def _clean_prediction(prediction_type):
    """x0 from the model output; ``scale`` and ``spread`` are sqrt(alpha_t) and sqrt(1 - alpha_t)."""

    def from_epsilon(latents, output, scale, spread):
        return (latents - spread * output) / scale

    def from_v(latents, output, scale, spread):
        return scale * latents - spread * output

    def from_sample(latents, output, scale, spread):
        return output

    return {"epsilon": from_epsilon, "v_prediction": from_v, "sample": from_sample}[prediction_type]


def _noise_prediction(prediction_type):
    """epsilon from the model output."""

    def from_epsilon(latents, output, scale, spread):
        return output

    def from_v(latents, output, scale, spread):
        return scale * output + spread * latents

    def from_sample(latents, output, scale, spread):
        return (latents - scale * output) / spread

    return {"epsilon": from_epsilon, "v_prediction": from_v, "sample": from_sample}[prediction_type]


def _update(solver, prediction_type, clip):
    """One solver update: latents, model output, previous x0, coefficients, noise -> new latents, this x0."""
    clean_prediction, noise_prediction = _clean_prediction(prediction_type), _noise_prediction(
        prediction_type
    )

    def ddim(latents, output, previous_clean, c, noise):
        clean = clean_prediction(latents, output, c[0], c[1])
        if clip is not None:
            clean = ops.clamp(clean, -clip, clip)
        direction = c[3] * noise_prediction(latents, output, c[0], c[1])
        return c[2] * clean + direction + c[4] * noise, clean

    def dpm(latents, output, previous_clean, c, noise):
        clean = clean_prediction(latents, output, c[0], c[1])
        return c[2] * latents + c[3] * clean + c[4] * (clean - previous_clean), clean

    return {"ddim": ddim, "dpm": dpm}[solver]


def _step(unet, solver, prediction_type, clip, is_guided, attention_kwargs):
    guided, update = _guided(unet, is_guided, attention_kwargs), _update(solver, prediction_type, clip)

    def step(
        latents,
        previous_clean,
        timestep,
        prompt_embeds,
        guidance_scale,
        coefficients,
        mask,
        background,
        noise,
    ):
        """One step of inversion or editing.

        Args (float32 unless said):
            latents: (B, C, h, w).
            previous_clean: (B, C, h, w), x0 predicted in the step before; zeros at the first.
            timestep: 0-d.
            prompt_embeds: (2 B, L, D), negatives first, with guidance; (B, L, D) without; the UNet's dtype.
            guidance_scale: 0-d.
            coefficients: (5,), a row of the plan.
            mask: (B, 1, h, w), 1 where the update counts, 0 where the background does.
            background: (B, C, h, w).
            noise: (B, C, h, w), used with eta > 0.

        Returns:
            The new latents and this step's x0, both (B, C, h, w).
        """
        output = guided(latents, timestep, prompt_embeds, guidance_scale)
        updated, clean = update(latents, output, previous_clean, coefficients, noise)
        return updated * mask + background * (1 - mask), clean

    return step
