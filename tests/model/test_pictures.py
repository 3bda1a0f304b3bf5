"""Files of pictures: what is read and how, and what is refused."""

import io

import numpy as np
import pytest
from PIL import Image

from bessemer.core.errors import RequestError
from bessemer.model.vision.pictures import Picture, read_picture
from tests.model.picture_files import drawn, encoded, png_header


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF"])
def test_pixels_are_those_of_the_file(kind):
    image = drawn(20, 12, mode="P" if kind == "GIF" else "RGB")
    data = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(read_picture(data).rgb, np.asarray(image.convert("RGB")))


def test_equal_pixels_are_one_picture_whatever_the_file_says_besides():
    image = drawn(20, 12)
    exif = Image.Exif()
    exif[0x9286] = "met Ann at home"
    exif[0x8825] = {1: "N", 2: (48.0, 51.0, 30.0)}
    first, second = read_picture(encoded(image)), read_picture(encoded(image, exif=exif, compress_level=1))
    assert first == second and first.digest == second.digest
    assert first != read_picture(encoded(drawn(20, 12, seed=1)))
    # a picture of the same bytes in another shape is another one
    assert Picture.of(np.zeros((2, 3, 3), np.uint8)) != Picture.of(np.zeros((3, 2, 3), np.uint8))


def test_a_picture_is_turned_as_its_camera_was_held():
    image, exif = drawn(20, 12), Image.Exif()
    exif[0x0112] = 6
    turned = read_picture(encoded(image, exif=exif))
    assert (turned.width, turned.height) == (12, 20)
    assert np.array_equal(turned.rgb, np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


def test_transparent_parts_are_white():
    image = drawn(8, 8).convert("RGBA")
    image.putalpha(Image.new("L", (8, 8), 0))
    assert read_picture(encoded(image)).rgb.min() == 255


def test_the_first_picture_of_two_in_one_jpeg_is_read():
    stream = io.BytesIO()
    first = drawn(16, 16)
    first.save(stream, "MPO", save_all=True, append_images=[drawn(16, 16, seed=1)])
    assert read_picture(stream.getvalue()) == read_picture(encoded(first, "JPEG"))


BAD = {
    "bomb": (png_header(50_000, 50_000), "pixels"),
    "large": (png_header(9_000, 8_000), r"has 9,000 × 8,000 pixels, at most 64,000,000 are read"),
    "truncated": (encoded(drawn(64, 64))[:400], "is damaged or cut off"),
    "truncated jpeg": (encoded(drawn(64, 64), "JPEG")[:600], "is damaged or cut off"),
    "animated": (encoded(drawn(8, 8), "GIF", save_all=True, append_images=[drawn(8, 8, seed=1)]), "has several frames"),
    "thin": (png_header(1, 60_000), "is 1 × 60,000 pixels; a side may be at most 200 times as long as the other"),
    "cmyk": (encoded(drawn(8, 8, mode="CMYK"), "JPEG"), r"colours of printing \(CMYK\)"),
    "16 bit grey": (encoded(Image.fromarray(np.zeros((8, 8), np.uint16))), "16 bits or more a colour"),
    "16 bit rgb": (png_header(8, 8, depth=16), "16 bits or more a colour"),
    "text": (b"this is a letter", "is no picture that is read; give one as PNG"),
    "nothing": (b"", "is no picture that is read"),
    "other kind": (encoded(drawn(8, 8), "TIFF"), "is no picture that is read"),
    "header alone": (encoded(drawn(8, 8))[:30], "damaged or cut off|no picture"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_files_are_refused_in_one_line(case):
    data, message = BAD[case]
    with pytest.raises(RequestError, match=message) as refused:
        read_picture(data, "image 2")
    assert str(refused.value).startswith("image 2") and "\n" not in str(refused.value)


def test_bytes_changed_anywhere_are_read_or_refused():
    data = bytearray(encoded(drawn(24, 24), "JPEG"))
    random = np.random.default_rng(5)
    for _ in range(60):
        damaged = bytearray(data)
        for place in random.integers(2, len(data), 3):
            damaged[place] = random.integers(256)
        try:
            read_picture(bytes(damaged))
        except RequestError as error:
            assert "\n" not in str(error)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RequestError, match=r"none\.png cannot be read"):
        read_picture(tmp_path / "none.png")
