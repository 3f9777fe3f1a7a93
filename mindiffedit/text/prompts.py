"""Prompts that models write: by Flan-T5 from a concept, averaged into one embedding; by BLIP from a picture.

An edit from one concept to another is steadier when many sentences speak for each concept than when one does:
``PromptGenerator`` writes them and ``average_embeddings`` makes them one embedding, which ``generate_mask``, ``invert``
and the pipeline take in place of a prompt. ``Captioner`` describes a picture, for ``invert``.

MindSpore and mindone are imported when the first model is loaded: what is wrong with arguments and folders is found
before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from mindiffedit import options
from mindiffedit.arrays import to_numpy
from mindiffedit.checkpoints.hub import HubOptions
from mindiffedit.checkpoints.layout import CheckpointError, read_processor
from mindiffedit.checkpoints.tokenizer_files import load_tokenizer
from mindiffedit.errors import InputError, InputTypeError, named
from mindiffedit.images import colours
from mindiffedit.noise import randomness
from mindiffedit.runtime import compile_cache as compile_caches
from mindiffedit.runtime import devices
from mindiffedit.text import language_models

__all__ = ["Captioner", "PromptGenerator", "average_embeddings"]

MODES = ("graph", "pynative")


def _check_mode(mode) -> None:
    if mode not in MODES:
        raise InputError("{parameter} has to be one of {modes}, but is {mode!r}.", "mode", modes=MODES, mode=mode)


class _Writer:
    """What both have: a model of mindone and a decoder over it, made when it is first used.

    Args:
        model: of the class ``CLASS``.
        mode: "graph" (each token is one call of a compiled graph) or "pynative".
        compile_cache: where compiled graphs are kept for the next process, as in the pipeline's ``from_pretrained``.
    """

    KIND: str
    CLASS: str
    DECODER: str

    def __init__(self, model, mode: str, compile_cache):
        _check_mode(mode)
        classes = [base.__name__ for base in type(model).__mro__]
        if self.CLASS not in classes or not hasattr(model, "construct"):
            raise InputTypeError(
                "{parameter} has to be mindone's {wanted}, but is {module}.{kind}; "
                "{writer!t}.from_pretrained loads one.",
                parameter="model",
                wanted=self.CLASS,
                module=type(model).__module__,
                kind=type(model).__qualname__,
                writer=self,
            )
        model.set_train(False)
        self.model, self.mode = model, mode
        self.compile_cache = compile_caches.open_cache(compile_cache) if mode == "graph" else None
        self._made_decoder = None

    @classmethod
    def from_pretrained(
        cls: Any,
        path_or_id,
        *,
        mindspore_dtype=None,
        mode: str = "graph",
        compile_cache=None,
        revision: str | None = None,
        local_files_only: bool | None = None,
        cache_dir=None,
        token=None,
    ):
        """Loads the model and what prepares its input from a folder in transformers' layout, or from the hub.

        Args:
            path_or_id: a folder, or a model id on the hub.
            mindspore_dtype: dtype of the model; default float32. What the device does not have is loaded in float32
                with one warning.
            mode: "graph" or "pynative".
            compile_cache: as in the pipeline's ``from_pretrained``.
            revision: as in huggingface_hub.
            local_files_only: as in huggingface_hub.
            cache_dir: as in huggingface_hub.
            token: as in huggingface_hub.

        Raises:
            ValueError: a folder that is missing, incomplete, corrupt or of another kind of model; pickle weights;
                weights that do not fit.
        """
        _check_mode(mode)
        hub = HubOptions(cache_dir, local_files_only=local_files_only, token=token, revision=revision)
        folder = language_models.resolve_folder(cls.KIND, path_or_id, hub)
        source = language_models.find(cls.KIND, folder)
        preparation = cls._preparation(folder, source.config)
        model = language_models.load(source, dtype=devices.loadable_dtype(mindspore_dtype))
        return cls(model, preparation, mode=mode, compile_cache=compile_cache)

    @classmethod
    def _preparation(cls, folder: Path, config: dict):
        """The tokenizer or processor of a folder."""
        raise NotImplementedError

    @property
    def _decoder(self):
        if self._made_decoder is None:
            from mindiffedit.text import decoding

            self._made_decoder = getattr(decoding, self.DECODER)(self.model, self.mode, self.compile_cache)
        return self._made_decoder


def _tokenizer(folder: Path, class_name: str, size: int):
    """A tokenizer of transformers, with no id that the model's table of ``size`` embeddings has not."""
    tokenizer = load_tokenizer(folder, class_name)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= size:
        # Past the end of its table an embedding gives zeros on some devices, and no error.
        raise CheckpointError(f"{folder}: the tokenizer has ids up to {largest}, the model knows {size}.")
    return tokenizer


class PromptGenerator(_Writer):
    """Writes prompts with Flan-T5 or another T5 that follows instructions.

    Args:
        model: mindone's ``T5ForConditionalGeneration``.
        tokenizer: its tokenizer, of transformers.
        mode: see ``from_pretrained``.
        compile_cache: see ``from_pretrained``.
    """

    KIND, CLASS, DECODER = "prompt model", "T5ForConditionalGeneration", "T5Decoder"

    def __init__(self, model, tokenizer, *, mode: str = "graph", compile_cache=None):
        super().__init__(model, mode, compile_cache)
        self.tokenizer = tokenizer

    @classmethod
    def _preparation(cls, folder: Path, config: dict):
        return _tokenizer(folder, "T5TokenizerFast", config.get("vocab_size", 32128))

    def generate(
        self,
        text: str,
        *,
        num_prompts: int = 16,
        temperature: float = 0.8,
        top_k: int | None = 10,
        do_sample: bool = True,
        max_new_tokens: int = 128,
        generator=None,
    ) -> list[str]:
        """What the model answers to ``text``, ``num_prompts`` times.

        The answers are drawn side by side, with one random number for each of them and each token.

        Args:
            text: the instruction.
            num_prompts: number of answers. Without sampling all would be the same: there is one then.
            temperature: above 0; below 1 makes likely words likelier.
            top_k: draw from so many of the likeliest tokens; None or 0 for all.
            do_sample: False takes the likeliest token each time (greedy decoding).
            max_new_tokens: where an answer is cut off, in tokens.
            generator: an int seed, a ``mindiffedit.Generator``, a ``numpy.random.Generator`` or None (fresh entropy).
                The same seed gives the same prompts on every device, as far as rounding leaves the same token drawn;
                not those that PyTorch draws.

        Returns:
            The answers, special tokens removed.

        Raises:
            ValueError, TypeError: for arguments that do not fit, before the model runs.
            options.NumericalError: for NaN or inf in the model's scores.
        """
        options.check_text(text)
        options.check_positive_int("num_prompts", num_prompts)
        if options.check_switch(do_sample, "do_sample"):
            temperature = options.check_temperature(temperature)
        top_k = options.check_top_k(top_k)
        options.check_positive_int("max_new_tokens", max_new_tokens)
        rng = randomness.resolve(generator)
        if isinstance(rng, list):
            raise InputTypeError(
                "{parameter} is a list; give one seed or generator, from which all prompts are drawn.",
                parameter="generator",
            )
        ids = np.asarray(self.tokenizer(text).input_ids, np.int32)
        if len(ids) > self.tokenizer.model_max_length:
            raise InputError(
                "{parameter} has {count} tokens, but the model reads {most}; shorten it.",
                "text",
                count=len(ids),
                most=self.tokenizer.model_max_length,
            )

        from mindiffedit.text import decoding

        decoder = self._decoder
        choose = decoding.Sampler(temperature, top_k, rng) if do_sample else decoding.likeliest
        rows = num_prompts if do_sample else 1
        texts = decoding.write(decoder, decoder.encode(ids), [decoder.start], max_new_tokens, choose, rows)
        return self.tokenizer.batch_decode(texts, skip_special_tokens=True)

    def prompts_for(self, concept: str, **options_) -> list[str]:
        """Prompts for pictures with a concept in them, such as "bowl".

        Args:
            concept: a thing, in a word or a few, without an article.
            **options_: as for ``generate``.

        Returns:
            The prompts.

        Raises:
            ValueError, TypeError: for arguments that do not fit, before the model runs.
        """
        concept = options.check_text(concept, "concept").strip()
        article = "an" if concept[0].lower() in "aeiou" else "a"
        try:
            return self.generate(
                f"Write a caption for an image that contains {article} {concept}. "
                "The caption has to be in English and at most 150 characters long.",
                **options_,
            )
        except InputError as error:
            raise error.renamed(text="concept") from error


def average_embeddings(pipeline, prompts: str | Sequence[str]):
    """The mean of the embeddings of several prompts, to be given in place of one prompt.

    Each prompt goes through the pipeline's tokenizer and text encoder, padded or cut to its length, one at a time.

    Args:
        pipeline: a ``StableDiffusionDiffEditPipeline``.
        prompts: N texts, such as ``PromptGenerator`` writes; one text is a list of one.

    Returns:
        Tensor (1, L, D) in the text encoder's dtype, for ``source_prompt_embeds``, ``prompt_embeds`` and the like.

    Raises:
        ValueError, TypeError: no pipeline, no prompts, or one that is no string.
    """
    if not callable(getattr(pipeline, "encode_prompt", None)):
        raise InputTypeError(
            "{parameter} has to be a StableDiffusionDiffEditPipeline, but is {module}.{kind}.",
            parameter="pipeline",
            module=type(pipeline).__module__,
            kind=type(pipeline).__qualname__,
        )
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, (list, tuple)):
        raise InputTypeError(
            "{parameter} has to be a list of texts, but is of type {prompts!t}.", "prompts", prompts=prompts
        )
    if not prompts:
        raise InputError("{parameter} is an empty list; give at least one text.", "prompts")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InputTypeError(
                "{part} has to be a string, but is {text!r}.", "prompts", part=named(f"prompts[{i}]"), text=prompt
            )
    embeddings, _ = pipeline.encode_prompt(list(prompts), None, 1, False)
    mean = to_numpy(embeddings).mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32)

    import mindspore

    tensor = mindspore.Tensor(mean)
    return tensor if tensor.dtype == embeddings.dtype else tensor.astype(embeddings.dtype)


class Captioner(_Writer):
    """Describes pictures with BLIP.

    Args:
        model: mindone's ``BlipForConditionalGeneration``.
        processor: its ``BlipProcessor``, of transformers.
        mode: see ``from_pretrained``.
        compile_cache: see ``from_pretrained``.
    """

    KIND, CLASS, DECODER = "caption model", "BlipForConditionalGeneration", "BlipDecoder"

    def __init__(self, model, processor, *, mode: str = "graph", compile_cache=None):
        super().__init__(model, mode, compile_cache)
        self.processor = processor

    @classmethod
    def _preparation(cls, folder: Path, config: dict):
        from transformers import BlipImageProcessor, BlipProcessor

        settings = read_processor(folder)
        try:
            # Not the fast one, which is torchvision's.
            image_processor = BlipImageProcessor.from_dict(settings)
        except Exception as error:  # whatever a broken config makes transformers raise
            raise CheckpointError(f"{folder}: no image processor can be made of its config: {error}.") from error
        size = (config.get("text_config") or {}).get("vocab_size", 30524)
        return BlipProcessor(image_processor, _tokenizer(folder, "BertTokenizerFast", size))

    def caption(
        self,
        image: PIL.Image.Image | Sequence[PIL.Image.Image],
        *,
        text: str | None = None,
        max_new_tokens: int = 50,
    ) -> str | list[str]:
        """What is on a picture, in a sentence; by greedy decoding, so the same each time.

        Args:
            image: a PIL picture of any mode and size, or a list of them, which are described one after the other.
            text: how the caption begins, such as "a photograph of"; None leaves that to the model.
            max_new_tokens: where a caption is cut off, in tokens after ``text``.

        Returns:
            The caption, ``text`` included; a list of them for a list.

        Raises:
            ValueError, TypeError: for arguments that do not fit, before the model runs.
            options.NumericalError: for NaN or inf in the model's scores.
        """
        several = isinstance(image, (list, tuple))
        images: list[Any] = list(image) if isinstance(image, (list, tuple)) else [image]
        if not images:
            raise InputError("{parameter} is an empty list; give at least one picture.", parameter="image")
        for i, picture in enumerate(images):
            name = f"image[{i}]" if several else "image"
            if not isinstance(picture, PIL.Image.Image):
                raise InputTypeError(
                    "{parameter} has to be a PIL picture, but is of type {picture!t}; mindiffedit.load_image reads "
                    "files and URLs.",
                    parameter=name,
                    picture=picture,
                )
            if 0 in picture.size:
                raise InputError("{parameter} has no pixels: its size is {size}.", parameter=name, size=picture.size)
        options.check_positive_int("max_new_tokens", max_new_tokens)
        words: list[int] = []
        if text is not None:
            options.check_text(text)
            words = self.processor.tokenizer(text, add_special_tokens=False).input_ids
        most = self.model.config.text_config.max_position_embeddings
        if len(words) + max_new_tokens > most:
            raise InputError(
                "{parameter} of {count} tokens and {new} new ones are more than the {most} that the model can hold; "
                "shorten it, or give fewer {max_new_tokens}.",
                parameter="text",
                count=len(words),
                new=max_new_tokens,
                most=most,
            )

        from mindiffedit.text import decoding

        captions, decoder = [], self._decoder
        for picture in images:
            source = decoder.encode(self._pixels(picture))
            tokens = decoding.write(decoder, source, [decoder.start, *words], max_new_tokens)[0]
            captions.append(self.processor.tokenizer.decode([*words, *tokens], skip_special_tokens=True))
        return captions if several else captions[0]

    def _pixels(self, picture: PIL.Image.Image) -> np.ndarray:
        """(3, height, width) float32, of the size and scale that the model was trained with."""
        values: Any = self.processor.image_processor(colours.to_srgb(picture), return_tensors="np")
        return np.asarray(values["pixel_values"][0], np.float32)
