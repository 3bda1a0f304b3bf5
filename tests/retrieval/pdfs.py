"""PDF files written by hand, as small as they can be: text where a test puts it, lines, and what makes a file hostile."""

from __future__ import annotations

FONTS = {"regular": "Helvetica", "bold": "Helvetica-Bold", "fixed": "Courier"}


def text(x, y, words, size=10, font="regular"):
    """Words with their base at a point, y upwards from the lower left corner."""
    shown = words.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")
    return f"BT /{font} {size} Tf 1 0 0 1 {x} {y} Tm ({shown}) Tj ET"


def rule(x0, y0, x1, y1):
    """A line."""
    return f"0.5 w {x0} {y0} m {x1} {y1} l S"


def pdf(*pages, box=(0, 0, 612, 792), crop=None, rotate=0, title=None, is_encrypted=False):
    """A file with a page for each list of `text` and `rule`."""
    objects = []

    def add(content):
        objects.append(content.encode("cp1252") if isinstance(content, str) else content)
        return len(objects)

    catalog, tree = add("<< /Type /Catalog /Pages 2 0 R >>"), add("")
    fonts = " ".join(
        f"/{name} {add(f'<< /Type /Font /Subtype /Type1 /BaseFont /{base} /Encoding /WinAnsiEncoding >>')} 0 R"
        for name, base in FONTS.items()
    )
    kids = []
    for page in pages:
        stream = "\n".join(page).encode("cp1252")
        content = add(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
        cropped = f"/CropBox [{' '.join(map(str, crop))}] " if crop else ""
        kids.append(
            add(
                f"<< /Type /Page /Parent {tree} 0 R {cropped}/Rotate {rotate} /Contents {content} 0 R "
                f"/Resources << /Font << {fonts} >> >> >>"
            )
        )
    # the size of the pages is inherited from the tree
    objects[tree - 1] = (
        f"<< /Type /Pages /Count {len(kids)} /Kids [{' '.join(f'{kid} 0 R' for kid in kids)}] "
        f"/MediaBox [{' '.join(map(str, box))}] >>"
    ).encode()
    trailer = f"/Root {catalog} 0 R"
    if title is not None:
        trailer += f" /Info {add(f'<< /Title ({title}) >>')} 0 R"
    if is_encrypted:
        # keys that no password gives
        number = add(f"<< /Filter /Standard /V 1 /R 2 /P -4 /O <{'41' * 32}> /U <{'42' * 32}> >>")
        trailer += f" /Encrypt {number} 0 R /ID [<00> <00>]"
    data = b"%PDF-1.4\n"
    places = []
    for number, content in enumerate(objects, start=1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n" + "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"trailer << /Size {len(objects) + 1} {trailer} >>\nstartxref\n{len(data)}\n%%EOF\n"
    return data + (table + end).encode()
