"""Tables, tokens, examples: what is shown is what is, and text stays text."""

from __future__ import annotations

import html
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.views import evaluation, examples, tables
from bessemer.views.figures import label, percent, short_count, shown
from bessemer.views.funnel import funnel, reasons
from bessemer.views.tokens import tokens_html
from tests.views.sample_run import HOSTILE, data_stage


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", page))


@given(st.lists(st.text(alphabet=st.characters(categories=["L", "M", "N", "P", "S"], include_characters=" \n"))))
def test_tokens_joined_are_the_text(pieces):
    assert text_of(tokens_html(pieces)) == "".join(pieces).replace("\n", "↵\n")


@given(st.lists(st.text()))
def test_every_character_of_a_token_is_seen(pieces):
    assert all(character.isprintable() or character in "\n\t" for character in text_of(tokens_html(pieces)))
    assert text_of(tokens_html(["a\x1b[2J\u202e\tb\x7f\n"])) == "a␛[2J⟨U+202E⟩→\tb␡↵\n"


def test_neighbouring_tokens_differ_in_colour():
    colours = re.findall(r'class="(t\d)"', tokens_html(["a"] * 11))
    assert len(colours) == 11
    assert all(one != other for one, other in pairwise(colours))


@given(st.text(), st.text(), st.text())
def test_documents_and_their_reasons_are_text(text, source, reason):
    page = examples.documents([{"text": text, "source": source, "reason": reason}])
    assert set(re.findall(r"</?([a-z]+)", page)) <= {"article", "header", "span", "pre"}
    assert text in text_of(page)


def test_bars_of_the_funnel_are_shares_of_the_first_stage():
    stages = {"collect": data_stage(100, 100, 1000, 1000), "clean": data_stage(100, 75, 1000, 600, short=25)}
    page = funnel(stages)
    assert re.findall(r"width:([\d.]+)%", page) == ["100.00", "60.00", "40.00"]
    assert "25 (25.0 %)" in page


def test_reasons_stand_in_order_of_frequency_with_their_examples():
    metrics = data_stage(100, 60, 1000, 600, rare=5, frequent=35)
    page = reasons(metrics["by_reason"], metrics["examples"]["dropped"])
    assert page.index("Frequent") < page.index("Rare")
    assert text_of(page).count(HOSTILE) == 4


def test_comparison_says_whether_its_interval_excludes_zero():
    one = {"metric": "rouge_l_held_out", "a": "sft", "b": "base", "difference": 0.2}
    assert "clear: the interval" in evaluation.comparisons_table([one | {"interval": [0.1, 0.3]}])
    assert "no clear difference" in evaluation.comparisons_table([one | {"interval": [-0.1, 0.3]}])


def test_best_model_or_baseline_comes_first():
    page = evaluation.bits_per_byte_table({"bits_per_byte": {"mine": 1.7}, "baselines": {"xz": 1.9, "witten_bell_5gram": 1.5}})
    positions = [page.index(name) for name in ("Witten–Bell 5-gram", "mine", "xz −9")]
    assert positions == sorted(positions)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("training_bytes", 20_300_000, "20.3 MB"),
        ("kv_bytes_per_token", 2048, "2.0 kB"),
        ("bytes_per_token", 3.3123, "3.312"),
        ("unused_bytes", 61, "61"),
        ("training_seconds", 75.2, "1 min 15 s"),
        ("tokens_per_second", 16480.2, "16,480"),
        ("embedding_share", 0.3999, "40.0 %"),
        ("exact_match_held_in", 0.965, "96.5 %"),
        ("flops_per_token", 9_400_000, "9.4M"),
        ("parameters", 1_311_104, "1,311,104"),
        ("learning_rate", 0.005, "0.005"),
        ("compile", True, "yes"),
        ("rouge_l_held_out", None, "–"),
        ("loss", float("nan"), "not finite"),
    ],
)
def test_value_is_shown_in_the_unit_of_its_name(name, value, expected):
    assert shown(name, value) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kv_bytes_per_token", "Key-value bytes per token"),
        ("rouge_l_held_in", "ROUGE-L held in (memorised)"),
        ("training_seconds", "Training time"),
        ("vocab_size", "Vocabulary size"),
    ],
)
def test_name_is_shown_in_words(name, expected):
    assert label(name) == expected


def test_counts_are_short():
    assert [short_count(count) for count in (812, 1_311_104, 999_999, 2.5e9)] == ["812", "1.31M", "1M", "2.5B"]
    assert [percent(share) for share in (0, 0.0004, 0.081, 1)] == ["0 %", "0.04 %", "8.1 %", "100 %"]


def test_nested_values_and_hashes_are_no_facts():
    page = tables.facts({"steps": 3, "layers": [1], "tokenizer_hash": "abc"})
    assert page.count("<dt>") == 1
