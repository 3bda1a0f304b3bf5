"""The entailment head: what it is trained on, that it learns it, its file, and the marks of answers that it makes."""

from __future__ import annotations

import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from bessemer.core.errors import ArtefactError
from bessemer.retrieval.answer import checked
from bessemer.retrieval.encoder_texts import EncoderTexts
from bessemer.retrieval.entailment import Entailment, EntailmentHead, load_entailment, shared, states_of
from bessemer.retrieval.entailment_training import CHANGES, fitted_temperature, make_pairs, reworded, train_entailment
from bessemer.retrieval.search import Hit
from bessemer.retrieval.store import Found, Passage

transformers = pytest.importorskip("transformers")


def passage(number, text, title="metals.melt(heat)"):
    return Passage(str(number), f"{number}.md", 0, title, "", text, 0, len(text.encode()), "notes")


@pytest.fixture
def folder(tmp_path):
    """A random BERT, whose words are letters."""
    torch.manual_seed(4)
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=128,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path)
    characters = {chr(code): code for code in range(128)} | {"[UNK]": 3}
    tokenizer = Tokenizer(models.WordLevel(characters, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="\x01 $A", special_tokens=[("\x01", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


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


def test_a_sentence_without_anything_to_change_is_not_changed():
    own = passage(1, "Gold.", title="About gold")
    assert not any(change("Gold shines.", own, [], random.Random(0)) for change in CHANGES.values())


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


def test_a_head_learns_which_numbers_a_source_has_and_its_file_gives_the_same(folder, tmp_path):
    entailment = train_entailment(an_index(60), folder, passages=60, epochs=40)
    source = passage(1, "Heat metal number 170 to 370 degrees.").shown
    asked = [("Heat metal number 170 to 370 degrees.", source), ("Heat metal number 170 to 375 degrees.", source)]
    right, wrong = entailment.probabilities(asked)
    assert right > 0.5 and right - wrong > 0.3
    entailment.save(tmp_path / "head.npz")
    again = load_entailment(tmp_path / "head.npz", folder)
    assert np.abs(again.probabilities(asked) - (right, wrong)).max() < 0.01
    assert again.made == entailment.made


def test_a_pair_is_judged_alike_alone_and_among_longer_ones(folder):
    torch.manual_seed(1)
    texts = EncoderTexts(folder)
    entailment = Entailment(texts, EntailmentHead(16).eval(), {})
    pairs = [("Iron rusts.", "Iron rusts in water."), ("Copper turns green in air " * 3, "It is so. " * 9)]
    together = entailment.probabilities(pairs)
    assert np.abs(together - [entailment.probabilities([pair])[0] for pair in pairs]).max() < 1e-5
    assert len(entailment.probabilities([])) == 0
    assert states_of(texts, ["Iron"])["Iron"].shape == (5, 16)


def test_a_damaged_file_is_one_line(folder, tmp_path):
    (tmp_path / "head.npz").write_bytes(b"no head")
    with pytest.raises(ArtefactError, match=r"head\.npz: this is no entailment head, or a damaged one"):
        load_entailment(tmp_path / "head.npz", folder)
    Entailment(EncoderTexts(folder), EntailmentHead(8), {}).save(tmp_path / "head.npz")
    with pytest.raises(ArtefactError, match="it reads states of 8 numbers"):
        load_entailment(tmp_path / "head.npz", folder)


def test_the_fitted_temperature_is_that_by_which_logits_were_made_too_sure():
    draw = np.random.default_rng(3)
    true_N = draw.normal(0, 2, 20_000)
    wanted_N = draw.random(20_000) < 1 / (1 + np.exp(-true_N))
    assert abs(fitted_temperature(true_N * 3, wanted_N) - 3) < 0.15


def test_numbers_are_the_same_in_words_and_digits():
    assert shared("It has five parts.", "There are 5 of its parts.")[1] == 1
    assert shared("It has six parts.", "There are 5 of its parts.")[1] == 0


def test_a_sentence_that_its_source_does_not_entail_is_marked_and_quotation_marks_are_no_part_of_it():
    asked = []

    def entails(pairs):
        asked.extend(pairs)
        return np.array([0.1 if "never" in sentence else 0.9 for sentence, _ in pairs], np.float32)

    hits = [Hit(passage(number, "Iron never rusts, and rusts."), 1.0, {}, {}) for number in range(2)]
    answer = checked("“Iron rusts” [1]. Iron never rusts [1][2]. So?", hits, entails)
    assert [one.is_supported for one in answer.statements] == [True, False, True]
    assert [one.entailment for one in answer.statements] == [pytest.approx(0.9), pytest.approx(0.1), None]
    assert [sentence for sentence, _ in asked] == ["Iron rusts.", "Iron never rusts.", "Iron never rusts."]
    assert asked[0][1] == hits[0].passage.shown
