"""The entailment head: the pairs that it is fitted on, its fit and calibration, its file, and the marks that it makes."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bessemer.core.errors import ArtefactError
from bessemer.retrieval.answer import checked
from bessemer.retrieval.config import IndexConfig
from bessemer.retrieval.entailment import (
    FEATURES,
    Entailment,
    Opinions,
    calibrated,
    features,
    fit,
    head_of,
    load_head,
    train_head,
)
from bessemer.retrieval.entailment_pairs import CHANGES, make_pairs, reworded, written_pairs
from bessemer.retrieval.index import IndexedDocument, build_index, open_index
from bessemer.retrieval.search import Hit
from bessemer.retrieval.store import Found, Passage
from tests.retrieval.test_commands import run
from tests.serving.running import babbling_engine

pytest.importorskip("lancedb")

TESTED = Path(__file__).parents[2] / "benchmarks" / "entailment_pairs.json"


def passage(number, text, title="metals.melt(heat)"):
    return Passage(str(number), f"{number}.md", 0, title, "", text, 0, len(text.encode()), "notes")


def an_index(count):
    """Passages that each hold a number of their own; the nearest of each is the next."""
    passages = [passage(number, f"Heat metal number {number + 100} to {number + 300} degrees.") for number in range(count)]

    def near(sentence, _):
        own = next(one for one in passages if one.text == sentence)
        return [Found(passages[(int(own.id) + 1) % count], {}, {})]

    store = SimpleNamespace(passages=lambda: iter(passages), by_words=near)
    return SimpleNamespace(store=store, embedder=None)


@pytest.mark.parametrize(
    ("kind", "sentence", "changed"),
    [
        ("number", "Heat it to 300 degrees.", r"Heat it to (?!300 )\d+ degrees\."),
        ("number", "Wait for five minutes.", r"Wait for (?!five )\w+ minutes\."),
        ("name", "Return the melted metal.", r"(Use metals\.pour: return|(metals\.)?pour returns) the melted metal\."),
        ("negation", "It is not heated.", r"It is heated\."),
        ("negation", "It must be heated.", r"It must (not|never) be heated\."),
        ("negation", "Return the melted metal.", r"(Does not|Do not|It does not|Never) return the melted metal\."),
        ("opposite", "Start with the first one.", r"Start with the last one\.|End with the .*|Start without .*"),
        ("swapped", "Pour it from the crucible to the mould.", r"Pour it from the mould to the crucible\."),
        ("word", "Heat the metal.", r"Heat the vessel\."),
    ],
)
def test_a_changed_sentence_says_something_else(kind, sentence, changed):
    own = passage(1, "The vessel.")
    for seed in range(8):
        assert re.fullmatch(changed, CHANGES[kind](sentence, own, ["metals.pour"], random.Random(seed)))


def test_a_reworded_sentence_keeps_its_numbers_names_and_negations():
    own = passage(1, "Return the 12 moulds that json.loads does not hold (see below).")
    found = {reworded(own.text, own, random.Random(seed)) for seed in range(40)}
    assert len(found) > 8
    for text in found:
        assert re.search(r"\b(12|twelve) moulds", text) and "json.loads" in text and "not" in text


def test_pairs_of_a_passage_are_both_supported_and_not():
    pairs = [pair for _, pair in make_pairs(an_index(10), 10)]
    assert {pair.kind for pair in pairs if pair.supported} == {"as it stands", "in other words"}
    assert {"number", "another passage"} <= {pair.kind for pair in pairs if not pair.supported}
    assert all((pair.sentence in pair.source) for pair in pairs if pair.kind == "as it stands")


def test_features_see_numbers_names_negations_and_opposites():
    source = "Call json.loads before the 12 moulds are read. It does not wait for Ms Okafor."
    said = {
        "Twelve moulds are read.": [0, 0, 0, 0],
        "The 13 moulds are read.": [1, 0, 0, 0],
        "Call json.dumps before 12 moulds are read.": [0, 1, 0, 0],
        "It does wait for Ms Okafor.": [0, 0, 1, 0],
        "It does not wait for Mr Lind.": [0, 1, 0, 0],
        "Call json.loads after the 12 moulds are read.": [0, 0, 0, 1],
    }
    found = features([(sentence, source) for sentence in said], np.arange(len(said)))
    assert found[:, 0].tolist() == list(range(len(said)))
    for row, (sentence, wanted) in zip(found[:, 1:].tolist(), said.items(), strict=True):
        assert row == pytest.approx(wanted), sentence


def test_the_fit_is_that_of_the_weights_by_which_the_answers_were_drawn():
    draw = np.random.default_rng(5)
    inputs = draw.normal(size=(40_000, 2)) * [1, 3] + [0, 7]
    wanted = draw.random(len(inputs)) < 1 / (1 + np.exp(-(2 * inputs[:, 0] - 0.5 * (inputs[:, 1] - 7) + 0.4)))
    found = fit(inputs, wanted, decay=0, is_balanced=False)
    assert found.weights_F / found.deviation_F == pytest.approx([2, -0.5], abs=0.06)
    assert found.logits(np.array([[0.0, 7.0]]))[0] == pytest.approx(0.4, abs=0.06)
    # of logits that are too sure by a factor of three the calibration takes it back
    logits = draw.normal(0, 2, 20_000)
    right = draw.random(len(logits)) < 1 / (1 + np.exp(-logits))
    assert calibrated(3 * logits + 1, right) == pytest.approx((1 / 3, -1 / 3), abs=0.05)
    with pytest.raises(ValueError, match="borne out"):
        fit(inputs, np.ones(len(inputs), bool))


def test_a_head_judges_by_the_opinion_where_that_tells_and_by_numbers_where_it_does_not():
    pairs, written = [pair for _, pair in make_pairs(an_index(200), 200)], written_pairs()
    draw = np.random.default_rng(1)
    # the opinions of what is written are less sure, and all too low
    opinions = np.array([(2.0 if pair.supported else -2.0) + draw.normal() for pair in pairs])
    less_sure = np.array([(0.0 if pair.supported else -2.0) + draw.normal() for pair in written])
    head = head_of(pairs, opinions, written, less_sure, {"seed": 0})
    source = passage(1, "Heat metal number 170 to 370 degrees.").shown
    asked = [("Heat metal number 170 to 370 degrees.", source), ("Heat metal number 170 to 375 degrees.", source)]
    for_it, against = head.probabilities(features(asked[:1] * 2, np.array([1.0, -3.0])))
    assert for_it > 0.8 and against < 0.3
    right, wrong = head.probabilities(features(asked, np.array([-0.5, -0.5])))
    assert right - wrong > 0.05 and head.made == {"pairs": len(pairs), "calibrated_on": len(written), "seed": 0}
    # as many are right as the probabilities say
    probabilities = head.probabilities(features([(one.sentence, one.source) for one in written], less_sure))
    assert probabilities.mean() == pytest.approx(np.mean([one.supported for one in written]), abs=0.01)


def test_what_calibrates_heads_is_of_both_kinds_and_none_of_what_tests_them():
    written, tested = written_pairs(), written_pairs(TESTED)
    assert len(written) >= 60 and 0.4 < np.mean([one.supported for one in written]) < 0.6
    assert len(tested) == 120 and not {one.source for one in written} & {one.source for one in tested}


def test_a_real_model_is_asked_its_head_written_and_read_and_that_of_another_model_is_refused(tmp_path, capsys, monkeypatch):
    engine = babbling_engine(tmp_path / "engine", context=2048)
    documents = [
        IndexedDocument(f"{number}.md", f"The metal number {number} is heated to {number + 300} degrees before it is poured.")
        for number in range(24)
    ]
    build_index(documents, tmp_path / "i", IndexConfig(embedder="none"))
    model, out, index = str(tmp_path / "engine" / "model"), tmp_path / "head.json", str(tmp_path / "i")
    code, printed, noted = run(capsys, "entailment", index, model, str(out), "--passages", "16", "--device", "cpu")
    assert code == 0 and "calibrated on" in printed
    # random weights have no opinion, which is said
    assert "half is chance" in printed and "this head is of no use" in noted
    head = load_head(out)
    again = train_head(open_index(tmp_path / "i"), engine, model, passages=16)
    assert head.model == model and head.probes == pytest.approx(again.probes) and head.made == again.made
    assert head.fitted.weights_F == pytest.approx(again.fitted.weights_F)
    # alone as among others, and a long source is read around what is near
    opinions = Opinions(engine)
    pairs = [("It is hot.", "It is hot. " * 400 + "Iron rusts."), ("Iron rusts.", "It is hot. " * 400 + "Iron rusts.")]
    assert opinions.of(pairs) == pytest.approx([opinions.of([pair])[0] for pair in pairs], abs=1e-3)
    asked = ("ask", model, index, "How hot is metal 7?", "--max-tokens", "16", "--json", "--device", "cpu")
    code, printed, _ = run(capsys, *asked, "--check", str(out))
    statements = [one for one in json.loads(printed)["statements"] if one["support"] is not None]
    assert code == 0 and all(0 <= one["entailment"] <= 1 for one in statements)
    assert all(one["is_supported"] == (one["entailment"] >= 0.5) for one in statements)
    # a server opens the head's model besides the one that answers
    served = []
    monkeypatch.setattr("bessemer.serving.server.serve", lambda *given, **options: served.append(options["entails"]))
    code, _, error = run(capsys, "serve", model, "--check", str(out), "--device", "cpu")
    assert code == 0, error
    assert served[0](pairs) == pytest.approx(Entailment(engine, head).probabilities(pairs), abs=1e-3)
    code, _, error = run(capsys, "serve", model, "--check", str(tmp_path / "none.json"), "--device", "cpu")
    assert code == 2 and "no such entailment head" in error
    code, _, error = run(capsys, "entailment", index, model, str(out))
    assert code == 2 and "is there already" in error
    values = json.loads(out.read_text(encoding="utf-8"))
    out.write_text(json.dumps(values | {"probes": [9.0, -9.0, 9.0]}), encoding="utf-8")
    with pytest.raises(ArtefactError, match="for the opinions of"):
        Entailment(engine, load_head(out))
    for damaged in ({"features": ["opinion"]}, {"mean_F": [1]}, {"scale": None}):
        out.write_text(json.dumps(values | damaged), encoding="utf-8")
        with pytest.raises(ArtefactError, match="this is no entailment head"):
            load_head(out)
    with pytest.raises(ArtefactError, match="too few sentences"):
        head_of([], np.empty(0), [], np.empty(0), {})


def test_a_sentence_that_its_source_does_not_entail_is_marked_and_quotation_marks_are_no_part_of_it():
    asked = []

    def entails(pairs):
        asked.extend(pairs)
        return np.array([0.1 if "never" in sentence else 0.9 for sentence, _ in pairs])

    hits = [Hit(passage(number, "Iron never rusts, and rusts."), 1.0, {}, {}) for number in range(2)]
    answer = checked("“Iron rusts” [1]. Iron never rusts [1][2]. So?", hits, entails)
    assert [one.is_supported for one in answer.statements] == [True, False, True]
    assert [one.entailment for one in answer.statements] == [pytest.approx(0.9), pytest.approx(0.1), None]
    assert [sentence for sentence, _ in asked] == ["Iron rusts.", "Iron never rusts.", "Iron never rusts."]
    assert asked[0][1] == hits[0].passage.shown and len(FEATURES) == 5
