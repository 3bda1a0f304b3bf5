"""Probes on activations: found where they must be, of one model alone."""

import numpy as np
import pytest

from bessemer.core.errors import ArtefactError, RequestError
from bessemer.safety.probes import Probe, ProbeConfig, _logistic, area_under_curve, drift, fit_probe, load_probe, mean_states
from tests.serving.running import babbling_engine

LETTERS = np.random.default_rng(0).choice(list("abcdefgh"), (60, 12))
TEXTS = ["".join(row) for row in LETTERS]
LABELS = ["a" in text for text in TEXTS]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with babbling_engine(tmp_path_factory.mktemp("engine")) as engine:
        yield engine


@pytest.fixture(scope="module")
def probe(engine) -> Probe:
    return fit_probe(engine, TEXTS[:40], LABELS[:40], ProbeConfig(layer=0, l2=0.01), name="has an a")


def test_a_letter_is_read_from_the_mean_of_the_embeddings(engine, probe):
    # the embedding of a letter is in the mean or is not: a linear function tells
    assert area_under_curve(probe.scores(engine, TEXTS[40:]), LABELS[40:]) > 0.9
    with pytest.raises(RequestError, match="layer"):
        fit_probe(engine, TEXTS, LABELS, ProbeConfig(layer=99))
    with pytest.raises(RequestError, match="0 of 2 have it"):
        fit_probe(engine, TEXTS[:2], [False, False], ProbeConfig(layer=0))


def test_a_probe_is_refused_by_other_weights_and_its_drift_is_measured(engine, probe, tmp_path):
    probe.check(engine)
    weight = next(engine.model.parameters())
    original = weight.detach().clone()
    ids = [engine.tokenizer.encode(letter, add_bos=False)[0] for letter in "abcdefgh"]
    try:
        # each letter has another's embedding
        weight.data[ids] = original[ids[4:] + ids[:4]]
        with pytest.raises(ArtefactError, match=r"^the probe 'has an a' is stale: the model's hidden states differ by \d.*%"):
            probe.scores(engine, TEXTS[:1])
        found = drift(probe, engine, TEXTS[:40], LABELS[:40], TEXTS[40:], LABELS[40:], l2=0.01)
        assert found.refitted > found.old
        found.probe.check(engine)
    finally:
        weight.data.copy_(original)


def test_a_saved_probe_opens_as_it_was_and_another_file_is_refused(probe, tmp_path):
    probe.save(tmp_path / "p.npz")
    opened = load_probe(tmp_path / "p.npz")
    assert opened.name == probe.name and np.array_equal(opened.weights_D, probe.weights_D)
    (tmp_path / "p.npz").write_bytes(b"PK\x03\x04 no probe")
    with pytest.raises(ArtefactError, match="this is no probe"):
        load_probe(tmp_path / "p.npz")


def test_the_fit_is_where_the_gradient_is_zero():
    draw = np.random.default_rng(1)
    inputs, labels = draw.normal(size=(50, 3)), (draw.random(50) < 0.4).astype(float)
    weights, bias = _logistic(inputs, labels, 0.5)
    errors = 1 / (1 + np.exp(-(inputs @ weights + bias))) - labels
    assert np.abs(inputs.T @ errors + 0.5 * weights).max() < 1e-4 and abs(errors.sum()) < 1e-4


def test_the_area_under_the_curve_counts_ties_half():
    assert area_under_curve(np.array([0.9, 0.5, 0.5, 0.1]), [True, True, False, False]) == pytest.approx(3.5 / 4)


def test_of_the_last_tokens_alone_only_they_are_read(engine, tmp_path):
    # the letter that tells stands at the end, and what is before it says the opposite
    texts = [("b" if ends else "a") * 9 + "cd" + ("a" if ends else "b") for ends in (True, False) * 20]
    ids = [engine.tokenizer.encode(text) for text in texts]
    lengths = {len(tokens) for tokens in ids}
    whole, last = mean_states(engine, texts, 0), mean_states(engine, ids, 0, last=1)
    for tokens, mean in zip(ids[:2], last[:2], strict=True):
        assert np.allclose(mean, mean_states(engine, [tokens[-1:]], 0)[0], atol=1e-6)
    assert lengths == {len(ids[0])} and not np.allclose(whole, last)
    labels = [text.endswith("a") for text in texts]
    found = fit_probe(engine, ids, labels, ProbeConfig(layer=0, last=1))
    found.save(tmp_path / "p.npz")
    assert load_probe(tmp_path / "p.npz").last == 1
    other = engine.tokenizer.encode("hhhhcda"), engine.tokenizer.encode("aaaaaahb")
    assert area_under_curve(found.scores(engine, other), [True, False]) == 1.0
