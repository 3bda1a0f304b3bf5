"""Pictures of people whom nobody knows: read within bounds, turned as their camera was held, and nothing kept but the pixels.

A header is looked at before any pixel is decoded, so a small file cannot ask for gigabytes. EXIF is read for the rotation, and
dropped with everything else that a file says: places, times, cameras, thumbnails.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bessemer.core.environment import install_advice
from bessemer.core.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from PIL import Image

#: The kinds of files that are read; nothing else of Pillow's decoders is loaded by a file's content.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
#: Most pixels of a picture: those of the largest ordinary cameras.
MOST_PIXELS = 64_000_000
#: How many times as long as the other a side may be.
MOST_ASPECT = 200
#: Of a PNG, where its header says how many bits a value has.
_PNG_DEPTH = 24


@dataclass(frozen=True)
class Picture:
    """A picture's pixels, RGB, (height, width, 3) uint8. Equal pixels are equal pictures."""

    rgb: NDArray[np.uint8] = field(compare=False, repr=False)
    digest: bytes

    @classmethod
    def of(cls, rgb: NDArray[np.uint8]) -> Picture:
        """A picture in memory."""
        assert rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == 3, (rgb.dtype, rgb.shape)
        rgb = np.ascontiguousarray(rgb)
        shape = ",".join(map(str, rgb.shape)).encode()
        return cls(rgb, hashlib.sha256(shape + b"\0" + rgb.tobytes()).digest())

    @property
    def width(self) -> int:
        """Pixels from left to right."""
        return int(self.rgb.shape[1])

    @property
    def height(self) -> int:
        """Pixels from top to bottom."""
        return int(self.rgb.shape[0])


def read_picture(source: bytes | Path, name: str = "the picture") -> Picture:
    """A picture from the bytes of a file, or the file, turned upright; transparent parts are white.

    name: what an error calls it. Raises RequestError, in one line, for what is no picture or none of `FORMATS`, is cut off or
    damaged, has several frames, more than `MOST_PIXELS` pixels or a side `MOST_ASPECT` times the other, and for the colours of
    printing (CMYK) and 16 bits a colour, which have no exact form here. Raises ConfigError without the package Pillow.
    """
    with _opened(source, name) as image:
        from PIL import Image, ImageOps

        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            layered = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", layered.size, (255, 255, 255, 255)), layered)
        return Picture.of(np.asarray(upright.convert("RGB")))


def picture_size(source: bytes | Path, name: str = "the picture") -> tuple[int, int]:
    """Width and height of a picture as its file's header says them, before it is turned upright; no pixel is decoded. Raises as
    `read_picture` for what a header tells."""
    with _opened(source, name) as image:
        return int(image.size[0]), int(image.size[1])


@contextmanager
def _opened(source: bytes | Path, name: str) -> Iterator[Image.Image]:
    """A file whose header has been checked; whatever goes wrong with it is a RequestError of one line."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ConfigError(install_advice("PIL")) from None
    data = _bytes_of(source, name)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_header(image.format or "", image.mode, image.size, data, name)
            # two pictures of one camera lie in an MPO; the first is the picture
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise RequestError(f"{name} has several frames; give one of them")
            yield image
    except Image.DecompressionBombError:
        raise RequestError(f"{name} has more than {MOST_PIXELS:,} pixels; make it smaller") from None
    except UnidentifiedImageError:
        raise RequestError(f"{name} is no picture that is read; give one as {', '.join(FORMATS)}") from None
    except RequestError:
        raise
    # decoders raise whatever a damaged file leads them to
    except Exception as error:
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise RequestError(f"{name} is damaged or cut off ({reason})") from None


def _bytes_of(source: bytes | Path, name: str) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes()
    except OSError as error:
        raise RequestError(f"{name}: {source} cannot be read ({error.strerror})") from None


def _check_header(kind: str, mode: str, size: tuple[int, int], data: bytes, name: str) -> None:
    """What the header says, before a pixel is decoded."""
    width, height = size
    if width < 1 or height < 1:
        raise RequestError(f"{name} has no pixels")
    if width * height > MOST_PIXELS:
        raise RequestError(f"{name} has {width:,} × {height:,} pixels, at most {MOST_PIXELS:,} are read; make it smaller")
    if max(size) > MOST_ASPECT * min(size):
        raise RequestError(
            f"{name} is {width:,} × {height:,} pixels; a side may be at most {MOST_ASPECT} times as long as the other"
        )
    if mode == "CMYK":
        raise RequestError(f"{name} has the colours of printing (CMYK); save it as RGB")
    if mode.startswith("I") or mode == "F" or (kind == "PNG" and data[_PNG_DEPTH : _PNG_DEPTH + 1] == b"\x10"):
        raise RequestError(f"{name} has 16 bits or more a colour; save it with 8")
