"""The main text of pages: the parts that belong, the parts that do not, and what happens where there is little of either."""

from __future__ import annotations

import pytest

from bessemer.core.errors import ConfigError
from bessemer.data.extraction.extract import extract

SENTENCES = [
    "The converter stands twelve metres high, and when it tips the whole hall turns red for a quarter of an hour.",
    "In the first years, as the records of the works tell, no two heats came out alike, and half of them were thrown away.",
    "What changed this was not the vessel, but a chemist who weighed every sample, wrote down the weight, and kept the books.",
    "He found that phosphorus made the rails brittle, which the masters had blamed on the weather, the coal and each other.",
    "After that the ore came from another mine, the lining was changed to dolomite, and the rails held for thirty years.",
    "The books still lie in the cellar of the museum, where they may be read on Thursdays if one asks in time.",
]
MENU = "".join(
    f"<li><a href=/{name.lower()}>{name}</a>" for name in ("Home", "News", "Sports", "Weather", "Contact", "Imprint")
)
PARAGRAPHS = "".join(f"<p>{sentence} {sentence[:60]}.</p>" for sentence in SENTENCES)
ARTICLE = f"""<html><head><title>How steel became cheap | The Daily Furnace</title></head><body>
<div class="cookie-banner"><p>We use cookies to improve our service. By using this site you agree.</p><button>OK</button></div>
<header><div class=logo>The Daily Furnace</div><nav><ul>{MENU}</ul></nav></header>
<main><article><h1>How steel became cheap</h1><div class="byline">By Ada Smith, 12 March 2019</div>
<div class="entry-content">{PARAGRAPHS}
<div class="share-buttons"><a href=#>Share on Facebook</a> <a href=#>Tweet</a></div></div></article>
<section class="related-posts"><h3>You might also like</h3><ul><li><a href=/a>Ten bridges that fell down</a>
<li><a href=/b>The last blast furnace of the valley</a></ul></section>
<div id="comments"><h3>2 comments</h3><div class=comment><p>Great article, my grandfather worked there!</p></div></div></main>
<aside class="sidebar"><h4>Most read</h4><a href=/c>Weather for the weekend</a></aside>
<footer><p>© 2019 The Daily Furnace. All rights reserved. <a href=/p>Privacy policy</a></p></footer></body></html>"""


def test_every_paragraph_of_an_article_is_kept_in_order():
    text = extract(ARTICLE)
    places = [text.index(sentence) for sentence in SENTENCES]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "boilerplate",
    [
        "cookies",
        "Weather",
        "Sports",
        "Share on",
        "Tweet",
        "also like",
        "bridges",
        "grandfather",
        "Most read",
        "rights",
        "Privacy",
    ],
)
def test_what_surrounds_an_article_is_left_out(boilerplate):
    assert boilerplate not in extract(ARTICLE)


def test_the_title_stands_once_at_the_top():
    text = extract(ARTICLE)
    assert text.startswith("# How steel became cheap\n\n") and text.count("How steel became cheap") == 1


def test_a_page_without_a_heading_gets_its_title_without_the_sites_name():
    text = extract(f"<title>How steel became cheap | The Daily Furnace</title><body><div class=content>{PARAGRAPHS}</div>")
    assert text.startswith("# How steel became cheap\n\nThe converter")


def test_answers_in_a_forum_are_main_text():
    posts = "".join(
        f"<div class='post'><div class='username'><a href=/u{n}>user{n}</a></div><div class='postbody'><p>{sentence} "
        f"{SENTENCES[n - 1]}</p></div></div>"
        for n, sentence in enumerate(SENTENCES)
    )
    text = extract(f"<title>Why do my rails break? - Forum</title><body class=forum><ul class=menu>{MENU}</ul>"
                   f"<h1>Why do my rails break?</h1><div class='thread'>{posts}</div>")  # fmt: skip
    assert all(sentence in text for sentence in SENTENCES) and "Weather" not in text


def test_headings_lists_tables_and_code_of_documentation_are_kept():
    page = f"""<title>Using the furnace — furnace 1.0 documentation</title><div class=related><ul>{MENU}</ul></div>
    <div class=document><div class=body role=main><h1>Using the furnace<a class=headerlink href=#x>¶</a></h1>
    <p>{SENTENCES[0]} {SENTENCES[1]}</p><h2>Heating</h2><p>{SENTENCES[2]}</p>
    <div class=highlight><pre>furnace = Furnace()\nfurnace.heat(1538)</pre></div><p>{SENTENCES[3]} {SENTENCES[4]}</p>
    <ul><li><p>Open the door slowly, and stand aside.</p></li><li><p>Close it when the flame turns white.</p></li></ul>
    <table><tr><th>Metal</th><th>Melts at</th></tr><tr><td>Iron</td><td>1538 °C</td></tr></table>
    <p>{SENTENCES[5]}</p></div></div>
    <div class=footer>© Copyright 2019, the authors. Created using Sphinx 1.8.</div>"""
    text = extract(page)
    assert "# Using the furnace\n" in text and "## Heating\n" in text
    assert "```\nfurnace = Furnace()\nfurnace.heat(1538)\n```" in text
    assert "- Open the door slowly, and stand aside.\n- Close it" in text
    assert "Metal | Melts at\nIron | 1538 °C" in text
    assert "Sphinx" not in text and "Weather" not in text


@pytest.mark.parametrize(
    "page", ["", "   ", "<html></html>", "<script>x</script>", "<p></p>", "<!-- x", b"", b"\xff\xfe", "<title>x"]
)
def test_a_page_without_text_gives_no_text(page):
    assert extract(page) == ""


def test_a_page_of_one_short_sentence_gives_it():
    assert extract("<body><p>We are closed on Monday.</p></body>") == "We are closed on Monday."


def test_text_that_only_search_engines_get_is_taken_where_there_is_no_other():
    body = " ".join(SENTENCES)
    page = f'<title>App</title><div id=root></div><script type="application/ld+json">{{"articleBody": "{body}"}}</script>'
    assert extract(page) == body


def test_text_that_waits_for_a_script_is_taken_where_there_is_no_other():
    assert SENTENCES[0] in extract(f"<title>x</title><div style='display:none'>{PARAGRAPHS}</div>")


def test_the_same_page_gives_the_same_text_as_bytes_and_as_characters():
    assert extract(ARTICLE) == extract(ARTICLE.encode()) == extract(ARTICLE.encode("utf-16"))


def test_an_unknown_extractor_is_refused():
    with pytest.raises(ConfigError, match="no extractor 'magic'"):
        extract("<p>x", extractor="magic")
