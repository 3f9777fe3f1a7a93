"""Trains the demo checkpoint from nothing: tokenizer, VAE, text encoder and UNet, and the evaluation classifier.

    python scripts/train_demo_checkpoint.py --work .training --output FOLDER/checkpoint

Needs the ``train`` extra (torch, diffusers). Runs on a CPU (days on two cores) or, with ``--device cuda``, on a GPU,
which has not been seen yet: there the defaults are larger batches, and ``--unet-minutes 6`` ends the longest stage in
time, its learning rate brought down. Every stage leaves its state in WORKDIR every few minutes, and a second run goes
on where the first one stopped; a larger ``--unet-steps`` lengthens a training, ``--stages export`` writes what is
there. The stages:

    tokenizer   a byte-level CLIP BPE vocabulary in which every caption word is one token
    vae         AutoencoderKL, 128 x 128 pixels <-> 4 x 32 x 32 latents, on random crops of drawn scenes
    latents     the posterior of every training scene, once
    classifier  kind and colour of an object from a crop, used by scripts/evaluate_editing.py only
    unet        UNet2DConditionModel and CLIPTextModel together: noise prediction, min-SNR weights, averaged weights
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

MIN_SNR = 5.0

UNET_CONFIG = dict(
    sample_size=32,
    in_channels=4,
    out_channels=4,
    layers_per_block=1,
    norm_num_groups=8,
    block_out_channels=(32, 64, 128, 144),
    cross_attention_dim=128,
    attention_head_dim=4,
    down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
)
# The pictures that ship beside the checkpoint; mindiffedit.demo.EXAMPLES says what becomes of them.
EXAMPLES = {
    "fruits": scenes.Scene((scenes.Filling("bowl", "fruit", 64.0, 62.0, 102.0, seed=11),), "a wooden table", 5),
    "strawberries": scenes.Scene((scenes.Filling("bowl", "strawberry", 64.0, 62.0, 102.0, 3),), "a white cloth", 6),
    "cat": scenes.Scene((scenes.Item("cat", None, 62.0, 66.0, 76.0, 4.0),), "grass", 7),
    "car": scenes.Scene((scenes.Item("car", "red", 66.0, 68.0, 78.0, 0.0),), "sand", 8),
}


# --- helpers -----------------------------------------------------------------------------------------------------


class Clock:
    """Says how far a stage is, by its steps or by its minutes, whichever ends first, and when to save."""

    def __init__(self, begin: int, steps: int, minutes: float | None, between_saves: float = 180):
        self.begin, self.steps, self.minutes, self.between_saves = begin, steps, minutes, between_saves
        self.started = self.saved = time.monotonic()

    def progress(self, step: int) -> float:
        by_time = (time.monotonic() - self.started) / (60 * self.minutes) if self.minutes else 0.0
        return max(step / self.steps, by_time)

    def is_due(self, step: int) -> bool:
        """Whether the state should be saved after this many steps: at the end, and every few minutes."""
        due = time.monotonic() - self.saved > self.between_saves or self.progress(step) >= 1
        if due:
            self.saved = time.monotonic()
        return due

    def log(self, stage: str, step: int, **values):
        taken = (time.monotonic() - self.started) / max(1, step - self.begin)
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        print(f"[{stage}] {step}/{self.steps}  {numbers}  ({taken:.3f} s/step)", flush=True)


def described(seed: int) -> scenes.Scene:
    return scenes.sample_scene(np.random.default_rng(seed))


def drawn(seed: int) -> np.ndarray:
    return np.asarray(scenes.draw_scene(described(seed)).picture)


# --- stages ------------------------------------------------------------------------------------------------------


def train_vae(args, pictures, device):
    from diffusers import AutoencoderKL

    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.vae_from) if args.vae_from else AutoencoderKL(**training.VAE_CONFIG)
    vae = vae.to(device, torch.float32, memory_format=torch.channels_last)
    average = copy.deepcopy(vae).requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    stage = Stage(args.work, "vae", model=vae, average=average, optimizer=optimizer)
    begin = stage.resume()
    clock, crop = Clock(begin, args.vae_steps, None), 64
    for step in range(begin, args.vae_steps):
        rng = np.random.default_rng((args.seed, 1, step))
        index = rng.integers(len(pictures), size=args.vae_batch)
        corner = rng.integers(scenes.SIZE - crop + 1, size=(args.vae_batch, 2))
        batch = np.stack([pictures[i, y : y + crop, x : x + crop] for i, (y, x) in zip(index, corner)])
        batch = to_model_range(batch, device).contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, clock.progress(step), 2e-3)
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
        take_average(average, vae, step, 0.998)
        if (step + 1) % 100 == 0:
            clock.log("vae", step + 1, psnr=-10 * math.log10(squared.item() / 4), kl=kl.item())
        if clock.is_due(step + 1):
            stage.save(step + 1)
    return average.eval()


def autocast(device):
    """bfloat16 on a GPU; on a CPU it gains nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")


Classifier = functools.partial(
    training.Classifier, len(scenes.SEEN_KINDS), len(scenes.SEEN_COLOURS), sizes=(3, 24, 48, 64), hidden=96
)
"""The network of the judge."""


def classifier_sample(seed: int):
    """A crop, and the indices of kind and colour; a fifth are places where something was and is no more."""
    rng = np.random.default_rng(seed)
    scene = scenes.sample_scene(rng)
    while not scene.parts:
        scene = scenes.sample_scene(rng)
    which = int(rng.integers(len(scene.parts)))
    part, drawing = scene.parts[which], scenes.draw_scene(scene)
    mask = drawing.subject[which]
    kind, colour = part.kind, getattr(part, "colour", None)
    if rng.random() < 0.2:
        drawing, kind, colour = scenes.draw_scene(scene.without(which)), "nothing", None
    pixels = training.worsened(drawing.picture, rng)
    crop = scene_classifier.object_crop(pixels, mask, rng.uniform(-5, 5, 2), rng.uniform(0.85, 1.2))
    return crop, scenes.SEEN_KINDS.index(kind), scenes.SEEN_COLOURS.index(colour or "none")


def caption(scene: scenes.Scene, rng: np.random.Generator) -> str:
    """A scene's caption, some without parts: that teaches partial and empty prompts."""
    fate = rng.random()
    phrases, background = [part.phrase for part in scene.parts], scene.background
    if fate < 0.10:
        phrases, background = [], None
    elif fate < 0.25 and phrases:
        background = None
    elif fate < 0.32:  # without colours
        phrases = [
            scenes.with_article(part.kind) if isinstance(part, scenes.Item) else part.phrase for part in scene.parts
        ]
    elif fate < 0.40 and phrases:  # nouns alone
        names = [part.kind if isinstance(part, scenes.Item) else scenes.PLURALS[part.kind] for part in scene.parts]
        phrases, background = names, None if fate < 0.36 else background
    return scenes.caption_of(phrases, background)


def train_unet(args, tokenizer, moments, seeds, scaling_factor, device):
    from diffusers import DDIMScheduler

    torch.manual_seed(args.seed)
    model = training.build_denoiser(tokenizer, UNET_CONFIG, device)
    average = copy.deepcopy(model).requires_grad_(False)
    peak = args.learning_rate
    optimizers = training.optimizers_of(model, peak)
    stage = Stage(args.work, "unet", model=model, average=average, **optimizers)
    begin = stage.resume()
    unet = torch.compile(model["unet"]) if args.compile else model["unet"]
    alphas = DDIMScheduler(**training.NOISE_SCHEDULE).alphas_cumprod.to(device)
    tokens = training.Tokens(tokenizer, scenes.vocabulary())
    pictured = [described(seed) for seed in seeds]
    clock, recent = Clock(begin, args.unet_steps, args.unet_minutes), []
    if device.type != "cpu":
        moments = torch.from_numpy(moments).to(device)
    stream = torch.Generator(device)
    for step in range(begin, args.unet_steps):
        progress = clock.progress(step)
        if progress >= 1:
            break
        rng = np.random.default_rng((args.seed, 2, step))
        stream.manual_seed(int(rng.integers(2**62)))
        index = rng.integers(len(moments), size=args.unet_batch)
        drawn_moments = torch.from_numpy(moments[index]) if device.type == "cpu" else moments[torch.from_numpy(index)]
        mean, logvar = drawn_moments.float().chunk(2, 1)
        draws = torch.randn((2, *mean.shape), generator=stream, device=device)
        latents = (mean + torch.exp(0.5 * logvar) * draws[0]) * scaling_factor
        # One timestep from each of as many equal strata: less variance than independent draws.
        strata = (rng.permutation(args.unet_batch) + rng.random(args.unet_batch)) / args.unet_batch
        t = torch.from_numpy((strata * 1000).astype(np.int64)).to(device)
        a = alphas[t].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * latents + (1 - a).sqrt() * draws[1]).contiguous(memory_format=torch.channels_last)
        ids = torch.tensor([tokens.of(caption(pictured[i], rng)) for i in index], device=device)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, progress, peak)
        with autocast(device):
            prompt = model["text"](ids)[0]
            predicted = unet(noisy, t, encoder_hidden_states=prompt).sample
        errors = (predicted.float() - draws[1]).square().mean((1, 2, 3))
        # Min-SNR: what little noise is left in nearly clean latents takes no more than its share of a small model.
        snr = (a / (1 - a)).flatten()
        loss = (errors * snr.clamp(max=MIN_SNR) / snr).mean()
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        take_average(average, model, step, 0.9995)
        recent.append(torch.stack([errors.detach().mean(), loss.detach()]))
        if (step + 1) % 100 == 0:
            plain, weighted = torch.stack(recent).mean(0).tolist()
            recent = []
            clock.log("unet", step + 1, loss=weighted, unweighted=plain)
        if clock.is_due(step + 1):
            stage.save(step + 1)
    if begin < args.unet_steps:
        stage.save(step + 1)
    return average.eval()


def main():
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the stages' states")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--classifier", type=Path, default=here / "scene_classifier.safetensors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that draw scenes")
    parser.add_argument("--pictures", type=int, default=40_000)
    parser.add_argument("--vae-steps", type=int, default=4_000)
    parser.add_argument("--vae-from", metavar="FOLDER", help="begin with these weights of the same layout")
    parser.add_argument("--vae-batch", type=int, help="default: 16, on a GPU 64")
    parser.add_argument("--unet-steps", type=int, help="default: what 3.2 million samples take")
    parser.add_argument("--unet-minutes", type=float, help="end after so many minutes, if the steps take longer")
    parser.add_argument("--unet-batch", type=int, help="default: 64, on a GPU 512")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet")
    parser.add_argument(
        "--stages",
        default="vae,latents,classifier,unet,export",
        help="comma-separated; earlier stages are read from WORKDIR",
    )
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    is_gpu = args.device != "cpu"
    args.vae_batch = args.vae_batch or (64 if is_gpu else 16)
    args.unet_batch = args.unet_batch or (512 if is_gpu else 64)
    device, stages = torch.device(args.device), args.stages.split(",")
    args.unet_steps = (args.unet_steps or 3_200_000 // args.unet_batch) if "unet" in stages else 0

    tokenizer = training.make_tokenizer(args.work / "tokenizer", scenes.vocabulary())
    seeds = [args.seed * 1_000_003 + i for i in range(args.pictures)]
    pictures = training.training_pictures(args.work, seeds, drawn, args.workers)
    if "classifier" in stages:
        amount = dict(train=22_000, steps=2_400, seed=args.seed, device=device, workers=args.workers)
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
            for name, scene in EXAMPLES.items():
                scenes.draw_scene(scene).picture.save(args.output.parent / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
