"""Masks that follow the picture's edges: the filter against its definition, and what it is for."""

import numpy as np
import pytest

from mindiffedit import masks
from mindiffedit.errors import InputError
from mindiffedit.images import edges
from mindiffedit.masks import MaskOptions
from mindiffedit.options import NumericalError


def defined(share, guide, radius, contrast):
    """The filter by its definition: a least-squares problem in every window, the mean of all that a latent is in."""
    height, width, channels = guide.shape
    pad = 2 * radius
    wide = np.pad(share, pad, mode="edge")
    wide_guide = np.pad(guide, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    fits = {}
    for row in range(height):
        for column in range(width):
            window = (slice(row + radius, row + 3 * radius + 1), slice(column + radius, column + 3 * radius + 1))
            x, y = wide_guide[window].reshape(-1, channels), wide[window].ravel()
            # The penalty as further rows; the offset is free.
            weight = np.sqrt(len(y)) * contrast
            rows = np.vstack([np.c_[x, np.ones(len(x))], np.c_[weight * np.eye(channels), np.zeros(channels)]])
            fits[row, column] = np.linalg.lstsq(rows, np.r_[y, np.zeros(channels)], rcond=None)[0]
    result = np.empty_like(share)
    around = range(-radius, radius + 1)
    for row in range(height):
        for column in range(width):
            near = [
                fits[min(max(row + i, 0), height - 1), min(max(column + j, 0), width - 1)]
                for i in around
                for j in around
            ]
            slope = np.mean(near, axis=0)
            result[row, column] = slope[:-1] @ guide[row, column] + slope[-1]
    return result


@pytest.mark.parametrize("channels, radius, contrast", [(3, 1, 0.05), (3, 2, 0.3), (4, 2, 0.1), (1, 3, 0.02)])
def test_the_filter_is_its_definition(channels, radius, contrast):
    rng = np.random.default_rng(radius)
    share, guide = rng.random((9, 12)), rng.random((9, 12, channels))
    found = edges.follow_edges(share, guide, radius, contrast)
    assert np.allclose(found, defined(share, guide, radius, contrast), atol=1e-12)


def scene(background=0.5, colour=0.9):
    """A grey picture with a square of another shade, the square, and a blurred map that lies beside it."""
    inside = np.zeros((32, 32), bool)
    inside[10:22, 8:20] = True
    picture = np.where(inside, colour, background)
    picture = np.repeat(np.repeat(picture, 4, 0), 4, 1)[None, None].repeat(3, 1)
    y, x = np.mgrid[:32, :32]
    beside = np.exp(-((y - 17) ** 2 + (x - 15.5) ** 2) / 60)
    return 2 * picture - 1, inside, beside.astype(np.float32)[None]


def overlap(mask, truth):
    return (mask.astype(bool) & truth).sum() / (mask.astype(bool) | truth).sum()


def test_a_mask_ends_where_the_picture_has_an_edge():
    pixels, inside, maps = scene()
    guides = edges.guides_of(pixels, (32, 32))
    plain = masks.mask_of(maps, 3.0)[0]
    followed = masks.mask_of(maps, 3.0, MaskOptions(edges=6, edge_contrast=0.03), guides=guides)[0]
    assert overlap(plain, inside) < 0.85 and overlap(followed, inside) > 0.95


def test_without_an_edge_the_mask_stays_where_the_map_is():
    pixels, inside, maps = scene(colour=0.501)
    guides = edges.guides_of(pixels, (32, 32))
    plain = masks.mask_of(maps, 3.0)[0]
    followed = masks.mask_of(maps, 3.0, MaskOptions(edges=2), guides=guides)[0]
    assert overlap(followed, plain.astype(bool)) > 0.85
    blurred = masks.mask_of(np.full((1, 8, 8), 2, np.float32), 0.5, MaskOptions(edges=3), guides=np.ones((1, 8, 8, 3)))
    assert blurred.all(), "what is the same everywhere stays as it is"


def test_guides_are_the_mean_colours_of_the_latents_squares():
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 24)).astype(np.float32)
    guides = edges.guides_of(pixels, (4, 6))
    assert guides.shape == (2, 4, 6, 3)
    assert np.isclose(guides[1, 2, 5, 0], (pixels[1, 0, 8:12, 20:24].mean(dtype=np.float64) + 1) / 2)


def test_latents_are_guides_of_any_scale():
    latents = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
    guides = edges.guides_of(latents, (8, 8))
    assert guides.shape == (2, 8, 8, 4) and np.allclose(guides.std((1, 2, 3)), 0.25)
    assert np.allclose(edges.guides_of(7 * latents, (8, 8)), guides, atol=1e-6)
    assert not edges.guides_of(np.zeros_like(latents), (8, 8)).any()


def test_one_guide_serves_all_maps_and_each_has_its_own():
    pixels, _, maps = scene()
    guides = edges.guides_of(pixels, (32, 32))
    chosen = MaskOptions(edges=4)
    two = np.concatenate([maps, maps[:, :, ::-1]])
    both = masks.mask_of(two, options=chosen, per_image=True, guides=guides)
    turned = masks.mask_of(two, options=chosen, per_image=True, guides=np.concatenate([guides, guides[:, :, ::-1]]))
    assert np.array_equal(both[0], turned[0]) and np.array_equal(turned[1], turned[0][:, ::-1])
    assert not np.array_equal(both[1], turned[1])


def test_guides_that_do_not_fit():
    maps, chosen = scene()[2], MaskOptions(edges=4)
    for guides, words in (
        (None, "guides_of"),
        (np.ones((1, 8, 8, 3)), "(1, 8, 8, 3)"),
        (np.ones((2, 32, 32, 3)), "(1, 32, 32, C)"),
        (np.ones((32, 32, 3)), "(32, 32, 3)"),
    ):
        with pytest.raises(InputError) as caught:
            masks.mask_of(maps, options=chosen, guides=guides)
        assert words in str(caught.value) and "`guides`" in str(caught.value)
    with pytest.raises(NumericalError, match="guide"):
        masks.mask_of(maps, options=chosen, guides=np.full((1, 32, 32, 3), np.nan))
