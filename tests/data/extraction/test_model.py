"""The ensembles of trees: fitted, written, read, and the same every time."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from bessemer.core.errors import ArtefactError
from bessemer.data.extraction.extract import main_text
from bessemer.data.extraction.features import features
from bessemer.data.extraction.model import CONTEXT, FEATURES, from_json, judge, probabilities, trained
from bessemer.data.extraction.parsing import parse
from tests.data.extraction.test_extract import ARTICLE, SENTENCES

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from extraction_training import agreed, by_phrases, by_text, fit, fit_trees, mark, to_json

MAIN = {f"{sentence} {sentence[:60]}." for sentence in SENTENCES} | {"How steel became cheap"}


@pytest.fixture(scope="module")
def fitted():
    pages = [mark(ARTICLE.replace("post", name).encode(), MAIN, set()) for name in ("post", "text", "story", "entry")]
    return fit(pages, folds=2, trees=10, depth=3)


def test_trees_learn_a_rule_of_two_features():
    random = np.random.default_rng(0)
    rows = random.normal(size=(2000, 5)).astype(np.float32)
    targets = ((rows[:, 1] > 0.3) & (rows[:, 3] < 0.5)).astype(float)
    trees = fit_trees(rows[:1500], targets[:1500], np.ones(1500), trees=40, depth=3)
    right = (probabilities(rows[1500:], trees) > 0.5) == targets[1500:]
    assert right.mean() > 0.97


def test_a_fitted_model_finds_the_text_it_was_shown(fitted):
    text = main_text(ARTICLE.encode(), fitted)
    assert all(sentence in text for sentence in SENTENCES) and "cookies" not in text


def test_a_model_written_and_read_answers_the_same(fitted):
    data = np.frombuffer(ARTICLE.encode(), np.uint8)
    page = parse(data)
    rows, counts = features(data, page)
    once = from_json(to_json(fitted))
    twice = from_json(to_json(once))
    assert (judge(rows, counts, page, once) == judge(rows, counts, page, twice)).all()


def test_the_models_features_are_those_the_code_has():
    model = trained()
    assert model.first.features.max() < len(FEATURES)
    assert model.second.features.max() < len(FEATURES) + len(CONTEXT)


def test_features_are_finite_and_as_many_as_their_names():
    data = np.frombuffer(ARTICLE.encode(), np.uint8)
    rows, _ = features(data, parse(data))
    assert rows.shape[1] == len(FEATURES) and np.isfinite(rows).all()


def features_of(source: str, name: str) -> list[float]:
    data = np.frombuffer(source.encode(), np.uint8)
    rows, _ = features(data, parse(data))
    return rows[:, FEATURES.index(name)].tolist()


def test_some_features_by_hand():
    source = "<title>One two</title><nav><a href=x>Menu</a></nav><div class=entryContent><h1>One</h1><p>A b, c. D 12 e!</div>"
    assert features_of(source, "link_density") == [1.0, 0.0, 0.0]
    assert features_of(source, "title_share") == [0.0, 1.0, 0.0]
    assert np.allclose(features_of(source, "sentence_ends"), np.log1p([0, 0, 2]))
    assert np.allclose(features_of(source, "digit_share"), [0, 0, 2 / 15])
    assert features_of(source, "in_nav") == [0.0, 40.0, 40.0]
    assert features_of(source, "role_body") == [40.0, 1.0, 1.0]
    assert features_of(source, "closed") == [0.0, 0.0, 2.0]


def test_the_shape_of_a_block_by_hand():
    source = "<p><b>The ore</b> of <em>1856</em> @ works<img src=x><p>Photo: Bell/Reuters<iframe></iframe><p>Comments | 3"
    assert np.allclose(features_of(source, "function_share"), [2 / 5, 0, 0])
    assert np.allclose(features_of(source, "symbol_share"), [1 / 23, 1 / 19, 1 / 12])
    assert np.allclose(features_of(source, "strong_share"), [7 / 23, 0, 0])
    assert np.allclose(features_of(source, "slanted_share"), [4 / 23, 0, 0])
    assert features_of(source, "media_before") == [0.0, 1.0, 1.0] and features_of(source, "media_after") == [1.0, 1.0, 0.0]
    assert features_of(source, "first_meta") == [0.0, 1.0, 0.0] and features_of(source, "first_comment") == [0.0, 0.0, 1.0]


def test_blocks_of_one_signature_are_a_group():
    source = (
        "<div class=related><a href=x>Six</a></div><div class=related>Ten bridges</div><article><p>Twelve bolts</p></article>"
    )
    assert np.allclose(features_of(source, "group_blocks"), np.log1p([2, 2, 1]))
    assert np.allclose(features_of(source, "group_characters"), np.log1p([7, 7, 12]))
    assert np.allclose(features_of(source, "group_links"), [3 / 14, 3 / 14, 0])
    assert np.allclose(features_of(source, "group_share"), [14 / 26, 14 / 26, 12 / 26])
    prose = f"<article><p>{SENTENCES[0]}</article><article><p>{SENTENCES[0]}</article><p>x"
    assert features_of(prose, "article_share") == [0.5, 0.5, -1.0]


def test_signposts_and_the_kind_of_page_by_hand():
    source = "<body class='single forum-topic'><p>A long story about the furnace, and what its masters knew of fire."
    source += "<h3>Comments (3)</h3><p>Nice story.<p>x"
    assert features_of(source, "since_comment") == [99.0, 99.0, 0.0, 1.0]
    assert features_of(source, "until_comment") == [0.0, 99.0, 99.0, 99.0]
    assert features_of(source, "page_is_forum") == [1.0] * 4 and features_of(source, "page_is_product") == [0.0] * 4


def test_where_two_extractors_agree_a_page_teaches_and_where_they_differ_it_does_not():
    sentences = [2 * sentence for sentence in SENTENCES]
    page = "".join(f"<p>{block}" for block in [*sentences, "In the footer both are silent."]).encode()
    first = "\n".join(sentences)
    found = agreed(page, first, "\n".join([*sentences[:-1], "else"]), weight=0.4)
    assert found is not None and found.weight == 0.4
    assert found.targets.tolist() == [1, 1, 1, 1, 1, -1, 0]
    assert agreed(page, first, "nothing of it", weight=0.4) is None


def test_phrases_mark_the_blocks_that_hold_them():
    page = f"<h1>Ore and coke</h1><p>{SENTENCES[0]} Ore and coke.<p>Share this<p>Ore to share this<p>x".encode()
    found = by_phrases(page, ["Ore and coke", "Ore to"], ["Share this", "share this"])
    assert found.targets.tolist() == [-1, 1, 0, -1, -1]
    assert found.sure is not None and found.sure.tolist() == [False, True, True, False, False]
    marked = by_phrases(page, ["Ore and coke"], [], mark(page, {"x"}, set()))
    assert marked.targets.tolist() == [0, 1, 0, 0, 1]


def test_the_text_of_an_article_marks_its_blocks():
    body = "\n".join(2 * sentence for sentence in SENTENCES)
    page = "".join(f"<p>{2 * sentence}" for sentence in SENTENCES) + f"<p>Read on<div>Now: {2 * SENTENCES[0]}</div>"
    found = by_text(page.encode(), body, weight=0.7)
    assert found.targets.tolist() == [*[1] * len(SENTENCES), 0, -1] and found.weight == 0.7
    table = f"<p>{2 * SENTENCES[0]}<table><tr><td>Iron</table><p>{2 * SENTENCES[1]}<table><tr><td>Home</table>"
    assert by_text(table.encode(), "\n".join(2 * sentence for sentence in SENTENCES[:2]), weight=0.7).targets.tolist() == [
        1,
        -1,
        1,
        0,
    ]
    assert by_text(page.encode(), body * 2 + "else" * 999, weight=0.7).targets.tolist()[-2:] == [-1, -1]


def test_a_named_block_counts_at_least_what_a_phrase_does():
    pages = [mark(ARTICLE.replace("post", name).encode(), MAIN, set()) for name in ("post", "text")]
    named = [page._replace(sure=page.targets == 1, targets=np.where(page.targets == 1, 0, page.targets)) for page in pages[:1]]
    assert to_json(fit([*pages, *named], folds=2, trees=3, depth=2)) != to_json(
        fit([*pages, named[0]._replace(sure=None)], folds=2, trees=3, depth=2)
    )


def test_a_model_of_other_features_is_refused(fitted):
    text = to_json(fitted)
    for other in (text.replace('"link_density"', '"link_share"'), text.replace('"version":', '"version":1')):
        with pytest.raises(ArtefactError, match="other features"):
            from_json(other)
