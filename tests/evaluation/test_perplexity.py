import math
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch

import bessemer
from bessemer.core.environment import install_extra
from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.progress import Silent
from bessemer.data.config import CleanConfig
from bessemer.data.corpus.reader import iterate_documents
from bessemer.data.stages.clean import outside_files
from bessemer.data.text.texts import Texts
from bessemer.evaluation import bits_per_byte as perplexity
from bessemer.evaluation.bits_per_byte import open_document_scorer
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.storage.folder import save_model
from bessemer.pipeline.stages import open_language_model
from bessemer.tokenization.config import TokenizeConfig
from bessemer.tokenization.stage import tokenize
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.tokenization.conftest import synthetic_corpus, write_corpus

CONTEXT = 64
TEXTS = ["", "A furnace.", "The melt burns. " * 5, "zq" * 300, "é\n" * 40]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained model with a tokenizer, beside what a run's folder has."""
    root = tmp_path_factory.mktemp("run")
    write_corpus(root / "documents", synthetic_corpus(20))
    tokenize(TokenizeConfig(vocab_size=300), root / "documents", root, seed=3, progress=Silent())
    tokenizer = load_tokenizer(root / "tokenizer")
    torch.manual_seed(1)
    shape = ModelConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=16,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.bos_id,
    )
    decoder = Decoder(shape)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.3)
    save_model(decoder, root / "model", tokenizer=root / "tokenizer")
    return root / "model"


def by_transformers(folder, text):
    """Bits per byte by the peer: a forward pass for each window."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, peer = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    row = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    nats = 0.0
    for first in range(0, len(row) - 1, CONTEXT):
        window = torch.tensor([row[first : first + CONTEXT + 1]])
        with torch.no_grad():
            logits = peer(window[:, :-1]).logits.double().log_softmax(-1)
        nats -= float(logits.gather(-1, window[:, 1:, None]).sum())
    return nats / math.log(2) / len(text.encode())


def test_documents_score_as_by_transformers_one_by_one(model):
    found = open_document_scorer(model, "cpu").bits_per_byte(Texts.of(TEXTS))
    assert found[0] == 0
    assert found[1:] == pytest.approx([by_transformers(model, text) for text in TEXTS[1:]], rel=1e-5)


def test_a_documents_score_does_not_depend_on_its_neighbours_or_the_size_of_batches(model, monkeypatch):
    scorer = open_document_scorer(model, "cpu")
    together = scorer.bits_per_byte(Texts.of(TEXTS))
    alone = np.concatenate([scorer.bits_per_byte(Texts.of([text])) for text in TEXTS])
    monkeypatch.setattr(perplexity, "_BATCH_TOKENS", CONTEXT)
    assert together == pytest.approx(alone, rel=1e-5)
    assert together == pytest.approx(scorer.bits_per_byte(Texts.of(TEXTS)), rel=1e-5)


def test_a_model_is_opened_once_and_let_go_with_its_last_user(model):
    first = open_document_scorer(model, "cpu")
    assert open_document_scorer(model, "cpu") is first
    del first
    assert not perplexity._open


def test_a_recipe_may_score_by_a_model_and_drop_what_surprises_it(model):
    texts = ["The furnace melts ore.", "qwzx vkjh pqqq", ""]
    settings = {"score": [], "perplexity": str(model.parent)}  # a run's folder will do
    kept, _ = bessemer.refine(pa.table({"text": texts[:2]}), {"clean": settings})
    scores = dict(zip(kept.column("text").to_pylist(), kept.column("perplexity_bits_per_byte").to_pylist(), strict=True))
    expected = open_language_model(model)(Texts.of(texts[:2]))
    assert [scores[text] for text in texts[:2]] == pytest.approx(expected, abs=5.1e-5)
    limit = {"keep": "all", "languages": [], "thresholds": {"perplexity_bits_per_byte": {"max": sum(expected) / 2}}}
    kept, dropped = bessemer.refine(pa.table({"text": texts[:2]}), {"clean": settings, "select": limit})
    assert (len(kept), len(dropped)) == (1, 1)
    assert dropped.column("reason")[0].as_py().startswith("perplexity: bits per byte ")


def test_the_key_of_clean_holds_the_models_hash(model, tmp_path):
    config = CleanConfig(perplexity=str(model))
    before = outside_files(config, tmp_path)
    assert {name for _, name, _ in before} >= {"config.json", "model.safetensors", "tokenizer.json"}
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert outside_files(config, tmp_path) != before
    finally:
        weights.write_bytes(content)
    with pytest.raises(ConfigError, match=r"clean\.perplexity: there is no folder"):
        outside_files(CleanConfig(perplexity="none"), tmp_path)


def test_a_folder_without_weights_is_named(model, tmp_path):
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(ArtefactError, match="safetensors"):
        bessemer.refine(pa.table({"text": ["a"]}), {"clean": {"score": [], "perplexity": str(tmp_path)}})


def test_a_machine_without_pytorch_says_what_it_needs(model):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import bessemer, pyarrow as pa\n"
        "from bessemer.core.errors import ConfigError\n"
        "try:\n"
        f"    bessemer.refine(pa.table({{'text': ['a']}}), {{'clean': {{'score': [], 'perplexity': {str(model)!r}}}}})\n"
        "except ConfigError as error: print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True).stdout
    assert f"the package torch is missing on this machine: {install_extra('train')}" in said


@pytest.mark.slow  # processes that load PyTorch
def test_scores_by_a_model_are_the_same_however_many_threads_work(model, tmp_path):
    from bessemer.data.stages.clean import clean

    found = []
    for name, processes in (("threads", False), ("processes", True)):
        (tmp_path / name).mkdir()
        config = CleanConfig(score=[], perplexity=str(model), processes=processes)
        clean(config, model.parent / "documents", tmp_path / name, open_model=open_language_model)
        found.append([row for batch in iterate_documents(tmp_path / name / "documents") for row in batch.to_pylist()])
    assert found[0] == found[1]
