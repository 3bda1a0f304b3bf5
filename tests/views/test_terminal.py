"""What `bessemer show` prints."""

from __future__ import annotations

import dataclasses
import io
import re

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bessemer.core.report import Answer, Answers, ReportData
from bessemer.views import terminal
from bessemer.views.elements import tokens_text
from bessemer.views.parts_terminal import show_parts
from tests.views.sample_run import sample_metrics, sample_run


def printed(renderable) -> str:
    console = Console(file=io.StringIO(), width=140, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def test_run_shows_its_stages_scores_and_next_steps():
    text = printed(terminal.show_run(sample_run()))
    for expected in (
        "quickstart",
        "pretrain",
        "4 min 28 s",
        "1.503",
        "Witten–Bell 5-gram",
        "memorised",
        "bessemer chat",
    ):
        assert expected in text


def test_bare_run_shows_its_name():
    assert printed(terminal.show_run(ReportData(name="bare"))) == "bare\n"


def test_tokenizer_and_model_show_their_figures():
    metrics = sample_metrics()
    assert "20.3 MB" in printed(terminal.show_tokenizer(metrics["tokenize"]))
    assert "1,311,104" in printed(terminal.show_model(metrics["model"]))


def test_tokenizers_stand_beside_each_other_and_the_better_figure_is_bold():
    metrics = sample_metrics()["tokenize"]
    other = {
        **metrics,
        "by_domain": {name: {**of_one, "bytes_per_token": 9.99} for name, of_one in metrics["by_domain"].items()},
    }
    console = Console(file=io.StringIO(), width=140, force_terminal=True, color_system="standard")
    console.print(terminal.show_tokenizers({"one": metrics, "other": other}))
    text = console.file.getvalue()
    assert re.search(r"\x1b\[1m *9\.99\x1b", text)
    assert re.search(r"\x1b\[2m *\(9\.99\)\x1b", text)  # Thai is mostly unknown: no figure to win with
    assert "one: Thai" in text


def test_text_from_outside_commands_neither_rich_nor_the_terminal():
    hostile = "[bold]not markup[/bold] \x1b[2J\x1b]0;title\x07"
    run = dataclasses.replace(sample_run(), name=hostile, sentences=[hostile])
    answer = Answer(question=hostile, expected=hostile, answer=hostile, model=hostile)
    for renderable in (terminal.show_run(run), *show_parts([Answers([answer])]), tokens_text([hostile])):
        text = printed(renderable)
        assert "[bold]not markup[/bold]" in text
        assert "\x1b" not in text and "\x07" not in text


@given(st.lists(st.text(alphabet=st.characters(categories=["L", "N", "P"]))))
def test_tokens_in_a_terminal_joined_are_the_text(pieces):
    assert tokens_text(pieces).plain == "".join(
        piece if piece.isprintable() else tokens_text([piece]).plain for piece in pieces
    )
