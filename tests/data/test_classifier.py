from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.core.errors import ArtefactError, ConfigError, SourceError
from bessemer.data.filters.classifier import (
    Features,
    classifier_columns,
    classifier_meaning,
    classifier_scores,
    features_of,
    load_classifier,
    sigmoid,
    summed,
)
from bessemer.data.filters.classifier_training import ClassifierConfig, area_under_curve, fit, read_examples, train_classifier
from bessemer.data.text.texts import Texts

SMALL = ClassifierConfig(bits=12, passes=4)
MASK = (1 << 64) - 1


def sentences(words, count, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(3, 12))) + f" {number}" for number in range(count)]


GOOD = sentences(["iron", "steel", "furnace", "the", "of", "melt"], 200, 1)
BAD = sentences(["click", "buy", "now", "the", "of", "free"], 200, 2)


@pytest.fixture
def folders(tmp_path):
    for name, texts in (("good", GOOD), ("bad", BAD)):
        (tmp_path / name).mkdir()
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / name / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "out").mkdir()
    return tmp_path


def buckets_in_plain_python(text, features):
    """The same features, with Python's own integers."""
    begin, prime, spread, pieces = 0xCBF29CE484222325, 0x100000001B3, 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93
    data = bytes(b | 32 if 65 <= b <= 90 else b for b in text.encode())
    words, found = [], []
    for in_word, run in itertools.groupby(data, lambda b: b >= 128 or chr(b).isalnum()):
        run = bytes(run)
        words += [run] if in_word else [bytes([b]) for b in run if b > 32]
    hashes = []
    for word in words:
        value = begin
        for byte in word:
            value = ((value ^ byte) * prime) & MASK
        hashes.append(value ^ value >> 32)
    for at, value in enumerate(hashes):
        sequence = value
        for order in range(min(features.word_order, at + 1)):
            if order:
                sequence = ((sequence ^ (hashes[at - order] * pieces & MASK)) * spread) & MASK
                sequence ^= sequence >> 31
            found.append((sequence * spread & MASK) >> (64 - features.bits))
        marked = b"\1" + words[at] + b"\1"
        for start in range(len(marked)) if features.longest else ():
            for length in range(features.shortest, features.longest + 1):
                if start + length <= len(marked):
                    value = pieces
                    for byte in marked[start : start + length]:
                        value = ((value ^ byte) * prime) & MASK
                    found.append(((value ^ value >> 32) * spread & MASK) >> (64 - features.bits))
    return found


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.text(alphabet="aBc1é .,\n的\x00", max_size=20), max_size=3),
    st.sampled_from([Features(1, 3, 0, 8), Features(2, 3, 0, 18), Features(3, 2, 4, 10), Features(2, 1, 2, 20)]),
)
def test_features_are_the_hashes_of_words_sequences_and_pieces(texts, features):
    buckets, starts = features_of(Texts.of(texts), features)
    expected = [buckets_in_plain_python(text, features) for text in texts]
    assert [buckets[a:b].tolist() for a, b in itertools.pairwise(starts)] == expected
    weights = np.random.default_rng(0).normal(size=1 << features.bits).astype(np.float32)
    sums, sizes = summed(Texts.of(texts), features, weights)
    assert sizes.tolist() == [len(found) for found in expected]
    assert sums == pytest.approx([weights[found].astype(float).sum() for found in expected], abs=1e-4)


def test_two_folders_make_a_classifier_that_tells_them_apart(folders):
    measured = train_classifier(folders / "good", folders / "bad", folders / "out", ClassifierConfig(name="Steel!"))
    assert measured["held_out"]["auc"] > 0.99
    classifier = load_classifier(folders / "out")
    assert classifier_columns(classifier) == {"classifier_steel": pa.float64()}
    assert set(classifier_meaning(classifier)) == {"classifier_steel"}
    found = classifier_scores(classifier)(Texts.of(["the furnace of molten steel", "buy now for free, click", "", "éé"]))
    good, bad, *unknown = found["classifier_steel"].to_pylist()
    assert good > 0.7
    assert bad < 0.3
    assert all(0 <= score <= 1 for score in unknown)


def test_the_same_texts_in_other_files_give_the_same_bytes(folders):
    train_classifier(folders / "good", folders / "bad", folders / "out", SMALL)
    other = folders / "other"
    (other / "good/deep").mkdir(parents=True)
    (other / "out").mkdir()
    for number, text in enumerate(reversed(GOOD[:50])):
        (other / f"good/deep/{number}.txt").write_text(text, encoding="utf-8")
    pq.write_table(pa.table({"text": GOOD[40:]}), other / "good/rest.parquet")
    train_classifier(other / "good", folders / "bad", other / "out", SMALL)
    for name in ("classifier.json", "weights.npy"):
        assert (other / "out" / name).read_bytes() == (folders / "out" / name).read_bytes()


def test_another_seed_gives_other_weights_and_nearly_the_same_answers():
    texts, labels = GOOD + BAD, np.array([1] * len(GOOD) + [0] * len(BAD))
    one, two = (fit(texts, labels, SMALL.with_changes(seed=seed)) for seed in (1, 2))
    assert (one.weights != two.weights).any()
    batch = Texts.of(texts)
    assert np.abs(one.probabilities(batch) - two.probabilities(batch)).mean() < 0.05


def test_texts_score_alone_as_in_a_batch():
    classifier = fit(GOOD + BAD, np.array([1] * len(GOOD) + [0] * len(BAD)), SMALL)
    texts = [GOOD[0], "", BAD[3], "x"]
    assert classifier.probabilities(Texts.of(texts)).tolist() == [classifier.probabilities(Texts.of([t]))[0] for t in texts]


def test_a_score_is_the_same_on_processors_whose_exponentials_differ(monkeypatch):
    score = classifier_scores(fit(GOOD + BAD, np.array([1] * len(GOOD) + [0] * len(BAD)), SMALL))
    (here,) = score(Texts.of([*GOOD[:20], *BAD[:20]])).values()
    exact = np.exp
    monkeypatch.setattr(np, "exp", lambda values: np.nextafter(exact(values), np.inf))
    (there,) = score(Texts.of([*GOOD[:20], *BAD[:20]])).values()
    assert here.equals(there)


def test_texts_that_are_good_and_bad_teach_nothing(folders):
    with (folders / "bad/texts.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"text": GOOD[0]}) + "\n")
    assert train_classifier(folders / "good", folders / "bad", folders / "out", SMALL)["in_both_folders"] == 1


def test_probabilities_are_those_that_the_labels_had():
    """One word says 'good' in four texts of five: the classifier is to say 0.8 and not 1."""
    draw = random.Random(3)
    texts, labels = [], []
    for number in range(4000):
        label = draw.random() < 0.5
        right = draw.random() < 0.8
        texts.append(f"{'iron' if label == right else 'clay'} text number n{number}")
        labels.append(int(label))
    classifier = fit(texts, np.array(labels), ClassifierConfig(bits=16))
    iron, clay = classifier.probabilities(Texts.of(["iron text number none", "clay text number none"]))
    assert iron == pytest.approx(0.8, abs=0.1)
    assert clay == pytest.approx(0.2, abs=0.1)
    assert classifier.measured["held_out"]["calibration_error"] < 0.15


def test_a_prior_moves_the_probabilities_as_bayes_says():
    texts, labels = GOOD + BAD, np.array([1] * len(GOOD) + [0] * len(BAD))
    even, rare = (fit(texts, labels, SMALL.with_changes(prior=prior)) for prior in (0.5, 0.1))
    one, other = even.probabilities(Texts.of(texts)), rare.probabilities(Texts.of(texts))
    assert other / (1 - other) == pytest.approx(one / (1 - one) / 9)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=20))
def test_the_area_under_the_curve_is_what_counting_pairs_gives(pairs):
    good = np.array([label for label, _ in pairs], bool)
    scores = np.array([score for _, score in pairs], float)
    contests = [(a > b) + 0.5 * (a == b) for a in scores[good] for b in scores[~good]]
    assert area_under_curve(good, scores) == pytest.approx(np.mean(contests) if contests else 0.5)


def test_sigmoid_neither_overflows_nor_leaves_its_range():
    with np.errstate(all="raise"):
        assert sigmoid(np.array([-700.0, 0.0, 700.0])) == pytest.approx([0, 0.5, 1])


def test_examples_are_read_from_every_kind_of_file(tmp_path):
    import gzip

    import zstandard

    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    (tmp_path / "b.md").write_text("  \n", encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "two"}\n\n{"text": "one"}\n'))
    (tmp_path / "d.txt.zst").write_bytes(zstandard.compress(b"\xef\xbb\xbfthree \xff"))
    pq.write_table(pa.table({"text": ["four", None]}), tmp_path / "e.parquet")
    (tmp_path / "ignored.png").write_bytes(b"x")
    assert read_examples(tmp_path) == sorted(["one", "two", "three \ufffd", "four"])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent", None, "no such folder"),
        ("x.png", b"", "no examples"),
        ("x.txt", b" ", "no text"),
        ("x.jsonl", b'{"text": "a"}\n{"t": 1}\n', "x.jsonl:2"),
        ("x.jsonl", b"{", "cannot be read"),
        ("x.txt.gz", b"\x1f\x8b\x08broken", "cannot be read"),
        ("x.parquet", b"PAR1", "cannot be read"),
        ("x.txt", b"one text", "too few"),
    ],
)
def test_bad_examples_are_refused_with_their_place(folders, name, content, said):
    folder = folders / "bad examples"
    if content is not None:
        folder.mkdir()
        (folder / name).write_bytes(content)
    with pytest.raises(SourceError, match=said):
        train_classifier(folders / "good", folder, folders / "out", SMALL)


def test_a_damaged_classifier_is_refused(folders):
    train_classifier(folders / "good", folders / "bad", folders / "out", SMALL)
    described = json.loads((folders / "out/classifier.json").read_text(encoding="utf-8"))
    with pytest.raises(ArtefactError):
        load_classifier(folders)
    for change in ({"format": 2}, {"features": described["features"] | {"bits": 13}}, {"bias": "x"}):
        (folders / "out/classifier.json").write_text(json.dumps(described | change), encoding="utf-8")
        with pytest.raises(ArtefactError):
            load_classifier(folders / "out")
    (folders / "out/classifier.json").write_text(json.dumps(described), encoding="utf-8")
    np.save(folders / "out/weights.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ArtefactError):
        load_classifier(folders / "out")


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="bits"):
        ClassifierConfig.parse({"bits": 40}, "train_classifier")
