"""Components out of checkpoint folders: every weight in its place, in every layout of files, or a list of misfits."""

import json
import shutil
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import torch
from checkpoint_files import MODEL_FILES, assert_same, parameters, read_tensors, write_tensors

from mindiffedit.checkpoints import models
from mindiffedit.checkpoints.layout import CheckpointError, WeightsError
from mindiffedit.checkpoints.models import load_components
from mindiffedit.checkpoints.weight_files import FLOATS, Stored, map_file
from mindiffedit.solvers.schedulers import DDIMScheduler


def relative(ours, theirs):
    """Root mean square of the difference over that of the expected values, in float64."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape and np.isfinite(ours).all() and np.isfinite(theirs).all()
    return float(np.sqrt(((ours - theirs) ** 2).mean() / (theirs**2).mean()))


def inputs(tokenizer):
    """Two prompts, latents of 8×6, a picture of 64×48: batch 2, not square, nothing equal."""
    rng = np.random.default_rng(5)
    ids = tokenizer(
        ["a red apple on a wooden table", "the dog"],
        padding="max_length",
        truncation=True,
        return_tensors="np",
    ).input_ids
    latents = rng.standard_normal((2, 4, 8, 6)).astype(np.float32)
    picture = rng.uniform(-1, 1, (2, 3, 64, 48)).astype(np.float32)
    return ids.astype(np.int32), latents, picture


# --- loading what diffusers saved ------------------------------------------------------------------


def test_every_parameter_has_the_files_value(checked, checked_folder):
    for name, file in MODEL_FILES.items():
        assert_same(checked[name], read_tensors(checked_folder / file))
        for parameter in checked[name].get_parameters():
            assert parameter.dtype == ms.float32 and not parameter.requires_grad
        assert not any(cell.training for _, cell in checked[name].cells_and_names())


def test_the_other_components(checked, sd2, checked_folder, sd2_folder):
    kinds = {name: type(part).__name__ for name, part in checked.items()}
    assert kinds == {
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "unet": "UNet2DConditionModel",
        "scheduler": "PNDMScheduler",
        "inverse_scheduler": "NoneType",
        "safety_checker": "StableDiffusionSafetyChecker",
        "feature_extractor": "CLIPImageProcessor",
        "requires_safety_checker": "bool",
    }
    assert checked["requires_safety_checker"] is True and sd2["requires_safety_checker"] is False
    assert checked["scheduler"].config.skip_prk_steps is True
    assert checked["tokenizer"].model_max_length == 77 and sd2["tokenizer"].pad_token == "!"
    assert checked["feature_extractor"].crop_size == {"height": 32, "width": 32}
    assert checked["unet"].config.attention_head_dim == 4
    assert list(sd2["unet"].config.attention_head_dim) == [2, 4]
    assert sd2["unet"].config.use_linear_projection is True
    assert sd2["scheduler"].config.prediction_type == "v_prediction"
    assert type(sd2["scheduler"]) is DDIMScheduler  # this package's
    assert checked["text_encoder"].config.hidden_act == "quick_gelu"
    assert sd2["text_encoder"].config.hidden_act == "gelu"


@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_models_compute_what_torchs_do(layout, checked, sd2, checked_folder, sd2_folder):
    """Measured: 1e-6 (UNet), 2e-6 (VAE), 5e-7 (text) of the rms, all torch's own distance from float64."""
    from diffusers import StableDiffusionPipeline
    from mindspore import Tensor, int64

    from mindiffedit.runtime.kernels import portable_kernels

    parts, folder = (checked, checked_folder) if layout == "sd1" else (sd2, sd2_folder)
    reference = StableDiffusionPipeline.from_pretrained(str(folder))
    ids, latents, picture = inputs(parts["tokenizer"])
    with torch.no_grad(), portable_kernels():
        text = reference.text_encoder(torch.tensor(ids), output_hidden_states=True)
        found = parts["text_encoder"](Tensor(ids), None, None, None, True)
        assert relative(found[0].asnumpy(), text[0]) < 5e-6
        for one, other in zip(found[2][1:], text.hidden_states[1:], strict=True):
            assert relative(one.asnumpy(), other) < 5e-6
        states = text[0].numpy()
        for step in (1, 981):
            expected = reference.unet(torch.tensor(latents), torch.tensor(step), text[0]).sample
            found = parts["unet"](Tensor(latents), Tensor(step, int64), Tensor(states))[0]
            assert relative(found.asnumpy(), expected) < 3e-6
        expected = reference.vae.encode(torch.tensor(picture)).latent_dist.parameters
        assert relative(parts["vae"].encode(Tensor(picture))[0].asnumpy(), expected) < 6e-6
        expected = reference.vae.decode(torch.tensor(latents)).sample
        assert relative(parts["vae"].decode(Tensor(latents))[0].asnumpy(), expected) < 6e-6


def test_time_embedding_is_the_references():
    from diffusers.models.embeddings import get_timestep_embedding
    from mindone.diffusers.models.embeddings import Timesteps
    from mindspore import Tensor, int64, nn

    steps = np.arange(1000)
    for channels, flip, shift in ((16, True, 0), (320, True, 0), (32, False, 1)):
        holder = nn.Cell()
        holder.time_proj = Timesteps(channels, flip, shift)
        models._tabulate_time_frequencies(holder)
        ours = holder.time_proj(Tensor(steps, int64)).asnumpy()
        options = dict(flip_sin_to_cos=flip, downscale_freq_shift=shift)
        expected = get_timestep_embedding(torch.tensor(steps), channels, **options).numpy()
        # A frequency whose last bit differs moves an angle of 999 by 6e-5; mindone's are off by 1e-4.
        np.testing.assert_allclose(ours, expected, rtol=0, atol=6.2e-5)
        assert np.abs(ours - expected).mean() < 3e-7


def test_attention_stays_in_its_models_dtype(checked):
    """On Ascend mindone would cast float32 to float16."""
    for name in ("unet", "vae"):
        cells = [cell for _, cell in checked[name].cells_and_names() if hasattr(cell, "fa_force_dtype")]
        assert cells and all(cell.fa_force_dtype is None for cell in cells)


def test_nothing_is_left_without_a_value(checked, checked_folder):
    """Tensors that no file has (positions, constants of layers) are those of a model that makes all its values."""
    from mindiffedit.checkpoints.survey import Survey
    from mindiffedit.runtime.kernels import portable_kernels

    def constants(model):
        return {
            f"{path}.{name}": value.asnumpy()
            for path, cell in model.cells_and_names()
            for name, value in vars(cell).items()
            if isinstance(value, ms.Tensor) and name != "init_tensor"  # an Embedding's recipe for its table
        }

    for name, source in Survey.of(checked_folder, {}, None, None).sources.items():
        with portable_kernels():
            expected = constants(models._construct(name, source.config))
        values = constants(checked[name])
        assert values.keys() == expected.keys() and values
        for key in expected:
            np.testing.assert_array_equal(values[key], expected[key], err_msg=key)
        assert not any(parameter.has_init for parameter in checked[name].get_parameters())
    assert "text_model.embeddings.position_ids" in constants(checked["text_encoder"])


@pytest.mark.parametrize("change", ["written to", "replaced", "deleted"])
def test_files_and_weights_do_not_reach_one_another(copy, change):
    """Weights lie in their file, of which the model has a view of its own."""
    from mindiffedit.runtime import devices

    file = copy / MODEL_FILES["unet"]
    expected, content = read_tensors(file), file.read_bytes()
    model = load_components(copy)["unet"]
    if change == "deleted":
        file.unlink()
    elif change == "replaced":
        write_tensors(copy / "other", {name: np.zeros_like(values) for name, values in expected.items()})
        (copy / "other").replace(file)
    else:
        weight = models.parameters_by_name(model)["conv_in.weight"]
        with devices.eager():
            ms.ops.assign(weight, weight + 1)
        expected["conv_in.weight"] = expected["conv_in.weight"] + 1
        assert file.read_bytes() == content
    assert_same(model, expected)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells where memory comes from")
def test_float32_weights_are_not_copied(copy):
    from mindiffedit.runtime.kernels import eagerly

    parts = load_components(copy)
    ids, latents, _ = inputs(parts["tokenizer"])
    with eagerly():  # the first run of a model may move its weights
        parts["text_encoder"](ms.Tensor(ids))
    for name in ("unet", "vae", "text_encoder"):
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        file = str((copy / MODEL_FILES[name]).resolve())
        places = [[int(end, 16) for end in words[0].split("-")] for words in lines if words[-1] == file]
        for parameter in parts[name].get_parameters():
            assert any(start <= parameter.data_ptr() < end for start, end in places), parameter.name


# --- file formats ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_load_as_exact_float32(copy, dtype):
    from safetensors.torch import load_file, save_file

    halves = {}
    for name in ("unet", "text_encoder"):
        tensors = load_file(copy / MODEL_FILES[name])
        halves[name] = {key: t.to(getattr(torch, dtype)) for key, t in tensors.items()}
        save_file(halves[name], copy / MODEL_FILES[name], metadata={"format": "pt"})
    parts = load_components(copy)
    for name, tensors in halves.items():
        assert_same(parts[name], {key: t.float().numpy() for key, t in tensors.items()})


@pytest.mark.parametrize("shift", [0, 1])
def test_every_type_loads_as_it_is_read(shift, tmp_path):
    """Mapped or read, at any address: the file's values, rounded where they have to be, and nothing is written back."""
    rng = np.random.default_rng(3)
    exact = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
    for name, kind in FLOATS.items():
        bits = rng.integers(0, 256, 24 * np.dtype(kind).itemsize, np.uint8)
        file = tmp_path / name
        file.write_bytes(bytes(8 + shift) + bits.tobytes())
        stored = Stored(file, name, (4, 6), 8 + shift)
        values = stored.read()
        if name in exact:
            np.testing.assert_array_equal(values, np.frombuffer(bits.tobytes(), exact[name]).reshape(4, 6))
        for dtype in map(np.dtype, (np.float32, np.float16)):
            for mapping in (None, map_file(file)):
                with np.errstate(over="ignore"):
                    loaded, expected = stored.load(dtype, mapping), values.astype(dtype)
                assert loaded.dtype == dtype and loaded.flags.writeable
                np.testing.assert_array_equal(loaded, expected)
                loaded[:] = 0
        np.testing.assert_array_equal(stored.read(), values)


def test_dtype_float16_is_the_rounded_file(sd1_folder):
    parts = load_components(sd1_folder, dtype=ms.float16)
    for name in ("vae", "unet", "text_encoder"):
        expected = {key: t.astype(np.float16) for key, t in read_tensors(sd1_folder / MODEL_FILES[name]).items()}
        assert_same(parts[name], expected)
        assert parts[name].dtype == ms.float16


def test_other_dtypes_are_refused(sd1_folder):
    for dtype in ("int8", 32, np.float32):
        with pytest.raises(ValueError, match="`dtype`: expected one of float32, float16, bfloat16"):
            load_components(sd1_folder, dtype=dtype)


def test_variant(sd1_folder, tmp_path):
    from diffusers import StableDiffusionPipeline

    folder = tmp_path / "half"
    pipeline = StableDiffusionPipeline.from_pretrained(str(sd1_folder))
    pipeline.to(dtype=torch.float16).save_pretrained(str(folder), variant="fp16")
    # One component without the variant: its plain file is taken.
    shutil.copy(sd1_folder / MODEL_FILES["vae"], folder / MODEL_FILES["vae"])
    (folder / "vae/diffusion_pytorch_model.fp16.safetensors").unlink()

    parts = load_components(folder, variant="fp16")
    unet = read_tensors(folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert_same(parts["unet"], {key: t.astype(np.float32) for key, t in unet.items()})
    assert_same(parts["vae"], read_tensors(sd1_folder / MODEL_FILES["vae"]))

    with pytest.raises(CheckpointError, match=r"holds only the variant fp16.*Give `variant` fp16"):
        load_components(folder)
    with pytest.raises(CheckpointError, match=r"no weights of `variant` 'ema'"):
        load_components(sd1_folder, variant="ema")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(copy, variant):
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    expected = {name: read_tensors(copy / MODEL_FILES[name]) for name in ("unet", "text_encoder")}
    for name, cls in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        model = cls.from_pretrained(str(copy / name))
        (copy / MODEL_FILES[name]).unlink()
        model.save_pretrained(str(copy / name), max_shard_size="60KB", variant=variant)
        assert len(list((copy / name).glob("*-of-*.safetensors"))) > 1
    parts = load_components(copy, variant=variant)
    for name, tensors in expected.items():
        assert_same(parts[name], tensors)

    index = next((copy / "unet").glob("*index*.json"))
    shards = sorted((copy / "unet").glob("*-of-*.safetensors"))
    content = json.loads(index.read_text())
    wrong = {**content["weight_map"], "conv_in.weight": shards[-1].name, "conv_in.none": shards[0].name}
    index.write_text(json.dumps({**content, "weight_map": wrong}))
    with pytest.raises(WeightsError, match="not in the shard it names: conv_in.none, conv_in.weight"):
        load_components(copy, variant=variant)
    index.write_text(json.dumps({**content, "weight_map": {"conv_in.weight": "../vae/config.json"}}))
    with pytest.raises(CheckpointError, match="expected a safetensors file beside it"):
        load_components(copy, variant=variant)
    index.write_text(json.dumps(content))
    shards[0].unlink()
    with pytest.raises(CheckpointError, match=rf"{shards[0].name} is missing"):
        load_components(copy, variant=variant)


def test_names_of_older_files(copy):
    """A VAE's attention before diffusers 0.18, and the table of positions that was stored as a weight."""
    vae = read_tensors(copy / MODEL_FILES["vae"])
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, values in vae.items():
        for new, former in names.items():
            if "attentions" in name:
                name = name.replace(f".{new}.", f".{former}.")
        old[name] = values
    assert len(old.keys() - vae.keys()) == 16
    write_tensors(copy / MODEL_FILES["vae"], old)
    text = read_tensors(copy / MODEL_FILES["text_encoder"])
    positions = {"text_model.embeddings.position_ids": np.arange(77, dtype=np.int64)[None]}
    write_tensors(copy / MODEL_FILES["text_encoder"], text | positions)

    parts = load_components(copy)
    assert_same(parts["vae"], vae)
    assert_same(parts["text_encoder"], text)


def test_files_that_mindone_saved(checked, copy):
    """mindone keeps MindSpore's names (gamma, embedding_table) in its files."""
    from mindiffedit.runtime.kernels import portable_kernels

    with portable_kernels():
        for name in ("text_encoder", "unet"):
            shutil.rmtree(copy / name)
            checked[name].save_pretrained(str(copy / name))
    parts = load_components(copy)
    for name in ("text_encoder", "unet"):
        assert_same(parts[name], parameters(checked[name]))


# --- weights that do not fit -----------------------------------------------------------------------


def test_all_misfits_of_all_files_are_listed(copy):
    unet = read_tensors(copy / MODEL_FILES["unet"])
    unet["conv_in.weigth"] = unet.pop("conv_in.weight")
    unet["conv_out.bias"] = unet["conv_out.bias"][:3]
    unet["mid_block.resnets.0.norm1.weight"] = unet["mid_block.resnets.0.norm1.weight"].astype(np.int32)
    write_tensors(copy / MODEL_FILES["unet"], unet)
    text = read_tensors(copy / MODEL_FILES["text_encoder"])
    del text["text_model.final_layer_norm.bias"]
    # Transposed: as many values, another shape.
    table = "text_model.embeddings.position_embedding.weight"
    text[table] = text[table].T
    write_tensors(copy / MODEL_FILES["text_encoder"], text)

    with pytest.raises(WeightsError) as caught:
        load_components(copy)
    lines = str(caught.value).splitlines()
    assert f"unet, from {copy / MODEL_FILES['unet']}:" in lines
    assert f"text_encoder, from {copy / MODEL_FILES['text_encoder']}:" in lines
    assert {line.strip() for line in lines if line.startswith("  ")} == {
        "extra: conv_in.weigth (16, 4, 3, 3)",
        "missing: conv_in.weight (16, 4, 3, 3)",
        "misshapen: conv_out.bias is (3,), the model has (4,)",
        "of the wrong type: mid_block.resnets.0.norm1.weight is I32, expected one of F64, F32, F16, BF16, F8_E4M3,"
        " F8_E5M2",
        "missing: text_model.final_layer_norm.bias (32,)",
        "misshapen: text_model.embeddings.position_embedding.weight is (32, 77), the model has (77, 32)",
    }


def test_each_models_weights_are_all_needed(copy):
    """Files of something else: the error lists every parameter of the models once."""
    names = ("vae", "unet", "text_encoder")
    expected = sum((list(read_tensors(copy / MODEL_FILES[name])) for name in names), [])
    for name in names:
        write_tensors(copy / MODEL_FILES[name], {"other": np.zeros(2, np.float32)})
    with pytest.raises(WeightsError) as caught:
        load_components(copy)
    missing = [line for line in str(caught.value).splitlines() if line.startswith("  missing: ")]
    assert sorted(line.split()[1] for line in missing) == sorted(expected)
    assert "another model" in str(caught.value)


def test_extra_weights_of_a_unet(copy):
    """LoRA weights get their own hint; a table of positions is extra here."""
    unet = read_tensors(copy / MODEL_FILES["unet"])
    lora = {"down_blocks.0.attentions.0.proj_in.lora_A.weight": np.zeros((4, 16), np.float32)}
    positions = {"embeddings.position_ids": np.zeros(3, np.float32)}
    for more, match in ((lora, "fuse them"), (positions, "extra: embeddings.position_ids")):
        write_tensors(copy / MODEL_FILES["unet"], unet | more)
        with pytest.raises(WeightsError, match=match):
            load_components(copy)


def test_values_that_no_parameter_can_have(copy):
    """NaN, infinity, and what is too large for float16."""
    vae = read_tensors(copy / MODEL_FILES["vae"])
    for bad in (np.nan, np.inf, -np.inf):
        damaged = {name: values.copy() for name, values in vae.items()}
        damaged["decoder.conv_in.weight"][0, 0, 0, :2] = bad
        damaged["quant_conv.bias"][3] = bad
        write_tensors(copy / MODEL_FILES["vae"], damaged)
        with pytest.raises(WeightsError) as caught:
            load_components(copy)
        assert "decoder.conv_in.weight: 2 of 576 values are NaN or infinite" in str(caught.value)
        assert "quant_conv.bias: 1 of 8 values are NaN or infinite" in str(caught.value)
    vae["quant_conv.bias"][3] = 70000.0
    write_tensors(copy / MODEL_FILES["vae"], vae)
    assert load_components(copy)["vae"].quant_conv.bias.asnumpy()[3] == 70000.0
    with pytest.raises(WeightsError, match="quant_conv.bias: holds values too large for Float16"):
        load_components(copy, dtype="float16")


# --- overrides -------------------------------------------------------------------------------------


def test_overrides_are_taken_and_not_read(checked_folder, checked, tmp_path):
    folder = Path(shutil.copytree(checked_folder, tmp_path / "copy"))
    for name in ("safety_checker", "scheduler", "unet", "feature_extractor"):
        shutil.rmtree(folder / name)
    scheduler = object()
    parts = load_components(
        folder,
        overrides={
            "safety_checker": None,
            "scheduler": scheduler,
            "unet": checked["unet"],
            "feature_extractor": None,
            "requires_safety_checker": False,
        },
    )
    assert parts["safety_checker"] is None and parts["scheduler"] is scheduler
    assert parts["unet"] is checked["unet"] and parts["requires_safety_checker"] is False
    with pytest.raises(TypeError, match="u_net is none of vae, text_encoder"):
        load_components(checked_folder, overrides={"u_net": None})
