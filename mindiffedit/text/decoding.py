"""Text written by mindone's models, one token after another.

Not by their ``generate()``, which lacks kernels on a CPU and has no door for a seed (docs/prompts.md). What is read (a
sentence by T5, a picture by BLIP) is encoded once, by mindone's encoder, operator by operator. Writing is the same
small step many times, so the step is one graph of fixed shapes: the keys and values of the tokens so far lie in slots
of a memory of fixed length, those of what was read beside them, and a mask hides the empty slots. Nothing compiles
again as the text grows, nor for another text of about the same length. In mode "pynative" the same functions run
operator by operator.

The steps are pure; tokens are chosen on the host, in NumPy, so a seed means the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import ops

from mindiffedit import options
from mindiffedit.noise import randomness
from mindiffedit.runtime.graphs import Graphs
from mindiffedit.runtime.kernels import eagerly

__all__ = ["BlipDecoder", "Decoder", "Sampler", "T5Decoder", "likeliest", "write"]

CHUNK = 32
"""Lengths are rounded up to multiples of this: texts of about the same length share a graph."""

HIDDEN = np.finfo(np.float32).min / 2
"""Added to a score that must not count; half of the least float32, so that a score below 0 leaves it finite."""


def likeliest(logits: np.ndarray) -> np.ndarray:
    """Greedy decoding: the largest of each row of (rows, vocabulary)."""
    return logits.argmax(axis=-1)


class Sampler:
    """Draws a token for each row, as transformers' sampling does: temperature, then the ``top_k`` likeliest.

    Args:
        temperature: the logits are divided by it; above 0.
        top_k: all but so many of the largest logits of a row are left out (equals of the last are kept); None: none.
        rng: a noise source of ``randomness``. One uniform number is drawn for each row at each step.
    """

    def __init__(self, temperature: float, top_k: int | None, rng: randomness.RandomStream):
        self._temperature, self._top_k, self._rng = temperature, top_k, rng

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        cumulative = np.cumsum(self.probabilities(logits), axis=-1)
        bounds = randomness.uniform(len(logits), self._rng)[:, None] * cumulative[:, -1:]
        return (cumulative <= bounds).sum(axis=-1)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """float64 (rows, vocabulary) of the same shape; rows sum to 1."""
        scores = logits.astype(np.float64) / self._temperature
        if self._top_k is not None and self._top_k < scores.shape[-1]:
            least = np.partition(scores, -self._top_k, axis=-1)[:, -self._top_k, None]
            scores = np.where(scores < least, -np.inf, scores)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)


def write(
    decoder: Decoder,
    source: np.ndarray,
    prefix: Sequence[int],
    max_tokens: int,
    choose: Callable[[np.ndarray], np.ndarray] = likeliest,
    rows: int = 1,
) -> list[list[int]]:
    """Texts about one source, as token ids without the prefix; each ends with its end token, or is cut off.

    Args:
        decoder: of the model.
        source: what ``decoder.encode`` gave, (tokens, width) float32.
        prefix: the first tokens of every text; at least one.
        max_tokens: largest number of tokens to write after the prefix.
        choose: logits (rows, vocabulary) float32 -> token ids (rows,).
        rows: number of texts, which are written side by side.

    Raises:
        options.NumericalError: for NaN or inf in the logits; ``step`` counts the tokens written before.
    """
    pages = Pages(decoder, source, rows, len(prefix) + max_tokens - 1)
    for token in prefix:
        logits = pages.advance(np.full(rows, token))
    texts: list[list[int]] = [[] for _ in range(rows)]
    done = np.zeros(rows, bool)
    for count in range(max_tokens):
        if not np.isfinite(logits[~done]).all():
            raise options.NumericalError(
                f"The {decoder.name} gave NaN or infinite scores for token {count + 1}; load it in float32 or "
                f"bfloat16.",
                decoder.name,
                count,
            )
        tokens = choose(logits)
        for row in np.flatnonzero(~done):
            texts[row].append(int(tokens[row]))
        done |= np.isin(tokens, decoder.ends)
        if done.all() or count == max_tokens - 1:
            break
        logits = pages.advance(np.where(done, decoder.pad, tokens))
    return texts


class Pages:
    """Texts under way: the memory of what they hold, and how far they are.

    Args:
        decoder, source, rows: as for ``write``.
        length: largest number of tokens that each of the texts is given.
    """

    def __init__(self, decoder: Decoder, source: np.ndarray, rows: int, length: int):
        length = -(-length // CHUNK) * CHUNK
        self._decoder, self._position = decoder, 0
        self._rows = np.arange(rows * decoder.heads, dtype=np.int32)
        self._bias = decoder.bias(length)
        self._hidden = np.where(np.tri(length, dtype=bool), 0, HIDDEN).astype(np.float32)
        empty = np.zeros((rows * decoder.heads, length, decoder.size), np.float32)
        self._memory = [ms.Tensor(empty).astype(decoder.dtype) for _ in range(2 * decoder.layers)]
        parts, mask = decoder.read(source)
        self._source = [ms.Tensor(part).astype(decoder.dtype) for part in parts]
        self._mask = ms.Tensor(mask)

    def advance(self, tokens: np.ndarray) -> np.ndarray:
        """Logits (rows, vocabulary) float32 for the tokens that follow these, (rows,)."""
        here = self._position
        logits, *self._memory = self._decoder.step(
            ms.Tensor(tokens.astype(np.int32)),
            ms.Tensor(np.array([here], np.int32)),
            ms.Tensor(np.stack([self._rows, np.full_like(self._rows, here)], axis=1)),
            ms.Tensor(self._bias[:, here] + self._hidden[here]),
            self._mask,
            *self._memory,
            *self._source,
        )
        self._position += 1
        return logits.astype(ms.float32).asnumpy()


class Decoder:
    """What writing needs to know of a model. Subclasses are for one class of model each.

    ``step(tokens, position, slots, bias, mask, *memory)`` takes

    - tokens (rows,) int32 and their place in the texts, from 0, position (1,) int32;
    - slots (rows * heads, 2) int32, where in the memory their keys and values go;
    - bias (heads or 1, length) float32, added to the scores of the texts' own tokens, which hides the empty slots; mask
      (source slots,) float32, the same for the source's padding;
    - memory: keys, then values, of every layer, (rows * heads, length, size), of the texts; keys, then values, (heads,
      source slots, size), of the source;

    and gives logits (rows, vocabulary), and the texts' memory with this token in it.

    Args:
        model: a model of mindone in inference mode.
        mode: "graph" (the step is compiled) or "pynative".
        cache: a ``compile_cache.CompileCache``, or None to compile afresh.

    Attributes:
        name: for messages.
        layers, heads, size: of the decoder's attention; size is that of one head.
        start: id of the token that begins a text. ends: of those that end one. pad: of what follows an end.
        dtype: of the model's weights, and of the memory.
    """

    name: str
    layers: int
    heads: int
    size: int
    start: int
    ends: tuple[int, ...]
    pad: int

    def __init__(self, model, mode: str = "graph", cache=None):
        self.model, self.dtype = model, model.dtype
        step = self._step()
        if mode == "pynative":
            self.step = eagerly()(step)
        else:
            key = (type(self).__name__, self.layers, self.heads, self.size)
            self.step = Graphs(cache).compiled(step, key, model)

    def encode(self, content: np.ndarray) -> np.ndarray:
        """What is to be written about, (tokens, width) float32."""
        with eagerly():
            return self._encode(content).astype(ms.float32).asnumpy()[0]

    def read(self, source: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Keys, then values, of every layer for an encoded source, (heads, slots, size) each, and the slots' mask."""
        slots = -(-len(source) // CHUNK) * CHUNK
        mask = np.where(np.arange(slots) < len(source), 0, HIDDEN).astype(np.float32)
        parts = []
        with eagerly():
            states = ms.Tensor(source).astype(self.dtype)
            for projection in self._projections():
                part = projection(states).astype(ms.float32).asnumpy()
                part = part.reshape(len(source), self.heads, self.size).transpose(1, 0, 2)
                parts.append(np.pad(part, ((0, 0), (0, slots - len(source)), (0, 0))))
        return parts, mask

    def bias(self, length: int) -> np.ndarray:
        """What is added to the scores of a text's own tokens: (heads or 1, tokens, tokens before) float32."""
        return np.zeros((1, length, length), np.float32)

    def _encode(self, content: np.ndarray) -> ms.Tensor:
        raise NotImplementedError

    def _projections(self) -> list:
        """Layers that make the keys of each decoder layer out of encoder states, then those for the values."""
        raise NotImplementedError

    def _step(self) -> Callable:
        """The function ``step``."""
        raise NotImplementedError


def _remember(memory, states, slots):
    """The memory with one more token, whose states are (rows, heads * size)."""
    return ops.TensorScatterUpdate()(memory, slots, states.reshape(slots.shape[0], -1).astype(memory.dtype))


def _attend(query, keys, values, bias, heads, scale):
    """Attention of one token of each text to the texts so far; (rows, heads * size) in and out."""
    rows, width = query.shape
    scores = ops.BatchMatMul(transpose_b=True)(query.reshape(rows * heads, 1, width // heads), keys)
    scores = scores.astype(ms.float32).reshape(rows, heads, -1) * scale + bias
    weights = ops.softmax(scores, -1).astype(values.dtype).reshape(rows * heads, 1, -1)
    return ops.BatchMatMul()(weights, values).reshape(rows, width)


def _attend_source(query, keys, values, mask, heads, scale):
    """Attention of one token of each text to the source that all share; (rows, heads * size) in and out."""
    rows, width = query.shape
    query = query.reshape(rows, heads, width // heads).swapaxes(0, 1)
    scores = ops.BatchMatMul(transpose_b=True)(query, keys)
    weights = ops.softmax(scores.astype(ms.float32) * scale + mask, -1).astype(values.dtype)
    return ops.BatchMatMul()(weights, values).swapaxes(0, 1).reshape(rows, width)


def position_bucket(relative_position, bidirectional=True, num_buckets=32, max_distance=128):
    """T5's buckets of distances, int32 tensor of any shape in and out, rounded as transformers rounds them.

    Half of the buckets are for a single distance each, the others grow as its logarithm does up to ``max_distance``; a
    reader (``bidirectional``) has one half of all for either direction, a writer looks back only.

    On a CPU MindSpore's logarithm is off in the last bit, which puts the distances 16, 32 and 64 of mindone's version
    into the bucket before their own.
    """
    distance = relative_position.asnumpy().astype(np.int64)
    first = np.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        first = np.where(distance > 0, num_buckets, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = num_buckets // 2
    # The logarithm in float64, so that float32 has its nearest value; then float32 where the reference has it.
    grown = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact), dtype=np.float64).astype(np.float32)
    grown = grown / np.float32(np.log(max_distance / exact)) * np.float32(num_buckets - exact)
    far = np.minimum(exact + grown.astype(np.int64), num_buckets - 1)
    return ms.Tensor((first + np.where(distance < exact, distance, far)).astype(np.int32))


class T5Decoder(Decoder):
    """For ``T5ForConditionalGeneration``. ``encode`` takes token ids (tokens,)."""

    name = "prompt model"

    def __init__(self, model, mode: str = "graph", cache=None):
        config = model.config
        self.layers, self.heads, self.size = config.num_decoder_layers, config.num_heads, config.d_kv
        ends = config.eos_token_id
        self.ends = tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)
        self.pad = config.pad_token_id
        # T5 begins its texts with the padding token; a config that says so only in this way is an old one.
        self.start = self.pad if config.decoder_start_token_id is None else config.decoder_start_token_id
        for stack in (model.encoder, model.decoder):
            stack.block[0].layer[0].SelfAttention._relative_position_bucket = position_bucket
        super().__init__(model, mode, cache)

    def bias(self, length: int) -> np.ndarray:
        """T5 knows positions only by this bias; its first layer has it for all of them."""
        first = self.model.decoder.block[0].layer[0].SelfAttention
        with eagerly():
            return first.compute_bias(length, length).astype(ms.float32).asnumpy()[0]

    def _encode(self, content: np.ndarray) -> ms.Tensor:
        return self.model.encoder(ms.Tensor(content[None], ms.int32), return_dict=False)[0]

    def _projections(self) -> list:
        cross = [block.layer[1].EncDecAttention for block in self.model.decoder.block]
        return [attention.k for attention in cross] + [attention.v for attention in cross]

    def _step(self) -> Callable:
        model, layers, heads = self.model, self.layers, self.heads
        decoder = model.decoder
        scale = self.model.config.d_model**-0.5 if self.model.config.tie_word_embeddings else 1.0

        def step(tokens, position, slots, bias, mask, *memory):
            # The residual stream is float32 in every dtype: T5's values outgrow float16.
            hidden = model.shared(tokens).astype(ms.float32)
            all_keys, all_values = [], []
            for i in range(layers):
                layer = decoder.block[i].layer
                attention, cross = layer[0].SelfAttention, layer[1].EncDecAttention
                normed = layer[0].layer_norm(hidden)
                keys = _remember(memory[i], attention.k(normed), slots)
                values = _remember(memory[layers + i], attention.v(normed), slots)
                all_keys.append(keys)
                all_values.append(values)
                # T5's weights were trained without a scale.
                context = _attend(attention.q(normed), keys, values, bias, heads, 1.0)
                hidden = hidden + attention.o(context).astype(ms.float32)
                context = _attend_source(
                    cross.q(layer[1].layer_norm(hidden)),
                    memory[2 * layers + i],
                    memory[3 * layers + i],
                    mask,
                    heads,
                    1.0,
                )
                hidden = hidden + cross.o(context).astype(ms.float32)
                hidden = layer[2](hidden).astype(ms.float32)
            logits = model.lm_head(decoder.final_layer_norm(hidden) * scale)
            return (logits, *all_keys, *all_values)

        return step


class BlipDecoder(Decoder):
    """For ``BlipForConditionalGeneration``. ``encode`` takes a picture, (3, height, width) float32, normalised."""

    name = "caption model"

    def __init__(self, model, mode: str = "graph", cache=None):
        config = model.config.text_config
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.size = config.hidden_size // config.num_attention_heads
        self.ends, self.pad = (config.sep_token_id,), config.pad_token_id
        self.start = config.bos_token_id
        if getattr(config, "position_embedding_type", "absolute") != "absolute":
            raise ValueError(
                f"This caption model has {config.position_embedding_type!r} positions; only 'absolute' ones are known."
            )
        super().__init__(model, mode, cache)

    def _encode(self, content: np.ndarray) -> ms.Tensor:
        return self.model.vision_model(ms.Tensor(content[None]).astype(self.dtype), return_dict=False)[0]

    def _projections(self) -> list:
        cross = [layer.crossattention.self for layer in self.model.text_decoder.bert.encoder.layer]
        return [attention.key for attention in cross] + [attention.value for attention in cross]

    def _step(self) -> Callable:
        text, layers, heads = self.model.text_decoder, self.layers, self.heads
        embeddings, stack = text.bert.embeddings, text.bert.encoder
        scale = self.size**-0.5

        def step(tokens, position, slots, bias, mask, *memory):
            hidden = embeddings.word_embeddings(tokens) + embeddings.position_embeddings(position)
            hidden = embeddings.LayerNorm(hidden)
            all_keys, all_values = [], []
            for i in range(layers):
                layer = stack.layer[i]
                attention, cross = layer.attention.self, layer.crossattention.self
                keys = _remember(memory[i], attention.key(hidden), slots)
                values = _remember(memory[layers + i], attention.value(hidden), slots)
                all_keys.append(keys)
                all_values.append(values)
                context = _attend(attention.query(hidden), keys, values, bias, heads, scale)
                hidden = layer.attention.output(context, hidden)
                context = _attend_source(
                    cross.query(hidden),
                    memory[2 * layers + i],
                    memory[3 * layers + i],
                    mask,
                    heads,
                    scale,
                )
                hidden = layer.crossattention.output(context, hidden)
                hidden = layer.feed_forward_chunk(hidden)
            return (text.cls(hidden), *all_keys, *all_values)

        return step
