"""Colour profiles, modes and transparency: what models see, and that it all comes back."""

import io
import json
import struct

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
from test_cli import edit as command
from test_cli import ran, work  # noqa: F401 (a fixture)
from test_pipeline import SOURCE, TARGET, our_pipeline

from mindiffedit import MaskOptions, load_image, masks
from mindiffedit.images import colours, pictures, sheets, writing
from mindiffedit.images.colours import Original

SRGB = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB"))
WEIGHTS = np.zeros((32, 40), np.float32)
WEIGHTS[8:16, 8:24] = 1
WEIGHTS[16:18, 8:24] = 0.5
DRAWN = (200, 30, 40)
GREY_OF_DRAWN = 82  # ITU-R 601-2


def wide_profile():
    """sRGB's profile with the primaries of Display P3."""
    data = bytearray(SRGB.tobytes())
    for tag, values in ((b"rXYZ", (0.51512, 0.24120, -0.00105)), (b"gXYZ", (0.29198, 0.69225, 0.04189)),
                        (b"bXYZ", (0.15710, 0.06657, 0.78407))):  # fmt: skip
        at = data.index(tag)
        (offset,) = struct.unpack(">I", data[at + 4 : at + 8])
        data[offset + 8 : offset + 20] = struct.pack(">3i", *(round(value * 65536) for value in values))
    return bytes(data)


def grey_profile():
    """A grey profile of version 2 whose numbers are light itself."""
    return profile_of(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, 256) + b"\0\0"})


def print_profile():
    """A CMYK profile of version 2: in both directions a table with two points for each channel."""

    def table(inputs, outputs, points):
        ramps, matrix = bytes(range(256)), struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).flat)
        points = bytes(np.clip(points, 0, 255).astype(np.uint8))
        return b"mft1\0\0\0\0" + bytes([inputs, outputs, 2, 0]) + matrix + ramps * inputs + points + ramps * outputs

    inks = np.array(np.meshgrid(*[[0, 1]] * 4, indexing="ij")).reshape(4, 16).T
    light = 255 * (1 - inks[:, :3].mean(1)) * (1 - inks[:, 3])
    colours_ = 128 + 50 * np.stack([inks[:, 1] - inks[:, 0], inks[:, 2] - inks[:, 0]], 1) * (1 - inks[:, 3:])
    lab = np.array(np.meshgrid(*[[0, 1]] * 3, indexing="ij")).reshape(3, 8).T
    back = 255 * np.stack([1 - lab[:, 1], lab[:, 1], lab[:, 2], 1 - lab[:, 0]], 1)
    there = np.column_stack([light, colours_]).ravel()
    tags = {b"A2B0": table(4, 3, there), b"B2A0": table(3, 4, back.ravel())}
    return profile_of(b"prtr", b"CMYK", b"Lab ", tags)


def profile_of(kind, space, connection, tags):
    white = struct.pack(">3i", 63190, 65536, 54061)
    tags = {
        **tags,
        b"wtpt": b"XYZ \0\0\0\0" + white,
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"none\0" + bytes(78 + 1),
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
    }
    offset, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", offset + len(body), bytes(4), 0x02100000, kind, space, connection)
    return (head + bytes(12) + b"acsp" + bytes(28) + white).ljust(128, b"\0") + table + body


def photo(width=40, height=32, seed=0):
    rng = np.random.default_rng(seed)
    return PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def with_info(picture, **info):
    picture = picture.copy()
    picture.info.update(info)
    return picture


def with_alpha(picture, alpha):
    picture = picture.copy()
    picture.putalpha(alpha)
    return picture


def kinds():
    """{what: (picture, the result's mode, a word of each sentence about what is lost)}."""
    rgb, grey = photo(), photo().convert("L")
    wide, levels = wide_profile(), np.random.default_rng(3).integers(0, 65536, (32, 40))
    cut_out, grey_cut_out, palette = with_alpha(rgb, grey), with_alpha(grey, grey), rgb.quantize(17)
    lab = PIL.ImageCms.profileToProfile(rgb, SRGB, PIL.ImageCms.createProfile("LAB"), outputMode="LAB")
    return {
        "rgb": (rgb, "RGB", []),
        "sRGB": (with_info(rgb, icc_profile=SRGB.tobytes()), "RGB", []),
        "wide": (with_info(rgb, icc_profile=wide), "RGB", []),
        "gamma": (with_info(rgb, gamma=1.0), "RGB", []),
        "damaged profile": (with_info(rgb, icc_profile=b"nothing"), "RGB", ["profile"]),
        "another kind's profile": (with_info(rgb, icc_profile=grey_profile()), "RGB", ["profile"]),
        "cut-out": (cut_out, "RGBA", []),
        "wide cut-out": (with_info(cut_out, icc_profile=wide), "RGBA", []),
        "premultiplied": (cut_out.convert("RGBa"), "RGBA", []),
        "a transparent colour": (with_info(rgb, transparency=rgb.getpixel((3, 3))), "RGBA", []),
        "grey": (grey, "L", ["grey"]),
        "grey of a profile": (with_info(grey, icc_profile=grey_profile()), "L", ["grey"]),
        "grey cut-out": (grey_cut_out, "LA", ["grey"]),
        "a transparent grey": (with_info(grey, transparency=grey.getpixel((3, 3))), "LA", ["grey"]),
        "16-bit grey": (PIL.Image.fromarray(levels.astype(np.uint16)), "I;16", ["grey"]),
        "16-bit grey in 32": (PIL.Image.fromarray(levels.astype(np.int32)), "I;16", ["grey"]),
        "8-bit grey in 32": (PIL.Image.fromarray(np.asarray(grey).astype(np.int32)), "L", ["grey"]),
        "one bit": (rgb.convert("1"), "L", ["mode 1", "grey"]),
        "palette": (palette, "RGB", ["palette"]),
        "wide palette": (with_info(palette, icc_profile=wide), "RGB", ["palette"]),
        "palette with a transparent colour": (with_info(palette, transparency=3), "RGBA", ["palette"]),
        "palette with transparencies": (with_info(palette, transparency=bytes(range(17))), "RGBA", ["palette"]),
        "CMYK": (rgb.convert("CMYK"), "CMYK", []),
        "Lab": (lab, "LAB", []),
        "HSV": (rgb.convert("HSV"), "RGB", ["HSV"]),
        "16 bits read as 8": (with_info(rgb, bits=16), "RGB", ["16 bits"]),
    }


KINDS = kinds()


def shown(picture):
    return np.asarray(colours.to_srgb(picture)).astype(int)


# --- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_comes_back_in_the_picture_s_own_numbers(kind):
    picture, mode, words = KINDS[kind]
    original = Original(picture)
    assert original.shown.mode == "RGB" and original.shown.size == picture.size
    assert len(original.losses) == len(words)
    assert all(word in loss for word, loss in zip(sorted(words), sorted(original.losses)))
    assert "profile" not in words or "cannot be used" in original.losses[0]
    assert not any("profile" in loss for loss in Original(original.shown).losses), "it is told once"
    drawn = PIL.Image.new("RGB", picture.size, DRAWN)
    result = original.rewritten(drawn, WEIGHTS)
    assert result.mode == mode and result.size == picture.size
    assert result.info.get("icc_profile") == picture.info.get("icc_profile")
    # Outside: the numbers. Pillow's own conversion gives them where the mode changes.
    outside = WEIGHTS == 0
    kept = picture.mode in (mode, "I") and "transparency" not in picture.info
    expected = np.asarray(picture if kept else picture.convert(mode))
    assert np.array_equal(np.asarray(result)[outside], expected[outside])
    if mode in ("RGBA", "LA"):
        assert np.array_equal(np.asarray(result)[..., -1], expected[..., -1])  # inside as well
        assert len(np.unique(expected[..., -1])) > 1
    # Inside: the colour that was drawn, as far as there are colours.
    inside = shown(result)[8:16, 8:24]
    wanted = [GREY_OF_DRAWN] * 3 if "grey" in words else DRAWN
    if kind != "grey of a profile":  # grey by its luminance in light
        assert np.abs(inside - wanted).max() <= 3
    else:
        assert np.ptp(inside) == 0 and 60 < inside.max() < 130
    # Between: neither.
    assert not np.array_equal(np.asarray(result)[16:18, 8:24], expected[16:18, 8:24])
    # The picture itself is not written to, and without weights all is drawn.
    assert np.abs(shown(original.rewritten(drawn))[0, 0] - wanted).max() <= (3 if kind != "grey of a profile" else 60)
    if kind == "sRGB":  # it changes no number
        assert original.plain and np.array_equal(shown(picture), np.asarray(picture))


def test_colours_are_those_that_pillow_s_colour_management_shows():
    picture = KINDS["wide"][0]
    wide = PIL.ImageCms.ImageCmsProfile(io.BytesIO(wide_profile()))
    expected = np.asarray(PIL.ImageCms.profileToProfile(picture, wide, SRGB)).astype(int)
    assert np.abs(shown(picture) - expected).max() <= 1
    assert np.abs(shown(picture) - np.asarray(picture).astype(int)).max() > 20
    # A grey picture whose numbers are light itself: half the light is 188 in sRGB.
    grey = with_info(PIL.Image.new("L", (2, 2), 128), icc_profile=grey_profile())
    assert np.abs(shown(grey) - 188).max() <= 2
    assert np.abs(shown(with_info(PIL.Image.new("RGB", (2, 2), (128,) * 3), gamma=1.0)) - 188).max() <= 1


def test_a_cmyk_profile_is_used_both_ways(tmp_path):
    data = print_profile()
    picture = with_info(photo().convert("CMYK"), icc_profile=data)
    original = Original(picture)
    profile = PIL.ImageCms.ImageCmsProfile(io.BytesIO(data))
    intent = PIL.ImageCms.Intent.RELATIVE_COLORIMETRIC
    expected = PIL.ImageCms.profileToProfile(picture, profile, SRGB, intent, "RGB", flags=0x2000)
    assert original.losses == [] and np.array_equal(original.shown, expected)
    assert np.abs(shown(picture) - np.asarray(picture.convert("RGB")).astype(int)).mean() > 10
    assert np.array_equal(load_image(picture), expected)
    result = original.rewritten(PIL.Image.new("RGB", picture.size, DRAWN), WEIGHTS)
    dot = PIL.Image.new("RGB", (1, 1), DRAWN)
    expected = PIL.ImageCms.profileToProfile(dot, SRGB, profile, intent, "CMYK", flags=0x2000)
    assert result.mode == "CMYK" and result.getpixel((10, 10)) == expected.getpixel((0, 0))
    for name in ("a.tif", "a.jpg"):
        writing.save_image_atomically(result, tmp_path / name)
        written = PIL.Image.open(tmp_path / name)
        assert written.mode == "CMYK" and written.info["icc_profile"] == data
        off = np.abs(np.asarray(written).astype(int) - np.asarray(picture))[WEIGHTS == 0]
        assert off.max() == 0 if name == "a.tif" else off.mean() < 4


def test_a_profile_that_cannot_be_written_with(monkeypatch):
    """A scanner's leads from its numbers to colours alone."""
    both_ways = colours._transform

    def one_way(source, target, source_mode, target_mode):
        if source_mode == "RGB" and target_mode == "CMYK":
            raise PIL.ImageCms.PyCMSError("no way")
        return both_ways(source, target, source_mode, target_mode)

    monkeypatch.setattr(colours, "_transform", one_way)
    picture = with_info(photo().convert("CMYK"), icc_profile=print_profile())
    original = Original(picture)
    result = original.rewritten(PIL.Image.new("RGB", picture.size, DRAWN), WEIGHTS)
    assert result.mode == "RGB" and "icc_profile" not in result.info
    assert np.array_equal(np.asarray(result)[WEIGHTS == 0], np.asarray(original.shown)[WEIGHTS == 0])
    assert any("cannot be written with" in loss for loss in original.losses)


def test_load_image_keeps_the_reference_s_numbers_and_the_profile_beside_them():
    reference = pytest.importorskip("diffusers.utils").load_image
    for kind in ("wide", "wide cut-out", "wide palette"):
        loaded, expected = load_image(KINDS[kind][0]), reference(KINDS[kind][0])
        assert np.array_equal(np.asarray(loaded), np.asarray(expected)) and loaded.mode == "RGB"
        assert loaded.info["icc_profile"] == wide_profile()
    # A profile of greys means nothing in RGB: it has been used.
    assert np.array_equal(load_image(KINDS["grey of a profile"][0]), shown(KINDS["grey of a profile"][0]))
    assert "icc_profile" not in load_image(KINDS["grey of a profile"][0]).info
    lab = load_image(KINDS["Lab"][0])  # which Pillow alone cannot convert
    assert np.abs(np.asarray(lab).astype(int) - np.asarray(photo())).mean() < 4


def test_models_see_the_colours_that_a_profile_means():
    """B12."""
    picture = KINDS["wide"][0]
    pixels = pictures.preprocess_image(picture, 8)
    assert np.array_equal(pixels, pictures.preprocess_image(colours.to_srgb(picture), 8))
    assert np.abs(pixels - pictures.preprocess_image(photo(), 8)).max() > 0.1
    # So do pictures of several: they have no profile.
    expected = np.asarray(colours.to_srgb(picture))
    assert np.array_equal(masks.overlay(picture, np.zeros((4, 5))), expected)
    grid = np.asarray(sheets.labelled_grid([("a", picture)], smallest_side=1))
    places = [(y, x) for y in range(grid.shape[0] - 31) for x in range(grid.shape[1] - 39)]
    assert any(np.array_equal(grid[y : y + 32, x : x + 40], expected) for y, x in places)


# --- files -----------------------------------------------------------------------------------------

HOLDS_ALL = {"PNG": ("RGB", "RGBA", "L", "LA", "I;16"), "TIFF": ("RGB", "RGBA", "L", "LA", "I;16", "CMYK", "LAB"),
             "WEBP": ("RGB", "RGBA"), "JPEG": ("RGB", "L", "CMYK"), "BMP": ("RGB", "L")}  # fmt: skip


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "a.jpg", "a.bmp"])
def test_files_show_the_same_colours_and_say_what_they_cannot_hold(tmp_path, name):
    def written(picture):
        writing.save_image_atomically(picture, tmp_path / name)
        with PIL.Image.open(tmp_path / name) as file:
            file.load()
        return file

    format = writing.format_of(name)
    for kind, (picture, mode, _) in KINDS.items():
        result = Original(picture).rewritten(Original(picture).shown, WEIGHTS)
        _, losses = colours.fit_format(result, format)
        file = written(result)
        assert np.abs(shown(file) - shown(result)).mean() < (10 if format == "JPEG" else 1.5), kind
        profile = result.info.get("icc_profile")
        fits = mode in HOLDS_ALL[format] or format == "WEBP" and mode in ("L", "LA") and profile is None
        fits = fits and not (profile and not Original(result).plain and format == "BMP")
        fits = fits and (format == "PNG" or kind != "gamma")
        assert bool(losses) == (not fits), (kind, losses)
        assert len(losses) <= 1 or "transparency" in losses[0]
        if fits and format in ("PNG", "TIFF"):
            assert file.mode == mode and file.info.get("icc_profile") == profile, kind
            assert np.array_equal(np.asarray(file), np.asarray(result)), kind
    # An opaque alpha channel is no loss, and a JPEG is nearly what was written.
    opaque, losses = colours.fit_format(photo(64, 64).convert("RGBA"), format)
    assert losses == [] and opaque.mode == ("RGBA" if "RGBA" in HOLDS_ALL[format] else "RGB")
    assert format == "WEBP" or np.abs(shown(written(photo(64, 64))) - np.asarray(photo(64, 64))).max() <= 4
    # Odd metadata keep no file from being written.
    for info in (dict(exif=b"nothing"), dict(exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(10)), dict(gamma=0.0),
                 dict(dpi=(0, 0)), dict(dpi="many"), dict(dpi=(1e9, 1)), dict(icc_profile=b"")):  # fmt: skip
        written(Original(with_info(photo(), **info)).rewritten(photo()))


def test_a_side_that_a_format_cannot_have_is_refused_before_the_work(work, capsys):  # noqa: F811
    from test_cli import refused

    PIL.Image.new("RGB", (16400, 40)).save("long.png")
    refused(capsys, command(picture="long.png", output="out.webp"), "16383 pixels", "the output", ".png")
    ran(capsys, command(picture="long.png", output="out.png"))


def exif_with_preview(orientation):
    """EXIF data of a camera, with a small JPEG of the picture."""
    preview = io.BytesIO()
    photo(8, 8).save(preview, "JPEG")
    preview = preview.getvalue()
    entries = struct.pack(">HHIHHHHI4s", 0x0112, 3, 1, orientation, 0, 0x010F, 2, 4, b"Cam\0")
    second = 8 + 2 + len(entries) + 4
    more = struct.pack(">HHII", 0x0201, 4, 1, second + 2 + 12 * 2 + 4) + struct.pack(
        ">HHII", 0x0202, 4, 1, len(preview)
    )
    first = struct.pack(">IH", 8, 2) + entries + struct.pack(">I", second)
    return b"Exif\0\0MM\0*" + first + struct.pack(">H", 2) + more + bytes(4) + preview


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_metadata_goes_with_a_result_but_its_old_preview_and_orientation(tmp_path, name):
    photo().save(tmp_path / "in.jpg", exif=exif_with_preview(6), dpi=(300, 300), icc_profile=wide_profile())
    picture = load_image(tmp_path / "in.jpg", convert_method=lambda picture: picture)
    assert picture.size == (32, 40)
    result = Original(picture).rewritten(Original(picture).shown)
    writing.save_image_atomically(result, tmp_path / name)
    with PIL.Image.open(tmp_path / name) as written:
        exif = written.getexif()
        assert written.size == (32, 40) and written.info["icc_profile"] == wide_profile()
        assert exif[0x010F] == "Cam" and 0x0112 not in exif and len(written.info["exif"]) < 100
        assert name == "a.webp" or np.allclose(written.info["dpi"], 300, atol=0.1)


# --- edits -----------------------------------------------------------------------------------------


def test_an_edit_gives_pictures_back_as_they_were_given(sd1_folder):
    ours = our_pipeline(sd1_folder, mode="pynative")
    box = np.zeros((8, 10), np.float32)
    box[2:4, 3:6] = 1
    quick = dict(num_inference_steps=1, inpaint_strength=1.0, generator=0, mask_image=box, feather=4,
                 mask_options=MaskOptions(), inversion="noise")  # fmt: skip
    rgb = photo(83, 70, 1)
    outside = masks.feathered(box, (70, 83), 4)[0] == 0
    given = {
        "wide": with_info(rgb, icc_profile=wide_profile(), dpi=(72, 72)),
        "cut-out": with_alpha(rgb, rgb.convert("L")),
        "grey": rgb.convert("L"),
        "palette": rgb.quantize(32),
        "CMYK": rgb.convert("CMYK"),
    }
    for kind, picture in given.items():
        done = ours.edit(picture, SOURCE, TARGET, **quick)
        result = done.images[0]
        mode = "RGB" if kind == "palette" else picture.mode
        assert result.mode == mode and result.size == picture.size, kind
        before = np.asarray(picture.convert(mode) if kind == "palette" else picture)
        assert np.array_equal(np.asarray(result)[outside], before[outside]), kind
        assert not np.array_equal(np.asarray(result), before), kind
        assert result.info.get("icc_profile") == picture.info.get("icc_profile")
        told = [warning for warning in done.report.warnings if kind in warning]
        assert len(told) == (kind in ("grey", "palette")), kind
        assert done.report.change_outside == [0]
    assert ours.edit(given["wide"], SOURCE, TARGET, **quick).images[0].info["dpi"] == (72, 72)
    # The advice for grey pictures.
    done = ours.edit(given["grey"].convert("RGB"), SOURCE, TARGET, **quick)
    assert done.images[0].mode == "RGB" and not any("grey" in warning for warning in done.report.warnings)
    assert np.ptp(np.asarray(done.images[0]).astype(int), axis=2).max() > 3
    # Arrays have no profile: they are in sRGB.
    array = ours.edit(given["wide"], SOURCE, TARGET, output_type="np", **quick).images[0]
    assert np.allclose(array[outside] * 255, shown(given["wide"])[outside], atol=1e-3)
    # Two pictures of a batch, each as it was; and what one colour profile means is what the other shows.
    both = ours.edit([given["wide"], given["cut-out"]], [SOURCE] * 2, [TARGET] * 2, **quick).images
    assert [picture.mode for picture in both] == ["RGB", "RGBA"]
    assert both[0].info["icc_profile"] == wide_profile() and "icc_profile" not in both[1].info


@pytest.mark.parametrize("size", [(96, 64), (117, 91)])
@pytest.mark.parametrize("kind", ["wide", "cut-out", "grey", "16-bit", "palette"])
def test_the_command_gives_the_file_back_as_it_was(work, capsys, size, kind):  # noqa: F811
    """At a size that the model works at, and at another."""
    rgb = photo(*size)
    grey, mode = rgb.convert("L"), {"wide": "RGB", "cut-out": "RGBA", "grey": "L", "palette": "RGB", "16-bit": "I;16"}
    picture = {"wide": rgb, "cut-out": with_alpha(rgb, grey), "grey": grey, "palette": rgb.quantize(32),
               "16-bit": PIL.Image.fromarray(np.asarray(grey).astype(np.uint16) * 200)}[kind]  # fmt: skip
    profile = {"icc_profile": wide_profile()} if kind == "wide" else {}
    picture.save("in.png", **profile)
    line, err = ran(capsys, command("--json", "--grid", "grid.png", "--overlay", "over.png", picture="in.png"))
    after, edge = PIL.Image.open("out.png"), size[0] // 2 + 12
    assert after.mode == mode[kind] and after.info.get("icc_profile") == profile.get("icc_profile")
    # A picture that is all RGB, at a size that fits, is left to the call, which here is a stand-in.
    if (kind, size) != ("palette", (96, 64)):
        numbers = np.asarray(picture.convert("RGB") if kind == "palette" else picture)
        assert np.array_equal(np.asarray(after)[:, edge:], numbers[:, edge:])
        assert json.loads(line)["report"]["change_outside"] == 0
    if kind == "wide":
        assert np.abs(shown(after)[20:40, 10:30] - (10, 200, 30)).max() <= 2
        assert "icc_profile" not in PIL.Image.open("grid.png").info
    assert ("palette" in err) == (kind == "palette") and ("made grey" in err) == (kind in ("grey", "16-bit"))
    ran(capsys, command("--reference", picture="in.png", output="out.png"))
    after = PIL.Image.open("out.png")
    assert after.mode == mode[kind] and after.info.get("icc_profile") == profile.get("icc_profile")


def test_the_command_says_what_the_output_s_format_cannot_hold(work, capsys):  # noqa: F811
    cut_out = with_alpha(photo(96, 64), photo(96, 64).convert("L"))
    cut_out.save("in.png")
    line, err = ran(capsys, command("--json", picture="in.png", output="out.jpg"))
    assert err.count("transparency") == 1 and "WebP" in err
    assert "transparency" in json.loads(line)["report"]["warnings"][0]
    assert PIL.Image.open("out.jpg").mode == "RGB"
    for name in ("out.webp", "out.tif", "out.png"):  # the advice
        _, err = ran(capsys, command(picture="in.png", output=name))
        assert "transparency" not in err
        assert np.array_equal(np.asarray(PIL.Image.open(name))[..., 3], np.asarray(cut_out)[..., 3])


def test_latents_belong_to_the_colours_that_were_inverted(work, capsys):  # noqa: F811
    """Files of before know plain RGB pictures by the same hash."""
    import hashlib

    from mindiffedit.cli.job import fingerprint

    picture = photo(96, 64)
    expected = hashlib.sha256(b"(96, 64)" + picture.tobytes()).hexdigest()
    for saved in (picture, picture.convert("RGBA"), with_info(picture, icc_profile=SRGB.tobytes())):
        assert fingerprint(Original(saved).shown) == expected
    assert fingerprint(Original(with_info(picture, icc_profile=wide_profile())).shown) != expected
