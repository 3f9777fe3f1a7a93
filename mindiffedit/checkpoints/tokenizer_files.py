"""Tokenizers out of the files that transformers has written over the years."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindiffedit.checkpoints.layout import CheckpointError, read_json
from mindiffedit.errors import first_line

_CONFIG = "tokenizer_config.json"
_WHOLE = "tokenizer.json"
_PARTS = ("vocab.json", "merges.txt")


def check_tokenizer_files(folder: Path) -> None:
    """CheckpointError where a folder has no vocabulary of a CLIP tokenizer, in neither of its two forms."""
    missing = [name for name in _PARTS if not (folder / name).is_file()]
    if missing and not (folder / _WHOLE).is_file():
        raise CheckpointError(
            f"{folder} lacks {' and '.join(missing)}, and has no {_WHOLE} either: the checkpoint is incomplete."
        )


def _read_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}


def load_tokenizer(folder: Path, class_name: str) -> Any:
    """The tokenizer of transformers that a folder holds.

    Raises:
        CheckpointError: its files cannot be read.
    """
    import transformers

    more, changes = _read_config(folder).get("extra_special_tokens"), {}
    if isinstance(more, list):  # so does transformers 5 call what was additional_special_tokens before
        changes = {"extra_special_tokens": {}, "additional_special_tokens": more}
    try:
        return getattr(transformers, class_name).from_pretrained(str(folder), local_files_only=True, **changes)
    except Exception as error:  # whatever a broken vocabulary makes transformers raise
        raise CheckpointError(f"{folder}: the tokenizer cannot be read: {first_line(error)}.") from error


def load_clip_tokenizer(folder: Path, class_name: str) -> Any:
    """The tokenizer of a Stable Diffusion checkpoint.

    A ``tokenizer.json`` alone, as transformers 5 writes it, becomes a tokenizer of Python code, as older versions make
    of the class ``CLIPTokenizer``: it can forget the words of textual inversions.

    Args:
        folder: with ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``.
        class_name: of those that ``layout.class_names`` has for tokenizers.

    Raises:
        CheckpointError: its files are missing or cannot be read.
    """
    check_tokenizer_files(folder)
    if class_name == "CLIPTokenizerFast":
        tokenizer = load_tokenizer(folder, "CLIPTokenizerFast")
    elif all((folder / name).is_file() for name in _PARTS):
        tokenizer = load_tokenizer(folder, "CLIPTokenizer")
    else:
        with tempfile.TemporaryDirectory() as place:
            _take_apart(folder, Path(place))
            tokenizer = load_tokenizer(Path(place), "CLIPTokenizer")
            tokenizer.name_or_path = str(folder)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            setattr(tokenizer, name, "<|startoftext|>" if name == "bos_token" else "<|endoftext|>")
    return tokenizer


def _take_apart(folder: Path, place: Path) -> None:
    """Write a ``tokenizer.json`` into another folder as the files of a tokenizer of Python code."""
    whole = read_json(folder / _WHOLE)
    try:
        vocabulary, merges = whole["model"]["vocab"], whole["model"]["merges"]
        added = {str(token["id"]): dict(token) for token in whole.get("added_tokens") or ()}
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
        ending = whole["model"].get("end_of_word_suffix")
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / _WHOLE} is damaged ({first_line(error)}).") from error
    if ending != "</w>" or not isinstance(vocabulary, Mapping):
        raise CheckpointError(f"{folder / _WHOLE} holds another kind of tokenizer than CLIP's.")
    (place / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (place / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
    config = _read_config(folder)
    for token in added.values():
        token.pop("id")
    config.setdefault("added_tokens_decoder", added)
    config["tokenizer_class"] = "CLIPTokenizer"  # else transformers warns that it is called TokenizersBackend
    padding = whole.get("padding")
    if isinstance(padding, dict) and "pad_token" in padding:
        config.setdefault("pad_token", padding["pad_token"])
    (place / _CONFIG).write_text(json.dumps(config), encoding="utf-8")
    for name in ("special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            shutil.copy(folder / name, place / name)
