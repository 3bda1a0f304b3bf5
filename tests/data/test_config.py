from __future__ import annotations

import subprocess
import sys

import pytest

from bessemer.core.errors import ConfigError
from bessemer.data.config import CleanConfig, CollectConfig, DeduplicateConfig, SelectConfig
from bessemer.data.plugins import Languages
from bessemer.data.sources.registry import source_name


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (CollectConfig, ["wheel"], "unknown source 'wheel'; did you mean 'wheels'?"),
        (CollectConfig, [{"lock": "x"}], "each source needs a `source`"),
        (CollectConfig, [{"source": "wheels", "lok": "x"}], "unknown key 'lok'; did you mean 'lock'?"),
        (CollectConfig, [{"source": "files"}], "'paths' must be given"),
        (CollectConfig, [], "sources"),
        (CollectConfig, {"sources": ["wheels"], "validation_share": 0.9}, "validation_share"),
        (
            CollectConfig,
            [{"source": "files", "paths": "a"}, {"source": "files", "paths": "b"}],
            "two sources are called 'files'",
        ),
        (CleanConfig, {"score": ["gopher_qualty"]}, "unknown score 'gopher_qualty'; did you mean 'gopher_quality'?"),
        (CleanConfig, {"edit": ["repare"]}, "unknown edit 'repare'; did you mean 'repair'?"),
        (DeduplicateConfig, ["exakt"], "unknown method 'exakt'; did you mean 'exact'?"),
        (SelectConfig, "gophr", "unknown preset 'gophr'; did you mean 'gopher'?"),
        (
            CleanConfig,
            {"edit": ["pii"], "personal_data": {"kinds": ["mail"]}},
            "personal_data.kinds.0: input should be 'email'",
        ),
        (CleanConfig, {"edit": ["pii"], "secrets": {"masks": {"keys": ""}}}, "there is no kind 'keys'; did you mean 'key'?"),
        (CleanConfig, {"edit": ["repair"], "secrets": {"kinds": ["key"]}}, "settings of an edit that `edit` does not name"),
        (SelectConfig, {"min_language_score": 2}, "min_language_score"),
        (SelectConfig, {"language_scores": {"en": 2}}, "en: 2 is not between 0 and 1"),
        (SelectConfig, {"language_scores": {"de": 0.5}}, "'de' is not among the languages kept: en"),
    ],
)
def test_a_mistake_is_answered_with_what_is_meant(config, values, message):
    with pytest.raises(ConfigError) as error:
        config.parse(values, "stage")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_short_forms_mean_the_long_ones():
    assert CollectConfig.parse(["python_docs"]) == CollectConfig.parse({"sources": [{"source": "python_docs"}]})
    assert DeduplicateConfig.parse(["exact"]) == DeduplicateConfig()
    assert SelectConfig.parse("gopher") == SelectConfig()
    assert CollectConfig.parse([{"source": "files", "paths": "a"}]).sources[0].paths == ["a"]


def test_a_users_function_is_a_source_and_a_score():
    assert source_name(CollectConfig.parse(["mine.py:books"]).sources[0]) == "books"
    assert CleanConfig.parse({"score": ["mine.py:brief"]}).score == ["mine.py:brief"]


def test_thresholds_replace_only_the_bound_that_they_state():
    config = SelectConfig.parse(
        {"thresholds": {"gopher_words": {"min": 20}, "gopher_stop_words": {"min": None}, "mine": {"max": 1}}}
    )
    limits = config.limits()
    assert limits["gopher_words"] == (20, 100_000)
    assert limits["gopher_stop_words"] == (None, None)
    assert limits["mine"] == (None, 1)
    assert limits["gopher_mean_word_length"] == (3, 10)


@pytest.mark.parametrize(
    ("settings", "limits"),
    [
        ({}, Languages(("en",), 0.65)),
        ({"languages": ["en", "nl"]}, Languages(("en", "nl"), 0.65, {"nl": 0.9})),
        ({"languages": ["en", "nl"], "min_language_score": 0.7}, Languages(("en", "nl"), 0.7)),
        ({"languages": ["en", "nl"], "language_scores": {"nl": 0.5}}, Languages(("en", "nl"), 0.65, {"nl": 0.5})),
        ({"languages": []}, Languages()),
        ({"languages": [], "min_language_score": 0.3}, Languages((), 0.3)),
        ({"languages": [], "language_scores": {"de": 0.5}}, Languages((), None, {"de": 0.5})),
        ({"thresholds": {"language_score": {"min": 0.2}}}, Languages(("en",))),
        ({"thresholds": {"language_score": {"max": 0.9}}}, Languages(("en",), 0.65)),
    ],
)
def test_a_language_is_limited_by_itself_then_by_what_is_stated_for_all_then_by_what_was_measured(settings, limits):
    assert SelectConfig.parse({"keep": "all"} | settings).language_limits() == limits


def test_where_files_lie_is_not_part_of_a_stages_key():
    here = CollectConfig.parse([{"source": "files", "paths": ["/here/a.txt"]}])
    there = CollectConfig.parse([{"source": "files", "paths": ["/there/a.txt"]}])
    assert here.output_settings() == there.output_settings()


def test_settings_load_without_the_heavy_libraries():
    code = "import sys, bessemer.data.config; print([m for m in ('pyarrow', 'daft', 'fasttext', 'numpy') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True).stdout.strip() == "[]"
    )


def test_pii_is_personal_data_and_secrets():
    assert CleanConfig.parse({"edit": ["repair", "pii"]}).edit == ["repair", "personal_data", "secrets"]
