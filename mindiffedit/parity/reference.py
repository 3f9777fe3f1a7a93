"""The PyTorch reference under observation: diffusers' pipeline with every stage's tensors kept. Needs torch.

Nothing of the reference is rewritten. Its own calls run; what they call (text encoder, VAE, random numbers, UNet,
scheduler) is wrapped for the time of a call, so that values can be read and, to measure floors, replaced. Two crashes
are mended on the way, since otherwise there would be nothing to compare: masks without guidance (W1 in
docs/differences.md) and with schedulers that look their noise level up by index (W3).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import sys
from collections.abc import Mapping
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
import transformers

from mindiffedit.checkpoints import old_configs
from mindiffedit.parity import formulas
from mindiffedit.parity.case import Case, Tape

_PIPELINE = importlib.import_module(diffusers.StableDiffusionDiffEditPipeline.__module__)


def load(folder, case: Case, dtype=torch.float32):
    """diffusers' pipeline of a checkpoint folder, with the case's schedulers; no safety checker."""
    with _quiet():
        pipe = diffusers.StableDiffusionDiffEditPipeline.from_pretrained(
            str(folder),
            safety_checker=None,
            requires_safety_checker=False,
            torch_dtype=dtype,
            low_cpu_mem_usage=False,
            local_files_only=True,
            use_safetensors=True,
        )
    return with_schedulers(pipe, case)


@contextlib.contextmanager
def _quiet():
    """No progress bars of the libraries, and no word on what they deprecate."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        yield
    finally:
        for library, verbosity, bar in zip(libraries, before, bars):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


def with_schedulers(pipe, case: Case):
    """The pipeline with the schedulers that a case asks for."""
    config = getattr(pipe, "own_scheduler_config", None)
    if config is None:
        # W12: what the reference corrects in its other pipelines, and we when a checkpoint is loaded.
        config = {**pipe.scheduler.config, **old_configs.scheduler_changes(pipe.scheduler.config, loaded=True)}
    pipe.own_scheduler_config = config
    forward, inverse = getattr(diffusers, case.scheduler), getattr(diffusers, case.inverse_scheduler)
    pipe.scheduler = forward.from_config(config, **case.scheduler_options)
    pipe.inverse_scheduler = inverse.from_config(config, **case.scheduler_options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def run(pipe, case: Case, substitutes: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """All calls of a case; returns their trace (see ``case.Tape``). Floating values come in the pipeline's dtype.

    Substitutes take the place of a stage's result before the next stage sees it.
    """
    tape = Tape(substitutes)
    mask = latents = None
    with _default_dtype(pipe.unet.dtype):
        if case.mask is not None:
            tape.call = "mask"
            mask = _generate_mask(pipe, case, _arguments(case.mask, pipe.dtype), tape)
        if case.invert is not None:
            tape.call = "invert"
            latents = _invert(pipe, case, _arguments(case.invert, pipe.dtype), tape)
        if case.edit is not None:
            tape.call = "edit"
            _edit(pipe, case, _arguments(case.edit, pipe.dtype), tape, mask, latents)
    return tape.trace()


@contextlib.contextmanager
def _default_dtype(dtype):
    """transformers makes its attention mask in torch's default dtype, which fails for a float64 text encoder."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if dtype == torch.float64 else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _generators(seeds):
    if isinstance(seeds, list):
        return [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.Generator().manual_seed(seeds)


def _arguments(arguments: Mapping[str, Any], dtype) -> dict[str, Any]:
    """Keyword arguments with arrays as tensors."""
    return {
        name: torch.tensor(value, dtype=dtype) if isinstance(value, np.ndarray) else value
        for name, value in arguments.items()
    }


def _host(tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()


def _through(tape: Tape, stage: str, tensor, step=None):
    """A tensor past the tape and back."""
    array = _host(tensor)
    seen = tape(stage, array, step)
    return tensor if seen is array else torch.as_tensor(seen).to(tensor.device, tensor.dtype)


class _Rows:
    """A stage that the reference computes for the whole batch or sample by sample; on the tape it is one array."""

    def __init__(self, tape: Tape, stage: str, copies: int = 1):
        self._tape, self._stage, self._copies = tape, stage, copies
        self._parts: list[np.ndarray] = []
        self._count = 0

    def __call__(self, tensor):
        self._parts.append(_host(tensor))
        other = self._tape.substitute(self._stage)
        start, self._count = self._count, self._count + len(tensor)
        if other is None:
            return tensor
        rows = np.repeat(other, self._copies, axis=0)[start : self._count]
        return torch.as_tensor(rows).to(tensor.device, tensor.dtype) if rows.shape == tensor.shape else tensor

    def close(self) -> None:
        if self._parts:
            self._tape.keep(self._stage, np.concatenate(self._parts)[:: self._copies])


@contextlib.contextmanager
def _watched_text(pipe, tape: Tape, prefixes, copies: int, mend: bool = False):
    """Token ids and embeddings of each ``encode_prompt``; ``prefixes`` name them in the order of the calls."""
    prefixes = iter(prefixes)
    original = pipe.encode_prompt
    ids: list[np.ndarray] = []

    def encode_prompt(prompt, device, repeats, guided, *args, **kwargs):
        prefix = next(prefixes)
        ids.clear()
        positive, negative = original(prompt, device, repeats, guided, *args, **kwargs)
        if prompt is not None:
            tape.keep(f"{prefix}token_ids", ids[0])
        positive = _through(tape, f"{prefix}prompt_embeds", positive[::copies]).repeat_interleave(copies, 0)
        if guided:
            if len(ids) > (prompt is not None):
                tape.keep(f"{prefix}negative_token_ids", ids[-1])
            negative = _through(tape, f"{prefix}negative_prompt_embeds", negative[::copies])
            negative = negative.repeat_interleave(copies, 0)
        # W1: `generate_mask` takes the results in the wrong order, which without guidance leaves it with None.
        return (negative, positive) if mend and not guided else (positive, negative)

    hook = pipe.text_encoder.register_forward_pre_hook(lambda module, args: ids.append(_host(args[0])))
    try:
        with mock.patch.object(pipe, "encode_prompt", encode_prompt):
            yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _watched_encoder(pipe, tape: Tape, copies: int):
    """VAE moments, posterior draws and the latents made of them."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    encode, prepare = pipe.vae.encode, pipe.prepare_image_latents
    moments, drawn = _Rows(tape, "moments", copies), _Rows(tape, "posterior_noise")

    def watched_encode(pixels, *args, **kwargs):
        result = encode(pixels, *args, **kwargs)
        result.latent_dist = DiagonalGaussianDistribution(moments(result.latent_dist.parameters))
        return result

    def watched_prepare(*args, **kwargs):
        with _watched_draws("diffusers.models.autoencoders.vae", drawn):
            latents = prepare(*args, **kwargs)
        moments.close()
        drawn.close()
        return _through(tape, "latents", latents)

    with mock.patch.object(pipe.vae, "encode", watched_encode):
        with mock.patch.object(pipe, "prepare_image_latents", watched_prepare):
            yield


@contextlib.contextmanager
def _watched_draws(module: str, seen):
    """Every ``randn_tensor`` that a module of diffusers calls, passed through ``seen``.

    A float64 pipeline gets float32 draws, so that it consumes the stream as the float32 one does.
    """
    home = sys.modules[module]
    original = home.randn_tensor

    def randn_tensor(shape, generator=None, device=None, dtype=None, layout=None):
        drawn = torch.float32 if dtype == torch.float64 else dtype
        return seen(original(shape, generator, device, drawn, layout).to(dtype))

    with mock.patch.object(home, "randn_tensor", randn_tensor):
        yield


def _generate_mask(pipe, case: Case, arguments: Mapping[str, Any], tape: Tape):
    copies = arguments.get("num_maps_per_mask", 10)
    ratio = arguments.get("mask_thresholding_ratio", 3.0)
    add_noise, clamp = pipe.scheduler.add_noise, torch.Tensor.clamp

    def watched_add_noise(latents, noise, timestep):
        tape.keep("timestep", _host(timestep))
        # W3: several schedulers iterate over the timesteps and fail at the reference's 0-d one.
        noised = add_noise(latents, noise, timestep.reshape(1).repeat(len(latents)))
        return _through(tape, "noised_latents", noised)

    def watched_unet(module, args, kwargs, output):
        # The rows: source, source negative, target, target negative (D1); without guidance source and target.
        parts = list(output.sample.chunk(4 if arguments.get("guidance_scale", 7.5) > 1 else 2))
        embeds = kwargs["encoder_hidden_states"].chunk(len(parts))
        half = len(parts) // 2
        parts[::half] = _through(tape, "noise_predictions", torch.cat(parts[::half])).chunk(2)
        if half == 2 and not torch.equal(embeds[1], embeds[3]):
            # Where the negatives are equal their predictions cancel: nothing comes of them.
            parts[1::2] = _through(tape, "negative_noise_predictions", torch.cat(parts[1::2])).chunk(2)
        output.sample = torch.cat(parts)
        return output

    def watched_clamp(tensor, *args, **kwargs):
        # The one clamp with a tensor as its bound is that of the map.
        if len(args) == 2 and isinstance(args[1], torch.Tensor):
            maps = _through(tape, "map", tensor)
            magnitude = args[1] if maps is tensor else maps.mean() * ratio
            return clamp(maps, args[0], _through(tape, "clamp_magnitude", magnitude), **kwargs)
        return clamp(tensor, *args, **kwargs)

    hook = pipe.unet.register_forward_hook(watched_unet, with_kwargs=True)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_watched_text(pipe, tape, ("target_", "source_"), copies, mend=True))
            stack.enter_context(_watched_encoder(pipe, tape, copies))
            noise = lambda drawn: _through(tape, "noise", drawn)  # noqa: E731
            stack.enter_context(_watched_draws(_PIPELINE.__name__, noise))
            stack.enter_context(mock.patch.object(pipe.scheduler, "add_noise", watched_add_noise))
            stack.enter_context(mock.patch.object(torch.Tensor, "clamp", watched_clamp))
            mask = pipe.generate_mask(case.image, generator=_generators(case.seeds["mask"]), **arguments)
    finally:
        hook.remove()
    return tape("mask", mask)


@contextlib.contextmanager
def _watched_loop(pipe, scheduler, chooser: str, tape: Tape, eta: float, after_step, regularised: bool = False):
    """Timesteps, coefficients and steps of a loop; ``after_step(prev_sample, i)`` gives what the step returns.

    A ``regularised`` loop of ours takes the scheduler's own step, which does not say what clean latents it predicts.
    """
    choose, step = getattr(pipe, chooser), scheduler.step
    convert: Any = getattr(scheduler, "convert_model_output", None)
    rows, count = None, 0

    def watched_choose(*args):
        nonlocal rows
        timesteps, steps = choose(*args)
        tape.keep("timesteps", _host(timesteps))
        rows = _coefficients(scheduler, timesteps, eta)
        if rows is not None:
            tape.keep("coefficients", rows)
        return timesteps, steps

    def watched_unet(module, args, output):
        # The rows: negatives, positives; without guidance the positives alone.
        output.sample = _through(tape, "predictions", output.sample, count)
        return output

    def watched_convert(*args, **kwargs):
        clean = convert(*args, **kwargs)
        if rows is not None and not regularised:
            tape.keep("clean_predictions", _host(clean), count)
        return clean

    @functools.wraps(step)  # the reference looks at its signature
    def watched_step(*args, **kwargs):
        nonlocal count
        result = step(*args, **kwargs)
        other = tape.substitute("clean_predictions", count)
        if other is not None and convert is not None:
            # What the next step finds as this one's; this step's own result stays its own.
            history = scheduler.model_outputs
            history[-1] = torch.as_tensor(other).to(history[-1].device, history[-1].dtype)
        if convert is None and getattr(result, "pred_original_sample", None) is not None:
            tape.keep("clean_predictions", _host(result.pred_original_sample), count)
        result.prev_sample = after_step(result.prev_sample, count)
        count += 1
        return result

    with contextlib.ExitStack() as stack:
        stack.callback(pipe.unet.register_forward_hook(watched_unet).remove)
        stack.enter_context(mock.patch.object(pipe, chooser, watched_choose))
        stack.enter_context(mock.patch.object(scheduler, "step", watched_step))
        module = type(scheduler).__module__
        if hasattr(sys.modules[module], "randn_tensor"):
            stack.enter_context(_watched_draws(module, lambda drawn: _through(tape, "step_noise", drawn, count)))
        if convert is not None:
            stack.enter_context(mock.patch.object(scheduler, "convert_model_output", watched_convert))
        yield


def _invert(pipe, case: Case, arguments: Mapping[str, Any], tape: Tape):
    decode = pipe.vae.decode

    def watched_decode(*args, **kwargs):
        return (_through(tape, "decoded", decode(*args, **kwargs)[0]),)

    def after_step(sample, step):
        return _through(tape, "inverted_latents", sample, step)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_watched_text(pipe, tape, ("",), 1))
        stack.enter_context(_watched_encoder(pipe, tape, 1))
        scheduler, regularised = pipe.inverse_scheduler, arguments.get("num_reg_steps", 0) > 0
        stack.enter_context(_watched_loop(pipe, scheduler, "get_inverse_timesteps", tape, 0.0, after_step, regularised))
        stack.enter_context(mock.patch.object(pipe.vae, "decode", watched_decode))
        return pipe.invert(
            image=case.image,
            generator=_generators(case.seeds["invert"]),
            output_type="np",
            **arguments,
        ).latents


def _edit(pipe, case: Case, arguments: dict[str, Any], tape: Tape, mask, latents) -> None:
    copies = arguments.get("num_images_per_prompt", 1)
    mask = np.array(arguments.pop("mask_image", mask))  # a copy: the reference writes into it
    latents = arguments.pop("image_latents", latents)
    backgrounds = latents.transpose(0, 1).repeat_interleave(copies, dim=1)
    prepare = _PIPELINE.preprocess_mask
    inside: Any = None

    def watched_mask(*args):
        nonlocal inside
        prepared = prepare(*args)
        inside = torch.cat([prepared] * copies).to(pipe.dtype)
        return prepared

    def after_step(sample, step):
        # What the reference's blend is going to make of it; the blend of a substitute with a binary mask is itself.
        blended = sample * inside + backgrounds[step] * (1 - inside)
        seen = _through(tape, "edited_latents", blended, step)
        return sample if seen is blended else seen

    with contextlib.ExitStack() as stack:
        stack.enter_context(_watched_text(pipe, tape, ("",), copies))
        stack.enter_context(mock.patch.object(_PIPELINE, "preprocess_mask", watched_mask))
        eta = arguments.get("eta", 0.0)
        stack.enter_context(_watched_loop(pipe, pipe.scheduler, "get_timesteps", tape, eta, after_step))
        edited = pipe(
            mask_image=mask,
            image_latents=latents,
            generator=_generators(case.seeds["edit"]),
            output_type="latent",
            **arguments,
        ).images
    decoded = pipe.vae.decode(edited / pipe.vae.config.scaling_factor, return_dict=False)[0]
    decoded = _through(tape, "decoded", decoded)
    picture = pipe.image_processor.postprocess(decoded, output_type="np")
    tape.keep("picture", (picture * 255).round().astype("uint8"))


def _coefficients(scheduler, timesteps, eta: float) -> np.ndarray | None:
    """The five numbers of each step, float32 (T, 5), or None for a scheduler that our compiled step does not cover."""
    config = scheduler.config
    if config.get("solver_order", 1) > 2 or config.get("use_flow_sigmas"):
        return None
    bare = copy.deepcopy(scheduler)
    for name in ("step", "convert_model_output"):  # the watched ones of the run
        vars(bare).pop(name, None)
    try:
        return formulas.rows_of(bare, timesteps, eta)
    except formulas.OtherFormula:
        return None
