"""Prompts and captions against transformers: logits, tokens, embeddings, on tiny random models of the same classes."""

import json
import shutil
from types import SimpleNamespace

import language_checkpoints
import numpy as np
import PIL.Image
import pytest
import torch

import mindiffedit
from mindiffedit import Captioner, PromptGenerator, StableDiffusionDiffEditPipeline, average_embeddings, options
from mindiffedit.checkpoints.hub import HubOptions
from mindiffedit.checkpoints.layout import CheckpointError, WeightsError
from mindiffedit.noise import randomness
from mindiffedit.runtime import devices
from mindiffedit.text import decoding, language_models, prompts

# max|difference| / rms of the logits. These models multiply every rounding: transformers' own float32 logits are 1.5e-5
# from its float64 ones, ours 2.1e-5; of captions, 1e-5 and 1e-5.
CLOSE = 1e-4
TEXTS = [
    "a red apple on a table",
    "dog",
    "write a caption for an image that contains a bowl of fruits with green pears and blue apples on the wooden"
    " table in the house by the tree, at most 150 characters long.",
    "grass and sky",
]
MOST = 40


@pytest.fixture(scope="module")
def writer(t5_folder):
    return PromptGenerator.from_pretrained(t5_folder)


@pytest.fixture(scope="module")
def eager_writer(t5_folder):
    return PromptGenerator.from_pretrained(t5_folder, mode="pynative")


@pytest.fixture(scope="module")
def captioner(blip_folder):
    return Captioner.from_pretrained(blip_folder)


@pytest.fixture(scope="module")
def eager_captioner(blip_folder):
    return Captioner.from_pretrained(blip_folder, mode="pynative")


def their_t5(folder):
    from transformers import T5ForConditionalGeneration, T5TokenizerFast

    return T5ForConditionalGeneration.from_pretrained(folder).eval(), T5TokenizerFast.from_pretrained(folder)


def their_blip(folder):
    from transformers import BlipForConditionalGeneration, BlipProcessor

    return BlipForConditionalGeneration.from_pretrained(folder).eval(), BlipProcessor.from_pretrained(folder)


def their_texts(model, tokenizer, text):
    """Tokens without the first, and the text, under greedy decoding."""
    with torch.no_grad():
        output = model.generate(tokenizer(text, return_tensors="pt").input_ids, max_new_tokens=MOST, do_sample=False)
    return output[0, 1:].tolist(), tokenizer.batch_decode(output, skip_special_tokens=True)


def our_logits(decoder, source, tokens):
    """Logits (tokens, vocabulary) of one text that is given, and so not chosen."""
    pages = decoding.Pages(decoder, source, 1, len(tokens))
    return np.concatenate([pages.advance(np.array([token])) for token in tokens])


def error(got, expected):
    expected = np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    return np.abs(got - expected).max() / np.sqrt(np.mean(expected**2))


def pictures(count=3):
    """Pictures of several sizes and modes, none of them even."""
    rng = np.random.default_rng(4)
    sizes, modes = [(32, 32), (48, 30), (21, 64)], ["RGB", "L", "RGBA"]
    small = [PIL.Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8), "RGB") for _ in range(count)]
    return [picture.resize(size, PIL.Image.BICUBIC).convert(mode) for picture, size, mode in zip(small, sizes, modes)]


# --- T5 against transformers --------------------------------------------------------------------------------------


def t5_logits(folder, decoder, count, text=TEXTS[2]):
    """Ours and theirs for a long text to read and `count` tokens to write."""
    reference, tokenizer = their_t5(folder)
    ids = tokenizer(text).input_ids
    tokens = [0, *np.random.default_rng(0).integers(3, 60, count - 1).tolist()]
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([tokens])).logits[0]
    return our_logits(decoder, decoder.encode(np.array(ids)), tokens), expected.numpy()


def test_logits_are_transformers(writer, eager_writer, t5_folder):
    """For a text beyond the largest distance that has a bucket of its own, and without compilation."""
    for maker, count in ((writer, 64), (eager_writer, 4)):
        logits, expected = t5_logits(t5_folder, maker._decoder, count)
        assert error(logits, expected) < CLOSE


def test_logits_of_the_first_t5(tmp_path):
    """With relu, and one table for both embeddings and logits, which are scaled."""
    folder = language_checkpoints.make_t5(tmp_path / "t5", flan=False)
    decoder = PromptGenerator.from_pretrained(folder, mode="pynative")._decoder
    logits, expected = t5_logits(folder, decoder, 4)
    assert error(logits, expected) < CLOSE


def test_planted_defects_are_seen(writer, eager_writer, t5_folder, monkeypatch):
    right, attend = decoding.T5Decoder.bias, decoding._attend
    for name, owner, attribute, value, maker, count in (
        ("no bias", decoding.T5Decoder, "bias", decoding.Decoder.bias, writer, 64),
        ("turned round", decoding.T5Decoder, "bias", lambda *args: right(*args).swapaxes(1, 2), writer, 64),
        ("one slot late", decoding.T5Decoder, "bias", lambda *args: np.roll(right(*args), 1, 2), writer, 64),
        ("no mask", decoding, "HIDDEN", np.float32(0), writer, 64),
        ("a scale of attention", decoding, "_attend", lambda *args: attend(*args[:-1], 6**-0.5), eager_writer, 3),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, value)
            assert error(*t5_logits(t5_folder, maker._decoder, count)) > 100 * CLOSE, name
    monkeypatch.setattr(eager_writer.model.config, "tie_word_embeddings", True)
    decoder = decoding.T5Decoder(eager_writer.model, "pynative")
    assert error(*t5_logits(t5_folder, decoder, 3)) > 100 * CLOSE, "a scale of logits"


def test_greedy_texts_are_transformers_token_by_token(writer, t5_folder):
    reference, tokenizer = their_t5(t5_folder)
    decoder = writer._decoder
    lengths, texts = set(), set()
    for i, text in enumerate(TEXTS):
        with devices.CompileCounter() as compiled:
            got = decoding.write(decoder, decoder.encode(np.array(tokenizer(text).input_ids)), [0], MOST)
        assert compiled.count <= (i in (0, 2))  # once, and once for a longer text to read
        tokens, written = their_texts(reference, tokenizer, text)
        assert got == [tokens]
        if i == 1:
            assert writer.generate(text, do_sample=False, max_new_tokens=MOST) == written
        lengths.add(len(tokens))
        texts.add(written[0])
        assert len(set(tokens)) > 3, "the model repeats itself: nothing is shown"
    assert len(texts) == len(TEXTS)
    assert min(lengths) < MOST == max(lengths), "some end early, some are cut off"


def test_the_next_process_reads_the_graph(t5_folder, writer, tmp_path):
    """Of two writers with a folder for graphs the second one finds what the first one has compiled; one has none."""
    arguments = dict(do_sample=False, max_new_tokens=5)
    text = writer.generate("dog", **arguments)
    for counts in ((1, 0, 0), (0, 1, 0)):
        other = PromptGenerator.from_pretrained(t5_folder, compile_cache=tmp_path)
        assert other.generate("dog", **arguments) == text
        cache = other.compile_cache
        assert (cache.stored, cache.found, cache.uncached) == counts
    other = PromptGenerator.from_pretrained(t5_folder, compile_cache=False)
    assert other.compile_cache is None and other.generate("dog", **arguments) == text


# --- sampling -----------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_prompts(writer):
    def prompts_of(generator):
        return writer.generate(TEXTS[0], num_prompts=6, max_new_tokens=12, generator=generator)

    first = prompts_of(7)
    assert len(first) == 6 and len(set(first)) > 3
    assert prompts_of(7) == first == prompts_of(mindiffedit.Generator().manual_seed(7))
    numpy = np.random.default_rng(7)
    drawn = prompts_of(numpy)
    assert prompts_of(numpy) != drawn, "its position has moved on"
    assert prompts_of(np.random.default_rng(7)) == drawn
    assert len({tuple(prompts_of(generator)) for generator in (7, 8, None, None)}) == 4


def test_texts_side_by_side_do_not_touch_each_other(writer):
    """Each row's logits are those it has alone, whatever the others hold and whether they have ended."""
    decoder = writer._decoder
    source = decoder.encode(np.array(writer.tokenizer(TEXTS[0]).input_ids))
    tokens = np.random.default_rng(1).integers(0, 60, (6, 9))
    pages = decoding.Pages(decoder, source, 6, 9)
    together = np.stack([pages.advance(tokens[:, i]) for i in range(9)], axis=1)
    for row in (0, 5):
        assert error(together[row], our_logits(decoder, source, tokens[row])) < CLOSE


def test_one_of_one_is_greedy(writer):
    greedy = writer.generate(TEXTS[0], do_sample=False, max_new_tokens=12)
    assert len(greedy) == 1
    assert writer.generate(TEXTS[0], num_prompts=6, top_k=1, max_new_tokens=12, generator=0) == greedy * 6


def test_probabilities_are_transformers():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper

    logits = np.random.default_rng(0).normal(0, 3, (5, 200)).astype(np.float32)
    logits[1, 7] = logits[1, 8] = logits[1].max() + 1  # equals
    for temperature, top_k in ((0.8, 10), (1.0, None), (2.5, 3), (0.3, 500), (1.0, 1)):
        scores = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits).double())
        if top_k is not None:
            scores = TopKLogitsWarper(top_k)(None, scores)
        expected = torch.softmax(scores, -1).numpy()
        ours = decoding.Sampler(temperature, top_k, None).probabilities(logits)
        assert np.allclose(ours, expected, rtol=1e-12, atol=0)
        if top_k is not None and top_k < 200:
            assert ((ours > 0).sum(-1) == [top_k, max(top_k, 2), top_k, top_k, top_k]).all()


def test_tokens_are_drawn_with_their_probabilities():
    logits = np.log(np.array([0.5, 1e-9, 0.3, 0.0, 0.2], np.float32) + np.float32(1e-30))
    sampler = decoding.Sampler(1.0, 3, randomness.resolve(0))
    drawn = sampler(np.tile(logits, (20000, 1)))
    counts = np.bincount(drawn, minlength=5) / 20000
    assert counts[1] == counts[3] == 0
    assert np.abs(counts - [0.5, 0, 0.3, 0, 0.2]).max() < 0.012  # 3.5 standard deviations
    # At the ends of the range of random numbers too, tokens are drawn that can be.
    logits = np.array([[-np.inf, 0.0, 1.0, 0.5, -np.inf]], np.float32)
    for end, token in (0, 1), (1, 3):
        source = SimpleNamespace(integers=lambda high, end=end: end * (high - 1))
        assert decoding.Sampler(1.0, None, source)(logits) == [token]


def test_the_instruction_asks_for_the_concept(writer, monkeypatch):
    asked = []
    monkeypatch.setattr(writer, "generate", lambda text, **options: asked.append((text, options)) or ["x"])
    assert writer.prompts_for(" bowl ", num_prompts=3) == ["x"]
    writer.prompts_for("apple")
    assert asked[0][1] == {"num_prompts": 3} and asked[1][1] == {}
    assert "a bowl." in asked[0][0] and "an apple." in asked[1][0]
    assert "English" in asked[0][0] and "150" in asked[0][0]


# --- embeddings ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(sd1_folder):
    pipe = StableDiffusionDiffEditPipeline.from_pretrained(sd1_folder, safety_checker=None)
    pipe.scheduler = mindiffedit.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_average_is_the_guides(pipeline, sd1_folder):
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(sd1_folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(sd1_folder / "text_encoder").eval()
    texts = [TEXTS[0], "", "a dog", " ".join(["a red apple"] * 40)]
    padded = dict(padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    with torch.no_grad():
        rows = [encoder(tokenizer(text, **padded).input_ids)[0] for text in texts]
    expected = torch.concatenate(rows).mean(dim=0).unsqueeze(0).numpy()
    average = average_embeddings(pipeline, texts)
    assert average.shape == (1, 77, 32) and average.dtype == pipeline.text_encoder.dtype
    assert error(average.asnumpy(), expected) < CLOSE
    assert error(average_embeddings(pipeline, texts[:3]).asnumpy(), expected) > 1e-2
    assert error(average_embeddings(pipeline, "a dog").asnumpy(), rows[2].numpy()) < CLOSE


def test_bad_prompts_to_the_average_are_refused(pipeline):
    for prompts_, kind, words in (
        ([], ValueError, "empty list"),
        (["a", 3], TypeError, r"prompts\[1\].*3"),
        (5, TypeError, "list of texts.*int"),
        (None, TypeError, "list of texts"),
    ):
        with pytest.raises(kind, match=words):
            average_embeddings(pipeline, prompts_)
    with pytest.raises(TypeError, match="StableDiffusionDiffEditPipeline.*str"):
        average_embeddings("pipeline", ["a dog"])


# --- BLIP against transformers ------------------------------------------------------------------------------------


def test_logits_of_captions_are_transformers(blip_folder, captioner, eager_captioner):
    reference, processor = their_blip(blip_folder)
    picture = pictures()[1].convert("RGB")
    pixels = processor.image_processor(picture, return_tensors="pt").pixel_values
    for maker, count in ((captioner, 40), (eager_captioner, 4)):
        tokens = [reference.decoder_input_ids, *np.random.default_rng(0).integers(5, 60, count - 1).tolist()]
        with torch.no_grad():
            expected = reference(pixel_values=pixels, input_ids=torch.tensor([tokens])).logits[0]
        logits = our_logits(maker._decoder, maker._decoder.encode(maker._pixels(picture)), tokens)
        assert error(logits, expected.numpy()) < CLOSE


@pytest.mark.parametrize("text", [None, "a photograph of"])
def test_captions_are_transformers(captioner, blip_folder, text):
    reference, processor = their_blip(blip_folder)
    captions = []
    for picture in pictures():
        inputs = processor(picture.convert("RGB"), text, return_tensors="pt")
        with torch.no_grad():
            output = reference.generate(**inputs, max_new_tokens=20, do_sample=False)
        captions.append(processor.decode(output[0], skip_special_tokens=True))
    assert captioner.caption(pictures()[0], text=text, max_new_tokens=20) == captions[0]
    assert len(set(captions)) == len(captions), "the model sees no difference: nothing is shown"
    assert text is None or all(caption.startswith(text) for caption in captions)
    with devices.CompileCounter() as compiled:
        assert captioner.caption(pictures(), text=text, max_new_tokens=20) == captions
    assert compiled.count == 0


def test_a_caption_ends_where_transformers_ends_it(captioner, blip_folder, monkeypatch):
    reference, processor = their_blip(blip_folder)
    assert captioner._decoder.ends == (reference.config.text_config.sep_token_id,)
    picture = pictures()[2].convert("RGB")
    inputs = processor(picture, "red", return_tensors="pt")

    def theirs():
        with torch.no_grad():
            return reference.generate(**inputs, max_new_tokens=20, do_sample=False)[0].tolist()

    whole = theirs()
    end = next(token for i, token in enumerate(whole) if i > 4 and token not in whole[:i])
    reference.config.text_config.sep_token_id = end
    monkeypatch.setattr(captioner._decoder, "ends", (end,))
    cut = theirs()
    assert 5 < len(cut) < len(whole) and cut[-1] == end
    decoder = captioner._decoder
    written = decoding.write(decoder, decoder.encode(captioner._pixels(picture)), cut[:2], 20)
    assert written == [cut[2:]]


def test_planted_defects_in_captions_are_seen(eager_captioner, monkeypatch):
    tokens, decoder = [60, 7, 9], eager_captioner._decoder
    source = decoder.encode(eager_captioner._pixels(pictures()[0]))
    right, step, attend = our_logits(decoder, source, tokens), decoder.step, decoding._attend
    assert error(our_logits(decoder, source * 0, tokens), right) > 100 * CLOSE, "no picture"
    for name, owner, attribute, value in (
        ("a scale", decoding, "_attend", lambda *arguments: attend(*arguments[:-1], 1.0)),
        ("positions one late", decoder, "step", lambda tokens, position, *rest: step(tokens, position + 1, *rest)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, value)
            assert error(our_logits(decoder, source, tokens), right) > 100 * CLOSE, name


# --- loading ------------------------------------------------------------------------------------------------------


def values_of(folder):
    from safetensors.numpy import load_file

    values = {}
    for file in folder.glob("*.safetensors"):
        values |= load_file(file)
    return values


def rewritten(folder, target, change):
    """A copy whose weights are changed by `change(dict)`."""
    from safetensors.numpy import save_file

    shutil.copytree(folder, target)
    values = values_of(target)
    change(values)
    save_file(values, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_shards_are_read(tmp_path, t5_folder, writer):
    folder = language_checkpoints.make_t5(tmp_path / "t5", max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    one = language_models.load(language_models.find("prompt model", folder))
    for name, parameter in one.parameters_and_names():
        assert np.array_equal(parameter.asnumpy(), dict(writer.model.parameters_and_names())[name].asnumpy())


def test_a_shared_weight_may_have_any_of_its_names(tmp_path, t5_folder):
    def only_the_encoders(values):
        values["encoder.embed_tokens.weight"] = values.pop("shared.weight")
        values["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.ones((32, 4), "f4")

    def all_three(values):
        values["encoder.embed_tokens.weight"] = values["decoder.embed_tokens.weight"] = values["shared.weight"]

    expected = values_of(t5_folder)["shared.weight"]
    for name, change in (("one", only_the_encoders), ("all", all_three)):
        folder = rewritten(t5_folder, tmp_path / name, change)
        model = language_models.load(language_models.find("prompt model", folder))
        assert np.array_equal(model.shared.weight.asnumpy(), expected)
        assert np.array_equal(model.decoder.embed_tokens.weight.asnumpy(), expected)


def test_misfits_are_listed(tmp_path, t5_folder, blip_folder):
    def wrong(values):
        values["extra.weight"] = np.ones(3, "f4")
        del values["lm_head.weight"]
        values["decoder.final_layer_norm.weight"] = np.ones(7, "f4")

    def torn(values):
        values["encoder.embed_tokens.weight"] = values["shared.weight"] + 1

    def poison(values):
        values["vision_model.post_layernorm.bias"] = np.full(24, np.nan, "f4")

    misfits = "extra: extra.weight", "missing: lm_head.weight", "misshapen: decoder.final_layer_norm.weight"
    for cls, folder, change, *words in (
        (PromptGenerator, t5_folder, wrong, *misfits),
        (PromptGenerator, t5_folder, torn, "encoder.embed_tokens.weight differs from shared.weight"),
        (Captioner, blip_folder, poison, "vision_model.post_layernorm.bias: 24 of 24"),
    ):
        with pytest.raises(WeightsError) as caught:
            cls.from_pretrained(rewritten(folder, tmp_path / change.__name__, change))
        assert all(word in str(caught.value) for word in words)


def test_in_float16_the_layers_that_need_it_stay_wide(t5_folder):
    import mindspore

    model = language_models.load(language_models.find("prompt model", t5_folder), dtype="float16")
    kinds = {name: parameter.dtype for name, parameter in model.parameters_and_names()}
    wide = {name for name, dtype in kinds.items() if dtype == mindspore.float32}
    assert wide == {name for name in kinds if name.endswith("DenseReluDense.wo.weight")} and len(wide) == 5
    assert set(kinds.values()) == {mindspore.float32, mindspore.float16}


def test_a_tokenizer_of_sentencepiece_alone_is_enough(tmp_path, t5_folder):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path / "t5"
    shutil.copytree(t5_folder, folder)
    for name in ("tokenizer.json", "special_tokens_map.json", "tokenizer_config.json"):
        (folder / name).unlink()
    how = dict(vocab_size=50, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_prefix=str(folder / "spiece"), **how
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 0}), encoding="utf-8")
    tokenizer = prompts.PromptGenerator._preparation(folder, {"vocab_size": 200})
    ids = tokenizer("a red apple").input_ids
    assert ids[-1] == 1 and tokenizer.decode(ids, skip_special_tokens=True) == "a red apple"


def broken(folder, target, change):
    shutil.copytree(folder, target)
    change(target)
    return target


def _config(**changes):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def _cut_off(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _of_diffusers(folder):
    (folder / "config.json").rename(folder / "model_index.json")


FOLDERS = (
    (_config(architectures=["T5EncoderModel"]), "T5EncoderModel, expected a T5ForConditionalGeneration"),
    (lambda f: (f / "config.json").unlink(), "no config.json and holds"),
    (_of_diffusers, "is a Stable Diffusion checkpoint. Expected a T5ForConditionalGeneration"),
    (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), r"only pickle weights \(pytorch_model.bin"),
    (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    (_cut_off, "truncated"),
    (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer: expected tokenizer.json or"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), "the tokenizer cannot be read"),
    (_config(vocab_size=40), "tokenizer has ids up to .* the model knows 40"),
    (_config(num_heads="four"), "no T5ForConditionalGeneration can be built"),
)


def test_folders_that_cannot_be_read_are_refused(t5_folder, tmp_path):
    for case, (change, words) in enumerate(FOLDERS):
        with pytest.raises(CheckpointError, match=words):
            PromptGenerator.from_pretrained(broken(t5_folder, tmp_path / str(case), change))


def test_each_loads_its_own_kind(t5_folder, blip_folder, tmp_path):
    with pytest.raises(CheckpointError, match="T5For.*expected a BlipForConditionalGeneration"):
        Captioner.from_pretrained(t5_folder)
    with pytest.raises(CheckpointError, match="BlipFor.*expected a T5ForConditionalGeneration"):
        PromptGenerator.from_pretrained(str(blip_folder))
    folder = broken(blip_folder, tmp_path / "blip", lambda f: (f / "preprocessor_config.json").unlink())
    with pytest.raises(CheckpointError, match="preprocessor_config.json is missing"):
        Captioner.from_pretrained(folder)


def test_names_of_nothing_are_refused(t5_folder):
    for name, kind, words in (
        ("./nowhere", CheckpointError, "no such folder"),
        ("", CheckpointError, "name is empty"),
        (7, TypeError, "folder or a hub id, but is 7"),
        (None, TypeError, "folder or a hub id"),
        (t5_folder / "model.safetensors", CheckpointError, "is a file, expected a folder"),
    ):
        for cls in (PromptGenerator, Captioner):
            with pytest.raises(kind, match=words):
                cls.from_pretrained(name)


def test_a_hub_id_is_fetched_without_pickles(t5_folder, tmp_path, monkeypatch):
    """What is asked of the hub, with a folder in the place of its cache."""
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *of, **how: asked.append((of, how)) or t5_folder)
    arguments = "prompt model", "google/flan-t5-large", HubOptions(revision="r", token="t")
    assert language_models.resolve_folder(*arguments) == t5_folder
    assert [of for of, _ in asked] == [("google/flan-t5-large",)] * 2
    assert all((how["revision"], how["token"]) == ("r", "t") for _, how in asked)
    patterns = {pattern for _, how in asked for pattern in how["allow_patterns"]}
    assert {"config.json", "model.safetensors", "spiece.model"} <= patterns
    assert not any(pattern.endswith((".bin", ".h5", ".msgpack")) or pattern == "*" for pattern in patterns)
    folder = broken(t5_folder, tmp_path / "t5", lambda f: (f / "model.safetensors").unlink())
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    with pytest.raises(CheckpointError, match="no safetensors weights.*revision"):
        language_models.resolve_folder(*arguments)


def test_what_the_device_lacks_is_loaded_in_float32(t5_folder):
    import mindspore

    made = PromptGenerator.from_pretrained(t5_folder, mindspore_dtype=mindspore.float16)
    expected, _ = devices.supported_dtype("float16")
    assert made.model.shared.weight.dtype == expected


# --- bad input ----------------------------------------------------------------------------------------------------


def test_bad_input_to_the_writer_is_refused_before_the_model_runs(writer, monkeypatch):
    monkeypatch.setattr(decoding, "write", None)
    for name, value, kind, words in (
        ("text", "  \n", ValueError, "`text` is empty"),
        ("text", ["a"], TypeError, "`text` has to be a string"),
        ("text", "a " * 100, ValueError, "`text` has 102 tokens, but the model reads 64"),
        ("num_prompts", 0, ValueError, "num_prompts"),
        ("temperature", 0, ValueError, "`temperature` has to be above 0.*do_sample=False"),
        ("temperature", float("nan"), ValueError, "temperature"),
        ("temperature", "hot", TypeError, "temperature"),
        ("top_k", -1, ValueError, "top_k"),
        ("top_k", 1.5, TypeError, "top_k"),
        ("max_new_tokens", 0, ValueError, "max_new_tokens"),
        ("do_sample", "no", TypeError, "do_sample"),
        ("generator", "seed", TypeError, "generator"),
        ("generator", [1, 2], TypeError, "`generator` is a list"),
    ):
        with pytest.raises(kind, match=words):
            writer.generate(**{"text": "a dog", name: value})


def test_a_concept_is_a_word_that_fits(writer):
    for concept, kind, words in (
        ("", ValueError, "`concept`"),
        (None, TypeError, "`concept`"),
        ("bowl " * 100, ValueError, "`concept` has .* tokens, but the model reads .*; shorten it"),
    ):
        with pytest.raises(kind, match=words):
            writer.prompts_for(concept)
    assert len(writer.prompts_for("bowl", temperature=0, do_sample=False, max_new_tokens=2)) == 1  # as the advice says


def test_bad_input_to_the_captioner_is_refused_before_the_model_runs(captioner, monkeypatch):
    monkeypatch.setattr(decoding, "write", None)
    for arguments, kind, words in (
        (dict(image=np.zeros((4, 4, 3))), TypeError, "`image` has to be a PIL picture.*ndarray.*load_image"),
        (dict(image=None), TypeError, "PIL picture"),
        (dict(image=[]), ValueError, "empty list"),
        (dict(image=[PIL.Image.new("RGB", (4, 4)), 3]), TypeError, r"image\[1\]"),
        (dict(image=PIL.Image.new("RGB", (0, 4))), ValueError, "no pixels"),
        (dict(text=""), ValueError, "`text` is empty"),
        (dict(text=3), TypeError, "`text`"),
        (dict(max_new_tokens=0), ValueError, "max_new_tokens"),
        (dict(max_new_tokens=64, text="red"), ValueError, "more than the 64"),
    ):
        with pytest.raises(kind, match=words):
            captioner.caption(**{"image": pictures(1)[0], **arguments})


def test_the_longest_caption_fits(captioner):
    assert captioner.caption(pictures(1)[0], text="red", max_new_tokens=63).startswith("red")


def test_models_of_another_class_are_refused(t5_folder, writer, captioner):
    for model, more, kind, words in (
        (captioner.model, {}, TypeError, "T5ForConditionalGeneration.*BlipForConditionalGeneration"),
        (their_t5(t5_folder)[0], {}, TypeError, "mindone's T5ForConditionalGeneration.*transformers"),
        (writer.model, dict(mode="fast"), ValueError, "`mode`"),
    ):
        with pytest.raises(kind, match=words):
            PromptGenerator(model, writer.tokenizer, **more)
    with pytest.raises(ValueError, match="`mode`"):
        Captioner.from_pretrained("anything", mode="fast")


def test_nan_is_reported(eager_writer, monkeypatch):
    decoder = eager_writer._decoder
    step = decoder.step

    def damaged(*arguments):
        logits, *memory = step(*arguments)
        return (logits * float("nan"), *memory)

    monkeypatch.setattr(decoder, "step", damaged)
    with pytest.raises(options.NumericalError, match="prompt model") as caught:
        eager_writer.generate("a dog", num_prompts=2, max_new_tokens=3)
    assert (caught.value.stage, caught.value.step) == ("prompt model", 0)
