"""Textual inversion: learned embeddings become tokens of the tokenizer and rows of the text encoder's table.

The table has one row more for each vector, so the text encoder is compiled again, and nothing else is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np

from mindiffedit.arrays import is_tensor, to_numpy
from mindiffedit.checkpoints.hub import resolve_file
from mindiffedit.checkpoints.layout import some
from mindiffedit.checkpoints.weight_files import read_tensors
from mindiffedit.errors import InputError, InputTypeError, Message

logger = logging.getLogger(__name__)

FILE_NAME = "learned_embeds.safetensors"

NAMELESS = ("emb_params", "*", "clip_l", "clip_g")
"""What trainers other than diffusers call an embedding in its file."""


def read(source, **place) -> tuple[Any, str]:
    """The embeddings that a user means, an array or a dict of arrays, and what to call them in messages.

    ``source`` is a file, folder or hub id, for which ``place`` has further arguments of ``hub.resolve_file``; a
    tensor or array; or a dict from token to tensor, or of A1111's form. A file that does not name its embedding does so
    by its own name, as A1111 has it.
    """
    if isinstance(source, np.ndarray) or is_tensor(source):
        return to_numpy(source), "the given embedding"
    if isinstance(source, Mapping):
        return dict(source), "the given embedding"
    path = resolve_file(source, default=FILE_NAME, **place)
    content = read_tensors(path)[0]
    if len(content) == 1 and set(content) <= set(NAMELESS):
        content = dict(zip([path.stem], content.values()))  # W15
    return content, str(path)


def word_of(path) -> str:
    """The word that an embedding's file gives itself.

    Raises:
        ValueError: the file cannot be read or holds no textual inversion.
    """
    return _named(*read(path), token=None)[0]


def occurring(words: Sequence[str], text: str, flags: int = 0) -> list[str]:
    """Which of the words a tokenizer finds in a text, as they stand there; where several begin alike, the longest."""
    return re.findall(_any_of(words), text, flags) if words else []


def expanded(text: str, tokenizer) -> str:
    """The text with a word of several vectors followed by the words of its further vectors."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    words = {token.content for token in added.values() if not token.special}

    return re.sub(_any_of(words), lambda match: " ".join(_family(match[0], words)), text) if words else text


def _family(word: str, words: Container[str]) -> list[str]:
    """A word and those of its further vectors, as far as they are among `words`."""
    family = [word]
    while f"{word}_{len(family)}" in words:
        family.append(f"{word}_{len(family)}")
    return family


def _any_of(words) -> str:
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


def check(contents: Sequence[tuple[Any, str]], tokens: Sequence[Any], tokenizer, text_encoder):
    """New tokens and their vectors, one token for each, checked against tokenizer and text encoder.

    Args:
        contents: as ``read`` returns them.
        tokens: a name for each, None for the one in the file. With one array in ``contents``, a name for each row.
        tokenizer, text_encoder: of the pipeline.

    Returns:
        Tokens and float32 vectors. A token "t" of n vectors becomes "t", "t_1", …, "t_{n-1}".

    Raises:
        ValueError: counts, names or widths do not fit.
    """
    if len(contents) == 1 and len(tokens) > 1 and isinstance(contents[0][0], np.ndarray):
        rows, what = contents[0]
        contents = [(row, what) for row in rows]
    if len(contents) != len(tokens):
        raise InputError(
            "There are {count} tokens for {embeddings} embeddings; give a token for each, or None.",
            parameter="token",
            count=len(tokens),
            embeddings=len(contents),
        )
    check_ids([len(tokenizer) - 1], tokenizer, text_encoder)
    width = text_encoder.config.hidden_size
    vocabulary = tokenizer.get_vocab()
    names: list[str] = []
    vectors: list[np.ndarray] = []
    for (content, what), token in zip(contents, tokens):
        name, embedding = _named(content, what, token)
        embedding = np.atleast_2d(to_numpy(embedding))
        if embedding.dtype.kind != "f" or embedding.ndim != 2 or embedding.shape[1] != width:
            raise InputError(
                "{what}: the embedding of {name!r} has shape {shape} and dtype {dtype}, but this text encoder takes "
                "vectors of {width} floats; it was made for another model.",
                parameter="pretrained_model_name_or_path",
                what=what,
                name=name,
                shape=embedding.shape,
                dtype=embedding.dtype,
                width=width,
            )
        if not len(embedding) or not np.isfinite(embedding).all():
            raise InputError(
                "{what}: the embedding of {name!r} is empty, or has NaN or infinite values.",
                parameter="pretrained_model_name_or_path",
                what=what,
                name=name,
            )
        family = [name, *(f"{name}_{i}" for i in range(1, len(embedding)))]
        taken = [part for part in [*family, f"{name}_1"] if part in vocabulary or part in names]
        if taken:
            raise InputError(
                "{what}: the token {name!r} is in the tokenizer already, as a part of words or as another embedding;"
                " give another by {token}.",
                parameter="token",
                what=what,
                name=taken[0],
            )
        names += family
        vectors += list(embedding.astype(np.float32))
    return names, vectors


def check_ids(ids, tokenizer, text_encoder) -> None:
    """InputError for token ids beyond the text encoder's table; some devices would take zeros there, in silence.

    Pipelines that share a tokenizer and not the text encoder come to it: the words are then in the table of one alone.
    """
    size = text_encoder.config.vocab_size
    if np.max(ids, initial=-1) < size:
        return
    words = [token.content for i, token in sorted(tokenizer.added_tokens_decoder.items()) if i >= size]
    raise InputError(
        "The tokenizer has words that the text encoder has no embeddings for: {words!r}. Where another pipeline, which"
        " shares the tokenizer and not the text encoder, has loaded them, unload them there, and give each a tokenizer"
        " of its own by copy.deepcopy.",
        words=words,
    )


def _named(content, what: str, token) -> tuple[str, Any]:
    """Token and embedding of one file or tensor."""
    if isinstance(content, np.ndarray):
        label, embedding = None, content
    elif len(content) == 1:
        label, embedding = next(iter(content.items()))
    elif isinstance(content.get("string_to_param"), Mapping) and "*" in content["string_to_param"]:
        label, embedding = content.get("name"), content["string_to_param"]["*"]
    else:
        held = some(list(map(str, content)), 8)
        xl = {"clip_l", "clip_g"} <= set(content)
        raise InputError(
            "{what} is no textual inversion for this pipeline: it holds {held}; expected a single embedding, named by"
            " its token or emb_params.{kind}",
            parameter="pretrained_model_name_or_path",
            what=what,
            held=held,
            kind=" This one is for Stable Diffusion XL; take the one that was made for 1.x or 2.x." if xl else "",
        )
    name = label if token is None else token
    if name is None:
        raise InputError("{what} does not name its token; give one by {parameter}.", parameter="token", what=what)
    if not isinstance(name, str) or not name.strip():
        raise InputError(
            "{parameter} has to be a word such as '<cat-toy>', but is {name!r}.", parameter="token", name=name
        )
    if token is None and label == "emb_params":
        notice = Message("{what} does not name its token, so it is called emb_params; {token} names it.", what=what)
        logger.warning("%s", notice)
    return name, embedding


def add(tokens: Sequence[str], vectors: Sequence[np.ndarray], tokenizer, text_encoder) -> None:
    """Adds checked tokens to the tokenizer, and their vectors to the text encoder's table."""
    table = _table(text_encoder)[: len(tokenizer)]
    for token in tokens:
        tokenizer.add_tokens(token)
    _replace_table(text_encoder, np.concatenate([table, np.stack(vectors)]))


def remove(tokens: Sequence[str] | None, tokenizer, text_encoder) -> None:
    """Takes added tokens out again, all or those named with all their vectors; the others' ids move up.

    Raises:
        ValueError: a token that is none of the added ones.
        TypeError: a tokenizer that does not give up tokens.
    """
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if not token.special}
    if tokens is None:
        chosen = set(added)
    else:
        unknown = [token for token in tokens if token not in added]
        if unknown:
            raise InputError(
                "The tokens {unknown!r} are no textual inversions that are loaded; these are {known!r}.",
                parameter="tokens",
                unknown=unknown,
                known=list(added),
            )
        chosen = {part for token in tokens for part in _family(token, added)}
    if not chosen:
        return
    if not hasattr(tokenizer, "_update_trie"):
        raise InputTypeError(
            "{tokenizer!t} does not give up tokens; load the checkpoint with a CLIPTokenizer instead.",
            tokenizer=tokenizer,
        )
    gone = sorted(added[token] for token in chosen)
    check_ids(gone, tokenizer, text_encoder)
    kept = {i: token for i, token in tokenizer.added_tokens_decoder.items() if i not in gone}
    moved = {i - sum(other < i for other in gone): token for i, token in kept.items()}
    tokenizer._added_tokens_decoder = moved
    tokenizer._added_tokens_encoder = {token.content: i for i, token in moved.items()}
    # A fresh one: W8, in the reference the tokenizer goes on splitting texts at words that are gone.
    tokenizer.tokens_trie = type(tokenizer.tokens_trie)()
    tokenizer._update_trie()
    tokenizer._update_total_vocab_size()
    _replace_table(text_encoder, np.delete(_table(text_encoder), gone, axis=0))


# --- the table -------------------------------------------------------------------------------------------------------


def _table(text_encoder) -> np.ndarray:
    """The token embeddings, (tokens, width) float32."""
    import mindspore

    return text_encoder.get_input_embeddings().embedding_table.astype(mindspore.float32).asnumpy()


def _replace_table(text_encoder, table: np.ndarray) -> None:
    import mindspore

    embedding = text_encoder.get_input_embeddings()
    old = embedding.embedding_table
    values = mindspore.Tensor(np.ascontiguousarray(table))
    embedding.embedding_table = mindspore.Parameter(
        values if old.dtype == values.dtype else values.astype(old.dtype), name=old.name, requires_grad=False
    )
    embedding.vocab_size = text_encoder.config.vocab_size = len(table)
