"""Pictures in PDF files, with the captions under or above them, and the alternative texts of tagged files.

A caption is a text beside a picture that begins as captions do: `Figure 3`, `Abb. 3`. Other text beside a picture is running
text. The mark and number are left out of it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bessemer.retrieval.chunks import Box
from bessemer.retrieval.reading.pdf_lines import Line, geometry_of, lines_of_page

#: Most pages and pictures of a file that are read, and bytes of all its pictures.
_MOST_PAGES, _MOST_PICTURES, _MOST_BYTES = 5000, 5000, 512 << 20
#: How captions begin in the languages of many documents.
MARK = re.compile(
    r"(?:fig(?:ure|\.)?|abb(?:ildung|\.)?|bild|figura|figure|imagen?|immagine|foto|photo(?:graph)?|plate|scheme|chart|exhibit|"
    r"illustration|graphik|grafik|schaubild|рис(?:унок|\.)?|rys(?:unek|\.)?|obr(?:ázek|\.)?|kuva|afbeelding|图|圖|図)"
    r"\s*\.?\s*(?:[A-Z]?\d[\d.\-–]*[a-z]?|[IVX]+)\s*[.:|–—-]?\s*",
    re.IGNORECASE,
)
#: In heights of a line: the gap between a picture and its caption, the step to the next line of it. Most lines of one.
_GAP, _STEP, _MOST_LINES = 4.0, 1.7, 12
#: Share of a line's width that must stand beside a picture's, and of a size by which lines of one caption differ.
_BESIDE, _RESIZED = 0.3, 0.15
_MOST_PIXELS = 64_000_000


@dataclass(frozen=True)
class PdfPicture:
    """A picture of a page. texts: each with its kind, `caption` or `alt`. data: PNG, or JPEG as it lies in the file."""

    page: int
    number: int
    texts: tuple[tuple[str, str], ...]
    data: bytes


@dataclass
class PdfPictures:
    """The pictures of a file. notes: what could not be read, with its page."""

    pages: int = 0
    pictures: list[PdfPicture] = field(default_factory=list)
    notes: list[tuple[int, str]] = field(default_factory=list)


def pictures_of_pdf(data: bytes, limits: tuple[int, int]) -> PdfPictures:
    """The pictures of a PDF. limits: pixels of the shorter side below which one is left out, and the most bytes of one. Raises
    pdfium's error for a file that is damaged or needs a password."""
    import pypdfium2

    found = PdfPictures()
    document = pypdfium2.PdfDocument(data)
    try:
        total = 0
        for index in range(min(len(document), _MOST_PAGES)):
            try:
                page = document[index]
            except Exception:  # pdfium's own, for a damaged page
                found.notes.append((index + 1, "the page cannot be read"))
                continue
            found.pages += 1
            try:
                total += _read_page(page, index + 1, limits, found)
            except Exception as error:  # whatever a damaged page leads pdfium to
                found.notes.append((index + 1, f"{type(error).__name__}: {error}"))
            finally:
                page.close()
            if total > _MOST_BYTES or len(found.pictures) > _MOST_PICTURES:
                found.notes.append((index + 1, "too many pictures; those behind this page were left out"))
                break
    finally:
        document.close()
    return found


def _read_page(page: Any, page_number: int, limits: tuple[int, int], found: PdfPictures) -> int:
    """Add a page's pictures. Returns their bytes."""
    import pypdfium2.raw as pdfium

    objects = [*page.get_objects(filter=[pdfium.FPDF_PAGEOBJ_IMAGE])]
    if not objects:
        return 0
    display = geometry_of(page)
    lines, frame = lines_of_page(page, display)
    alternatives = _alternative_texts(page)
    added = 0
    for number, one in enumerate(objects, start=1):
        try:
            width, height = one.get_px_size()
            if min(width, height) < limits[0] or width * height > _MOST_PIXELS:
                continue
            data = _bytes_of(one)
        except Exception as error:  # as above, for one picture
            found.notes.append((page_number, f"picture {number}: {type(error).__name__}: {error}"))
            continue
        if len(data) > limits[1]:
            continue
        left, bottom, right, top = one.get_bounds()
        (u0, v0), (u1, v1) = frame.point(left, bottom), frame.point(right, top)
        box = (min(u0, u1), min(v0, v1), max(u0, u1), max(v0, v1))
        alternative = alternatives.get(int(pdfium.FPDFPageObj_GetMarkedContentID(one.raw)), "")
        texts = [(caption_of(lines, box), "caption"), (alternative, "alt")]
        found.pictures.append(PdfPicture(page_number, number, tuple(each for each in texts if each[0]), data))
        added += len(data)
    return added


def _bytes_of(one: Any) -> bytes:
    """A picture's file: JPEG as it lies in the PDF, others as PNG."""
    from PIL import Image

    if one.get_filters() == ["DCTDecode"]:
        data = bytes(one.get_data())
        with Image.open(io.BytesIO(data)) as image:
            # the colours of printing are converted by pdfium
            if image.mode != "CMYK":
                return data
    bitmap = one.get_bitmap(render=False)
    stream = io.BytesIO()
    bitmap.to_pil().save(stream, "PNG")
    return stream.getvalue()


def caption_of(lines: Sequence[Line], box: Box) -> str:
    """The caption of a picture among the lines of its page, without its mark; "" where no text beside it begins as one.

    box: of the picture, in the picture of the page in which the lines stand.
    """
    left, top, right, bottom = box

    def shared(line: Line) -> float:
        return min(line.box[2], right) - max(line.box[0], left)

    beside = [line for line in lines if shared(line) > _BESIDE * min(line.width, right - left)]
    below = sorted((line for line in beside if line.box[1] >= bottom - line.size / 2), key=lambda line: line.base)
    text = _from(below, bottom)
    if text:
        return text
    # above the picture a caption ends where the picture begins: its mark is looked for upwards
    above = sorted((line for line in beside if line.box[3] <= top + line.size / 2), key=lambda line: -line.base)
    for count, line in enumerate(above[:_MOST_LINES], start=1):
        if MARK.match(line.text):
            part = above[:count][::-1]
            text = _from(part, line.box[1])
            is_whole = top - part[-1].box[3] <= _GAP * part[-1].size
            return text if is_whole and len(_block(part)) == count else ""
    return ""


def _from(lines: Sequence[Line], edge: float) -> str:
    """The caption that begins with the first of the lines, which go downwards from an edge of the picture."""
    if not lines or lines[0].box[1] - edge > _GAP * lines[0].size or not (mark := MARK.match(lines[0].text)):
        return ""
    block = _block(lines)
    text = " ".join(" ".join(line.text for line in block).split())
    text = re.sub(r"(?<=[a-z])- (?=[a-z])", "", text)
    return text[mark.end() :].strip()


def _block(lines: Sequence[Line]) -> list[Line]:
    """The first lines that follow each other in one size."""
    block = [lines[0]]
    for line in lines[1:_MOST_LINES]:
        last = block[-1]
        is_apart = abs(line.base - last.base) > _STEP * last.size or abs(line.size - last.size) > _RESIZED * last.size
        if is_apart or MARK.match(line.text):
            break
        block.append(line)
    return block


def _alternative_texts(page: Any) -> dict[int, str]:
    """The alternative texts of a tagged page, by the number of the marked content that they are of."""
    import pypdfium2.raw as pdfium

    tree = pdfium.FPDF_StructTree_GetForPage(page.raw)
    if not tree:
        return {}
    texts: dict[int, str] = {}
    try:
        waiting = [
            (pdfium.FPDF_StructTree_GetChildAtIndex(tree, place), "")
            for place in range(pdfium.FPDF_StructTree_CountChildren(tree))
        ]
        seen = 0
        while waiting and seen < _MOST_PICTURES * 10:
            element, outer = waiting.pop()
            seen += 1
            if not element:
                continue
            text = _alternative_text(element) or outer
            if text:
                for place in range(pdfium.FPDF_StructElement_GetMarkedContentIdCount(element)):
                    texts[int(pdfium.FPDF_StructElement_GetMarkedContentIdAtIndex(element, place))] = text
            children = range(pdfium.FPDF_StructElement_CountChildren(element))
            waiting += [(pdfium.FPDF_StructElement_GetChildAtIndex(element, place), text) for place in children]
    finally:
        pdfium.FPDF_StructTree_Close(tree)
    texts.pop(-1, None)
    return texts


def _alternative_text(element: Any) -> str:
    import ctypes

    import pypdfium2.raw as pdfium

    size = pdfium.FPDF_StructElement_GetAltText(element, None, 0)
    if size <= 2:
        return ""
    buffer = ctypes.create_string_buffer(size)
    pdfium.FPDF_StructElement_GetAltText(element, buffer, size)
    return " ".join(buffer.raw[: size - 2].decode("utf-16-le", errors="replace").split())
