"""The section of the tokenize stage."""

from itertools import pairwise
from pathlib import Path

from bessemer.core.report import Cell, Heading, StageReport, Text, Tokens
from bessemer.tokenization.specs import UNKNOWN_NOTE, baselines_table, domains_table, report, summary_line
from tests.views.sample_run import sample_metrics


def test_the_tokenizer_stands_among_the_simplest_by_the_length_of_its_tokens():
    table = baselines_table(3.2, {"byte": 1.0, "word": 7.1, "character": None})
    assert [row[0] for row in table.rows] == [
        Cell("Every word a token", remark="baseline"), Cell("This tokenizer", strong=True),
        Cell("Every byte a token", remark="baseline"),
    ]  # fmt: skip


def test_figures_of_a_sample_that_is_mostly_unknown_are_in_brackets_and_have_no_bar():
    table, note = domains_table(sample_metrics()["tokenize"]["by_domain"])
    rows = {row[0]: row for row in table.rows}
    assert rows["Thai"][1] == Cell("(1.00)", share=0.0) and rows["Thai"][-1] == Cell("not exactly", warning=True)
    assert rows["English"][-1] == "exactly" and rows["Thai"][-2] == "40.0 %"
    assert note == Text(UNKNOWN_NOTE)


def test_every_list_of_tokens_has_its_heading():
    stage = StageReport(name="tokenize", kind="tokenize", metrics=sample_metrics()["tokenize"], folder=Path())
    parts = report(stage).parts
    headings = [before.text for before, part in pairwise(parts) if isinstance(part, Tokens)]
    assert headings == [
        "A text in tokens", "The longest tokens", "From the first token learned to the last", "Control tokens",
    ]  # fmt: skip
    assert Heading("By kind of text") in parts


def test_a_line_says_the_vocabulary_and_the_length_of_its_tokens():
    assert summary_line(sample_metrics()["tokenize"]) == "4,096 tokens, 3.31 bytes each"
