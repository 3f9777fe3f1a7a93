"""The compiled stages: pure functions, tensors in and out, over the models of one pipeline.

Whatever changes between steps, prompts, seeds or guidance values is a tensor argument, so nothing compiles again
while shapes stay the same. What selects a formula (solver, prediction type, guidance on or off) is fixed when a stage
is built. In mode "pynative" the same functions run operator by operator.

The UNet is one graph of a fixed number of rows, through which everything goes: the maps of a mask, both halves of a
guided step, every picture of a batch. What is done with its predictions, guidance, solver update and blend, is a
graph of its own: it takes no time to compile, so that solvers and batch sizes may change without the UNet's.
"""

from __future__ import annotations

import collections
from collections import Counter
from collections.abc import Callable, Iterator

import mindspore as ms
import numpy as np
from mindspore import ops

from mindiffedit.checkpoints import freeu, lora
from mindiffedit.images import tiling
from mindiffedit.runtime import reuse, turns
from mindiffedit.runtime.graphs import Graphs
from mindiffedit.runtime.kernels import eagerly
from mindiffedit.solvers.schedules import StepPlan


class Stages:
    """The stages over one set of models, each built once for every combination of its fixed choices.

    Args:
        unet, vae, text_encoder: mindone models.
        mode: "graph" (each stage is one compiled graph) or "pynative".
        cache: a ``compile_cache.CompileCache``, or None to compile everything afresh.

    Attributes:
        graphs: what is compiled, in mode "graph".
        calls: how often a model has run, by stage: "text", "encode", "decode" (a picture is one, however many tiles it
            has), "unet"; "rows" counts the UNet's samples.
    """

    def __init__(self, unet, vae, text_encoder, mode: str, cache=None):
        self.unet, self.vae, self.text_encoder, self.mode = unet, vae, text_encoder, mode
        self.calls: Counter[str] = collections.Counter()
        self.graphs = Graphs(cache)
        self._built: dict[tuple, Callable] = {}
        self._texts, self._moments = reuse.Memory(64), reuse.Memory(16)

    def serves(self, unet, vae, text_encoder, mode: str) -> bool:
        """Whether these stages were built over exactly these models, in this mode."""
        same = self.unet is unet and self.vae is vae and self.text_encoder is text_encoder
        return same and self.mode == mode

    def forget(self) -> None:
        """Drops every built stage and every result; for a change inside a model that nothing else would notice."""
        self._built.clear()
        self.graphs.clear()
        self._texts.clear()
        self._moments.clear()

    # --- the stages, called with NumPy arrays --------------------------------------------------------------------

    def encode_text(
        self,
        token_ids: np.ndarray,
        attention_mask: np.ndarray | None,
        skip: int | None,
        lora_scale: float = 1.0,
    ) -> np.ndarray:
        """Hidden states (B, L, D) float32 of token ids (B, L).

        One row at a time: the graph then serves every batch size, and a text that was encoded before, in this call or
        an earlier one, is not encoded again. ``skip`` takes the output ``skip`` layers before the last, with the final
        layer norm (``clip_skip``). ``lora_scale`` weighs the text encoder's LoRAs, which are part of its weights here.
        """
        with turns.turn():
            return self._encode_text(token_ids, attention_mask, skip, lora_scale)

    def _encode_text(self, token_ids, attention_mask, skip, lora_scale) -> np.ndarray:
        stage = self._stage(("text", skip, attention_mask is not None), lambda: _text(self.text_encoder, skip))
        adapters = lora.adapted(self.text_encoder)
        adapters.write(lora_scale)
        weights = reuse.weights_of(self.text_encoder)

        def encoded(row, mask):
            self.calls["text"] += 1
            arguments = [ms.Tensor(row[None], ms.int32)]
            if mask is not None:
                arguments.append(ms.Tensor(mask[None], ms.int32))
            return _host(stage(*arguments))

        rows = []
        for i, row in enumerate(token_ids):
            mask = None if attention_mask is None else attention_mask[i]
            # The weights are looked at once in a call, and a call may encode with several scales of its LoRAs.
            key = (skip, adapters.written, row.tobytes(), None if mask is None else mask.tobytes())
            rows.append(self._texts.get(key, weights, lambda: encoded(row, mask)))
        return np.concatenate(rows)

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """VAE posterior moments (B, 2 C, h, w) float32 (mean, then log-variance) of pixels (B, 3, H, W) in [-1, 1].

        One picture at a time, or one tile of it where the VAE's tiling is on, which bounds the memory and serves every
        batch size with the same graphs. A picture that was encoded before, as ``generate_mask`` does before
        ``invert``, is not encoded again.
        """
        stage = self._stage(("encode",), lambda: _encoder(self.vae))
        weights, tiles = reuse.weights_of(self.vae), self._tiles(pixels.shape, half=0)

        def encoded(picture):
            self.calls["encode"] += 1
            return self._through_vae(stage, picture, tiles)

        return np.concatenate(
            [
                # A picture in tiles has other moments than the same one whole.
                self._moments.get((tiles, *reuse.digest(picture)), weights, lambda: encoded(picture[None]))
                for picture in pixels
            ]
        )

    def decode_latents(self, latents: np.ndarray) -> np.ndarray:
        """Pixels (B, 3, H, W) float32, about [-1, 1], of unscaled latents (B, C, h, w); one picture or tile at a time."""
        stage = self._stage(("decode",), lambda: _decoder(self.vae))
        tiles = self._tiles(latents.shape, half=1)
        self.calls["decode"] += len(latents)
        return np.concatenate([self._through_vae(stage, latents[i : i + 1], tiles) for i in range(len(latents))])

    def _tiles(self, shape: tuple, half: int) -> tiling.Tiles | None:
        """The tiles in which the encoder (0) or the decoder (1) gets inputs of this shape; None for whole inputs."""
        if not getattr(self.vae, "use_tiling", False):
            return None
        tiles = tiling.tiles_of(self.vae)[half]
        return tiles if tiles.cut(shape) else None

    def _through_vae(self, stage: Callable, array: np.ndarray, tiles: tiling.Tiles | None) -> np.ndarray:
        def run(part):
            return _host(stage(self._sample(part, self.vae)))

        return run(array) if tiles is None else tiling.in_tiles(run, array, tiles)

    def predictor(self, prompt_embeds: np.ndarray, attention_kwargs: dict, rows: int) -> Predictor:
        """The UNet for samples with these embeddings (N, L, D), ``rows`` of them in each evaluation.

        The ``scale`` among ``attention_kwargs`` weighs its LoRAs, which are part of its weights: no graph knows of it.
        """
        constants = {name: value for name, value in attention_kwargs.items() if name != "scale"}

        def stage():
            # FreeU changes the UNet from inside, where its graph would not notice.
            choices = ("unet", _key(constants), freeu.factors_of(self.unet))
            return self._stage(choices, lambda: _predictor(self.unet, constants))

        return Predictor(self, stage, prompt_embeds, rows, attention_kwargs.get("scale", 1.0))

    def update(self, plan: StepPlan, is_guided: bool) -> Callable:
        """What a step does with the UNet's predictions: guidance, solver update, blend. See ``_update``."""
        choices = (plan.solver, plan.prediction_type, plan.clip, is_guided)
        stage = self._stage(("update", *choices), lambda: _update(*choices))

        def run(*arrays):
            return [_host(tensor) for tensor in stage(*(_float(array) for array in arrays))]

        return run

    # --- building ------------------------------------------------------------------------------------------------

    def _stage(self, key: tuple, build: Callable[[], Callable]) -> Callable:
        if key not in self._built:
            function = build()
            models = {"text": self.text_encoder, "encode": self.vae, "decode": self.vae, "unet": self.unet}
            eager = self.mode == "pynative"
            self._built[key] = eagerly()(function) if eager else self.graphs.compiled(function, key, models.get(key[0]))
        return self._built[key]

    @staticmethod
    def _sample(array, model) -> ms.Tensor:
        """A tensor in the model's dtype."""
        tensor = array if isinstance(array, ms.Tensor) else ms.Tensor(np.ascontiguousarray(array))
        return tensor.astype(model.dtype) if tensor.dtype != model.dtype else tensor


class Predictor:
    """The UNet over N samples with fixed embeddings, evaluated in groups of one size, so that one graph serves any N.

    The last group is moved back to be full; what it computes again is left out. Fewer samples than a group make a
    smaller group, which is a graph of its own: a prediction that nobody asked for would cost as much as one that is
    needed.
    """

    def __init__(
        self,
        stages: Stages,
        stage: Callable[[], Callable],
        prompt_embeds: np.ndarray,
        rows: int,
        lora_scale: float = 1.0,
    ):
        self._stages, self._stage, self._lora_scale = stages, stage, lora_scale
        self._embeds = prompt_embeds
        self._rows = min(rows, len(prompt_embeds))
        self._tensors: dict[int, ms.Tensor] = {}

    def replace(self, prompt_embeds: np.ndarray) -> None:
        """Goes on with other embeddings of the same shape."""
        self._embeds = prompt_embeds
        self._tensors.clear()

    def __len__(self) -> int:
        """Number of evaluations for all samples."""
        return -(-len(self._embeds) // self._rows)

    def stream(self, latents: np.ndarray, timestep) -> Iterator[np.ndarray]:
        """The model's bare outputs, float32, of latents (N, C, h, w) at one timestep, group by group."""
        for start in range(0, len(latents), self._rows):
            begin = min(start, len(latents) - self._rows)
            yield self._evaluate(begin, latents[begin : begin + self._rows], timestep)[start - begin :]

    @turns.turn()
    def _evaluate(self, begin: int, latents: np.ndarray, timestep) -> np.ndarray:
        """The outputs of one group of rows, which begins at a sample. Its LoRAs are in the weights that it runs with."""
        lora.adapted(self._stages.unet).write(self._lora_scale)
        stage, sample = self._stage(), self._stages._sample
        if begin not in self._tensors:
            self._tensors[begin] = sample(self._embeds[begin : begin + self._rows], self._stages.unet)
        self._stages.calls["unet"] += 1
        self._stages.calls["rows"] += self._rows
        return _host(stage(sample(latents, self._stages.unet), _timestep(timestep), self._tensors[begin]))

    def __call__(self, latents: np.ndarray, timestep) -> np.ndarray:
        """All outputs, (N, C, h, w) float32."""
        return np.concatenate(list(self.stream(latents, timestep)))


def guided(predictions, guidance_scale):
    """Classifier-free guidance over predictions (2 B, C, h, w), negatives first; (B, C, h, w). Arrays or tensors."""
    batch = predictions.shape[0] // 2
    unconditional, conditional = predictions[:batch], predictions[batch:]
    return unconditional + guidance_scale * (conditional - unconditional)


def _host(tensor: ms.Tensor) -> np.ndarray:
    return tensor.astype(ms.float32).asnumpy()


def _float(value) -> ms.Tensor:
    return ms.Tensor(np.asarray(value, np.float32, order="C"))


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


def _solver(solver, prediction_type, clip):
    """One solver update: latents, model output, previous x0, coefficients, noise -> new latents, this x0."""
    clean_prediction, noise_prediction = _clean_prediction(prediction_type), _noise_prediction(prediction_type)

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


def _update(solver, prediction_type, clip, is_guided):
    solve = _solver(solver, prediction_type, clip)

    def update(latents, previous_clean, predictions, guidance_scale, coefficients, mask, background, noise):
        """The rest of a step of inversion or editing, after the UNet.

        Args (float32):
            latents: (B, C, h, w).
            previous_clean: (B, C, h, w), x0 predicted in the step before; zeros at the first.
            predictions: the UNet's outputs, (2 B, C, h, w), negatives first, with guidance; (B, C, h, w) without.
            guidance_scale: 0-d.
            coefficients: (5,), a row of the plan.
            mask: (B, 1, h, w), 1 where the update counts, 0 where the background does.
            background: (B, C, h, w).
            noise: (B, C, h, w), used with eta > 0.

        Returns:
            The new latents and this step's x0, both (B, C, h, w).
        """
        output = guided(predictions, guidance_scale) if is_guided else predictions
        updated, clean = solve(latents, output, previous_clean, coefficients, noise)
        return updated * mask + background * (1 - mask), clean

    return update
