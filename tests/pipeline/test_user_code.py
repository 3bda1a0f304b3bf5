"""A user's own functions in a recipe: an edited file makes again what depends on it, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bessemer.data.corpus.reader import iterate_documents
from bessemer.pipeline.api import run

RECIPE = """
format: 1
name: small
collect: [{source: source.py:texts, options: {count: 20}}]
clean: {edit: [edit.py:tidy], score: [score.py:brief]}
deduplicate: [exact]
select: {keep: all, languages: [], thresholds: {brief: {min: 0.5}}}
tokenize: {algorithm: byte}
"""
FILES = {
    "source.py": "def texts(count):\n    for n in range(count):\n        yield {'id': n, 'text': f'Ingot  {n} ' + 'x' * n}\n",
    "edit.py": "def tidy(texts):\n    return [text.replace('  ', ' ') for text in texts.to_pylist()]\n",
    "score.py": "def brief(texts):\n    return [float(len(text) < 20) for text in texts.to_pylist()]\n",
}
ALL = ["collect", "clean", "deduplicate", "select", "tokenize"]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, content in {"recipe.yaml": RECIPE, **FILES}.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path


def made_by(recipe: str = "recipe.yaml") -> list[str]:
    """The stages that a run had to make."""
    return [made.stage.name for made in run(recipe, allow_code=True).made if not made.reused]


def kept(place: Path) -> list[str]:
    folder = place / "runs" / "small" / "corpus" / "documents"
    return [text for batch in iterate_documents(folder, ["text"]) for text in batch.column("text").to_pylist()]


def test_an_edited_file_of_the_users_makes_again_what_depends_on_it_and_nothing_else(place):
    assert made_by() == ALL
    before = kept(place)
    assert before and all(len(text) < 20 and "  " not in text for text in before)
    assert made_by() == []

    (place / "score.py").write_text(FILES["score.py"].replace("< 20", "< 15"), encoding="utf-8")
    assert made_by() == ALL[1:]
    assert 0 < len(kept(place)) < len(before)

    (place / "edit.py").write_text(FILES["edit.py"].replace("' ')", "'-')"), encoding="utf-8")
    assert made_by() == ALL[1:]
    assert all("Ingot-" in text for text in kept(place))

    (place / "source.py").write_text(FILES["source.py"].replace("Ingot", "Block"), encoding="utf-8")
    assert made_by() == ALL
    assert all("Block-" in text for text in kept(place))

    for name, content in FILES.items():  # as they were: what was made then is found again
        (place / name).write_text(content, encoding="utf-8")
    assert made_by() == []
    assert kept(place) == before


def test_what_a_users_filter_dropped_has_its_name_in_the_report(place):
    run("recipe.yaml", until="select", allow_code=True)
    manifest = json.loads((place / "runs/small/stages/select/manifest.json").read_text(encoding="utf-8"))
    assert set(manifest["metrics"]["by_reason"]) == {"brief"}
    assert "brief" in (place / "runs/small/report.html").read_text(encoding="utf-8")
