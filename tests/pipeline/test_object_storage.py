"""A run whose documents lie on object storage: later stages, `clean` and `forget` find them there."""

from __future__ import annotations

import shutil

import pytest
from typer.testing import CliRunner

from bessemer.cli.main import app
from bessemer.core.store import Artefact
from bessemer.data.corpus.reader import find_document
from bessemer.pipeline.api import execute, prepare
from bessemer.pipeline.forget import forget, trace
from tests.conftest import SECRET
from tests.pipeline.test_forget import id_of, made, place  # noqa: F401

STAGES = ("collect", "clean", "deduplicate", "select")


@pytest.fixture
def runs(place, bucket):  # noqa: F811
    """Two runs of one recipe: to the disk, and with all documents and the source in a bucket; their folders' stages."""
    bucket.put("in/texts.jsonl", (place / "texts.jsonl").read_bytes())
    changes = [f"{stage}.storage={bucket.address}/out" for stage in STAGES]
    changes += [f"collect.sources=[{{source: files, paths: '{bucket.address}/in/*.jsonl'}}]"]
    result = execute(prepare("recipe.yaml", changes, runs="elsewhere"))
    return (place / "runs" / "small" / "stages", {stage.stage.name: stage.artefact for stage in result.made})


def parts_in(stages):
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes() for path in (stages / "select").resolve().glob("*/part-*.parquet")
    }


def test_later_stages_read_documents_from_object_storage_and_nothing_keeps_a_credential(runs, place, bucket):  # noqa: F811
    here, there = runs
    tokens = Artefact("", (here / "tokenize").resolve()).manifest["outputs"]
    assert there["tokenize"].manifest["outputs"] == tokens
    key = there["select"].key
    assert bucket.objects(f"out/{key}") == parts_in(here)
    assert not list((place / "elsewhere" / ".store").rglob("part-*.parquet"))
    files = [path for path in (place / "elsewhere").rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    there["select"].verify()

    shutil.rmtree(next((place / "elsewhere").glob("small*")))
    told = CliRunner().invoke(app, ["clean", "--runs", "elsewhere", "--dry-run"]).output
    assert f"would remove {key}" in told and f"what it put at {bucket.address}/out/{key} stays there" in told


def test_a_document_is_forgotten_on_object_storage_as_on_the_disk(runs, place, bucket):  # noqa: F811
    here, there = runs
    identity = id_of(place, "The name of the founder", "select")
    copies = place / "elsewhere" / ".cache" / "documents" / there["select"].key
    assert list(copies.iterdir())
    for folder in ("runs", "elsewhere"):
        forget(place / folder, trace(place / folder, identity))
    assert bucket.objects(f"out/{there['select'].key}") == parts_in(here)
    assert find_document(there["select"].folder / "documents", identity) is None
    assert not copies.exists()
    there["select"].verify()
