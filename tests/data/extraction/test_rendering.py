"""What becomes of HTML when every block of it is kept: exact text out."""

from __future__ import annotations

import html

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.data.extraction.block_text import ENTITIES, decode_entities
from bessemer.data.extraction.parsing import parse
from bessemer.data.extraction.render import render


def everything(source: str) -> str:
    """The text of a page with all its blocks."""
    data = np.frombuffer(source.encode(), np.uint8)
    page = parse(data)
    blocks = len(page.block_elements)
    return render(data, page, np.ones(blocks, np.bool_), np.full(blocks, 20))


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("<p>One <b>two</b><i>three</i>, <a href=x>four</a>.", "One twothree, four."),
        ("<div>a<span>b</span> <em>c</em>\n\n d</div>", "ab c d"),
        ("<p>first<p>second<div>third</div>fourth", "first\n\nsecond\n\nthird\n\nfourth"),
        ("one<br>two<br>\n<br>three<br>", "one\ntwo\n\nthree"),
        ("<h1>A</h1><h3>B</h3>c", "# A\n\n### B\n\nc"),
        ("<h2>two<br>lines</h2>", "## two lines"),
        ("<ul><li>a<li>b<ul><li>c</ul>after<li>d</ul>", "- a\n- b\n  - c\n  after\n- d"),
        ("<ol><li>a<li>b</ol><p>x", "1. a\n2. b\n\nx"),
        ("<ul><li><p>one<p>two</ul>", "- one\n  two"),
        ("<ul><li></li><li> <b></b>x</li></ul>", "- x"),
        ("<dl><dt>t<dd>d<dt>u<dd>e<p>f</dl>", "t\nd\n\nu\ne\n\nf"),
        ("<table><tr><th>A<th>B<th>C<tr><td>1<td><td>3<tr><td><td>2</table>", "A | B | C\n1 |  | 3\n| 2"),
        ("<table><caption>K</caption><tr><td>a</td><td><p>b<p>c</td></tr></table>d", "K\n\na | b c\n\nd"),
        ("<table><tr><td><h2>A layout</h2><p>long<td>side</table>", "## A layout\n\nlong\n\nside"),
        ("<table><tr><td><table><tr><td>1<td>2</table><td>x</table>", "1 | 2\n\nx"),
        ("<pre>\n  def f():\n\treturn 1 &lt; 2\n\n</pre>", "```\n  def f():\n\treturn 1 < 2\n```"),
        ("<p>x<pre><code>a = 1\nb = <b>2</b></code></pre>y", "x\n\n```\na = 1\nb = 2\n```\n\ny"),
        ("<pre><div>a</div><div>b</div></pre>", "```\na\nb\n```"),
        ("<pre>a\r\nb</pre>", "```\na\nb\n```"),
        ("<details><summary>More</summary>body</details>", "More\n\nbody"),
        ("<figure><img src=x><figcaption>A caption</figcaption></figure>", "A caption"),
        ("<blockquote>said</blockquote><address>here</address>", "said\n\nhere"),
        ("<p>a&nbsp;&nbsp;b\u3000c\u2009d", "a b c d"),
        (
            "<p>hy\u00adphen, zero\u200bwidth, joiner \u0645\u06cc\u200c\u062e",
            "hyphen, zerowidth, joiner \u0645\u06cc\u200c\u062e",
        ),
        ("<p>don’t „touch“ — these…", "don’t „touch“ — these…"),
        ("<p>1 < 2 & 3 > 2 <3", "1 < 2 & 3 > 2 <3"),
    ],
)
def test_html_becomes_exactly_this_text(source, text):
    assert everything(source) == text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("<script>var a = '<p>no</p>';</script><style>p{}</style><p>yes", "yes"),
        ("<!-- <p>no --><p>yes<!-->too<!--->and", "yestooand"),
        ("<select><option>no</select><button>no</button><svg><text>no</text></svg>yes", "yes"),
        (
            "<p style='color:red; display : none'>no</p><p hidden>no</p><p aria-hidden=true>no</p><p class='sr-only'>no</p>yes",
            "yes",
        ),
        ("<p style='VISIBILITY:Hidden!important'>no</p><p style=';display:none'>no</p>yes", "yes"),
        ("<p style='overflow-y:hidden;font-family:none'>yes", "yes"),
        ("<p style='backface-visibility:hidden;-webkit-backface-visibility: hidden; display: nonesuch'>yes", "yes"),
        ("<h1>Title<a class=headerlink href=#t>¶</a></h1>", "# Title"),
        ("<p class=hidden-xs>wide screens only", "wide screens only"),
        ("<noscript>no</noscript><template>no</template>yes", "yes"),
        ("<textarea><p>no</textarea>yes", "yes"),
        ("<p title='a > b' data-x=\"<p>\">yes", "yes"),
        ("<title>no</title><p>yes", "yes"),
    ],
)
def test_what_a_reader_does_not_see_is_no_text(source, text):
    assert everything(source) == text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("<b><p>a</b>b</p>c", "ab\n\nc"),
        ("<td>stray<p>t</td>u", "stray\n\nt\n\nu"),
        ("</div></p>a</ul>b", "a\n\nb"),
        ("<h2>a</h3>b", "## a\n\nb"),
        ("<ul><li>a<ul><li>b</li></li><li>c</ul></ul>d", "- a\n  - b\n  - c\n\nd"),
        ("<table><tr><td><div>a</td><td>b</div></table>c", "a | b\n\nc"),
        ("<p>a<table><tr><td>b</p>c</table>", "a\n\nb c"),
        ("<P>A</P><DIV CLASS=X>B", "A\n\nB"),
        ("<p>a<!doctype html><?php x ?>b</ >c<![CDATA[ no ]]>d", "abcd"),
        ("<p>a<", "a<"),
        ("<p>a</", "a"),
        ("<p>a<p class='never closed", "a"),
        ("<unknown-tag>a</unknown-tag>b", "ab"),
    ],
)
def test_broken_markup_is_read_as_browsers_do(source, text):
    assert everything(source) == text


ENTITY = st.sampled_from(
    ["&amp", "&amp;", "&notit;", "&#x80;", "&#0;", "&#xD800;", "&#1114112;", "&nGt;", "&", "&#", "&#x", "&copy2"]
)


@given(st.lists(ENTITY | st.text("a;&#x1 ", max_size=4)).map("".join))
def test_entities_are_decoded_as_python_does(text):
    data = np.frombuffer(text.encode(), np.uint8)
    out = np.empty(2 * len(data) + 64, np.uint8)
    size = decode_entities(data, 0, len(data), out, 0, ENTITIES)
    # Python drops control characters such as &#1; here and this does so later, for text without entities too
    ours = out[:size].tobytes().decode().translate(dict.fromkeys([*range(1, 9), 11, *range(14, 32), 127]))
    assert ours == html.unescape(text).translate(dict.fromkeys([*range(1, 9), 11, *range(14, 32), 127]))
