"""scripts/make_gallery.py, with a pipeline that answers at once."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import demo_scenes as scenes  # noqa: E402
import make_gallery as gallery  # noqa: E402

pytestmark = pytest.mark.tools


class StandIn:
    """Inverts the colours of the lower right quarter."""

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = [], fails_at

    def edit(self, image, source_prompt, target_prompt, **options):
        if len(self.calls) == self.fails_at:
            raise RuntimeError("planted")
        self.calls.append((image, source_prompt, target_prompt, options))
        mask = np.zeros((1, 32, 32), np.int64)
        mask[:, 16:, 16:] = 1
        edited = np.asarray(image).copy()
        edited[64:, 64:] = 255 - edited[64:, 64:]
        return SimpleNamespace(images=[Image.fromarray(edited)], mask_image=mask, mask_map=mask * 0.25)


def run(folder, *arguments, pipeline=None):
    pipeline = pipeline or StandIn()
    assert gallery.main(["--output", str(folder), *arguments], load=lambda: pipeline) == 0
    return pipeline


def tiles(path):
    sheet, step = np.asarray(Image.open(path).convert("RGB")), scenes.SIZE + 4
    assert sheet.shape == (scenes.SIZE, 4 * step - 4, 3)
    return [sheet[:, i * step : i * step + scenes.SIZE] for i in range(4)]


def test_page_and_pictures_belong_together(tmp_path):
    calls = run(tmp_path, "--scenes", "3", "--seed", "5").calls
    text = (tmp_path / "gallery.md").read_text(encoding="utf-8")
    assert "python scripts/make_gallery.py --scenes 3 --seed 5\n" in text
    names = re.findall(r"\]\((.*?)\)", text)
    assert names == ["gallery/00.png", "gallery/01.png", "gallery/02.png"]
    for index, (name, (picture, source, target, options)) in enumerate(zip(names, calls)):
        assert options == {"generator": index, **gallery.OPTIONS}
        assert f"**{source}** → **{target}** (`generator={index}`)" in text
        drawn = scenes.draw_scene(gallery.sample_edit(5, index).source).picture
        assert np.array_equal(np.asarray(picture), np.asarray(drawn)) and source != target
        original, shown_map, mask, edited = tiles(tmp_path / name)
        assert np.abs(original.astype(int) - np.asarray(drawn)).mean() < 3  # 256 colours
        assert (mask[64:, 64:] > 250).all() and (mask[:64] < 5).all() and np.array_equal(mask, shown_map)
        outside = np.ones((128, 128), bool)
        outside[64:, 64:] = False
        assert np.array_equal(original[outside], edited[outside]), "what was kept does not look kept"
        assert np.abs(original.astype(int) - edited)[~outside].mean() > 20
        assert (tmp_path / name).stat().st_size < 80_000


def test_a_gallery_is_replaced_whole_or_not_at_all(tmp_path):
    run(tmp_path, "--scenes", "3")
    (tmp_path / "gallery" / "own.png").touch()
    run(tmp_path, "--scenes", "1")
    assert {path.name for path in (tmp_path / "gallery").iterdir()} == {"00.png", "own.png"}, (
        "and none of the longer one"
    )
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    with pytest.raises(RuntimeError, match="planted"):
        run(tmp_path, "--scenes", "4", "--seed", "6", pipeline=StandIn(fails_at=2))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}


def test_dry_prints_the_page_and_writes_nothing(tmp_path, capsys):
    assert gallery.main(["--dry", "--scenes", "2", "--output", str(tmp_path)], load=None) == 0
    printed = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    run(tmp_path, "--scenes", "2")
    assert printed == (tmp_path / "gallery.md").read_text(encoding="utf-8")


def test_bad_arguments_end_in_one_sentence(capsys):
    for words in (["--scenes", "0"], ["--seed", "-1"], ["--output", "/no/such/folder"]):
        with pytest.raises(SystemExit):
            gallery.main(words, load=StandIn)
        assert len(capsys.readouterr().err.splitlines()) <= 5
