"""LoRA and textual inversion against diffusers, on tiny checkpoints; and that neither compiles what need not be."""

import copy
import inspect
import json
import re
from pathlib import Path

import mindspore as ms
import numpy as np
import parity
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from diffusers import StableDiffusionDiffEditPipeline as Reference
from test_pipeline import CLOSE, PICTURE, SOURCE, TARGET, our_pipeline, their_pipeline

from mindiffedit import StableDiffusionDiffEditPipeline, options
from mindiffedit.checkpoints import lora, models, weight_files
from mindiffedit.checkpoints.layout import CheckpointError
from mindiffedit.checkpoints.survey import check_folder
from mindiffedit.errors import InputError
from mindiffedit.runtime import devices, graph_keys
from mindiffedit.stages import host, tensor

ROOT = Path(__file__).resolve().parent.parent
ROUNDING = 2e-5  # of a prediction or an embedding, relative to the reference's rms; measured: 1.6e-6 to 4.7e-6
SEEN = 1e-2  # what a LoRA or a word changes at least

ATTENTION = r".*attn\d\.to_(q|k|v|out\.0)"
EVERYWHERE = r".*(attn\d\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|proj_(in|out)|conv\d?|conv_shortcut|time_emb_proj)"
TEXT = r".*(self_attn\.(q|k|v|out)_proj|mlp\.fc\d)"


# --- files -----------------------------------------------------------------------------------------------------------


def matrices(model, pattern, rank, seed):
    """Random {module: (down, up)} for the layers of a torch model whose names match, each of some effect."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if re.fullmatch(pattern, name) and weight is not None and weight.ndim in (2, 4):
            down = torch.randn(rank, *weight.shape[1:], generator=generator)
            up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=generator)
            pairs[name] = (down * 0.5 / down[0].numel() ** 0.5, up * 0.5)
    assert pairs
    return pairs


def tensors_of(parts, name_of):
    """{name_of(component, module, 0 for down or 1 for up): matrix}."""
    return {
        name_of(component, module, side): pair[side]
        for component, pairs in parts.items()
        for module, pair in pairs.items()
        for side in (0, 1)
    }


def peft_names(parts):
    """{"unet": {module: (down, up)}, ...} as peft and diffusers save it today."""
    return tensors_of(parts, lambda component, module, side: f"{component}.{module}.lora_{'AB'[side]}.weight")


def diffusers_names(parts):
    """With lora.down and lora.up, of the text encoder lora_linear_layer."""
    kinds, sides = {"unet": "lora", "text_encoder": "lora_linear_layer"}, ("down", "up")
    return tensors_of(parts, lambda part, module, side: f"{part}.{module}.{kinds[part]}.{sides[side]}.weight")


def processor_names(parts, prefix="unet."):
    """As attention processors were saved: of attention layers only."""

    def name_of(_, module, side):
        block, _, kind = module.rpartition(".to_")
        return f"{prefix}{block}.processor.to_{kind.removesuffix('.0')}_lora.{('down', 'up')[side]}.weight"

    return tensors_of({"unet": {n: pair for n, pair in parts["unet"].items() if re.fullmatch(ATTENTION, n)}}, name_of)


def kohya_names(parts, alpha):
    """As kohya's scripts save it, with an alpha for each module."""
    tensors = {}
    for component, pairs in parts.items():
        for module, (down, up) in pairs.items():
            name = f"{'lora_unet' if component == 'unet' else 'lora_te'}_{module.replace('.', '_')}"
            number = torch.tensor(float(alpha(module) if callable(alpha) else alpha))
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": number}
    return tensors


def saved(path, tensors, metadata=None):
    arrays = {name: value.contiguous().numpy() for name, value in tensors.items()}
    safetensors.numpy.save_file(arrays, str(path), metadata=metadata)
    return str(path)


@pytest.fixture(scope="module")
def parts(sd1_folder):
    """Matrices for UNet and text encoder of the checkpoint, two sets of them."""
    return [parts_of(their_pipeline(sd1_folder), 4, seed) for seed in (1, 5)]


def parts_of(pipe, rank, seed):
    unet = matrices(pipe.unet, EVERYWHERE, rank, seed)
    return {"unet": unet, "text_encoder": matrices(pipe.text_encoder, TEXT, rank, seed + 1)}


@pytest.fixture(scope="module")
def files(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    return [saved(folder / f"{i}.safetensors", peft_names(part)) for i, part in enumerate(parts)]


# --- both sides ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(sd1_folder):
    """Ours, compiled, with the graphs of UNet and text encoder in place."""
    pipe = our_pipeline(sd1_folder)
    results(pipe)
    return pipe


@pytest.fixture
def ours(pipeline):
    """Ours without adapters; what a test loads is taken out again."""
    yield pipeline
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    pipeline._fused = frozenset()
    pipeline.unload_textual_inversion()


@pytest.fixture
def theirs(sd1_folder):
    """A reference of the test's own: it does not forget everything that it is told to."""
    return their_pipeline(sd1_folder)


LATENTS = np.random.default_rng(0).standard_normal((2, 4, 8, 10)).astype(np.float32)
EMBEDS = np.random.default_rng(1).standard_normal((2, 77, 32)).astype(np.float32)


def predicted(pipe, scale=None):
    """The UNet's noise prediction of fixed latents and embeddings."""
    kwargs = {} if scale is None else {"scale": scale}
    if not isinstance(pipe, Reference):
        return host(pipe._stages.predictor(EMBEDS, pipe._attention_kwargs(kwargs), 2)(tensor(LATENTS), 521))
    latents, embeds = torch.from_numpy(LATENTS), torch.from_numpy(EMBEDS)
    with torch.no_grad():
        return pipe.unet(latents, 521, embeds, cross_attention_kwargs=kwargs or None).sample.numpy()


def embedded(pipe, scale=None, prompt=TARGET, negative_prompt="an ugly dog"):
    """Embeddings of the prompt, then of its negative."""
    with torch.no_grad():
        embeds = pipe.encode_prompt(prompt, "cpu", 1, True, negative_prompt, lora_scale=scale)
    return np.concatenate([part.numpy() for part in embeds])


def results(pipe, scale=None):
    return predicted(pipe, scale), embedded(pipe, scale)


def distance(ours, theirs, scale=None):
    return max(map(parity.relative, results(ours, scale), results(theirs, scale)))


def apart(ours, theirs, **texts):
    return parity.relative(embedded(ours, **texts), embedded(theirs, **texts))


def change(pipe, before, scale=None):
    """How much changed against earlier results: the least of prediction and embeddings."""
    return min(map(parity.relative, results(pipe, scale), before))


def bits(pipe):
    return [one.asnumpy().tobytes() for part in (pipe.unet, pipe.text_encoder) for one in part.get_parameters()]


# --- LoRA ------------------------------------------------------------------------------------------------------------


def test_predictions_and_embeddings_at_every_scale_without_a_compilation(ours, theirs, files, parts):
    plain, weights = results(ours), bits(ours)
    description = graph_keys.fingerprint(ours.unet)
    with devices.CompileCounter() as compiled:
        ours.load_lora_weights(files[0])
        theirs.load_lora_weights(files[0])
        for scale in (None, 0.5, 1, -0.7, 0):
            assert distance(ours, theirs, scale=scale) < ROUNDING, scale
            assert (change(ours, plain, scale=scale) > SEEN) == (scale != 0)
        results(ours, scale=0.3)
        assert graph_keys.fingerprint(ours.unet) == description, "a stored graph serves every LoRA"
        ours.unload_lora_weights()
        assert all(map(np.array_equal, results(ours), plain)) and bits(ours) == weights
        other = saved(
            Path(files[0]).with_name("ranks.safetensors"),
            peft_names({"unet": {name: (a[:2], b[:, :2]) for name, (a, b) in parts[1]["unet"].items()}}),
        )
        ours.load_lora_weights(other)
        assert parity.relative(results(ours)[0], plain[0]) > SEEN
    assert compiled.count == 0


def metadata_of(parts, **options_):
    entries = {}
    for component in parts:
        config = dict(r=4, lora_alpha=6, rank_pattern={}, alpha_pattern={}, target_modules=list(parts[component]))
        entries.update({f"{component}.{key}": value for key, value in {**config, **options_}.items()})
    return {"lora_adapter_metadata": json.dumps(entries)}


def by_rank(parts):
    """Convolutions of rank 2, the text encoder's fc1 of rank 3, the rest of rank 4; no alphas."""

    def cut(name, down, up):
        rank = 2 if down.ndim == 4 else 3 if "fc1" in name else 4
        return down[:rank], up[:, :rank]

    return {part: {name: cut(name, *pair) for name, pair in pairs.items()} for part, pairs in parts.items()}


FORMATS = {
    "diffusers": lambda parts: (diffusers_names(parts),),
    "processors": lambda parts: (processor_names(parts),),
    "kohya, an alpha for each": lambda parts: (
        kohya_names(parts, lambda module: 1.0 if "conv" in module or "fc2" in module else 3.0),
    ),
    "kohya, alphas that differ in attention": lambda parts: (
        kohya_names(parts, lambda module: 1.0 if "to_q" in module or "q_proj" in module else 3.0),
    ),
    "ranks that differ, no alpha": lambda parts: (peft_names(by_rank(parts)),),
    "metadata": lambda parts: (peft_names(parts), metadata_of(parts)),
    "metadata, rank-stabilised, patterns": lambda parts: (
        peft_names(parts), metadata_of(parts, use_rslora=True, alpha_pattern={"to_q": 1, "fc1": 2}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_formats(ours, theirs, parts, tmp_path, name):
    file = saved(tmp_path / "lora.safetensors", *FORMATS[name](parts[0]))
    theirs.load_lora_weights(file)
    ours.load_lora_weights(file)
    assert ours.get_list_adapters() == theirs.get_list_adapters()
    assert distance(ours, theirs, scale=0.8) < ROUNDING


def test_an_alpha_that_is_ignored_is_seen(ours, theirs, parts, monkeypatch):
    theirs.load_lora_weights(kohya_names(parts[0], 1.0))
    right = lora.LowRank
    monkeypatch.setattr(lora, "LowRank", lambda down, up, ratio: right(down, up, 1.0))
    ours.load_lora_weights(kohya_names(parts[0], 1.0))
    assert distance(ours, theirs) > 100 * ROUNDING


def test_alphas_of_any_number_type(ours, parts, tmp_path):
    """Of no and of one dimension, in a file and as a dict; what is not one number is refused."""

    def ratios(source):  # alpha / rank
        matrices = lora.parse(lora.read(source)[0], None, ours._adapted())
        return {name: entry.ratio for part in matrices.values() for name, entry in part.items()}

    floats = kohya_names(parts[0], 2.0)
    expected = ratios(floats)
    assert set(expected.values()) == {0.5}

    def with_alpha(alpha):
        tensors = {name: alpha.clone() if name.endswith(".alpha") else t for name, t in floats.items()}
        safetensors.torch.save_file(tensors, tmp_path / "lora.safetensors")
        return tmp_path / "lora.safetensors", tensors

    types = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.float64, torch.float16,
             torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)  # fmt: skip
    for kind in types:
        for shape in ((), (1,)):
            file, tensors = with_alpha(torch.tensor(2).to(kind).reshape(shape))
            assert ratios(file) == expected, kind
            assert "float8" in str(kind) or ratios(tensors) == expected, kind
    assert ratios({name: 2 if name.endswith(".alpha") else t for name, t in floats.items()}) == expected
    for alpha in (torch.tensor(True), torch.tensor(torch.nan), torch.tensor([1.0, 2.0]), torch.tensor([])):
        for source in with_alpha(alpha):
            with pytest.raises(CheckpointError, match=r"\.alpha"):
                ratios(source)


def test_eight_bit_floats_are_read_exactly(tmp_path):
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        every = torch.arange(256, dtype=torch.uint8).view(kind)
        safetensors.torch.save_file({"x": every}, tmp_path / "x.safetensors")
        values = weight_files.read_tensors(tmp_path / "x.safetensors")[0]["x"]
        assert values.dtype == np.float32 and np.array_equal(values, every.float().numpy(), equal_nan=True)


def test_names_without_an_inner_model_and_halves(ours, theirs, parts):
    """LoRAs that were trained with transformers from 5.6 on, and those in half precision, as dicts."""
    theirs.load_lora_weights(peft_names(parts[0]))
    for names in (peft_names, diffusers_names, lambda parts: kohya_names(parts, 4.0)):
        newer = {re.sub("text_model[._]", "", name): value for name, value in names(parts[0]).items()}
        assert newer.keys() != names(parts[0]).keys()
        ours.load_lora_weights(newer)
        assert distance(ours, theirs) < ROUNDING
        ours.unload_lora_weights()
    theirs.unload_lora_weights()
    halves = {name: value.to(torch.bfloat16) for name, value in peft_names(parts[0]).items()}
    for pipe in (ours, theirs):  # the reference's branch is in float32, with the values that bfloat16 has
        pipe.load_lora_weights(halves)
    assert distance(ours, theirs) < ROUNDING


def test_processors_without_a_component_are_the_unets(ours, theirs, parts, tmp_path):
    saved(tmp_path / "lora.safetensors", processor_names(parts[0], prefix=""))
    theirs.unet.load_attn_procs(str(tmp_path), weight_name="lora.safetensors")
    ours.load_lora_weights(tmp_path)
    assert ours.get_list_adapters() == {"unet": ["default_0"]} and distance(ours, theirs) < ROUNDING


def test_kohyas_outer_layers(ours, theirs, tmp_path):
    """W9: the reference loses them from this format, and has them right in peft's."""
    outer = {"unet": matrices(theirs.unet, r"conv_(in|out)|time_embedding\.linear_\d|mid_block.*to_q", 4, 0)}
    assert len(outer["unet"]) == 6
    theirs.load_lora_weights(saved(tmp_path / "peft.safetensors", peft_names(outer)))
    ours.load_lora_weights(saved(tmp_path / "kohya.safetensors", kohya_names(outer, 4.0)))
    assert parity.relative(predicted(ours), predicted(theirs)) < ROUNDING


def test_two_adapters(ours, theirs, files):
    def both(method, *arguments, scale=None, **options):
        for pipe in (ours, theirs):
            getattr(pipe, method)(*arguments, **options)
        assert ours.get_active_adapters() == theirs.get_active_adapters()
        assert ours.get_list_adapters() == theirs.get_list_adapters()
        assert distance(ours, theirs, scale=scale) < ROUNDING, (method, arguments)

    both("load_lora_weights", files[0], adapter_name="first")
    both("load_lora_weights", files[1])  # which is active alone, as it was loaded last
    blocks = {"unet": {"down": 0.3, "mid": 0.2, "up": {"block_1": [0.9, 0.1]}}, "text_encoder": 0.4}
    both("set_adapters", ["first", "default_1"], [0.7, -0.4], scale=0.9)
    both("set_adapters", ["first", "default_1"], 0.6, scale=0.9)
    both("set_adapters", "first", scale=0.9)
    both("set_adapters", ["default_1", "first"], [blocks, {"unet": 0.5}], scale=0.9)
    both("disable_lora")
    both("enable_lora")
    both("delete_adapters", "default_1")
    assert ours.get_active_adapters() == ["first"]


def test_fused_and_unfused(ours, theirs, files):
    plain, weights = results(ours), bits(ours)
    for pipe in (ours, theirs):
        pipe.load_lora_weights(files[0], adapter_name="first")
        pipe.load_lora_weights(files[1], adapter_name="second")
        if pipe is ours:  # by way of a hot swap
            pipe.load_lora_weights(files[0], adapter_name="second", hotswap=True)
            pipe.load_lora_weights(files[1], adapter_name="second", hotswap=True)
        pipe.set_adapters(["first", "second"], [0.8, 0.5])
        pipe.fuse_lora(adapter_names=["first"])
    assert ours.num_fused_loras == theirs.num_fused_loras == 1 and ours.fused_loras == {"first"}
    for scale in (1, 0.5):  # which no longer counts: what is fused is alone in its layers
        assert distance(ours, theirs, scale=scale) < ROUNDING
    for pipe in (ours, theirs):
        pipe.unfuse_lora()
    assert distance(ours, theirs) < ROUNDING and ours.num_fused_loras == theirs.num_fused_loras == 0
    for pipe in (ours, theirs):
        pipe.fuse_lora(["unet"], lora_scale=0.6)
    assert distance(ours, theirs) < ROUNDING and ours.fused_loras == theirs.fused_loras
    for pipe in (ours, theirs):
        pipe.unfuse_lora()
        pipe.set_adapters(["first", "second"])
    ours.unload_lora_weights()
    assert all(map(np.array_equal, results(ours), plain)) and bits(ours) == weights


def test_the_scale_of_a_fusion_stays_after_it(ours, theirs, files):
    """D9."""
    for pipe in (ours, theirs):
        pipe.load_lora_weights(files[0])
        pipe.fuse_lora(lora_scale=0.5)
        pipe.unfuse_lora()
    assert distance(ours, theirs) < ROUNDING
    ours.set_adapters("default_0", 0.5)
    assert distance(ours, theirs) < ROUNDING


def test_what_is_fused_stays_when_adapters_are_unloaded_and_is_saved(sd1_folder, theirs, files, tmp_path):
    ours = our_pipeline(sd1_folder)
    for pipe in (ours, theirs):
        pipe.load_lora_weights(files[0])
        pipe.fuse_lora(lora_scale=0.7)
        pipe.unload_lora_weights()
        pipe.unfuse_lora()
    assert distance(ours, theirs) < ROUNDING and ours.get_list_adapters() == {}
    assert ours.num_fused_loras == theirs.num_fused_loras
    fused = bits(ours)
    for pipe in (ours, theirs):
        pipe.load_lora_weights(files[1])
    assert distance(ours, theirs, scale=0.5) < ROUNDING
    ours.save_pretrained(tmp_path / "saved")
    again = models.load_components(tmp_path / "saved")
    names = [*again["unet"].get_parameters(), *again["text_encoder"].get_parameters()]
    assert [parameter.asnumpy().tobytes() for parameter in names] == fused
    assert distance(ours, theirs, scale=0.5) < ROUNDING, "saving takes nothing out"


def test_a_scale_of_zero_forgets_no_weight(ours, theirs, files):
    """W7: the reference resets an adapter's weight to 1 after a call with scale 0."""
    for pipe in (ours, theirs):
        pipe.load_lora_weights(files[0])
        pipe.set_adapters("default_0", 0.5)
    half = results(ours)
    results(ours, scale=0), results(theirs, scale=0)
    assert all(map(np.array_equal, results(ours), half))
    ours.set_adapters("default_0", 1.0)
    assert distance(ours, theirs) < ROUNDING


def test_a_whole_edit(ours, theirs, files):
    """All three calls with a LoRA; the scale reaches the text encoder in the edit alone (D10)."""
    scaled = dict(num_inference_steps=5, cross_attention_kwargs={"scale": 0.6})
    prompts = dict(source_prompt=SOURCE, target_prompt=TARGET, num_maps_per_mask=2, guidance_scale=3.0)
    calls = []
    with parity.recorded_map(theirs) as maps:
        for pipe, noise in ((ours, parity.TorchNoise), (theirs, parity.torch_noise)):
            pipe.load_lora_weights(files[0])
            if pipe is ours:
                ours.observer = lambda stage, array, step: (stage == "map" and maps.append(array), array)[1]
            mask = pipe.generate_mask(PICTURE, generator=noise(0), **prompts, **scaled)
            ours.observer = None
            latents = pipe.invert(SOURCE, PICTURE, generator=noise(1), **scaled).latents
            images = pipe(TARGET, mask, latents, output_type="latent", negative_prompt="bad", **scaled).images
            calls.append((mask, latents.numpy(), images.detach().numpy() if pipe is theirs else images.numpy()))
    (mask, *ours_), (their_mask, *theirs_) = calls
    assert parity.relative(maps[0], maps[1]) < CLOSE and np.array_equal(mask, their_mask)
    assert max(map(parity.relative, ours_, theirs_)) < CLOSE
    plain = ours.generate_mask(PICTURE, generator=parity.TorchNoise(0), **prompts, num_inference_steps=5)
    assert not np.array_equal(plain, mask), "the scale counts"


@pytest.mark.slow  # a UNet operator by operator
def test_linear_projections_operator_by_operator(sd2_folder, tmp_path):
    ours, theirs = our_pipeline(sd2_folder, mode="pynative"), their_pipeline(sd2_folder)
    file = saved(tmp_path / "kohya.safetensors", kohya_names(parts_of(theirs, 3, 0), 1.5))
    weights = bits(ours)
    for pipe in (ours, theirs):
        pipe.load_lora_weights(file)
    assert distance(ours, theirs, scale=0.5) < ROUNDING and bits(ours) != weights
    ours.unload_lora_weights()
    assert bits(ours) == weights


def test_graphs_from_the_cache_and_pipelines_that_share_models(sd1_folder, ours, files):
    other = our_pipeline(sd1_folder)  # whose graphs come from the folder that `ours` stored them in
    results(other)
    assert other.compile_cache.found >= 2
    other.load_lora_weights(files[0])
    sharing = StableDiffusionDiffEditPipeline(**other.components)
    assert sharing.get_active_adapters() == ["default_0"]
    ours.load_lora_weights(files[0])
    expected = results(ours, scale=0.5)
    for pipe in (other, sharing, other):
        assert all(map(np.array_equal, results(pipe, scale=0.5), expected))
        results(other if pipe is sharing else sharing, scale=0.2)
    sharing.unload_lora_weights()
    ours.unload_lora_weights()
    assert all(map(np.array_equal, results(other), results(ours)))


def test_a_change_between_steps_counts_from_the_next_step(ours, files):
    ours.load_lora_weights(files[0])
    predict = ours._stages.predictor(EMBEDS, {}, 2)
    with_it = host(predict(tensor(LATENTS), 521))
    ours.disable_lora()
    without = host(predict(tensor(LATENTS), 521))
    assert parity.relative(without, with_it) > SEEN
    ours.enable_lora()
    assert np.array_equal(host(predict(tensor(LATENTS), 521)), with_it)


def low_rank(down, up):
    """A matrix that adds down * up everywhere to a layer of 2 inputs and 3 outputs."""
    return lora.LowRank(np.full((1, 2), down, np.float32), np.full((3, 1), up, np.float32), 1.0)


def test_sums_beyond_a_dtype_leave_the_weights_alone():
    layer = ms.nn.CellList([ms.nn.Dense(2, 3), ms.nn.Dense(2, 3)])
    for parameter in layer.get_parameters():
        parameter.set_dtype(ms.float16)

    def values():
        return [parameter.asnumpy().copy() for parameter in layer.get_parameters()]

    adapted, before = lora.adapted(layer), values()
    adapted.add("a", {"0": low_rank(1, 1), "1": low_rank(1, 1000)})
    adapted.write(2.0)
    now = values()
    assert now[0].dtype == np.float16
    assert np.array_equal(now[0], (before[0].astype(np.float32) + 2).astype(np.float16))
    with pytest.raises(options.NumericalError, match="1.*Float16.*scale"):
        adapted.write(100.0)
    assert all(map(np.array_equal, values(), now))
    adapted.unload()
    assert all(map(np.array_equal, values(), before))


def test_values_that_somebody_else_wrote_are_the_original_then():
    """In the parameter's own memory and by another parameter."""
    layer = ms.nn.CellList([ms.nn.Dense(2, 3)])
    adapted = lora.adapted(layer)
    adapted.add("a", {"0": low_rank(0.3, 1)})
    plain = layer[0].weight.asnumpy().copy()
    adapted.write()
    other = np.full((3, 2), 1.5, np.float32)
    ms.ops.assign(layer[0].weight, ms.Tensor(other))
    adapted.write(0.5)
    assert np.allclose(layer[0].weight.asnumpy(), 1.65)
    adapted.write(0.0)
    assert np.array_equal(layer[0].weight.asnumpy(), other)
    adapted.write()
    layer[0].weight = ms.Parameter(ms.Tensor(plain), name=layer[0].weight.name)
    adapted.write()
    assert np.allclose(layer[0].weight.asnumpy(), plain + 0.3)
    adapted.unload()
    assert np.array_equal(layer[0].weight.asnumpy(), plain)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_lora_that_does_not_fit_changes_nothing(ours, parts, files):
    good, weights = peft_names(parts[0]), bits(ours)
    query = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    embedding, two = "text_encoder.text_model.embeddings.token_embedding", torch.ones(2, 2)
    wrong = {f"unet.wrong{i}.lora_{side}.weight": two for side in "AB" for i in range(12)}
    for words, tensors in (
        ("nowhere is no linear or convolutional layer",
         good | {f"unet.nowhere.lora_{side}.weight": two for side in "AB"}),
        ("matrices", good | {f"{query}.lora_A.weight": torch.ones(4, 99)}),
        ("NaN", good | {f"{query}.lora_A.weight": torch.full((4, 16), torch.nan)}),
        ("text_encoder_2.x.lora_A.weight belongs", good | {"text_encoder_2.x.lora_A.weight": two}),
        ("counterpart", good | {f"{query}.lora_magnitude_vector.weight": torch.ones(16)}),
        ("token_embedding", good | {f"{embedding}.lora_{side}.weight": two for side in "AB"}),
        ("is no LoRA", good | {"unet.conv_in.weight": torch.ones(3)}),
        (r"12 misfits: .* and 4 more\.", wrong),
        ("LoHa", {"lora_unet_conv_in.hada_w1_a": two}),
        ("lora_unet_conv_in.lora_up", {"lora_unet_conv_in.lora_down.weight": two}),
        ("holds nothing", {}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            ours.load_lora_weights(tensors)
    assert ours.get_list_adapters() == {} and bits(ours) == weights


def test_files_that_are_not_to_be_had(ours, tmp_path, files, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "pickled"):
        (tmp_path / folder).mkdir()
    (tmp_path / "lora.safetensors").write_bytes(b"\x80\x04" * 50)
    for name in ("pytorch_lora_weights.bin", "lora.ckpt", "lora.pt", "pickled/lora.bin"):
        (tmp_path / name).write_bytes(b"\x80\x04")
    for load in (ours.load_lora_weights, ours.load_textual_inversion):
        for source, more, message in (
            (tmp_path / "lora.ckpt", {}, "pickle"), (tmp_path / "pytorch_lora_weights.bin", {}, "pickle"),
            (tmp_path, dict(weight_name="lora.pt"), "pickle"), (tmp_path / "pickled", {}, "pickle"),
            (files[0], dict(use_safetensors=False), "pickle"),
            (tmp_path / "lora.safetensors", {}, "not a safetensors file"),
            (tmp_path, dict(weight_name="other.safetensors"), "other.safetensors"),
            (tmp_path / "empty", {}, "it holds nothing"), (Path(files[0]).parent, {}, "say which"),
            ("nobody/nothing", dict(local_files_only=True), "hub"), (" ", {}, "the name is empty"),
            *((name, {}, "no such file") for name in ("missing.safetensors", "./missing", "a/b/c", tmp_path / "no")),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                load(source, **more)
        for source, more in ((3, {}), (tmp_path, {"weight_name": 3}), (tmp_path, {"subfolder": 3})):
            with pytest.raises(TypeError, match="have to be a file, a folder or a hub id|has to be a name"):
                load(source, **more)
    assert ours.get_list_adapters() == {}


def test_names_and_numbers_that_mean_nothing(ours, files):
    def load(**options):
        ours.load_lora_weights(files[1], **options)

    def fuse(names):
        ours.fuse_lora(adapter_names=names)

    def invert(scale):
        ours.invert(SOURCE, PICTURE, cross_attention_kwargs={"scale": scale})

    ours.load_lora_weights(files[0], adapter_name="style")
    unknown, too_many = "no adapter 'other'.*style", {"unet": {"up": {"block_1": [1.0, 2.0, 3.0]}}}
    for words, error, action in (
        ("taken", ValueError, lambda: load(adapter_name="style")),
        (unknown, ValueError, lambda: load(adapter_name="other", hotswap=True)),
        ("adapter_name", TypeError, lambda: load(adapter_name=1)),
        ("twice", ValueError, lambda: ours.set_adapters(["style", "style"])),
        ("2 weights for 1", ValueError, lambda: ours.set_adapters("style", [1.0, 2.0])),
        ("do not fit this UNet", ValueError, lambda: ours.set_adapters("style", too_many)),
        ("lora_scale", TypeError, lambda: ours.encode_prompt(TARGET, None, 1, False, lora_scale="1")),
        ("lora_scale", TypeError, lambda: ours.fuse_lora(lora_scale="1")),
        ("components", ValueError, lambda: ours.fuse_lora(["vae"])),
        ("components", ValueError, lambda: ours.unfuse_lora(["vae"])),
    ):
        with pytest.raises(error, match=words):
            action()
    for method in (ours.set_adapters, ours.delete_adapters, fuse):
        with pytest.raises(ValueError, match=unknown):
            method(["style", "other"])
        with pytest.raises(TypeError, match="adapter_names"):
            method(3)
    for wrong in ("1", True, float("nan"), {"unet": "1"}, {"text_encoder": []}, {"unet": {"mid": True}}):
        with pytest.raises((TypeError, ValueError), match="adapter_weights"):
            ours.set_adapters("style", wrong)
    for wrong in ("1", True, float("inf"), None):
        with pytest.raises((TypeError, ValueError), match="scale"):
            invert(wrong)
    assert ours.get_active_adapters() == ["style"]


# --- textual inversion -----------------------------------------------------------------------------------------------

VECTORS = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))


def test_words_of_one_and_of_several_vectors(ours, theirs, tmp_path):
    results(ours)
    length = len(ours.tokenizer)
    table = ours.text_encoder.get_input_embeddings().embedding_table.asnumpy()
    one = saved(tmp_path / "one.safetensors", {"<one>": VECTORS[0]})
    several = saved(tmp_path / "emb.safetensors", {"emb_params": VECTORS[1:4]})
    texts = dict(prompt="a photo of <one> on a <three>", negative_prompt="<three>, <one>")
    before = embedded(ours, **texts)
    with devices.CompileCounter() as compiled:
        for pipe in (ours, theirs):
            pipe.load_textual_inversion(one)
            pipe.load_textual_inversion(several, token="<three>")
        assert len(ours.tokenizer) == len(theirs.tokenizer) == length + 4
        assert ours.text_encoder.config.vocab_size == length + 4
        assert ours.maybe_convert_prompt(texts["prompt"], ours.tokenizer) == (
            "a photo of <one> on a <three> <three>_1 <three>_2"
        )
        assert apart(ours, theirs, **texts) < ROUNDING
        assert parity.relative(embedded(ours, **texts), before) > SEEN
        predicted(ours)
    assert compiled.count == 1, "the text encoder, once; the UNet not at all"
    for pipe in (ours, theirs):
        pipe.unload_textual_inversion("<one>")
    assert ours.tokenizer.added_tokens_encoder == theirs.tokenizer.added_tokens_encoder
    assert apart(ours, theirs, prompt="a <three> on a table") < ROUNDING
    ours.unload_textual_inversion("<three>")
    assert len(ours.tokenizer) == length
    assert np.array_equal(ours.text_encoder.get_input_embeddings().embedding_table.asnumpy(), table)
    assert np.array_equal(embedded(ours, **texts), before), "the words are plain text again"


def test_lists_dicts_and_tensors(ours, theirs, tmp_path):
    one = saved(tmp_path / "one.safetensors", {"<one>": VECTORS[0]})
    a1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS[2:3]}, "name": "<three>"}
    for pipe in (ours, theirs):
        pipe.load_textual_inversion([one, {"other": VECTORS[1]}], token=["<one>", "<two>"])
        pipe.load_textual_inversion(a1111)
        pipe.load_textual_inversion(VECTORS[3:5], token=["<four>", "<five>"])
    assert apart(ours, theirs, prompt="<one> <two> <three> <four>", negative_prompt="<four>") < ROUNDING


def test_a_file_without_a_word_is_called_by_its_name(ours, theirs, tmp_path):
    """As A1111 has it; what is called so is the embedding that diffusers makes of the file under that word."""
    (tmp_path / "deeper").mkdir()
    texts = dict(prompt="a photo, EasyNegative", negative_prompt="bad hands v1.2, badhand4 badhand, ugly")
    files = {
        "EasyNegative": saved(tmp_path / "EasyNegative.safetensors", {"emb_params": VECTORS[:2]}),
        "bad hands v1.2": saved(tmp_path / "bad hands v1.2.safetensors", {"emb_params": VECTORS[2:3]}),
        "badhand": saved(tmp_path / "deeper/badhand.safetensors", {"*": VECTORS[3:5]}),
        "badhand4": saved(tmp_path / "badhand4.safetensors", {"clip_l": VECTORS[1:2].half()}),
    }
    ours.load_textual_inversion([files["EasyNegative"], files["bad hands v1.2"]])
    ours.load_textual_inversion(tmp_path / "deeper")
    ours.load_textual_inversion(tmp_path, weight_name="badhand4.safetensors")
    for word, file in files.items():
        theirs.load_textual_inversion(file, token=word)
    assert ours.tokenizer.added_tokens_encoder == dict(theirs.tokenizer.added_tokens_encoder)
    # diffusers puts the second vector of "badhand" into the word "badhand4", too.
    assert ours.maybe_convert_prompt("badhand4 badhand, EasyNegative", ours.tokenizer) == (
        "badhand4 badhand badhand_1, EasyNegative EasyNegative_1"
    )
    assert apart(ours, theirs, prompt="bad hands v1.2, EasyNegative", negative_prompt="badhand") < ROUNDING
    assert apart(ours, theirs, prompt="badhand4", negative_prompt="a badhand") < ROUNDING
    other_case = embedded(ours, prompt="a photo, easynegative", negative_prompt=texts["negative_prompt"])
    assert parity.relative(embedded(ours, **texts), other_case) > SEEN
    with pytest.raises(ValueError, match="'EasyNegative' is in the tokenizer already.*`token`"):
        ours.load_textual_inversion(files["EasyNegative"])
    ours.load_textual_inversion(files["EasyNegative"], token="again")


def test_words_and_lora_together_saved_and_loaded(sd1_folder, theirs, files, tmp_path):
    ours = our_pipeline(sd1_folder, mode="pynative")
    texts = dict(prompt="a <one> apple")
    for pipe in (ours, theirs):
        pipe.load_lora_weights(files[0])
        pipe.load_textual_inversion(VECTORS[:2], token="<one>")
    assert apart(ours, theirs, scale=0.5, **texts) < ROUNDING
    ours.save_pretrained(tmp_path / "saved")
    again = our_pipeline(tmp_path / "saved", mode="pynative")
    ours.unload_lora_weights()
    assert np.array_equal(embedded(again, **texts), embedded(ours, **texts))
    assert Reference.from_pretrained(tmp_path / "saved", low_cpu_mem_usage=False).text_encoder is not None
    again.unload_textual_inversion()
    assert len(again.tokenizer) == again.text_encoder.config.vocab_size == len(ours.tokenizer) - 2


def test_words_that_do_not_fit_change_nothing(ours, tmp_path, caplog):
    length, table = len(ours.tokenizer), bits(ours)
    xl = saved(tmp_path / "xl.safetensors", {"clip_g": torch.ones(2, 48), "clip_l": torch.ones(2, 32)})
    lora_ = saved(tmp_path / "lora.safetensors", {"unet.a.lora_A.weight": torch.ones(2), "unet.b": torch.ones(2)})
    word = saved(tmp_path / "apple.safetensors", {"emb_params": VECTORS[:1]})
    taken = next(word_ for word_ in ours.tokenizer.get_vocab() if word_.isalpha() and len(word_) > 2)
    one = torch.ones(32)
    for source, token, message in (
        (torch.ones(1, 48), "<a>", "48.*another model"), (one * torch.nan, "<a>", "NaN"),
        (torch.ones(1, 2, 32), "<a>", "shape"), (one, None, "give one by `token`"),
        (one, "apple</w>", "in the tokenizer"), ({"clip_l": 1, "clip_g": 2}, None, "clip_l, clip_g"),
        ([one] * 2, ["<a>", "<a>"], "in the tokenizer"), ([one] * 2, ["<a>"], "1 tokens for 2"), (one, 5, "token"),
        (xl, None, "xl.safetensors .*Stable Diffusion XL"), (lora_, None, "no textual inversion.*lora_A"),
        (word, taken, f"'{taken}' is in the tokenizer already"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ours.load_textual_inversion(source, token)
    with pytest.raises(ValueError, match="'<a>'"):
        ours.unload_textual_inversion("<a>")
    assert len(ours.tokenizer) == length and bits(ours) == table
    ours.load_textual_inversion({"emb_params": torch.ones(1, 32)})
    assert "emb_params" in caplog.text


def test_a_tokenizer_that_two_text_encoders_share(sd1_folder):
    """One table only has the words; the other's next row, or the one that a word moves to, is another's."""
    one, two = (our_pipeline(sd1_folder, mode="pynative") for _ in range(2))
    two.tokenizer = one.tokenizer
    one.load_textual_inversion(VECTORS[:2], token="<one>")
    plain, with_it = embedded(two, prompt="a photo"), embedded(one, prompt="a <one>")
    for action in (
        lambda: embedded(two, prompt="a <one>"),
        lambda: two.load_textual_inversion(VECTORS[3:], token="<two>"),
        two.unload_textual_inversion,
    ):
        with pytest.raises(InputError, match="'<one>', '<one>_1'.*shares the tokenizer"):
            action()
    assert np.array_equal(embedded(two, prompt="a photo"), plain)
    assert np.array_equal(embedded(one, prompt="a <one>"), with_it)
    # The advice.
    one.unload_textual_inversion()
    two.tokenizer = copy.deepcopy(one.tokenizer)
    one.load_textual_inversion(VECTORS[:2], token="<one>")
    two.load_textual_inversion(VECTORS[3:], token="<two>")
    assert np.array_equal(embedded(one, prompt="a <one>"), with_it)
    assert not np.array_equal(embedded(two, prompt="<two>"), plain)
    # A pipeline of the same components has the words, whoever loaded them.
    three = type(one)(**one.components, requires_safety_checker=False, mode="pynative")
    assert np.array_equal(embedded(three, prompt="a <one>"), with_it)
    three.unload_textual_inversion("<one>")
    three.load_textual_inversion(VECTORS[1:3], token="<one>")
    changed = embedded(three, prompt="a <one>")
    assert np.array_equal(embedded(one, prompt="a <one>"), changed) and not np.array_equal(changed, with_it)


def test_a_pipeline_without_a_text_encoder(sd1_folder, parts):
    pipe = StableDiffusionDiffEditPipeline.from_pretrained(
        sd1_folder, text_encoder=None, tokenizer=None, safety_checker=None, mode="pynative"
    )
    tensors = peft_names(parts[0])
    with pytest.raises(ValueError, match="for the text_encoder, which this pipeline has not"):
        pipe.load_lora_weights(tensors)
    pipe.load_lora_weights({name: value for name, value in tensors.items() if name.startswith("unet.")})
    for action in (lambda: pipe.load_textual_inversion(VECTORS, token="<a>"), pipe.unload_textual_inversion):
        with pytest.raises(InputError, match="need a tokenizer and a text encoder"):
            action()


# --- signatures, what is missing, documents --------------------------------------------------------------------------


METHODS = """load_lora_weights unload_lora_weights set_adapters delete_adapters disable_lora enable_lora fuse_lora
    unfuse_lora get_active_adapters get_list_adapters load_textual_inversion unload_textual_inversion
    maybe_convert_prompt""".split()


def test_signatures_are_the_references():
    def signature(kind, method):
        parameters = inspect.signature(inspect.unwrap(getattr(kind, method))).parameters.values()
        return [(p.name, p.default, p.kind) for p in parameters]

    for method in METHODS:
        assert signature(StableDiffusionDiffEditPipeline, method) == signature(Reference, method), method
    for kind in (StableDiffusionDiffEditPipeline, Reference):
        assert isinstance(kind.num_fused_loras, property) and isinstance(kind.fused_loras, property)


def test_what_of_adapters_is_not_here():
    ledger = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
    row = next(line for line in ledger.splitlines() if line.startswith("| N1 "))
    names = [name for name in re.findall(r"`(\w+)`", row) if hasattr(Reference, name)]
    assert len(names) >= 5
    for name in names:
        assert not hasattr(StableDiffusionDiffEditPipeline, name), f"{name} is here now: correct the ledger"


def test_the_page_runs(ours, parts, tmp_path, monkeypatch):
    """docs/adapters.md from top to bottom, on a tiny checkpoint."""
    from test_guide import blocks

    saved(tmp_path / "lora.safetensors", kohya_names(parts[0], 2.0))
    saved(tmp_path / "other_lora.safetensors", peft_names(parts[1]))
    saved(tmp_path / "cat-toy.safetensors", {"<cat-toy>": VECTORS[:3]})
    monkeypatch.chdir(tmp_path)
    names = {"pipeline": ours, "raw_image": PICTURE}
    weights = bits(ours)
    code = blocks(ROOT / "docs" / "adapters.md", "py", "python")
    assert len(code) >= 6
    for block in code:
        exec(compile(block, "docs/adapters.md", "exec"), names)
    assert ours.get_list_adapters() == {} and bits(ours) == weights
    assert check_folder(tmp_path / "fused-checkpoint")
