from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bessemer.core.errors import ConfigError
from bessemer.data.config import SelectConfig
from bessemer.data.filters.registry import HAZARD_CATEGORIES, filter_plugin
from bessemer.data.filters.urls import Blocklist, read_blocklist, urls
from bessemer.data.filters.word_list_scores import _variety, hazards, model_written, spam, surface, toxicity, words_scorer
from bessemer.data.plugins import LANGUAGE_SCORES, USUAL_LANGUAGE_SCORE, arrow_types, limits_of
from bessemer.data.text.texts import Texts
from bessemer.data.word_lists.term_matcher import Category, TermMatcher

SCORERS = [toxicity, spam, model_written, hazards, urls]
PROSE = "The furnace has to be heated with care, and the masters know ways to tell by the flame when the carbon is gone. "


def scores(function, *texts):
    return {name: column.to_pylist() for name, column in function(Texts.of(list(texts))).items()}


def columns_of(function):
    return filter_plugin(function.__name__).columns


@pytest.mark.parametrize("function", SCORERS)
def test_columns_are_as_promised_each_with_its_meaning_and_limits(function):
    found = function(Texts.of(["a text", ""]))
    assert {name: column.type for name, column in found.items()} == arrow_types(columns_of(function))
    assert all(column.description for column in columns_of(function).values())
    assert limits_of(columns_of(function))


@pytest.mark.parametrize("function", SCORERS)
@settings(deadline=None, max_examples=15)
@given(texts=st.lists(st.text(max_size=60) | st.sampled_from(["free money now", "you idiot", "http://x.porn/a"]), max_size=4))
def test_any_text_scores_between_0_and_1_alone_as_in_a_batch(function, texts):
    together = scores(function, *texts)
    for name, kind in arrow_types(columns_of(function)).items():
        if kind == pa.float64():
            assert all(0 <= score <= 1 for score in together[name])
        assert together[name] == [scores(function, text)[name][0] for text in texts]


def with_another_processors_logarithms(monkeypatch, measure):
    """What `measure` gives where the library's `exp` and `log` err by a unit in the last place, as others do."""
    with monkeypatch.context() as patch:
        for name in ("exp", "log", "log2", "log1p"):
            exact = getattr(np, name)
            patch.setattr(np, name, lambda values, exact=exact: np.nextafter(exact(values), np.inf))
        return measure()


@pytest.mark.parametrize("function", SCORERS)
def test_scores_are_the_same_on_processors_whose_logarithms_differ(function, monkeypatch):
    texts = [
        PROSE,
        "FREE money!!! Click http://a.com now, 50% off $ " * 3,
        "As an AI language model, I cannot. " * 9,
        "build a bomb",
    ]
    here = scores(function, *texts)
    assert with_another_processors_logarithms(monkeypatch, lambda: scores(function, *texts)) == here


@pytest.mark.parametrize("function", SCORERS)
def test_an_empty_text_and_plain_prose_stay_within_the_limits(function):
    found = scores(function, "", PROSE)
    for name, (lowest, highest) in limits_of(columns_of(function)).items():
        assert lowest is None
        assert all(score < highest / 2 for score in found[name])


def test_toxicity_is_the_weight_of_hits_in_a_hundred_words():
    matcher = TermMatcher([Category("insults", terms={"oaf": 1.4}), Category("profanity", terms={"drat": 9.0})])

    def score(text):
        return toxicity(Texts.of([text]), matcher)["toxicity_score"][0].as_py()

    assert score("oaf " + "word " * 99) == pytest.approx(0.5)  # 1.4 in a hundred words is one half
    assert score("oaf " + "word " * 199) == pytest.approx(0.7 / (0.7 + 1.4))
    assert score("oaf") == pytest.approx(3.5 / (3.5 + 1.4))  # a short text counts as forty words
    assert score("drat " * 100) < 0.5  # swearing alone attacks nobody


def test_toxicity_knows_attacks_from_text_about_them():
    attacks = scores(toxicity, "you are a stupid loser, go kill yourself", "what a worthless piece of shit you are")
    about = scores(toxicity, "The law punishes hate speech and threats of violence. " * 3, "Homo sapiens; the cock crowed.")
    assert min(attacks["toxicity_score"]) > 0.5 > max(about["toxicity_score"])
    assert scores(toxicity, "hardcore sex, big tits, blowjob")["toxicity_nsfw"][0] > 0.5


def test_spam_is_known_by_phrases_links_and_shouting():
    lure = "CONGRATULATIONS! You have won a free cruise. Click here to claim your prize now: http://win.biz $$$"
    assert scores(spam, lure, PROSE)["spam_score"][0] > 0.9
    quiet = scores(spam, lure, lure.lower().replace("http://win.biz $$$", ""))["spam_score"]
    assert quiet[0] > quiet[1]


def test_a_model_is_known_by_what_it_says_and_by_going_in_circles():
    said = scores(model_written, "As an AI language model, I cannot have opinions.", "and then and then " * 40, PROSE)
    assert said["model_written_score"][0] > 0.5
    assert said["model_written_score"][1] > 0.9
    assert said["model_written_repetition"][1] > 0.9
    assert said["model_written_score"][2] == 0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["a", "B", "b", "é", "\n"]), max_size=40) | st.lists(st.sampled_from("ab"), max_size=40))
@example(["a"] * 12)
@example([*"abcde"] * 2 + [*"fabcde"])
def test_repetition_and_entropy_are_what_counting_gives(parts):
    text = " ".join(parts)
    words = "".join(c.lower() if c.isascii() else c for c in text).split()
    seen, covered = set(), set()
    for at in range(len(words) - 4):
        sequence = tuple(words[at : at + 5])
        if sequence in seen:
            covered |= set(range(at, at + 5))
        seen.add(sequence)
    shares = np.array([words.count(word) for word in dict.fromkeys(words)]) / max(len(words), 1)
    repetition, entropy = _variety(Texts.of([text]).data, Texts.of([text]).offsets)
    assert repetition[0] == pytest.approx(len(covered) / len(words) if len(words) > 1 else 0)
    assert entropy[0] == pytest.approx(-(shares * np.log2(shares)).sum() if len(words) > 1 else 0)


def test_the_surface_of_a_text_counted_by_hand():
    found = surface(Texts.of(["BUY now: https://a.b (www.c.d) xhttp://no, $5 50% £3 €9 USA IBM ok", ""]))
    assert [int(count[0]) for count in found] == [12, 33, 9, 4, 2]
    assert [int(count[1]) for count in found] == [0] * 5


def test_hazards_find_who_asks_for_harm_and_pass_who_reports_it():
    asks = scores(hazards, "Tell me how to make a pipe bomb and how to get away with murder.", "how do i commit suicide")
    reports = "A court in Leeds found the man guilty of murder. He had planned a terrorist attack, the judge said. " * 3
    assert asks["hazards_violent_crimes"][0] > 0.6
    assert asks["hazards_self_harm"][1] > 0.6
    assert all(score[0] < 0.6 for score in scores(hazards, reports).values())


def test_hazard_categories_are_those_of_the_list():
    from bessemer.data.word_lists.term_matcher import packaged_term_matcher

    assert packaged_term_matcher("hazards").names == tuple(HAZARD_CATEGORIES)


@pytest.mark.parametrize(
    ("address", "score", "category"),
    [
        ("https://www.pornhub.com/view?x=1", 1.0, "adult"),
        ("http://de.xhamster.com:8080", 1.0, "adult"),
        ("HTTPS://user:pw@Bet365.COM./odds", 1.0, "gambling"),
        ("//bit.ly/3x", 1.0, "trackers"),
        ("bit.ly/3x", 1.0, "trackers"),
        ("https://notbit.ly/", 0.0, ""),
        ("https://bit.ly.example.org/", 0.0, ""),
        ("https://example.org/?next=https://bit.ly/1", 0.0, ""),
        ("https://example.org/free-porno-films", 1.0, "adult"),
        ("https://example.org/sex-education", 0.5, "adult"),
        ("https://example.org/hot-sexy-cams", 1.0, "adult"),
        ("https://sussex.ac.uk/middlesex/essex", 0.0, ""),
        ("https://example.org/poker/rules", 0.5, "gambling"),
        ("", 0.0, ""),
        ("http://", 0.0, ""),
        ("not an address", 0.0, ""),
    ],
)
def test_addresses_are_judged_by_domain_and_words(address, score, category):
    found = scores(urls, address)
    assert (found["urls_score"][0], found["urls_category"][0]) == (score, category)


def test_own_blocklists_are_text_folders_or_yaml(tmp_path):
    (tmp_path / "mine.txt").write_text("# ours\nBad.org\nworse.org # really\n", encoding="utf-8")
    (tmp_path / "lists/ads").mkdir(parents=True)
    (tmp_path / "lists/ads/domains").write_text("ads.org\n", encoding="utf-8")
    (tmp_path / "own.yaml").write_text("ore:\n  domains: [ore.org]\n  hard: [slag]\n", encoding="utf-8")
    for name, address, category in [
        ("mine.txt", "http://x.bad.org/", "mine"),
        ("lists", "http://ads.org", "ads"),
        ("own.yaml", "http://a.org/slag", "ore"),
    ]:
        found = urls(Texts.of([address, "http://good.org"]), read_blocklist(tmp_path / name))
        assert found["urls_category"].to_pylist() == [category, ""]
    for name in ("absent.txt", "lists/ads"):
        with pytest.raises(ConfigError):
            read_blocklist(tmp_path / name)


def test_of_several_categories_each_has_its_own_words_and_the_first_its_domain(tmp_path):
    (tmp_path / "own.yml").write_text(
        "ore:\n  meaning: of ore\n  domains: [.Ore.org., both.org]\n  hard: [slag]\n  soft: [rust]\n"
        "tin:\n  domains: [tin.org, both.org]\n  soft: [foil, can]\n"
        "none:\n  domains:\n",
        encoding="utf-8",
    )
    blocklist = read_blocklist(tmp_path / "own.yml")
    addresses = [
        "http://ORE.org",
        "x.tin.org/slag",
        "both.org",
        "a.org/slag",
        "a.org/rust",
        "a.org/foil/can",
        "a.org",
        "tin.or",
    ]
    found = urls(Texts.of(addresses), blocklist)
    assert found["urls_category"].to_pylist() == ["ore", "tin", "ore", "ore", "ore", "tin", "", ""]
    assert found["urls_score"].to_pylist() == [1, 1, 1, 1, 0.5, 1, 0, 0]
    empty = urls(Texts.of(["http://ore.org"]), Blocklist.of({}))
    assert (empty["urls_score"].to_pylist(), empty["urls_category"].to_pylist()) == ([0], [""])


@pytest.mark.parametrize("text", ["[ore]", "ore: [ore.org]", "ore:\n  domain: [ore.org]", "ore: {"])
def test_yaml_of_another_shape_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "own.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"a blocklist maps categories to|this is not YAML"):
        read_blocklist(tmp_path / "own.yaml")


def test_own_words_give_columns_by_category(tmp_path):
    (tmp_path / "list.yaml").write_text(
        "steel works:\n  meaning: of steel\n  terms: {iron: 1, slag: 0.5}\nother: [tin]\n", encoding="utf-8"
    )
    scorer = words_scorer(tmp_path / "list.yaml")
    found = scorer.function(Texts.of(["Iron, iron and slag", ""]))
    assert {name: column.to_pylist() for name, column in found.items()} == {
        "words_steel_works_hits": [2.5, 0],
        "words_steel_works_share": [2.5 / 4, 0],
        "words_other_hits": [0, 0],
        "words_other_share": [0, 0],
    }
    assert {name: column.type for name, column in found.items()} == scorer.columns
    assert scorer.descriptions["words_steel_works_hits"] == "hits: of steel"
    (tmp_path / "bad.yaml").write_text("a b: [x]\na-b: [y]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="name of its own"):
        words_scorer(tmp_path / "bad.yaml")


def test_a_language_that_the_model_is_unsure_of_needs_less():
    limits = SelectConfig(languages=["en", "ga"]).language_limits()
    assert (limits.usual, limits.lowest) == (USUAL_LANGUAGE_SCORE, {"ga": LANGUAGE_SCORES["ga"]})
    assert LANGUAGE_SCORES["ga"] < USUAL_LANGUAGE_SCORE
    assert all(0 < score < 1 for score in LANGUAGE_SCORES.values())
