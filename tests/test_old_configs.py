"""Configs as the first versions of diffusers and transformers wrote them, against what diffusers makes of them."""

import contextlib
import dataclasses
import io
import json
import types

import diffusers
import numpy as np
import parity
import pytest
import torch
from checkpoint_files import change_json
from test_pipeline import PICTURE, SOURCE

import mindiffedit
from mindiffedit import StableDiffusionDiffEditPipeline, load_component
from mindiffedit.checkpoints import models, old_configs, survey
from mindiffedit.cli.job import working_limits
from mindiffedit.runtime import notices

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers', about these configs


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(notices, "_said", set())


@pytest.fixture(scope="module")
def theirs(sd1_folder):
    """The components as diffusers reads them."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd1_folder, low_cpu_mem_usage=False)
    return {name: part for name, part in pipe.components.items() if name != "image_encoder"}


@pytest.fixture(scope="module")
def parts(sd1_folder):
    return models.load_components(sd1_folder, overrides={"requires_safety_checker": False})


def write(path, **content):
    path.write_text(json.dumps(content))


# --- the UNet ------------------------------------------------------------------------------------------------------


def test_sample_size_is_what_diffusers_takes_it_for(copy, theirs, caplog, monkeypatch):
    plain = {key: value for key, value in theirs["unet"].config.items() if not key.startswith("_")}
    for version, size in (
        ("0.2.2", 32), ("0.6.0", 32), ("0.8.1", 48), ("0.8.0.dev0", 8), ("0.6.0", 64), ("0.6.0", 96), ("0.9.0", 32),
        ("0.9.0.dev0", 32), ("0.10.2", 32), ("0.35.2", 8), (None, 32),
    ):  # fmt: skip
        monkeypatch.setattr(notices, "_said", set())
        caplog.clear()
        config = plain | {"sample_size": size} | ({} if version is None else {"_diffusers_version": version})
        unet = diffusers.UNet2DConditionModel.from_config(plain)
        unet._internal_dict = type(unet.config)(config)
        pipe = diffusers.StableDiffusionDiffEditPipeline(
            **{**theirs, "unet": unet}, inverse_scheduler=None, requires_safety_checker=False
        )
        write(copy / "unet" / "config.json", **json.loads(json.dumps(config)))
        ours = survey.check_folder(copy)["unet"]
        assert ours["sample_size"] == pipe.unet.config.sample_size, (version, size)
        survey.check_folder(copy)
        said = [record for record in caplog.records if "sample_size" in record.message]
        assert len(said) == (ours["sample_size"] != size), (version, size)  # once in a process
        # And the size that the command line works at.
        limits = working_limits(survey.check_folder(copy), None)
        assert limits == (8, int(1.5 * (8 * ours["sample_size"]) ** 2))


def test_a_unet_is_corrected_on_every_way_in(copy, parts):
    change_json(copy / "unet" / "config.json", sample_size=32, _diffusers_version="0.6.0")
    unet = load_component(copy, "unet")
    assert unet.config.sample_size == 64
    pipe = StableDiffusionDiffEditPipeline.from_pretrained(copy, requires_safety_checker=False)
    assert pipe.unet.config.sample_size == 64
    unet.register_to_config(sample_size=32, _diffusers_version="0.6.0")
    StableDiffusionDiffEditPipeline(**{**parts, "unet": unet})
    assert unet.config.sample_size == 64


# --- schedulers ----------------------------------------------------------------------------------------------------

NOISE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
SCHEDULERS = {
    "v1-4, first": ("PNDMScheduler", dict(skip_prk_steps=True)),
    "without skip_prk_steps": ("PNDMScheduler", dict(steps_offset=1)),
    "its defaults": ("DDIMScheduler", dict(set_alpha_to_one=False)),
    "clips": ("DDIMScheduler", dict(clip_sample=True, steps_offset=1, set_alpha_to_one=False)),
    "right": ("DDIMScheduler", dict(clip_sample=False, steps_offset=1, set_alpha_to_one=False)),
    "PNDM that clips": ("PNDMScheduler", dict(clip_sample=True, set_alpha_to_one=False, skip_prk_steps=True)),
    "LMS": ("LMSDiscreteScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", dict(steps_offset=0, clip_sample=True)),
    "DPM of DEIS": (
        "DPMSolverMultistepScheduler",
        dict(algorithm_type="deis", solver_type="logrho", final_sigmas_type="sigma_min"),
    ),
    "DPM of UniPC": ("DPMSolverMultistepScheduler", dict(solver_type="bh2", steps_offset=1, predict_epsilon=True)),
    "betas": ("DDIMScheduler", dict(trained_betas=list(np.linspace(1e-4, 0.02, 1000)), set_alpha_to_one=False)),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_are_corrected_as_diffusers_does(name, copy, theirs, parts):
    kind, options = SCHEDULERS[name]
    config = {"_class_name": kind, "_diffusers_version": "0.6.0", **NOISE, **options}
    pipe = diffusers.StableDiffusionPipeline(
        **{**theirs, "scheduler": getattr(diffusers, kind).from_config(config)}, requires_safety_checker=False
    )
    # Its other pipeline corrects what this one does not.
    diffusers.StableDiffusionDiffEditPipeline(
        **{**theirs, "scheduler": pipe.scheduler}, inverse_scheduler=None, requires_safety_checker=False
    )
    write(copy / "scheduler" / "scheduler_config.json", **config)
    change_json(copy / "model_index.json", scheduler=["diffusers", kind])
    loaded = load_component(copy, "scheduler")
    given = type(loaded).from_config(old_configs.scheduler_names(config))
    before = dict(given.config)
    pipeline = StableDiffusionDiffEditPipeline(**{**parts, "scheduler": given})
    assert dict(given.config) == before  # the caller's own
    assert pipeline.scheduler.config.get("clip_sample") == given.config.get("clip_sample")
    for ours in (loaded, pipeline.scheduler):
        for key, value in pipe.scheduler.config.items():
            if not key.startswith("_") and (key != "clip_sample" or ours is loaded):
                assert ours.config[key] == value, key
        if hasattr(ours, "exact_alphas_cumprod"):
            assert np.array_equal(ours.exact_alphas_cumprod, pipe.scheduler.alphas_cumprod.numpy())
        ours.set_timesteps(7)
        pipe.scheduler.set_timesteps(7)
        assert np.array_equal(ours.timesteps.asnumpy(), pipe.scheduler.timesteps.numpy())


def test_what_is_corrected_is_said_once(copy, caplog):
    write(copy / "scheduler" / "scheduler_config.json", _class_name="PNDMScheduler", **NOISE)
    for _ in range(2):
        StableDiffusionDiffEditPipeline.from_pretrained(copy, requires_safety_checker=False)
    said = [record.message for record in caplog.records if "was configured with" in record.message]
    assert sorted(said) == sorted(set(said)) and len(said) == 2
    assert "steps_offset=0" in " ".join(said) and "skip_prk_steps=False" in " ".join(said)


def test_an_inverse_of_the_pipelines_first_version(copy):
    """`set_alpha_to_zero` was the name of what is `set_alpha_to_one` now."""
    (copy / "inverse_scheduler").mkdir()
    change_json(copy / "model_index.json", inverse_scheduler=["diffusers", "DDIMInverseScheduler"])
    for end in (True, False):
        config = dict(NOISE, clip_sample=False, steps_offset=1, set_alpha_to_zero=end)
        write(copy / "inverse_scheduler/scheduler_config.json", _class_name="DDIMInverseScheduler", **config)
        inverse = load_component(copy, "inverse_scheduler")
        expected = diffusers.DDIMInverseScheduler.from_config(config)
        assert inverse.exact_end_alpha == expected.initial_alpha_cumprod.numpy()
        assert inverse.config.steps_offset == 1 and not inverse.config.clip_sample


def test_the_first_dpm_solver_ends_as_it_did(copy):
    """Its configs are older than the choice of the last noise level, whose default it does not accept."""
    change_json(copy / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    for kind in ("dpmsolver", "deis"):
        config = dict(NOISE, algorithm_type=kind)
        write(copy / "scheduler" / "scheduler_config.json", _class_name="X", **config)
        with pytest.raises(ValueError, match="final_sigmas_type"):
            diffusers.DPMSolverMultistepScheduler.from_config(config)
        expected = diffusers.DPMSolverMultistepScheduler(**config, final_sigmas_type="sigma_min", steps_offset=1)
        ours = load_component(copy, "scheduler")
        expected.set_timesteps(6)
        ours.set_timesteps(6)
        assert np.array_equal(ours.exact_sigmas, expected.sigmas.numpy())


# --- a whole checkpoint --------------------------------------------------------------------------------------------


def test_a_checkpoint_as_the_first_ones_are(checked_folder, tmp_path):
    """stable-diffusion-v1-4 as it came: few keys, names of those days, CLIPFeatureExtractor with plain numbers."""
    import shutil

    folder = shutil.copytree(checked_folder, tmp_path / "first")

    def keep(part, *keys, **more):
        path = folder / part
        config = json.loads(path.read_text())
        write(path, **{key: config[key] for key in keys}, **more)

    write(
        folder / "model_index.json", _class_name="StableDiffusionPipeline", _diffusers_version="0.2.2",
        feature_extractor=["transformers", "CLIPFeatureExtractor"], scheduler=["diffusers", "FlaxPNDMScheduler"],
        safety_checker=["stable_diffusion", "FlaxStableDiffusionSafetyChecker"], vae=["diffusers", "AutoencoderKL"],
        text_encoder=["transformers", "FlaxCLIPTextModel"], tokenizer=["transformers", "CLIPTokenizer"],
        unet=["diffusers", "FlaxUNet2DConditionModel"],
    )  # fmt: skip
    shape = ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "norm_num_groups")
    keep("unet/config.json", *shape, "attention_head_dim", "cross_attention_dim", "in_channels", "out_channels",
         _class_name="UNet2DConditionModel", _diffusers_version="0.2.2", act_fn="silu", center_input_sample=False,
         downsample_padding=1, flip_sin_to_cos=True, freq_shift=0, mid_block_scale_factor=1, norm_eps=1e-05,
         sample_size=32, _name_or_path="/home/someone/unet")  # fmt: skip
    keep("vae/config.json", *shape, "latent_channels", _class_name="AutoencoderKL", _diffusers_version="0.2.2",
         act_fn="silu", in_channels=3, out_channels=3, sample_size=512)  # fmt: skip
    write(folder / "scheduler/scheduler_config.json", _class_name="PNDMScheduler", _diffusers_version="0.2.2", **NOISE,
          skip_prk_steps=True, clip_sample=False, set_alpha_to_one=False)  # fmt: skip
    write(folder / "feature_extractor/preprocessor_config.json", crop_size=32, do_center_crop=True, do_normalize=True,
          do_resize=True, feature_extractor_type="CLIPFeatureExtractor", resample=3, size=32,
          image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28])  # fmt: skip
    path = folder / "safety_checker/config.json"
    config = json.loads(path.read_text())
    vision = config["vision_config"]
    write(path, **config | {"vision_config_dict": vision, "vision_config": vision, "text_config_dict": None})
    change_json(folder / "text_encoder/config.json", dtype=None, torch_dtype="float32", _name_or_path="openai/x")
    change_json(folder / "tokenizer/tokenizer_config.json", special_tokens_map_file="./special_tokens_map.json",
                name_or_path="openai/clip-vit-large-patch14", added_tokens_decoder={}, tokenizer_class="CLIPTokenizer",
                pad_token={"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False, "normalized": True,
                           "rstrip": False, "single_word": False})  # fmt: skip

    with contextlib.redirect_stderr(io.StringIO()):
        theirs = diffusers.StableDiffusionDiffEditPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    ours = StableDiffusionDiffEditPipeline.from_pretrained(folder, mode="pynative")
    assert ours.unet.config.sample_size == theirs.unet.config.sample_size == 64
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.inverse_scheduler = diffusers.DDIMInverseScheduler.from_config(theirs.scheduler.config)
    ours.scheduler = mindiffedit.DDIMScheduler.from_config(ours.scheduler.config)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    arguments = dict(image=PICTURE, num_inference_steps=3, inpaint_strength=0.7)
    expected = theirs.invert(SOURCE, **arguments, generator=parity.torch_noise(1)).latents.numpy()
    mine = ours.invert(SOURCE, **arguments, generator=parity.TorchNoise(1)).latents.asnumpy()
    assert parity.relative(mine, expected) < 1e-3
    pictures = [PICTURE, PICTURE.rotate(90)]
    pixels = theirs.feature_extractor(pictures, return_tensors="pt").pixel_values
    assert np.array_equal(ours.feature_extractor(pictures, return_tensors="np").pixel_values, pixels.numpy())
    with torch.no_grad():
        features = theirs.safety_checker.visual_projection(theirs.safety_checker.vision_model(pixels)[1]).numpy()
    import mindspore

    from mindiffedit.runtime.kernels import portable_kernels

    with portable_kernels():
        vision = ours.safety_checker.vision_model(mindspore.Tensor(pixels.numpy()))[1]
        found = ours.safety_checker.visual_projection(vision).asnumpy()
    assert parity.relative(found, features) < 1e-3


def test_a_recording_runs_with_the_corrected_scheduler():
    """W12: otherwise the reference would clip where we do not, and no replay could agree."""
    from mindiffedit.parity import reference
    from mindiffedit.parity.case import Case

    said = diffusers.DDIMScheduler(clip_sample=True, steps_offset=1)
    pipe = types.SimpleNamespace(scheduler=said, set_progress_bar_config=lambda **_: None)
    case = Case(image=None)
    recorded = reference.with_schedulers(pipe, case)
    assert [recorded.scheduler.config.clip_sample, recorded.inverse_scheduler.config.clip_sample] == [False, False]
    asked = reference.with_schedulers(pipe, dataclasses.replace(case, scheduler_options={"clip_sample": True}))
    assert asked.scheduler.config.clip_sample is True
