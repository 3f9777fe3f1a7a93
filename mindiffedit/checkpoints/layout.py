"""What a checkpoint consists of: its components, their classes and files, its small JSON files, and its errors.

A checkpoint is a folder as diffusers writes it for Stable Diffusion:

    model_index.json                                 which class each component has
    vae/, unet/                                      config.json, diffusion_pytorch_model.safetensors
    text_encoder/, safety_checker/ (optional)        config.json, model.safetensors
    tokenizer/                                       vocab.json, merges.txt or tokenizer.json
    scheduler/, inverse_scheduler/ (optional)        scheduler_config.json
    feature_extractor/ (optional)                    preprocessor_config.json

Names of files, classes and weights are those that diffusers and transformers have written over the years, as far as
they mean the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindiffedit.errors import InputError, first_line


class CheckpointError(InputError):
    """A checkpoint that is missing, incomplete, corrupt or of another kind. The message says what to do."""


class WeightsError(CheckpointError):
    """Weights that do not fit their model: missing, extra, misshapen, or not finite. All are listed."""


def some(names: Sequence[str], most: int = 12, separator: str = ", ") -> str:
    """The first ``most`` of some names for a message, and how many more there are."""
    if not names:
        return "nothing"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def held_by(folder: Path) -> str:
    """What lies in a folder, for a message."""
    return some(sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else [])


# --- the layout ------------------------------------------------------------------------------------

INDEX_FILE = "model_index.json"
"""The file that makes a folder a checkpoint: {component: [library, class]}."""


@dataclass(frozen=True)
class ModelKind:
    """A component with weights.

    Attributes:
        class_names: the classes that `model_index.json` may name for it.
        stem: its weights are `<stem>.safetensors`.
        extra: pattern of weights that files hold and models rightly have no parameter for.
        wide: pattern of weights that are float32 where float16 is asked for.
        inner: what the parameters' names begin with and the names in a file may lack, since transformers 5.6 has CLIP's
            halves without a model inside.
    """

    class_names: tuple[str, ...]
    stem: str
    extra: str | None = None
    wide: str | None = None
    inner: str = ""


POSITION_IDS = r"(.*\.)?embeddings\.position_ids"
"""Older transformers wrote the constant table 0, 1, 2, ... of positions as if it were a weight."""

MODELS = {
    "vae": ModelKind(("AutoencoderKL",), "diffusion_pytorch_model"),
    "text_encoder": ModelKind(("CLIPTextModel",), "model", POSITION_IDS, inner="text_model."),
    "unet": ModelKind(("UNet2DConditionModel",), "diffusion_pytorch_model"),
    "safety_checker": ModelKind(("StableDiffusionSafetyChecker",), "model", POSITION_IDS, inner="vision_model."),
}
"""The components with weights."""

REQUIRED = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
"""The components that every checkpoint has."""

COMPONENTS = (*REQUIRED, "inverse_scheduler", "safety_checker", "feature_extractor")
"""All components."""

# transformers 5 has one class for both kinds; those after the first two are its names for a tokenizer.json alone.
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "TokenizersBackend", "PreTrainedTokenizerFast")
# The second is the old name of the first; transformers 5 drops it.
_FEATURE_EXTRACTORS = (
    "CLIPImageProcessor",
    "CLIPFeatureExtractor",
    "CLIPImageProcessorFast",
    "CLIPImageProcessorPil",
)
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

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


def class_names(component: str) -> tuple[str, ...]:
    """The classes that a component may be of, the usual one first; none for a scheduler, which may be of any."""
    if component in MODELS:
        return MODELS[component].class_names
    return {"tokenizer": _TOKENIZERS, "feature_extractor": _FEATURE_EXTRACTORS}.get(component, ())


def small_files(component: str) -> tuple[str, ...]:
    """The files that a component can have beside weights."""
    if component in MODELS:
        return ("config.json",)
    if component == "tokenizer":
        return _TOKENIZER_FILES
    return _PROCESSOR_FILES if component == "feature_extractor" else ("scheduler_config.json",)


# --- json ------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete. Copy or download it again.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({first_line(error)}). Copy or download the checkpoint again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_processor(folder: Path) -> dict[str, Any]:
    """The config of a folder's image processor; transformers 5 writes it into that of the processor around it."""
    file = next((folder / name for name in _PROCESSOR_FILES if (folder / name).is_file()), None)
    config = read_json(file or folder / _PROCESSOR_FILES[0])
    inner = config.get("image_processor")
    return inner if isinstance(inner, dict) else config


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json, checked to be of the Stable Diffusion 1 and 2 layout as far as names tell.

    Raises:
        CheckpointError: there is no such folder or file, or it belongs to another family of models.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. Give a checkpoint folder with a {INDEX_FILE}.")
    path = folder / INDEX_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {INDEX_FILE}, so it is not a checkpoint folder; it holds {held_by(folder)}. "
            f"Expected a folder in diffusers' layout, as save_pretrained writes it."
        )
    index = read_json(path)
    for name, family in _OTHER_FAMILIES.items():
        if named_class(index, folder, name) is not None:
            raise CheckpointError(
                f"{folder} is a {index.get('_class_name', 'checkpoint')} with a {name}, which belongs to "
                f"{family}. DiffEdit runs on Stable Diffusion 1.x and 2.x checkpoints."
            )
    return index


def named_class(index: Mapping[str, Any], folder: Path, component: str) -> str | None:
    """The class that a folder's index names for a component; None where it has none.

    Raises:
        CheckpointError: the entry is not [library, class].
    """
    entry = index.get(component)
    if entry is None:
        return None
    if not (isinstance(entry, list) and len(entry) == 2 and all(e is None or isinstance(e, str) for e in entry)):
        raise CheckpointError(f"{folder / INDEX_FILE}: {component}: expected [library, class], got {entry!r}")
    return None if entry[1] is None else entry[1].removeprefix("Flax")
