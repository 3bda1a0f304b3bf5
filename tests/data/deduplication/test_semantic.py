from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.core.errors import ConfigError
from bessemer.data.deduplication.corpus import Corpus
from bessemer.data.deduplication.semantic import HashedTfIdf, read_embeddings, semantic_duplicates
from tests.data.deduplication.corpora import corpus_of, dropped, numbered

DIMENSIONS = 16


def planted(seed: int, groups: int, members: int) -> tuple[dict[int, str], dict[str, np.ndarray]]:
    """Texts whose embeddings lie close together by groups; ids are dealt at random."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((groups, DIMENSIONS))
    vectors = {
        f"group {group} member {member}": centres[group] + 0.08 * rng.standard_normal(DIMENSIONS)
        for group in range(groups)
        for member in range(members)
    }
    order = rng.permutation(len(vectors)).tolist()
    return dict(zip(order, vectors, strict=True)), vectors


def by_brute_force(texts: dict[int, str], vectors: dict[str, np.ndarray], threshold: float) -> dict[int, int]:
    survivors: list[int] = []
    found = {}
    unit = {number: vectors[text] / np.linalg.norm(vectors[text]) for number, text in texts.items()}
    for number in sorted(texts):
        near = [other for other in survivors if unit[number] @ unit[other] >= threshold]
        if near:
            found[number] = near[0]
        else:
            survivors.append(number)
    return found


def looked_up(vectors):
    return lambda texts: np.array([vectors[text] for text in texts.to_pylist()], dtype=np.float32)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 50), st.randoms())
def test_in_one_cluster_verdicts_are_those_of_brute_force(tmp_path_factory, seed, batch_rows, shuffled):
    texts, vectors = planted(seed, 8, 6)
    order = list(texts)
    shuffled.shuffle(order)
    corpus = corpus_of(texts, order=order, batch_rows=batch_rows)
    found = semantic_duplicates(corpus, tmp_path_factory.mktemp("scratch"), looked_up(vectors), threshold=0.9, clusters=1)
    named = {number: int(reason.split()[3]) for number, reason in dropped(found, texts).items()}
    assert named == by_brute_force(texts, vectors, 0.9)


def test_clusters_find_nearly_all_and_the_reason_gives_the_cosine(tmp_path):
    texts, vectors = planted(3, 40, 5)
    found = dropped(semantic_duplicates(corpus_of(texts), tmp_path, looked_up(vectors), threshold=0.9), texts)
    expected = by_brute_force(texts, vectors, 0.9)
    assert len(found) >= 0.95 * len(expected)
    for number, reason in found.items():
        assert reason.startswith("semantic duplicate of ")
        one, other = vectors[texts[number]], vectors[texts[int(reason.split()[3])]]
        cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        assert abs(float(reason.split("(")[1][:-1]) - cosine) < 0.006


def test_a_chain_is_not_followed(tmp_path):
    """The second goes for the first; the third is near the second alone, which is gone, and stays."""
    angles = {"a": 0.0, "b": 0.3, "c": 0.6}
    vectors = {name: np.array([np.cos(angle), np.sin(angle)]) for name, angle in angles.items()}
    texts = dict(enumerate(angles))
    found = dropped(semantic_duplicates(corpus_of(texts), tmp_path, looked_up(vectors), threshold=0.95, clusters=1), texts)
    assert found == {1: f"semantic duplicate of 0 ({np.cos(0.3):.2f})"}


def test_of_two_that_stay_the_smaller_id_is_named(tmp_path):
    angles = {"a": 0.0, "b": 0.5, "c": 0.28}
    vectors = {name: np.array([np.cos(angle), np.sin(angle)]) for name, angle in angles.items()}
    texts = dict(enumerate(angles))
    found = dropped(semantic_duplicates(corpus_of(texts), tmp_path, looked_up(vectors), threshold=0.95, clusters=1), texts)
    assert found == {2: f"semantic duplicate of 0 ({np.cos(0.28):.2f})"}


def test_earlier_documents_stay_and_rows_of_zeros_or_nan_are_like_nothing(tmp_path):
    vectors = {"a": np.array([1.0, 0.0]), "b": np.array([1.0, 0.01]), "0": np.zeros(2), "n": np.array([np.nan, 1])}
    texts = {1: "b", 2: "0", 3: "0", 4: "n"}
    corpus = corpus_of(texts, earlier={7: "a"})
    assert dropped(semantic_duplicates(corpus, tmp_path, looked_up(vectors), clusters=1), texts) == {
        1: "semantic duplicate of 7 (1.00)"
    }


def test_without_a_model_shared_vocabulary_counts(tmp_path):
    rng = np.random.default_rng(1)
    vocabulary = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]
    texts = [" ".join(rng.choice(vocabulary, 150)) for _ in range(60)]
    sentences = texts[7].split()
    texts.append(" ".join(sentences[75:] + sentences[:75]) + " And a little more.")  # the same, in another order
    found = dropped(semantic_duplicates(corpus_of(texts), tmp_path, threshold=0.9, clusters=1), texts)
    assert set(found) == {60}
    assert found[60].startswith("semantic duplicate of 7 (0.9")


def test_projected_cosines_are_those_of_whole_vectors_but_for_noise():
    rng = np.random.default_rng(2)
    words = [chr(97 + n % 26) * (n // 26 + 1) for n in range(200)]
    texts = [" ".join(rng.choice(words[start : start + 80], 200)) for start in range(0, 120, 4)]
    corpus = corpus_of(texts)
    features = [[*text.split(), *zip(text.split(), text.split()[1:], strict=False)] for text in texts]
    names = sorted({str(feature) for found in features for feature in found})
    counts = np.zeros((len(texts), len(names)))
    for row, found in enumerate(features):
        for feature in found:
            counts[row, names.index(str(feature))] += 1
    weights = np.log((1 + len(texts)) / (1 + (counts > 0).sum(axis=0))) + 1
    whole = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * weights
    whole /= np.linalg.norm(whole, axis=1, keepdims=True)
    projected = HashedTfIdf.of(corpus, 2048)(pa.array(texts))
    projected /= np.linalg.norm(projected, axis=1, keepdims=True)
    assert np.abs(projected @ projected.T - whole @ whole.T).max() < 5 / np.sqrt(2048)


def test_an_embedding_for_each_text_is_needed(tmp_path):
    with pytest.raises(ValueError, match=r"3 texts need an embedding each, not an array of shape \(2, 4\)"):
        semantic_duplicates(corpus_of(["a", "b", "c"]), tmp_path, lambda texts: np.ones((2, 4)))


@pytest.mark.parametrize("texts", [{}, {1: "a"}, {1: "", 2: ""}])
def test_too_few_to_compare(tmp_path, texts):
    corpus: Corpus = corpus_of(texts)
    assert len(semantic_duplicates(corpus, tmp_path)) == 0
    assert numbered(texts) == texts


FLOATS = pa.list_(pa.float32())


def written(place, vectors, kind=FLOATS):
    """A file of embeddings by number."""
    ids = pa.array([f"{number:032x}" for number in vectors], pa.string())
    pq.write_table(
        pa.table({"id": ids, "embedding": pa.array([list(map(float, row)) for row in vectors.values()], kind)}), place
    )
    return place


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float64(), DIMENSIONS), pa.large_list(pa.float16())])
def test_embeddings_that_were_computed_before_give_the_verdicts_of_their_model(tmp_path, kind):
    texts, vectors = planted(5, 8, 6)
    expected = dropped(semantic_duplicates(corpus_of(texts), tmp_path / "a", looked_up(vectors), threshold=0.9), texts)
    by_number = {number: np.float16(vectors[text]) for number, text in texts.items()}
    folder = tmp_path / "vectors"
    folder.mkdir()
    numbers = list(by_number)[::-1]
    for name, some in (("b", numbers[:20]), ("a", [*numbers[20:], 99])):  # 99 is no document of the corpus
        written(folder / f"{name}.parquet", {number: by_number.get(number, np.ones(DIMENSIONS)) for number in some}, kind)
    found = semantic_duplicates(corpus_of(texts), tmp_path / "b", embeddings=read_embeddings(folder), threshold=0.9)
    assert expected and dropped(found, texts).keys() == expected.keys()


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({0: [1, 0]}, "1 documents have no embedding; the first of them is 0{31}1$"),
        ({0: [1, 0], 1: [1]}, "embeddings of 1 and of 2 numbers"),
    ],
)
def test_embeddings_that_do_not_fit_the_corpus_are_refused(tmp_path, vectors, message):
    place = written(tmp_path / "a.parquet", vectors)
    with pytest.raises(ConfigError, match=message):
        semantic_duplicates(corpus_of(["a", "b"]), tmp_path / "scratch", embeddings=read_embeddings(place))


def test_what_holds_no_embeddings_is_refused(tmp_path):
    for place in (tmp_path / "none.parquet", tmp_path):
        with pytest.raises(ConfigError, match="there is no Parquet file"):
            list(read_embeddings(place))
    (tmp_path / "a.parquet").write_bytes(b"no Parquet")
    pq.write_table(pa.table({"id": ["0" * 32]}), tmp_path / "b.parquet")
    for name in "ab":
        with pytest.raises(ConfigError, match="this is no file of embeddings"):
            list(read_embeddings(tmp_path / f"{name}.parquet"))


def test_a_document_with_two_embeddings_is_refused(tmp_path):
    twice = (pa.array([f"{0:032x}"]), np.ones((1, 2)))
    with pytest.raises(ConfigError, match="has two embeddings"):
        semantic_duplicates(corpus_of(["a"]), tmp_path, embeddings=[twice, twice])


def test_the_hashed_embeddings_are_the_same_on_processors_whose_logarithms_differ(monkeypatch):
    corpus = corpus_of(["pig iron and air", "iron and steel", "steel"])
    weights, exact = HashedTfIdf.of(corpus).weights, np.log
    monkeypatch.setattr(np, "log", lambda values: np.nextafter(exact(values), np.inf))
    assert np.array_equal(HashedTfIdf.of(corpus).weights, weights)
