"""The VAE in tiles: cutting and blending by themselves, then encoder and decoder against diffusers'."""

import copy
import types

import numpy as np
import parity
import pytest
import torch
from diffusers import AutoencoderKL

from mindiffedit import StableDiffusionDiffEditPipeline, demo
from mindiffedit.arrays import to_numpy
from mindiffedit.images import tiling
from mindiffedit.runtime import devices

FACTOR = 8
# In latents, with tiles of 8: whole tiles, a last one of any length, the last but one cut too, smaller than a tile in
# one direction, and not cut.
SIZES = [(14, 20), (9, 12), (13, 8), (5, 9), (15, 3), (8, 8), (20, 33), (7, 26)]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# --- cutting and blending -----------------------------------------------------------------------------------------


class Shrunk(torch.nn.Module):
    """An "encoder" whose result depends on where the tile begins; exact in float32."""

    def forward(self, tile):
        return tile[..., ::FACTOR, ::FACTOR] * 2 + tile[..., :1, :1]


class Grown(torch.nn.Module):
    """The same for a "decoder"."""

    def forward(self, tile):
        grown = tile.repeat_interleave(FACTOR, 2).repeat_interleave(FACTOR, 3)
        return grown * 2 + tile[..., :1, :1]


def stand_in(overlap=0.25, latents=8):
    """diffusers' class with encoder and decoder replaced."""
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        sample_size=latents * FACTOR,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.encoder, vae.decoder = Shrunk(), Grown()
    vae.tile_overlap_factor = overlap
    vae.enable_tiling()
    return vae


def both_halves(vae, size):
    """Ours and diffusers' results for latents and for pixels of `size` latents, as pairs."""
    pairs = []
    shapes = (2, 3, size[0] * FACTOR, size[1] * FACTOR), (2, 4, *size)
    halves = (vae._encode, vae.encoder), (vae._decode, vae.decoder)
    for tiles, shape, (half, model) in zip(tiling.tiles_of(vae), shapes, halves):
        array = noise(*shape)
        expected = half(torch.from_numpy(array))

        def run(part, model=model):
            return model(torch.from_numpy(np.ascontiguousarray(part))).numpy()

        ours = tiling.in_tiles(run, array, tiles) if tiles.cut(shape) else run(array)
        pairs.append((ours, getattr(expected, "sample", expected).numpy()))
    return pairs


def test_tiles_are_diffusers_tiles():
    for overlap, latents in [(0.25, 8), (0.5, 8), (0, 8), (0.75, 4), (0.25, 4)]:
        vae = stand_in(overlap, latents)
        for size in SIZES:
            for ours, expected in both_halves(vae, size):
                assert ours.dtype == np.float32 and np.array_equal(ours, expected), (overlap, latents, size)


def test_nothing_is_written_into_the_input_or_the_model_s_result():
    array, results = noise(1, 4, 14, 20), []

    def model(part):
        results.append((part, part.copy()))
        return part

    tiles = tiling.Tiles(size=8, stride=6, blend=2, keep=6)
    given = array.copy()
    tiling.in_tiles(model, array, tiles)
    assert np.array_equal(array, given) and all(np.array_equal(*pair) for pair in results)


def shapes_of(tiles, *size):
    """The different shapes that the model is given."""
    seen = set()

    def model(part):
        seen.add(part.shape[2:])
        return part

    tiling.in_tiles(model, np.zeros((1, 1, *size), np.float32), tiles)
    return seen


def test_shapes_of_tiles():
    """There are as many graphs as the docstrings say."""
    encoder, decoder = tiling.tiles_of(stand_in(latents=64))
    assert encoder == tiling.Tiles(size=512, stride=384, blend=16, keep=48)
    assert decoder == tiling.Tiles(size=64, stride=48, blend=128, keep=384)
    assert decoder.cut((1, 4, 8, 65)) and decoder.cut((1, 4, 65, 8)) and not decoder.cut((1, 4, 64, 64))
    assert shapes_of(encoder, 768, 768) == {(512, 512), (512, 384), (384, 512), (384, 384)}
    assert shapes_of(encoder, 800, 512) == {(a, b) for a in (512, 416, 32) for b in (512, 128)}
    counts = [len(shapes_of(decoder, side, side)) for side in range(65, 300)]
    assert set(counts) == {4, 9} and counts.count(4) > counts.count(9)


def test_tiles_that_do_not_fit_are_refused():
    class Switch(types.SimpleNamespace):
        use_tiling = False

        def enable_tiling(self):
            self.use_tiling = True

    config = types.SimpleNamespace(block_out_channels=(4, 4, 4, 4))
    sizes = dict(tile_sample_min_size=64, tile_latent_min_size=8, tile_overlap_factor=0.25)
    for changes, sentence in (
        (dict(tile_sample_min_size=256), "is 256 pixels"),
        (dict(tile_latent_min_size=5), "5 latents"),
        (dict(tile_latent_min_size=5, tile_sample_min_size=40), "whole number of latents"),
        (dict(tile_overlap_factor=0.3), "0.3"),
        (dict(tile_overlap_factor=0.99), "0.99"),
        (dict(tile_overlap_factor=1.0), r"in \[0, 1\)"),
        (dict(tile_overlap_factor=-0.25), r"in \[0, 1\)"),
        (dict(tile_overlap_factor=float("nan")), "tile_overlap_factor"),
        (dict(tile_overlap_factor=False), "tile_overlap_factor"),
        (dict(tile_sample_min_size=[64, 64]), "tile_sample_min_size"),
        (dict(tile_latent_min_size=0), "tile_latent_min_size"),
    ):
        pipe = types.SimpleNamespace(vae=Switch(config=config, **{**sizes, **changes}))
        with pytest.raises((ValueError, TypeError), match=sentence):
            StableDiffusionDiffEditPipeline.enable_vae_tiling(pipe)
        assert not pipe.vae.use_tiling
    pipe.vae = Switch(config=config, **sizes)
    StableDiffusionDiffEditPipeline.enable_vae_tiling(pipe)
    assert pipe.vae.use_tiling


# --- the VAE ------------------------------------------------------------------------------------------------------


def our_pipeline(folder, mode):
    pipe = StableDiffusionDiffEditPipeline.from_pretrained(folder, mode=mode, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compared(stages, reference, shape):
    """Errors of both halves for pixels (B, 3, H, W), against diffusers in float64, in units of its own in float32."""
    exact = copy.deepcopy(reference).double()
    factor = 2 ** (len(reference.config.block_out_channels) - 1)
    pixels = noise(*shape).clip(-1, 1)
    latents = noise(shape[0], 4, shape[2] // factor, shape[3] // factor, seed=1)

    def encode(vae):
        return vae.encode(torch.from_numpy(pixels).to(vae.dtype)).latent_dist.parameters.numpy()

    def decode(vae):
        return vae.decode(torch.from_numpy(latents).to(vae.dtype)).sample.numpy()

    found = []
    for half, ours in ((encode, stages.encode_image(pixels)), (decode, stages.decode_latents(latents))):
        with torch.no_grad():
            expected = half(exact)
            floor = parity.relative(half(reference), expected)
        found.append(parity.relative(ours, expected) / floor)
    return found


@pytest.fixture(scope="module", params=["tiny", "demo"])
def vaes(request):
    """Folder and the reference's VAE with tiling, for the checkpoint of this name."""
    if request.param == "tiny":
        folder = request.getfixturevalue("sd1_folder")
    else:
        folder = demo.checkpoint_folder()
    reference = AutoencoderKL.from_pretrained(folder, subfolder="vae", low_cpu_mem_usage=False).eval()
    reference.enable_tiling()
    return folder, reference


def test_tiled_vae_equals_diffusers(vaes):
    """Operator by operator, where a size need not be compiled: the graphs get the same tiles."""
    folder, reference = vaes
    pipe = our_pipeline(folder, "pynative")
    pipe.enable_vae_tiling()
    unit = reference.tile_sample_min_size // 8
    sizes = [(9, 12), (13, 8), (5, 9), (7, 7)] if unit == 8 else [(9, 12)]  # the demo's VAE is the slower one
    errors = {size: compared(pipe._stages, reference, (1, 3, size[0] * unit, size[1] * unit)) for size in sizes}
    assert max(max(pair) for pair in errors.values()) <= 5, errors


@pytest.mark.parametrize("vaes", ["tiny", pytest.param("demo", marks=pytest.mark.slow)], indirect=True)
def test_compiled_tiles_equal_diffusers(vaes):
    folder, reference = vaes
    pipe = our_pipeline(folder, "graph")
    pipe.enable_vae_tiling()
    stages, unit = pipe._stages, reference.tile_sample_min_size // 8
    with devices.CompileCounter() as count:
        errors = compared(stages, reference, (2, 3, 6 * unit, 14 * unit))
    assert max(errors) <= 5, errors
    assert count.count == 4, "two shapes of tiles, two halves"
    assert stages.calls == {"encode": 2, "decode": 2}, "pictures, not tiles"
    with devices.CompileCounter() as count:
        stages.encode_image(noise(1, 3, 6 * unit, 14 * unit, seed=7).clip(-1, 1))
        stages.decode_latents(noise(3, 4, 6, 20, seed=7) if unit == 8 else noise(3, 4, 24, 80, seed=7))
    assert count.count == 0, "other pictures, and sizes with the same tiles, compile nothing"
    assert stages.calls == {"encode": 3, "decode": 5}


@pytest.mark.parametrize("vaes", ["tiny"], indirect=True)
def test_tiled_and_whole_are_told_apart(vaes):
    folder, reference = vaes
    pipe = our_pipeline(folder, "pynative")
    stages, pixels, small = pipe._stages, noise(1, 3, 72, 96).clip(-1, 1), noise(1, 3, 64, 48).clip(-1, 1)
    whole = stages.encode_image(pixels), stages.decode_latents(noise(1, 4, 9, 12)), stages.encode_image(small)
    pipe.enable_vae_tiling()
    tiled = stages.encode_image(pixels), stages.decode_latents(noise(1, 4, 9, 12)), stages.encode_image(small)
    for one, other in list(zip(whole, tiled))[:2]:
        assert one.shape == other.shape and parity.relative(one, other) > 1e-3
    assert np.array_equal(whole[2], tiled[2]) and stages.calls["encode"] == 3, "not larger than a tile"
    pipe.vae.tile_overlap_factor = 0.5
    assert parity.relative(stages.encode_image(pixels), tiled[0]) > 1e-3 and stages.calls["encode"] == 4
    pipe.vae.tile_overlap_factor = 0.25
    assert np.array_equal(stages.encode_image(pixels), tiled[0]) and stages.calls["encode"] == 4
    pipe.disable_vae_tiling()
    assert np.array_equal(stages.encode_image(pixels), whole[0]) and stages.calls["encode"] == 4
    assert np.array_equal(stages.decode_latents(noise(1, 4, 9, 12)), whole[1])


@pytest.mark.parametrize("vaes", ["tiny"], indirect=True)
def test_inversion_of_a_large_picture_in_tiles(vaes):
    """Both halves behind the public switch."""
    from diffusers import DDIMInverseScheduler, DDIMScheduler
    from diffusers import StableDiffusionDiffEditPipeline as Reference

    import mindiffedit

    folder, _ = vaes
    mine = our_pipeline(folder, "pynative")
    theirs = Reference.from_pretrained(folder, safety_checker=None, low_cpu_mem_usage=False)
    theirs.set_progress_bar_config(disable=True)
    mine.scheduler = mindiffedit.DDIMScheduler.from_config(mine.scheduler.config)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.inverse_scheduler = DDIMInverseScheduler.from_config(theirs.scheduler.config)
    arguments = dict(num_inference_steps=2, inpaint_strength=0.5, decode_latents=True, output_type="np")
    results = []
    for pipe, generator in ((mine, parity.TorchNoise(4)), (theirs, parity.torch_noise(4))):
        pipe.enable_vae_tiling()
        out = pipe.invert("a red apple", parity.picture(112, 72), generator=generator, **arguments)
        results.append((out.latents, out.images))
    for ours, expected in zip(*results):
        assert parity.relative(to_numpy(ours), expected) < 1e-4
