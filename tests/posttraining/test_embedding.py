"""Embedders by contrastive learning: the loss, its rows, and the stage."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from bessemer.core.errors import ArtefactError, ConfigError, SourceError
from bessemer.inference.engine import Engine
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.model.storage.folder import load_model, save_model
from bessemer.posttraining.embedding.config import EmbedderConfig
from bessemer.posttraining.embedding.data import QuestionRow, pack_questions, read_questions
from bessemer.posttraining.embedding.objective import (
    NEGATIVE,
    POSITIVE,
    QUERY,
    ContrastiveObjective,
    info_nce,
    is_nearest,
    pooled,
)
from bessemer.posttraining.embedding.stage import embedder
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.objectives import LossContext
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
LOOP = {"dtype": "float32", "compile": False, "diagnostics_every": 0, "threads": 1, "optimizer": "adamw"}


def tiny_model(folder: Path, seed: int = 1) -> Path:
    config = ModelConfig(vocab_size=VOCAB_SIZE, intermediate_size=48, max_position_embeddings=128, **SHAPE)
    save_model(initial_decoder(config, seed=seed), folder / "base", tokenizer=write_small_tokenizer(folder / "tokenizer"))
    return folder / "base"


def row(*texts):
    """Vectors, roles, groups and texts of one row."""
    vectors, *columns = zip(*texts, strict=True)
    return torch.tensor([vectors]), *(torch.tensor([column]) for column in columns)


def test_the_loss_is_that_of_a_case_worked_by_hand():
    # cosines of the question: 1 with its passage, 0 with the other; at a temperature of 1/2 e² and 1
    texts = row(((1.0, 0.0), QUERY, 1, 1), ((1.0, 0.0), POSITIVE, 1, 1), ((0.0, 1.0), NEGATIVE, 0, 2))
    losses = info_nce(*texts, temperature=0.5)
    torch.testing.assert_close(losses, torch.tensor([[math.log(math.e**2 + 1) - 2, 0.0, 0.0]]))
    assert is_nearest(*texts).tolist() == [[True, False, False]]


def test_the_passages_of_other_questions_are_negatives_as_in_cross_entropy():
    torch.manual_seed(0)
    questions, passages = normalize(torch.randn(5, 8), dim=-1), normalize(torch.randn(5, 8), dim=-1)
    vectors = torch.stack([questions, passages], 1).reshape(1, 10, 8)
    role = torch.tensor([[QUERY, POSITIVE] * 5])
    group = torch.arange(1, 6).repeat_interleave(2)[None]
    expected = cross_entropy(questions @ passages.T / 0.1, torch.arange(5), reduction="none")
    torch.testing.assert_close(info_nce(vectors, role, group, group, 0.1)[0, 0::2], expected)


def test_a_copy_of_the_right_passage_is_no_negative():
    right, other = ((1.0, 0.0), POSITIVE, 1, 1), ((0.6, 0.8), NEGATIVE, 0, 2)
    question, copy = ((0.0, 1.0), QUERY, 1, 1), ((1.0, 0.0), POSITIVE, 2, 1)
    alone = info_nce(*row(question, right, other), temperature=1.0)[0, 0]
    torch.testing.assert_close(info_nce(*row(question, right, other, copy), temperature=1.0)[0, 0], alone)
    # the copy's own question has the same passages to be compared with
    second = ((0.0, 1.0), QUERY, 2, 1)
    torch.testing.assert_close(info_nce(*row(question, right, other, copy, second), temperature=1.0)[0, 4], alone)


def test_gradients_are_those_of_finite_differences_and_none_flow_to_what_is_not_compared():
    torch.manual_seed(0)
    vectors = torch.randn(1, 6, 3, dtype=torch.float64, requires_grad=True)
    role = torch.tensor([[QUERY, POSITIVE, NEGATIVE, POSITIVE, 0, 0]])
    group, text = torch.tensor([[1, 1, 0, 2, 0, 0]]), torch.tensor([[1, 1, 2, 1, 0, 0]])
    assert torch.autograd.gradcheck(lambda given: info_nce(given, role, group, text, 0.3), vectors)
    info_nce(vectors, role, group, text, 0.3).sum().backward()
    assert vectors.grad is not None and (vectors.grad.abs().sum(-1) > 0).tolist() == [[True, True, True, False, False, False]]


def test_a_text_has_the_vector_that_the_engine_gives_it(tmp_path):
    model = tiny_model(tmp_path)
    texts = [QuestionRow("the end", "thin", ("in the",)), QuestionRow("9", "he is in", ())]
    packed = pack_questions(texts, load_tokenizer(model), 64, seed=0)
    decoder = load_model(model).float().eval()
    with torch.no_grad():
        (vectors,) = pooled(decoder, packed.batch, LossContext())
    found = {tuple(vector.tolist()) for vector in vectors.round(decimals=4)}
    with Engine(model, device="cpu") as engine:
        shown = ["the end", "thin", "in the", "9", "he is in"]
        expected = engine.embed([engine.tokenizer.encode(text) for text in shown]).round(decimals=4)
    for vector in expected:
        assert min((vector - torch.tensor(one)).abs().max() for one in found) < 2e-4


def test_the_loss_of_a_batch_is_that_of_its_rows(tmp_path):
    model = tiny_model(tmp_path)
    texts = [QuestionRow(f"the {number}", f"in {number}", ("thin",)) for number in range(8)]
    packed = pack_questions(texts, load_tokenizer(model), 32, seed=0)
    assert packed.rows > 1 and packed.questions == 8
    decoder, objective = load_model(model).float().train(), ContrastiveObjective(0.1)
    whole = objective(decoder, packed.batch, LossContext()).sums["contrastive"]
    parts = [objective(decoder, packed.batch.rows(slice(place, place + 1)), LossContext()) for place in range(packed.rows)]
    torch.testing.assert_close(torch.stack([part.sums["contrastive"] for part in parts]).sum(), whole)
    assert objective.denominators(packed.batch)["contrastive"].value == 8


def test_long_texts_are_cut_and_negatives_that_do_not_fit_are_left_out(tmp_path):
    tokenizer = load_tokenizer(tiny_model(tmp_path))
    packed = pack_questions([QuestionRow("the end", "in " * 500, ("the " * 500,) * 9)], tokenizer, 64, seed=0)
    assert packed.batch.tokens_BT.shape == (1, 64)
    assert sorted(packed.batch.per_sequence["role"][0].tolist())[:2] == [QUERY, POSITIVE]
    with pytest.raises(SourceError, match="no row holds two passages to tell apart"):
        pack_questions([QuestionRow("the end", "in")], tokenizer, 64, seed=0)


def test_a_model_learns_which_passage_answers_over_seeds(tmp_path):
    words = ["the", "in", "he", "thin", "end", "is"]
    rows = [{"question": word, "text": f"{number} {number}", "negatives": []} for number, word in enumerate(words)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    values = {"data": ["rows.jsonl"], "validation_share": 0, "learning_rate": 1e-2, "batch_size": 1, "context_length": 96}
    before, after = [], []
    for seed in range(3):
        model = tiny_model(tmp_path / str(seed), seed)
        (tmp_path / str(seed) / "out").mkdir()
        config = EmbedderConfig.parse({**values, "steps": 25, **LOOP}, "embedder")
        embedder(config, model, tmp_path / str(seed) / "out", seed=seed, device="cpu", folder=tmp_path)
        for kept, folder in ((before, model), (after, tmp_path / str(seed) / "out" / "model")):
            with Engine(folder, device="cpu") as engine:
                encode = engine.tokenizer.encode
                questions = engine.embed([encode(one["question"]) for one in rows])
                texts = engine.embed([encode(one["text"]) for one in rows])
            kept.append(((questions @ texts.T).argmax(-1) == torch.arange(len(rows))).float().mean().item())
    assert sum(after) >= sum(before) + 1 and sum(after) / 3 > 0.8


def test_a_mistake_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "the end", "txt": "in"}\n', encoding="utf-8")
    with pytest.raises(ArtefactError, match=r"rows.jsonl:1: has no field 'text'"):
        read_questions(tmp_path / "rows.jsonl", 4)
    for values, reason in (
        ({"data": ["made/cited"]}, "'made/cited' is no file of rows"),
        ({"data": ["a.jsonl"], "tasks": ["sums"]}, "it can answer no tasks"),
        ({"data": ["a.jsonl"], "temperature": 0}, "temperature"),
    ):
        with pytest.raises(ConfigError, match=reason):
            EmbedderConfig.parse(values, "embedder")
