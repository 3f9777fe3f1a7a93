"""The golden file: what comes back, and that whatever was changed or cut off is refused by name."""

import hashlib
import json
import math
import os
import shutil

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from mindiffedit import demo
from mindiffedit.errors import InputError
from mindiffedit.options import NumericalError
from mindiffedit.parity import golden


def refused(function, *args, error=InputError):
    """The one-sentence message of the exact exception type that the call raises."""
    with pytest.raises(error) as caught:
        function(*args)
    assert caught.type is error
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def a_trace():
    """Names whose order is neither alphabetical nor by dtype, and every dtype that a run gives."""
    rng = np.random.default_rng(0)
    return {
        "mask/target_token_ids": np.arange(5, dtype=np.int64)[None],
        "input/picture": rng.integers(0, 256, (4, 6, 3), dtype=np.uint8),
        "mask/moments": rng.standard_normal((1, 4, 2, 3)).astype(np.float32),
        "mask/clamp_magnitude": np.array(0.75, np.float32),
        "mask/half": rng.standard_normal((2, 3)).astype(np.float16),
        "invert/inverted_latents": rng.standard_normal((3, 1, 4, 2, 3)).astype(np.float32),
        "edit/flag": np.array([True, False]),
        "edit/a": np.array([1.5], np.float64),
    }


MANIFEST = {
    "arguments": {"steps": 3, "guidance": 7.5, "source": "a bowl – “so”", "seed": None},
    "floors": {"invert/inverted_latents": [1e-7, 2e-7, 3e-7]},
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "golden.safetensors"
    golden.write_golden(path, a_trace(), MANIFEST)
    return path


def rewrite(path, change_metadata=None, change_tensors=None):
    """Write the file again as someone would who does not know of the hashes."""
    with safe_open(str(path), framework="numpy") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    if change_metadata is not None:
        change_metadata(metadata)
    if change_tensors is not None:
        change_tensors(tensors)
    save_file(tensors, str(path), metadata=metadata)


# --- there and back --------------------------------------------------------------------------------


def test_there_and_back(path, tmp_path):
    found, expected = golden.read_golden(path), a_trace()
    assert list(found.trace) == [name for name in expected if name != "input/picture"]
    assert list(found.inputs) == ["picture"] and found.manifest == MANIFEST
    for name, array in {**found.trace, "input/picture": found.inputs["picture"]}.items():
        assert array.dtype == expected[name].dtype and array.shape == expected[name].shape
        np.testing.assert_array_equal(array, expected[name])
    plain = tmp_path / "plain"  # others may read the file as they may any new one
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_arrays_of_other_layouts(tmp_path):
    path = tmp_path / "golden.safetensors"
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    trace = {"mask/turned": values.T, "mask/big_endian": values.astype(">f4"), "mask/part": values[:, ::2]}
    golden.write_golden(path, trace, {})
    for name, array in golden.read_golden(path).trace.items():
        np.testing.assert_array_equal(array, trace[name])


def test_what_is_not_written(path, monkeypatch):
    """NaN in the reference or in the manifest, and a disk that is full: the old file stays."""
    before = path.read_bytes()
    for bad in (math.nan, math.inf):
        trace = a_trace()
        trace["mask/moments"][0, 1, 1, 1] = bad
        message = refused(golden.write_golden, path, trace, {}, error=NumericalError)
        assert message.startswith("mask/moments: 1 of 24")
    with pytest.raises(ValueError):
        golden.write_golden(path, a_trace(), {"floors": math.nan})

    def breaks(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(golden, "save_file", breaks)
    with pytest.raises(OSError):
        golden.write_golden(path, a_trace(), {})
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


# --- what is not read ------------------------------------------------------------------------------


def test_no_golden_file(tmp_path):
    path = tmp_path / "golden.safetensors"
    for missing in (path, tmp_path):
        message = refused(golden.read_golden, missing)
        assert str(missing) in message and "parity record" in message
    for content in (b"", b"abc", b"a text that is no safetensors file\n" * 20, b"\x00" * 64):
        path.write_bytes(content)
        message = refused(golden.read_golden, path)
        assert str(path) in message and "whole safetensors" in message
    save_file({"x": np.ones(2)}, str(path))
    assert "was not written by" in refused(golden.read_golden, path)


def test_a_file_that_was_cut_off_anywhere_or_made_longer(path):
    whole = path.read_bytes()
    for length in (4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "whole safetensors" in refused(golden.read_golden, path)
    path.write_bytes(whole + b"\0")
    assert "whole safetensors" in refused(golden.read_golden, path)
    path.write_bytes(whole)
    golden.read_golden(path)


def test_what_the_metadata_says_is_checked(path):
    def fewer_steps(metadata):
        document = json.loads(metadata["manifest"])
        document["manifest"]["arguments"]["steps"] = 2
        metadata["manifest"] = json.dumps(document)

    whole = path.read_bytes()
    for change, words in (
        (lambda metadata: metadata.update(format="mindiffedit-latents"), "was not written by"),
        (lambda metadata: metadata.update(format_version="2"), "version 2, this program reads version 1; update"),
        (lambda metadata: metadata.pop("format_version"), "version None"),
        (fewer_steps, "manifest was changed"),
        (lambda metadata: metadata.update(manifest="{"), "manifest was changed"),
        (lambda metadata: metadata.pop("manifest"), "manifest was changed"),
        (lambda metadata: metadata.update(manifest_sha256="0" * 64), "manifest was changed"),
        (lambda metadata: metadata.pop("manifest_sha256"), "manifest was changed"),
    ):
        path.write_bytes(whole)
        rewrite(path, change)
        message = refused(golden.read_golden, path)
        assert words in message and str(path) in message
    at = whole.index(b"2.13.0")
    path.write_bytes(whole[:at] + b"2.14.0" + whole[at + 6 :])
    assert "manifest was changed" in refused(golden.read_golden, path)


def test_one_bit_of_any_tensor_is_named(path):
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for name in a_trace():
        begin, end = json.loads(whole[8:start])[name]["data_offsets"]
        at = start + (begin + end) // 2
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert f"the tensor {name} was changed" in refused(golden.read_golden, path)


def test_other_tensors_than_those_of_the_manifest(path):
    def reshaped(tensors):
        tensors["mask/moments"] = tensors["mask/moments"].reshape(-1)

    def of_another_dtype(tensors):
        tensors["mask/moments"] = tensors["mask/moments"].view(np.int32)

    whole = path.read_bytes()
    for change, words in (
        (lambda tensors: tensors.pop("mask/moments"), "has not the tensors that its manifest lists"),
        (lambda tensors: tensors.update({"edit/b": np.ones(2)}), "has not the tensors that its manifest lists"),
        (reshaped, "the tensor mask/moments was changed"),
        (of_another_dtype, "the tensor mask/moments was changed"),
    ):
        path.write_bytes(whole)
        rewrite(path, change_tensors=change)
        assert words in refused(golden.read_golden, path)


# --- the model's files -----------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    """A small folder in diffusers' layout, with what does not count in it too."""
    folder = tmp_path / "model"
    files = {
        "model_index.json": b"{}",
        "README.md": b"x",
        "scheduler/scheduler_config.json": b'{"steps": 9, "lambda_min_clipped": -Infinity, "_version": "1"}',
        "text_encoder/config.json": b'{"layers": 2, "transformers_version": "4.57.1", "dtype": "float16"}',
        "text_encoder/model.safetensors": os.urandom(100),
        "tokenizer/vocab.json": b'{"a": 0, "b": 1}',
        "tokenizer/merges.txt": b"a b\n",
        "tokenizer/tokenizer_config.json": b"{}",
        "unet/config.json": b'{"blocks": [1, 2]}',
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors": os.urandom(3 * 2**19),
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors": os.urandom(10),
        "unet/diffusion_pytorch_model.bin": b"pickle",
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.safetensors": os.urandom(10),
        "safety_checker/model.safetensors": os.urandom(10),
    }
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder


def test_which_files_are_hashed(model):
    hashes = golden.hash_files(model)
    assert list(hashes) == [
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    large = "unet/diffusion_pytorch_model-00001-of-00002.safetensors"
    assert hashes[large] == hashlib.sha256((model / large).read_bytes()).hexdigest()


def test_the_same_model_elsewhere_with_more_files_and_links(model, tmp_path):
    expected = golden.hash_files(model)
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    (copy / "unet" / "more.safetensors").write_bytes(b"x")
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "blob")  # as the hub's cache keeps them
    weights.symlink_to(tmp_path / "blob")
    (copy / "text_encoder" / "config.json").write_text(  # saved anew
        '{"transformers_version": "5.0", "torch_dtype": "float32",\n  "layers": 2, "_name": "x"}'
    )
    golden.check_files(copy, expected)


def test_other_models(model, tmp_path):
    expected = golden.hash_files(model)
    large = "unet/diffusion_pytorch_model-00001-of-00002.safetensors"
    weights = bytearray((model / large).read_bytes())
    weights[-1] ^= 1
    for name, content, words in (
        ("text_encoder/config.json", b'{"layers": 3}', "other settings"),
        ("scheduler/scheduler_config.json", b'{"steps": 9, "lambda_min_clipped": -5.1}', "other settings"),
        ("tokenizer/merges.txt", b"a b", "another vocabulary"),
        (large, weights, "other weights"),
    ):
        before = (model / name).read_bytes()
        (model / name).write_bytes(content)
        message = refused(golden.check_files, model, expected)
        assert words in message and f"{name} differs" in message and str(model) in message
        (model / name).write_bytes(before)
    (model / "unet" / "config.json").write_text("[]")  # weights come first
    (model / large).write_bytes(weights)
    assert f"other weights than the recorded model: {large} differs" in refused(golden.check_files, model, expected)
    shutil.rmtree(model / "unet")
    message = refused(golden.check_files, model, expected)
    assert "another model folder" in message and "3 of its 11 files" in message and "unet/config.json" in message
    message = refused(golden.check_files, tmp_path, expected)
    assert "11 of its 11" in message and "and 8 more" in message


def test_folders_that_cannot_be_hashed(model, tmp_path):
    assert "has no configuration of the scheduler" in refused(golden.hash_files, tmp_path)
    (model / "vae" / "diffusion_pytorch_model.safetensors").rename(model / "vae" / "model.bin")
    assert "no weights as safetensors of the vae" in refused(golden.hash_files, model)
    (model / "vae" / "config.json").write_text("{")
    message = refused(golden.check_files, model, {"vae/config.json": "0"})
    assert f"{model / 'vae' / 'config.json'} is not JSON" in message


def test_the_demo_checkpoint_is_one():
    folder = demo.checkpoint_folder()
    hashes = golden.hash_files(folder)
    assert {name.split("/")[0] for name in hashes} == set(golden.COMPONENTS)
    golden.check_files(folder, hashes)


# --- arguments -------------------------------------------------------------------------------------

RECORDED = {"steps": 10, "guidance": 7.5, "source": "a bowl", "size": [64, 80], "mask_strength": 0.5, "seed": None}


def test_arguments_that_agree():
    for given in ({}, {"steps": None}, RECORDED, {"steps": 10.0, "size": [64, 80]}):
        golden.check_arguments(RECORDED, given)


def test_arguments_that_differ():
    for given, expected in (
        ({"steps": 20}, "recorded with --steps 10, but --steps is 20; leave it out or record anew."),
        ({"mask_strength": 0.25}, "recorded with --mask-strength 0.5, but --mask-strength is 0.25; leave it out"),
        ({"source": "a cup"}, 'recorded with --source "a bowl", but --source is "a cup"; leave it out'),
        ({"seed": 0}, "recorded with no --seed, but --seed is 0; leave it out"),
        (
            {"steps": 20, "guidance": 7.5, "source": ""},
            'with --steps 10 and --source "a bowl", but --steps is 20 and --source is ""; leave them out',
        ),
    ):
        assert expected in refused(golden.check_arguments, RECORDED, given)
