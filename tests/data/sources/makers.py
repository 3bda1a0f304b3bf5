"""Small inputs of every kind, made with other libraries than those that read them where there are such."""

from __future__ import annotations

import email.message
import io
import json
import mailbox
import tarfile
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from fastwarc.stream_io import GzipWriter, ZstdWriter
from fastwarc.warc import WarcRecord, WarcRecordType

from bessemer.data.sources.html import Extraction
from bessemer.data.sources.registry import open_source, source_plugin
from bessemer.data.sources.source import Tally


def plain_text(page, url=None):
    """Stands for the extractor: all text of a page."""
    from bessemer.data.sources.markup import text_of_markup

    return text_of_markup(page.decode())


def opened(kind, folder, **settings):
    """The source of a kind over `folder`, with the extractor above."""
    config = source_plugin(kind).settings.parse({"source": kind, "paths": ["."]} | settings)
    source = open_source(config, folder, folder / "cache")
    if hasattr(source.format, "extraction"):
        source = replace(source, format=replace(source.format, extraction=Extraction(function=plain_text)))
    return source


def files_source(paths, folder, max_document_bytes):
    """The source `files` over some paths."""
    settings = source_plugin("files").settings.parse({"paths": paths, "max_document_bytes": max_document_bytes})
    return open_source(settings, folder, folder / "cache")


def found(source, tally=None):
    """Everything a source yields: unit, position, document."""
    tally = tally if tally is not None else Tally()
    return [(unit, position, document) for unit in source.units() for position, document in source.read(unit, 0, tally)]


def documents(kind, folder, tally=None, **settings):
    return [document for _, _, document in found(opened(kind, folder, **settings), tally)]


def assert_resumes(source):
    """From behind every document, reading yields exactly the rest of its unit, and positions only grow."""
    everything = found(source)
    assert everything
    for number, (unit, position, _) in enumerate(everything):
        rest = [(p, d) for u, p, d in everything[number + 1 :] if u == unit]
        assert all(later > position for later, _ in rest)
        assert list(source.read(unit, position, Tally())) == rest
    return everything


def page(body, head=""):
    return f"<html lang='en'><head><title>A page</title>{head}</head><body>{body}</body></html>".encode()


class _Uncompressed:
    """A writer of plain files beside fastwarc's compressing ones."""

    def __init__(self, file):
        self._file = file

    def write(self, data):
        return self._file.write(data)

    def finish(self):
        pass

    def close(self):
        pass


def warc(pages, compression=".gz", *, members=True, headers=(), first=0):
    """A WARC of (url, page) pairs, with a request and a metadata record between them, as crawlers write.

    Records are numbered from `first`; those of two archives have the same ids where their numbers are."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.warc"
        with path.open("wb") as file:
            stream = {".gz": GzipWriter, ".zst": ZstdWriter, "": _Uncompressed}[compression](file)
            for number, (url, content) in enumerate(pages, start=first):
                for kind in (WarcRecordType.request, WarcRecordType.response, WarcRecordType.metadata):
                    record = WarcRecord()
                    record.init_headers(kind, f"uuid:00000000-0000-4000-8000-{number:08d}{int(kind):04d}".encode())
                    record.headers["WARC-Target-URI"] = url
                    record.headers["WARC-Date"] = "2026-01-02T03:04:05Z"
                    if kind == WarcRecordType.response:
                        record.headers["Content-Type"] = "application/http; msgtype=response"
                        lines = ["HTTP/1.1 200 OK", "Content-Type: text/html; charset=utf-8", *headers, "", ""]
                        record.set_bytes_content("\r\n".join(lines).encode() + content)
                    else:
                        record.set_bytes_content(b"GET / HTTP/1.1\r\n\r\n")
                    record.write(stream)
                    if members:
                        stream.finish()
            stream.close()
        return path.read_bytes()


def epub(chapters, *, extra=None, rights=""):
    manifest = "".join(
        f'<item id="c{n}" href="t/c{n}.xhtml" media-type="application/xhtml+xml"/>' for n in range(len(chapters))
    )
    spine = "".join(f'<itemref idref="c{n}"/>' for n in reversed(range(len(chapters))))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr("mimetype", "application/epub+zip")
        book.writestr(
            "META-INF/container.xml",
            '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
            '<rootfile full-path="OPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>',
        )
        book.writestr(
            "OPS/book.opf",
            '<package xmlns="http://www.idpf.org/2007/opf"><metadata xmlns:dc="http://purl.org/dc/elements/1.1/">'
            f"<dc:title>The Book</dc:title><dc:creator>Ann</dc:creator><dc:rights>{rights}</dc:rights></metadata>"
            f"<manifest>{manifest}</manifest><spine>{spine}</spine></package>",
        )
        for number, chapter in enumerate(chapters):
            book.writestr(f"OPS/t/c{number}.xhtml", f"<html xmlns='http://www.w3.org/1999/xhtml'><body>{chapter}</body></html>")
        for name, content in (extra or {}).items():
            book.writestr(name, content)
    return buffer.getvalue()


def pdf(pages):
    """A PDF with these lines of text, one page each, written by hand."""
    count = len(pages)
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(count))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {count} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, text in enumerate(pages):
        drawn = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
        font = "/Resources << /Font << /F1 3 0 R >> >>"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * number} 0 R {font} >>".encode()
        )
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(drawn), drawn))
    out, places = bytearray(b"%PDF-1.4\n"), []
    for number, content in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + b"".join(b"%010d 00000 n \n" % at for at in places)
    out += b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start)
    return bytes(out)


def tar(files, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


PAPER = r"""\documentclass{article}
\usepackage{amsmath} % a comment
\title{On Steel \thanks{nobody}}
\begin{document}
\maketitle
% all comment
Iron is 5\% carbon. % trailing
\input{parts/two}
\begin{thebibliography}{9} \bibitem{a} A. \end{thebibliography}
\end{document}
after the end
"""


def mediawiki(pages):
    written = "".join(
        f"""  <page>
    <title>{title}</title>
    <ns>{ns}</ns>
    <id>{number}</id>
    {redirect}
    <revision>
      <id>{number + 1000}</id>
      <timestamp>2026-01-01T00:00:00Z</timestamp>
      <text bytes="1" xml:space="preserve">{text}</text>
    </revision>
  </page>
"""
        for number, (title, ns, redirect, text) in enumerate(pages, start=1)
    )
    head = (
        "<siteinfo><sitename>W</sitename><dbname>dewiki</dbname><base>https://de.wikipedia.org/wiki/Start</base>"
        '<namespaces><namespace key="6">Datei</namespace><namespace key="14">Kategorie</namespace></namespaces></siteinfo>'
    )
    return f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/">{head}\n{written}</mediawiki>\n'.encode()


def posts(rows):
    lines = "".join(f"  <row {' '.join(f'{name}={_quoted(value)}' for name, value in row.items())} />\n" for row in rows)
    return f'<?xml version="1.0" encoding="utf-8"?>\n<posts>\n{lines}</posts>\n'.encode()


def _quoted(value):
    from xml.sax.saxutils import quoteattr

    return quoteattr(str(value), {'"': "&quot;", ">": "&gt;"}).replace("'", '"', 1)[:-1] + '"'


def mbox(messages):
    """An mbox by the standard library's own writer."""
    with tempfile.TemporaryDirectory() as folder:
        box = mailbox.mbox(Path(folder) / "box")
        for message in messages:
            made = email.message.EmailMessage()
            for name, value in message.items():
                if name not in ("text", "html"):
                    made[name] = value
            made.set_content(message["text"])
            if "html" in message:
                made.add_alternative(message["html"], subtype="html")
            box.add(mailbox.mboxMessage(made))
        box.close()
        return (Path(folder) / "box").read_bytes()


def parquet(columns, rows_per_group=10):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=rows_per_group)
    return buffer.getvalue()


def json_lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def examples():
    """A file of each kind: (kind of source, file name, content)."""
    sentences = [f"Sentence number {n} about the making of steel." for n in range(12)]
    pages = [(f"http://e.org/{n}", page(f"<p>{text}</p>")) for n, text in enumerate(sentences)]
    mails = [{"Subject": f"s{n}", "Message-ID": f"<{n}@e>", "text": text + "\n"} for n, text in enumerate(sentences)]
    rows = [
        {"Id": n + 1, "PostTypeId": 1, "Score": n, "Body": f"<p>{text}</p>", "Title": "t"} for n, text in enumerate(sentences)
    ]
    tables = {"id": list(range(12)), "text": sentences}
    wiki = [(f"T{n}", 0, "", f"'''{text}''' {{{{x}}}}") for n, text in enumerate(sentences)]
    tree = {f"a/{n}.html": content for n, (_, content) in enumerate(pages)}
    chats = [{"messages": [{"role": "user", "content": text}]} for text in sentences]
    topics = [{"id": n, "title": "t", "post_stream": {"posts": [{"raw": text}]}} for n, text in enumerate(sentences)]
    return [
        ("warc", "a.warc.gz", warc(pages)),
        ("warc", "a.warc.zst", warc(pages, ".zst")),
        ("warc", "a.warc", warc(pages, "")),
        ("html", "a.html", pages[0][1]),
        ("html", "a.zip", zipped(tree)),
        ("html", "a.tar", tar(tree)),
        ("html", "a.tar.gz", tar(tree, "w:gz")),
        ("epub", "a.epub", epub([f"<p>{text}</p>" for text in sentences])),
        ("pdf", "a.pdf", pdf(sentences)),
        ("latex", "a.tar.gz", tar({"main.tex": PAPER.encode(), "parts/two.tex": b"Two."}, "w:gz")),
        ("mediawiki", "a.xml", mediawiki(wiki)),
        ("stack_exchange", "Posts.xml", posts(rows)),
        ("discourse", "a.json", json.dumps(topics).encode()),
        ("mbox", "a.mbox", mbox(mails)),
        ("chats", "a.jsonl", json_lines(chats)),
        ("tables", "a.parquet", parquet(tables)),
        ("tables", "a.csv", ("id,text\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(sentences))).encode()),
        ("docs", "a.md", b"# Title\n\nText.\n"),
        ("code", "a.zip", zipped({f"r/{n}.py": f"x = {n}\n".encode() for n in range(5)})),
    ]
