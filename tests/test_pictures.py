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

from mindiffedit import masks
from mindiffedit.arrays import to_numpy
from mindiffedit.errors import InputError, InputTypeError
from mindiffedit.images import colours, pictures, reading, writing


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
        reading.load_image(path)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


# --- tensors ---------------------------------------------------------------------------------------


def test_tensors_become_arrays_and_arrays_come_back_uncopied():
    mindspore = pytest.importorskip("mindspore")
    torch = pytest.importorskip("torch")
    values = np.array([[1.5, -2.0], [0.25, 3.0]], np.float32)
    assert to_numpy(values) is values
    for tensor in (mindspore.Tensor(values), mindspore.Tensor(values).astype(mindspore.bfloat16),
                   torch.from_numpy(values).requires_grad_(True), torch.from_numpy(values).bfloat16()):  # fmt: skip
        assert to_numpy(tensor).dtype == np.float32 and np.array_equal(to_numpy(tensor), values)


# --- load_image ------------------------------------------------------------------------------------


def various_pictures(tmp_path):
    """One file for each way in which a picture can differ from plain RGB."""
    picture = noise(20, 31)
    alpha = picture.copy()
    alpha.putalpha(PIL.Image.fromarray(np.linspace(0, 255, 20 * 31).reshape(20, 31).astype(np.uint8)))
    palette = picture.quantize(17)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    for kind, one, ending, options in (
        ("rgb", picture, "png", {}),
        ("alpha", alpha, "png", {}),
        ("palette", palette, "png", {}),
        ("palette with transparency", palette, "png", dict(transparency=bytes(range(17)))),
        ("grey", picture.convert("L"), "png", {}),
        ("grey and alpha", alpha.convert("LA"), "png", {}),
        ("one bit", picture.convert("1"), "png", {}),
        ("cmyk", picture.convert("CMYK"), "jpg", {}),
        ("upright by exif", picture, "jpg", dict(exif=exif)),
        ("still gif", palette, "gif", {}),
        ("webp", picture, "webp", {}),
    ):
        one.save(tmp_path / f"p.{ending}", **options)
        yield kind, str(tmp_path / f"p.{ending}")


def test_load_image_is_the_reference_s(tmp_path):
    reference = pytest.importorskip("diffusers.utils").load_image
    for kind, path in various_pictures(tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = reference(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours = reading.load_image(path)
        assert ours.mode == "RGB" and ours.size == expected.size, kind
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected), err_msg=kind)
        upright = reading.load_image(path, lambda loaded: loaded)
        assert upright.size == ours.size and (upright.mode == "L") == (kind == "grey"), kind
        assert ours.size == ((20, 31) if kind == "upright by exif" else (31, 20))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    for name in ("wide.png", "wide.tif"):
        PIL.Image.fromarray(levels).save(tmp_path / name)
        pixels = np.asarray(reading.load_image(tmp_path / name))
        np.testing.assert_array_equal(pixels, np.arange(256).reshape(16, 16, 1).repeat(3, 2))
    mask = PIL.Image.fromarray(np.array([[0, 20000, 40000, 65535]], np.uint16))
    assert masks.preprocess_mask(mask)[0, 0].tolist() == [[0, 0, 1, 1]]
    # Mode I holds either, and is told by its values.
    for values, expected in (([0, 7, 255], [0, 7, 255]), ([0, 257 * 9, 65535], [0, 9, 255])):
        rgb = colours.to_rgb(PIL.Image.fromarray(np.array([values], np.int32)))
        assert np.asarray(rgb)[0, :, 0].tolist() == expected
    with pytest.raises(ValueError, match="-1 to 70000"):
        colours.to_rgb(PIL.Image.fromarray(np.array([[-1, 70000]], np.int32)))
    with pytest.raises(ValueError, match="floating-point"):
        colours.to_rgb(PIL.Image.fromarray(np.array([[0.5]], np.float32)))


def test_what_is_not_a_picture_is_refused(tmp_path):
    for name, data, words in (
        ("empty.png", b"", ["empty.png is an empty file"]),
        ("text.png", b"not a picture at all " * 50, ["text.png is not a picture"]),
        ("phone.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), ["HEIC", "save it as JPEG or PNG"]),
    ):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, *words)
    noise(5, 5).save(tmp_path / "drawing.eps")
    refused(tmp_path / "drawing.eps", "EPS")
    refused(str(tmp_path / "nothing.png"), "there is no picture", "nothing.png")
    refused(str(tmp_path), "is a folder")
    refused(7, "int")
    refused(PIL.Image.new("RGB", (0, 5)), "0 x 5")


def test_truncated_files_are_refused(tmp_path):
    for name in ("p.jpg", "p.webp", "p.tif", "p.bmp", "p.gif", "p.png"):
        path = tmp_path / name
        noise(64, 64).save(path)
        data = path.read_bytes()
        reading.load_image(path)
        for share in (0.3, 0.9):
            path.write_bytes(data[: int(len(data) * share)])
            message = refused(path, name)
            assert any(words in message for words in ("truncated", "not a picture", "cannot be read"))
    refused(PIL.Image.open(path), "truncated")
    with pytest.raises(InputError, match="`image` is truncated"):
        pictures.preprocess_image(PIL.Image.open(path), 8)


def bomb(width, height):
    """The header of a PNG that says it decodes to so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    before = PIL.Image.MAX_IMAGE_PIXELS
    path = tmp_path / "bomb.png"
    decoded = []
    with monkeypatch.context() as patch, warnings.catch_warnings():
        patch.setattr(PIL.ImageFile.ImageFile, "load", lambda self: decoded.append(self))
        warnings.simplefilter("error")
        path.write_bytes(bomb(8200, 8192))
        refused(path, "8200 x 8192", "not decoded")
        path.write_bytes(bomb(14000, 14000))  # above twice Pillow's own limit Pillow itself stops
        refused(path, "not decoded")
    assert decoded == [] and PIL.Image.MAX_IMAGE_PIXELS == before
    monkeypatch.setattr(reading, "MAX_PIXELS", 35)
    noise(5, 7).save(path)
    assert reading.load_image(path).size == (7, 5), "the limit itself is accepted"
    noise(6, 6).save(path)
    refused(path, "6 x 6")


def test_animated_pictures_are_refused_and_previews_are_not(tmp_path):
    for name in ("p.gif", "p.png", "p.webp", "p.tif"):
        noise(8, 8, 1).save(tmp_path / name, save_all=True, append_images=[noise(8, 8, 2)])
        refused(tmp_path / name, "animated")
    # Phones store a second, smaller picture in their JPEGs (MPO); the first is the photograph.
    path = tmp_path / "phone.jpg"
    noise(32, 24, 1).save(path, "MPO", save_all=True, append_images=[noise(32, 24, 2)])
    assert PIL.Image.open(path).n_frames == 2 and reading.load_image(path).size == (24, 32)


def chunk(name, data, checksum=None):
    """A chunk of a PNG; its checksum is right unless one is given."""
    right = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", right if checksum is None else checksum)


def odd_pngs(picture):
    """The same pixels in files with something odd beside them; Pillow alone refuses nearly all of them."""
    plain = png(picture)
    head, body, end = plain[:33], plain[33:], plain[-12:]
    until_end = plain[:-12]
    assert end[4:8] == b"IEND"
    much = b"word\0\0" + zlib.compress(b"nodes and links; " * 100_000)
    odd = {
        "much text": [(b"zTXt", much)],
        "much international text": [(b"iTXt", b"word\0\1\0\0\0" + much[6:])],
        "many texts": [(b"zTXt", b"word\0\0" + zlib.compress(bytes(2**20 - 1)))] * 66,
        "text with a wrong checksum": [(b"tEXt", b"word\0text", 5)],
        "a long profile": [(b"iCCP", b"name\0\0" + zlib.compress(b"long" * 2**19))],
        "a damaged profile": [(b"iCCP", b"name\0\0nothing")],
        "a profile with a wrong checksum": [(b"iCCP", b"name\0\0" + zlib.compress(b"x"), 5)],
        "no gamma": [(b"gAMA", bytes(4))],
        "damaged EXIF data": [(b"eXIf", b"MM\0*\0\0\xff\xff")],
        "no EXIF data": [(b"eXIf", b"nothing")],
        "an unknown chunk": [(b"zzZz", b"anything")],
        "a chunk without a name": [(b"\xff\xfe\xfdz", b"anything")],
        **{f"an empty {name}": [(name, b"")] for name in (b"iCCP", b"sRGB")},
        **{f"a short {name}": [(name, b"ab")] for name in (b"gAMA", b"pHYs", b"cHRM", b"tRNS", b"acTL")},
    }
    return {
        **{kind: head + b"".join(chunk(*one) for one in chunks) + body for kind, chunks in odd.items()},
        "much text after the pixels": until_end + chunk(b"zTXt", much) + end,
        "text with a wrong checksum after the pixels": until_end + chunk(b"tEXt", b"word\0text", 5) + end,
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
            assert np.array_equal(np.asarray(reading.load_image(path)), np.asarray(picture)), kind
    path.write_bytes(odd_pngs(picture)["a long profile"])
    assert reading.load_image(path).info["icc_profile"] == b"long" * 2**19
    assert before == (
        PIL.PngImagePlugin.MAX_TEXT_CHUNK, PIL.ImageFile.LOAD_TRUNCATED_IMAGES, PIL.Image.MAX_IMAGE_PIXELS
    )  # fmt: skip
    # A picture whose transparency and animation are in order keeps them.
    clear = png(picture.quantize(9), transparency=bytes(range(9)))
    path.write_bytes(clear[:33] + chunk(b"tEXt", b"word\0text", 5) + clear[33:])
    assert reading.load_image(path, lambda loaded: loaded).has_transparency_data
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
    lying = [exif(turned), exif(turned, outside), exif(turned, unknown)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in upright + lying:
            picture.save(path, exif=data)
            assert reading.load_image(path).size == ((20, 31) if data in lying else (31, 20)), data


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}])
def test_a_jpeg_without_its_last_bytes(tmp_path, options):
    path = tmp_path / "phone.jpg"

    def data_of(height, **more):
        noise(height, 120).save(path, quality=90, **options, **more)
        return path.read_bytes()

    data, whole = data_of(200), np.asarray(reading.load_image(path)).astype(int)
    for lost in (1, 2):
        path.write_bytes(data[:-lost])
        assert np.array_equal(np.asarray(reading.load_image(path)), whole)
    path.write_bytes(data[:-200])
    cut = np.asarray(reading.load_image(path))
    assert np.array_equal(cut[:180], whole[:180]) and not np.array_equal(cut, whole)
    path.write_bytes(data[: len(data) // 2])
    refused(path, "truncated", "part of it is missing")
    path.write_bytes(data_of(192)[:-20])  # the last row of blocks is a whole one
    assert reading.load_image(path).size == (120, 192)
    path.write_bytes(data_of(200, progressive=True)[:-200])  # of its last scan, which is about all rows
    refused(path, "truncated", "part of it is missing")


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
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def test_a_picture_from_a_url(server):
    picture = noise(13, 8)
    server.pages["/p"] = (200, {}, png(picture))
    server.pages["/moved"] = (302, {"Location": "/p"}, b"")
    for path in ("/p", "/moved"):
        result = reading.load_image(server.address + path)
        np.testing.assert_array_equal(np.asarray(result), np.asarray(picture))
    server.pages["/round"], server.asked[:] = (302, {"Location": "/round"}, b""), []
    refused(server.address + "/round", "/round cannot be fetched", "20 times")
    assert len(server.asked) == 20


def test_urls_are_taken_as_browsers_take_them(server):
    """What is asked for, by what was typed. Nothing is encoded twice."""
    asked = {
        "/caf\u00e9\u2013\u65e5.png": "/caf%C3%A9%E2%80%93%E6%97%A5.png", "/caf%C3%A9.png": "/caf%C3%A9.png",
        "/caf%E9.png": "/caf%E9.png", "/a b.png": "/a%20b.png", "/a%20b.png": "/a%20b.png",
        "/a[1]|2.png": "/a%5B1%5D%7C2.png", "/p?x=\u00e9&y=a b": "/p?x=%C3%A9&y=a%20b", "/p?x=%26&y=1+2":
        "/p?x=%26&y=1+2", "/p#place": "/p", "\\a\\b.png": "/a/b.png", "/a\tb.png": "/ab.png", "/end \n": "/end",
        "?x=1": "/?x=1", "": "/",
    }  # fmt: skip
    picture = png(noise(13, 8))
    server.pages.update({path: (200, {}, picture) for path in asked.values()})
    for typed, path in asked.items():
        assert reading.load_image(server.address + typed).size == (8, 13), typed
        assert server.asked[-1][0] == path
    slashes = server.address.replace("/", "\\") + "\\p"
    for whole in ("  " + server.address, server.address.replace("http", "HTTP"), Path(server.address + "/p"), slashes):
        assert reading.load_image(whole).size == (8, 13)
    headers = server.asked[-1][1]
    assert headers["User-Agent"].startswith("mindiffedit/") and headers["Accept-Encoding"] == "identity"
    server.pages["/moved"] = (302, {"Location": "/caf\u00e9 \u2013.png".encode().decode("latin-1")}, b"")
    server.pages["/caf%C3%A9%20%E2%80%93.png"] = (200, {}, picture)
    assert reading.load_image(server.address + "/moved").size == (8, 13)
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
    reading.load_image(address + "/p")
    assert server.asked[-1][1]["Authorization"] == "Basic bWU6cGFzc0B3b3Jk"
    reading.load_image(address + "/away")
    assert "Authorization" not in server.asked[-1][1]
    reading.load_image(server.address + "/p")  # what lies here for other programs stays here
    assert "Authorization" not in server.asked[-1][1]
    assert "pass" not in refused(address + "/missing", "/missing cannot be fetched")
    assert "pass" not in refused("http://me:password@127.0.0.1:99999/", "cannot be fetched")


def test_pictures_in_urls_of_this_machine(tmp_path):
    picture = noise(13, 8)
    text = "data:image/png;base64," + base64.b64encode(png(picture)).decode()
    path = tmp_path / "caf\u00e9 1.png"
    picture.save(path)
    assert "%20" in path.as_uri()
    plain = "data:image/png," + urllib.parse.quote_from_bytes(png(picture))
    loose = text.replace(";base64", "; charset=utf-8; BASE64 ").rstrip("=") + "\n"
    for address in (text, "DATA" + text[4:], plain, loose, path.as_uri(), f"file://{path}", f"file://localhost{path}"):
        assert np.array_equal(np.asarray(reading.load_image(address)), np.asarray(picture))
    for address, words in (("data:", "no data URL"), ("data:image/png;base64,!", "no data URL"),
                           ("file://elsewhere/p.png", "another machine"), ("www.example.com/p.png", "http(s) URL"),
                           ("file:///missing.png", "there is no picture /missing.png")):  # fmt: skip
        refused(address, words)
    assert len(refused("data:image/png;base64," + 5000 * "A", "is not a picture")) < 150


def test_urls_that_give_no_picture(server, monkeypatch):
    def endless(stream):
        while True:
            stream.write(bytes(4096))

    monkeypatch.setattr(reading, "MAX_DOWNLOAD", 10_000)
    for path, page, words in (
        ("/page", (200, {}, b"<html>nothing here</html>"), ["/page is not a picture"]),
        ("/nothing", (200, {}, b""), ["empty"]),
        ("/missing", (404, {}, b"none"), ["/missing cannot be fetched", "Not Found"]),
        ("/file", (302, {"Location": "file:///etc/hostname"}, b""),
         ["cannot be fetched", "leads to file:///etc/hostname, which is no http(s) URL"]),
        ("/announced", (200, {"Content-Length": "10001"}, b""), ["more than 10000 bytes"]),
        ("/endless", (200, {}, endless), ["more than 10000 bytes"]),
        ("/cut", (200, {"Content-Length": "9000"}, png(noise(50, 50))), ["/cut", "Connection broken"]),
    ):  # fmt: skip
        server.pages[path] = page
        message = refused(server.address + path, *words)
    assert message.count("IncompleteRead") == 1
    server.shutdown()
    server.server_close()
    refused(server.address + "/p", "cannot be fetched", "refused")


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


@pytest.mark.parametrize("factor", [8, 4, 16])
def test_preprocessing_equals_the_reference_s(factor):
    torch = pytest.importorskip("torch")
    processor = pytest.importorskip("diffusers.image_processor").VaeImageProcessor(vae_scale_factor=factor)

    def assert_same(image):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            ours, theirs = pictures.preprocess_image(image, factor), processor.preprocess(image).float().numpy()
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, theirs)

    assert_same([noise(66, 50), noise(67, 49, 1)])  # of two sizes, but worked on at one
    for height, width in ((64, 48), (67, 51), (33, 129), (130, 71), (17, 200)):
        assert_same(noise(height, width))
        assert_same([noise(height, width), noise(height, width, 1)])
        values = np.random.default_rng(3).random((height, width, 3))
        for array in (values.astype(np.float32), values, values.astype(np.float16)):
            for image in (array, array[None], np.stack([array, 1 - array]), [array, array * array],
                          [array[None], 1 - array[None]], array - array.dtype.type(0.5)):  # fmt: skip
                assert_same(image)
        tensor = torch.from_numpy(np.stack([values, 1 - values]).transpose(0, 3, 1, 2)).float()
        for image in (tensor, tensor[0], [tensor[0], tensor[1]], [tensor, tensor * tensor], tensor.double(),
                      tensor.half(), tensor - 0.5):  # fmt: skip
            assert_same(image)
    latents = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(5))
    for image in (latents, latents[0], [latents[0], latents[1]]):  # pass untouched
        assert_same(image)


def test_latents_pass_untouched():
    for channels, options in ((4, {}), (16, {"latent_channels": 16})):
        latents = np.random.default_rng(0).normal(size=(2, channels, 9, 7)).astype(np.float32)
        np.testing.assert_array_equal(pictures.preprocess_image(latents, 8, **options), latents)
    with pytest.raises(ValueError, match="16, 9, 7"):
        pictures.preprocess_image(latents, 8)


def test_pil_modes_are_made_rgb():
    picture = noise(16, 24)
    grey, clear = picture.convert("L"), picture.copy()
    clear.putalpha(128)
    for image, same in ((grey, grey.convert("RGB")), (clear, picture), (np.asarray(picture), picture)):
        assert np.array_equal(pictures.preprocess_image(image, 8), pictures.preprocess_image(same, 8))


def test_negative_values_are_not_normalised_and_warned_of():
    array = np.linspace(-1, 1, 16 * 16 * 3).reshape(16, 16, 3).astype(np.float32)
    before = array.copy()
    with pytest.warns(FutureWarning, match="-1 to 1"):
        result = pictures.preprocess_image(array, 8)
    np.testing.assert_array_equal(result, array.transpose(2, 0, 1)[None])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.preprocess_image(np.abs(array), 8)
    np.testing.assert_array_equal(array, before, "the caller's array is not written to")


def test_pictures_that_mean_nothing_are_refused():
    zeros, latents = np.zeros((16, 16, 3)), np.zeros((1, 4, 8, 8))
    for words, *images in (
        (r"\(16, 16\)", zeros[..., 0]), (r"\(1, 1, 16, 16, 3\)", zeros[None, None]), (r"\(0, 16, 16", zeros[None][:0]),
        ("3 channels", zeros[..., :1], np.zeros((16, 16, 4)), zeros.transpose(2, 0, 1)[None]),
        ("divide by 255", zeros + 200.0), ("int64", zeros.astype(int)), ("bool", zeros.astype(bool)),
        ("int32", latents.astype(np.int32)), ("NaN", zeros + np.nan, latents + np.nan), ("infinite", zeros + np.inf),
        ("at least 8", zeros[:7]), ("16 x 7", PIL.Image.new("RGB", (16, 7))), ("16 x 0", PIL.Image.new("RGB", (16, 0))),
        ("empty list", []), ("different shapes", [zeros, np.zeros((16, 24, 3))]),
        ("mixes", [noise(16, 16), zeros], [zeros, noise(16, 16)]), ("str", "a.png"), ("NoneType", None),
    ):  # fmt: skip
        for image in images:
            error = InputTypeError if words in ("mixes", "str", "NoneType") else InputError
            with pytest.raises(error, match=words):
                pictures.preprocess_image(image, 8)


def test_the_advice_of_messages_helps():
    """What is refused with advice is taken when the advice has been followed."""

    def preprocess(image):
        return pictures.preprocess_image(image, 8)

    def fit_mask(mask):
        return masks.fit_mask(mask, (90, 70), (11, 8), 8)

    image = np.random.default_rng(0).random((16, 16, 3))
    mask = np.zeros((16, 16), np.uint8)
    mask[:8] = 255
    coloured = np.stack([mask / 255] * 3, -1)
    photos = [noise(16, 16), noise(16, 32)]
    for words, function, bad, good in (
        ("divide by 255", preprocess, image * 255, image),
        ("as uint8", preprocess, image * 255, (image * 255).astype(np.uint8)),
        ("each picture alone", preprocess, photos, photos[1]),
        ("resize them", preprocess, photos, [photo.resize((16, 16)) for photo in photos]),
        ("enlarge it", preprocess, noise(5, 40), noise(5, 40).resize((320, 40))),
        ("by 255", masks.preprocess_mask, mask, mask / 255),
        ("mask[:, :, 0]", masks.preprocess_mask, coloured, coloured[:, :, 0]),
        ("resize it", fit_mask, noise(30, 20), noise(30, 20).resize((90, 70))),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            function(bad)
        function(good)
    with pytest.raises(InputError) as caught:
        pictures.preprocess_image([noise(8, 8 + i) for i in range(100)], 1)
    assert len(str(caught.value)) < 250 and caught.value.parameter == "image"


# --- postprocess_image -----------------------------------------------------------------------------


def test_postprocessing_equals_the_reference_s():
    torch = pytest.importorskip("torch")
    processor = pytest.importorskip("diffusers.image_processor").VaeImageProcessor()
    decoded = np.random.default_rng(6).normal(0, 0.8, (3, 3, 10, 14)).astype(np.float32)  # beyond [-1, 1] in places
    assert pictures.postprocess_image(decoded, "latent") is decoded
    for flags in (None, [True, False, True]):
        if flags:
            decoded[1] = 0  # as the safety checker leaves a picture
        for output_type in ("np", "pil"):
            theirs = processor.postprocess(torch.from_numpy(decoded), output_type, flags)
            ours = pictures.postprocess_image(decoded, output_type, flags)
            assert type(ours) is type(theirs)
            for mine, other in zip(ours, theirs):
                np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))


def test_postprocessing_refuses():
    good = np.zeros((1, 3, 8, 8))
    for arguments, words in (((good, "jpeg"), "'jpeg'"), ((good[0], "pil"), r"\(3, 8, 8\)"),
                             ((good * np.nan, "pil"), "NaN"),
                             ((good, "pil", [True, False]), "2 entries for 1")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            pictures.postprocess_image(*arguments)


# --- masks -----------------------------------------------------------------------------------------


def test_mask_to_pil_and_back():
    mask = (np.random.default_rng(8).random((2, 5, 7)) > 0.5).astype(np.int64)
    result = pictures.mask_to_pil(mask)
    assert [p.mode for p in result] == ["L", "L"] and result[0].size == (7, 5)
    assert set(np.unique(np.asarray(result[0]))) == {0, 255}
    np.testing.assert_array_equal(masks.preprocess_mask(result, 2)[:, 0], mask)
    assert len(pictures.mask_to_pil(mask[0])) == 1
    with pytest.raises(ValueError, match=r"\(1, 2, 5, 7\)"):
        pictures.mask_to_pil(mask[None])


# --- sizes -----------------------------------------------------------------------------------------


def test_fitting_is_what_preprocessing_does():
    picture = noise(67, 51)
    fitted, notice = pictures.fit_picture(picture, 8)
    assert fitted.size == (48, 64) and "51 x 67" in notice and "48 x 64" in notice
    np.testing.assert_array_equal(pictures.preprocess_image(fitted, 8), pictures.preprocess_image(picture, 8))
    for limit in (None, 64 * 48):
        assert pictures.fit_picture(fitted, 8, max_pixels=limit) == (fitted, None), "what fits is left alone"


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


def test_results_come_back_at_their_size():
    picture, mask = noise(16, 24), pictures.mask_to_pil(np.eye(4, 6))[0]
    assert pictures.restore_size(picture, (24, 16)) is picture
    assert pictures.restore_size(picture, (50, 33)).size == (50, 33)
    assert set(np.unique(np.asarray(pictures.restore_size(mask, (51, 35))))) == {0, 255}


# --- writing ---------------------------------------------------------------------------------------


def test_saved_pictures_can_be_loaded(tmp_path):
    picture = noise(10, 13)
    for name in ("a.png", "a.PNG", "a.jpg", "a.jpeg", "a.webp", "a.bmp", "a.tif"):
        writing.save_image_atomically(picture, tmp_path / name)
        loaded = reading.load_image(tmp_path / name)
        assert loaded.size == picture.size and os.listdir(tmp_path) == [name]
        if name.lower().endswith(writing.LOSSLESS_EXTENSIONS):
            np.testing.assert_array_equal(np.asarray(loaded), np.asarray(picture))
        os.unlink(tmp_path / name)


def test_paths_that_cannot_be_written(tmp_path):
    for name, words in (("nowhere/a.png", "does not exist"), ("a.xyz", "has to end in .png"), ("a", "has to end in"),
                        (".", "is a folder"), (".png", "has to end in")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            writing.check_output_path(tmp_path / name)
    with pytest.raises(InputError, match="end in .safetensors"):
        writing.check_output_path(tmp_path / "a.png", (".safetensors",))
    path = tmp_path / "a.safetensors"
    assert writing.check_output_path(path, (".safetensors",)) == path
    assert not os.listdir(tmp_path), "nothing is left of the attempt to write"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that nobody can write into")
def test_a_folder_that_nobody_can_write_into():
    with pytest.raises(ValueError, match=r"no file can be written in the folder /proc/self of the output a.png \(.+\)"):
        writing.check_output_path("/proc/self/a.png")


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.png"
    noise(5, 5).save(path)
    before = path.read_bytes()

    class Broken(PIL.Image.Image):
        def save(self, where, **options):
            with open(where, "wb") as file:
                file.write(b"half a pict")
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        writing.save_images_atomically({tmp_path / "b.png": noise(5, 5, 1), path: Broken()})
    with pytest.raises(KeyboardInterrupt), writing.atomic_path(path) as draft:
        draft.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


def test_new_files_get_usual_permissions_and_links_stay(tmp_path):
    with writing.atomic_path(tmp_path / "a.bin") as draft:
        draft.write_bytes(b"whole")
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    (tmp_path / "link.png").symlink_to(tmp_path / "target.png")
    writing.save_image_atomically(noise(4, 4), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "target.png").is_file()
