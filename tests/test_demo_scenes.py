"""scripts/demo_scenes.py: rendered scenes, their masks and captions."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import demo_scenes as scenes  # noqa: E402

pytestmark = pytest.mark.tools


def drawn_scenes(count=24):
    for seed in range(count):
        scene = scenes.sample_scene(np.random.default_rng(seed))
        assert scene == scenes.sample_scene(np.random.default_rng(seed)), "a seed names a scene"
        yield scene, scenes.draw_scene(scene)


def test_masks_are_where_the_objects_are():
    for scene, drawing in drawn_scenes():
        picture = np.asarray(drawing.picture, int)
        assert drawing.whole.shape == drawing.subject.shape == (len(scene.parts), scenes.SIZE, scenes.SIZE)
        covered = drawing.whole > 0.5
        assert (drawing.subject <= drawing.whole + 1e-6).all() and (not len(covered) or covered.sum(0).max() == 1)
        for i, part in enumerate(scene.parts):
            assert 300 < covered[i].sum() < scenes.SIZE**2 / 2 and (drawing.subject[i] > 0.5).sum() > 200
            rows, columns = np.nonzero(covered[i])
            assert np.abs(np.array([columns.mean(), rows.mean()]) - (part.x, part.y)).max() < part.size / 2
            # Without it the ground is there, and only near it has anything changed: its shadow.
            bare = np.asarray(scenes.draw_scene(scene.without(i)).picture, int)
            changed = np.abs(bare - picture).max(-1) > 8
            assert changed[covered[i]].mean() > 0.8
            far = np.abs(np.mgrid[0 : scenes.SIZE, 0 : scenes.SIZE][1] - part.x) > 0.5 * part.size + 22
            assert not changed[far].any()


def test_another_colour_or_content_changes_its_own_pixels_alone():
    seen = set()
    for scene, drawing in drawn_scenes(60):
        for i, part in enumerate(scene.parts):
            if isinstance(part, scenes.Filling):
                other = scene.replaced(i, kind="pear" if part.kind != "pear" else "lemon")
                allowed = drawing.whole[i] > 0
            elif part.colour and part.kind != "apple":  # the green one is another picture
                other = scene.replaced(i, colour=next(c for c in scenes.COLOURS if c != part.colour))
                allowed = drawing.whole[i] > 0
            else:
                continue
            seen.add(type(part))
            redrawn = scenes.draw_scene(other)
            allowed |= redrawn.whole[i] > 0
            changed = np.abs(np.asarray(redrawn.picture, int) - np.asarray(drawing.picture)).max(-1)
            inside = changed[drawing.subject[i] > 0.99]
            assert (inside > 8).mean() > 0.3
            shadows = 60 if isinstance(part, scenes.Filling) else 0  # other fruits cast others
            assert changed[~allowed].max(initial=0) <= shadows
    assert len(seen) == 2


def test_captions_are_made_of_the_vocabulary():
    words = set(scenes.vocabulary())
    captions = {scene.caption for scene, _ in drawn_scenes(40)}
    assert len(captions) > 30
    for caption in captions:
        assert set(caption.split()) <= words, caption
