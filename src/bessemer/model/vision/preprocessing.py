"""Pictures as encoders read them: resized, cut into tiles or patches, normalised, as `transformers` does it with Pillow.

Equal to those to the last bit: the same resampling by Pillow on bytes, the same rounding of sizes, then one division and one
subtraction in float32. Idefics3 cuts a large picture into tiles and adds the whole picture, made small, as the last one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.store import read_json
from bessemer.model.vision.encoder import Pixels
from bessemer.model.vision.folder import PREPROCESSOR, PROCESSOR
from bessemer.model.vision.pictures import Picture

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

Method = Literal["fixed", "tiles", "patches", "native"]
#: Left, top, right, bottom.
Box = tuple[float, float, float, float]

#: Most pixels along a side of a picture before it is cut into tiles (Idefics3's processor).
_MOST_SIDE = 4096
#: By the names of processors, without endings for their backends: how they cut a picture, and their defaults.
_PROCESSORS: dict[str, tuple[Method, dict[str, Any]]] = {
    "SiglipImageProcessor": ("fixed", {"resample": 3, "size": {"height": 224, "width": 224}}),
    "CLIPImageProcessor": (
        "fixed",
        {"resample": 3, "size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True},
    ),
    "Siglip2ImageProcessor": ("patches", {"resample": 2, "patch_size": 16, "max_num_patches": 256}),
    "Idefics3ImageProcessor": (
        "tiles",
        {"resample": 1, "size": {"longest_edge": 4 * 364}, "max_image_size": {"longest_edge": 364}, "do_image_splitting": True},
    ),
}
_PROCESSORS["Gemma3ImageProcessor"] = ("fixed", {"resample": 2, "size": {"height": 224, "width": 224}})
_PROCESSORS["Qwen2VLImageProcessor"] = ("native", {"resample": 3, "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2})
_PROCESSORS["LlavaImageProcessor"] = _PROCESSORS["CLIPImageProcessor"]
_PROCESSORS["SmolVLMImageProcessor"] = _PROCESSORS["Idefics3ImageProcessor"]
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Prepared:
    """A picture as an encoder reads it, but for the normalisation.

    tiles: (N, side, side, 3) uint8, or of a picture in patches (1, height, width, 3). rows, columns: of tiles, 0 where the
    picture is one. The whole picture is the last one, or, of Gemma 3, the first. digest: equal for equal tiles. box: the part
    of the picture that the tiles are of, as left, top, right and bottom in shares of its width and height; beyond 0 and 1 where
    the picture was padded.
    """

    tiles: NDArray[np.uint8] = field(repr=False, compare=False)
    rows: int
    columns: int
    digest: bytes
    box: Box = field(default=(0.0, 0.0, 1.0, 1.0), compare=False)

    @classmethod
    def of(cls, tiles: NDArray[np.uint8], rows: int = 0, columns: int = 0, box: Box = (0.0, 0.0, 1.0, 1.0)) -> Prepared:
        """Prepared tiles with their digest."""
        said = f"{tiles.shape},{rows},{columns}".encode()
        return cls(tiles, rows, columns, hashlib.sha256(said + b"\0" + tiles.tobytes()).digest(), box)


class PanAndScan(NamedTuple):
    """Gemma 3's crops of long pictures: from which ratio of sides on, how many at most, and their shorter side at least."""

    least_ratio: float
    most_crops: int
    least_side: int

    def crops(self, height: int, width: int) -> int:
        """In how many crops the longer side is cut; 0 where the picture is not."""
        longer, shorter = max(height, width), min(height, width)
        if longer / shorter < self.least_ratio:
            return 0
        count = min(longer // self.least_side, math.floor(longer / shorter + 0.5))
        count = min(self.most_crops, max(2, count))
        return 0 if min(math.ceil(longer / count), shorter) < self.least_side else count


@dataclass(frozen=True)
class Preprocessor:
    """How a model's pictures are prepared. Names as in `preprocessor_config.json`.

    size: (height, width), or one number: the shorter side (`fixed`), the longer one (`tiles`); None: as it is.
    """

    method: Method
    resample: int
    size: tuple[int, int] | int | None = None
    crop_size: tuple[int, int] | None = None
    pads_to_square: bool = False
    pan_and_scan: PanAndScan | None = None
    max_image_size: int = 0
    splits: bool = False
    patch_size: int = 0
    max_num_patches: int = 0
    merge_size: int = 0
    temporal_patch_size: int = 1
    min_pixels: int = 0
    max_pixels: int = 0
    rescale_factor: float | None = 1 / 255
    mean: tuple[float, ...] | None = _HALF
    std: tuple[float, ...] | None = _HALF

    def prepare(self, picture: Picture) -> Prepared:
        """The picture, resized and cut."""
        from PIL import Image

        image = Image.fromarray(picture.rgb)
        if self.method == "tiles":
            return self._in_tiles(image)
        if self.method == "patches":
            height, width = patched_size(picture.height, picture.width, self.patch_size, self.max_num_patches)
            return Prepared.of(np.asarray(self._resized(image, height, width))[None])
        if self.method == "native":
            factor = self.patch_size * self.merge_size
            height, width = native_size(picture.height, picture.width, factor, self.min_pixels, self.max_pixels)
            return Prepared.of(np.asarray(self._resized(image, height, width))[None], height // factor, width // factor)
        if self.pan_and_scan is not None:
            return self._with_crops(image, self.pan_and_scan)
        if self.pads_to_square:
            image = self._padded(image)
        if isinstance(self.size, int):
            image = self._resized(image, *_with_shorter_side(image.height, image.width, self.size))
        elif self.size is not None:
            image = self._resized(image, *self.size)
        pixels, box = np.asarray(image), self._box(picture, image)
        return Prepared.of((pixels if self.crop_size is None else _cropped(pixels, *self.crop_size))[None], box=box)

    @property
    def useful_size(self) -> dict[str, int] | None:
        """The size to which a larger picture is made smaller, by the side that is meant, in the words of
        `preprocessor_config.json`: `longest_edge` or `shortest_edge`; None: every picture is read as large as it is."""
        if self.size is None:
            return None
        if isinstance(self.size, tuple):
            return {"shortest_edge": max(self.size)}
        return {"longest_edge" if self.method == "tiles" else "shortest_edge": self.size}

    def pixels(self, prepared: Prepared) -> Pixels:
        """What an encoder reads of a prepared picture, float32."""
        normal = self._normalised(prepared.tiles)
        if self.method == "native":
            return self._in_squares(normal[0])
        if self.method != "patches":
            return Pixels(torch.from_numpy(np.ascontiguousarray(normal.transpose(0, 3, 1, 2))))
        _, height, width, channels = normal.shape
        rows, columns = height // self.patch_size, width // self.patch_size
        patches = normal.reshape(1, rows, self.patch_size, columns, self.patch_size, channels).transpose(0, 1, 3, 2, 4, 5)
        padded = np.zeros((1, self.max_num_patches, self.patch_size**2 * channels), np.float32)
        padded[:, : rows * columns] = patches.reshape(1, rows * columns, -1)
        mask = torch.arange(self.max_num_patches)[None] < rows * columns
        return Pixels(torch.from_numpy(padded), mask, torch.tensor([[rows, columns]]))

    # -- inside

    def _in_squares(self, normal: NDArray[np.float32]) -> Pixels:
        """Patches square by square, each as many times as it has frames."""
        height, width, channels = normal.shape
        patch, merge = self.patch_size, self.merge_size
        rows, columns = height // patch, width // patch
        split = normal.reshape(rows // merge, merge, patch, columns // merge, merge, patch, channels)
        patches = split.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, channels, 1, patch**2)
        frames = np.repeat(patches, self.temporal_patch_size, axis=2).reshape(rows * columns, -1)
        return Pixels(torch.from_numpy(frames), shapes=torch.tensor([[rows, columns]]))

    def _with_crops(self, image: PillowImage, settings: PanAndScan) -> Prepared:
        assert isinstance(self.size, tuple)
        tiles = [np.asarray(self._resized(image, *self.size))]
        count = settings.crops(image.height, image.width)
        if count == 0:
            return Prepared.of(np.stack(tiles))
        is_wide = image.width >= image.height
        step = math.ceil(max(image.size) / count)
        for start in range(0, count * step, step):
            box = (start, 0, start + step, image.height) if is_wide else (0, start, image.width, start + step)
            # the last one ends with the picture
            crop = image.crop((box[0], box[1], min(box[2], image.width), min(box[3], image.height)))
            tiles.append(np.asarray(self._resized(crop, *self.size)))
        return Prepared.of(np.stack(tiles), *((1, count) if is_wide else (count, 1)))

    def _box(self, picture: Picture, resized: PillowImage) -> Box:
        """The part of a picture that is left of it, padded, resized and then cropped."""
        left, top, width, height = 0.0, 0.0, float(picture.width), float(picture.height)
        if self.pads_to_square:
            side = max(picture.width, picture.height)
            left, top = -float((side - picture.width) // 2), -float((side - picture.height) // 2)
            width = height = float(side)
        if self.crop_size is not None:
            tall, wide = self.crop_size
            down, across = height / resized.height, width / resized.width
            # rounded down, also below 0 where the crop is larger
            top += (resized.height - tall) // 2 * down
            left += (resized.width - wide) // 2 * across
            width, height = wide * across, tall * down
        return left / picture.width, top / picture.height, (left + width) / picture.width, (top + height) / picture.height

    def _in_tiles(self, image: PillowImage) -> Prepared:
        side = self.max_image_size
        if self.size is not None:
            assert isinstance(self.size, int), self.size
            image = self._resized(image, *longest_side_size(image.height, image.width, self.size))
        if not self.splits:
            return Prepared.of(np.asarray(self._resized(image, side, side))[None])
        image = self._resized(image, *tiled_size(image.height, image.width, side))
        if image.height <= side and image.width <= side:
            return Prepared.of(np.asarray(image)[None])
        rows, columns = image.height // side, image.width // side
        pixels = np.asarray(image)
        tiles = pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4).reshape(-1, side, side, 3)
        whole = np.asarray(self._resized(image, side, side))
        return Prepared.of(np.concatenate([tiles, whole[None]]), rows, columns)

    def _resized(self, image: PillowImage, height: int, width: int) -> PillowImage:
        return image.resize((width, height), resample=self.resample)

    def _padded(self, image: PillowImage) -> PillowImage:
        """In the middle of a square of the mean colour."""
        from PIL import Image

        side = max(image.size)
        colour = tuple(int(value * 255) for value in self.mean) if self.mean else (0, 0, 0)
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def _normalised(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        values = tiles.astype(np.float32)
        if self.rescale_factor is not None:
            values = (tiles.astype(np.float64) * self.rescale_factor).astype(np.float32)
        if self.mean is not None and self.std is not None:
            mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
            values = ((values - mean) / std).astype(np.float32, copy=False)
        return values


def longest_side_size(height: int, width: int, longest: int) -> tuple[int, int]:
    """The size, (height, width), whose longer side is `longest`, at most 4,096; the other one is even (Idefics3's rule)."""
    aspect = width / height
    if width >= height:
        width, height = longest, _even(int(longest / aspect))
    else:
        width, height = _even(int(longest * aspect)), longest
    height, width = max(height, 1), max(width, 1)
    aspect = width / height
    if width >= height and width > _MOST_SIDE:
        width, height = _MOST_SIDE, int(_MOST_SIDE / aspect)
    elif height > width and height > _MOST_SIDE:
        width, height = int(_MOST_SIDE * aspect), _MOST_SIDE
    return max(height, 1), max(width, 1)


def _even(number: int) -> int:
    return number + number % 2


def tiled_size(height: int, width: int, side: int) -> tuple[int, int]:
    """The size, (height, width), in whole tiles: the longer side rounded up, the other by the aspect and then up."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / side) * side
        return math.ceil(int(width / aspect) / side) * side, width
    height = math.ceil(height / side) * side
    return height, math.ceil(int(height * aspect) / side) * side


def patched_size(height: int, width: int, patch: int, most: int) -> tuple[int, int]:
    """The largest size, (height, width), in whole patches, at most `most` of them, about in the picture's own shape.

    Found by bisection of the scale to 1e-5, as SigLIP2's processor does.
    """

    def scaled(scale: float, size: int) -> int:
        return max(patch, math.ceil(size * scale / patch) * patch)

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        if scaled(middle, height) / patch * (scaled(middle, width) / patch) <= most:
            low = middle
        else:
            high = middle
    return scaled(low, height), scaled(low, width)


def native_size(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """The size, (height, width), in whole squares of `factor` pixels, from `least` to `most` pixels, about in the picture's own
    shape (Qwen2-VL's rule)."""
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if tall * wide > most:
        scale = math.sqrt(height * width / most)
        return tuple(max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))  # type: ignore[return-value]
    if tall * wide < least:
        scale = math.sqrt(least / (height * width))
        return math.ceil(height * scale / factor) * factor, math.ceil(width * scale / factor) * factor
    return tall, wide


def _with_shorter_side(height: int, width: int, shorter: int) -> tuple[int, int]:
    longer = int(shorter * max(height, width) / min(height, width))
    return (longer, shorter) if width <= height else (shorter, longer)


def _cropped(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """The middle of a picture, black where it is smaller."""
    tall, wide = max(height, pixels.shape[0]), max(width, pixels.shape[1])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    if (tall, wide) != pixels.shape[:2]:
        above, before = math.ceil((tall - pixels.shape[0]) / 2), math.ceil((wide - pixels.shape[1]) / 2)
        larger = np.zeros((tall, wide, 3), np.uint8)
        larger[above : above + pixels.shape[0], before : before + pixels.shape[1]] = pixels
        pixels, top, left = larger, top + above, left + before
    return np.ascontiguousarray(pixels[max(0, top) : top + height, max(0, left) : left + width])


# -- a folder's settings


def read_preprocessor(folder: Path) -> Preprocessor:
    """How a folder's model takes pictures. Raises ArtefactError as `preprocessor_values`, and for what is not known."""
    values = preprocessor_values(folder)
    try:
        return preprocessor_of(values)
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        path = folder / (PREPROCESSOR if (folder / PREPROCESSOR).is_file() else PROCESSOR)
        raise ArtefactError(f"{path}: {error}") from None


def preprocessor_values(folder: Path) -> dict[str, Any]:
    """What a folder says of the preparation of pictures: `preprocessor_config.json`, or a part of `processor_config.json`.

    Raises ArtefactError where neither is there.
    """
    for name in (PREPROCESSOR, PROCESSOR):
        path = folder / name
        if not path.is_file():
            continue
        values = read_json(path, "settings of pictures")
        if isinstance(values, Mapping) and name == PROCESSOR:
            values = values.get("image_processor")
        if isinstance(values, Mapping):
            return dict(values)
    raise ArtefactError(f"{folder}: nothing says how pictures are prepared: {PREPROCESSOR} is missing")


def preprocessor_of(values: Mapping[str, Any]) -> Preprocessor:
    """A preprocessor of the values of `preprocessor_config.json`. Raises ConfigError, and what malformed values raise."""
    name = str(values.get("image_processor_type", values.get("feature_extractor_type", "")))
    name = name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if name not in _PROCESSORS:
        raise ConfigError(f"pictures prepared by {name!r} are not read; known are {', '.join(_PROCESSORS)}")
    method, defaults = _PROCESSORS[name]
    given = {**defaults, **{key: value for key, value in values.items() if value is not None}}
    is_clip = name in ("CLIPImageProcessor", "LlavaImageProcessor", "Qwen2VLImageProcessor")
    mean, std = (_CLIP_MEAN, _CLIP_STD) if is_clip else (_HALF, _HALF)
    is_normalised = given.get("do_normalize", True)
    if method == "tiles" and given.get("do_image_splitting", True) and not given.get("do_resize", True):
        raise ConfigError("do_resize: false is not read where a picture is cut into tiles")
    sizes = given["size"] if method == "native" and isinstance(given.get("size"), Mapping) else {}
    if method == "native" and not given.get("do_resize", True):
        raise ConfigError("do_resize: false is not read where a picture keeps its shape")
    return Preprocessor(
        method,
        int(given["resample"]),
        size=_size(given["size"])
        if "size" in given and given.get("do_resize", True) and method in ("fixed", "tiles")
        else None,
        crop_size=_square(given["crop_size"]) if given.get("do_center_crop") else None,
        pads_to_square=name == "LlavaImageProcessor" and bool(given.get("do_pad")),
        pan_and_scan=_pan_and_scan(given) if name == "Gemma3ImageProcessor" and given.get("do_pan_and_scan") else None,
        max_image_size=int(given["max_image_size"]["longest_edge"]) if method == "tiles" else 0,
        splits=bool(given.get("do_image_splitting")),
        patch_size=int(given.get("patch_size", 0)),
        max_num_patches=int(given.get("max_num_patches", 0)),
        merge_size=int(given.get("merge_size", 0)),
        temporal_patch_size=int(given.get("temporal_patch_size", 1)),
        min_pixels=int(given.get("min_pixels") or sizes.get("shortest_edge") or 56 * 56),
        max_pixels=int(given.get("max_pixels") or sizes.get("longest_edge") or 28 * 28 * 1280),
        rescale_factor=float(given.get("rescale_factor", 1 / 255)) if given.get("do_rescale", True) else None,
        mean=tuple(map(float, given.get("image_mean", mean))) if is_normalised else None,
        std=tuple(map(float, given.get("image_std", std))) if is_normalised else None,
    )


def _pan_and_scan(given: Mapping[str, Any]) -> PanAndScan:
    """With what Gemma 3's processor takes where a file leaves it out."""
    if not given.get("do_resize", True):
        raise ConfigError("do_resize: false is not read where a picture is cut into crops")
    least, most, side = (
        given.get(f"pan_and_scan_{name}", usual)
        for name, usual in (("min_ratio_to_activate", 1.2), ("max_num_crops", 4), ("min_crop_size", 256))
    )
    if int(most) < 2 or int(side) < 1:
        raise ConfigError(f"pan_and_scan: at least 2 crops of at least 1 pixel are needed, got {most!r} of {side!r}")
    return PanAndScan(float(least), int(most), int(side))


def _size(given: Any) -> tuple[int, int] | int:
    if isinstance(given, int):
        return given, given
    for name in ("shortest_edge", "longest_edge"):
        if given.get(name):
            return int(given[name])
    return int(given["height"]), int(given["width"])


def _square(given: Any) -> tuple[int, int]:
    return (given, given) if isinstance(given, int) else (int(given["height"]), int(given["width"]))
