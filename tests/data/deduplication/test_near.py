from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.data.deduplication import near
from bessemer.data.deduplication.minhash import Orders, _mixed, band_keys, jaccard, shingle_sets
from bessemer.data.deduplication.near import near_duplicates
from bessemer.data.text.texts import Texts
from tests.cases import slow_but
from tests.data.deduplication import reference
from tests.data.deduplication.corpora import applied, corpus_of, dropped

TEXTS = st.text(st.one_of(st.sampled_from("ab .\n"), st.characters(max_codepoint=0x3FFFF, exclude_categories=("Cs",))))


def spelled(numbers) -> list[str]:
    """Words without digits, which would all fold to 0."""
    return ["".join(chr(97 + int(digit)) for digit in str(number)) for number in numbers]


def pair_at(similarity: float, words: int, rng: random.Random) -> tuple[str, str]:
    """Two texts whose 5-gram sets have about this Jaccard similarity: one shares a first part of the other's words."""
    shingles = words - 4
    common = round(2 * similarity * shingles / (1 + similarity))
    one = spelled(rng.getrandbits(40) for _ in range(words))
    other = one[: common + 4] + spelled(rng.getrandbits(40) for _ in range(words - common - 4))
    return " ".join(one), " ".join(other)


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=2, max_size=4), st.integers(1, 6))
def test_similarities_of_shingle_sets_are_those_of_pythons_sets(texts, ngram):
    sets, offsets = shingle_sets(Texts.of(texts), np.arange(len(texts)), ngram)
    left, right = (np.ravel(index) for index in np.indices((len(texts), len(texts))))
    found = jaccard(sets, offsets[:-1], np.diff(offsets), left, right)
    expected = [reference.jaccard(texts[one], texts[other], ngram) for one, other in zip(left, right, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_band_holds_the_minima_of_its_orders():
    """Keys computed once more, of a text a little longer than a block, under so many orders that every shingle counts."""
    orders, mask = Orders.of(64, 64), 2**64 - 1

    def mixed(value):
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
        value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
        return value ^ value >> 31

    text = " ".join(spelled(range(2055)))
    sets, _ = shingle_sets(Texts.of([text]), np.array([0]), 4)
    short = (sets >> np.uint64(32)).astype(np.uint32)
    pairs = zip(orders.masks, orders.multipliers, strict=True)
    minima = np.array([((short ^ hidden) * factor).min() for hidden, factor in pairs]).reshape(64, 64)
    expected = list(range(64))
    for band in range(64):
        for least in minima[band].tolist():
            expected[band] = mixed(expected[band] ^ least)
    keys, has_words = band_keys(Texts.of(["?", text]), orders, 4)
    assert keys[:, 1].tolist() == expected
    assert has_words.tolist() == [False, True]


@pytest.mark.parametrize(
    "bands, rows, similarity",
    slow_but(
        [(14, 8, 0.72), (20, 4, 0.65)],
        [(bands, rows, similarity) for bands, rows in ((14, 8), (20, 4)) for similarity in (0.5, 0.65, 0.72, 0.8, 0.9)],
    ),
)
def test_candidates_follow_the_s_curve(bands, rows, similarity):
    """1 - (1 - s^r)^b of 1,500 pairs, within four standard deviations."""
    pairs, rng = 1500, random.Random(f"{similarity} {bands}")
    texts = [text for _ in range(pairs) for text in pair_at(similarity, 70, rng)]
    keys, _ = band_keys(Texts.of(texts), Orders.of(bands, rows), 5)
    found = (keys[:, 0::2] == keys[:, 1::2]).any(axis=0).mean()
    true = reference.jaccard(texts[0], texts[1], 5)
    expected = 1 - (1 - true**rows) ** bands
    assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / pairs) + 1e-9


def test_planted_pairs_are_found_and_others_are_not(tmp_path):
    """Recall at or above 0.85, and precision at the threshold, on pairs of every similarity among strangers."""
    rng, texts, similar = random.Random(1), {}, {}
    for pair in range(500):
        one, other = pair_at(0.5 + 0.5 * pair / 500, 120, rng)
        texts[2 * pair], texts[2 * pair + 1] = one, other
        similar[2 * pair + 1] = reference.jaccard(one, other, 5)
    found = dropped(near_duplicates(corpus_of(texts, batch_rows=500), tmp_path).duplicates, texts)
    wanted = [number for number, value in similar.items() if value >= 0.85]
    assert np.mean([number in found for number in wanted]) >= 0.95
    assert all(similar[number] >= 0.8 - 1e-6 for number in found)  # exact similarities: no false pair at all
    assert all(reason == f"near duplicate of {number - 1} ({similar[number]:.2f})" for number, reason in found.items())


def family(rng: random.Random, members: int) -> list[str]:
    """Copies of one text with a word or two changed each."""
    base = spelled(rng.getrandbits(30) for _ in range(200))
    return [" ".join([*base[:n], "other" + spelled([n])[0], *base[n + 1 :]]) for n in range(members)]


@settings(max_examples=10, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 40), st.booleans())
def test_verdicts_do_not_depend_on_order_or_batches(tmp_path_factory, shuffled, batch_rows, verify):
    rng = random.Random(5)
    texts = dict(enumerate(family(rng, 12) + family(rng, 7) + [text for _ in range(20) for text in pair_at(0.8, 60, rng)]))
    order = list(texts)
    shuffled.shuffle(order)
    scratch = tmp_path_factory.mktemp("scratch")
    expected = near_duplicates(corpus_of(texts), scratch, verify=verify)
    found = near_duplicates(corpus_of(texts, order=order, batch_rows=batch_rows), scratch, verify=verify)
    assert dropped(found.duplicates, texts) == dropped(expected.duplicates, texts)
    assert (found.candidates, found.compared, found.confirmed) == (expected.candidates, expected.compared, expected.confirmed)
    assert len(found.duplicates) >= 17


def test_of_a_family_the_smallest_id_stays_and_each_member_is_compared_about_once(tmp_path):
    texts = family(random.Random(2), 150)
    found = near_duplicates(corpus_of(texts), tmp_path)
    assert set(dropped(found.duplicates, texts)) == set(range(1, 150))
    assert {reason.split(" (")[0] for reason in dropped(found.duplicates, texts).values()} == {"near duplicate of 0"}
    assert found.compared < 2 * 150


def test_a_chain_is_one_component_and_its_reason_tells_the_distance_to_the_survivor(tmp_path):
    """Each is like the next at 0.9, the first and the last at much less."""
    base = spelled(range(1000, 1300))
    texts = [" ".join(base[start : start + 100]) for start in range(0, 60, 5)]
    found = dropped(near_duplicates(corpus_of(texts), tmp_path).duplicates, texts)
    assert set(found) == set(range(1, len(texts)))
    assert found[11] == f"near duplicate of 0 ({reference.jaccard(texts[0], texts[11], 5):.2f})"
    assert reference.jaccard(texts[0], texts[11], 5) < 0.4


@pytest.mark.slow
def test_in_a_crowd_on_one_template_pairs_are_found_at_a_limited_number_of_comparisons(tmp_path):
    """All share most shingles, so that large groups share keys, but few are alike enough: those that share the rest as well."""
    rng = random.Random(3)

    def new(count):
        return spelled(rng.getrandbits(30) for _ in range(count))

    template = new(84)
    members = [template + new(12) for _ in range(700)]
    pairs = [members[600 + number][:88] + new(8) for number in range(100)]
    texts = [" ".join(words) for words in members + pairs]
    found = near_duplicates(corpus_of(texts, batch_rows=100), tmp_path)
    assert reference.jaccard(texts[0], texts[1], 5) < 0.78
    assert 0.83 < reference.jaccard(texts[600], texts[700], 5) < 0.85
    assert found.candidates > 750
    assert set(dropped(found.duplicates, texts)) <= set(range(700, 800))
    assert len(found.duplicates) >= 97
    assert found.compared < 30 * len(texts)


@pytest.mark.parametrize("sorted_at_a_time", [500, near._SHINGLES_SORTED])
def test_of_a_crowd_those_are_compared_that_share_a_rare_shingle(tmp_path, monkeypatch, sorted_at_a_time):
    monkeypatch.setattr(near, "_LEADERS", 0)  # all candidates are a crowd
    monkeypatch.setattr(near, "_SHINGLES_SORTED", sorted_at_a_time)
    rng = random.Random(8)
    texts = [text for _ in range(40) for text in pair_at(0.95, 80, rng)]
    found = near_duplicates(corpus_of(texts), tmp_path)
    assert found.candidates == 80
    assert sorted(dropped(found.duplicates, texts)) == list(range(1, 80, 2))
    assert found.compared == 40


def test_without_verification_candidates_are_enough(tmp_path):
    rng = random.Random(4)
    texts = [text for _ in range(300) for text in pair_at(0.7, 80, rng)]
    assert not dropped(near_duplicates(corpus_of(texts), tmp_path).duplicates, texts)
    found = dropped(near_duplicates(corpus_of(texts), tmp_path, verify=False).duplicates, texts)
    assert len(found) > 50
    assert all(reason == f"near duplicate of {number - 1}" for number, reason in found.items())


def test_documents_of_an_earlier_corpus_survive_and_are_not_judged(tmp_path):
    rng = random.Random(6)
    known, new = family(rng, 3), family(rng, 3)
    earlier = {100: known[0], 101: known[1], 102: new[0] + " " + " ".join(spelled(range(900, 1200)))}
    texts = {1: known[2], 2: new[1], 3: new[2]}
    found = near_duplicates(corpus_of(texts, earlier=earlier), tmp_path).duplicates
    assert {number: reason.split(" (")[0] for number, reason in dropped(found, texts).items()} == {
        1: "near duplicate of 100",
        3: "near duplicate of 2",
    }


def test_sets_are_compared_a_few_at_a_time(tmp_path, monkeypatch):
    held = []

    def counted(sets, starts, sizes, left, right):
        held.append((sizes[left] + sizes[right]).tolist())
        return jaccard(sets, starts, sizes, left, right)

    monkeypatch.setattr(near, "jaccard", counted)
    monkeypatch.setattr(near, "_SHINGLES_MAPPED", 500)
    text = " ".join(spelled(range(44)))
    texts = [f"{text} {word}" for word in spelled(range(100, 130))]
    assert len(near_duplicates(corpus_of(texts), tmp_path).duplicates) == 29
    # 41 shingles each
    assert max(map(len, held)) > 1 and sum(held[0]) < 500 and all(sum(sizes) < 500 + 82 for sizes in held)


def test_memory_for_shingles_is_that_of_the_chosen_texts():
    texts = Texts.of(["a long text that nobody chose " * 100, "of these words two shingles are made"])
    sets, _ = shingle_sets(texts, np.array([1]), 6)
    assert len(sets) == 2 and sets.base.size == 36 // 2 + 1


def test_short_texts_compare_as_wholes_and_empty_ones_are_like_nothing(tmp_path):
    texts = ["Yes, it is.", "yes it IS", "", "…", "no", "?!"]
    found = dropped(near_duplicates(corpus_of(texts), tmp_path).duplicates, texts)
    assert found == {1: "near duplicate of 0 (1.00)"}


def test_nothing_stays_in_the_scratch_folder(tmp_path):
    near_duplicates(corpus_of(["a b c d e f"] * 3), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("texts", [[], ["", "…"], ["one of a kind"], ["these words are a text", "and these are another one"]])
@pytest.mark.parametrize("verify", [True, False])
def test_a_corpus_without_candidates(tmp_path, texts, verify):
    found = near_duplicates(corpus_of(texts), tmp_path, verify=verify)
    assert (len(found.duplicates), found.candidates, found.compared, found.confirmed) == (0, 0, 0, 0)


def test_texts_are_not_touched(tmp_path):
    texts = ["a b c d e f", "a b c d e f."]
    found = applied(near_duplicates(corpus_of(texts), tmp_path).duplicates, texts)
    assert [text for text, _ in found.values()] == texts


def test_a_text_longer_than_a_block_has_the_shingles_of_the_whole():
    text = " ".join(spelled(range(10_000)))
    sets, _ = shingle_sets(Texts.of([text, "", text]), np.array([2, 1]), 5)
    assert len(sets) == len(reference.shingles(text, 5))


def test_the_random_orders_are_those_of_splitmix64_and_never_change():
    # the first numbers for the seed 0, as Steele, Lea and Flood's generator gives them elsewhere
    assert [_mixed(count) for count in (1, 2, 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    orders = Orders.of(2, 2)
    assert orders.masks.tolist() == [4155453432, 2476228679, 2368888215, 122960618]
    assert orders.multipliers.tolist() == [2280653483, 402568115, 90711, 1079954797]
