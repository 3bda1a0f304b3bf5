from __future__ import annotations

import pytest

from bessemer.data.sources.source import Tally
from tests.data.sources.makers import PAPER, assert_resumes, documents, epub, opened, pdf, tar, zipped


def test_a_book_is_read_in_the_order_of_its_spine(tmp_path):
    (tmp_path / "a.epub").write_bytes(epub(["<h1>Two</h1><p>b</p>", "<h1>One</h1><p>a</p>"]))
    (document,) = documents("epub", tmp_path)
    assert document.text == "# One\n\na\n\n# Two\n\nb"
    assert (document.metadata["title"], document.metadata["author"]) == ("The Book", "Ann")


@pytest.mark.parametrize("by_chapter", [False, True])
def test_a_chapter_that_a_spine_names_again_and_again_is_read_once(tmp_path, by_chapter):
    container = '<container><rootfiles><rootfile full-path="b.opf"/></rootfiles></container>'
    package = (
        '<package><manifest><item id="c" href="c.html" media-type="text/html"/>'
        '<item id="d" href="./c.html" media-type="text/html"/></manifest>'
        "<spine>" + '<itemref idref="c"/>' * 50 + '<itemref idref="d"/></spine></package>'
    )
    (tmp_path / "a.epub").write_bytes(zipped({"META-INF/container.xml": container, "b.opf": package, "c.html": "<p>Iron.</p>"}))
    assert [document.text for document in documents("epub", tmp_path, by_chapter=by_chapter)] == ["Iron."]


def test_chapters_may_be_documents_of_one_group(tmp_path):
    (tmp_path / "a.epub").write_bytes(epub(["<p>b</p>", "<p>a</p>"]))
    read = [document for _, _, document in assert_resumes(opened("epub", tmp_path, by_chapter=True))]
    assert [document.locator for document in read] == ["a.epub#OPS/t/c1.xhtml", "a.epub#OPS/t/c0.xhtml"]
    assert {document.group for document in read} == {"a.epub"}


def test_a_books_licence_is_read_from_its_rights(tmp_path):
    rights = "This work is under https://creativecommons.org/licenses/by/4.0/"
    (tmp_path / "a.epub").write_bytes(epub(["<p>a</p>"], rights=rights))
    assert documents("epub", tmp_path)[0].license == "CC-BY-4.0"


def test_a_protected_book_is_counted_and_one_with_hidden_fonts_is_read(tmp_path):
    method = '<encryption><EncryptedData><EncryptionMethod Algorithm="{}"/></EncryptedData></encryption>'
    protected = epub(
        ["<p>a</p>"], extra={"META-INF/encryption.xml": method.format("http://www.w3.org/2001/04/xmlenc#aes128-cbc")}
    )
    fonts = epub(["<p>a</p>"], extra={"META-INF/encryption.xml": method.format("http://www.idpf.org/2008/embedding")})
    (tmp_path / "a.epub").write_bytes(protected)
    (tmp_path / "b.epub").write_bytes(fonts)
    tally = Tally()
    assert [document.locator for document in documents("epub", tmp_path, tally)] == ["b.epub"]
    assert tally.counts == {"encrypted_files": 1}


@pytest.mark.parametrize("content", [b"no zip", zipped({"a": b"b"}), zipped({"META-INF/container.xml": b"<container/>"})])
def test_what_is_no_book_is_counted(tmp_path, content):
    (tmp_path / "a.epub").write_bytes(content)
    tally = Tally()
    assert documents("epub", tmp_path, tally) == []
    assert tally.counts == {"damaged_files": 1}


BOMB = (
    '<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a0 "steel">'
    + "".join(f'<!ENTITY a{n + 1} "{f"&a{n};" * 10}">' for n in range(12))
    + ']><package xmlns="http://www.idpf.org/2007/opf"><metadata><title>&a12;</title></metadata></package>'
)


def test_entities_that_multiply_are_not_expanded(tmp_path):
    container = '<container><rootfiles><rootfile full-path="b.opf"/></rootfiles></container>'
    (tmp_path / "a.epub").write_bytes(zipped({"META-INF/container.xml": container, "b.opf": BOMB}))
    tally = Tally()
    assert documents("epub", tmp_path, tally) == []
    assert tally.counts.total() == 1


def test_an_entity_does_not_read_a_file(tmp_path):
    (tmp_path / "secret").write_text("the secret", encoding="utf-8")
    package = (
        f'<!DOCTYPE p [<!ENTITY x SYSTEM "file://{tmp_path}/secret">]>'
        "<package><metadata><title>&x;</title></metadata>"
        '<manifest><item id="c" href="c.html" media-type="text/html"/></manifest><spine><itemref idref="c"/></spine></package>'
    )
    container = '<container><rootfiles><rootfile full-path="b.opf"/></rootfiles></container>'
    (tmp_path / "a.epub").write_bytes(zipped({"META-INF/container.xml": container, "b.opf": package, "c.html": "<p>a</p>"}))
    (document,) = documents("epub", tmp_path)
    assert "secret" not in str(document)


def test_the_pages_of_a_pdf_follow_each_other(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf(["First page about steel.", "Second page."]))
    (document,) = documents("pdf", tmp_path)
    assert (document.text, document.metadata["pages"]) == ("First page about steel.\n\nSecond page.", "2")


def test_a_pdf_without_text_is_counted_and_named(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf(["", ""]))
    tally = Tally()
    assert documents("pdf", tmp_path, tally) == []
    assert tally.counts == {"files_without_text": 1}
    assert tally.notes == ["a.pdf: none of its 2 pages has text; scanned?"]


def test_what_is_no_pdf_is_counted(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4 and nothing more")
    tally = Tally()
    assert documents("pdf", tmp_path, tally) == []
    assert tally.counts == {"unreadable_files": 1}


def test_a_pdf_that_needs_a_password_is_counted(tmp_path):
    locked = pdf(["x"]).replace(
        b"/Root 1 0 R >>",
        b"/Root 1 0 R /Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O (%s) /U (%s) >> /ID [(a) (a)] >>"
        % (b"o" * 32, b"u" * 32),
    )
    (tmp_path / "a.pdf").write_bytes(locked)
    tally = Tally()
    assert documents("pdf", tmp_path, tally) == []
    assert tally.counts == {"encrypted_files": 1}


EXPECTED = "Iron is 5\\% carbon.\nTwo $a^2$."


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("2301.00001v2.tar.gz", tar({"main.tex": PAPER.encode(), "parts/two.tex": b"Two $a^2$. % gone"}, "w:gz")),
        ("2301.00001v2.zip", zipped({"main.tex": PAPER, "parts/two.tex": "Two $a^2$."})),
        ("2301.00001v2.tgz", tar({"x/main.tex": PAPER.encode(), "x/parts/two.tex": b"Two $a^2$."}, "w:gz")),
    ],
)
def test_a_paper_is_its_document_with_what_it_inputs(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    (document,) = documents("latex", tmp_path)
    assert document.text == EXPECTED
    assert (document.heading, document.metadata["arxiv"]) == ("On Steel", "2301.00001v2")
    assert document.url == "https://arxiv.org/abs/2301.00001v2"


def test_arxivs_tars_hold_papers_as_gz_members(tmp_path):
    import gzip

    members = {
        "2301/2301.00001.gz": gzip.compress(PAPER.replace("\\input{parts/two}", "").encode()),
        "2301/2301.00002.gz": tar({"ms.tex": PAPER.encode(), "parts/two.tex": b"Two."}, "w:gz"),
        "2301/2301.00003.pdf": b"%PDF",
        "2301/hep-th9901001.gz": gzip.compress(b"no paper"),
    }
    (tmp_path / "arXiv_src_2301_001.tar").write_bytes(tar(members))
    tally = Tally()
    read = documents("latex", tmp_path, tally)
    assert [document.metadata["arxiv"] for document in read] == ["2301.00001", "2301.00002"]
    assert tally.counts == {"files_that_are_no_paper": 1}


def test_a_lone_file_inputs_from_its_folder_and_from_nowhere_else(tmp_path):
    folder = tmp_path / "paper"
    (folder / "parts").mkdir(parents=True)
    (tmp_path / "secret.tex").write_text("secret", encoding="utf-8")
    (folder / "parts" / "link.tex").symlink_to(tmp_path / "secret.tex")
    (folder / "parts" / "two.tex").write_text(
        "Two $a^2$.\\input{../secret}\\input{parts/link}\\input{/etc/passwd}", encoding="utf-8"
    )
    (folder / "main.tex").write_text(PAPER, encoding="utf-8")
    tally = Tally()
    (document,) = documents("latex", folder, tally)
    assert document.text == EXPECTED


def test_inputs_that_multiply_end_at_the_limit(tmp_path):
    files = {f"{n}.tex": (f"\\input{{{n + 1}}}" * 10).encode() for n in range(15)} | {"15.tex": b"x" * 1000}
    files["main.tex"] = b"\\documentclass{a}\\begin{document}\\input{0}\\end{document}"
    (tmp_path / "a.tar.gz").write_bytes(tar(files, "w:gz"))
    tally = Tally()
    documents("latex", tmp_path, tally, max_document_bytes=100_000)
    assert tally.counts.total() <= 1


def test_a_file_that_inputs_itself_ends(tmp_path):
    (tmp_path / "main.tex").write_text(
        "\\documentclass{a}\\begin{document}Steel. \\input{main}\\end{document}", encoding="utf-8"
    )
    assert documents("latex", tmp_path)[0].text.startswith("Steel.")


def test_comments_in_listings_and_escaped_signs_stay(tmp_path):
    body = "50\\% of it.\n\\begin{verbatim}\nprint('%d' % 3)\n\\end{verbatim}\n\\begin{comment}no\\end{comment}done"
    (tmp_path / "a.tex").write_text(f"\\documentclass{{a}}\n\\begin{{document}}\n{body}\n\\end{{document}}\n", encoding="utf-8")
    assert documents("latex", tmp_path)[0].text == "50\\% of it.\n\\begin{verbatim}\nprint('%d' % 3)\n\\end{verbatim}\ndone"
