"""Tokenizers in the forms of transformers 4 and 5, with and without a length; all give the ids of the plain files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import MODEL_FILES, assert_same, change_json, read_tensors, write_tensors

from mindiffedit import StableDiffusionDiffEditPipeline, load_component
from mindiffedit.checkpoints import models, survey
from mindiffedit.checkpoints.layout import CheckpointError

TEXTS = [
    "a red apple, 3 pears & <one> CAT's",
    "",
    "ein süßer Äpfel über\tÉtagen",
    "红苹果 りんご",
    "🍎 house!!! " + "a tree " * 60,
]


def ids(tokenizer, texts=TEXTS):
    return tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="np").input_ids


def to_version_5(folder, *, pairs=False, added=(), **config):
    """The tokenizer as transformers 5 writes it: tokenizer.json and a config, and nothing else."""
    from transformers import CLIPTokenizerFast

    place = folder / "tokenizer"
    tokenizer = CLIPTokenizerFast.from_pretrained(str(place))
    tokenizer.add_tokens(list(added))
    tokenizer.save_pretrained(str(place))
    whole = json.loads((place / "tokenizer.json").read_text())
    if pairs:  # as the library writes them since 0.20
        whole["model"]["merges"] = [p.split(" ") if isinstance(p, str) else p for p in whole["model"]["merges"]]
    else:
        whole["model"]["merges"] = [p if isinstance(p, str) else " ".join(p) for p in whole["model"]["merges"]]
    (place / "tokenizer.json").write_text(json.dumps(whole))
    old = json.loads((place / "tokenizer_config.json").read_text())
    for file in ("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"):
        (place / file).unlink(missing_ok=True)
    new = {key: old[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token", "model_max_length")}
    new = {**new, "backend": "tokenizers", "is_local": False, "tokenizer_class": "CLIPTokenizer", **config}
    (place / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in new.items() if v is not None}))
    return place


VERSION_5 = {
    "plain": {},
    "pairs of merges": dict(pairs=True),
    "a list of special tokens": dict(extra_special_tokens=["<|startoftext|>"]),
    "no list of them": dict(extra_special_tokens=[]),
    "padding of null": dict(pad_token=None),
    "tokens as objects": dict(eos_token={"__type": "AddedToken", "content": "<|endoftext|>", "special": True,
                                         "lstrip": False, "rstrip": False, "normalized": False,
                                         "single_word": False}),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_a_tokenizer_json_alone(layout, request, tmp_path):
    folder = request.getfixturevalue(f"{layout}_folder")
    expected = load_component(folder, "tokenizer")
    for form, options in VERSION_5.items():
        if layout == "sd2" and form == "padding of null":
            continue  # without a word, nothing says that 2.x pads with '!'
        copy = Path(shutil.copytree(folder, tmp_path / form))
        to_version_5(copy, **options)
        survey.check_folder(copy)
        tokenizer = load_component(copy, "tokenizer")
        assert type(tokenizer).__name__ == "CLIPTokenizer" and len(tokenizer) == len(expected), form
        assert tokenizer.pad_token == expected.pad_token and tokenizer.model_max_length == 77, form
        assert np.array_equal(ids(tokenizer), ids(expected)), form
        # And alone, without a folder around it.
        assert np.array_equal(ids(load_component(copy / "tokenizer", "tokenizer")), ids(expected)), form


def test_classes_that_read_a_tokenizer_json(copy):
    import transformers

    kinds = {
        "CLIPTokenizerFast": transformers.CLIPTokenizerFast,
        "TokenizersBackend": transformers.CLIPTokenizer,
        "PreTrainedTokenizerFast": transformers.CLIPTokenizer,
    }
    expected = {name: ids(kind.from_pretrained(str(copy / "tokenizer"))) for name, kind in kinds.items()}
    to_version_5(copy, extra_special_tokens=[])
    for name, kind in kinds.items():
        change_json(copy / "model_index.json", tokenizer=["transformers", name])
        tokenizer = load_component(copy, "tokenizer")
        assert type(tokenizer) is kind and np.array_equal(ids(tokenizer), expected[name])


def test_words_that_were_added(copy, tmp_path):
    to_version_5(copy, added=("<cat-toy>", "zzz"))
    tokenizer = load_component(copy, "tokenizer")
    first = len(load_component(copy, "tokenizer").get_vocab()) - 2
    assert tokenizer("a <cat-toy> zzz").input_ids[-3:-1] == [first, first + 1]


def test_an_edit_with_files_of_version_5(checked_folder, tmp_path):
    """Tokenizer, text encoder, safety checker and feature extractor, all in new forms; saved again for diffusers."""
    from diffusers import StableDiffusionPipeline

    folder = Path(shutil.copytree(checked_folder, tmp_path / "new"))
    to_version_5(folder)
    for part, inner in (("text_encoder", "text_model."), ("safety_checker", "vision_model.")):
        tensors = read_tensors(folder / MODEL_FILES[part])
        write_tensors(folder / MODEL_FILES[part], {k.removeprefix(inner): v for k, v in tensors.items()})
        config = json.loads((folder / part / "config.json").read_text())
        config.pop("torch_dtype", None)
        (folder / part / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    place = folder / "feature_extractor"
    inside = json.loads((place / "preprocessor_config.json").read_text())
    (place / "preprocessor_config.json").unlink()
    inside |= {"image_processor_type": "CLIPImageProcessorFast", "data_format": "channels_first", "device": None}
    (place / "processor_config.json").write_text(
        json.dumps({"image_processor": inside, "processor_class": "CLIPProcessor"})
    )
    change_json(folder / "model_index.json", feature_extractor=["transformers", "CLIPImageProcessorFast"])
    survey.check_folder(folder)
    pipe = StableDiffusionDiffEditPipeline.from_pretrained(folder, mode="pynative")
    for name in ("text_encoder", "safety_checker"):
        assert_same(getattr(pipe, name), read_tensors(checked_folder / MODEL_FILES[name]))
    before = StableDiffusionDiffEditPipeline.from_pretrained(checked_folder, mode="pynative")
    for text in ("a red apple", "the dog"):
        mine, expected = (p.encode_prompt(text, None, 1, False)[0].asnumpy() for p in (pipe, before))
        assert np.array_equal(mine, expected)
    picture = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    pixels = [p.feature_extractor(picture, return_tensors="np").pixel_values for p in (pipe, before)]
    assert np.array_equal(*pixels)
    # A word of a textual inversion comes and goes.
    pipe.load_textual_inversion({"<new>": np.ones(32, np.float32)})
    assert pipe.tokenizer("<new>").input_ids[1] == len(before.tokenizer)
    pipe.unload_textual_inversion()
    assert np.array_equal(ids(pipe.tokenizer), ids(before.tokenizer))
    pipe.save_pretrained(tmp_path / "saved")
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", low_cpu_mem_usage=False)
    assert np.array_equal(ids(theirs.tokenizer), ids(before.tokenizer))


def test_a_tokenizer_json_that_is_no_clip(copy):
    place = to_version_5(copy)
    whole = json.loads((place / "tokenizer.json").read_text())
    for damaged in ({}, {"model": {}}, {**whole, "model": {**whole["model"], "end_of_word_suffix": None}}):
        (place / "tokenizer.json").write_text(json.dumps(damaged))
        with pytest.raises(CheckpointError, match="tokenizer.json (is damaged|holds another kind)"):
            load_component(copy, "tokenizer")
    (place / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="lacks vocab.json and merges.txt, and has no tokenizer.json"):
        survey.check_folder(copy)


def test_no_length_or_another_than_the_text_encoder_reads(copy, caplog):
    """The text encoder's positions count; a tokenizer that is shorter keeps its own length."""
    long = "a red apple on a table " * 40
    pipe = StableDiffusionDiffEditPipeline.from_pretrained(copy, mode="pynative", requires_safety_checker=False)
    expected = {text: pipe.encode_prompt(text, None, 1, True, "a dog") for text in ("a red apple", long)}
    config = json.loads((copy / "tokenizer/tokenizer_config.json").read_text())
    config.pop("model_max_length")
    for length in ({}, {"model_max_length": 10**30}, {"model_max_length": 1000}, {"model_max_length": 78}):
        (copy / "tokenizer/tokenizer_config.json").write_text(json.dumps(config | length))
        pipe.tokenizer = load_component(copy, "tokenizer")
        assert pipe.tokenizer.model_max_length > 77
        for text, embeds in expected.items():
            caplog.clear()
            for ours, theirs in zip(pipe.encode_prompt(text, None, 1, True, "a dog"), embeds):
                assert ours.shape == (1, 77, 32) and np.array_equal(ours.asnumpy(), theirs.asnumpy())
            said = [record.getMessage() for record in caplog.records if "cut off" in record.getMessage()]
            assert len(said) == (text is long)
    change_json(copy / "tokenizer/tokenizer_config.json", model_max_length=20)
    pipe.tokenizer = load_component(copy, "tokenizer")
    assert pipe.encode_prompt("a dog", None, 1, False)[0].shape == (1, 20, 32)


def test_a_tokenizer_without_special_tokens(copy, sd1_folder):
    """Nulls in its config: CLIP's own take their place."""
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    change_json(copy / "tokenizer/tokenizer_config.json", **dict.fromkeys(names))
    (copy / "tokenizer/special_tokens_map.json").unlink()
    tokenizer = models.load_component(copy, "tokenizer")
    assert np.array_equal(ids(tokenizer), ids(load_component(sd1_folder, "tokenizer")))


def test_language_models_of_version_5(t5_folder, blip_folder, tmp_path):
    """Their tokenizers' lists of special tokens, and BLIP's image processor inside the config of its processor."""
    from mindiffedit import Captioner, PromptGenerator
    from mindiffedit.text import language_models

    picture = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    for kind, writer, folder, gone in (
        ("prompt model", PromptGenerator, t5_folder, ("special_tokens_map.json",)),
        ("caption model", Captioner, blip_folder, ("special_tokens_map.json", "vocab.txt")),
    ):
        new = Path(shutil.copytree(folder, tmp_path / kind))
        for file in gone:
            (new / file).unlink()
        path = new / "tokenizer_config.json"
        config = json.loads(path.read_text())
        more = config.pop("additional_special_tokens")
        path.write_text(json.dumps({**config, "extra_special_tokens": more, "backend": "tokenizers"}))
        if kind == "caption model":
            inside = json.loads((new / "preprocessor_config.json").read_text())
            (new / "preprocessor_config.json").unlink()
            (new / "processor_config.json").write_text(json.dumps({"image_processor": inside}))
        mine, expected = (
            writer._preparation(place, language_models.find(kind, place).config) for place in (new, folder)
        )
        tokenizers = [getattr(found, "tokenizer", found) for found in (mine, expected)]
        for text in ("a red apple on a table", "dog"):
            assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids
        assert tokenizers[0].all_special_tokens == tokenizers[1].all_special_tokens
        if kind == "caption model":
            pixels = [found.image_processor(picture, return_tensors="np").pixel_values for found in (mine, expected)]
            assert np.array_equal(*pixels)
