"""The animated strip: what it keeps, what its frames show, and when it writes nothing."""

import contextlib
import os
import types

import numpy as np
import PIL.Image
import pytest
from test_pipeline import PICTURE, SOURCE, TARGET, our_pipeline

from mindiffedit import AnimatedStrip
from mindiffedit.images import strips

GAP = 6  # pixels between tiles of 256 pixels


class Pipeline:
    """Shows arrays like those of an edit of two pictures to whoever watches."""

    vae_scale_factor = 8
    vae = types.SimpleNamespace(config=types.SimpleNamespace(scaling_factor=0.5))

    def __init__(self):
        self.viewers = []
        self.decoded = []
        self._stages = types.SimpleNamespace(decode_latents=self._decode)

    def _decode(self, latents):
        """Flat colours, by the mean of each of the first channels."""
        self.decoded.append(latents)
        colours = latents[:, :3].mean(axis=(2, 3), keepdims=True)
        return np.broadcast_to(colours, (len(latents), 3, latents.shape[2] * 8, latents.shape[3] * 8))

    @contextlib.contextmanager
    def debugging(self, view):
        self.viewers.append(view)
        yield self
        self.viewers.remove(view)

    def show(self, stage, array, step=None):
        for view in self.viewers:
            view(stage, array, step)

    def edit(self, steps=4, mask=True, clean=True):
        if mask:
            seen = np.stack([np.tile(np.float32([0, 1, 2, 3]), (3, 1)), np.zeros((3, 4), np.float32)])
            self.show("map", seen)
            self.show("clamp_magnitude", np.float32([2.5, 1]).reshape(2, 1, 1))
            self.show("mask", (seen > 1).astype(np.int64))
        for stage in ("inverted_latents", "edited_latents"):
            self.show("timesteps", np.arange(steps))
            for step in range(steps):
                latents = np.full((2, 4, 3, 4), 0.1 * step, np.float32)
                latents[1] = 9
                if clean:
                    self.show("clean_predictions", -latents, step)
                self.show(stage, latents, step)


def frames(path):
    with PIL.Image.open(path) as picture:
        for i in range(getattr(picture, "n_frames", 1)):
            picture.seek(i)
            yield np.asarray(picture.convert("RGB")), picture.info.get("duration")


@pytest.fixture
def captions(monkeypatch):
    """The captions of every frame."""
    seen = []
    original = strips.sheets.labelled_grid

    def labelled_grid(items, **how):
        seen.append([caption for caption, _ in items])
        return original(items, **how)

    monkeypatch.setattr(strips.sheets, "labelled_grid", labelled_grid)
    return seen


@pytest.mark.parametrize("extension, format_", [(".gif", "GIF"), (".png", "PNG"), (".webp", "WEBP")])
def test_an_animation_of_every_step(tmp_path, captions, extension, format_):
    pipeline = Pipeline()
    path = tmp_path / f"strip{extension}"
    with AnimatedStrip(pipeline, path, milliseconds=130):
        pipeline.edit()
    shown = list(frames(path))
    assert PIL.Image.open(path).format == format_ and len(shown) == 8
    assert all(duration == 130 for _, duration in shown)
    assert captions[0] == [
        "map", "mask", "inversion, step 1 of 4: latents", "inversion, step 1 of 4: predicted picture",
    ]  # fmt: skip
    assert captions[5][2:] == ["edit, step 2 of 4: latents", "edit, step 2 of 4: predicted picture"]
    assert not pipeline.viewers and os.listdir(tmp_path) == [path.name]


def test_what_the_tiles_show(tmp_path):
    """Of the first picture: the map under its clamp, the mask, and both latents through the VAE."""
    pipeline = Pipeline()
    with AnimatedStrip(pipeline, tmp_path / "strip.png"):
        pipeline.edit()
    *_, (last, _) = frames(tmp_path / "strip.png")
    # Four tiles of 256 x 192 (32 x 24 pixels, enlarged by eight), under the captions.
    tiles = np.split(last[-192 - GAP : -GAP, GAP:], 4, axis=1)
    assert tiles[0].shape[1] == 256 + GAP
    columns = [[int(tile[100, 32 + 64 * i, 0]) for i in range(4)] for tile in tiles]
    assert columns[0] == [round(255 * min(value / 2.5, 1)) for value in range(4)]
    assert columns[1] == [0, 0, 255, 255]
    # 0.3 over a scaling factor of 0.5 is 0.6: from [-1, 1] to bytes.
    assert columns[2] == [round(255 * 0.8)] * 4 and columns[3] == [round(255 * 0.2)] * 4
    assert all(latents.shape == (1, 4, 3, 4) and latents.max() < 1 for latents in pipeline.decoded)
    assert len(pipeline.decoded) == 16


def test_without_decoding_the_vae_is_not_asked(tmp_path):
    pipeline = Pipeline()
    pipeline.edit = lambda: pipeline.show("edited_latents", values[None], 0)
    values = np.zeros((4, 3, 4), np.float32)
    values[0, :, 2:], values[1, :1] = 7, -2
    with AnimatedStrip(pipeline, tmp_path / "strip.png", decode=False):
        pipeline.edit()
    ((frame, _),) = frames(tmp_path / "strip.png")
    tile = frame[-192 - GAP : -GAP, GAP : GAP + 256]
    assert tile[10, 10].tolist() == [0, 0, 0] and tile[10, 250].tolist() == [255, 0, 0]
    assert tile[180, 10].tolist() == [0, 255, 0] and tile[180, 250].tolist() == [255, 255, 0]
    assert pipeline.decoded == []


def test_every_so_many_steps_and_the_last(tmp_path, captions):
    pipeline = Pipeline()
    with AnimatedStrip(pipeline, tmp_path / "strip.gif", every=3):
        pipeline.edit(steps=6)
    numbers = [caption[2].partition(":")[0] for caption in captions]
    assert numbers == [f"{loop}, step {n} of 6" for loop in ("inversion", "edit") for n in (1, 4, 6)]


def test_what_was_not_seen_is_not_shown(tmp_path, captions):
    pipeline = Pipeline()
    with AnimatedStrip(pipeline, tmp_path / "strip.gif"):
        pipeline.edit(mask=False, clean=False)
    assert captions[0] == ["inversion, step 1 of 4: latents"]
    captions.clear()
    with AnimatedStrip(pipeline, tmp_path / "strip.gif"):
        pipeline.show("map", np.zeros((1, 3, 4), np.float32))
    assert captions == [["map"]]


def test_a_prediction_belongs_to_its_step(tmp_path, captions):
    pipeline = Pipeline()
    with AnimatedStrip(pipeline, tmp_path / "strip.gif"):
        pipeline.show("clean_predictions", np.zeros((1, 4, 3, 4), np.float32), 5)
        pipeline.show("edited_latents", np.zeros((1, 4, 3, 4), np.float32), 0)
    assert captions == [["edit, step 1 of 1: latents"]]


def test_as_a_callback_alone(tmp_path):
    pipeline = Pipeline()
    strip = AnimatedStrip(pipeline, tmp_path / "strip.gif")
    with pipeline.debugging(strip):
        pipeline.edit()
    assert os.listdir(tmp_path) == []
    strip.save()
    assert len(list(frames(tmp_path / "strip.gif"))) == 8


def test_a_failing_call_writes_nothing(tmp_path):
    pipeline = Pipeline()
    (tmp_path / "strip.gif").write_bytes(b"before")
    with pytest.raises(ZeroDivisionError):
        with AnimatedStrip(pipeline, tmp_path / "strip.gif"):
            pipeline.edit()
            raise ZeroDivisionError
    assert (tmp_path / "strip.gif").read_bytes() == b"before" and os.listdir(tmp_path) == ["strip.gif"]
    assert not pipeline.viewers
    pipeline._stages.decode_latents = lambda latents: 1 / 0
    with pytest.raises(ZeroDivisionError):
        with AnimatedStrip(pipeline, tmp_path / "strip.gif"):
            pipeline.edit()
    assert (tmp_path / "strip.gif").read_bytes() == b"before" and os.listdir(tmp_path) == ["strip.gif"]


def test_nothing_seen_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing to animate"):
        with AnimatedStrip(Pipeline(), tmp_path / "strip.gif"):
            pass
    assert os.listdir(tmp_path) == []


def test_bad_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, kind, words in (
        (dict(path="strip.mp4"), ValueError, "has to end in .gif"),
        (dict(path="missing/strip.gif"), ValueError, "missing"),
        (dict(every=0), ValueError, "`every`"),
        (dict(every=1.5), ValueError, "`every`"),
        (dict(milliseconds=0), ValueError, "`milliseconds`"),
        (dict(milliseconds=60001), ValueError, "60000"),
        (dict(decode=1), TypeError, "`decode`"),
        (dict(pipeline=None), TypeError, "StableDiffusionDiffEditPipeline"),
    ):
        with pytest.raises(kind, match=words):
            AnimatedStrip(**{"pipeline": Pipeline(), "path": "strip.gif", **arguments})


def test_a_real_edit(sd1_folder, tmp_path):
    """An edit with a strip is the edit without, and the last frame's tiles are its latents, decoded."""
    pipe = our_pipeline(sd1_folder, mode="pynative")
    given = dict(num_inference_steps=4, inpaint_strength=0.75, num_maps_per_mask=2, guidance_scale=2.0, generator=0)
    plain = pipe.edit(PICTURE, SOURCE, TARGET, **given)
    with AnimatedStrip(pipe, tmp_path / "strip.png"):
        done = pipe.edit(PICTURE, SOURCE, TARGET, paste_back=False, **given)
    assert np.array_equal(done.latents.asnumpy(), plain.latents.asnumpy())
    shown = [frame for frame, _ in frames(tmp_path / "strip.png")]
    assert len(shown) == 6
    # Tiles of 240 x 192: 80 x 64 pixels, enlarged by three; map, mask, latents, predicted picture.
    tile = shown[-1][-192 - 5 : -5, 5 + 2 * (240 + 5) :][:, :240]
    expected = done.images[0].resize((240, 192), PIL.Image.Resampling.LANCZOS)
    assert np.abs(tile.astype(int) - np.asarray(expected)).max() <= 2
