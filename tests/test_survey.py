"""Folders that cannot be used: what is wrong is found before a model is built, and by a check without MindSpore."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_files import MODEL_FILES, change_json

import mindiffedit
from mindiffedit.checkpoints import models
from mindiffedit.checkpoints.layout import CheckpointError
from mindiffedit.checkpoints.models import load_components
from mindiffedit.checkpoints.survey import check_folder


@pytest.fixture
def no_building(monkeypatch):
    """Building a model is an error: what is wrong must have been found before."""

    def refuse(*_):
        raise AssertionError("a model was built")

    monkeypatch.setattr(models, "_construct", refuse)


def refusal(folder, match):
    """What is said of a folder that cannot be used, by loading it and, word for word, by checking it."""
    with pytest.raises(CheckpointError, match=match) as loading:
        load_components(folder)
    with pytest.raises(CheckpointError) as checking:
        check_folder(folder)
    assert str(checking.value) == str(loading.value)
    return str(loading.value)


# --- damaged files ---------------------------------------------------------------------------------


def with_header(size, **entries):
    header = json.dumps(
        {name: {"dtype": "F32", "shape": [n], "data_offsets": at} for name, (n, at) in entries.items()}
    ).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * size


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3438167540\n"
DAMAGES = [
    (lambda content: b"", "is empty"),
    (lambda content: b"ab", "not a safetensors file"),
    (lambda content: b"PK\x03\x04" + b"x" * 500, "not a safetensors file"),
    (lambda content: b"{" + b" " * 500, "not a safetensors file"),
    (lambda content: POINTER, "git lfs pull"),
    (lambda content: content[:-100], "is truncated"),
    (lambda content: content[:200], "is truncated"),
    (lambda content: content + b"\0" * 8, "is corrupt"),
    (lambda content: content[:40] + b"\xff\xfe{" + content[43:], "corrupt header"),
    (lambda content: with_header(12, a=(2, [0, 8]), b=(2, [4, 12])), "corrupt header.*place of b is wrong"),
    (lambda content: with_header(8, a=(3, [0, 8])), "corrupt header.*size of a is wrong"),
]


@pytest.mark.parametrize("name", ["vae", "unet", "text_encoder"])
def test_damaged_weights(copy, no_building, name):
    path = copy / MODEL_FILES[name]
    content = path.read_bytes()
    for damage, message in DAMAGES:
        path.write_bytes(damage(content))
        said = refusal(copy, message)
        assert str(path) in said and "gain" in said


def test_pickle_weights_are_never_read(copy, no_building):
    path = copy / MODEL_FILES["unet"]
    for ending in ("bin", "ckpt", "pt"):
        path = path.rename(path.parent / f"diffusion_pytorch_model.{ending}")
        refusal(copy, rf"unet holds only pickle.*\.{ending}.*safe_serialization")
    with pytest.raises(ValueError, match="use_safetensors.*can run code"):
        mindiffedit.StableDiffusionDiffEditPipeline.from_pretrained(copy, use_safetensors=False)


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
def test_damaged_json(copy, no_building, file):
    for content in ("", "{", "[1]", "\xff"):
        (copy / file).write_bytes(content.encode("latin-1"))
        assert str(copy / file) in refusal(copy, "JSON")


def test_an_incomplete_and_a_damaged_tokenizer(copy, no_building):
    for file in ("vocab.json", "merges.txt"):
        content = (copy / "tokenizer" / file).read_bytes()
        (copy / "tokenizer" / file).unlink()
        refusal(copy, f"lacks {file}")
        (copy / "tokenizer" / file).write_bytes(content)
    (copy / "tokenizer/vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer cannot be read"):
        load_components(copy)
    check_folder(copy)  # that is for transformers to find out


def test_config_that_builds_no_model(copy):
    change_json(copy / "unet/config.json", down_block_types=["NoSuchBlock", "DownBlock2D"])
    with pytest.raises(CheckpointError, match=r"unet/config.json: no UNet2DConditionModel can be built.*NoSuchBlock"):
        load_components(copy)


# --- other kinds of checkpoints --------------------------------------------------------------------


def test_missing_folder_and_folder_without_index(tmp_path):
    refusal(tmp_path / "none", "is not a folder")
    (tmp_path / "notes.txt").write_text("x")
    refusal(tmp_path, r"no model_index.json.*holds notes.txt")


OTHER_CLASSES = [
    ({"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}, "Stable Diffusion XL"),
    ({"transformer": ["diffusers", "SD3Transformer2DModel"]}, "diffusion transformer"),
    ({"unet": ["diffusers", "UNet3DConditionModel"]}, "unet is a UNet3DConditionModel, expected UNet2D"),
    ({"vae": ["diffusers", "AutoencoderTiny"]}, "vae is a AutoencoderTiny, expected AutoencoderKL"),
    ({"text_encoder": ["transformers", "T5EncoderModel"]}, "expected CLIPTextModel"),
    ({"tokenizer": ["transformers", "T5Tokenizer"]}, "expected CLIPTokenizer or CLIPTokenizerFast"),
    ({"unet": "UNet2DConditionModel"}, r"unet: expected \[library, class\]"),
    ({"unet": ["diffusers"]}, r"unet: expected \[library, class\]"),
]
OTHER_CLASSES += [
    ({name: entry}, rf"\(StableDiffusionPipeline\) has no {name}; .* lists ")
    for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    for entry in (None, [None, None])
]


def test_other_classes(copy, no_building):
    index = (copy / "model_index.json").read_bytes()
    for changes, message in OTHER_CLASSES:
        change_json(copy / "model_index.json", **changes)
        refusal(copy, message)
        (copy / "model_index.json").write_bytes(index)


def test_schedulers_that_mindone_has_not(copy, no_building):
    """A solver of another name gives way to DDIM (W14); what is no solver does not."""
    for name in ("NoSuchInverseScheduler", "UNet2DConditionModel"):
        change_json(copy / "model_index.json", scheduler=["diffusers", name])
        with pytest.raises(CheckpointError, match=f"no {name} can be made .* mindone has none of this name"):
            load_components(copy)
        check_folder(copy)  # that is for mindone to find out


def test_components_that_do_not_go_together(copy, no_building):
    config = (copy / "unet/config.json").read_bytes()
    for changes, message in (
        ({"in_channels": 9}, "takes 9 channels and gives 4"),
        ({"in_channels": 8, "out_channels": 8}, "VAE has 4 latent channels, the UNet 8"),
        ({"cross_attention_dim": 768}, "text encoder is 32 wide, the UNet takes 768"),
        ({"addition_embed_type": "text_time"}, "needs more inputs"),
        ({"num_class_embeds": 1000}, "needs more inputs"),
    ):
        change_json(copy / "unet/config.json", **changes)
        refusal(copy, message)
        (copy / "unet/config.json").write_bytes(config)
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
        "from mindiffedit.checkpoints.survey import check_folder\n"
        "check_folder(sys.argv[1])\n"
        "heavy = {'mindspore', 'mindone', 'transformers', 'huggingface_hub', 'torch', 'diffusers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    root = Path(mindiffedit.__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code, str(checked_folder)]
    subprocess.run(command, env=environment, timeout=120, check=True)
