from __future__ import annotations

import bz2
import gzip
import json
import lzma
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.data.sources.mediawiki import wikitext_to_text
from bessemer.data.sources.source import Tally
from tests.cases import slow
from tests.data.sources.makers import assert_resumes, documents, json_lines, mbox, mediawiki, opened, posts

LEFT_OUT = ("file", "datei", "category", "kategorie")


@pytest.mark.parametrize(
    ("wikitext", "expected"),
    [
        ("'''Steel''' is an [[alloy]] of [[iron|Iron]].", "Steel is an alloy of Iron."),
        ("{{Infobox|a={{b}}}}\nText<ref>note</ref>.<ref name=x /> More<!-- no -->.", "Text. More."),
        ("== A ==\nb\n\n=== C ===\nd\n== References ==\n{{reflist}}", "## A\n\nb\n\n### C\n\nd"),
        ("== A ==\n=== B ===\ntext", "## A\n\n### B\n\ntext"),
        ("[[File:a.jpg|thumb|A [[caption]]]]Text[[Kategorie:X]]", "Text"),
        ("* a\n* b\n# c", "- a\n- b\n1. c"),
        ("The energy is <math>E = mc^2</math>.", "The energy is $E = mc^2$."),
        ("<syntaxhighlight lang=py>\nx = 1\n</syntaxhighlight>", "```\nx = 1\n```"),
        ("{| class=wikitable\n|-\n| a\n|}\nText", "Text"),
        ("[https://e.org the site] and https://e.org/x", "the site and https://e.org/x"),
        ("Steel ({{lang|x}}, ) is&nbsp;hard__NOTOC__", "Steel is\xa0hard"),
        ("a<br />b", "a\nb"),
    ],
)
def test_wikitext_becomes_text(wikitext, expected):
    assert wikitext_to_text(wikitext, LEFT_OUT) == expected


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(["{{", "}}", "[[", "]]", "|", "<ref>", "</ref>", "''", "=", "\n", "a", "{|", "|}", "*"]), max_size=40
    )
)
def test_wikitext_of_any_kind_is_read(pieces):
    wikitext_to_text("".join(pieces), LEFT_OUT)


PAGES = [
    ("Stahl &amp; Eisen", 0, "", "'''Stahl''' ist hart. [[Datei:x.jpg|mini]]"),
    ("Weg", 0, '<redirect title="Stahl" />', "#WEITERLEITUNG [[Stahl]]"),
    ("Diskussion:Stahl", 1, "", "Was meint ihr?"),
    ("Leer", 0, "", "{{nichts}}"),
    ("Ende", 0, "", "Das Ende."),
]


def test_a_dumps_articles_are_documents_with_address_and_licence(tmp_path):
    (tmp_path / "dewiki-pages-articles.xml").write_bytes(mediawiki(PAGES))
    tally = Tally()
    first, last = documents("mediawiki", tmp_path, tally)
    assert (first.locator, first.heading, first.text) == ("dewiki/1", "Stahl & Eisen", "Stahl ist hart.")
    assert first.url == "https://de.wikipedia.org/wiki/Stahl_%26_Eisen"
    assert (first.license, first.metadata["revision"], last.text) == ("CC-BY-SA-4.0", "1001", "Das Ende.")
    assert tally.counts == {"redirects": 1, "pages_of_other_namespaces": 1, "pages_without_text": 1}


def test_other_namespaces_may_be_asked_for(tmp_path):
    (tmp_path / "a.xml").write_bytes(mediawiki(PAGES))
    assert [document.heading for document in documents("mediawiki", tmp_path, namespaces=[1])] == ["Diskussion:Stahl"]


def test_a_damaged_page_costs_itself_and_a_cut_off_dump_its_end(tmp_path):
    content = mediawiki([(f"P{n}", 0, "", f"Text {n}.") for n in range(6)])
    hurt = content.replace(b"<ns>0</ns>\n    <id>3</id>", b"<ns>0<ns>\n    <id>3</id>")
    (tmp_path / "a.xml.gz").write_bytes(gzip.compress(hurt)[:-30])
    tally = Tally()
    read = [document.text for document in documents("mediawiki", tmp_path, tally)]
    assert read == [f"Text {n}." for n in range(6) if n != 2][: len(read)]
    assert len(read) >= 3
    assert tally.counts["damaged_records"] == 1
    assert tally.counts["damaged_files"] == 1


@pytest.mark.parametrize("suffix", [".bz2", slow(".gz"), slow(".xz")])
def test_a_dump_of_many_streams_is_entered_at_the_stream_of_a_page(tmp_path, suffix):
    """As Wikimedia's multistream dumps: some pages a stream, and here one page that lies in two."""
    compress = {".bz2": bz2.compress, ".gz": gzip.compress, ".xz": lzma.compress}[suffix]
    content = mediawiki([(f"P{n}", 0, "", f"Text {n}.") for n in range(9)])
    cuts = [0, *(content.index(f"<title>P{n}<".encode()) - 12 for n in (0, 3)), content.index(b"Text 6."), len(content)]
    streams = [compress(content[first:last]) for first, last in pairwise(cuts)]
    (tmp_path / f"a.xml{suffix}").write_bytes(b"".join(streams))
    source = opened("mediawiki", tmp_path)
    everything = assert_resumes(source)
    assert [document.text for _, _, document in everything] == [f"Text {n}." for n in range(9)]
    unit, position, _ = everything[4]
    head = streams[0] + streams[1][:-9] + b"\0" * 9  # what stands before the stream of page 4 cannot be read any more
    (tmp_path / f"a.xml{suffix}").write_bytes(head + b"".join(streams[2:]))
    rest = [document.text for _, document in source.read(unit, position, Tally())]
    assert rest == [f"Text {n}." for n in range(5, 9)]


def test_a_page_over_the_limit_is_set_aside(tmp_path):
    (tmp_path / "a.xml").write_bytes(mediawiki([("A", 0, "", "x " * 5000), ("B", 0, "", "y")]))
    tally = Tally()
    assert [document.heading for document in documents("mediawiki", tmp_path, tally, max_document_bytes=2000)] == ["B"]
    assert tally.counts == {"too_large": 1}


ROWS = [
    {
        "Id": 1,
        "PostTypeId": 1,
        "Score": 5,
        "Title": "How hot?",
        "Body": '<p>How <b>hot</b> is &amp; "it"?</p>',
        "Tags": "<steel><heat>",
    },
    {"Id": 2, "PostTypeId": 2, "ParentId": 1, "Score": 3, "Body": "<p>Warm.</p>"},
    {"Id": 3, "PostTypeId": 1, "Score": -2, "Title": "Why?", "Body": "<p>Why > how?</p>", "ContentLicense": "CC BY-SA 4.0"},
    {"Id": 4, "PostTypeId": 2, "ParentId": 1, "Score": 9, "Body": "<pre>x = 1</pre>"},
    {"Id": 5, "PostTypeId": 4, "Body": "<p>A wiki of tags.</p>"},
    {"Id": 6, "PostTypeId": 2, "ParentId": 1, "Score": -1, "Body": "<p>Cold.</p>"},
]


@pytest.mark.parametrize("packed", [False, True])
def test_a_question_stands_with_its_answers_the_best_first(tmp_path, packed):
    folder = tmp_path / "steel.stackexchange.com"
    folder.mkdir()
    name, content = ("Posts.xml.gz", gzip.compress(posts(ROWS))) if packed else ("Posts.xml", posts(ROWS))
    (folder / name).write_bytes(content)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "Posts.xml").write_bytes(posts([ROWS[2]]))
    read = {document.locator: document for document in documents("stack_exchange", tmp_path)}
    first = read["steel.stackexchange.com/1"]
    assert first.heading == "How hot?"
    assert first.text == 'How hot is & "it"?\n\n---\n\n```\nx = 1\n```\n\n---\n\nWarm.\n\n---\n\nCold.'
    assert first.metadata == {"site": "steel.stackexchange.com", "score": "5", "answers": "3", "tags": "steel heat"}
    assert read["steel.stackexchange.com/3"].license == "CC-BY-SA-4.0"
    assert set(read) == {"steel.stackexchange.com/1", "steel.stackexchange.com/3", "other/3"}


def test_questions_below_a_score_are_left_out_and_counted(tmp_path):
    (tmp_path / "Posts.xml").write_bytes(posts(ROWS))
    tally = Tally()
    assert len(documents("stack_exchange", tmp_path, tally, min_score=0)) == 1
    assert tally.counts == {"questions_below_the_score": 1}


TOPIC = {
    "id": 7,
    "title": "Heat",
    "tags": ["a", {"name": "b"}],
    "post_stream": {
        "posts": [
            {"post_number": 2, "cooked": "<p>Second <em>post</em>.</p>"},
            {"post_number": 1, "raw": "First *post*.", "cooked": "<p>no</p>"},
            {"post_number": 3, "raw": "hidden", "hidden": True},
            {"post_number": 4, "raw": "closed", "action_code": "closed.enabled"},
        ]
    },
}
LOOSE = [{"topic_id": 7, "post_number": 2, "raw": "Second *post*."}, {"topic_id": 7, "post_number": 1, "raw": "First *post*."}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("7.json", json.dumps(TOPIC).encode()),
        ("all.json", json.dumps([TOPIC]).encode()),
        ("all.jsonl", json_lines([TOPIC])),
        ("topics.json", json.dumps({"topics": [TOPIC]}).encode()),
    ],
)
def test_a_topic_is_a_document_in_whichever_form_it_is_exported(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    (document,) = documents("discourse", tmp_path, base_url="https://f.org")
    assert (document.group, document.heading) == ("topic:7", "Heat")
    assert document.text == "First *post*.\n\n---\n\nSecond post."
    assert (document.url, document.metadata["tags"]) == ("https://f.org/t/7", "a b")


def test_loose_posts_are_gathered_by_their_topic(tmp_path):
    (tmp_path / "posts.json").write_text(json.dumps(LOOSE), encoding="utf-8")
    (document,) = documents("discourse", tmp_path)
    assert document.text == "First *post*.\n\n---\n\nSecond *post*."


@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b'{"a": 1}', b"[" * 100_000, b'"text"', b"null"])
def test_what_is_no_forum_is_counted(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    tally = Tally()
    assert documents("discourse", tmp_path, tally) == []
    assert tally.counts["bad_records"] >= 1


MAILS = [
    {
        "Subject": "Grüße aus dem Werk",
        "Message-ID": "<1@e>",
        "Date": "Mon, 5 Jan 2026 10:00:00 +0000",
        "text": "Hello.\n\nFrom here on.\n",
    },
    {
        "Subject": "Re: x",
        "Message-ID": "<2@e>",
        "References": "<1@e> <9@e>",
        "text": "plain\n-- \nsignature\n",
        "html": "<p>rich</p>",
    },
    {"Subject": "keep out", "Message-ID": "<3@e>", "X-No-Archive": "Yes", "text": "secret\n"},
]


def test_each_message_is_a_document_and_a_thread_a_group(tmp_path):
    (tmp_path / "list.mbox").write_bytes(mbox(MAILS))
    read = [document for _, _, document in assert_resumes(opened("mbox", tmp_path))]
    assert [document.text for document in read] == ["Hello.\n\nFrom here on.", "plain", "secret"]
    assert read[0].heading == "Grüße aus dem Werk"
    assert [document.locator for document in read] == ["<1@e>", "<2@e>", "<3@e>"]
    assert read[0].group == read[1].group == "<1@e>"
    assert read[2].metadata["opt_out"] == "no-archive"


@pytest.mark.parametrize(
    ("charset", "body", "text"),
    [
        ("charset=us-ascii", b"Gr\xc3\xbc\xc3\x9fe", "Grüße"),
        ("charset=iso-8859-1", b"Gr\xfc\xdfe \x93so\x94", "Grüße “so”"),
        ("charset=UTF-7", b"Gr+APwA3w-e", "Grüße"),
        ("charset=iso-2022-jp", "鋼".encode("iso2022_jp"), "鋼"),
        ("charset=nonsense", b"Gr\xc3\xbc\xc3\x9fe\xff", "Grüße\ufffd"),
        ("charset*=koi8-r''koi8-r", "сталь".encode("koi8-r"), "сталь"),
        ("charset=punycode", b"Mnchen-3ya", "Mnchen-3ya"),
        ("charset*=punycode''utf-8", b"x\xff", "x\ufffd"),
    ],
)
def test_a_message_is_read_in_the_encoding_that_it_states_where_that_is_one_of_texts(tmp_path, charset, body, text):
    head = f"From a Mon Jan  5 10:00:00 2026\nSubject: x\nContent-Type: text/plain; {charset}\n\n".encode()
    (tmp_path / "a.mbox").write_bytes(head + body + b"\n")
    assert documents("mbox", tmp_path)[0].text == text


def test_a_message_that_has_only_html_is_read_from_it(tmp_path):
    message = b"From a Mon Jan  5 10:00:00 2026\nSubject: x\nContent-Type: text/html; charset=latin-1\n\n<p>Gr\xfc\xdfe</p>\n"
    (tmp_path / "a.mbox").write_bytes(message)
    assert documents("mbox", tmp_path)[0].text == "Grüße"


def test_a_message_without_end_is_read_over(tmp_path):
    begin = b"From a Mon Jan  5 10:00:00 2026\nSubject: s\n\n"
    (tmp_path / "a.mbox").write_bytes(begin + b"one\n\n" + begin + b"line\n" * 100_000 + b"\n" + begin + b"two\n")
    tally = Tally()
    assert [document.text for document in documents("mbox", tmp_path, tally, max_document_bytes=10_000)] == ["one", "two"]
    assert tally.counts == {"too_large": 1}


@pytest.mark.parametrize("depth", [50, 2000])
def test_parts_within_parts_without_end_are_no_danger(tmp_path, depth):
    lines = [b"From a Mon Jan  5 10:00:00 2026", b"Subject: x"]
    for level in range(depth):
        lines += [b'Content-Type: multipart/mixed; boundary="%d"' % level, b"", b"--%d" % level]
    (tmp_path / "a.mbox").write_bytes(b"\n".join([*lines, b"", b"text", b""]))
    tally = Tally()
    documents("mbox", tmp_path, tally)


CHATS = [
    (
        {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]},
        "User: Hi?\n\nAssistant: Hello.",
    ),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "User: a\n\nAssistant: b"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image"}]}]}, "User: see"),
    ({"dialog": ["one", "two"]}, "one\n\ntwo"),
    ({"messages": [{"author": {"username": "ann"}, "content": "hey"}]}, "Ann: hey"),
    ({"messages": [{"role": "system", "content": "Be."}, {"role": "tool", "content": None}]}, "System: Be."),
]


@pytest.mark.parametrize(("record", "expected"), CHATS)
def test_a_conversation_is_read_in_the_usual_forms(tmp_path, record, expected):
    (tmp_path / "a.jsonl").write_bytes(json_lines([record | {"id": 5, "topic": "t"}]))
    (document,) = documents("chats", tmp_path)
    assert (document.text, document.group, document.metadata["topic"]) == (expected, "id:5", "t")


def test_the_list_of_messages_may_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        json_lines([{"turns_x": [{"role": "user", "content": "a"}], "messages": [{"content": "b"}]}])
    )
    assert documents("chats", tmp_path, messages="turns_x")[0].text == "User: a"


def test_a_record_without_a_conversation_is_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"text": "a"}, {"messages": []}, {"messages": [{"role": "user"}]}]))
    tally = Tally()
    assert documents("chats", tmp_path, tally) == []
    assert tally.counts == {"bad_records": 3}
