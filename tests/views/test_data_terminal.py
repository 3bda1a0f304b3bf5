"""A corpus in a terminal."""

from __future__ import annotations

import pytest

from bessemer.core.report import Histogram
from bessemer.data.report import histograms
from bessemer.views.data_terminal import show_corpus, spark
from tests.views.sample_run import sample_metrics, thresholds
from tests.views.test_terminal import printed


def counts(**documents: int) -> dict:
    return {name: {"documents": count, "bytes": 10 * count} for name, count in documents.items()}


def histogram(title: str) -> Histogram:
    return next(one for one in histograms(thresholds()) if one.title == title)


def data_stages() -> dict[str, dict]:
    return {name: metrics for name, metrics in sample_metrics().items() if "documents_out" in metrics}


def test_a_line_of_signs_is_dim_outside_the_limit_and_as_high_as_the_counts():
    text = spark(histogram("gopher: words"), width=4)
    assert text.plain == "█▆┊▃▄"
    assert [str(span.style) for span in text.spans] == ["dim", "dim", "#d9622b", "#d9622b"]


def test_every_part_of_a_corpus_is_printed():
    text = printed(show_corpus(data_stages(), examples=1))
    for expected in (
        "6,814 (11.7 %)",
        "Gopher words",
        "at least 2",
        "Copies found by minhash",
        "Personal data emails",
        "By domain",
        "No text",
        "Dropped: duplicate 0.93 > 0.8",
        "shortest path",
        "ab" * 16,
    ):
        assert expected in text


def test_examples_are_as_many_as_asked_for():
    assert "shortest path" not in printed(show_corpus(data_stages(), examples=0))


@pytest.mark.parametrize("hostile", ["[bold]x[/bold]", "\x1b[2J", "a\u202eb"])
def test_texts_from_outside_command_nothing(hostile):
    stages = {
        "select": data_stages()["select"]
        | {
            "by_source": counts(**{hostile: 3}),
            "by_reason": counts(**{hostile: 3}),
            "problems": {hostile: {hostile: 1}},
            "examples": {"kept": [{"id": "ab", "source": hostile, "text": hostile}], "dropped": {}},
        }
    }
    text = printed(show_corpus(stages, examples=2))
    assert "\x1b" not in text and "\u202e" not in text
    assert hostile in text or not hostile.startswith("[")
