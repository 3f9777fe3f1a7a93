"""Pictures and masks: what is read, what is refused, and equality with the reference's image processor."""

import base64
import http.server
import io
import os
import re
import stat
import struct
import threading
import urllib.parse
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest

from mindiffedit.arrays import to_numpy
from mindiffedit.errors import InputError
from mindiffedit.images import pictures, reading


def noise(height, width, seed=0):
    """RGB picture of random pixels: any resampling, swap of axes or of channels changes it."""
    rng = np.random.default_rng(seed)
    return PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(picture, **options):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return buffer.getvalue()


def refused(path, *words):
    """The ValueError's one-line message, which must contain `words`."""
    with pytest.raises(ValueError) as caught:
        pictures.load_image(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# --- tensors ---------------------------------------------------------------------------------------


def test_an_array_comes_back_uncopied():
    array = np.arange(6.0).reshape(2, 3)
    assert to_numpy(array) is array


def test_mindspore_and_torch_tensors_become_arrays():
    mindspore = pytest.importorskip("mindspore")
    torch = pytest.importorskip("torch")
    values = np.array([[1.5, -2.0], [0.25, 3.0]], np.float32)
    for tensor in (
        mindspore.Tensor(values),
        mindspore.Tensor(values).astype(mindspore.bfloat16),
        torch.from_numpy(values).requires_grad_(True),
        torch.from_numpy(values).bfloat16(),
    ):
        array = to_numpy(tensor)
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, values)


# --- load_image ------------------------------------------------------------------------------------


def saved(tmp_path, picture, name, **options):
    path = tmp_path / name
    picture.save(path, **options)
    return str(path)


def various_pictures(tmp_path):
    """One file for each way in which a picture can differ from plain RGB."""
    picture = noise(20, 31)
    alpha = picture.copy()
    alpha.putalpha(PIL.Image.fromarray(np.linspace(0, 255, 20 * 31).reshape(20, 31).astype(np.uint8)))
    palette = picture.quantize(17)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    return {
        "rgb": saved(tmp_path, picture, "rgb.png"),
        "alpha": saved(tmp_path, alpha, "alpha.png"),
        "palette": saved(tmp_path, palette, "palette.png"),
        "palette with transparency": saved(tmp_path, palette, "clear.png", transparency=bytes(range(17))),
        "grey": saved(tmp_path, picture.convert("L"), "grey.png"),
        "grey and alpha": saved(tmp_path, alpha.convert("LA"), "grey_alpha.png"),
        "one bit": saved(tmp_path, picture.convert("1"), "bit.png"),
        "cmyk": saved(tmp_path, picture.convert("CMYK"), "cmyk.jpg"),
        "upright by exif": saved(tmp_path, picture, "exif.jpg", exif=exif),
        "still gif": saved(tmp_path, palette, "still.gif"),
        "webp": saved(tmp_path, picture, "p.webp"),
    }


def test_load_image_is_the_reference_s(tmp_path):
    reference = pytest.importorskip("diffusers.utils").load_image
    for kind, path in various_pictures(tmp_path).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = reference(path)
        ours = pictures.load_image(path)
        assert ours.mode == "RGB", kind
        assert ours.size == expected.size, kind
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected), err_msg=kind)


def test_no_warning_for_a_palette_with_transparency(tmp_path):
    path = various_pictures(tmp_path)["palette with transparency"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.load_image(path)


def test_exif_orientation_turns_the_picture(tmp_path):
    assert pictures.load_image(various_pictures(tmp_path)["upright by exif"]).size == (20, 31)


def test_load_image_takes_paths_and_pil_pictures(tmp_path):
    picture = noise(9, 7)
    path = tmp_path / "p.png"
    picture.save(path)
    np.testing.assert_array_equal(np.asarray(pictures.load_image(path)), np.asarray(picture))
    np.testing.assert_array_equal(np.asarray(pictures.load_image(picture)), np.asarray(picture))


def test_convert_method_gets_the_upright_picture_in_its_own_mode(tmp_path):
    path = various_pictures(tmp_path)["grey"]
    seen = []
    result = pictures.load_image(path, lambda p: seen.append(p.mode) or p.resize((3, 4)))
    assert seen == ["L"] and result.size == (3, 4) and result.mode == "L"


@pytest.mark.parametrize("name", ["wide.png", "wide.tif"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, name):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    path = tmp_path / name
    PIL.Image.fromarray(levels).save(path)
    result = np.asarray(pictures.load_image(path))
    np.testing.assert_array_equal(result[..., 0].ravel(), np.arange(256))
    np.testing.assert_array_equal(result[..., 2].ravel(), np.arange(256))


def test_mode_i_by_its_values():
    narrow = PIL.Image.fromarray(np.array([[0, 7, 255]], np.int32))
    wide = PIL.Image.fromarray(np.array([[0, 257 * 9, 65535]], np.int32))
    assert np.asarray(pictures.to_rgb(narrow))[0, :, 0].tolist() == [0, 7, 255]
    assert np.asarray(pictures.to_rgb(wide))[0, :, 0].tolist() == [0, 9, 255]
    with pytest.raises(ValueError, match="-1 to 70000"):
        pictures.to_rgb(PIL.Image.fromarray(np.array([[-1, 70000]], np.int32)))
    with pytest.raises(ValueError, match="floating-point"):
        pictures.to_rgb(PIL.Image.fromarray(np.array([[0.5]], np.float32)))


def test_what_is_not_a_picture_is_refused(tmp_path):
    refused(str(tmp_path / "nothing.png"), "there is no picture", "nothing.png")
    refused(str(tmp_path), "is a folder")
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    refused(empty, "empty.png is an empty file")
    text = tmp_path / "text.png"
    text.write_text("not a picture at all " * 50)
    refused(text, "text.png is not a picture")
    eps = tmp_path / "drawing.eps"
    noise(5, 5).save(eps)
    refused(eps, "EPS")
    refused(7, "int")
    refused(PIL.Image.new("RGB", (0, 5)), "0 x 5")


@pytest.mark.parametrize("name", ["p.png", "p.jpg", "p.webp", "p.tif", "p.bmp", "p.gif"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_files_are_refused(tmp_path, name, share):
    path = tmp_path / name
    noise(64, 64).save(path)
    data = path.read_bytes()
    pictures.load_image(path)
    path.write_bytes(data[: int(len(data) * share)])
    message = refused(path, name)
    assert "truncated" in message or "not a picture" in message or "cannot be read" in message


def test_a_pil_picture_of_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "p.png"
    noise(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    refused(PIL.Image.open(path), "truncated")


def bomb(width, height):
    """A PNG of one flat colour: a few kilobytes that decode to width · height pixels."""
    return png(PIL.Image.new("1", (width, height)))


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    before = PIL.Image.MAX_IMAGE_PIXELS
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(8200, 8192))
    assert path.stat().st_size < 100_000
    decoded = []
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda self: decoded.append(self))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(path, "8200 x 8192", "not decoded")
    # Above twice Pillow's own limit Pillow itself stops.
    path.write_bytes(bomb(14000, 14000))
    refused(path, "not decoded")
    assert decoded == []
    assert PIL.Image.MAX_IMAGE_PIXELS == before


def test_the_pixel_limit_itself_is_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_PIXELS", 35)
    path = tmp_path / "p.png"
    noise(5, 7).save(path)
    assert pictures.load_image(path).size == (7, 5)
    noise(6, 6).save(path)
    refused(path, "6 x 6")


@pytest.mark.parametrize("name", ["p.gif", "p.png", "p.webp", "p.tif"])
def test_animated_pictures_are_refused(tmp_path, name):
    path = tmp_path / name
    noise(8, 8, 1).save(path, save_all=True, append_images=[noise(8, 8, 2)])
    refused(path, "animated")


def test_a_still_with_a_preview_is_accepted(tmp_path):
    # Phones store a second, smaller picture in their JPEGs (MPO); the first is the photograph.
    path = tmp_path / "phone.jpg"
    noise(32, 24, 1).save(path, "MPO", save_all=True, append_images=[noise(32, 24, 2)])
    assert PIL.Image.open(path).n_frames == 2
    assert pictures.load_image(path).size == (24, 32)


def chunk(name, data, checksum=None):
    """A chunk of a PNG; its checksum is right unless one is given."""
    right = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", right if checksum is None else checksum)


def odd_pngs(picture):
    """The same pixels in files with something odd beside them; Pillow alone refuses nearly all of them."""
    plain = png(picture)
    head, end = plain[:33], plain[-12:]
    body, until_end = plain[33:], plain[:-12]
    assert end[4:8] == b"IEND"
    much = b"word\0\0" + zlib.compress(b"nodes and links; " * 100_000)
    return {
        "much text": head + chunk(b"zTXt", much) + body,
        "much text after the pixels": until_end + chunk(b"zTXt", much) + end,
        "much international text": head + chunk(b"iTXt", b"word\0\1\0\0\0" + much[6:]) + body,
        "many texts": head + chunk(b"zTXt", b"word\0\0" + zlib.compress(bytes(2**20 - 1))) * 66 + body,
        "text with a wrong checksum": head + chunk(b"tEXt", b"word\0text", 5) + body,
        "text with a wrong checksum after the pixels": until_end + chunk(b"tEXt", b"word\0text", 5) + end,
        "a long profile": head + chunk(b"iCCP", b"name\0\0" + zlib.compress(b"long" * 2**19)) + body,
        "no profile": head + chunk(b"iCCP", b"") + body,
        "a damaged profile": head + chunk(b"iCCP", b"name\0\0nothing") + body,
        "a profile with a wrong checksum": head + chunk(b"iCCP", b"name\0\0" + zlib.compress(b"x"), 5) + body,
        "short gamma": head + chunk(b"gAMA", b"ab") + body,
        "no gamma": head + chunk(b"gAMA", bytes(4)) + body,
        "short resolution": head + chunk(b"pHYs", b"ab") + body,
        "short colours": head + chunk(b"cHRM", b"ab") + body,
        "short transparency": head + chunk(b"tRNS", b"ab") + body,
        "no intent": head + chunk(b"sRGB", b"") + body,
        "a short note of animation": head + chunk(b"acTL", b"ab") + body,
        "damaged EXIF data": head + chunk(b"eXIf", b"MM\0*\0\0\xff\xff") + body,
        "no EXIF data": head + chunk(b"eXIf", b"nothing") + body,
        "an unknown chunk": head + chunk(b"zzZz", b"anything") + body,
        "a chunk without a name": head + chunk(b"\xff\xfe\xfdz", b"anything") + body,
        "no end": until_end,
        "half an end": plain[:-5],
        "no last checksum": plain[:-14],
        "something behind the end": plain + b"something" * 1000,
        "something in place of the end": until_end + b"something" * 1000,
    }


def test_what_is_odd_beside_the_pixels_does_not_matter(tmp_path):
    """W11."""
    picture, path = noise(40, 48), tmp_path / "p.png"
    before = (PIL.PngImagePlugin.MAX_TEXT_CHUNK, PIL.ImageFile.LOAD_TRUNCATED_IMAGES, PIL.Image.MAX_IMAGE_PIXELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind, data in odd_pngs(picture).items():
            path.write_bytes(data)
            assert np.array_equal(np.asarray(pictures.load_image(path)), np.asarray(picture)), kind
    path.write_bytes(odd_pngs(picture)["a long profile"])
    assert pictures.load_image(path).info["icc_profile"] == b"long" * 2**19
    assert before == (
        PIL.PngImagePlugin.MAX_TEXT_CHUNK, PIL.ImageFile.LOAD_TRUNCATED_IMAGES, PIL.Image.MAX_IMAGE_PIXELS
    )  # fmt: skip
    # A picture whose transparency and animation are in order keeps them.
    clear = png(picture.quantize(9), transparency=bytes(range(9)))
    path.write_bytes(clear[:33] + chunk(b"tEXt", b"word\0text", 5) + clear[33:])
    assert pictures.load_image(path, lambda loaded: loaded).has_transparency_data
    picture.save(path, save_all=True, append_images=[noise(40, 48, 2)])
    data = path.read_bytes()
    path.write_bytes(data[:33] + chunk(b"tEXt", b"word\0text", 5) + data[33:])
    refused(path, "animated")


def exif(*entries):
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + b"".join(entries) + bytes(4)


def test_odd_exif_data_do_not_matter_but_the_orientation_does(tmp_path):
    picture, path = noise(20, 31), tmp_path / "p.jpg"
    turned = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    outside = struct.pack(">HHII", 0x8769, 4, 1, 0x7FFFFFFF)
    unknown = struct.pack(">HHII", 0x013B, 99, 1, 5)
    upright = [b"Exif\0\0nothing", b"Exif\0\0", exif()[:-4] + b"\xff\xff", exif(outside, unknown), exif(turned)[:14]]
    upright += [exif(struct.pack(">HHIHH", 0x0112, 3, 1, odd, 0)) for odd in (0, 9, 65535)]
    upright += [exif(struct.pack(">HHI4s", 0x0112, 2, 2, b"6\0\0\0"))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in upright:
            picture.save(path, exif=data)
            assert pictures.load_image(path).size == (31, 20), data
        for data in (exif(turned), exif(turned, outside), exif(turned, unknown)):
            picture.save(path, exif=data)
            assert pictures.load_image(path).size == (20, 31), data


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}])
def test_a_jpeg_without_its_last_bytes(tmp_path, options):
    path = tmp_path / "phone.jpg"
    noise(200, 120).save(path, quality=90, **options)
    data, whole = path.read_bytes(), np.asarray(pictures.load_image(path)).astype(int)
    for lost in (1, 2):
        path.write_bytes(data[:-lost])
        assert np.array_equal(np.asarray(pictures.load_image(path)), whole)
    path.write_bytes(data[:-200])
    cut = np.asarray(pictures.load_image(path))
    assert np.array_equal(cut[:180], whole[:180]) and not np.array_equal(cut, whole)
    path.write_bytes(data[: len(data) // 2])
    refused(path, "truncated", "part of it is missing")
    noise(192, 120).save(path, quality=90, **options)  # the last row of blocks is a whole one
    path.write_bytes(path.read_bytes()[:-20])
    assert pictures.load_image(path).size == (120, 192)
    noise(200, 120).save(path, quality=90, progressive=True, **options)
    path.write_bytes(path.read_bytes()[:-200])  # of its last scan, which is about all rows
    refused(path, "truncated", "part of it is missing")


def test_a_kind_of_file_that_pillow_cannot_read_is_named(tmp_path):
    path = tmp_path / "phone.jpg"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    refused(path, "HEIC", "save it as JPEG or PNG")


# --- URLs (a server on this machine) ---------------------------------------------------------------


@pytest.fixture
def server():
    """Serves `server.pages[path] = (status, headers, body)`; a body that is callable writes by itself. `server.asked`
    has (path, headers) of each request."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, dict(self.headers)))
            status, headers, body = pages.get(self.path, (404, {}, b"none"))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                body(self.wfile) if callable(body) else self.wfile.write(body)
            except OSError:  # the reader has had enough
                pass

        def log_message(self, *_):
            pass

    pages, asked = {}, []
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.pages, running.asked = pages, asked
    running.address = f"http://127.0.0.1:{running.server_port}"
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def test_a_picture_from_a_url(server):
    picture = noise(13, 8)
    server.pages["/p"] = (200, {}, png(picture))
    server.pages["/moved"] = (302, {"Location": "/p"}, b"")
    for path in ("/p", "/moved"):
        result = pictures.load_image(server.address + path)
        np.testing.assert_array_equal(np.asarray(result), np.asarray(picture))


def test_urls_are_taken_as_browsers_take_them(server):
    """What is asked for, by what was typed. Nothing is encoded twice."""
    asked = {
        "/caf\u00e9\u2013left.png": "/caf%C3%A9%E2%80%93left.png",
        "/\u65e5\u672c.png": "/%E6%97%A5%E6%9C%AC.png",
        "/caf%C3%A9.png": "/caf%C3%A9.png",
        "/caf%E9.png": "/caf%E9.png",
        "/a b.png": "/a%20b.png",
        "/a%20b.png": "/a%20b.png",
        "/a[1]|2.png": "/a%5B1%5D%7C2.png",
        "/p?x=\u00e9&y=a b": "/p?x=%C3%A9&y=a%20b",
        "/p?x=%26&y=1+2": "/p?x=%26&y=1+2",
        "/p#place": "/p",
        "\\a\\b.png": "/a/b.png",
        "/a\tb.png": "/ab.png",
        "/end \n": "/end",
        "?x=1": "/?x=1",
        "": "/",
    }
    picture = png(noise(13, 8))
    server.pages.update({path: (200, {}, picture) for path in asked.values()})
    for typed, path in asked.items():
        assert pictures.load_image(server.address + typed).size == (8, 13), typed
        assert server.asked[-1][0] == path
    slashes = server.address.replace("/", "\\") + "\\p"
    for whole in ("  " + server.address, server.address.replace("http", "HTTP"), Path(server.address + "/p"), slashes):
        assert pictures.load_image(whole).size == (8, 13)
    headers = server.asked[-1][1]
    assert headers["User-Agent"].startswith("mindiffedit/") and headers["Accept-Encoding"] == "identity"
    server.pages["/moved"] = (302, {"Location": "/caf\u00e9 \u2013.png".encode().decode("latin-1")}, b"")
    server.pages["/caf%C3%A9%20%E2%80%93.png"] = (200, {}, picture)
    assert pictures.load_image(server.address + "/moved").size == (8, 13)
    refused("http://ex\u00e4mple.invalid/p.png", "xn--exmple-cua.invalid")
    for address in ("http://", "http://[::1/", "http://" + 70 * "a" + ".de/", "http://127.0.0.1:99999/"):
        refused(address, "cannot be fetched")
    assert len(refused("http://127.0.0.1:1/" + 5000 * "x", "characters)")) < 600


def test_a_name_and_password_are_sent_to_their_host_alone_and_not_shown(server, tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login other password secret\nmachine localhost login other password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    server.pages["/p"] = (200, {}, png(noise(13, 8)))
    server.pages["/away"] = (302, {"Location": server.address.replace("127.0.0.1", "localhost") + "/p"}, b"")
    address = server.address.replace("//", "//me:pass%40word@")
    pictures.load_image(address + "/p")
    assert server.asked[-1][1]["Authorization"] == "Basic bWU6cGFzc0B3b3Jk"
    pictures.load_image(address + "/away")
    assert "Authorization" not in server.asked[-1][1]
    pictures.load_image(server.address + "/p")  # what lies here for other programs stays here
    assert "Authorization" not in server.asked[-1][1]
    assert "pass" not in refused(address + "/missing", "/missing cannot be fetched")
    assert "pass" not in refused("http://me:password@127.0.0.1:99999/", "cannot be fetched")


def test_redirects_come_to_an_end(server):
    server.pages["/round"] = (302, {"Location": "/round"}, b"")
    refused(server.address + "/round", "/round cannot be fetched", "20 times")
    assert len(server.asked) == 20


def test_pictures_in_urls_of_this_machine(tmp_path):
    picture = noise(13, 8)
    text = "data:image/png;base64," + base64.b64encode(png(picture)).decode()
    path = tmp_path / "caf\u00e9 1.png"
    picture.save(path)
    assert "%20" in path.as_uri()
    plain = "data:image/png," + urllib.parse.quote_from_bytes(png(picture))
    loose = text.replace(";base64", "; charset=utf-8; BASE64 ").rstrip("=") + "\n"
    for address in (text, "DATA" + text[4:], plain, loose, path.as_uri(), f"file://{path}", f"file://localhost{path}"):
        assert np.array_equal(np.asarray(pictures.load_image(address)), np.asarray(picture))
    refused("data:", "no data URL")
    refused("data:image/png;base64,!", "no data URL")
    assert len(refused("data:image/png;base64," + 5000 * "A", "is not a picture")) < 150
    refused("file://elsewhere/p.png", "another machine")
    refused("file:///missing.png", "there is no picture /missing.png")
    refused("www.example.com/p.png", "http(s) URL")


def test_urls_that_give_no_picture(server):
    server.pages["/page"] = (200, {}, b"<html>nothing here</html>")
    server.pages["/nothing"] = (200, {}, b"")
    server.pages["/file"] = (302, {"Location": "file:///etc/hostname"}, b"")
    server.pages["/cut"] = (200, {"Content-Length": "100000"}, png(noise(50, 50)))
    refused(server.address + "/page", "/page is not a picture")
    refused(server.address + "/nothing", "empty")
    refused(server.address + "/missing", "/missing cannot be fetched", "Not Found")
    refused(server.address + "/file", "cannot be fetched", "leads to file:///etc/hostname, which is no http(s) URL")
    assert refused(server.address + "/cut", "/cut", "Connection broken").count("IncompleteRead") == 1
    server.shutdown()
    server.server_close()
    refused(server.address + "/p", "cannot be fetched", "refused")


def test_a_url_may_not_send_too_much(server, monkeypatch):
    monkeypatch.setattr(reading, "MAX_DOWNLOAD", 10_000)
    sent = []

    def endless(stream):
        while True:
            stream.write(bytes(4096))
            sent.append(4096)

    server.pages["/announced"] = (200, {"Content-Length": "10001"}, b"")
    server.pages["/endless"] = (200, {}, endless)
    refused(server.address + "/announced", "more than 10000 bytes")
    refused(server.address + "/endless", "more than 10000 bytes")


def test_a_url_may_not_take_too_long(server, monkeypatch):
    stop = threading.Event()

    def silent(stream):
        stop.wait(20)

    def trickle(stream):
        while not stop.wait(0.05):
            stream.write(b"x")
            stream.flush()

    server.pages["/silent"] = (200, {}, silent)
    server.pages["/trickle"] = (200, {}, trickle)
    try:
        monkeypatch.setattr(reading, "URL_TIMEOUT", 0.3)
        refused(server.address + "/silent", "/silent cannot be fetched", "timed out")
        monkeypatch.setattr(reading, "DOWNLOAD_TIMEOUT", 0.3)
        refused(server.address + "/trickle", "/trickle has not sent")
    finally:
        stop.set()


# --- preprocess_image against the reference --------------------------------------------------------


SIZES = [(64, 48), (67, 51), (33, 129), (130, 71), (17, 200)]


@pytest.fixture(params=[8, 4, 16])
def both(request):
    """Ours and the reference's preprocessing at one scale factor, each giving float32."""
    pytest.importorskip("torch")
    module = pytest.importorskip("diffusers.image_processor")
    processor = module.VaeImageProcessor(vae_scale_factor=request.param)

    def reference(image):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return processor.preprocess(image).float().numpy()

    def ours(image):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return pictures.preprocess_image(image, request.param)

    return ours, reference


def assert_same(ours, reference, image):
    mine, theirs = ours(image), reference(image)
    assert mine.dtype == np.float32
    np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("height, width", SIZES)
def test_pil_pictures_equal_the_reference_s(both, height, width):
    picture = noise(height, width)
    assert_same(*both, picture)
    assert_same(*both, [picture, noise(height, width, 1)])


def test_pictures_of_a_list_that_are_worked_on_at_one_size_equal_the_reference_s(both):
    assert_same(*both, [noise(66, 50), noise(67, 49, 1)])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("height, width", SIZES)
def test_arrays_equal_the_reference_s(both, height, width, dtype):
    array = np.random.default_rng(3).random((height, width, 3)).astype(dtype)
    for image in (
        array,
        array[None],
        np.stack([array, 1 - array]),
        [array, array * array],
        [array[None], 1 - array[None]],
        array - dtype(0.5),
    ):
        assert_same(*both, image)


@pytest.mark.parametrize("height, width", SIZES)
def test_tensors_equal_the_reference_s(both, height, width):
    import torch

    tensor = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(4))
    for image in (
        tensor,
        tensor[0],
        [tensor[0], tensor[1]],
        [tensor, tensor * tensor],
        tensor.double(),
        tensor.half(),
        tensor - 0.5,
    ):
        assert_same(*both, image)


def test_latents_pass_untouched(both):
    import torch

    latents = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(5))
    assert_same(*both, latents)
    assert_same(*both, latents[0])
    assert_same(*both, [latents[0], latents[1]])
    ours, _ = both
    np.testing.assert_array_equal(ours(latents.numpy()), latents.numpy())


def test_other_channel_counts_of_latents():
    latents = np.random.default_rng(0).normal(size=(1, 16, 5, 6)).astype(np.float32)
    np.testing.assert_array_equal(pictures.preprocess_image(latents, 8, latent_channels=16), latents)
    with pytest.raises(ValueError, match="16, 5, 6"):
        pictures.preprocess_image(latents, 8)


def test_pil_modes_are_made_rgb():
    picture = noise(16, 24)
    grey = picture.convert("L")
    np.testing.assert_array_equal(pictures.preprocess_image(grey, 8), pictures.preprocess_image(grey.convert("RGB"), 8))
    with_alpha = picture.copy()
    with_alpha.putalpha(128)
    np.testing.assert_array_equal(pictures.preprocess_image(with_alpha, 8), pictures.preprocess_image(picture, 8))


def test_uint8_arrays_mean_the_same_as_their_picture():
    picture = noise(24, 16)
    array = np.asarray(picture)
    np.testing.assert_array_equal(pictures.preprocess_image(array, 8), pictures.preprocess_image(picture, 8))


def test_negative_values_are_not_normalised_and_warned_of():
    array = np.linspace(-1, 1, 16 * 16 * 3).reshape(16, 16, 3).astype(np.float32)
    with pytest.warns(FutureWarning, match="-1 to 1"):
        result = pictures.preprocess_image(array, 8)
    np.testing.assert_array_equal(result, array.transpose(2, 0, 1)[None])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.preprocess_image(np.abs(array), 8)


def test_the_caller_s_array_is_not_written_to():
    array = np.random.default_rng(0).random((16, 16, 3)).astype(np.float32)
    before = array.copy()
    pictures.preprocess_image(array, 8)
    np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize(
    "image, error, words",
    [
        (np.zeros((16, 16)), ValueError, r"\(16, 16\)"),
        (np.zeros((16, 16, 1)), ValueError, "3 channels"),
        (np.zeros((16, 16, 4)), ValueError, "3 channels"),
        (np.zeros((1, 3, 16, 16)), ValueError, "3 channels"),
        (np.zeros((1, 1, 16, 16, 3)), ValueError, r"\(1, 1, 16, 16, 3\)"),
        (np.zeros((0, 16, 16, 3)), ValueError, r"\(0, 16, 16, 3\)"),
        (np.full((16, 16, 3), 200.0), ValueError, "divide by 255"),
        (np.zeros((16, 16, 3), np.int64), ValueError, "int64"),
        (np.zeros((16, 16, 3), bool), ValueError, "bool"),
        (np.full((16, 16, 3), np.nan), ValueError, "NaN"),
        (np.full((16, 16, 3), np.inf), ValueError, "infinite"),
        (np.full((1, 4, 8, 8), np.nan), ValueError, "NaN"),
        (np.zeros((1, 4, 8, 8), np.int32), ValueError, "int32"),
        (np.zeros((7, 16, 3)), ValueError, "at least 8"),
        (PIL.Image.new("RGB", (16, 7)), ValueError, "16 x 7"),
        (PIL.Image.new("RGB", (16, 0)), ValueError, "16 x 0"),
        ([], ValueError, "empty list"),
        ([np.zeros((16, 16, 3)), np.zeros((16, 24, 3))], ValueError, "different shapes"),
        ([PIL.Image.new("RGB", (16, 16)), np.zeros((16, 16, 3))], TypeError, "mixes"),
        ([np.zeros((16, 16, 3)), PIL.Image.new("RGB", (16, 16))], TypeError, "mixes"),
        ("a.png", TypeError, "str"),
        (None, TypeError, "NoneType"),
    ],
)
def test_pictures_that_mean_nothing_are_refused(image, error, words):
    with pytest.raises(error, match=words):
        pictures.preprocess_image(image, 8)


def test_the_advice_of_messages_helps(tmp_path):
    """What is refused with advice is taken when the advice has been followed."""
    image = np.random.default_rng(0).random((16, 16, 3))
    mask = np.zeros((16, 16), np.uint8)
    mask[:8] = 255
    photos = [noise(16, 16), noise(16, 32)]
    small = noise(5, 40)
    for words, refused_, taken in (
        ("divide by 255", lambda: pictures.preprocess_image(image * 255, 8),
         lambda: pictures.preprocess_image(image, 8)),
        ("as uint8", lambda: pictures.preprocess_image(image * 255, 8),
         lambda: pictures.preprocess_image((image * 255).astype(np.uint8), 8)),
        ("each picture alone", lambda: pictures.preprocess_image(photos, 8),
         lambda: [pictures.preprocess_image(photo, 8) for photo in photos]),
        ("resize them", lambda: pictures.preprocess_image(photos, 8),
         lambda: pictures.preprocess_image([photo.resize((16, 16)) for photo in photos], 8)),
        ("enlarge it", lambda: pictures.preprocess_image(small, 8),
         lambda: pictures.preprocess_image(small.resize((320, 40)), 8)),
        ("by 255", lambda: pictures.preprocess_mask(mask), lambda: pictures.preprocess_mask(mask / 255)),
        ("mask[:, :, 0]", lambda: pictures.preprocess_mask(np.stack([mask / 255] * 3, -1)),
         lambda: pictures.preprocess_mask(np.stack([mask / 255] * 3, -1)[:, :, 0])),
        ("resize it", lambda: pictures.fit_mask(noise(30, 20), (90, 70), (11, 8), 8),
         lambda: pictures.fit_mask(noise(30, 20).resize((90, 70)), (90, 70), (11, 8), 8)),
    ):  # fmt: skip
        with pytest.raises(InputError, match=re.escape(words)):
            refused_()
        taken()
    many = [noise(8, 8 + i) for i in range(100)]
    with pytest.raises(InputError) as caught:
        pictures.preprocess_image(many, 1)
    assert len(str(caught.value)) < 250 and caught.value.parameter == "image"
    path = tmp_path / "p.png"
    noise(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="`image` is truncated"):
        pictures.preprocess_image(PIL.Image.open(path), 8)


# --- postprocess_image -----------------------------------------------------------------------------


@pytest.fixture
def decoded():
    """What a decoder gives: beyond [-1, 1] in places."""
    return np.random.default_rng(6).normal(0, 0.8, (3, 3, 10, 14)).astype(np.float32)


@pytest.mark.parametrize("flags", [None, [True, False, True]])
def test_postprocessing_equals_the_reference_s(decoded, flags):
    torch = pytest.importorskip("torch")
    processor = pytest.importorskip("diffusers.image_processor").VaeImageProcessor()
    if flags:
        decoded[1] = 0  # as the safety checker leaves a picture
    for output_type in ("np", "pil"):
        theirs = processor.postprocess(torch.from_numpy(decoded), output_type, flags)
        ours = pictures.postprocess_image(decoded, output_type, flags)
        assert type(ours) is type(theirs)
        for mine, other in zip(ours, theirs):
            np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))


def test_latents_are_given_back(decoded):
    assert pictures.postprocess_image(decoded, "latent") is decoded


def test_postprocessing_refuses():
    with pytest.raises(ValueError, match="'jpeg'"):
        pictures.postprocess_image(np.zeros((1, 3, 8, 8)), "jpeg")
    with pytest.raises(ValueError, match=r"\(3, 8, 8\)"):
        pictures.postprocess_image(np.zeros((3, 8, 8)), "pil")
    with pytest.raises(ValueError, match="NaN"):
        pictures.postprocess_image(np.full((1, 3, 8, 8), np.nan), "pil")
    with pytest.raises(ValueError, match="2 entries for 1"):
        pictures.postprocess_image(np.zeros((1, 3, 8, 8)), "pil", [True, False])


def test_a_picture_survives_there_and_back():
    picture = noise(16, 24)
    result = pictures.postprocess_image(pictures.preprocess_image(picture, 8), "pil")
    np.testing.assert_array_equal(np.asarray(result[0]), np.asarray(picture))


# --- masks -----------------------------------------------------------------------------------------


def soft_mask(*shape):
    """Values in [0, 1], exactly 0.5 among them."""
    values = np.random.default_rng(7).random(shape).astype(np.float32)
    values.ravel()[:3] = (0.5, np.nextafter(np.float32(0.5), np.float32(0)), 1.0)
    return values


def reference_mask(mask, batch_size):
    import copy

    module = pytest.importorskip("diffusers.pipelines.stable_diffusion_diffedit.pipeline_stable_diffusion_diffedit")
    # A copy: the reference writes into what it is given.
    return module.preprocess_mask(copy.deepcopy(mask), batch_size).float().numpy()


@pytest.mark.parametrize(
    "make, batch_size",
    [
        (lambda torch: soft_mask(6, 9), 1),
        (lambda torch: soft_mask(6, 9), 3),
        (lambda torch: soft_mask(1, 6, 9), 2),
        (lambda torch: soft_mask(2, 6, 9), 2),
        (lambda torch: soft_mask(2, 1, 6, 9), 2),
        (lambda torch: [soft_mask(6, 9), 1 - soft_mask(6, 9)], 2),
        (lambda torch: [soft_mask(1, 6, 9), 1 - soft_mask(1, 6, 9)], 2),
        (lambda torch: torch.from_numpy(soft_mask(6, 9)), 2),
        (lambda torch: torch.from_numpy(soft_mask(2, 6, 9)), 2),
        (lambda torch: torch.from_numpy(soft_mask(1, 1, 6, 9)), 2),
        (lambda torch: [torch.from_numpy(soft_mask(6, 9)), torch.from_numpy(1 - soft_mask(6, 9))], 2),
        (lambda torch: noise(6, 9), 2),
        (lambda torch: [noise(6, 9).convert("L"), noise(6, 9, 2)], 2),
        (lambda torch: (soft_mask(2, 6, 9) > 0.5).astype(np.int64), 2),
    ],
)
def test_masks_equal_the_reference_s(make, batch_size):
    mask = make(pytest.importorskip("torch"))
    ours = pictures.preprocess_mask(mask, batch_size)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, reference_mask(mask, batch_size))


def test_the_caller_s_mask_is_not_written_to():
    mask = soft_mask(4, 5)
    before = mask.copy()
    pictures.preprocess_mask(mask)
    np.testing.assert_array_equal(mask, before)
    binary = np.eye(4, dtype=np.float32)[None, None]
    assert not np.shares_memory(pictures.preprocess_mask(binary), binary)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float16, np.float64])
def test_masks_of_any_number_type(dtype):
    mask = np.eye(5, 7).astype(dtype)
    np.testing.assert_array_equal(pictures.preprocess_mask(mask)[0, 0], np.eye(5, 7))


@pytest.mark.parametrize(
    "mask, batch_size, error, words",
    [
        (np.eye(4) * 255, 1, ValueError, "divide"),
        (np.eye(4, dtype=np.uint8) * 255, 1, ValueError, "divide"),
        (np.eye(4) - 0.5, 1, ValueError, r"\[0, 1\]"),
        (np.full((4, 4), np.nan), 1, ValueError, "NaN"),
        (np.full((4, 4), np.inf), 1, ValueError, r"\[0, 1\]"),
        (np.zeros((3, 4, 4)), 2, ValueError, "batch size 3"),
        (np.zeros((3, 4, 4)), 1, ValueError, "batch size 3"),
        (np.zeros((1, 3, 4, 4)), 1, ValueError, "1 channel"),
        (np.zeros((0, 4)), 1, ValueError, "empty"),
        (np.zeros(4), 1, ValueError, r"\(4,\)"),
        (np.zeros((1, 1, 1, 4, 4)), 1, ValueError, r"\(1, 1, 1, 4, 4\)"),
        ([], 1, ValueError, "empty list"),
        ([np.zeros((4, 4)), np.zeros((4, 5))], 2, ValueError, "different shapes"),
        ([PIL.Image.new("L", (4, 4)), PIL.Image.new("L", (4, 5))], 2, ValueError, "different shapes"),
        ([PIL.Image.new("L", (4, 4)), np.zeros((4, 4))], 2, TypeError, "mixes"),
        ("mask.png", 1, TypeError, "str"),
        (np.array([["a"]]), 1, TypeError, "numbers"),
        (np.zeros((4, 4), complex), 1, TypeError, "numbers"),
    ],
)
def test_masks_that_mean_nothing_are_refused(mask, batch_size, error, words):
    with pytest.raises(error, match=words):
        pictures.preprocess_mask(mask, batch_size)


def test_a_wide_grey_mask_is_scaled():
    mask = PIL.Image.fromarray(np.array([[0, 20000, 40000, 65535]], np.uint16))
    assert pictures.preprocess_mask(mask)[0, 0].tolist() == [[0, 0, 1, 1]]


def test_mask_to_pil_and_back():
    mask = (np.random.default_rng(8).random((2, 5, 7)) > 0.5).astype(np.int64)
    result = pictures.mask_to_pil(mask)
    assert [p.mode for p in result] == ["L", "L"] and result[0].size == (7, 5)
    assert set(np.unique(np.asarray(result[0]))) == {0, 255}
    np.testing.assert_array_equal(pictures.preprocess_mask(result, 2)[:, 0], mask)
    assert len(pictures.mask_to_pil(mask[0])) == 1
    with pytest.raises(ValueError, match=r"\(1, 2, 5, 7\)"):
        pictures.mask_to_pil(mask[None])


# --- sizes -----------------------------------------------------------------------------------------


def test_fitting_is_what_preprocessing_does():
    picture = noise(67, 51)
    fitted, notice = pictures.fit_picture(picture, 8)
    assert fitted.size == (48, 64) and "51 x 67" in notice and "48 x 64" in notice
    np.testing.assert_array_equal(pictures.preprocess_image(fitted, 8), pictures.preprocess_image(picture, 8))


def test_a_fitting_picture_is_left_alone():
    picture = noise(64, 48)
    assert pictures.fit_picture(picture, 8) == (picture, None)
    assert pictures.fit_picture(picture, 8, max_pixels=64 * 48) == (picture, None)


def test_large_pictures_are_scaled_down_in_their_proportions():
    fitted, notice = pictures.fit_picture(noise(400, 800), 8, max_pixels=128 * 128)
    width, height = fitted.size
    assert width * height <= 128 * 128 and width % 8 == height % 8 == 0
    assert width * height > 0.7 * 128 * 128 and abs(width / height - 2) < 0.3
    assert notice is not None
    # Even the narrowest strip keeps one latent of width.
    assert pictures.fit_picture(noise(3000, 9), 8, max_pixels=4096)[0].width == 8


def test_small_pictures_are_said_to_be_small_until_they_are_enlarged():
    for height, width, multiple in ((64, 48, True), (128, 128, True), (67, 51, False), (30, 300, False)):
        fitted, notice = pictures.fit_picture(noise(height, width), 8, max_pixels=int(1.5 * 256**2))
        assert (fitted.size == (width, height)) == multiple
        assert f"{width} x {height}" in notice and "far below what it was made for" in notice
        enlarged = re.search(r"enlarge the picture first, to about (\d+) x (\d+)", notice)
        larger, wider = int(enlarged[2]), int(enlarged[1])
        assert 0.8 * 256**2 < larger * wider < 256**2 and abs(wider / larger - width / height) < 0.05 * width / height
        _, notice = pictures.fit_picture(noise(larger, wider), 8, max_pixels=int(1.5 * 256**2))
        assert notice is None or "far below" not in notice
    assert pictures.fit_picture(noise(136, 136), 8, max_pixels=int(1.5 * 256**2))[1] is None


def test_too_small_pictures_are_refused():
    with pytest.raises(ValueError, match="7 x 64"):
        pictures.fit_picture(noise(64, 7), 8)


def test_results_come_back_at_their_size():
    picture, mask = noise(16, 24), pictures.mask_to_pil(np.eye(4, 6))[0]
    assert pictures.restore_size(picture, (24, 16)) is picture
    assert pictures.restore_size(picture, (50, 33)).size == (50, 33)
    large = pictures.restore_size(mask, (51, 35))
    assert set(np.unique(np.asarray(large))) == {0, 255}


def test_masks_survive_the_way_to_the_picture_s_size_and_back():
    grid = (np.random.default_rng(9).random((1, 8, 11)) > 0.5).astype(np.float32)
    drawn = pictures.restore_size(pictures.mask_to_pil(grid)[0], (117, 91))
    back = pictures.fit_mask(drawn, (117, 91), (11, 8), 8)
    assert back.shape == (1, 1, 8, 11)
    np.testing.assert_array_equal(back[0], grid)


def test_a_latent_changes_where_half_of_it_is_marked():
    mask = np.zeros((16, 16), np.float32)
    mask[:8, :4] = 1  # half of the first latent
    mask[8:, :3] = 1  # less than half of the third
    result = pictures.fit_mask(pictures.mask_to_pil(mask)[0], (16, 16), (2, 2), 8)
    assert result[0, 0].tolist() == [[1, 0], [0, 0]]


def test_masks_of_another_size_are_refused():
    mask = PIL.Image.new("L", (30, 20))
    for size in ((90, 70), (88, 64), (11, 8)):
        pictures.fit_mask(mask.resize(size), (90, 70), (11, 8), 8)
    with pytest.raises(ValueError, match="30 x 20.*90 x 70 or 88 x 64 or 11 x 8"):
        pictures.fit_mask(mask, (90, 70), (11, 8), 8)


# --- grids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", [None, 10])
def test_grids_equal_the_reference_s(resize):
    reference = pytest.importorskip("diffusers.utils").make_image_grid
    images = [noise(12, 9, seed) for seed in range(6)]
    ours = pictures.make_image_grid(images, rows=2, cols=3, resize=resize)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(reference(images, 2, 3, resize)))


def test_a_grid_that_is_not_full_is_refused():
    with pytest.raises(ValueError, match="5 pictures.*2 rows and 3"):
        pictures.make_image_grid([noise(4, 4)] * 5, rows=2, cols=3)
    with pytest.raises(ValueError):
        pictures.make_image_grid([], rows=0, cols=3)


def test_a_labelled_grid_shows_every_picture_and_caption():
    pixels = noise(300, 400)
    mask = pictures.mask_to_pil(np.eye(300, 400))[0]
    items = [("original: a red apple", pixels), ("mask", mask), ("edited " * 40, pixels.rotate(180))]
    grid = np.asarray(pictures.labelled_grid(items))
    strip = grid.shape[0] - 300
    # Each tile stands in the grid pixel by pixel, at the lower edge above the border.
    found = []
    for _, picture in items:
        tile = np.asarray(picture.convert("RGB"))
        for top in range(strip + 1):
            for left in range(grid.shape[1] - 400 + 1):
                if np.array_equal(grid[top, left : left + 400], tile[0]) and np.array_equal(
                    grid[top : top + 300, left : left + 400], tile
                ):
                    found.append((top, left))
    assert len(found) == 3 and found == sorted(found)
    for top, left in found:
        assert (grid[:top, left : left + 400] < 128).any(), "no caption above a picture"


def test_small_pictures_are_enlarged_for_their_captions():
    grid = pictures.labelled_grid([("a", noise(16, 24)), ("b", noise(16, 24))], smallest_side=64)
    assert grid.width > 2 * 24 * 4 and grid.height > 64
    with pytest.raises(ValueError):
        pictures.labelled_grid([])


# --- writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.jpg", "a.jpeg", "a.webp", "a.bmp", "a.tif"])
def test_saved_pictures_can_be_loaded(tmp_path, name):
    picture = noise(10, 13)
    pictures.save_image_atomically(picture, tmp_path / name)
    loaded = pictures.load_image(tmp_path / name)
    assert loaded.size == picture.size
    if name.lower().endswith(pictures.LOSSLESS_EXTENSIONS):
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(picture))
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    "name, words",
    [
        ("nowhere/a.png", "does not exist"),
        ("a.xyz", "has to end in .png"),
        ("a", "has to end in"),
        (".", "is a folder"),
        (".png", "has to end in"),
    ],
)
def test_paths_that_cannot_be_written(tmp_path, name, words):
    with pytest.raises(ValueError, match=words):
        pictures.check_output_path(tmp_path / name)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that nobody can write into")
def test_a_folder_that_nobody_can_write_into():
    with pytest.raises(ValueError, match=r"no file can be written in the folder /proc/self of the output a.png \(.+\)"):
        pictures.check_output_path("/proc/self/a.png")


def test_other_extensions_can_be_asked_for(tmp_path):
    path = tmp_path / "a.safetensors"
    assert pictures.check_output_path(path, (".safetensors",)) == path
    assert not os.listdir(tmp_path), "nothing is left of the attempt to write"
    with pytest.raises(ValueError, match="end in .safetensors"):
        pictures.check_output_path(tmp_path / "a.png", (".safetensors",))


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path):
    old = noise(5, 5)
    path = tmp_path / "a.png"
    old.save(path)
    before = path.read_bytes()

    class Broken(PIL.Image.Image):
        def save(self, where, **options):
            with open(where, "wb") as file:
                file.write(b"half a pict")
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        pictures.save_images_atomically({tmp_path / "b.png": noise(5, 5, 1), path: Broken()})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]


def test_an_interrupt_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with pictures.atomic_path(tmp_path / "a.bin") as draft:
            draft.write_bytes(b"half")
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_new_files_get_usual_permissions_and_links_stay(tmp_path):
    with pictures.atomic_path(tmp_path / "a.bin") as draft:
        draft.write_bytes(b"whole")
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    (tmp_path / "link.png").symlink_to(tmp_path / "target.png")
    pictures.save_image_atomically(noise(4, 4), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "target.png").is_file()
