"""Tiny random Stable Diffusion checkpoints, made with torch, diffusers and transformers in seconds.

Two layouts, as the two families of real checkpoints have them:

- `make_sd1`: epsilon prediction, quick_gelu text encoder, conv projections, one attention_head_dim, PNDM;
- `make_sd2`: v_prediction, gelu text encoder, linear projections, a list of heads, DDIM.

Weights are random and every parameter is perturbed, norms and biases included: a defect that zeros, ones or
equal rows would hide shows in the numbers.
"""

from __future__ import annotations

import json
from pathlib import Path

WORDS = (
    "a an the of on in with and photo picture red green blue yellow apple apples pear pears bowl "
    "fruits fruit table wooden cat dog house tree grass sky"
).split()


def write_vocabulary(folder: Path) -> int:
    """Write vocab.json and merges.txt of a byte-level CLIP tokenizer into `folder`; returns its size.

    All 256 bytes are in it, so any text has tokens; each of `WORDS` merges to few tokens.
    """
    from transformers.models.clip.tokenization_clip import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    tokens = symbols + [symbol + "</w>" for symbol in symbols]
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = f"{pieces[0]} {pieces[1]}"
            if pair not in merges:
                merges.append(pair)
            pieces[:2] = [pieces[0] + pieces[1]]
    for pair in merges:
        token = pair.replace(" ", "")
        if token not in tokens:
            tokens.append(token)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({token: number for number, token in enumerate(tokens)}, ensure_ascii=False),
        encoding="utf-8",
    )
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return len(tokens)


def make_tokenizer(folder: Path, pad_token: str = "<|endoftext|>", length: int = 77):
    """A real CLIPTokenizer over the small vocabulary. `folder` keeps its two files."""
    from transformers import CLIPTokenizer

    write_vocabulary(folder)
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token=pad_token, model_max_length=length
    )


def perturb(model, seed: int, scale: float = 0.05):
    """Add seeded normal noise to every parameter, in place; returns `model` in inference mode."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def make_vae(seed: int):
    """AutoencoderKL with a factor of 8 between picture and latents, 4 latent channels."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    return perturb(vae, seed)


UNET = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=32,
    attention_head_dim=4,
)


def make_unet(seed: int, **options):
    """UNet2DConditionModel with one cross-attention block and one plain one, 32-wide text states."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return perturb(UNet2DConditionModel(**{**UNET, **options}), seed)


def make_text_encoder(seed: int, tokenizer, hidden_act: str, layers: int = 3):
    """CLIPTextModel, 32 wide, over `tokenizer`'s vocabulary and length."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        hidden_act=hidden_act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return perturb(CLIPTextModel(config), seed)


def make_safety_checker(seed: int):
    """(StableDiffusionSafetyChecker, CLIPImageProcessor) on 32×32 pictures; it flags nothing."""
    import torch
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    torch.manual_seed(seed)
    vision = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16))
    perturb(checker, seed)
    with torch.no_grad():
        # A cosine never reaches 2: no picture is flagged.
        checker.concept_embeds_weights.add_(2.0)
        checker.special_care_embeds_weights.add_(2.0)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return checker, processor


NOISE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def _make(folder, seed, scheduler, hidden_act, safety_checker, pad_token, **unet) -> Path:
    from diffusers import StableDiffusionPipeline

    tokenizer = make_tokenizer(Path(folder) / "tokenizer", pad_token)
    checker, processor = make_safety_checker(seed + 3) if safety_checker else (None, None)
    pipeline = StableDiffusionPipeline(
        vae=make_vae(seed),
        text_encoder=make_text_encoder(seed + 1, tokenizer, hidden_act),
        tokenizer=tokenizer,
        unet=make_unet(seed + 2, **unet),
        scheduler=scheduler,
        safety_checker=checker,
        feature_extractor=processor,
        requires_safety_checker=safety_checker,
    )
    pipeline.save_pretrained(str(folder), safe_serialization=True)
    return Path(folder)


def make_sd1(folder, *, seed: int = 1, safety_checker: bool = False) -> Path:
    """Write an SD-1.x-like checkpoint into `folder` (torch needed); returns the folder."""
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler(**NOISE, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1)
    return _make(folder, seed, scheduler, "quick_gelu", safety_checker, "<|endoftext|>")


def make_sd2(folder, *, seed: int = 11, safety_checker: bool = False) -> Path:
    """Write an SD-2.x-like checkpoint into `folder` (torch needed); returns the folder."""
    from diffusers import DDIMScheduler

    options = dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction")
    unet = dict(attention_head_dim=[2, 4], use_linear_projection=True)
    return _make(folder, seed, DDIMScheduler(**NOISE, **options), "gelu", safety_checker, "!", **unet)
