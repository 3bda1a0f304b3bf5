"""A page of a PDF as a picture, with a passage's box marked in it."""

from __future__ import annotations

import io
from contextlib import closing
from pathlib import Path

from bessemer.core.errors import RequestError
from bessemer.data.limited import Limited, RefusedError
from bessemer.retrieval.chunks import Box

#: Width of the picture, most pixels of it, and most pixels for a point.
_WIDTH, _MOST_PIXELS, _LARGEST_SCALE = 1200, 6_000_000, 4.0
_SECONDS = 30.0
#: Colour of a mark, its share over the page, and its distance from the text in points.
_MARK, _SHARE, _MARGIN = (255, 196, 0), 0.3, 2.0
_NO_PAGE = "no such page: "


def page_image(path: Path, page: int, box: Box | None = None, *, width: int = _WIDTH) -> bytes:
    """A page as PNG, `width` pixels wide, or smaller where it is very long. page: from 1; box: marked; see `Box`.

    pdfium runs in a process of its own: a damaged file ends that one, and threads may call this at the same time. Raises
    RequestError where there is no such page, or the file is no PDF that can be shown.
    """
    if not path.is_file():
        raise RequestError(f"{path.name}: the file is not there any more")
    with closing(Limited(draw_page, _SECONDS)) as draw:
        try:
            image: bytes = draw(str(path), page, box, width)
        except RefusedError as refused:
            reason = str(refused).rpartition(_NO_PAGE)[2] if _NO_PAGE in str(refused) else str(refused)
            raise RequestError(f"{path.name}: page {page} cannot be shown: {reason}") from None
    return image


def draw_page(path: str, page: int, box: Box | None, width: int) -> bytes:
    """As `page_image`, in this process."""
    import pypdfium2
    from PIL import Image

    document = pypdfium2.PdfDocument(path)
    try:
        if not 1 <= page <= len(document):
            raise ValueError(f"{_NO_PAGE}the document has {len(document):,} pages")
        shown = document[page - 1]
        wide, high = shown.get_size()
        scale = min(width / wide, _LARGEST_SCALE, (_MOST_PIXELS / (wide * high)) ** 0.5)
        image = shown.render(scale=scale).to_pil().convert("RGB")
        if box is not None:
            left, top = max(0, round((box[0] - _MARGIN) * scale)), max(0, round((box[1] - _MARGIN) * scale))
            right = min(image.width, round((box[2] + _MARGIN) * scale))
            bottom = min(image.height, round((box[3] + _MARGIN) * scale))
            if left < right and top < bottom:
                part = image.crop((left, top, right, bottom))
                image.paste(Image.blend(part, Image.new("RGB", part.size, _MARK), _SHARE), (left, top))
        written = io.BytesIO()
        image.save(written, "PNG")
        return written.getvalue()
    finally:
        document.close()
