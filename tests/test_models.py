"""Checkpoints: folders and hub names in, components out, and back to a folder that diffusers loads."""

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from mindiffedit import models
from mindiffedit.models import (
    CheckpointError,
    WeightsError,
    check_folder,
    load_components,
    resolve_folder,
    save_components,
)

MODEL_FILES = {
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "safety_checker": "safety_checker/model.safetensors",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


# --- fixtures and helpers --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checked_folder(tmp_path_factory):
    """An SD-1-like checkpoint with a safety checker and its feature extractor."""
    from checkpoints import make_sd1

    return make_sd1(tmp_path_factory.mktemp("checked") / "checkpoint", safety_checker=True)


@pytest.fixture(scope="module")
def checked(checked_folder):
    return load_components(checked_folder)


@pytest.fixture(scope="module")
def sd2(sd2_folder):
    return load_components(sd2_folder)


@pytest.fixture
def copy(sd1_folder, tmp_path):
    """A copy of the SD-1-like checkpoint, to be damaged."""
    return Path(shutil.copytree(sd1_folder, tmp_path / "copy"))


@pytest.fixture
def no_building(monkeypatch):
    """Building a model is an error: what is wrong must have been found before."""

    def refuse(*_):
        raise AssertionError("a model was built")

    monkeypatch.setattr(models, "_construct", refuse)


def read_tensors(path):
    """{name: numpy array} of a safetensors file, by its own library."""
    from safetensors.numpy import load_file

    return load_file(str(path))


def write_tensors(path, tensors):
    from safetensors.numpy import save_file

    save_file(
        {name: np.ascontiguousarray(t) for name, t in tensors.items()}, str(path), metadata={"format": "pt"}
    )


def change_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def parameters(model):
    """{torch's name: numpy array} of a loaded model."""
    return {name: p.asnumpy() for name, p in models.parameters_by_name(model).items()}


def assert_same(model, expected):
    """Every parameter is there and has the expected values bit by bit."""
    found = parameters(model)
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def relative(found, expected):
    """Root mean square of the difference over that of the expected values, in float64."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape and np.isfinite(found).all() and np.isfinite(expected).all()
    return float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))


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
    import mindspore

    for name, file in MODEL_FILES.items():
        assert_same(checked[name], read_tensors(checked_folder / file))
        for parameter in checked[name].get_parameters():
            assert parameter.dtype == mindspore.float32 and not parameter.requires_grad
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
    assert checked["text_encoder"].config.hidden_act == "quick_gelu"
    assert sd2["text_encoder"].config.hidden_act == "gelu"


def test_ddim_comes_from_this_package(sd2):
    from mindiffedit.schedulers import DDIMScheduler

    assert type(sd2["scheduler"]) is DDIMScheduler


@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_models_compute_what_torchs_do(layout, checked, sd2, checked_folder, sd2_folder):
    """Measured: 1e-6 (UNet), 2e-6 (VAE), 5e-7 (text) of the rms, all torch's own distance from float64."""
    import torch
    from diffusers import StableDiffusionPipeline
    from mindspore import Tensor, int64

    from mindiffedit.kernels import portable_kernels

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


def test_the_unet_compiles_once_for_all_timesteps(checked):
    import mindspore
    from mindspore import Tensor

    from mindiffedit.devices import CompileCounter
    from mindiffedit.kernels import portable_kernels

    unet = checked["unet"]
    _, latents, _ = inputs(checked["tokenizer"])
    states = np.random.default_rng(6).standard_normal((2, 77, 32)).astype(np.float32)

    def step(sample, timestep, states):
        return unet(sample, timestep, states)[0]

    compiled = mindspore.jit(step)
    with portable_kernels(), CompileCounter() as counter:
        for timestep in (981, 1, 500):
            given = (Tensor(latents), Tensor(timestep, mindspore.int64), Tensor(states))
            assert relative(compiled(*given).asnumpy(), step(*given).asnumpy()) < 2e-6
    assert counter.count == 1


@pytest.mark.parametrize("channels, flip, shift", [(16, True, 0), (320, True, 0), (32, False, 1)])
def test_time_embedding_is_the_references(channels, flip, shift):
    import torch
    from diffusers.models.embeddings import get_timestep_embedding
    from mindone.diffusers.models.embeddings import Timesteps
    from mindspore import Tensor, int64, nn

    holder = nn.Cell()
    holder.time_proj = Timesteps(channels, flip, shift)
    models._tabulate_time_frequencies(holder)
    steps = np.arange(1000)
    expected = get_timestep_embedding(
        torch.tensor(steps), channels, flip_sin_to_cos=flip, downscale_freq_shift=shift
    )
    # A frequency whose last bit differs moves an angle of 999 by 6e-5; mindone's are off by 1e-4.
    np.testing.assert_allclose(
        holder.time_proj(Tensor(steps, int64)).asnumpy(), expected, rtol=0, atol=6.2e-5
    )
    typical = np.abs(holder.time_proj(Tensor(steps, int64)).asnumpy() - expected.numpy()).mean()
    assert typical < 3e-7


# --- file formats ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_load_as_exact_float32(copy, dtype):
    import torch
    from safetensors.torch import load_file, save_file

    halves = {}
    for name in ("unet", "text_encoder"):
        tensors = load_file(copy / MODEL_FILES[name])
        halves[name] = {key: t.to(getattr(torch, dtype)) for key, t in tensors.items()}
        save_file(halves[name], copy / MODEL_FILES[name], metadata={"format": "pt"})
    parts = load_components(copy)
    for name, tensors in halves.items():
        assert_same(parts[name], {key: t.float().numpy() for key, t in tensors.items()})


def test_dtype_float16_is_the_rounded_file(sd1_folder):
    import mindspore

    parts = load_components(sd1_folder, dtype=mindspore.float16)
    for name in ("vae", "unet", "text_encoder"):
        expected = {
            key: t.astype(np.float16) for key, t in read_tensors(sd1_folder / MODEL_FILES[name]).items()
        }
        assert_same(parts[name], expected)
        assert parts[name].dtype == mindspore.float16


@pytest.mark.parametrize("dtype", ["int8", 32, np.float32])
def test_other_dtypes_are_refused(sd1_folder, dtype):
    with pytest.raises(ValueError, match="dtype: expected one of float32, float16, bfloat16"):
        load_components(sd1_folder, dtype=dtype)


def test_variant(sd1_folder, tmp_path):
    import torch
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

    with pytest.raises(CheckpointError, match=r"holds only the variant fp16.*variant='fp16'"):
        load_components(folder)
    with pytest.raises(CheckpointError, match=r"no weights of variant 'ema'"):
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
    from mindiffedit.kernels import portable_kernels

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
        "of the wrong type: mid_block.resnets.0.norm1.weight is I32, expected one of F64, F32, F16, BF16",
        "missing: text_model.final_layer_norm.bias (32,)",
        "misshapen: text_model.embeddings.position_embedding.weight is (32, 77), the model has (77, 32)",
    }


@pytest.mark.parametrize("name", ["vae", "unet", "text_encoder"])
def test_each_models_weights_are_all_needed(copy, name):
    """An empty file: the error lists every parameter of the model once."""
    expected = read_tensors(copy / MODEL_FILES[name])
    write_tensors(copy / MODEL_FILES[name], {"other": np.zeros(2, np.float32)})
    with pytest.raises(WeightsError) as caught:
        load_components(copy)
    missing = [line for line in str(caught.value).splitlines() if line.startswith("  missing: ")]
    assert sorted(line.split()[1] for line in missing) == sorted(expected)
    assert "another model" in str(caught.value)


def test_lora_weights_get_their_own_hint(copy):
    unet = read_tensors(copy / MODEL_FILES["unet"])
    unet["down_blocks.0.attentions.0.proj_in.lora_A.weight"] = np.zeros((4, 16), np.float32)
    write_tensors(copy / MODEL_FILES["unet"], unet)
    with pytest.raises(WeightsError, match="fuse them"):
        load_components(copy)


def test_position_ids_are_extra_in_a_unet(copy):
    unet = read_tensors(copy / MODEL_FILES["unet"])
    write_tensors(copy / MODEL_FILES["unet"], unet | {"embeddings.position_ids": np.zeros(3, np.float32)})
    with pytest.raises(WeightsError, match="extra: embeddings.position_ids"):
        load_components(copy)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(copy, bad):
    vae = read_tensors(copy / MODEL_FILES["vae"])
    vae["decoder.conv_in.weight"][0, 0, 0, :2] = bad
    vae["quant_conv.bias"][3] = bad
    write_tensors(copy / MODEL_FILES["vae"], vae)
    with pytest.raises(WeightsError) as caught:
        load_components(copy)
    assert "decoder.conv_in.weight: 2 of 576 values are NaN or infinite" in str(caught.value)
    assert "quant_conv.bias: 1 of 8 values are NaN or infinite" in str(caught.value)


def test_values_too_large_for_float16(copy):
    vae = read_tensors(copy / MODEL_FILES["vae"])
    vae["quant_conv.bias"][3] = 70000.0
    write_tensors(copy / MODEL_FILES["vae"], vae)
    assert load_components(copy)["vae"].quant_conv.bias.asnumpy()[3] == 70000.0
    with pytest.raises(WeightsError, match="quant_conv.bias: holds values too large for Float16"):
        load_components(copy, dtype="float16")


# --- damaged files: found before any model is built ------------------------------------------------


def refusal(folder, match):
    """What is said of a folder that cannot be used, by loading it and, word for word, by checking it."""
    with pytest.raises(CheckpointError, match=match) as loading:
        load_components(folder)
    with pytest.raises(CheckpointError) as checking:
        check_folder(folder)
    assert str(checking.value) == str(loading.value)
    return str(loading.value)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def truncate_header(path):
    path.write_bytes(path.read_bytes()[:200])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0" * 8)


def garble_header(path):
    content = path.read_bytes()
    path.write_bytes(content[:40] + b"\xff\xfe{" + content[43:])


def overlap(path):
    header = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        }
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 12)


def wrong_size(path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3438167540\n"


@pytest.mark.parametrize("name", ["vae", "unet", "text_encoder"])
@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"ab"), "not a safetensors file"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + b"x" * 500), "not a safetensors file"),
        (lambda path: path.write_bytes(b"{" + b" " * 500), "not a safetensors file"),
        (lambda path: path.write_bytes(POINTER), "git lfs pull"),
        (truncate, "is truncated"),
        (truncate_header, "is truncated"),
        (lengthen, "is corrupt"),
        (garble_header, "corrupt header"),
        (overlap, "corrupt header.*place of b is wrong"),
        (wrong_size, "corrupt header.*size of a is wrong"),
    ],
)
def test_damaged_weights(copy, no_building, name, damage, message):
    path = copy / MODEL_FILES[name]
    damage(path)
    said = refusal(copy, message)
    assert str(path) in said and "gain" in said


@pytest.mark.parametrize("ending", ["bin", "ckpt", "pt"])
def test_pickle_weights_are_never_read(copy, no_building, ending):
    path = copy / MODEL_FILES["unet"]
    path.rename(path.parent / f"diffusion_pytorch_model.{ending}")
    said = refusal(copy, rf"unet holds only pickle.*\.{ending}.*safe_serialization")
    with pytest.raises(CheckpointError) as caught:
        load_components(copy, use_safetensors=None)
    assert str(caught.value) == said
    with pytest.raises(CheckpointError, match="can run code"):
        load_components(copy, use_safetensors=False)


@pytest.mark.parametrize("name", ["vae", "unet", "text_encoder"])
def test_missing_weights_config_and_folder(copy, no_building, name):
    (copy / MODEL_FILES[name]).unlink()
    refusal(copy, rf"{name} has no weights; it holds config.json")
    (copy / name / "config.json").unlink()
    refusal(copy, rf"{name}/config.json is missing")
    (copy / name).rmdir()
    refusal(copy, rf"{name}/config.json is missing")


@pytest.mark.parametrize(
    "file", ["model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff"])
def test_damaged_json(copy, no_building, file, content):
    (copy / file).write_bytes(content.encode("latin-1"))
    assert str(copy / file) in refusal(copy, "JSON")


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_incomplete_tokenizer(copy, no_building, file):
    (copy / "tokenizer" / file).unlink()
    refusal(copy, f"lacks {file}")


def test_damaged_tokenizer(copy, no_building):
    (copy / "tokenizer/vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer cannot be read"):
        load_components(copy)
    check_folder(copy)  # that is for transformers to find out


def test_config_that_builds_no_model(copy):
    change_json(copy / "unet/config.json", down_block_types=["NoSuchBlock", "DownBlock2D"])
    with pytest.raises(
        CheckpointError, match=r"unet/config.json: no UNet2DConditionModel can be built.*NoSuchBlock"
    ):
        load_components(copy)


# --- other kinds of checkpoints --------------------------------------------------------------------


def test_missing_folder_and_folder_without_index(tmp_path):
    refusal(tmp_path / "none", "is not a folder")
    (tmp_path / "notes.txt").write_text("x")
    refusal(tmp_path, r"no model_index.json.*holds notes.txt")


@pytest.mark.parametrize("name", ["vae", "text_encoder", "tokenizer", "unet", "scheduler"])
@pytest.mark.parametrize("entry", [None, [None, None]])
def test_required_components(copy, no_building, name, entry):
    change_json(copy / "model_index.json", **{name: entry})
    refusal(copy, rf"\(StableDiffusionPipeline\) has no {name}; .* lists ")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}, "Stable Diffusion XL"),
        ({"transformer": ["diffusers", "SD3Transformer2DModel"]}, "diffusion transformer"),
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "unet is a UNet3DConditionModel, expected UNet2D"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "vae is a AutoencoderTiny, expected AutoencoderKL"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "expected CLIPTextModel"),
        ({"tokenizer": ["transformers", "T5Tokenizer"]}, "expected CLIPTokenizer or CLIPTokenizerFast"),
        ({"unet": "UNet2DConditionModel"}, r"unet: expected \[library, class\]"),
        ({"unet": ["diffusers"]}, r"unet: expected \[library, class\]"),
    ],
)
def test_other_classes(copy, no_building, changes, message):
    change_json(copy / "model_index.json", **changes)
    refusal(copy, message)


@pytest.mark.parametrize("name", ["NoSuchScheduler", "UNet2DConditionModel"])
def test_schedulers_that_mindone_has_not(copy, no_building, name):
    change_json(copy / "model_index.json", scheduler=["diffusers", name])
    with pytest.raises(CheckpointError, match=f"no scheduler '{name}'"):
        load_components(copy)
    check_folder(copy)  # that is for mindone to find out


@pytest.mark.parametrize(
    "component, changes, message",
    [
        ("unet", {"in_channels": 9}, "takes 9 channels and gives 4"),
        ("unet", {"in_channels": 8, "out_channels": 8}, "VAE has 4 latent channels, the UNet 8"),
        ("unet", {"cross_attention_dim": 768}, "text encoder is 32 wide, the UNet takes 768"),
        ("unet", {"addition_embed_type": "text_time"}, "needs more inputs"),
        ("unet", {"num_class_embeds": 1000}, "needs more inputs"),
    ],
)
def test_components_that_do_not_go_together(copy, no_building, component, changes, message):
    change_json(copy / component / "config.json", **changes)
    refusal(copy, message)


def test_a_tokenizer_with_more_words_than_the_text_encoder(copy, no_building):
    change_json(copy / "text_encoder/config.json", vocab_size=100)
    with pytest.raises(CheckpointError, match="tokenizer has ids up to 593, the text encoder knows 100"):
        load_components(copy)


def test_unused_components_of_the_folder_do_not_matter(copy):
    change_json(copy / "model_index.json", image_encoder=["transformers", "CLIPVisionModelWithProjection"])
    assert load_components(copy)["unet"] is not None


# --- checking alone --------------------------------------------------------------------------------


def test_a_checked_folder_gives_its_configs(checked_folder, sd1_folder):
    configs = check_folder(checked_folder)
    assert set(configs) == set(MODEL_FILES)
    for name, config in configs.items():
        assert config == json.loads((checked_folder / name / "config.json").read_text())
    assert set(check_folder(str(sd1_folder))) == {"vae", "text_encoder", "unet"}


def test_what_is_skipped_is_not_checked(checked_folder, tmp_path):
    folder = Path(shutil.copytree(checked_folder, tmp_path / "copy"))
    (folder / "feature_extractor/preprocessor_config.json").unlink()
    refusal(folder, "preprocessor_config.json is missing")
    (folder / MODEL_FILES["safety_checker"]).unlink()
    refusal(folder, "safety_checker has no weights")
    configs = check_folder(folder, skip=("safety_checker", "feature_extractor"))
    assert set(configs) == {"vae", "text_encoder", "unet"}


def test_checking_imports_no_framework(checked_folder):
    code = (
        "import sys\n"
        "from mindiffedit.models import check_folder\n"
        "check_folder(sys.argv[1])\n"
        "heavy = {'mindspore', 'mindone', 'transformers', 'huggingface_hub', 'torch', 'diffusers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    root = Path(models.__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code, str(checked_folder)]
    subprocess.run(command, env=environment, timeout=120, check=True)


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


def test_an_override_that_is_no_component(sd1_folder):
    with pytest.raises(TypeError, match="u_net is none of vae, text_encoder"):
        load_components(sd1_folder, overrides={"u_net": None})


# --- saving ----------------------------------------------------------------------------------------


def scheduler_pair():
    from mindiffedit.schedulers import DDIMInverseScheduler, DDIMScheduler

    options = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return DDIMScheduler(**options, clip_sample=False, steps_offset=1), DDIMInverseScheduler(**options)


@pytest.mark.parametrize("pipeline", ["StableDiffusionDiffEditPipeline", "StableDiffusionPipeline"])
@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_diffusers_loads_what_is_saved_here(
    layout, pipeline, checked, sd2, checked_folder, sd2_folder, tmp_path
):
    import diffusers

    parts, source = (checked, checked_folder) if layout == "sd1" else (sd2, sd2_folder)
    scheduler, inverse = scheduler_pair()
    folder = save_components(
        tmp_path / "new" / "saved",
        parts | {"scheduler": scheduler, "inverse_scheduler": inverse},
        class_name=pipeline,
    )
    assert folder == tmp_path / "new" / "saved"
    loaded = getattr(diffusers, pipeline).from_pretrained(str(folder), use_safetensors=True)
    assert (loaded.safety_checker is not None) == (layout == "sd1")
    assert loaded.config.requires_safety_checker is (layout == "sd1")
    for name, file in MODEL_FILES.items():
        model = getattr(loaded, name)
        if model is None:
            continue
        expected = read_tensors(source / file)
        state = {key: t.numpy() for key, t in model.state_dict().items()}
        assert set(state) == set(expected)
        for key, values in expected.items():
            np.testing.assert_array_equal(state[key], values, err_msg=key)
    assert type(loaded.scheduler).__name__ == "DDIMScheduler"
    assert (
        loaded.scheduler.config.beta_schedule == "scaled_linear" and loaded.scheduler.config.steps_offset == 1
    )
    assert loaded.tokenizer("a red apple").input_ids == parts["tokenizer"]("a red apple").input_ids
    if pipeline == "StableDiffusionDiffEditPipeline":
        assert type(loaded.inverse_scheduler).__name__ == "DDIMInverseScheduler"


@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_saved_files_are_those_of_diffusers(layout, checked, sd2, checked_folder, sd2_folder, tmp_path):
    """Configs key by key, weight files byte by byte."""
    parts, source = (checked, checked_folder) if layout == "sd1" else (sd2, sd2_folder)
    folder = save_components(tmp_path / "saved", parts, class_name="StableDiffusionPipeline")
    for path in source.rglob("*"):
        if path.suffix not in (".json", ".safetensors") or path.name == "special_tokens_map.json":
            continue
        other = folder / path.relative_to(source)
        if path.suffix == ".safetensors":
            assert other.read_bytes() == path.read_bytes(), path.name
            continue
        ours, theirs = json.loads(other.read_text()), json.loads(path.read_text())
        for content in (ours, theirs):
            # Our layout names the inverse scheduler, StableDiffusionPipeline an image encoder.
            for key in ("_diffusers_version", "inverse_scheduler", "image_encoder"):
                content.pop(key, None)
        assert ours == theirs, path.name


def test_round_trip_here(sd2, tmp_path):
    _, inverse = scheduler_pair()
    folder = save_components(tmp_path / "saved", sd2 | {"inverse_scheduler": inverse})
    again = load_components(folder)
    for name in ("vae", "unet", "text_encoder"):
        assert_same(again[name], parameters(sd2[name]))
        assert not any(
            key.startswith("_name") for key in json.loads((folder / name / "config.json").read_text())
        )
    assert type(again["inverse_scheduler"]) is type(inverse)
    for key, value in sd2["scheduler"].config.items():
        assert key.startswith("_") or again["scheduler"].config[key] == value, key
    assert again["requires_safety_checker"] is False


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_round_trip(sd1_folder, tmp_path, dtype):
    import torch
    from safetensors.torch import load_file

    parts = load_components(sd1_folder, dtype=dtype)
    folder = save_components(tmp_path / "saved", parts, variant="fp16")
    saved = load_file(folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    for name, values in load_file(sd1_folder / MODEL_FILES["unet"]).items():
        assert torch.equal(saved[name], values.to(getattr(torch, dtype))), name
    assert json.loads((folder / "text_encoder/config.json").read_text())["dtype"] == dtype
    again = load_components(folder, variant="fp16")
    assert_same(again["unet"], {name: values.float().numpy() for name, values in saved.items()})


def test_a_failing_save_leaves_nothing(sd2, tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            Path(folder, "half").write_text("x")
            raise RuntimeError("disk full")

    broken = sd2 | {"feature_extractor": Broken()}
    with pytest.raises(RuntimeError, match="disk full"):
        save_components(tmp_path / "saved", broken)
    assert list(tmp_path.iterdir()) == []

    folder = save_components(tmp_path / "saved", sd2)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(RuntimeError, match="disk full"):
        save_components(folder, broken)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_checkpoint_is_replaced_and_its_readme_kept(checked, sd2, tmp_path):
    folder = save_components(tmp_path / "saved", checked)
    (folder / "README.md").write_text("my notes")
    link = tmp_path / "link"
    link.symlink_to(folder)
    save_components(link, sd2)
    assert link.is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == ["link", "saved"]
    assert (folder / "README.md").read_text() == "my notes"
    assert not (folder / "safety_checker").exists()
    assert_same(load_components(link)["unet"], parameters(sd2["unet"]))


def test_what_is_no_checkpoint_is_never_overwritten(sd2, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"no checkpoint folder; it holds thesis.tex"):
        save_components(tmp_path, sd2)
    with pytest.raises(CheckpointError, match="is a file"):
        save_components(tmp_path / "thesis.tex", sd2)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    assert (save_components(tmp_path / "empty", sd2) / "model_index.json").is_file()


def test_saving_needs_all_required_components(sd2, tmp_path):
    with pytest.raises(CheckpointError, match="unet is None"):
        save_components(tmp_path / "saved", sd2 | {"unet": None})
    with pytest.raises(TypeError, match="u_net is none of"):
        save_components(tmp_path / "saved", sd2 | {"u_net": None})
    assert list(tmp_path.iterdir()) == []


# --- names: folders here ---------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    """Connections are refused and counted."""
    tried = []

    def refuse(*arguments, **_):
        tried.append(arguments)
        raise OSError("the test forbids connections")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


def test_a_folder_is_itself(sd1_folder, no_network, monkeypatch):
    assert resolve_folder(sd1_folder) == sd1_folder
    assert resolve_folder(str(sd1_folder), revision="main", token="x", force_download=True) == sd1_folder
    # A relative folder wins over a hub id of the same spelling.
    monkeypatch.chdir(sd1_folder.parent.parent)
    assert resolve_folder("/".join(sd1_folder.parts[-2:])).is_dir()
    assert no_network == []


@pytest.mark.parametrize(
    "name", ["./none", "../none/x", "/none/such", "~/none-such", "a/b/c", "a\\b", "-a/b.", "a b"]
)
def test_a_path_that_is_not_there_is_not_looked_up(name, no_network):
    with pytest.raises(CheckpointError, match="no such folder.*no hub id"):
        resolve_folder(name)
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_folder(Path("some") / "folder")
    assert no_network == []


def test_names_of_the_wrong_kind(tmp_path):
    for name in (None, 3, ["a/b"]):
        with pytest.raises(TypeError, match="expected a folder or a hub id"):
            resolve_folder(name)
    with pytest.raises(CheckpointError, match="empty name"):
        resolve_folder(" ")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is a file.*from_single_file"):
        resolve_folder(tmp_path / "model.ckpt")


# --- names: the hub's cache, offline ---------------------------------------------------------------


def make_cache(root, folder, repo="someone/tiny-model", skip=()):
    """The hub's cache as a download of `folder` leaves it; returns the snapshot folder."""
    home = root / ("models--" + repo.replace("/", "--"))
    snapshot = home / "snapshots" / COMMIT
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).parts[0] not in skip:
            target = snapshot / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return snapshot


def run_offline(tmp_path, code):
    """Run `code` in a fresh interpreter with HF_HUB_OFFLINE=1 and its own hub cache; returns its output."""
    environment = dict(os.environ, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    environment.pop("HF_HUB_CACHE", None)
    environment["PYTHONPATH"] = str(Path(models.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_offline_mode_with_nothing_cached(tmp_path):
    code = (
        "import socket, sys\n"
        "def refuse(*_): print('CONNECTED')\n"
        "socket.socket.connect = refuse\n"
        "from mindiffedit.models import CheckpointError, resolve_folder\n"
        "try: resolve_folder('someone/tiny-model')\n"
        "except CheckpointError as error: print(error)\n"
        "print('mindspore' in sys.modules, 'torch' in sys.modules)\n"
    )
    output = run_offline(tmp_path, code)
    assert "CONNECTED" not in output
    assert "someone/tiny-model is not a folder here" in output
    assert "offline mode is on. Go online once to download it, or give a checkpoint folder." in output
    # Nothing heavy is imported on the way to the message.
    assert output.splitlines()[-1] == "False False"


def test_offline_mode_with_a_cached_model(tmp_path, sd1_folder):
    snapshot = make_cache(tmp_path / "home" / "hub", sd1_folder)
    code = "from mindiffedit.models import resolve_folder\nprint(resolve_folder('someone/tiny-model'))"
    assert run_offline(tmp_path, code).strip() == str(snapshot)


def test_local_files_only(tmp_path, sd1_folder, sd2_folder, no_network):
    snapshot = make_cache(tmp_path, sd1_folder)
    options = dict(cache_dir=tmp_path, local_files_only=True)
    folder = resolve_folder("someone/tiny-model", **options)
    assert folder == snapshot and load_components(folder)["unet"] is not None
    assert resolve_folder("someone/tiny-model", revision=COMMIT, **options) == snapshot
    with pytest.raises(CheckpointError, match="at revision 'other', and offline mode is on"):
        resolve_folder("someone/tiny-model", revision="other", **options)
    with pytest.raises(CheckpointError, match="nobody/none is not a folder here"):
        resolve_folder("nobody/none", **options)

    make_cache(tmp_path, sd2_folder, repo="someone/half-a-model", skip=("unet",))
    with pytest.raises(CheckpointError, match="no safetensors weights for unet in the local cache"):
        resolve_folder("someone/half-a-model", **options)
    assert resolve_folder("someone/half-a-model", skip=["unet"], **options).is_dir()
    assert no_network == []


def test_a_cached_model_when_the_hub_does_not_answer(tmp_path, sd1_folder, no_network):
    snapshot = make_cache(tmp_path, sd1_folder)
    assert resolve_folder("someone/tiny-model", cache_dir=tmp_path) == snapshot
    with pytest.raises(CheckpointError, match="nobody/none is not a folder here.*hub could not be reached"):
        resolve_folder("nobody/none", cache_dir=tmp_path)
    assert no_network  # it was tried


# --- names: a hub of our own, on this machine ------------------------------------------------------


class Hub:
    """A small stand-in for the hub on 127.0.0.1: one repository, its listing and its files.

    `requests` holds (method, path, Authorization) of every request.
    """

    def __init__(self, folder):
        self.folder = folder
        self.status = {}
        self.requests = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self, code, body=b"", **headers):
                self.send_response(code)
                for key, value in headers.items():
                    self.send_header(key.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_GET(self):
                hub.requests.append((self.command, self.path, self.headers.get("Authorization")))
                parts = self.path.split("?")[0].strip("/").split("/")
                if parts[0] == "api":
                    repo, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
                else:
                    repo, revision = "/".join(parts[:2]), parts[3]
                code, name = hub.status.get(repo, (200, ""))
                if code == 500 or (code == 403 and parts[0] != "api"):  # a gated model's listing is public
                    return self.answer(code, b"{}", X_Error_Code=name, X_Error_Message="no")
                if repo != "someone/tiny-model" and repo not in hub.status:
                    return self.answer(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="no")
                if revision not in ("main", COMMIT):
                    return self.answer(404, b"{}", X_Error_Code="RevisionNotFound", X_Error_Message="no")
                if parts[0] == "api":
                    files = [
                        p.relative_to(hub.folder).as_posix() for p in hub.folder.rglob("*") if p.is_file()
                    ]
                    body = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": f} for f in sorted(files)]}
                    return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
                path = hub.folder.joinpath(*parts[4:])
                if not path.is_file():
                    return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Error_Message="no")
                body = path.read_bytes()
                tag = hashlib.sha256(body).hexdigest()
                return self.answer(200, body, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)

            do_HEAD = do_GET

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    @contextlib.contextmanager
    def serving(self):
        thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()
            thread.join()


@pytest.fixture
def hub(checked_folder, tmp_path, monkeypatch):
    """A hub whose repository has, beside what is needed, all that is not."""
    from huggingface_hub import constants, file_download

    folder = Path(shutil.copytree(checked_folder, tmp_path / "served"))
    for extra in (
        "README.md",
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_flax_model.msgpack",
        "unet/model.onnx",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "text_encoder/pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ):
        (folder / extra).write_bytes(b"not to be fetched unless asked for")
    server = Hub(folder)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with server.serving():
        yield server


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_download_takes_what_is_needed_and_no_more(hub, checked_folder, tmp_path):
    cache = tmp_path / "cache"
    folder = resolve_folder("someone/tiny-model", cache_dir=cache, token="hf_secret")
    assert files_of(folder) == files_of(checked_folder)
    assert {authorization for _, _, authorization in hub.requests} == {"Bearer hf_secret"}
    assert load_components(folder)["safety_checker"] is not None

    # Again: from the cache; only the state of the branch is asked for.
    hub.requests.clear()
    assert resolve_folder("someone/tiny-model", cache_dir=cache) == folder
    assert all("/resolve/" not in path for _, path, _ in hub.requests)
    hub.requests.clear()
    assert resolve_folder("someone/tiny-model", cache_dir=cache, local_files_only=True) == folder
    assert hub.requests == []
    hub.requests.clear()
    resolve_folder("someone/tiny-model", cache_dir=cache, force_download=True)
    assert any(path.endswith("unet/diffusion_pytorch_model.safetensors") for _, path, _ in hub.requests)


def test_components_that_are_not_wanted_are_not_downloaded(hub, checked_folder, tmp_path):
    folder = resolve_folder("someone/tiny-model", cache_dir=tmp_path / "cache", skip={"safety_checker": None})
    assert files_of(checked_folder) - files_of(folder) == {MODEL_FILES["safety_checker"]}


def test_a_variant_and_the_plain_file_where_there_is_none(hub, tmp_path):
    folder = resolve_folder("someone/tiny-model", cache_dir=tmp_path / "cache", variant="fp16")
    weights = {name for name in files_of(folder) if name.endswith(".safetensors")}
    assert weights == {
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        MODEL_FILES["text_encoder"],
        MODEL_FILES["safety_checker"],
    }


def test_what_the_hub_refuses_becomes_one_sentence(hub, tmp_path):
    cache = tmp_path / "cache"
    hub.status |= {"someone/gated": (403, "GatedRepo"), "someone/broken": (500, "")}
    for name, options, message in (
        ("someone/none", {}, "someone/none is not a folder here.*no such repository, or a private one"),
        ("someone/tiny-model", {"revision": "v9"}, "no revision 'v9'"),
        ("someone/gated", {}, "restricted: accept the model's terms"),
        ("someone/broken", {}, "someone/broken is not a folder here"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            resolve_folder(name, cache_dir=cache, **options)
        assert "\n" not in str(caught.value)


def test_a_repository_of_another_kind_costs_no_download(hub, tmp_path):
    change_json(
        hub.folder / "model_index.json", text_encoder_2=["transformers", "CLIPTextModelWithProjection"]
    )
    with pytest.raises(CheckpointError, match="Stable Diffusion XL"):
        resolve_folder("someone/tiny-model", cache_dir=tmp_path / "one")
    assert not any(".safetensors" in path for _, path, _ in hub.requests)
    (hub.folder / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match="has no model_index.json"):
        resolve_folder("someone/tiny-model", cache_dir=tmp_path / "two")
    assert not any(".safetensors" in path for _, path, _ in hub.requests)


def test_a_repository_with_pickles_only(hub, tmp_path):
    (hub.folder / MODEL_FILES["unet"]).unlink()
    with pytest.raises(CheckpointError, match="no safetensors weights for unet in what the hub gave.*Pickle"):
        resolve_folder("someone/tiny-model", cache_dir=tmp_path / "cache")
    assert not any(path.endswith(".bin") for _, path, _ in hub.requests)
