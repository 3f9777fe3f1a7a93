"""Trains the demo checkpoint from nothing: tokenizer, VAE, text encoder and UNet, and the evaluation classifier.

    python scripts/train_sprite_checkpoint.py --work .training --output FOLDER/checkpoint

The demo's next world: rendered objects in place of the drawn ones that the checkpoint in ``mindiffedit/demo`` knows.

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
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
import scene_classifier  # noqa: E402
import sprite_scenes as scenes  # noqa: E402

MAX_TOKENS = 32
MIN_SNR = 5.0
START, END = "<|startoftext|>", "<|endoftext|>"

VAE_CONFIG = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    sample_size=scenes.SIZE,
    norm_num_groups=8,
    block_out_channels=(16, 32, 64),
    layers_per_block=1,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
)
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
TEXT_CONFIG = dict(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=MAX_TOKENS,
    projection_dim=128,
    hidden_act="quick_gelu",
)
NOISE_SCHEDULE = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
    prediction_type="epsilon",
)

# The pictures that ship beside the checkpoint; mindiffedit.demo.EXAMPLES says what becomes of them.
EXAMPLES = {
    "fruits": scenes.Scene((scenes.Filling("bowl", "fruit", 64.0, 62.0, 102.0, seed=11),), "a wooden table", 5),
    "strawberries": scenes.Scene((scenes.Filling("bowl", "strawberry", 64.0, 62.0, 102.0, 3),), "a white cloth", 6),
    "cat": scenes.Scene((scenes.Item("cat", None, 62.0, 66.0, 76.0, 4.0),), "grass", 7),
    "car": scenes.Scene((scenes.Item("car", "red", 66.0, 68.0, 78.0, 0.0),), "sand", 8),
}


# --- tokenizer ---------------------------------------------------------------------------------------------------


def byte_symbols() -> list[str]:
    """CLIP's printable stand-ins for the 256 byte values, in its vocabulary's order."""
    from transformers.models.clip.tokenization_clip import bytes_to_unicode

    return list(bytes_to_unicode().values())


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until each of ``words`` is a single token."""
    split = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    merges = []
    while any(len(parts) > 1 for parts in split.values()):
        counts: dict[tuple[str, str], int] = {}
        for parts in split.values():
            for pair in zip(parts, parts[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(sorted(counts), key=lambda pair: counts[pair])
        merges.append(best)
        for word, parts in split.items():
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            split[word] = tuple(joined)
    return merges


def make_tokenizer(folder: Path):
    """Writes vocabulary and merges to ``folder`` and returns the CLIPTokenizer made of them."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    symbols = byte_symbols()
    merges = learn_merges(scenes.vocabulary())
    tokens = symbols + [s + "</w>" for s in symbols]
    tokens += [merged for merged in ("".join(m) for m in merges) if merged not in tokens]
    tokens = list(dict.fromkeys(tokens)) + [START, END]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=MAX_TOKENS,
    )
    for word in scenes.vocabulary():
        assert len(tokenizer.tokenize(word)) == 1, word
    return tokenizer


# --- helpers -----------------------------------------------------------------------------------------------------


class Stage:
    """State of one stage on disk: written whole, read back to resume."""

    def __init__(self, work: Path, name: str):
        self.path = work / f"{name}.pt"

    def load(self):
        return torch.load(self.path, map_location="cpu", weights_only=True) if self.path.exists() else None

    def save(self, state):
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)


def learning_rate(step: int, progress: float, peak: float, warmup: int = 200, decay: float = 0.25) -> float:
    """Short warm-up, constant, and a linear fall over the last quarter: a run can be lengthened before the fall.

    ``progress``: share of the whole training that is done, 0 to 1.
    """
    return peak * min(1.0, (step + 1) / warmup, max((1 - progress) / decay, 0.0))


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


def drawn(seed: int) -> tuple[scenes.Scene, np.ndarray]:
    scene = scenes.sample_scene(np.random.default_rng(seed))
    return scene, np.asarray(scenes.draw_scene(scene).picture)


def training_pictures(work: Path, count: int, seed: int, workers: int):
    """``count`` scenes as uint8 pictures (count, S, S, 3) and their descriptions; drawn once, kept in WORKDIR."""
    from multiprocessing import Pool

    path = work / f"pictures-{count}-{seed}.npy"
    seeds = [seed * 1_000_003 + i for i in range(count)]
    if not path.exists():
        print(f"[pictures] drawing {count} scenes", flush=True)
        pictures = np.empty((count, scenes.SIZE, scenes.SIZE, 3), np.uint8)
        with Pool(workers) as pool:
            for i, (_, picture) in enumerate(pool.imap(drawn, seeds, chunksize=64)):
                pictures[i] = picture
        np.save(str(path) + ".partial.npy", pictures)
        os.replace(str(path) + ".partial.npy", path)
    described = [scenes.sample_scene(np.random.default_rng(s)) for s in seeds]
    return np.load(path, mmap_mode="r"), described


def to_model_range(pictures: np.ndarray, device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- stages ------------------------------------------------------------------------------------------------------


def train_vae(args, pictures, device):
    from diffusers import AutoencoderKL

    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.vae_from) if args.vae_from else AutoencoderKL(**VAE_CONFIG)
    vae = vae.to(device, torch.float32, memory_format=torch.channels_last)
    average = copy.deepcopy(vae).requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    stage = Stage(args.work, "vae")
    state, begin = stage.load(), 0
    if state is not None:
        vae.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["step"]
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
            stage.save({**states(model=vae, average=average, optimizer=optimizer), "step": step + 1})
    return average.eval()


def states(**parts) -> dict:
    return {name: part.state_dict() for name, part in parts.items()}


def take_average(average, model, step: int, decay: float) -> None:
    """Moves the averaged weights towards the model's, faster at the beginning."""
    keep = min(decay, (step + 1) / (step + 20))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)


def autocast(device):
    """bfloat16 on a GPU; on a CPU it gains nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")


@torch.no_grad()
def encode_all(args, vae, pictures, device):
    """Posterior mean and log-variance of every picture, float16 (N, 8, 32, 32), and the scaling factor."""
    path = args.work / "latents.npy"
    if not path.exists():
        moments = np.empty((len(pictures), 8, 32, 32), np.float16)
        for i in range(0, len(pictures), 64):
            batch = to_model_range(pictures[i : i + 64], device).contiguous(memory_format=torch.channels_last)
            with autocast(device):
                posterior = vae.encode(batch).latent_dist
            moments[i : i + 64] = torch.cat([posterior.mean, posterior.logvar], 1).float().cpu().numpy()
            if i % 6400 == 0:
                print(f"[latents] {i}/{len(pictures)}", flush=True)
        np.save(str(path) + ".partial.npy", moments)
        os.replace(str(path) + ".partial.npy", path)
    moments = np.load(path)
    return moments, float(1 / moments[:2000, :4].astype(np.float32).std())


class Classifier(torch.nn.Module):
    """The network of ``scene_classifier``, for training: logits of kind and colour from (B, 3, 48, 48) in [-1, 1]."""

    def __init__(self):
        super().__init__()
        sizes = (3, 24, 48, 64)
        self.convs = torch.nn.ModuleList(
            torch.nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(sizes, sizes[1:])
        )
        self.hidden = torch.nn.Linear(64 * 36, 96)
        self.kind = torch.nn.Linear(96, len(scenes.SEEN_KINDS))
        self.colour = torch.nn.Linear(96, len(scenes.SEEN_COLOURS))

    def forward(self, x):
        for conv in self.convs:
            x = F.relu(conv(x))
        x = F.relu(self.hidden(x.flatten(1)))
        return self.kind(x), self.colour(x)


def classifier_sample(seed: int):
    """A crop, and the indices of kind and colour; a fifth are places where something was and is no more."""
    from PIL import Image, ImageFilter

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
    picture = drawing.picture
    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.8)))
    pixels = np.asarray(picture)
    if rng.random() < 0.5:
        coarse = rng.normal(0, 1, (32, 32, 3)).astype(np.float32) * rng.uniform(0, 14)
        fine = np.stack([np.asarray(Image.fromarray(coarse[..., c]).resize((scenes.SIZE,) * 2)) for c in range(3)], -1)
        pixels = np.clip(pixels + fine, 0, 255).astype(np.uint8)
    crop = scene_classifier.object_crop(pixels, mask, rng.uniform(-5, 5, 2), rng.uniform(0.85, 1.2))
    return crop, scenes.SEEN_KINDS.index(kind), scenes.SEEN_COLOURS.index(colour or "none")


def train_classifier(args, device):
    from multiprocessing import Pool

    from safetensors.torch import save_file

    target = args.classifier
    if target.exists():
        return
    torch.manual_seed(args.seed)
    train, steps = 22_000, 2_400
    with Pool(args.workers) as pool:
        samples = list(pool.imap(classifier_sample, range(10**9, 10**9 + train + 2_000), chunksize=64))
    crops = to_model_range(np.stack([s[0] for s in samples]), device)
    kinds = torch.tensor([s[1] for s in samples], device=device)
    colours = torch.tensor([s[2] for s in samples], device=device)
    model = Classifier().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    for step in range(steps):
        pick = torch.from_numpy(np.random.default_rng((args.seed, 3, step)).integers(train, size=128))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, step / steps, 1e-3, 50)
        kind, colour = model(crops[pick])
        loss = F.cross_entropy(kind, kinds[pick]) + F.cross_entropy(colour, colours[pick])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        kind, colour = model(crops[train:])
    scores = {
        "kind_accuracy": (kind.argmax(1) == kinds[train:]).float().mean().item(),
        "colour_accuracy": (colour.argmax(1) == colours[train:]).float().mean().item(),
    }
    print("[classifier]", scores, flush=True)
    partial = target.with_suffix(".partial")
    save_file(
        {k: v.contiguous().cpu() for k, v in model.state_dict().items()},
        str(partial),
        {k: f"{v:.4f}" for k, v in scores.items()},
    )
    os.replace(partial, target)


class Captions:
    """Token ids of scenes' captions, with the dropping of words that teaches partial and empty prompts."""

    def __init__(self, tokenizer):
        self.ids = {w: tokenizer.convert_tokens_to_ids(tokenizer.tokenize(w))[0] for w in scenes.vocabulary()}
        self.start, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id

    def tokens(self, scene: scenes.Scene, rng: np.random.Generator) -> list[int]:
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
        words = scenes.caption_of(phrases, background).split()
        ids = [self.start] + [self.ids[w] for w in words]
        return ids + [self.end] * (MAX_TOKENS - len(ids))


def build_denoiser(tokenizer, device):
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **TEXT_CONFIG,
    )
    unet = UNet2DConditionModel(**UNET_CONFIG).to(memory_format=torch.channels_last)
    # At these sizes the plain formula is several times faster on a CPU than the fused kernel's backward pass.
    unet.set_attn_processor(AttnProcessor())
    return torch.nn.ModuleDict(
        {
            "unet": unet,
            "text": CLIPTextModel(config),
        }
    ).to(device)


def train_unet(args, tokenizer, moments, described, scaling_factor, device):
    from diffusers import DDIMScheduler

    torch.manual_seed(args.seed)
    model = build_denoiser(tokenizer, device)
    average = copy.deepcopy(model).requires_grad_(False)
    peak = args.learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-3)
    stage = Stage(args.work, "unet")
    state, begin = stage.load(), 0
    if state is not None:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["step"]
    unet = torch.compile(model["unet"]) if args.compile else model["unet"]
    alphas = DDIMScheduler(**NOISE_SCHEDULE).alphas_cumprod.to(device)
    captions = Captions(tokenizer)
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
        ids = torch.tensor([captions.tokens(described[i], rng) for i in index], device=device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress, peak)
        with autocast(device):
            prompt = model["text"](ids)[0]
            predicted = unet(noisy, t, encoder_hidden_states=prompt).sample
        errors = (predicted.float() - draws[1]).square().mean((1, 2, 3))
        # Min-SNR: what little noise is left in nearly clean latents takes no more than its share of a small model.
        snr = (a / (1 - a)).flatten()
        loss = (errors * snr.clamp(max=MIN_SNR) / snr).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        take_average(average, model, step, 0.9995)
        recent.append(torch.stack([errors.detach().mean(), loss.detach()]))
        if (step + 1) % 100 == 0:
            plain, weighted = torch.stack(recent).mean(0).tolist()
            recent = []
            clock.log("unet", step + 1, loss=weighted, unweighted=plain)
        if clock.is_due(step + 1):
            stage.save({**states(model=model, average=average, optimizer=optimizer), "step": step + 1})
    if begin < args.unet_steps:
        stage.save({**states(model=model, average=average, optimizer=optimizer), "step": step + 1})
    return average.eval()


def export(args, tokenizer, vae, denoiser, scaling_factor):
    """Writes the folder. float16 storage halves it; both libraries compute in float32 from it by default."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    vae.register_to_config(scaling_factor=round(scaling_factor, 6))
    pipeline = StableDiffusionPipeline(
        vae=vae.to("cpu", torch.float16),
        text_encoder=denoiser["text"].to("cpu", torch.float16),
        tokenizer=tokenizer,
        unet=denoiser["unet"].to("cpu", torch.float16),
        scheduler=DDIMScheduler(**NOISE_SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(str(args.output), safe_serialization=True)
    for name, scene in EXAMPLES.items():
        scenes.draw_scene(scene).picture.save(args.output.parent / f"{name}.png", optimize=True)
    size = sum(f.stat().st_size for f in args.output.rglob("*") if f.is_file())
    print(f"[export] {args.output}: {size / 1e6:.1f} MB", flush=True)


def main():
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the stages' states")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--classifier", type=Path, default=here / "sprite_classifier.safetensors")
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
    args.unet_steps = args.unet_steps or 3_200_000 // args.unet_batch
    device, stages = torch.device(args.device), args.stages.split(",")

    tokenizer = make_tokenizer(args.work / "tokenizer")
    pictures, described = training_pictures(args.work, args.pictures, args.seed, args.workers)
    if "classifier" in stages:
        train_classifier(args, device)
    if stages == ["classifier"]:
        return
    vae = train_vae(args, pictures, device)
    moments, scaling_factor = encode_all(args, vae, pictures, device)
    print(f"[latents] scaling factor {scaling_factor:.5f}", flush=True)
    if "unet" in stages or "export" in stages:
        denoiser = train_unet(args, tokenizer, moments, described, scaling_factor, device)
        if "export" in stages:
            export(args, tokenizer, vae, denoiser, scaling_factor)


if __name__ == "__main__":
    main()
