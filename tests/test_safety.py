"""The safety checker with its feature extractor, against diffusers, on pictures made to be flagged and not."""

import logging
import shutil

import numpy as np
import parity
import pytest
import torch
from checkpoints import make_sd1
from diffusers import DDIMScheduler as TheirDDIM
from diffusers import StableDiffusionDiffEditPipeline as Reference
from safetensors.numpy import load_file, save_file
from test_pipeline import TARGET

from mindiffedit import DDIMScheduler, StableDiffusionDiffEditPipeline, load_component
from mindiffedit.runtime import notices

# Any sizes: the feature extractor crops and scales.
PICTURES = [parity.picture(48, 40, seed) for seed in (0, 3, 7, 8)]
WEIGHTS = "safety_checker/model.safetensors"


def as_images(pictures):
    """What the VAE gives, (B, 3, H, W) in [-1, 1]."""
    return np.stack([np.asarray(p, np.float32).transpose(2, 0, 1) / 127.5 - 1 for p in pictures])


def changed(folder, **weights):
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | weights, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checker that flags the first picture by a concept, and the second only because it needs special care.

    The third and fourth are not flagged; the fourth needs special care too.
    """
    from torch.nn import functional as F

    folder = make_sd1(tmp_path_factory.mktemp("safety") / "checkpoint", safety_checker=True)
    reference = Reference.from_pretrained(folder, low_cpu_mem_usage=False)
    checker = reference.safety_checker
    # Random networks see all pictures alike: the concepts are laid along what tells these four apart.
    clip = reference.feature_extractor(PICTURES, return_tensors="pt").pixel_values
    with torch.no_grad():
        embeds = F.normalize(checker.visual_projection(checker.vision_model(clip)[1]))
        own = torch.linalg.pinv(embeds).T  # own[i] · embeds[j] is 1 for i = j and else 0
        concepts = F.normalize(torch.cat([own, checker.concept_embeds[4:]]))
        cares = F.normalize(torch.stack([own[1] + own[3], own[0] - own[2], own[2] - own[0]]))
        cosine, care = embeds @ concepts.T, embeds @ cares.T
        thresholds = torch.full((17,), 2.0)
        thresholds[0] = cosine[0, 0] / 2  # the first alone is above it
        # Missed by less than the 0.01 that special care adds; the third by as little, and it needs no care.
        thresholds[1], thresholds[2] = cosine[1, 1] + 0.005, cosine[2, 2] + 0.005
        care_thresholds = torch.tensor([float(care[[1, 3], 0].min()) / 2, 2.0, 2.0])
    assert cosine[0, 0] > 0.02 and min(care[1, 0], care[3, 0]) > 0.02
    changed(
        folder,
        concept_embeds=concepts.numpy(),
        special_care_embeds=cares.numpy(),
        concept_embeds_weights=thresholds.numpy(),
        special_care_embeds_weights=care_thresholds.numpy(),
    )
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    pipeline = StableDiffusionDiffEditPipeline.from_pretrained(folder, mode="pynative")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def theirs(folder):
    pipeline = Reference.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_flags_and_blackened_pictures_are_the_references(ours, theirs, caplog):
    images = as_images(PICTURES)
    expected, flags = theirs.run_safety_checker(torch.from_numpy(images.copy()), "cpu", torch.float32)
    assert flags == [True, True, False, False]
    with caplog.at_level(logging.WARNING):
        mine, mine_flags = ours.run_safety_checker(images)
    assert mine_flags == flags and all(type(flag) is bool for flag in mine_flags)
    assert np.array_equal(mine, expected.numpy())
    assert not mine[:2].any() and np.array_equal(mine[2:], images[2:])
    assert "blackened 2 of 4 pictures" in caplog.text


def test_without_special_care_the_second_passes(folder, tmp_path, ours, monkeypatch):
    """What the fixture says of its pictures is so: the concepts alone flag one of them."""
    other = shutil.copytree(folder, tmp_path / "careless")
    changed(other, special_care_embeds_weights=np.full(3, 2, np.float32))
    monkeypatch.setattr(ours, "safety_checker", load_component(other, "safety_checker"))
    assert ours.run_safety_checker(as_images(PICTURES))[1] == [True, False, False, False]


@pytest.mark.parametrize("flag", [True, False])
def test_an_edit_is_checked_as_in_the_reference(folder, tmp_path, flag):
    """The whole call: a checker that flags everything, and one that flags nothing."""
    other = shutil.copytree(folder, tmp_path / "copy")
    changed(other, concept_embeds_weights=np.full(17, -2 if flag else 2, np.float32))
    ours = StableDiffusionDiffEditPipeline.from_pretrained(other, mode="pynative")
    theirs = Reference.from_pretrained(other, low_cpu_mem_usage=False)
    ours.scheduler = DDIMScheduler.from_config(ours.scheduler.config)
    theirs.scheduler = TheirDDIM.from_config(theirs.scheduler.config)
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(0).standard_normal((1, 2, 4, 4, 4)).astype(np.float32)
    arguments = dict(prompt=TARGET, num_inference_steps=2, inpaint_strength=1.0, guidance_scale=1.0, output_type="np")
    mask = np.ones((1, 4, 4), np.float32)
    mine = ours(mask_image=mask, image_latents=latents, **arguments)
    expected = theirs(mask_image=torch.from_numpy(mask), image_latents=torch.from_numpy(latents), **arguments)
    assert mine.nsfw_content_detected == expected.nsfw_content_detected == [flag]
    assert mine.images.shape == expected.images.shape == (1, 32, 32, 3)
    if flag:
        assert not mine.images.any() and not expected.images.any()
    else:
        assert mine.images.any() and parity.relative(mine.images, expected.images) < 1e-3


def test_saved_and_loaded_again(ours, tmp_path):
    ours.save_pretrained(tmp_path / "saved")
    again = StableDiffusionDiffEditPipeline.from_pretrained(tmp_path / "saved", mode="pynative")
    assert again.requires_safety_checker
    images = as_images(PICTURES)
    assert again.run_safety_checker(images)[1] == ours.run_safety_checker(images)[1]
    theirs = Reference.from_pretrained(tmp_path / "saved", low_cpu_mem_usage=False)
    flags = theirs.run_safety_checker(torch.from_numpy(images), "cpu", torch.float32)[1]
    assert flags == [True, True, False, False]


def test_left_out(folder, ours, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(notices, "_said", set())
    pipeline = StableDiffusionDiffEditPipeline(**{**ours.components, "safety_checker": None}, mode="pynative")
    assert "The safety checker is off" in caplog.text
    images = as_images(PICTURES)
    unchecked, flags = pipeline.run_safety_checker(images)
    assert unchecked is images and flags is None
    caplog.clear()
    StableDiffusionDiffEditPipeline(
        **{**ours.components, "safety_checker": None}, mode="pynative", requires_safety_checker=False
    )
    assert "safety checker" not in caplog.text
    # What is left out is not read: its weights may be missing.
    other = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("safety_checker"))
    parts = dict(safety_checker=None, feature_extractor=None)
    bare = StableDiffusionDiffEditPipeline.from_pretrained(other, mode="pynative", **parts)
    assert bare.safety_checker is bare.feature_extractor is None


def test_a_checker_without_a_feature_extractor_is_an_error(ours):
    with pytest.raises(ValueError, match="A safety checker needs a feature extractor"):
        StableDiffusionDiffEditPipeline(**{**ours.components, "feature_extractor": None}, mode="pynative")
