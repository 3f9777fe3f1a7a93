"""Trains the demo checkpoint from nothing: tokenizer, VAE, text encoder and UNet, and the evaluation classifier.

    python scripts/train_demo_checkpoint.py --work WORKDIR --output mindiffedit/demo/checkpoint

Needs the ``train`` extra (torch, diffusers). Runs on a CPU (hours on two cores) or, with ``--device cuda``, on a
GPU (minutes). Every stage leaves its state in WORKDIR and a second run goes on where the first one stopped; a
larger ``--unet-steps`` lengthens a finished training. The stages:

    tokenizer   a byte-level CLIP BPE vocabulary in which every caption word is one token
    vae         AutoencoderKL, 128 x 128 pixels <-> 4 x 32 x 32 latents, on random crops of drawn scenes
    latents     the posterior of every training scene, once
    classifier  kind and colour of an object from a crop, used by scripts/evaluate_editing.py only
    unet        UNet2DConditionModel and CLIPTextModel together, noise-prediction loss, averaged weights
    export      a Stable-Diffusion-layout folder, weights stored in float16
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
import demo_scenes as scenes  # noqa: E402
import demo_training as training  # noqa: E402
import scene_classifier  # noqa: E402
from demo_training import Stage, learning_rate, take_average, to_model_range  # noqa: E402

UNET_CONFIG = dict(
    sample_size=32,
    in_channels=4,
    out_channels=4,
    layers_per_block=1,
    norm_num_groups=8,
    block_out_channels=(32, 64, 128),
    cross_attention_dim=128,
    attention_head_dim=4,
    down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
)
# The picture that ships beside the checkpoint; mindiffedit.demo.SAMPLE_PROMPTS names it.
SAMPLE = scenes.Scene((scenes.SceneObject("apple", "red", 60.0, 68.0, 36.0, 5.0),), "wooden table", texture_seed=5)


# --- helpers -----------------------------------------------------------------------------------------------------


def log(stage: str, step: int, steps: int, started: float, begun_at: int, **values):
    done = max(1, step - begun_at)
    left = (time.time() - started) / done * (steps - step)
    numbers = "  ".join(f"{k} {v:.4f}" for k, v in values.items())
    print(
        f"[{stage}] {step}/{steps}  {numbers}  ({(time.time() - started) / done:.3f} s/step, {left / 60:.1f} min left)",
        flush=True,
    )


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16)


def described(seed: int) -> scenes.Scene:
    return scenes.sample_scene(np.random.default_rng(seed))


def drawn(seed: int) -> np.ndarray:
    return np.asarray(scenes.draw_scene(described(seed))[0])


# --- stages ------------------------------------------------------------------------------------------------------


def train_vae(args, pictures, device):
    from diffusers import AutoencoderKL

    torch.manual_seed(args.seed)
    vae = AutoencoderKL(**training.VAE_CONFIG).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    stage = Stage(args.work, "vae", model=vae, optimizer=optimizer)
    begin = stage.resume()
    started, crop = time.time(), 64
    for step in range(begin, args.vae_steps):
        rng = np.random.default_rng((args.seed, 1, step))
        index = rng.integers(len(pictures), size=args.vae_batch)
        corner = rng.integers(scenes.SIZE - crop + 1, size=(args.vae_batch, 2))
        batch = np.stack([pictures[i, y : y + crop, x : x + crop] for i, (y, x) in zip(index, corner)])
        batch = to_model_range(batch, device).contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, step / args.vae_steps, 2e-3)
        with autocast(device):
            posterior = vae.encode(batch).latent_dist
            noise = torch.from_numpy(rng.standard_normal(tuple(posterior.mean.shape), np.float32)).to(device)
            restored = vae.decode(posterior.mean + posterior.std * noise).sample
        restored = restored.float()
        squared = F.mse_loss(restored, batch)
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = squared + 0.1 * F.l1_loss(restored, batch) + 3e-5 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            psnr = -10 * math.log10(squared.item() / 4)
            log("vae", step + 1, args.vae_steps, started, begin, psnr=psnr, kl=kl.item())
        if (step + 1) % 500 == 0 or step + 1 == args.vae_steps:
            stage.save(step + 1)
    return vae.eval()


Classifier = functools.partial(
    training.Classifier, len(scenes.KINDS), len(scenes.COLOURS), sizes=(3, 16, 32, 48), hidden=64
)
"""The network of the judge."""


def classifier_sample(seed: int):
    rng = np.random.default_rng(seed)
    scene = scenes.sample_scene(rng)
    picture, masks = scenes.draw_scene(scene)
    which = int(rng.integers(len(masks)))
    pixels = training.worsened(picture, rng)
    crop = scene_classifier.object_crop(pixels, masks[which], rng.uniform(-5, 5, 2), rng.uniform(0.85, 1.2))
    item = scene.objects[which]
    return crop, scenes.KINDS.index(item.kind), list(scenes.COLOURS).index(item.colour)


def caption(scene: scenes.Scene, rng: np.random.Generator) -> str:
    """A scene's caption, some without parts: that teaches partial and empty prompts."""
    fate = rng.random()
    if fate < 0.10:
        return ""
    plain, bare = 0.10 <= fate < 0.17, 0.17 <= fate < 0.27
    phrases = [scenes.with_article(o.kind) if plain else o.phrase for o in scene.objects]
    return scenes.caption_of(phrases, None if bare else scene.background)


def train_unet(args, tokenizer, moments, seeds, scaling_factor, device):
    from diffusers import DDIMScheduler

    torch.manual_seed(args.seed)
    model = training.build_denoiser(tokenizer, UNET_CONFIG, device)
    average = copy.deepcopy(model).requires_grad_(False)
    peak = args.learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-3)
    stage = Stage(args.work, "unet", model=model, average=average, optimizer=optimizer)
    begin = stage.resume()
    alphas = DDIMScheduler(**training.NOISE_SCHEDULE).alphas_cumprod.to(device)
    tokens = training.Tokens(tokenizer, scenes.vocabulary())
    pictured = [described(seed) for seed in seeds]
    started, recent = time.time(), []
    for step in range(begin, args.unet_steps):
        rng = np.random.default_rng((args.seed, 2, step))
        index = rng.integers(len(moments), size=args.unet_batch)
        mean, logvar = torch.from_numpy(moments[index].astype(np.float32)).to(device).chunk(2, 1)
        draws = torch.from_numpy(rng.standard_normal((2, *mean.shape), np.float32)).to(device)
        latents = (mean + torch.exp(0.5 * logvar) * draws[0]) * scaling_factor
        # One timestep from each of as many equal strata: less variance than independent draws.
        strata = (rng.permutation(args.unet_batch) + rng.random(args.unet_batch)) / args.unet_batch
        t = torch.from_numpy((strata * 1000).astype(np.int64)).to(device)
        a = alphas[t].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * latents + (1 - a).sqrt() * draws[1]).contiguous(memory_format=torch.channels_last)
        ids = torch.tensor([tokens.of(caption(pictured[i], rng)) for i in index], device=device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, step / args.unet_steps, peak)
        with autocast(device):
            prompt = model["text"](ids)[0]
            predicted = model["unet"](noisy, t, encoder_hidden_states=prompt).sample
        loss = F.mse_loss(predicted.float(), draws[1])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        take_average(average, model, step, 0.999)
        recent.append(loss.item())
        if (step + 1) % 100 == 0:
            log("unet", step + 1, args.unet_steps, started, begin, loss=float(np.mean(recent[-100:])))
        if (step + 1) % 500 == 0 or step + 1 == args.unet_steps:
            stage.save(step + 1)
    return average.eval()


def main():
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the stages' states")
    parser.add_argument("--output", type=Path, default=here.parent / "mindiffedit" / "demo" / "checkpoint")
    parser.add_argument("--classifier", type=Path, default=scene_classifier.WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--pictures", type=int, default=24_000)
    parser.add_argument("--vae-steps", type=int, default=1_600)
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--unet-steps", type=int, default=4_000)
    parser.add_argument("--unet-batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--stages",
        default="vae,latents,classifier,unet,export",
        help="comma-separated; earlier stages are read from WORKDIR",
    )
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    device, stages = torch.device(args.device), args.stages.split(",")

    tokenizer = training.make_tokenizer(args.work / "tokenizer", scenes.vocabulary())
    seeds = [args.seed * 1_000_003 + i for i in range(args.pictures)]
    pictures = training.training_pictures(args.work, seeds, drawn, os.cpu_count())
    if "classifier" in stages:
        amount = dict(train=12_000, steps=1_600, seed=args.seed, device=device, workers=os.cpu_count())
        training.train_classifier(args.classifier, Classifier, classifier_sample, **amount)
    if stages == ["classifier"]:
        return
    vae = train_vae(args, pictures, device)
    moments, scaling_factor = training.encode_all(args.work, vae, pictures, device, autocast)
    print(f"[latents] scaling factor {scaling_factor:.5f}", flush=True)
    if "unet" in stages or "export" in stages:
        denoiser = train_unet(args, tokenizer, moments, seeds, scaling_factor, device)
        if "export" in stages:
            training.export(args.output, tokenizer, vae, denoiser, scaling_factor)
            scenes.draw_scene(SAMPLE)[0].save(args.output.parent / "sample.png")


if __name__ == "__main__":
    main()
