"""Pictures of pages, archives and PDF files with what is written about them, and which of them become rows."""

import base64
import io
import json
import random
import zipfile

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.progress import Silent
from bessemer.core.stage import Outside
from bessemer.model.vision.pictures import Picture, read_picture
from bessemer.pipeline.stages import STAGES
from bessemer.posttraining.data.examples import read_conversations
from bessemer.posttraining.data.picture_rows import QUESTION, sources_in
from bessemer.posttraining.pictures.config import PicturesConfig
from bessemer.posttraining.pictures.near import EarlierPictures, Hashes, difference_hash, hashes_of, perceptual_hash
from bessemer.posttraining.pictures.pages import largest_first, pictures_of_page
from bessemer.posttraining.pictures.stage import collect_pictures
from tests.model.picture_files import encoded, png_header
from tests.posttraining.picture_pages import html, jpeg, picture_pdf, png, scene, warc, write_tree

CAPTION = "A grey heron on a wooden jetty"


def collected(folder, *sources, **settings):
    """The rows of sources below a folder by their captions, the figures, and what was left out by its picture's place."""
    config = PicturesConfig.parse({"sources": [*sources], **settings})
    metrics = collect_pictures(config, folder, folder / "out", Silent())
    rows = [row for path in sorted((folder / "out" / "pictures").iterdir()) for row in pq.read_table(path).to_pylist()]
    left_out = [json.loads(line) for line in (folder / "out" / "left_out.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["caption"]: row for row in rows}, metrics, left_out


def of_tree(folder, files, **settings):
    write_tree(folder / "tree", files)
    source = {"source": "html", "paths": ["tree"]}
    given = {name: settings.pop(name) for name in ("license", "base_url") if name in settings}
    return collected(folder, source | given, **settings)


def figure(address, caption=CAPTION, alt="", more=""):
    return f'<figure><img src="{address}" alt="{alt}">{more}<figcaption>{caption}</figcaption></figure>'


# -- pages


def test_a_page_says_captions_alternative_texts_and_titles():
    page = html(
        figure(
            "a.png",
            "The <b>heron</b> of\n the lake",
            "a heron",
            '<a rel="license" href="https://creativecommons.org/licenses/by/4.0/">',
        )
        + '<img src=b.png alt="A cat &amp; a dog" title="pets">'
        + "<figure><img src=c.png><img src=d.png><figcaption>Both</figcaption></figure><img alt='no address'>"
        + "<figure><img src=e.png><figcaption>never closed"
    )
    found = pictures_of_page(page).pictures
    assert [(one.addresses, one.caption, one.alt, one.title) for one in found] == [
        (("a.png",), "The heron of the lake", "a heron", ""),
        (("b.png",), "", "A cat & a dog", "pets"),
        # of several pictures it is not said which one the caption is about
        (("c.png",), "", "", ""),
        (("d.png",), "", "", ""),
        (("e.png",), "never closed", "", ""),
    ]
    assert [one.license for one in found] == ["CC-BY-4.0", None, None, None, None]


def test_the_largest_of_a_set_comes_first_and_placeholders_last():
    assert largest_first("a.png 1x, b.png 2x") == ["b.png", "a.png"]
    assert largest_first("s.png?w=1,2 320w,l.png 1024w, m.png 640w") == ["l.png", "m.png", "s.png?w=1,2"]
    assert largest_first("only.png") == ["only.png"]
    page = html(
        '<picture><source srcset="w.webp 900w, v.webp 300w"><img src="data:image/gif;base64,R0lGOD" data-src="late.png" '
        'srcset="t.png 100w"></picture>'
    )
    (found,) = pictures_of_page(page).pictures
    assert found.addresses == ("w.webp", "v.webp", "t.png", "late.png", "data:image/gif;base64,R0lGOD")


def test_a_hostile_page_is_read_in_bounded_time():
    page = html(
        "<figure>" * 20_000 + "<img src='a.png' alt='" + "x " * 100_000 + "'>" + "<img srcset='" + "a," * 50_000 + "'>" * 3
    )
    found = pictures_of_page(page).pictures
    assert found[0].addresses == ("a.png",) and len(found[0].alt) <= 20_000


# -- trees and archives


def test_a_saved_page_and_its_pictures_become_rows(tmp_path):
    rows, metrics, _ = of_tree(
        tmp_path,
        {
            "wiki/heron.html": html(
                figure("heron_files/heron.png?x=1")
                + '<img srcset="missing.png 900w, ../shared/jay.jpg 300w" src="heron_files/small.jpg" '
                'alt="A jay in an oak tree">',
                '<link rel="license" href="https://creativecommons.org/licenses/by-sa/4.0/">',
            ),
            "wiki/heron_files/heron.png": png(1),
            "wiki/heron_files/small.jpg": jpeg(2, width=80, height=60),
            "shared/jay.jpg": jpeg(3),
            "shared/LICENSE": b"MIT License\n\nPermission is hereby granted, free of charge, to any person obtaining a copy",
        },
        base_url="https://example.org",
    )
    heron, jay = rows[CAPTION], rows["A jay in an oak tree"]
    assert (heron["page"], heron["address"]) == ("https://example.org/wiki/heron.html", "heron_files/heron.png?x=1")
    assert (heron["text_from"], jay["text_from"], heron["license"], jay["alt"]) == (
        "figcaption",
        "alt",
        "CC-BY-SA-4.0",
        "A jay in an oak tree",
    )
    assert read_picture(heron["image"]["bytes"]).digest == read_picture(png(1)).digest
    # the largest that there is
    assert (jay["width"], jay["height"]) == (160, 120) and jay["image"]["bytes"][:2] == b"\xff\xd8"
    assert metrics["pictures"] == 2 and heron["source"] == "html"


def test_pictures_lie_under_absolute_addresses_mirrored_hosts_and_quoted_names(tmp_path):
    names = [
        "From the root of the site",
        "From another host of it",
        "With a blank in its name",
        "Under the page's base address",
    ]
    page = html(
        figure("/img/a.png", names[0])
        + figure("https://cdn.example.org/b.png", names[1])
        + figure("my%20picture.png", names[2])
        + figure("https://example.org/img/d.png", names[3])
    )
    files = {
        f"{place}": png(number)
        for number, place in enumerate(["img/a.png", "cdn.example.org/b.png", "p/my picture.png", "img/d.png"])
    }
    rows, _, _ = of_tree(tmp_path, {"p/index.html": page, **files}, base_url="https://example.org/")
    assert set(rows) == set(names)


def test_archives_are_read_without_unpacking(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        # the picture comes before its page
        archive.writestr("site/a.png", png(4))
        archive.writestr("site/index.html", html(figure("a.png") + figure("../../secret.png", "A secret of this machine")))
    rows, metrics, _ = of_tree(tmp_path, {"pages.zip": buffer.getvalue(), "secret.png": png(5)})
    assert set(rows) == {CAPTION} and metrics["pictures_not_saved"] == 1


def test_no_name_leads_out_of_the_tree(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(6))
    page = html(
        figure("a.png")
        + "".join(
            figure(address, f"A secret number {number} of this machine")
            for number, address in enumerate(
                ["../secret.png", "%2e%2e/secret.png", "/../secret.png", f"file://{tmp_path}/secret.png"]
            )
        )
    )
    rows, metrics, _ = of_tree(tmp_path, {"index.html": page, "a.png": png(7)})
    assert set(rows) == {CAPTION} and metrics["pictures_not_saved"] == 4


def test_a_picture_in_the_page_is_read(tmp_path):
    uri = "data:image/png;base64," + base64.b64encode(png(8)).decode()
    rows, _, _ = of_tree(
        tmp_path, {"index.html": html(figure(uri) + figure("data:image/png;base64,AAAA", "A text of no picture"))}
    )
    assert set(rows) == {CAPTION} and rows[CAPTION]["address"] == "in the page"


# -- web archives


def test_a_page_and_a_picture_of_one_web_archive_meet(tmp_path):
    page = html(
        figure("../i/a.png#top") + figure("HTTPS://Example.org/i/b.jpg", "A boat below the old bridge"),
        '<base href="https://example.org/p/deep/">',
    )
    records = [
        ("https://example.org/p/i/a.png", "image/png", png(9)),
        ("https://example.org/page", "text/html; charset=utf-8", page),
        ("https://example.org/i/b.jpg", "image/jpeg", jpeg(10)),
        ("https://example.org/i/unused.png", "image/png", png(11)),
    ]
    (tmp_path / "a.warc.gz").write_bytes(warc(records))
    rows, metrics, _ = collected(tmp_path, {"source": "warc", "paths": ["a.warc.gz"], "license": "CC0-1.0"})
    assert {text: row["address"] for text, row in rows.items()} == {
        CAPTION: "../i/a.png#top",
        "A boat below the old bridge": "HTTPS://Example.org/i/b.jpg",
    }
    assert rows[CAPTION]["page"] == "https://example.org/page" and rows[CAPTION]["license"] == "CC0-1.0"
    assert (metrics["pictures"], metrics["pages"]) == (2, 1)


def test_an_objection_of_a_page_or_of_a_server_is_kept_to(tmp_path):
    records = [
        ("https://a.org/", "text/html", html(figure("a.png"), '<meta name="robots" content="noimageai">')),
        ("https://a.org/a.png", "image/png", png(12)),
        (
            "https://b.org/",
            "text/html",
            html(figure("b.png", "A second heron in the reeds") + figure("c.png", "A boat at the pier")),
        ),
        ("https://b.org/b.png", "image/png", png(13), "X-Robots-Tag: noai"),
        ("https://b.org/c.png", "image/png", png(14)),
    ]
    (tmp_path / "a.warc.gz").write_bytes(warc(records))
    source = {"source": "warc", "paths": ["a.warc.gz"]}
    rows, metrics, _ = collected(tmp_path, source)
    assert set(rows) == {"A boat at the pier"}
    assert metrics["left out: opted out"] == 2
    assert len(collected(tmp_path, source, opted_out="keep")[0]) == 3


# -- PDF


def test_a_caption_of_a_pdf_stands_under_or_above_its_picture(tmp_path):
    data = picture_pdf(
        [
            (72, 740, "Running text that stands above the picture and is no caption at all."),
            (72, 560, 200, 150, scene(15)),
            (72, 545, "Figure 1: A grey heron waits on a"),
            (72, 533, "wooden jetty for the ferry."),
            (72, 500, "The text goes on here, in a paragraph of its own."),
            (320, 560, 200, 150, jpeg(16)),
            (320, 545, "Text of another column, which is none."),
        ],
        [
            (72, 700, "Abb. 2.3 – Das Boot unter der Bruecke"),
            (72, 530, 200, 150, scene(17)),
            (320, 530, 200, 150, scene(18)),
        ],
    )
    (tmp_path / "a.pdf").write_bytes(data)
    rows, _, left_out = collected(tmp_path, {"source": "pdf", "paths": ["a.pdf"], "license": "CC-BY-4.0"})
    assert {text: (row["page"], row["address"], row["license"]) for text, row in rows.items()} == {
        "A grey heron waits on a wooden jetty for the ferry.": ("a.pdf", "page 1, picture 1", "CC-BY-4.0"),
        "Das Boot unter der Bruecke": ("a.pdf", "page 2, picture 1", "CC-BY-4.0"),
    }
    assert [line["reason"] for line in left_out] == ["no text"] * 2
    first = rows["A grey heron waits on a wooden jetty for the ferry."]
    assert read_picture(first["image"]["bytes"]).digest == read_picture(png(15)).digest


def test_the_alternative_text_of_a_tagged_pdf_is_read(tmp_path):
    page = [
        (72, 500, 200, 150, scene(19), "A ferry leaving the harbour"),
        (320, 500, 200, 150, scene(20), "A lighthouse at dusk"),
    ]
    (tmp_path / "a.pdf").write_bytes(picture_pdf(page, is_tagged=True))
    rows, _, _ = collected(tmp_path, {"source": "pdf", "paths": ["a.pdf"]})
    assert {text: row["text_from"] for text, row in rows.items()} == {
        "A ferry leaving the harbour": "alt",
        "A lighthouse at dusk": "alt",
    }


def test_printed_colours_are_converted_and_a_damaged_pdf_is_counted(tmp_path):
    printed = encoded(scene(21).convert("CMYK"), "JPEG", quality=95)
    data = picture_pdf([(72, 500, 200, 150, printed), (72, 480, "Figure 7. A printed heron of many colours")])
    write_tree(tmp_path, {"a.pdf": data, "b.pdf": data[: len(data) // 3], "c.pdf": b"%PDF-1.7 nothing"})
    rows, metrics, _ = collected(tmp_path, {"source": "pdf", "paths": ["a.pdf", "b.pdf", "c.pdf"]})
    assert set(rows) == {"A printed heron of many colours"} and metrics["unreadable_files"] >= 1


# -- filters


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("IMG_20240101_120000.jpg", "the name of a file"),
        ("DSC_0042", "the name of a file"),
        ("header-image_2-final", "the name of a file"),
        ("https://example.org/a.png", "the name of a file"),
        ("Company logo", "boilerplate"),
        ("User profile picture", "boilerplate"),
        ("A heron", "few words"),
        ("", "no text"),
        ("鳥", "few words"),
        ("word " * 300, "a long text"),
    ],
)
def test_texts_that_say_nothing_are_left_out(tmp_path, text, reason):
    files = {"index.html": html(figure("a.png", text) + figure("b.png")), "a.png": png(22), "b.png": png(23)}
    _, metrics, left_out = of_tree(tmp_path, files)
    assert [line["reason"] for line in left_out] == [reason] and metrics[f"left out: {reason}"] == 1


def test_a_text_that_says_more_is_taken_where_the_first_says_nothing(tmp_path):
    page = html(figure("a.png", "Photo", "A jay in an oak tree") + figure("b.png", "岸辺の灰色の鷺"))
    rows, _, _ = of_tree(tmp_path, {"index.html": page, "a.png": png(24), "b.png": png(25)})
    assert set(rows) == {"A jay in an oak tree", "岸辺の灰色の鷺"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(26, width=60, height=60), "small"),
        (png(26, width=700, height=100), "long"),
        (encoded(Image.new("RGB", (100, 100), (240, 240, 240))), "blank"),
        (png_header(60_000, 60_000), "unreadable: too many pixels, or too long"),
        (jpeg(26)[:900], "unreadable: damaged or cut off"),
        (b"GIF89a", "unreadable: no picture that is read"),
        (encoded(scene(26), "GIF", save_all=True, append_images=[scene(27)]), "unreadable: animated"),
        (encoded(scene(26).convert("CMYK"), "JPEG"), "unreadable: the colours of printing"),
    ],
)
def test_pictures_that_show_nothing_or_cannot_be_read_are_left_out(tmp_path, data, reason):
    files = {
        "index.html": html(figure("a.png", "A text about something else") + figure("b.png")),
        "a.png": data,
        "b.png": png(28),
    }
    rows, metrics, _ = of_tree(tmp_path, files)
    assert set(rows) == {CAPTION} and metrics[f"left out: {reason}"] == 1


def test_near_duplicates_languages_licences_and_repeated_texts(tmp_path):
    page = html(
        figure("a.png")
        + figure("copy.jpg", "The same heron as a small copy")
        + figure("b.png", "Ein grauer Reiher steht auf einem Steg am See")
        + figure("c.png", "A boat that waits below the old bridge")
    )
    files = {
        "index.html": page,
        "a.png": png(30),
        "copy.jpg": encoded(scene(30).resize((96, 72), Image.Resampling.LANCZOS), "JPEG", quality=60),
        "b.png": png(31),
        "c.png": png(32),
    }
    rows, _, left_out = of_tree(tmp_path, files, languages=["en"])
    assert set(rows) == {CAPTION, "A boat that waits below the old bridge"}
    assert {line["reason"]: line.get("of", "") for line in left_out} == {
        "another language": "",
        "a near-duplicate": "index.html: a.png",
    }
    assert len(of_tree(tmp_path, {}, near_duplicates=None)[0]) == 4
    with pytest.raises(SourceError, match="no picture of the sources is kept: 4 another licence; see "):
        of_tree(tmp_path, {}, licenses=["CC0-1.0"])
    same = {"index.html": html("".join(figure(f"{n}.png") for n in range(5))), **{f"{n}.png": png(40 + n) for n in range(5)}}
    _, metrics, _ = of_tree(tmp_path / "same", same)
    assert (metrics["pictures"], metrics["left out: a repeated text"]) == (3, 2)


def test_a_function_of_ones_own_leaves_pictures_out(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def square(row):\n    return 'not square' if row['width'] != row['height'] else None\n", encoding="utf-8"
    )
    files = {"index.html": html(figure("a.png") + figure("b.png", "A square boat on the lake")), "a.png": png(50)}
    files["b.png"] = png(51, width=100, height=100)
    rows, metrics, _ = of_tree(tmp_path, files, filters=["mine.py:square"])
    assert set(rows) == {"A square boat on the lake"} and metrics["left out: square: not square"] == 1
    (tmp_path / "mine2.py").write_text("def wrong(row):\n    return row['none']\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="filters: wrong failed: KeyError"):
        of_tree(tmp_path, {}, filters=["mine2.py:wrong"])
    with pytest.raises(ConfigError, match=r"must be file\.py:function"):
        PicturesConfig.parse({"sources": [{"source": "html", "paths": ["."]}], "filters": ["square"]})


def test_rows_hold_no_exif_and_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "taken at home"
    files = {"index.html": html(figure("a.jpg")), "a.jpg": encoded(scene(60), "JPEG", exif=exif, comment=b"secret")}
    rows, _, _ = of_tree(tmp_path, files, max_side=80)
    data = rows[CAPTION]["image"]["bytes"]
    assert (rows[CAPTION]["width"], rows[CAPTION]["height"]) == (60, 80)
    with Image.open(io.BytesIO(data)) as image:
        assert not image.getexif() and "comment" not in image.info
    assert b"home" not in data and b"secret" not in data


# -- near-duplicates


def picture(image, kind="PNG", **options):
    return read_picture(encoded(image, kind, **options))


def test_hashes_are_those_of_imagehash():
    imagehash = pytest.importorskip("imagehash")
    pytest.importorskip("scipy")
    for seed in range(40):
        image = scene(seed)
        shown = Picture.of(read_picture(png(seed)).rgb)
        assert f"{perceptual_hash(shown):016x}" == str(imagehash.phash(image))
        assert f"{difference_hash(shown):016x}" == str(imagehash.dhash(image))


def test_a_hash_is_the_signs_of_the_lowest_frequencies():
    # brightness that rises from left to right and nowhere else: all of its frequencies stand in the first row
    ramp = picture(Image.linear_gradient("L").rotate(90).convert("RGB"))
    assert difference_hash(ramp) in (0, (1 << 64) - 1)
    rows = perceptual_hash(ramp).to_bytes(8, "big")
    assert rows[0] & 0x80 and sum(row.bit_count() for row in rows[1:]) <= 32


def test_copies_are_found_and_other_pictures_are_not():
    earlier = EarlierPictures(6)
    for seed in range(80):
        hashes = hashes_of(picture(scene(seed)))
        assert earlier.nearest(hashes) is None, seed
        earlier.add(hashes)
    for seed in range(0, 80, 9):
        image = scene(seed)
        copies = [
            picture(image.resize((80, 60), Image.Resampling.LANCZOS)),
            picture(image.resize((320, 240), Image.Resampling.BICUBIC)),
            picture(image, "JPEG", quality=20),
            picture(image, "WEBP", quality=30),
            picture(ImageEnhance.Brightness(image).enhance(1.15)),
        ]
        assert [earlier.nearest(hashes_of(copy)) for copy in copies] == [seed] * len(copies), seed


def page_of_text(seed):
    draw, image = random.Random(seed), Image.new("RGB", (300, 400), "white")
    for y in range(20, 380, 10):
        words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(9)]
        ImageDraw.Draw(image).text((20, y), " ".join(words)[:44], "black")
    return image


def chart(seed):
    draw, image = random.Random(seed), Image.new("RGB", (200, 150), "white")
    bars = draw.randint(3, 9)
    for bar in range(bars):
        left, colour = 20 + bar * 165 // bars, tuple(draw.randint(0, 200) for _ in "RGB")
        ImageDraw.Draw(image).rectangle((left, 130 - draw.randint(10, 115), left + 165 // bars - 4, 130), fill=colour)
    return image


@pytest.mark.parametrize("make", [page_of_text, chart])
def test_pages_and_charts_on_white_are_told_apart(make):
    earlier, images = EarlierPictures(6), [make(seed) for seed in range(30)]
    for image in images:
        assert earlier.nearest(hashes_of(picture(image))) is None
        earlier.add(hashes_of(picture(image)))
    for number, image in enumerate(images):
        half = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
        assert (
            earlier.nearest(hashes_of(picture(half)))
            == earlier.nearest(hashes_of(picture(image, "JPEG", quality=40)))
            == number
        )


@pytest.mark.parametrize("distance", [0, 3, 4, 7, 8, 15])
def test_looking_up_finds_what_comparing_all_finds(distance):
    draw = random.Random(distance)
    earlier, values = EarlierPictures(distance), []
    for _ in range(400):
        value = draw.getrandbits(64)
        if values and draw.random() < 0.7:
            value = draw.choice(values) ^ sum(1 << bit for bit in draw.sample(range(64), draw.randint(0, distance + 2)))
        near = min(((value ^ one).bit_count() for one in values), default=64)
        found = earlier.nearest(Hashes(value, 0))
        assert (found is not None) is (near <= distance)
        assert found is None or (value ^ values[found]).bit_count() == near
        earlier.add(Hashes(value, 0))
        values.append(value)


# -- the stage


def test_rows_are_what_sft_reads_and_what_datasets_shows(tmp_path):
    of_tree(tmp_path, {"index.html": html(figure("a.png")), "a.png": png(70)})
    (conversation,) = read_conversations(tmp_path / "out" / "pictures")
    asked, said = (*conversation.answered.prompt, *conversation.answered.answer)
    assert [part.get("text") for part in asked["content"]] == [None, QUESTION] and said["content"] == CAPTION
    assert sources_in([asked])[0].startswith("data:image/png;base64,")
    metadata = pq.read_schema(tmp_path / "out" / "pictures" / "pictures-00000.parquet").metadata
    assert json.loads(metadata[b"huggingface"])["info"]["features"]["image"] == {"_type": "Image"}


def test_rows_are_the_same_twice(tmp_path):
    files = {"index.html": html("".join(figure(f"{n}.png", f"A boat of the number {n}") for n in range(9)))}
    files |= {f"{n}.png": png(80 + n) for n in range(9)}
    _, first, _ = of_tree(tmp_path, files)
    before = (tmp_path / "out" / "pictures" / "pictures-00000.parquet").read_bytes()
    _, second, _ = of_tree(tmp_path, {})
    assert first == second and (tmp_path / "out" / "pictures" / "pictures-00000.parquet").read_bytes() == before


def test_the_key_knows_pages_and_pictures(tmp_path):
    write_tree(tmp_path / "tree", {"index.html": html(figure("a.png")), "a.png": png(90)})
    spec, outside = STAGES["pictures"], Outside(tmp_path, tmp_path / "cache", fetch=False, progress=Silent())
    config = PicturesConfig.parse({"sources": [{"source": "html", "paths": ["tree"]}]})
    before = spec.fingerprint(config, outside)
    assert spec.fingerprint(config, outside) == before
    (tmp_path / "tree" / "a.png").write_bytes(png(91))
    assert spec.fingerprint(config, outside) != before


def test_mistakes_in_settings_are_one_line(tmp_path):
    html_source = {"source": "html", "paths": ["none"]}
    with pytest.raises(SourceError, match="none: no such file or folder"):
        collected(tmp_path, html_source)
    with pytest.raises(ConfigError, match="two of them need two names"):
        PicturesConfig.parse({"sources": [html_source, html_source]})
    with pytest.raises(ConfigError, match="base_url: the address of a tree"):
        PicturesConfig.parse({"sources": [{"source": "pdf", "paths": ["a.pdf"], "base_url": "https://a.org"}]})
