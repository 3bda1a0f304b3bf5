"""Metrics in words and units."""

import pytest

from bessemer.core.metrics import duration, label, percent, short_count, short_number, shown, size


@pytest.mark.parametrize(("seconds", "text"), [(0.42, "0.4 s"), (48, "48 s"), (372, "6 min 12 s"), (11100, "3 h 05 min")])
def test_durations_read_as_a_person_says_them(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(812, "812 B"), (3_400_000, "3.4 MB"), (250_000_000, "250 MB")])
def test_sizes_read_as_a_person_says_them(count, text):
    assert size(count) == text


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


@pytest.mark.parametrize(("value", "text"), [(0.65, "0.65"), (12.34, "12.3"), (100_000, "100,000"), (None, "")])
def test_scores_and_limits_are_short(value, text):
    assert short_number(value) == text
