"""Components of one checkpoint in another: loaded alone, put in place, against diffusers doing the same."""

import json
import shutil
from pathlib import Path

import diffusers
import mindspore as ms
import numpy as np
import parity
import pytest
from checkpoint_files import MODEL_FILES, assert_same, make_cache, read_tensors, write_tensors
from checkpoints import make_sd1, make_text_encoder, make_unet
from diffusers import StableDiffusionDiffEditPipeline as Reference
from test_pipeline import CLOSE, PICTURE, SOURCE, TARGET, our_pipeline, their_pipeline

import mindiffedit
from mindiffedit import StableDiffusionDiffEditPipeline, load_component
from mindiffedit.checkpoints.layout import CheckpointError, WeightsError
from mindiffedit.runtime import devices, notices


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    """Another checkpoint of the same layout with other weights, and with a safety checker."""
    return make_sd1(tmp_path_factory.mktemp("other") / "checkpoint", seed=41, safety_checker=True)


@pytest.fixture(scope="module")
def ours(sd1_folder):
    return our_pipeline(sd1_folder)


# --- against diffusers ---------------------------------------------------------------------------------------------


def test_unet_and_vae_of_another_checkpoint(ours, sd1_folder, other_folder, monkeypatch):
    """Put into a pipeline that has run before: masks and latents are those of diffusers with the same parts."""
    theirs = their_pipeline(sd1_folder)
    arguments = dict(image=PICTURE, num_inference_steps=5)
    mask_arguments = dict(arguments, source_prompt=SOURCE, target_prompt=TARGET, num_maps_per_mask=2)

    def both():
        expected = theirs.generate_mask(**mask_arguments, generator=parity.torch_noise(0))
        assert np.array_equal(ours.generate_mask(**mask_arguments, generator=parity.TorchNoise(0)), expected)
        theirs_latents = theirs.invert(SOURCE, **arguments, generator=parity.torch_noise(1)).latents.numpy()
        mine = ours.invert(SOURCE, **arguments, generator=parity.TorchNoise(1)).latents.asnumpy()
        assert parity.relative(mine, theirs_latents) < CLOSE
        return mine

    plain = both()
    monkeypatch.setattr(ours, "vae", load_component(other_folder, "vae"))
    theirs.vae = diffusers.AutoencoderKL.from_pretrained(other_folder, subfolder="vae")
    with_vae = both()
    monkeypatch.setattr(ours, "unet", load_component(other_folder, "unet"))
    theirs.unet = diffusers.UNet2DConditionModel.from_pretrained(other_folder, subfolder="unet")
    with_both = both()
    assert parity.relative(with_vae, plain) > 0.1 and parity.relative(with_both, with_vae) > 0.1


def test_a_scheduler_of_another_class_by_its_config(ours, monkeypatch):
    """The fast setting: DPM-Solver++ has an inverse, which is made for it."""
    config = ours.scheduler.config
    monkeypatch.setattr(ours, "scheduler", mindiffedit.DPMSolverMultistepScheduler.from_config(config))
    latents = ours.invert(SOURCE, PICTURE, num_inference_steps=5, generator=0).latents
    assert type(ours._solver(inverse=True).scheduler).__name__ == "DPMSolverMultistepInverseScheduler"
    assert ours.scheduler.config.beta_end == config.beta_end and latents.shape[1] == 4


# --- what does not fit ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def misfits(tmp_path_factory, sd1_folder):
    """{component: one that does not fit `sd1_folder`, and what is said of it}."""
    from checkpoints import perturb
    from transformers import CLIPTokenizer

    root = tmp_path_factory.mktemp("misfits")
    config = json.loads((sd1_folder / "vae" / "config.json").read_text())
    perturb(diffusers.AutoencoderKL.from_config(config, latent_channels=8), 3).save_pretrained(root / "vae")
    make_unet(3, cross_attention_dim=16).save_pretrained(root / "unet")
    tokenizer = CLIPTokenizer.from_pretrained(str(sd1_folder / "tokenizer"))
    short = make_text_encoder(3, tokenizer, "gelu")
    short.resize_token_embeddings(100)
    short.save_pretrained(root / "text_encoder")
    said = {
        "vae": "the VAE has 8 latent channels, the UNet 4",
        "unet": "the text encoder is 32 wide, the UNet takes 16",
        "text_encoder": "the tokenizer has ids up to .*, the text encoder knows 100",
    }
    return {name: (load_component(root / name, name), text) for name, text in said.items()}


@pytest.mark.parametrize("name", ["vae", "unet", "text_encoder"])
def test_misfits_are_errors_before_any_model_runs(misfits, name, ours, sd1_folder, monkeypatch):
    part, said = misfits[name]
    with pytest.raises(CheckpointError, match=said):
        StableDiffusionDiffEditPipeline.from_pretrained(sd1_folder, **{name: part})
    with pytest.raises(ValueError, match=f"cannot work together: {said}"):
        StableDiffusionDiffEditPipeline(**{**ours.components, name: part}, requires_safety_checker=False)
    monkeypatch.setattr(ours, name, part)
    calls, latents = dict(ours._stages.calls), np.zeros((1, 4, 4, 8, 10), np.float32)
    for call in (
        lambda: ours.generate_mask(PICTURE, source_prompt=SOURCE, target_prompt=TARGET),
        lambda: ours.invert(SOURCE, PICTURE),
        lambda: ours(TARGET, np.ones((1, 8, 10)), latents, num_inference_steps=5),
    ):
        with pytest.raises(ValueError, match=f"cannot work together: {said}") as calling:
            call()
        assert "\n" not in str(calling.value)
    assert dict(ours._stages.calls) == calls


def test_a_vae_of_another_scale_changes_the_pipelines(ours, sd1_folder, tmp_path):
    """Pixels per latent and the scaling factor are the VAE's own, also of one that came later."""
    config = json.loads((sd1_folder / "vae" / "config.json").read_text())
    config |= dict(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        scaling_factor=0.5,
    )
    theirs = their_pipeline(sd1_folder)
    theirs.vae = diffusers.AutoencoderKL.from_config(config)
    theirs = Reference(**{**theirs.components}, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.vae.save_pretrained(tmp_path / "vae")
    eager = type(ours)(**ours.components, mode="pynative", requires_safety_checker=False)
    eager.set_progress_bar_config(disable=True)
    assert eager.vae_scale_factor == 8
    eager.vae = load_component(tmp_path / "vae", "vae")
    assert eager.vae_scale_factor == 2
    small = PICTURE.resize((20, 16))
    arguments = dict(num_inference_steps=2, inpaint_strength=0.5, guidance_scale=1.0)
    expected = theirs.invert(SOURCE, small, generator=parity.torch_noise(0), **arguments).latents.numpy()
    mine = eager.invert(SOURCE, small, generator=parity.TorchNoise(0), **arguments).latents.asnumpy()
    assert mine.shape == (1, 1, 4, 8, 10) and parity.relative(mine, expected) < CLOSE


# --- one component alone -------------------------------------------------------------------------------------------


def test_models_alone_have_the_files_weights(sd1_folder, other_folder, tmp_path):
    models = {}
    for name, file in MODEL_FILES.items():
        expected = read_tensors(other_folder / file)
        models[name] = load_component(other_folder, name)
        assert_same(models[name], expected)
        alone = shutil.copytree(other_folder / name, tmp_path / name / "a name of its own")
        assert_same(load_component(str(alone), name), expected)
    pipeline = StableDiffusionDiffEditPipeline.from_pretrained(sd1_folder, **models, feature_extractor=object())
    for name, model in models.items():
        assert getattr(pipeline, name) is model


def test_parts_without_weights(other_folder, tmp_path):
    scheduler = load_component(other_folder, "scheduler")
    assert type(scheduler).__name__ == "PNDMScheduler" and scheduler.config.beta_end == 0.012
    tokenizer, extractor = (load_component(other_folder, name) for name in ("tokenizer", "feature_extractor"))
    assert tokenizer("a cat").input_ids == load_component(other_folder / "tokenizer", "tokenizer")("a cat").input_ids
    assert extractor.crop_size == load_component(other_folder / "feature_extractor", "feature_extractor").crop_size
    assert type(load_component(other_folder / "scheduler", "scheduler")) is type(scheduler)
    with pytest.raises(CheckpointError, match="has no inverse_scheduler"):
        load_component(other_folder, "inverse_scheduler")


def test_a_component_from_the_hubs_cache(other_folder, tmp_path):
    """A checkpoint's repository, and one that holds the component alone, as VAEs are published; plain and a variant."""
    source = Path(shutil.copytree(other_folder, tmp_path / "source"))
    options = dict(cache_dir=tmp_path / "cache", local_files_only=True)
    expected = read_tensors(source / MODEL_FILES["vae"])
    for variant in (None, "fp16"):
        if variant:
            (source / MODEL_FILES["vae"]).rename((source / MODEL_FILES["vae"]).with_suffix(".fp16.safetensors"))
        for folder, kind in ((source, "whole"), (source / "vae", "alone")):
            make_cache(tmp_path / "cache", folder, repo=f"{kind}/{variant}", skip=("unet",))
            assert_same(load_component(f"{kind}/{variant}", "vae", variant=variant, **options), expected)
            with pytest.raises(CheckpointError, match="unet"):
                load_component(f"{kind}/{variant}", "unet", **options)


def test_a_component_is_read_as_strictly_as_a_checkpoint(other_folder, tmp_path):
    own = Path(shutil.copytree(other_folder / "vae", tmp_path / "vae"))
    tensors = read_tensors(own / "diffusion_pytorch_model.safetensors")
    tensors["decoder.more"] = tensors.pop("quant_conv.bias")
    write_tensors(own / "diffusion_pytorch_model.safetensors", tensors)
    with pytest.raises(WeightsError) as caught:
        load_component(own, "vae")
    assert "missing: quant_conv.bias (8,)" in str(caught.value) and "extra: decoder.more (8,)" in str(caught.value)


def test_names_and_folders_of_the_wrong_kind(other_folder, tmp_path):
    with pytest.raises(ValueError, match="has to be one of vae, text_encoder, .* is 'controlnet'"):
        load_component(other_folder, "controlnet")
    with pytest.raises(CheckpointError, match="vae is a UNet2DConditionModel, expected AutoencoderKL"):
        load_component(other_folder / "unet", "vae")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no vae; it holds nothing"):
        load_component(tmp_path / "empty", "vae")
    with pytest.raises(CheckpointError, match="no such folder"):
        load_component(tmp_path / "none", "vae")
    with pytest.raises(ValueError, match="dtype"):
        load_component(other_folder, "vae", mindspore_dtype="int8")
    with pytest.raises(CheckpointError, match="no weights of `variant` 'ema'. Leave `variant` out"):
        load_component(other_folder, "vae", variant="ema")


@pytest.mark.skipif(devices.device_target() != "CPU", reason="about CPUs")
def test_a_dtype_that_a_cpu_has_not(other_folder, caplog, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    for _ in range(2):
        assert load_component(other_folder, "vae", mindspore_dtype=ms.float16).dtype == ms.float32
    assert caplog.text.count("float32 is used") == 1


# --- the page about all this -----------------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
MODEL = '"stable-diffusion-v1-5/stable-diffusion-v1-5"'


@pytest.fixture(scope="module")
def page(sd1_folder, other_folder, tmp_path_factory):
    """The page's program has been run on tiny checkpoints and a small picture, operator by operator: its names."""
    from test_guide import blocks, run_block
    from test_single_file import original

    folder = tmp_path_factory.mktemp("page")
    PICTURE.save(folder / "fruits.png")
    write_tensors(folder / "finetune.safetensors", original(sd1_folder, False))
    changes = {
        MODEL: (f'{str(sd1_folder)!r}, mode="pynative"', 3),
        '"stabilityai/sd-vae-ft-mse"': (repr(str(other_folder / "vae")), 1),
        '"some/finetune-of-1-5"': (repr(str(other_folder)), 1),
        '"finetune.safetensors"': (repr(str(folder / "finetune.safetensors")), 1),
        '"fruits.png"': (repr(str(folder / "fruits.png")), 1),
        "(512, 512)": ("(64, 48)", 1),
        "num_inference_steps=20": ("num_inference_steps=2", 2),
    }
    code = "\n".join(blocks(PAGE, "py"))
    assert {old: code.count(old) for old in changes} == {old: count for old, (_, count) in changes.items()}
    for old, (new, _) in changes.items():
        code = code.replace(old, new)
    names = {"__name__": "page"}
    run_block(code, names, "docs/models.md")
    return names


def test_the_pages_program_runs(page, sd1_folder, other_folder):
    assert page["mask"].shape == (1, 6, 8) and page["latents"].shape == (1, 1, 4, 6, 8)
    for name in ("edited", "freed", "inpainted", "mask_picture"):
        assert page[name].size == (64, 48), name
    assert page["pipeline"].vae is page["vae"]
    assert_same(page["pipeline"].unet, read_tensors(other_folder / MODEL_FILES["unet"]))
    assert_same(page["single"].unet, read_tensors(sd1_folder / MODEL_FILES["unet"]))


def test_inpainting_keeps_what_is_outside_the_mask(page):
    """mindone's pipeline with a mask of ours: its latents outside are the picture's, and inside they are not."""
    from PIL import Image

    from mindiffedit import portable_kernels

    inpaint, picture = page["inpaint"], page["picture"]
    mask = np.zeros((6, 8), np.uint8)
    mask[1:4, 2:5] = 255
    enlarged = Image.fromarray(mask, "L").resize(picture.size, Image.NEAREST)
    arguments = dict(image=picture, height=48, width=64, num_inference_steps=3, output_type="latent")
    with portable_kernels():
        latents = inpaint(prompt=TARGET, mask_image=enlarged, generator=np.random.default_rng(5), **arguments)[
            0
        ].asnumpy()
        pixels = inpaint.image_processor.preprocess(picture, height=48, width=64)
        kept = inpaint._encode_vae_image(pixels, generator=np.random.default_rng(5)).asnumpy()
    inside = np.broadcast_to(mask > 0, latents.shape)
    assert np.array_equal(latents[~inside], kept[~inside])
    assert np.abs(latents[inside] - kept[inside]).min() > 0
    # The picture of the mask that the page makes has the mask's grid.
    drawn = np.asarray(page["mask_picture"])
    assert set(np.unique(drawn)) <= {0, 255} and np.array_equal(drawn, np.kron(drawn[::8, ::8], np.ones((8, 8))))


# --- several pipelines in one process ------------------------------------------------------------------------------


def edited_by(pipe):
    """Latents of an edit, as an array."""
    steps = dict(num_inference_steps=6, inpaint_strength=0.5, mask_image=np.ones((64, 80)))
    return pipe.edit(PICTURE, SOURCE, TARGET, generator=0, output_type="latent", **steps).latents.asnumpy()


def test_pipelines_that_share_components_do_not_disturb_each_other(sd1_folder):
    first = our_pipeline(sd1_folder)
    second = StableDiffusionDiffEditPipeline(**first.components, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    second.scheduler = mindiffedit.DPMSolverMultistepScheduler.from_config(first.scheduler.config)
    second.unet_batch_size = 1
    alone = [edited_by(our_pipeline(sd1_folder)), edited_by(second)]
    assert parity.relative(alone[1], alone[0]) > 1e-3  # another solver
    for pipe, expected in ((first, alone[0]), (second, alone[1]), (first, alone[0])):
        assert np.array_equal(edited_by(pipe), expected)
    assert type(first.scheduler) is mindiffedit.DDIMScheduler and first.unet is second.unet


def test_checkpoints_loaded_in_another_order_are_the_same(sd1_folder, other_folder):
    folders = (sd1_folder, other_folder)

    def results(order):
        pipes = {folder: our_pipeline(folder) for folder in order}  # all loaded before one runs
        return [edited_by(pipes[folder]) for folder in folders]

    there, back = results(folders), results(folders[::-1])
    assert all(map(np.array_equal, there, back)) and parity.relative(there[1], there[0]) > 0.1
