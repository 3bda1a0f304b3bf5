"""The ensembles of trees: fitted, written, read, and the same every time."""

from __future__ import annotations

import numpy as np
import pytest

from bessemer.core.errors import ArtefactError
from bessemer.data.extraction.extract import main_text
from bessemer.data.extraction.features import FEATURES, features
from bessemer.data.extraction.model import CONTEXT, from_json, judge, probabilities, to_json, trained
from bessemer.data.extraction.parsing import parse
from bessemer.data.extraction.training import agreed, fit, fit_trees, mark
from tests.data.extraction.test_extract import ARTICLE, SENTENCES

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
    assert (judge(rows, counts[:, 0], page, once) == judge(rows, counts[:, 0], page, twice)).all()


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


def test_a_model_of_other_features_is_refused(fitted):
    with pytest.raises(ArtefactError, match="other features"):
        from_json(to_json(fitted).replace('"link_density"', '"link_share"'))
