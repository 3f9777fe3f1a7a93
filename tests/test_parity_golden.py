"""The golden file: what comes back, and that whatever was changed or cut off is refused by name."""

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


def refused(function, *args, error=ValueError, **kwargs):
    """The one-sentence message of the exact exception type that the call raises."""
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    assert caught.type is (InputError if error is ValueError else error)
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


def edit_document(metadata, change, seal=False):
    """Change the manifest in the metadata; `seal` makes its hash right again."""
    document = json.loads(metadata["manifest"])
    change(document)
    metadata["manifest"] = golden._canonical(document)
    if seal:
        metadata["manifest_sha256"] = golden._hash_text(metadata["manifest"])


# --- there and back --------------------------------------------------------------------------------


def test_there_and_back(path):
    found = golden.read_golden(path)
    expected = a_trace()
    assert list(found.trace) == [name for name in expected if name != "input/picture"]
    assert list(found.inputs) == ["picture"]
    for name, array in {**found.trace, "input/picture": found.inputs["picture"]}.items():
        assert array.dtype == expected[name].dtype and array.shape == expected[name].shape
        np.testing.assert_array_equal(array, expected[name])
    assert found.manifest == MANIFEST
    assert found.sha256 == json_metadata(path)["manifest_sha256"]


def json_metadata(path):
    with safe_open(str(path), framework="numpy") as file:
        return file.metadata()


def test_the_same_recording_has_the_same_hash_and_another_has_another(path, tmp_path):
    other = tmp_path / "other.safetensors"
    golden.write_golden(other, a_trace(), dict(reversed(list(MANIFEST.items()))))
    assert golden.read_golden(other).sha256 == golden.read_golden(path).sha256
    trace = a_trace()
    trace["mask/moments"][0, 0, 0, 0] += 1e-6
    golden.write_golden(other, trace, MANIFEST)
    assert golden.read_golden(other).sha256 != golden.read_golden(path).sha256


def test_arrays_of_other_layouts_and_numpy_in_the_manifest(tmp_path):
    path = tmp_path / "golden.safetensors"
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    trace = {"mask/turned": values.T, "mask/big_endian": values.astype(">f4"), "mask/part": values[:, ::2]}
    manifest = {
        "steps": np.int64(3),
        "floor": np.float32(0.5),
        "floors": np.arange(2),
        "folder": tmp_path,
        "t": (1,),
    }
    golden.write_golden(path, trace, manifest)
    found = golden.read_golden(path)
    for name, array in trace.items():
        np.testing.assert_array_equal(found.trace[name], array)
    assert found.manifest == {"steps": 3, "floor": 0.5, "floors": [0, 1], "folder": str(tmp_path), "t": [1]}


# --- what is not written ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trace, words",
    [
        ({}, "at least one stage"),
        ({"input/picture": np.ones(2)}, "at least one stage"),
        ({"": np.ones(2)}, "''"),
        ({"__metadata__": np.ones(2)}, "__metadata__"),
        ({3: np.ones(2)}, "3"),
        ({"mask/map": np.ones(2, complex)}, "complex128"),
        ({"mask/map": np.array(["x"])}, "mask/map"),
        ({"mask/map": np.array([None])}, "object"),
        ({"mask/map": np.ones((0, 3))}, "(0, 3)"),
    ],
)
def test_traces_that_are_not_written(tmp_path, trace, words):
    path = tmp_path / "golden.safetensors"
    assert words in refused(golden.write_golden, path, trace, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reference_that_is_not_finite_is_not_written(tmp_path, bad):
    trace = a_trace()
    trace["mask/moments"][0, 1, 1, 1] = bad
    message = refused(golden.write_golden, tmp_path / "golden.safetensors", trace, {}, error=NumericalError)
    assert message.startswith("mask/moments: 1 of 24")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("bad", [math.nan, np.float32("inf"), object(), {1, 2}, {1: 0, "a": 0}])
def test_manifests_that_are_not_written(path, bad):
    before = path.read_bytes()
    assert "JSON" in refused(golden.write_golden, path, a_trace(), {"floors": bad})
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_a_failure_while_writing_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()

    def breaks(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(golden, "save_file", breaks)
    with pytest.raises(OSError):
        golden.write_golden(path, a_trace(), {})
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


# --- what is not read ------------------------------------------------------------------------------


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        message = refused(golden.read_golden, path)
        assert str(path) in message and "parity record" in message


@pytest.mark.parametrize("content", [b"", b"abc", b"a text that is no safetensors file\n" * 20, b"\x00" * 64])
def test_no_safetensors_file(path, content):
    path.write_bytes(content)
    message = refused(golden.read_golden, path)
    assert str(path) in message and "whole safetensors" in message


def test_a_file_that_was_cut_off_anywhere_or_made_longer(path):
    whole = path.read_bytes()
    for length in (4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "whole safetensors" in refused(golden.read_golden, path)
    path.write_bytes(whole + b"\0")
    assert "whole safetensors" in refused(golden.read_golden, path)
    path.write_bytes(whole)
    golden.read_golden(path)


def test_another_format(path):
    rewrite(path, lambda metadata: metadata.update(format="mindiffedit-latents"))
    assert "was not written by" in refused(golden.read_golden, path)
    save_file({"x": np.ones(2)}, str(path))
    assert "was not written by" in refused(golden.read_golden, path)


@pytest.mark.parametrize("version, remedy", [("2", "update"), ("10", "update"), ("0", "record"), ("x", "record")])
def test_another_version(path, version, remedy):
    rewrite(path, lambda metadata: metadata.update(format_version=version))
    message = refused(golden.read_golden, path)
    assert f"version {version}" in message and "reads version 1" in message
    assert message.partition("; ")[2].startswith(remedy)
    rewrite(path, lambda metadata: metadata.pop("format_version"))
    assert "version None" in refused(golden.read_golden, path)


@pytest.mark.parametrize("text", ["", "{", "not JSON", '{"a": NaN}'])
def test_a_manifest_that_is_not_json(path, text):
    rewrite(path, lambda metadata: metadata.update(manifest=text))
    assert "not JSON" in refused(golden.read_golden, path)
    rewrite(path, lambda metadata: metadata.pop("manifest"))
    assert "not JSON" in refused(golden.read_golden, path)


def test_a_manifest_that_was_changed(path):
    def fewer_steps(document):
        document["manifest"]["arguments"]["steps"] = 2

    whole = path.read_bytes()
    rewrite(path, lambda metadata: edit_document(metadata, fewer_steps))
    assert "manifest was changed" in refused(golden.read_golden, path)
    path.write_bytes(whole)
    rewrite(path, lambda metadata: metadata.update(manifest_sha256="0" * 64))
    assert "manifest was changed" in refused(golden.read_golden, path)
    rewrite(path, lambda metadata: metadata.pop("manifest_sha256"))
    assert "manifest was changed" in refused(golden.read_golden, path)


def test_one_byte_of_the_manifest(path):
    whole = path.read_bytes()
    at = whole.index(b"2.13.0")
    path.write_bytes(whole[:at] + b"2.14.0" + whole[at + 6 :])
    assert "manifest was changed" in refused(golden.read_golden, path)


def test_another_spelling_of_the_same_manifest_is_the_same(path):
    def spaced(metadata):
        metadata["manifest"] = json.dumps(json.loads(metadata["manifest"]), indent=3)

    digest = golden.read_golden(path).sha256
    rewrite(path, spaced)
    assert golden.read_golden(path).sha256 == digest


@pytest.mark.parametrize("name", sorted(a_trace()))
def test_one_bit_of_any_tensor_is_named(path, name):
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    begin, end = json.loads(whole[8:start])[name]["data_offsets"]
    at = start + (begin + end) // 2
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert f"the tensor {name} was changed" in refused(golden.read_golden, path)


def test_missing_and_extra_tensors(path):
    whole = path.read_bytes()
    rewrite(path, change_tensors=lambda tensors: tensors.pop("mask/moments"))
    assert "lacks the tensor mask/moments" in refused(golden.read_golden, path)
    path.write_bytes(whole)
    rewrite(path, change_tensors=lambda tensors: tensors.update({"edit/b": np.ones(2), "edit/c": np.ones(2)}))
    assert "edit/b (and 1 more)" in refused(golden.read_golden, path)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda array: array.reshape(-1), ["F32 of shape [24]", "F32 of shape [1, 4, 2, 3]"]),
        (lambda array: array.view(np.int32), ["I32", "F32"]),
    ],
)
def test_another_shape_or_dtype_of_the_same_bytes(path, change, words):
    def changed(tensors):
        tensors["mask/moments"] = change(tensors["mask/moments"])

    rewrite(path, change_tensors=changed)
    message = refused(golden.read_golden, path)
    assert "mask/moments" in message and all(word in message for word in words)


def test_half_precision_that_became_another_half(path):
    """NumPy has no bfloat16; the dtype is judged before the tensor is read."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length].replace(b'"F16"', b'"BF16"')
    assert len(header) == length + 1
    path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
    assert "mask/half is BF16" in refused(golden.read_golden, path)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.pop("tensors"),
        lambda document: document.pop("manifest"),
        lambda document: document.update(tensors={}),
        lambda document: document.update(manifest=[]),
        lambda document: document["tensors"].append(3),
        lambda document: document["tensors"].append(document["tensors"][0]),
        lambda document: document["tensors"][0].pop("sha256"),
        lambda document: document["tensors"][0].update(dtype="bfloat16"),
        lambda document: document["tensors"][0].update(name=None),
        lambda document: document["tensors"][0].update(shape="1"),
    ],
)
def test_a_sealed_manifest_of_another_make(path, change):
    rewrite(path, lambda metadata: edit_document(metadata, change, seal=True))
    assert "does not list its tensors" in refused(golden.read_golden, path)


def test_every_refusal_names_the_file(path):
    rewrite(path, lambda metadata: edit_document(metadata, lambda document: document.clear()))
    assert str(path) in refused(golden.read_golden, path)


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
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors": os.urandom(3 * golden._BLOCK // 2),
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
    assert list(golden.hash_files(model)) == [
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
    assert list(golden.hash_files(model, components=("safety_checker",))) == ["safety_checker/model.safetensors"]
    assert list(golden.hash_files(model, components=["vae"], patterns=["*.safetensors"])) == [
        "vae/diffusion_pytorch_model.safetensors"
    ]


def test_hashes_are_those_of_the_bytes(model):
    import hashlib

    name = "unet/diffusion_pytorch_model-00001-of-00002.safetensors"  # larger than one block
    assert golden.hash_files(model)[name] == hashlib.sha256((model / name).read_bytes()).hexdigest()


def test_the_same_model_elsewhere_with_more_files_and_links(model, tmp_path):
    expected = golden.hash_files(model)
    golden.check_files(model, expected)
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    (copy / "unet" / "more.safetensors").write_bytes(b"x")
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "blob")  # as the hub's cache keeps them
    weights.symlink_to(tmp_path / "blob")
    golden.check_files(copy, expected)


def test_saving_a_config_anew_does_not_matter(model):
    expected = golden.hash_files(model)
    config = model / "text_encoder" / "config.json"
    config.write_text('{"transformers_version": "5.0", "torch_dtype": "float32",\n  "layers": 2, "_name": "x"}')
    golden.check_files(model, expected)
    config.write_text('{"layers": 3}')
    message = refused(golden.check_files, model, expected)
    assert "other settings" in message and "text_encoder/config.json differs" in message
    assert str(model) in message


def test_other_settings_that_are_infinite(model):
    expected = golden.hash_files(model)
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text('{"steps": 9, "lambda_min_clipped": -5.1}')
    assert "other settings" in refused(golden.check_files, model, expected)


def test_other_weights(model):
    expected = golden.hash_files(model)
    weights = model / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # in the last block
    weights.write_bytes(content)
    (model / "unet" / "config.json").write_text("[]")  # weights come first
    message = refused(golden.check_files, model, expected)
    assert "other weights" in message and f"{weights.name} differs" in message and "config" not in message


@pytest.mark.parametrize("name, content", [("vocab.json", b'{"a":0,"b":1}'), ("merges.txt", b"a b")])
def test_another_vocabulary_byte_by_byte(model, name, content):
    expected = golden.hash_files(model)
    (model / "tokenizer" / name).write_bytes(content)
    message = refused(golden.check_files, model, expected)
    assert "another vocabulary" in message and f"tokenizer/{name} differs" in message


def test_another_model_folder(model, tmp_path):
    expected = golden.hash_files(model)
    shutil.rmtree(model / "unet")
    message = refused(golden.check_files, model, expected)
    assert "another model folder" in message and "3 of its 11 files" in message and "unet/config.json" in message
    message = refused(golden.check_files, tmp_path, expected)
    assert "11 of its 11" in message and "and 8 more" in message
    assert "no checkpoint folder" in refused(golden.check_files, tmp_path / "nothing", expected)
    assert "no file" in refused(golden.check_files, model, {})


def test_folders_that_cannot_be_hashed(model, tmp_path):
    assert "no checkpoint folder" in refused(golden.hash_files, tmp_path / "nothing")
    assert "it has no scheduler" in refused(golden.hash_files, tmp_path)
    (model / "vae" / "diffusion_pytorch_model.safetensors").rename(model / "vae" / "model.bin")
    assert "no weights of the vae" in refused(golden.hash_files, model)
    (model / "vae" / "config.json").write_text("{")
    expected = {"vae/config.json": "0"}
    assert str(model / "vae" / "config.json") in refused(golden.check_files, model, expected)


def test_the_demo_checkpoint_is_one():
    folder = demo.checkpoint_folder()
    hashes = golden.hash_files(folder)
    assert {name.split("/")[0] for name in hashes} == set(golden.COMPONENTS)
    golden.check_files(folder, hashes)


# --- arguments -------------------------------------------------------------------------------------

RECORDED = {
    "steps": 10,
    "guidance": 7.5,
    "source": "a bowl",
    "size": [64, 80],
    "mask_strength": 0.5,
    "seed": None,
}


def test_arguments_that_agree():
    golden.check_arguments(RECORDED, {})
    golden.check_arguments(RECORDED, {"steps": None, "unknown": None})
    golden.check_arguments(RECORDED, dict(RECORDED))
    golden.check_arguments(RECORDED, {"steps": np.int64(10), "guidance": 7.5, "size": (64, 80)})
    golden.check_arguments({"steps": 10.0}, {"steps": 10})


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"steps": 20}, "recorded with --steps 10, but --steps is 20; leave it out or record anew."),
        (
            {"mask_strength": 0.25},
            "recorded with --mask-strength 0.5, but --mask-strength is 0.25; leave it out",
        ),
        ({"source": "a cup"}, 'recorded with --source "a bowl", but --source is "a cup"; leave it out'),
        ({"seed": 0}, "recorded with no --seed, but --seed is 0; leave it out"),
        ({"new": 1}, "recorded with no --new, but --new is 1; leave it out"),
        ({"size": (64, 64)}, "recorded with --size [64, 80], but --size is (64, 64); leave it out"),
        (
            {"steps": 20, "guidance": 7.5, "source": ""},
            'with --steps 10 and --source "a bowl", but --steps is 20 and --source is ""; leave them out',
        ),
    ],
)
def test_arguments_that_differ(given, expected):
    assert expected in refused(golden.check_arguments, RECORDED, given)


def test_a_boolean_is_not_the_number_it_equals():
    refused(golden.check_arguments, {"steps": 1}, {"steps": True})
    refused(golden.check_arguments, {"guided": False}, {"guided": 0})
    golden.check_arguments({"guided": False}, {"guided": False})


def test_a_golden_file_can_be_read_by_others(tmp_path):
    """As any new file: the library that writes the tensors makes files for their owner alone."""
    plain = tmp_path / "plain"
    plain.touch()
    golden.write_golden(tmp_path / "golden.safetensors", a_trace(), MANIFEST)
    assert (tmp_path / "golden.safetensors").stat().st_mode == plain.stat().st_mode
