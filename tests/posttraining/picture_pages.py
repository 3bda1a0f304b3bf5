"""Pages, web archives and PDF files with drawn pictures, written by hand."""

from __future__ import annotations

import gzip
import io
import zlib

import numpy as np
from fastwarc.warc import WarcRecord, WarcRecordType
from PIL import Image, ImageDraw

from tests.model.picture_files import encoded


def scene(seed, width=160, height=120):
    """A picture of soft areas and discs, unlike those of other seeds."""
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 255, (6, 8, 3)).astype(np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, side = random.integers(0, width), random.integers(0, height), random.integers(5, width // 4)
        draw.ellipse((x - side, y - side, x + side, y + side), fill=tuple(int(value) for value in random.integers(0, 255, 3)))
    return image


def png(seed, **size):
    return encoded(scene(seed, **size))


def jpeg(seed, quality=90, **size):
    return encoded(scene(seed, **size), "JPEG", quality=quality)


def html(body, head=""):
    return f"<!doctype html><html><head><title>t</title>{head}</head><body>{body}</body></html>".encode()


def write_tree(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def warc(records):
    """A compressed archive of (address, media type, content, headers)."""
    stream = io.BytesIO()
    for number, (url, kind, content, *headers) in enumerate(records):
        record = WarcRecord()
        record.init_headers(WarcRecordType.response, f"uuid:00000000-0000-4000-8000-{number:012d}".encode())
        record.headers["WARC-Target-URI"] = url
        record.headers["WARC-Date"] = "2026-01-02T03:04:05Z"
        record.headers["Content-Type"] = "application/http; msgtype=response"
        lines = ["HTTP/1.1 200 OK", f"Content-Type: {kind}", *headers, "", ""]
        record.set_bytes_content("\r\n".join(lines).encode() + content)
        written = io.BytesIO()
        record.write(written)
        stream.write(gzip.compress(written.getvalue(), mtime=0))
    return stream.getvalue()


def picture_pdf(*pages, is_tagged=False):
    """A PDF with a page for each list of parts: (x, y, words), (x, y, words, size), or (x, y, width, height, picture), from the
    lower left; a picture is the bytes of a JPEG, or an image that is stored as it is. A last value of a picture is its
    alternative text, in a tagged file."""
    objects = [b""]

    def add(content):
        objects.append(content if isinstance(content, bytes) else content.encode("cp1252"))
        return len(objects)

    tree = add("")
    font = add("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>")
    kids, elements = [], []
    root = add("") if is_tagged else 0
    for page in pages:
        operators, images, tags = [], {}, []
        for part in page:
            if isinstance(part[2], str):
                x, y, words, *size = part
                shown = words.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")
                operators.append(f"BT /F {size[0] if size else 10} Tf 1 0 0 1 {x} {y} Tm ({shown}) Tj ET")
                continue
            x, y, width, height, picture, *alternative = part
            name = f"Im{len(images)}"
            images[name] = add(_image_object(picture))
            drawn = f"q {width} 0 0 {height} {x} {y} cm /{name} Do Q"
            if alternative:
                drawn = f"/Figure << /MCID {len(tags)} >> BDC {drawn} EMC"
                tags.append(alternative[0])
            operators.append(drawn)
        stream = "\n".join(operators).encode("cp1252")
        content = add(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
        shown = " ".join(f"/{name} {number} 0 R" for name, number in images.items())
        kid = add(
            f"<< /Type /Page /Parent {tree} 0 R /Contents {content} 0 R /StructParents {len(kids)} "
            f"/Resources << /Font << /F {font} 0 R >> /XObject << {shown} >> >> >>"
        )
        kids.append(kid)
        elements += [
            add(f"<< /Type /StructElem /S /Figure /P {root} 0 R /Pg {kid} 0 R /K {number} /Alt ({text}) >>")
            for number, text in enumerate(tags)
        ]
    named = " ".join(f"{kid} 0 R" for kid in kids)
    objects[tree - 1] = f"<< /Type /Pages /Count {len(kids)} /Kids [{named}] /MediaBox [0 0 612 792] >>".encode()
    marked = ""
    if is_tagged:
        listed = " ".join(f"{element} 0 R" for element in elements)
        parents = add(f"<< /Nums [0 [{listed}]] >>")
        objects[root - 1] = f"<< /Type /StructTreeRoot /K [{listed}] /ParentTree {parents} 0 R >>".encode()
        marked = f" /StructTreeRoot {root} 0 R /MarkInfo << /Marked true >>"
    objects[0] = f"<< /Type /Catalog /Pages {tree} 0 R{marked} >>".encode()
    data, places = b"%PDF-1.7\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n" + "".join(f"{place:010} 00000 n \n" for place in places)
    return data + f"{table}trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF\n".encode()


def _image_object(picture):
    if isinstance(picture, bytes):
        image = Image.open(io.BytesIO(picture))
        colours = {"RGB": "DeviceRGB", "CMYK": "DeviceCMYK", "L": "DeviceGray"}[image.mode]
        data, coded = picture, "/Filter /DCTDecode"
    else:
        image, colours = picture, "DeviceRGB"
        data, coded = zlib.compress(picture.tobytes()), "/Filter /FlateDecode"
    head = (
        f"<< /Type /XObject /Subtype /Image /Width {image.width} /Height {image.height} /ColorSpace /{colours} "
        f"/BitsPerComponent 8 {coded} /Length {len(data)} >>\nstream\n"
    )
    return head.encode() + data + b"\nendstream"
