"""The compiled stages: pure functions, tensors in and out, over the models of one pipeline.

Whatever changes between steps, prompts, seeds or guidance values is a tensor argument, so nothing compiles again
while shapes stay the same. What selects a formula (solver, prediction type, guidance on or off) is fixed when a stage
is built. In mode "pynative" the same functions run operator by operator.

The UNet is one graph of a fixed number of rows, through which everything goes: the maps of a mask, both halves of a
guided step, every picture of a batch. What is done with its predictions, guidance, solver update and blend, is a
graph of its own: it takes no time to compile, so that solvers and batch sizes may change without the UNet's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import ops

from mindiffedit.checkpoints import freeu, lora, step_cache
from mindiffedit.diffedit import blended, guided
from mindiffedit.images import tiling
from mindiffedit.runtime import devices, launches, reuse, turns
from mindiffedit.runtime.graphs import Graphs
from mindiffedit.runtime.kernels import eagerly
from mindiffedit.solvers.formulas import epsilon_prediction, halves, numbers, solver_step
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
            has), "unet"; "rows" counts the UNet's samples, and "shallow_rows" those of the step cache's shallow
            evaluations, which are in neither of the two.
    """

    def __init__(self, unet, vae, text_encoder, mode: str, cache=None):
        self.unet, self.vae, self.text_encoder, self.mode = unet, vae, text_encoder, mode
        self.calls: Counter[str] = Counter()
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
            return host(stage(*arguments))

        rows = []
        for i, row in enumerate(token_ids):
            mask = None if attention_mask is None else attention_mask[i]
            # The weights are looked at once in a call, and a call may encode with several scales of its LoRAs.
            key = (skip, adapters.written, row.tobytes(), None if mask is None else mask.tobytes())
            rows.append(self._texts.get(key, weights, partial(encoded, row, mask)))
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
                self._moments.get((tiles, *reuse.digest(picture)), weights, partial(encoded, picture[None]))
                for picture in pixels
            ]
        )

    def decode_latents(self, latents: np.ndarray) -> np.ndarray:
        """Pixels (B, 3, H, W) float32, about [-1, 1], of unscaled latents (B, C, h, w); one picture or tile at once."""
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
            return host(stage(self._sample(part, self.vae)))

        return run(array) if tiles is None else tiling.in_tiles(run, array, tiles)

    def predictor(
        self,
        prompt_embeds: np.ndarray,
        attention_kwargs: Mapping,
        rows: int,
        timesteps=(),
        cache_interval: int | None = None,
    ) -> Predictor:
        """The UNet for samples with these embeddings (N, L, D), ``rows`` of them in each evaluation.

        The ``scale`` among ``attention_kwargs`` weighs its LoRAs, which are part of its weights: no graph knows of it.
        ``timesteps`` are those that it is going to be asked for; they are brought to the device beforehand.
        With a ``cache_interval`` of n, one of n calls evaluates the whole UNet, the others its last layer; 1 is by the
        graphs of such a run, too.

        Raises:
            ValueError: a ``cache_interval``, and a UNet that the step cache cannot run.
        """
        constants = {name: value for name, value in attention_kwargs.items() if name != "scale"}
        if cache_interval is not None:
            step_cache.check_supported(self.unet)

        def stage(name):
            # FreeU changes the UNet from inside, where its graph would not notice.
            choices = () if name in _BEFORE else (_key(constants), freeu.factors_of(self.unet))
            return self._stage((name, *choices), lambda: _PREDICTORS[name](self.unet, constants))

        lora_scale = attention_kwargs.get("scale", 1.0)
        return Predictor(self, stage, prompt_embeds, rows, lora_scale, timesteps, cache_interval)

    def update(self, plan: StepPlan, is_guided: bool) -> Callable:
        """What a step does with the UNet's predictions, a graph of tensors; see ``_update``."""
        choices = (plan.solver, plan.prediction_type, plan.clip, is_guided)
        return self._stage(("update", *choices), lambda: _update(*choices))

    def noise(self, prediction_type: str, is_guided: bool) -> Callable:
        """The noise that the UNet's outputs stand for, a graph of tensors; see ``_noise``."""
        return self._stage(("noise", prediction_type, is_guided), lambda: _noise(prediction_type, is_guided))

    def move(self) -> Callable:
        """DDIM's update along given noise, a graph of tensors; see ``_move``."""
        return self._stage(("move",), _move)

    def refinement(self, prediction_type: str, is_guided: bool) -> Callable:
        """One iteration of a refined inversion step, a graph of tensors; see ``_refinement``."""
        choices = (prediction_type, is_guided)
        return self._stage(("refinement", *choices), lambda: _refinement(*choices))

    # --- building ------------------------------------------------------------------------------------------------

    def _stage(self, key: tuple, build: Callable[[], Callable]) -> Callable:
        if key not in self._built:
            function = build()
            models = {"text": self.text_encoder, "encode": self.vae, "decode": self.vae}
            models |= dict.fromkeys(_PREDICTORS, self.unet)
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

    With the step cache, the calls 0, n, 2 n, ... are full evaluations, which keep the hidden state of every group for
    the shallow ones between them.
    """

    def __init__(
        self,
        stages: Stages,
        stage: Callable[[str], Callable],
        prompt_embeds: np.ndarray,
        rows: int,
        lora_scale: float = 1.0,
        timesteps=(),
        cache_interval: int | None = None,
    ):
        self._stages, self._stage, self._lora_scale, self._interval = stages, stage, lora_scale, cache_interval
        self._rows = min(rows, len(prompt_embeds))
        self._timesteps = {_number(timestep): _timestep(timestep) for timestep in timesteps}
        self._times: dict = {}  # what the UNet's layers make of them
        self._now: Any = None  # the turn, and the LoRAs' state, for which this and the same of the texts are right
        self.replace(prompt_embeds)

    def replace(self, prompt_embeds: np.ndarray) -> None:
        """Goes on with other embeddings of the same shape; the next call is a full evaluation."""
        self._calls = 0
        self._hidden: dict[int, ms.Tensor] = {}  # of the last full evaluation, by the samples at which groups begin
        self._count = len(prompt_embeds)
        begins = {min(start, self._count - self._rows) for start in range(0, self._count, self._rows)}
        groups = {begin: prompt_embeds[begin : begin + self._rows] for begin in begins}
        self._places = {begin: reuse.digest(group) for begin, group in groups.items()}
        self._embeds = {
            self._places[begin]: self._stages._sample(group, self._stages.unet) for begin, group in groups.items()
        }
        self._texts: dict = {}  # what the UNet's layers make of these

    def __len__(self) -> int:
        """Number of evaluations for all samples."""
        return -(-self._count // self._rows)

    def stream(self, latents: ms.Tensor, timestep) -> Iterator[ms.Tensor]:
        """The model's bare outputs, float32, group by group.

        Args:
            latents: (N, C, h, w); fewer are repeated as a whole, so that each gets several embeddings.
            timestep: a number.
        """
        if len(latents) < self._count:
            latents = repeated(latents, self._count // len(latents))
        if self._interval is not None and self._calls % self._interval == 0:
            self._hidden.clear()
        self._calls += 1
        for start in range(0, self._count, self._rows):
            begin = min(start, self._count - self._rows)
            group = latents if self._rows == self._count else latents[begin : begin + self._rows]
            outputs = self._evaluate(begin, group, timestep)
            yield outputs if start == begin else outputs[start - begin :]

    @turns.turn()
    def _evaluate(self, begin: int, latents: ms.Tensor, timestep) -> ms.Tensor:
        """The outputs of one group of rows, which begins at a sample. LoRAs are in the weights that it runs with."""
        lora.adapted(self._stages.unet).write(self._lora_scale)
        sample = self._stages._sample(latents, self._stages.unet)
        arguments = sample, *self._conditions(begin, _number(timestep))
        calls = self._stages.calls
        if begin in self._hidden:
            calls["shallow_rows"] += self._rows
            return _float32(self._stage("unet_shallow")(self._hidden[begin], *arguments))
        calls["unet"] += 1
        calls["rows"] += self._rows
        if self._interval is None:
            return _float32(self._stage("unet")(*arguments))
        outputs, self._hidden[begin] = self._stage("unet_full")(*arguments)
        return _float32(outputs)

    def _conditions(self, begin: int, timestep) -> tuple[ms.Tensor, ...]:
        """What a graph of the UNet takes beside the latents of a group, see ``launches.conditions_of``."""
        embeds, unet = self._embeds[self._places[begin]], self._stages.unet
        if launches.apart(unet) is None:
            known = self._timesteps.get(timestep)
            return (_timestep(timestep) if known is None else known), embeds
        now = turns.once((Predictor, "turn"), object), lora.adapted(unet).written
        if self._now != now:  # others may have changed the weights
            self._now, self._times, self._texts = now, {}, {}
        if timestep not in self._times:
            ahead = [other for other in self._timesteps if other not in self._times and other != timestep]
            chosen = [timestep, *ahead][: launches.TIMESTEPS]
            filled = chosen + chosen[-1:] * (launches.TIMESTEPS - len(chosen))
            rows: Any = self._stage("unet_time")(tensor(filled))
            count = len(rows) // launches.TIMESTEPS
            self._times |= {one: rows[i * count : (i + 1) * count] for i, one in enumerate(chosen)}
        if self._places[begin] not in self._texts:
            self._texts[self._places[begin]] = self._stage("unet_text")(embeds)
        return *self._times[timestep], *self._texts[self._places[begin]]

    def __call__(self, latents: ms.Tensor, timestep) -> ms.Tensor:
        """All outputs, (N, C, h, w) float32."""
        groups = list(self.stream(latents, timestep))
        return groups[0] if len(groups) == 1 else ops.cat(groups)


class IntervalPredictor:
    """A guided predictor in some of a loop's steps, one of the prompts alone in the others.

    Args:
        guided: of 2 B samples, negatives first.
        conditional: of B samples.
        steps: indices of the guided ones.
    """

    def __init__(self, guided: Predictor, conditional: Predictor, steps: range):
        self._guided, self._conditional, self._steps, self._index = guided, conditional, steps, 0

    def __call__(self, latents: ms.Tensor, timestep) -> ms.Tensor:
        """The outputs of the loop's next step, (2 B, C, h, w) or (B, C, h, w) float32."""
        predictor = self._guided if self._index in self._steps else self._conditional
        self._index += 1
        return predictor(latents, timestep)

    def replace(self, prompt_embeds: np.ndarray) -> None:
        """Goes on with other embeddings, negatives first."""
        self._guided.replace(prompt_embeds)
        self._conditional.replace(prompt_embeds[len(prompt_embeds) // 2 :])


class CompiledUpdate:
    """The ``update`` of ``diffedit``'s loops for a run with a plan: one graph, over tensors that stay on the device.

    Args:
        plan: coefficients of the run.
        guidance_scale: of steps whose predictions are those of negatives and prompts.
        shape: of the latents, (B, C, h, w).
        mask: (B, 1, h, w) float32, where the update counts; None is everywhere.
        draw: noise of a shape for the step of an index; used where the plan adds noise.
        refine: None, or a function (index, latents, arrived, coefficients) -> (latents, pred_x0) that brings the
            result of a step nearer to what leads back.
    """

    def __init__(self, stages: Stages, plan: StepPlan, guidance_scale, shape, mask=None, draw=None, refine=None):
        self._updates = partial(stages.update, plan)
        self._noisy, self._draw, self._refine = plan.noisy, draw, refine
        self._shape, self._zeros = shape, tensor(np.zeros(shape))
        self._mask = tensor(np.ones((shape[0], 1, *shape[2:])) if mask is None else mask)
        self._guidance_scale = tensor(guidance_scale)
        self._coefficients = [tensor(row) for row in plan.coefficients]

    def __call__(self, index: int, latents, noise_prediction, pred_x0=None, background=None):
        coefficients = self._coefficients[index]
        update = self._updates(len(noise_prediction) > len(latents))
        updated, pred_x0 = update(
            latents,
            self._zeros if pred_x0 is None else pred_x0,
            noise_prediction,
            self._guidance_scale,
            coefficients,
            self._mask,
            self._zeros if background is None else background,
            tensor(self._draw(self._shape, index)) if self._noisy else self._zeros,
        )
        return (updated, pred_x0) if self._refine is None else self._refine(index, latents, updated, coefficients)


class EagerUpdate:
    """The same for a run by a scheduler's own step: guidance, step, blend, operator by operator.

    Args:
        step: what ``Solver.stepper`` returns.
        guidance_scale: of steps whose predictions are those of negatives and prompts.
        mask: (B, 1, h, w) float32, or None.
        regularise: None, or a function (noise prediction, latents, index) -> noise prediction of arrays.
    """

    def __init__(self, step: Callable, guidance_scale: float, mask=None, regularise: Callable | None = None):
        self._step, self._regularise = step, regularise
        self._guidance_scale = tensor(guidance_scale)
        self._mask = None if mask is None else tensor(mask)

    def __call__(self, index: int, latents, noise_prediction, pred_x0=None, background=None):
        if len(noise_prediction) > len(latents):
            with eagerly():
                negatives, positives = halves(noise_prediction)
                noise_prediction = guided(negatives, positives, self._guidance_scale)
        if self._regularise is not None:
            noise_prediction = tensor(self._regularise(host(noise_prediction), latents, index))
        updated, pred_x0 = self._step(index, latents, noise_prediction)
        if self._mask is not None:
            with eagerly():
                updated = blended(updated, self._mask, background)
        return updated, pred_x0


def host(value: ms.Tensor) -> np.ndarray:
    """A tensor's values, float32, on the host."""
    return _float32(value).asnumpy()


def tensor(value) -> ms.Tensor:
    """An array or number as a float32 tensor."""
    return ms.Tensor(np.asarray(value, np.float32, order="C"))


def is_finite(latents: ms.Tensor) -> bool:
    """Whether all values are numbers, found out where they are: from a device one value comes to the host.

    By NumPy on a CPU, where each call of a reduction leaves 0.65 KiB behind (MindSpore 2.8.0).
    """
    if devices.device_target() == "CPU":
        return bool(np.isfinite(host(latents)).all())
    return bool(ops.isfinite(latents).all())


def repeated(latents: ms.Tensor, copies: int) -> ms.Tensor:
    """Latents (B, C, h, w) as a whole, several times over; ``ops.cat`` would leave memory behind as reductions do."""
    shape = latents.shape
    return latents.expand_dims(0).broadcast_to((copies, *shape)).reshape(-1, *shape[1:])


def _float32(value: ms.Tensor) -> ms.Tensor:
    return value if value.dtype == ms.float32 else value.astype(ms.float32)


def _number(timestep):
    return timestep.item() if hasattr(timestep, "item") else timestep


def _timestep(value) -> ms.Tensor:
    return ms.Tensor(_number(value), ms.float32)


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

    conditions = launches.conditions_of(unet)

    def predict(latents, *others):
        timestep, text = conditions(others)
        return unet(latents, timestep, text, cross_attention_kwargs=kwargs)[0]

    return predict


_PREDICTORS = {
    "unet": _predictor,
    "unet_text": lambda unet, _: launches.text_stage(unet),
    "unet_time": lambda unet, _: launches.time_stage(unet),
    "unet_full": lambda *choices: step_cache.evaluations(*choices)[0],
    "unet_shallow": lambda *choices: step_cache.evaluations(*choices)[1],
}
"""What makes the function of each stage that runs the UNet."""

_BEFORE = ("unet_text", "unet_time")
"""Those that run before a loop, see ``launches.apart``."""


def _update(solver, prediction_type, clip, is_guided):
    solve = solver_step(solver, prediction_type, clip)

    def update(latents, pred_x0, noise_prediction, guidance_scale, coefficients, mask, background, noise):
        """The rest of a step of inversion or editing, after the UNet.

        Args (float32):
            latents: (B, C, h, w).
            pred_x0: (B, C, h, w), predicted in the step before; zeros at the first.
            noise_prediction: the UNet's outputs, (2 B, C, h, w), negatives first, with guidance; (B, C, h, w) without.
            guidance_scale: 0-d.
            coefficients: (5,), a row of the plan.
            mask: (B, 1, h, w), 1 where the update counts, 0 where the background does.
            background: (B, C, h, w).
            noise: (B, C, h, w), used with eta > 0.

        Returns:
            The new latents and this step's pred_x0, both (B, C, h, w).
        """
        output = noise_prediction
        if is_guided:
            negatives, positives = halves(noise_prediction)
            output = guided(negatives, positives, guidance_scale)
        updated, pred_x0 = solve(latents, output, pred_x0, coefficients, noise)
        return blended(updated, mask, background), pred_x0

    return update


def _noise(prediction_type, is_guided):
    epsilon = epsilon_prediction(prediction_type)

    def noise(latents, output, guidance_scale, levels):
        """Noise (B, C, h, w) at latents (B, C, h, w) of a level, as ``_refinement`` takes it."""
        rows = ops.cat([latents, latents]) if is_guided else latents
        noise = output if prediction_type == "epsilon" else epsilon(rows, output, *numbers(levels))
        if not is_guided:
            return noise
        negatives, positives = halves(noise)
        return guided(negatives, positives, guidance_scale)

    return noise


def _move():
    solve = solver_step("ddim", "epsilon", None)

    def move(latents, noise, later, share, coefficients):
        """DDIM's update of latents (B, C, h, w) by the noise (B, C, h, w) that lies between two; see ``diffedit``.

        ``share``: 0-d, 0 takes the first, 1 the later one. ``coefficients``: (5,), a row of ``schedules.ddim_row``.
        """
        between = noise + share * (later - noise)
        return solve(latents, between, latents, coefficients, ops.zeros_like(latents))

    return move


def _refinement(prediction_type, is_guided):
    noise_at = _noise(prediction_type, is_guided)
    solve = solver_step("ddim", "epsilon", None)

    def refined(latents, arrived, output, guidance_scale, levels, coefficients):
        """The inverse DDIM step from ``latents``, with the noise that the UNet predicts where it arrived.

        The step back from x' predicts the noise at x', the inverse step at x, before it. The x' that is led back to x
        exactly solves x' = a x + b epsilon(x', t), which is iterated, from the inverse step's result on.

        Args (float32):
            latents, arrived: (B, C, h, w).
            output: the UNet's outputs at ``arrived``, (2 B, C, h, w) with guidance, (B, C, h, w) without.
            guidance_scale: 0-d.
            levels: (2,), factors of latents and noise at the timestep.
            coefficients: (5,), the step's row of the plan.
        """
        noise = noise_at(arrived, output, guidance_scale, levels)
        return solve(latents, noise, latents, coefficients, ops.zeros_like(latents))

    return refined
