"""Checkpoints saved: folders that diffusers loads, with the exact weights, written whole or not at all."""

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import MODEL_FILES, assert_same, parameters, read_tensors

from mindiffedit.checkpoints.layout import CheckpointError
from mindiffedit.checkpoints.models import load_components
from mindiffedit.checkpoints.saving import save_components


def scheduler_pair():
    from mindiffedit.solvers.schedulers import DDIMInverseScheduler, DDIMScheduler

    options = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return DDIMScheduler(**options, clip_sample=False, steps_offset=1), DDIMInverseScheduler(**options)


@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_diffusers_loads_what_is_saved_here(layout, checked, sd2, checked_folder, sd2_folder, tmp_path):
    import diffusers

    parts, source = (checked, checked_folder) if layout == "sd1" else (sd2, sd2_folder)
    scheduler, inverse = scheduler_pair()
    schedulers = {"scheduler": scheduler, "inverse_scheduler": inverse}
    folder = save_components(tmp_path / "new" / "saved", parts | schedulers)
    assert folder == tmp_path / "new" / "saved"
    loaded = diffusers.StableDiffusionDiffEditPipeline.from_pretrained(str(folder), use_safetensors=True)
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
    assert loaded.scheduler.config.beta_schedule == "scaled_linear" and loaded.scheduler.config.steps_offset == 1
    assert loaded.tokenizer("a red apple").input_ids == parts["tokenizer"]("a red apple").input_ids
    assert type(loaded.inverse_scheduler).__name__ == "DDIMInverseScheduler"
    assert diffusers.StableDiffusionPipeline.from_pretrained(str(folder)).unet is not None


@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_saved_files_are_those_of_diffusers(layout, checked, sd2, checked_folder, sd2_folder, tmp_path):
    """Configs key by key, weight files byte by byte."""
    parts, source = (checked, checked_folder) if layout == "sd1" else (sd2, sd2_folder)
    folder = save_components(tmp_path / "saved", parts)
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
            if path.name == "model_index.json":
                content.pop("_class_name")
        assert ours == theirs, path.name


def test_round_trip_here(sd2, tmp_path):
    _, inverse = scheduler_pair()
    folder = save_components(tmp_path / "saved", sd2 | {"inverse_scheduler": inverse})
    again = load_components(folder)
    for name in ("vae", "unet", "text_encoder"):
        assert_same(again[name], parameters(sd2[name]))
        assert not any(key.startswith("_name") for key in json.loads((folder / name / "config.json").read_text()))
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
