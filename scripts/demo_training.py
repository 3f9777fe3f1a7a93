"""What ``train_demo_checkpoint.py`` is made of: layouts, tokenizer, optimizers, stages on disk, judge, export."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_scenes import SIZE

MAX_TOKENS = 32
START, END = "<|startoftext|>", "<|endoftext|>"

VAE_CONFIG = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    sample_size=SIZE,
    norm_num_groups=8,
    block_out_channels=(16, 32, 64),
    layers_per_block=1,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
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


def make_tokenizer(folder: Path, words: list[str]):
    """Writes vocabulary and merges to ``folder``; returns the CLIPTokenizer of them, to which each word is a token."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    symbols = byte_symbols()
    merges = learn_merges(words)
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
    for word in words:
        assert len(tokenizer.tokenize(word)) == 1, word
    return tokenizer


class Tokens:
    """Token ids of captions, which are made of known words."""

    def __init__(self, tokenizer, words: list[str]):
        self.ids = {word: tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word))[0] for word in words}
        self.start, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id

    def of(self, caption: str) -> list[int]:
        """``MAX_TOKENS`` ids: the start, a word each, and ends."""
        ids = [self.start] + [self.ids[word] for word in caption.split()]
        return ids + [self.end] * (MAX_TOKENS - len(ids))


# --- training ----------------------------------------------------------------------------------------------------


class Stage:
    """State of one stage on disk: written whole, read back to resume.

    Args:
        work: the folder.
        name: of the stage.
        parts: models and optimizers by name, whose states are kept.
    """

    def __init__(self, work: Path, name: str, **parts):
        self.path, self.parts = work / f"{name}.pt", parts

    def resume(self) -> int:
        """Gives the parts the state on disk, if there is one; returns the steps that are done."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        return state["step"]

    def save(self, step: int) -> None:
        partial = self.path.with_suffix(".partial")
        torch.save({**{name: part.state_dict() for name, part in self.parts.items()}, "step": step}, partial)
        os.replace(partial, self.path)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before each step (Jordan, 2024), for weights of two or more axes.

    A UNet of this size learns from half as many samples as with AdamW. ``torch.optim.Muon`` takes matrices alone;
    most of a UNet's weights are convolutions, which here are matrices of (outputs, inputs x height x width). Steps
    are scaled to the size of AdamW's (Liu et al., 2025), so one learning rate suits both.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                matrix = weight.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                update = orthogonal(matrix).mul_(0.2 * math.sqrt(max(matrix.shape)))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(update.view_as(weight), alpha=group["lr"])


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Nearly the orthogonal factor of a matrix: five Newton-Schulz steps bring its singular values to about 1."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T.contiguous()
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def optimizers_of(denoiser, lr: float) -> dict[str, torch.optim.Optimizer]:
    """Muon for what multiplies features with features; AdamW for tables, norms, biases, first and last layers."""
    outer = ("embedding", "conv_in", "conv_out")
    inner = {
        name: weight
        for name, weight in denoiser.named_parameters()
        if weight.ndim >= 2 and not any(word in name for word in outer)
    }
    others = [weight for name, weight in denoiser.named_parameters() if name not in inner]
    return {
        "muon": Muon(inner.values(), lr, weight_decay=1e-3),
        "adamw": torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3),
    }


def learning_rate(step: int, progress: float, peak: float, warmup: int = 200, decay: float = 0.25) -> float:
    """Short warm-up, constant, and a linear fall over the last quarter: a run can be lengthened before the fall.

    ``progress``: share of the whole training that is done, 0 to 1.
    """
    return peak * min(1.0, (step + 1) / warmup, max((1 - progress) / decay, 0.0))


def take_average(average, model, step: int, decay: float) -> None:
    """Moves the averaged weights towards the model's, faster at the beginning."""
    keep = min(decay, (step + 1) / (step + 20))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)


def training_pictures(work: Path, seeds: Sequence[int], draw: Callable[[int], np.ndarray], workers: int | None):
    """A picture (S, S, 3) for each seed, as one uint8 array (N, S, S, 3); drawn once by processes, kept in ``work``."""
    path = work / f"pictures-{len(seeds)}-{seeds[0]}.npy"
    if not path.exists():
        print(f"[pictures] drawing {len(seeds)} scenes", flush=True)
        pictures = np.empty((len(seeds), SIZE, SIZE, 3), np.uint8)
        with Pool(workers) as pool:
            for i, picture in enumerate(pool.imap(draw, seeds, chunksize=64)):
                pictures[i] = picture
        _save_array(path, pictures)
    return np.load(path, mmap_mode="r")


def _save_array(path: Path, array: np.ndarray) -> None:
    np.save(str(path) + ".partial.npy", array)
    os.replace(str(path) + ".partial.npy", path)


def to_model_range(pictures: np.ndarray, device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode_all(work: Path, vae, pictures, device, autocast: Callable):
    """Posterior mean and log-variance of every picture, float16 (N, 8, 32, 32), and the scaling factor."""
    path = work / "latents.npy"
    if not path.exists():
        moments = np.empty((len(pictures), 8, 32, 32), np.float16)
        for i in range(0, len(pictures), 64):
            batch = to_model_range(pictures[i : i + 64], device).contiguous(memory_format=torch.channels_last)
            with autocast(device):
                posterior = vae.encode(batch).latent_dist
            moments[i : i + 64] = torch.cat([posterior.mean, posterior.logvar], 1).float().cpu().numpy()
            if i % 6400 == 0:
                print(f"[latents] {i}/{len(pictures)}", flush=True)
        _save_array(path, moments)
    moments = np.load(path)
    return moments, float(1 / moments[:2000, :4].astype(np.float32).std())


def build_denoiser(tokenizer, unet_config: dict, device):
    """UNet and text encoder, to be trained together, as a ModuleDict of ``unet`` and ``text``."""
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
    unet = UNet2DConditionModel(**unet_config).to(memory_format=torch.channels_last)
    # At these sizes the plain formula is several times faster on a CPU than the fused kernel's backward pass.
    unet.set_attn_processor(AttnProcessor())
    return torch.nn.ModuleDict({"unet": unet, "text": CLIPTextModel(config)}).to(device)


def export(folder: Path, tokenizer, vae, denoiser, scaling_factor: float) -> None:
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
    pipeline.save_pretrained(str(folder), safe_serialization=True)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"[export] {folder}: {size / 1e6:.1f} MB", flush=True)


# --- the judge ---------------------------------------------------------------------------------------------------


class Classifier(torch.nn.Module):
    """The network of ``scene_classifier``, for training: logits of kind and colour from (B, 3, 48, 48) in [-1, 1].

    Args:
        kinds, colours: how many there are.
        sizes: channels of the picture and of each convolution.
        hidden: of the layer after them.
    """

    def __init__(self, kinds: int, colours: int, sizes: Sequence[int], hidden: int):
        super().__init__()
        self.convs = torch.nn.ModuleList(
            torch.nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(sizes, sizes[1:])
        )
        self.hidden = torch.nn.Linear(sizes[-1] * 36, hidden)
        self.kind = torch.nn.Linear(hidden, kinds)
        self.colour = torch.nn.Linear(hidden, colours)

    def forward(self, x):
        for conv in self.convs:
            x = F.relu(conv(x))
        x = F.relu(self.hidden(x.flatten(1)))
        return self.kind(x), self.colour(x)


def worsened(picture, rng: np.random.Generator) -> np.ndarray:
    """A picture's pixels, uint8, some blurred and some with soft noise, as edited ones are."""
    from PIL import Image, ImageFilter

    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.8)))
    pixels = np.asarray(picture)
    if rng.random() < 0.5:
        coarse = rng.normal(0, 1, (32, 32, 3)).astype(np.float32) * rng.uniform(0, 14)
        fine = np.stack([np.asarray(Image.fromarray(coarse[..., c]).resize((SIZE, SIZE))) for c in range(3)], -1)
        pixels = np.clip(pixels + fine, 0, 255).astype(np.uint8)
    return pixels


def train_classifier(
    path: Path,
    build: Callable[[], Classifier],
    sample: Callable[[int], tuple],
    *,
    train: int,
    steps: int,
    seed: int,
    device,
    workers: int | None,
) -> None:
    """Trains the judge unless its file is there: ``steps`` batches of 128 of the first ``train`` samples.

    ``sample`` gives crop, kind and colour for a seed; 2,000 further ones say how often the judge is right.
    """
    from safetensors.torch import save_file

    if path.exists():
        return
    torch.manual_seed(seed)
    with Pool(workers) as pool:
        samples = list(pool.imap(sample, range(10**9, 10**9 + train + 2_000), chunksize=64))
    crops = to_model_range(np.stack([s[0] for s in samples]), device)
    kinds = torch.tensor([s[1] for s in samples], device=device)
    colours = torch.tensor([s[2] for s in samples], device=device)
    model = build().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    for step in range(steps):
        pick = torch.from_numpy(np.random.default_rng((seed, 3, step)).integers(train, size=128))
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
    partial = path.with_suffix(".partial")
    save_file(
        {k: v.contiguous().cpu() for k, v in model.state_dict().items()},
        str(partial),
        {k: f"{v:.4f}" for k, v in scores.items()},
    )
    os.replace(partial, path)
