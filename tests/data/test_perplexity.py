from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.core.errors import ArtefactError, SourceError
from bessemer.data.filters.registry import PERPLEXITY
from bessemer.data.filters.word_model import WordModelConfig, fit_words, load_word_model, perplexity_scores, train_word_model
from bessemer.data.plugins import arrow_types
from bessemer.data.text.texts import Texts

TEXTS = ["the cat sat on the mat.", "the dog sat on the cat, and the mat sat", "a cat; a dog", "the the the", "", "odd word"]
small_texts = st.lists(st.sampled_from(["a", " a", "b", " bc", "\n", ".", "  ", "é", "zz"]), max_size=8).map("".join)


def pieces(text):
    return re.findall(r" ?[0-9A-Za-z\u0080-\U0010ffff]+|[\s\S]", text)


class InPlainPython:
    """The same model by its definition: dictionaries, and sums over the whole vocabulary."""

    def __init__(self, texts, fewest=1):
        counts = Counter(piece for text in texts for piece in pieces(text))
        self.known = {piece for piece, count in counts.items() if count > 1}
        self.vocabulary = ["<edge>", "<unknown>", *sorted(self.known)]
        spelt = [piece for piece in counts if piece not in self.known]
        self.trigrams = Counter()
        for text in texts:
            row = ["<edge>"] * 2 + [self.number(piece) for piece in pieces(text)] + ["<edge>"]
            self.trigrams.update(zip(row, row[1:], row[2:], strict=False))
        self.bigrams = Counter(key[1:] for key in self.trigrams)
        self.unigrams = Counter(key[1:] for key in self.bigrams)
        self.fewest = fewest
        self.pairs = Counter()
        for piece in spelt:
            row = ["<", *piece.encode(), ">"]
            self.pairs.update(itertools.pairwise(row))

    def number(self, piece):
        return piece if piece in self.known else "<unknown>"

    @staticmethod
    def discount(counts):
        once, twice = sum(c == 1 for c in counts.values()), sum(c == 2 for c in counts.values())
        return min(max(once / (once + 2 * twice), 0.1), 0.9) if once else 0.5

    def probability(self, context, piece):
        table = (self.unigrams, self.bigrams, self.trigrams)[len(context)]
        discount = self.discount(table)
        shorter = self.probability(context[1:], piece) if context else 1 / len(self.vocabulary)
        if not context:
            total = sum(table.values())
            gamma = 1 - sum((count - discount) / total for count in table.values())
            return max(table[(piece,)] - discount, 0) / total + gamma * shorter
        following = {key[-1]: count for key, count in table.items() if key[:-1] == context}
        total = sum(following.values())
        if not total:
            return shorter
        fewest = self.fewest if len(context) == 2 else 1
        kept = {key: count for key, count in following.items() if count >= fewest}
        gamma = max(1 - sum((count - discount) / total for count in kept.values()), 1e-9)
        return (max(kept[piece] - discount, 0) / total if piece in kept else 0) + gamma * shorter

    def spelt(self, piece):
        every, bits, row = Counter(), 0.0, ["<", *piece.encode(), ">"]
        for (_, byte), count in self.pairs.items():
            every[byte] += count
        followers, behind = defaultdict(set), Counter()
        for (before, byte), count in self.pairs.items():
            followers[before].add(byte)
            behind[before] += count
        for before, byte in itertools.pairwise(row):
            shorter = (every[byte] + len(every) / 257) / (sum(every.values()) + len(every)) if every else 1 / 257
            distinct = len(followers[before])
            bits -= math.log2(
                (self.pairs[before, byte] + distinct * shorter) / (behind[before] + distinct) if behind[before] else shorter
            )
        return bits

    def bits(self, text):
        row = ["<edge>"] * 2 + [self.number(piece) for piece in pieces(text)] + ["<edge>"]
        bits = sum(self.spelt(piece) for piece in pieces(text) if piece not in self.known)
        return bits - sum(math.log2(self.probability(tuple(row[n - 2 : n]), row[n])) for n in range(2, len(row)))


@pytest.mark.parametrize("fewest", [1, 2])
@pytest.mark.parametrize("text", [*TEXTS, "the mat sat on a dog", "unseen words, été", "cat" * 20, "\x00\n\n the"])
def test_the_bits_are_those_of_the_definition(text, fewest):
    model = fit_words(Texts.of(TEXTS), WordModelConfig(fewest_trigrams=fewest))
    assert model.bits(Texts.of([text]))[0] == pytest.approx(InPlainPython(TEXTS, fewest).bits(text), rel=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.lists(small_texts, min_size=1, max_size=5), small_texts, st.sampled_from([1, 2]))
def test_any_small_corpus_gives_the_bits_of_the_definition(texts, text, fewest):
    model = fit_words(Texts.of(texts), WordModelConfig(fewest_trigrams=fewest))
    assert model.bits(Texts.of([text]))[0] == pytest.approx(InPlainPython(texts, fewest).bits(text), rel=1e-4)


@pytest.mark.parametrize("fewest", [1, 2, 3])
def test_the_definition_is_a_distribution(fewest):
    plain = InPlainPython(TEXTS, fewest)
    for context in [(), ("<edge>",), (" cat",), ("the", " cat"), (" sat", " on"), ("<edge>", "<edge>"), ("<unknown>", "the")]:
        assert sum(plain.probability(context, piece) for piece in plain.vocabulary) == pytest.approx(1, abs=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(max_size=30), max_size=4))
def test_any_text_has_finite_bits_alone_as_in_a_batch(texts):
    model = fit_words(Texts.of(TEXTS), WordModelConfig())
    together = model.bits(Texts.of(texts))
    assert np.isfinite(together).all()
    assert (together > 0).all()
    assert together.tolist() == [model.bits(Texts.of([text]))[0] for text in texts]


def test_what_is_like_the_examples_surprises_less():
    model = fit_words(Texts.of(TEXTS * 20), WordModelConfig())
    usual, shuffled, strange = model.bits_per_byte(
        Texts.of(["the cat sat on the mat", "mat the on sat cat the", "xq zvw kjh qq"])
    )
    assert usual < shuffled < strange


def test_the_order_of_texts_and_the_vocabulary_limit_do_not_break_it():
    one, other = (fit_words(Texts.of(texts), WordModelConfig()) for texts in (TEXTS, TEXTS[::-1]))
    assert one.bits(Texts.of(TEXTS)).tolist() == other.bits(Texts.of(TEXTS)).tolist()
    limited = fit_words(Texts.of(TEXTS), WordModelConfig(vocabulary=3))
    assert len(limited.unigrams) == 2 + 3
    assert np.isfinite(limited.bits(Texts.of(TEXTS))).all()


def test_the_score_is_bits_per_byte_of_any_model():
    scorer = perplexity_scores(lambda texts: np.diff(texts.offsets) + 0.123456)
    found = scorer(Texts.of(["abc", ""]))
    assert {name: column.to_pylist() for name, column in found.items()} == {"perplexity_bits_per_byte": [3.1235, 0.1235]}
    assert {name: column.type for name, column in found.items()} == arrow_types(PERPLEXITY)
    model = fit_words(Texts.of(TEXTS), WordModelConfig())
    assert perplexity_scores(model.bits_per_byte)(Texts.of([""]))["perplexity_bits_per_byte"].to_pylist() == [0.0]


def test_a_model_is_trained_on_a_folder_and_opened_again(tmp_path):
    (tmp_path / "examples").mkdir()
    for number in range(40):
        (tmp_path / f"examples/{number}.txt").write_text(
            f"the cat number {number} sat on the mat with the other cat", encoding="utf-8"
        )
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        described = train_word_model(tmp_path / "examples", tmp_path / name)
    assert described["texts"] == 40
    assert (tmp_path / "one/word_model.npz").read_bytes() == (tmp_path / "two/word_model.npz").read_bytes()
    model = load_word_model(tmp_path / "one")
    usual, strange = model.bits_per_byte(Texts.of(["the cat sat on the mat", "colourless green ideas"]))
    assert usual < strange

    (tmp_path / "one/word_model.json").write_text(json.dumps({"format": 9}), encoding="utf-8")
    with pytest.raises(ArtefactError, match="format 9"):
        load_word_model(tmp_path / "one")
    (tmp_path / "two/word_model.npz").write_bytes(b"PK broken")
    for folder in (tmp_path / "two", tmp_path / "examples"):
        with pytest.raises(ArtefactError):
            load_word_model(folder)
    (tmp_path / "little.txt").write_text("too little", encoding="utf-8")
    with pytest.raises(SourceError, match="too few"):
        train_word_model(tmp_path / "little.txt", tmp_path / "two")
