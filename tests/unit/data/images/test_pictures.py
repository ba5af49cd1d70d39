"""What is a picture and how large it is; how its pixels become RGB."""

import io
import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image

from loralab.data.images.pictures import MAX_DECODED_PIXELS, Look, PictureError, decode_rgb, look_at
from support.drawing import animated, encoded, noise, png_claiming, with_orientation

KINDS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"}


def look(data: bytes, *, most: int = MAX_DECODED_PIXELS) -> Look:
    return look_at(data, max_pixels=most)


def decode(data: bytes) -> Image.Image:
    return decode_rgb(data, max_pixels=MAX_DECODED_PIXELS)


def reason_of(data: bytes, *, most: int = MAX_DECODED_PIXELS) -> str:
    with pytest.raises(PictureError) as caught:
        look(data, most=most)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "suffix"), KINDS.items())
def test_every_kind_is_read(kind: str, suffix: str) -> None:
    data = encoded(Image.new("RGB", (5, 7), "red"), kind)
    assert look(data) == Look(5, 7, suffix)
    rgb = decode(data)
    assert (rgb.mode, rgb.size) == ("RGB", (5, 7))
    assert np.abs(np.asarray(rgb).astype(int) - (255, 0, 0)).max() < 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_upright_picture(kind: str, orientation: int) -> None:
    """The mark is where a viewer shows it: found by the EXIF standard's own words for row 0 and column 0."""
    image = Image.new("RGB", (16, 32), "white")
    image.paste("black", (0, 0, 8, 8))  # at row 0, column 0 of what is stored
    data = with_orientation(image, orientation, kind, **({"lossless": True} if kind == "WEBP" else {}))
    upright = decode(data)
    found = look(data)
    assert (found.width, found.height) == upright.size == ((32, 16) if orientation > 4 else (16, 32))
    corner = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left"}
    corner |= {5: "top left", 6: "top right", 7: "bottom right", 8: "bottom left"}
    width, height = upright.size
    x = 3 if "left" in corner[orientation] else width - 4
    y = 3 if "top" in corner[orientation] else height - 4
    assert upright.convert("L").getpixel((x, y)) < 30  # type: ignore[operator]
    assert (np.asarray(upright.convert("L")) < 128).sum() == 64


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0"])
def test_broken_exif_is_no_error(exif: bytes) -> None:
    image = noise(6, 4)
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(image, kind, exif=exif)
        assert (look(data).width, look(data).height) == decode(data).size == (6, 4)


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation: int) -> None:
    data = with_orientation(noise(6, 4), orientation)
    assert (look(data).width, look(data).height) == decode(data).size == (6, 4)


def test_what_is_transparent_is_white() -> None:
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 255, 255))
    for kind in ("PNG", "WEBP", "TIFF"):
        rgb = decode(encoded(clear, kind, **({"lossless": True} if kind == "WEBP" else {})))
        assert [rgb.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]
    half = decode(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "PNG")).getpixel((0, 0))
    assert half == (127, 127, 127)


def test_a_transparent_colour_is_white() -> None:
    grey = decode(encoded(Image.new("L", (1, 1), 7), "PNG", transparency=7)).getpixel((0, 0))
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    shown = decode(encoded(palette, "PNG", transparency=1))
    assert (grey, shown.getpixel((0, 0)), shown.getpixel((1, 0))) == ((255,) * 3, (10, 20, 30), (255,) * 3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled(kind: str) -> None:
    """Pillow's own conversion would cut at 255, and nearly everything would be white."""
    values = np.array([[0, 0x80FF, 0xFFFF]], dtype=np.uint16)
    assert np.asarray(decode(encoded(Image.fromarray(values), kind)))[0, :, 0].tolist() == [0, 128, 255]
    if kind == "PNG":
        clear = decode(encoded(Image.fromarray(values), kind, transparency=0))
        assert np.asarray(clear)[0, :, 1].tolist() == [255, 128, 255]


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_values_without_a_known_range_are_refused(mode: str) -> None:
    data = encoded(Image.new(mode, (2, 2)), "TIFF")
    assert reason_of(data) == f"its pixels are of mode {mode}, which has no plain way to RGB: save it with 8 bits"
    with pytest.raises(PictureError):
        decode(data)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "I;16"])
def test_every_mode_that_is_taken_becomes_rgb(mode: str) -> None:
    written = 0
    for kind in KINDS:
        stream = io.BytesIO()
        try:
            Image.new(mode, (3, 2)).save(stream, kind)
        except (OSError, KeyError, ValueError):  # a kind without this mode
            continue
        written += 1
        assert (decode(stream.getvalue()).mode, look(stream.getvalue()).width) == ("RGB", 3)
    assert written


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_moving_pictures_are_refused(kind: str) -> None:
    expected = "animated, with more than one frame: save the one that is meant as a file of its own"
    assert reason_of(animated(kind)) == expected


def test_several_pages_are_refused() -> None:
    assert reason_of(animated("TIFF")) == "several pages: save the one that is meant as a file of its own"


def test_of_a_photograph_with_pictures_behind_it_the_first_counts() -> None:
    first, behind = Image.new("RGB", (16, 8), "red"), Image.new("RGB", (4, 4), "blue")
    data = encoded(first, "MPO", save_all=True, append_images=[behind])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert look(data) == Look(16, 8, "jpg")
    assert decode(data).getpixel((0, 0)) == (254, 0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_is_found(kind: str) -> None:
    """Wherever it is cut; the last bytes of some kinds hold no pixels, and their decoders miss nothing there."""
    data = encoded(noise(40, 30), kind)
    for part in (0.05, 0.2, 0.5, 0.8, 0.95):
        reason = reason_of(data[: int(len(data) * part)])
        assert any(word in reason for word in ("truncated", "damaged", "cannot be read")), (part, reason)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_its_last_bytes_is_found(progressive: bool) -> None:
    data = encoded(noise(200, 100), "JPEG", progressive=progressive)
    for lost in (1, 2, 10, 100):
        assert reason_of(data[:-lost]).startswith("truncated or damaged: ")


def test_damage_within_a_png_is_found() -> None:
    data = bytearray(encoded(noise(40, 30), "PNG"))
    data[len(data) // 2] ^= 255
    assert reason_of(bytes(data)).startswith("truncated or damaged: ")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "an empty file"),
        (b"%PDF-1.7\n%\xe2\xe3", "a PDF document: known kinds are JPEG, PNG, WebP, BMP, GIF and TIFF"),
        (b"<?xml version='1.0'?>\n<svg xmlns='x'/>", "an SVG drawing: known kinds"),
        (b"<!DOCTYPE html><title>404</title>", "an HTML page: known kinds"),
        (b"just some words\n", "text: known kinds"),
        ("é".encode() * 2000, "text: known kinds"),
        (b"x" + "é".encode() * 2000, "text: known kinds"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS, not the picture"),
        (b"\0\0\0\x18ftypheic\0\0", "a HEIC picture: known kinds"),
        (b"\0\0\0\x18ftypavif\0\0", "an AVIF picture: known kinds"),
        (b"\0\0\0\x18ftypisom\0\0", "a video: known kinds"),
        (b"8BPS\0\1", "a Photoshop document: known kinds"),
        (bytes(range(256)), "no picture: known kinds"),
        (b"\xff\xd8\xff\xe0 nothing more", "truncated or damaged, its header cannot be read: "),
        (b"RIFF\0\0\0\0WEBPVP8 ", "truncated or damaged, its header cannot be read: "),
        (b"\x89PNG\r\n\x1a\n\0\0", "a PNG file that is truncated or damaged: its header cannot be read"),
        (png_claiming(0, 5), "without pixels: its header says 0 x 5"),
        (png_claiming(5, 0), "without pixels: its header says 5 x 0"),
        (b"GIF89a\0\0\5\0\0\0\0;", "without pixels: its header says 0 x 5"),
    ],
)
def test_strangers_are_named(data: bytes, what: str) -> None:
    assert reason_of(data).startswith(what)


def test_kinds_that_nobody_named_are_not_decoded() -> None:
    """Pillow knows many more, some of which start other programs."""
    for kind in ("PPM", "ICO", "EPS", "TGA", "PCX", "JPEG2000"):
        assert "known kinds are" in reason_of(encoded(Image.new("RGB", (16, 16)), kind))


def test_a_bomb_is_told_by_its_header() -> None:
    expected = "too large to decode (a decompression bomb?): it claims 60,000 x 60,000 = 3,600,000,000 pixels, at most "
    assert reason_of(png_claiming(60_000, 60_000)) == f"{expected}178,956,970 are"
    assert reason_of(encoded(noise(5, 4), "JPEG"), most=19).endswith("it claims 5 x 4 = 20 pixels, at most 19 are")
    assert look(encoded(noise(5, 4), "JPEG"), most=20).width == 5


def test_a_bomb_whose_header_only_pillow_reads() -> None:
    data = bytearray(encoded(noise(16, 16), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xff\x00\xff\x00"  # height and width of 65,280
    assert reason_of(bytes(data)).endswith("it claims 4,261,478,400 pixels, at most 178,956,970 are")


def test_large_pictures_within_the_bound_bring_no_warning() -> None:
    """Pillow warns from half of its bound on."""
    data = encoded(Image.new("1", (10_000, 9_000)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert look(data).width == 10_000


def test_reasons_do_not_hide_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        look(encoded(noise(2, 2)))
