"""The stage `pictures`: from pages and PDFs to rows of pictures with texts, and what was left out with its reasons.

Rows are Parquet with the bytes of each picture, as the library `datasets` stores them; `sft` reads them as questions about a
picture with its text as the answer. A picture is written anew from its pixels, so that nothing else of its file is kept: no
EXIF, no places, no thumbnails.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bessemer.core.errors import BessemerError, ConfigError, RequestError, SourceError
from bessemer.core.progress import Progress
from bessemer.core.store import write_text
from bessemer.data.sources.source import NO_LOSS, Tally
from bessemer.model.vision.pictures import Picture, read_picture
from bessemer.posttraining.pictures.config import PicturesConfig
from bessemer.posttraining.pictures.filters import OwnFilter, PixelFilters, TextFilters, own_filters, reason_of_page
from bessemer.posttraining.pictures.pages import PageText
from bessemer.posttraining.pictures.sources import Mention, found_pictures

if TYPE_CHECKING:
    import pyarrow

#: The folder of rows, and the file of what was left out.
ROWS, LEFT_OUT = "pictures", "left_out.jsonl"
#: Rows of a group, and bytes of pictures after which a file ends.
_GROUP_ROWS, _FILE_BYTES = 100, 256 << 20
#: Formats whose pixels were changed when they were saved; saving these again as PNG would only make them large.
_LOSSY_SIGNS = ((b"\xff\xd8", 0), (b"WEBPVP8 ", 8))
_JPEG_QUALITY = 95
_TEXTS = ("caption", "text_from", "alt", "page", "address", "source", "license", "phash")
_NUMBERS = ("width", "height")


def collect_pictures(config: PicturesConfig, folder: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """Read the pictures of all sources, and write the rows that are kept below `out`. folder: where paths begin.

    Returns how many were kept, and left out by reason. Raises SourceError for paths that lead to nothing, and where no picture
    is kept; ConfigError for a filter that fails.
    """
    texts, pixels = TextFilters(config), PixelFilters(config)
    own = own_filters(config.filters, folder)
    left_out = _LeftOut(out / LEFT_OUT)
    rows = _Rows(out / ROWS)
    tally = Tally()

    def is_wanted(mention: Mention) -> bool:
        reason = reason_of_page(mention, config) or texts.text_of(mention)[1]
        if reason:
            left_out.add(mention, reason)
        return not reason

    with rows, left_out, progress.task("pictures", unit="pictures") as bar:
        for source in config.sources:
            for mention, data in found_pictures(source, config, folder, is_wanted, tally):
                bar.advance()
                text, _ = texts.text_of(mention)
                assert text is not None, mention
                # what served the picture may object to its use, where its page does not
                reason, row = reason_of_page(mention, config), dict[str, Any]()
                if not reason:
                    reason, row = _row(mention, data, text, pixels, config)
                reason = reason or _own_reason(own, row)
                if not reason and texts.is_repeated(text.text):
                    reason = "a repeated text"
                if reason:
                    left_out.add(mention, reason)
                    continue
                pixels.keep(row.pop("hashes"), mention.place)
                rows.add(row)
    for loss in tally.losses:
        progress.say(f"  {loss}")
    losses = {name: count for name, count in sorted(tally.counts.items()) if name not in NO_LOSS}
    if not rows.count:
        seen = ", ".join(f"{count:,} {reason}" for reason, count in left_out.counts.most_common(4))
        raise SourceError(f"no picture of the sources is kept{f': {seen}' if seen else ''}; see {out / LEFT_OUT}")
    return {
        "pictures": rows.count,
        "bytes": rows.bytes,
        **{f"left out: {reason}": count for reason, count in left_out.counts.most_common()},
        **losses,
    }


def _row(
    mention: Mention, data: bytes, text: PageText, pixels: PixelFilters, config: PicturesConfig
) -> tuple[str, dict[str, Any]]:
    """Why a picture is left out, or its row, with its hashes."""
    try:
        picture = read_picture(data, "the picture")
    except RequestError as error:
        return f"unreadable: {_kind_of(str(error))}", {}
    reason = pixels.reason_of(picture)
    if reason:
        return reason, {}
    hashes, original = pixels.copied_from(picture)
    if original is not None:
        return f"a near-duplicate\0{original}", {}
    is_lossy = any(data[place : place + len(sign)] == sign for sign, place in _LOSSY_SIGNS)
    shown = smaller(picture, config.max_side)
    alternative = next((each.text for each in mention.texts if each.kind == "alt"), None)
    return "", {
        "image": {"bytes": written(shown, is_lossy), "path": None},
        "caption": text.text,
        "text_from": text.kind,
        "alt": alternative,
        "page": mention.page,
        "address": mention.picture,
        "source": mention.source,
        "license": mention.license,
        "phash": str(hashes),
        "width": shown.width,
        "height": shown.height,
        "hashes": hashes,
    }


def _kind_of(error: str) -> str:
    """What is wrong with a file, without its own sizes and names."""
    for sign, kind in (
        ("frames", "animated"),
        ("pixels", "too many pixels, or too long"),
        ("CMYK", "the colours of printing"),
        ("16 bits", "16 bits a colour"),
        ("damaged", "damaged or cut off"),
    ):
        if sign in error:
            return kind
    return "no picture that is read"


def _own_reason(own: Sequence[tuple[str, OwnFilter]], row: Mapping[str, Any]) -> str:
    if not row:
        return ""
    shown = {name: value for name, value in row.items() if name != "hashes"}
    for name, function in own:
        try:
            reason = function(shown)
        except BessemerError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise ConfigError(f"filters: {name} failed: {type(error).__name__}: {error}") from error
        if reason:
            return f"{name}: {reason}"
    return ""


def smaller(picture: Picture, max_side: int | None) -> Picture:
    """A picture made smaller, until its longer side has at most `max_side` pixels; itself where it is."""
    longest = max(picture.width, picture.height)
    if max_side is None or longest <= max_side:
        return picture
    import numpy as np
    from PIL import Image

    width, height = (max(1, round(side * max_side / longest)) for side in (picture.width, picture.height))
    return Picture.of(np.asarray(Image.fromarray(picture.rgb).resize((width, height), Image.Resampling.LANCZOS)))


def written(picture: Picture, is_lossy: bool) -> bytes:
    """A picture's pixels as a file: PNG, or JPEG where they came from a file that had changed them already."""
    from PIL import Image

    stream = io.BytesIO()
    image = Image.fromarray(picture.rgb)
    if is_lossy:
        image.save(stream, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    else:
        image.save(stream, "PNG")
    return stream.getvalue()


class _LeftOut:
    """Writes what was left out, and counts it by reason."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.counts: Counter[str] = Counter()
        self._lines: list[str] = []

    def __enter__(self) -> _LeftOut:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            write_text(self._path, "".join(self._lines))

    def add(self, mention: Mention, reason: str) -> None:
        """Note a picture. reason: what it is counted under; what stands behind a NUL is of this picture alone."""
        counted, _, of = reason.partition("\0")
        self.counts[counted] += 1
        texts = {text.kind: text.text[:200] for text in mention.texts}
        line = {"place": mention.place, "page": mention.page, "reason": counted} | ({"of": of} if of else {}) | texts
        self._lines.append(json.dumps(line, ensure_ascii=False) + "\n")


class _Rows:
    """Writes rows as files of Parquet in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: list[dict[str, Any]] = []
        self._writer: Any = None
        self._files = self._in_file = 0
        self.count = self.bytes = 0

    def __enter__(self) -> _Rows:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._write()
        if self._writer is not None:
            self._writer.close()

    def add(self, row: dict[str, Any]) -> None:
        """Write a row."""
        size = len(row["image"]["bytes"])
        self._held.append(row)
        self.count += 1
        self.bytes += size
        self._in_file += size
        if len(self._held) == _GROUP_ROWS or self._in_file > _FILE_BYTES:
            self._write()

    def _write(self) -> None:
        import pyarrow
        import pyarrow.parquet

        if not self._held:
            return
        schema = _schema()
        if self._writer is None:
            path = self._folder / f"{ROWS}-{self._files:05d}.parquet"
            # pictures are compressed already
            self._writer = pyarrow.parquet.ParquetWriter(path, schema, compression={"image.bytes": "none"} | _compressed())
            self._files += 1
        self._writer.write_table(pyarrow.Table.from_pylist(self._held, schema))
        self._held = []
        if self._in_file > _FILE_BYTES:
            self._writer.close()
            self._writer, self._in_file = None, 0


def _compressed() -> dict[str, str]:
    return dict.fromkeys(("image.path", *_TEXTS, *_NUMBERS), "zstd")


def _schema() -> pyarrow.Schema:
    """The columns, and what the library `datasets` reads of them: that `image` is a picture."""
    import pyarrow as pa

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = [("image", image), *((name, pa.string()) for name in _TEXTS), *((name, pa.int32()) for name in _NUMBERS)]
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    features |= {name: {"dtype": "string", "_type": "Value"} for name in _TEXTS}
    features |= {name: {"dtype": "int32", "_type": "Value"} for name in _NUMBERS}
    return pa.schema(columns, metadata={"huggingface": json.dumps({"info": {"features": features}})})
