"""Random checkpoints in the sizes of Stable Diffusion 1.5, to measure with; nothing is downloaded.

What a step costs depends on the shapes of the weights and not on their values, so weights from a seed are as
good as trained ones for a benchmark, and anybody can make the same ones. The configurations are those of the
real checkpoint. The layers' own initial values keep the variance about level from layer to layer, so nothing
overflows over the steps. torch, diffusers and transformers are needed, and imported when a function runs.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

UNET = dict(
    sample_size=64,
    in_channels=4,
    out_channels=4,
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    layers_per_block=2,
    attention_head_dim=8,
    cross_attention_dim=768,
)
"""The UNet of Stable Diffusion 1.5: 860 million parameters."""

VAE = dict(
    sample_size=512,
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    latent_channels=4,
    scaling_factor=0.18215,
)
"""The VAE of Stable Diffusion 1.5: 84 million parameters."""

TEXT = dict(
    vocab_size=49408,
    max_position_embeddings=77,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    hidden_act="quick_gelu",
    projection_dim=768,
)
"""The text encoder of CLIP ViT-L/14: 123 million parameters."""

SCHEDULER = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)

SEED = 20260
"""Decides all weights, with one release of torch."""

GIBIBYTES = 5
"""What the checkpoint takes on disk, rounded up: 1067 million parameters of four bytes, and a vocabulary."""


def default_folder() -> Path:
    """Where the checkpoint is kept between runs: the user's cache folder, never the repository."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mindiffedit" / "benchmark-sd15"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the layout of a checkpoint; weights are judged by who loads them."""
    return (Path(folder) / "model_index.json").is_file()


def ensure(folder: Path, *, seed: int = SEED, unet=None, vae=None, text=None) -> Path:
    """Make the checkpoint in `folder` unless it is there; returns the folder.

    It is built in a folder beside the wanted one, which is renamed when it is whole; what a killed process left there
    is removed.

    Args:
        unet, vae, text: entries of `UNET`, `VAE` and `TEXT` to be changed, for small checkpoints.
    """
    folder = Path(folder)
    if is_checkpoint(folder):
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is there, but is no checkpoint; name another folder, or empty this one.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    try:
        _write(building, seed, {**UNET, **(unet or {})}, {**VAE, **(vae or {})}, {**TEXT, **(text or {})})
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _write(folder: Path, seed: int, unet: dict, vae: dict, text: dict) -> None:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = make_tokenizer(folder / "tokenizer", text["vocab_size"], text["max_position_embeddings"])
    torch.manual_seed(seed)
    with torch.no_grad():
        encoder = CLIPTextModel(
            CLIPTextConfig(
                **text,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL(**vae),
            text_encoder=encoder,
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(**unet),
            scheduler=DDIMScheduler(**SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(str(folder), safe_serialization=True)


def make_tokenizer(folder: Path, vocabulary: int, length: int):
    """A CLIPTokenizer of bytes, padded with tokens that no text has to `vocabulary` entries.

    Any text can be read, letter by letter; begin and end have the last two ids, as in CLIP's own vocabulary.
    """
    from transformers import CLIPTokenizer
    from transformers.models.clip.tokenization_clip import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    tokens = symbols + [symbol + "</w>" for symbol in symbols]
    missing = vocabulary - len(tokens) - 2
    if missing < 0:
        raise ValueError(f"a vocabulary of {vocabulary} is too small; {len(tokens) + 2} is the least.")
    tokens += [f"<|unused {number}|>" for number in range(missing)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        pad_token="<|endoftext|>",
        model_max_length=length,
    )
