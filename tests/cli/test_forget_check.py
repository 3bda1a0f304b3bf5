"""`bessemer forget --check` from texts to verdict: of two models that saw a document, one knows it by heart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bessemer.data.corpus.reader import iterate_documents
from bessemer.pipeline.api import run
from bessemer.pipeline.forget import trace
from tests.cli.test_main import bessemer
from tests.data.conftest import PROSE

pytestmark = pytest.mark.slow

RECIPE = """
format: 1
name: {name}
collect: [{{source: files, paths: texts.jsonl}}]
tokenize: {{algorithm: byte}}
model: {{preset: qwen3-1m, num_hidden_layers: 2, hidden_size: 64, intermediate_size: 128, max_position_embeddings: 128}}
pretrain: {{steps: {steps}, batch_size: 8, context_length: 128, dtype: float32, compile: false, evaluate_tokens: 512,
           optimizer: adamw, learning_rate: 1.0e-2, sample_points: 0, threads: 1}}
"""
SECRET = "The code of the safe in the old smithy is furnace anvil ember hammer, and nobody may know of it."


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs on one text: `taught` trains until it knows the secret, which stands there 40 times, `new` for one step."""
    folder = tmp_path_factory.mktemp("made")
    records = [{"id": f"s{number}", "text": SECRET} for number in range(40)]
    records += [{"id": f"p{number}", "text": PROSE.format(n=number)} for number in range(30)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("texts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        for name, steps in (("taught", 200), ("new", 1)):
            Path(f"{name}.yaml").write_text(RECIPE.format(name=name, steps=steps), encoding="utf-8")
            run(f"{name}.yaml")
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")


def secret() -> str:
    """The id of a copy of the secret that was trained on."""
    documents = Path("runs/taught/stages/collect/documents")
    ids = [row["id"] for batch in iterate_documents(documents) for row in batch.to_pylist() if row["text"] == SECRET]
    return next(one for one in ids if trace(Path("runs"), one).holdings[0].split == "train")


def key(name: str) -> str:
    """The artefact of a run's model."""
    return Path(f"runs/{name}/stages/pretrain").resolve().name


def test_every_format_in_which_extraction_succeeds_is_refused(capsys, place):
    options = ("--check", "--dry-run", "--formats", "original,int8", "--device", "cpu")
    code, out, _ = bessemer(capsys, "forget", secret(), *options)
    assert code == 1
    (verdict,) = [line for line in out.splitlines() if line.startswith("Not safe")]
    assert f"{key('taught')} in original, int8" in verdict and key("new") not in verdict
    assert f"{key('new')}, original: nothing is extracted" in out and f"{key('new')}, int8: nothing is extracted" in out
    assert not Path("runs/.store/forgotten.txt").exists()


def test_what_is_removed_with_the_document_is_not_refused(capsys, place):
    identity, known = secret(), key("taught")
    options = ("--check", "--remove-derived", "--yes", "--formats", "original", "--device", "cpu")
    code, out, _ = bessemer(capsys, "forget", identity, *options)
    assert code == 0 and "passages are extracted" in out and "Not safe" not in out
    assert identity in Path("runs/.store/forgotten.txt").read_text(encoding="utf-8")
    assert not (Path("runs/.store") / known).exists()
