"""The way of one document from `collect` to token shards, traced through our files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest

import bessemer
from bessemer.core.progress import Silent
from bessemer.data.config import CleanConfig, CollectConfig, DeduplicateConfig, SelectConfig
from bessemer.data.sources.source import Document
from bessemer.data.stages import collect as collecting
from bessemer.data.stages import mixture as mixture_stats
from bessemer.data.stages import transform as transforming
from bessemer.data.stages.clean import clean
from bessemer.data.stages.collect import collect
from bessemer.data.stages.deduplicate import deduplicate
from bessemer.data.stages.select import select
from bessemer.tokenization.config import TokenizeConfig
from bessemer.tokenization.shards import EncodedDocuments
from bessemer.tokenization.stage import tokenize

PACKAGE = Path(bessemer.__file__).parent
TRACED = ("data/", "tokenization/")
#: The functions that read documents from disk: a pass begins there.
READERS = (("data/corpus/reader.py", "_batches_of_part"), ("data/corpus/staging.py", "_batch"))


class DocumentTrace:
    """The files through which whole documents go, in order, and how often one comes back into a file that it has left.

    A call is a stop on the way when whole documents are among its arguments, or are what it returns or yields: a `Document`,
    Arrow rows with their texts, encoded documents, or a list of these. A generator is one stop, however often it goes on.
    Functions of columns (a score, a hash) see no document. Stops in one file one after the other are one.
    A pass ends where the document is written and begins where it is read again: a file is left and come back to within a pass.
    """

    def __init__(self) -> None:
        self.passes: list[list[str]] = [[]]
        self._stops: set[object] = set()

    def __call__(self, frame, event, argument):
        name = frame.f_code.co_filename
        if event not in ("call", "return") or not name.startswith(str(PACKAGE)) or frame.f_code.co_name.startswith("<"):
            return
        file = Path(name).relative_to(PACKAGE).as_posix()
        if not file.startswith(TRACED) or frame in self._stops:
            return
        values = arguments(frame) if event == "call" else [argument]
        if not any(is_whole(value) for value in values):
            return
        self._stops.add(frame)
        if (file, frame.f_code.co_name) in READERS and self.passes[-1]:
            self.passes.append([])
        if self.passes[-1][-1:] != [file]:
            self.passes[-1].append(file)

    @property
    def returns(self) -> int:
        """How often a file was come back to, over all passes."""
        return sum(len(files) - len(set(files)) for files in self.passes)


def arguments(frame):
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    return [frame.f_locals[name] for name in code.co_varnames[:count] if name in frame.f_locals]


def is_whole(value) -> bool:
    if isinstance(value, (pa.RecordBatch, pa.Table)):
        return "text" in value.schema.names and value.num_rows > 0
    if isinstance(value, (tuple, list)):
        return any(is_whole(item) for item in value)
    return isinstance(value, (Document, EncodedDocuments))


@pytest.fixture
def in_this_thread(monkeypatch):
    def run_tasks(function, tasks, engine=None):
        yield from ((number, json.loads(json.dumps(function(task)))) for number, task in enumerate(tasks))

    for module in (collecting, transforming, mixture_stats):
        monkeypatch.setattr(module, "run_tasks", run_tasks)


def traced(stage, *arguments, **options) -> DocumentTrace:
    trace = DocumentTrace()
    sys.setprofile(trace)
    try:
        stage(*arguments, **options)
    finally:
        sys.setprofile(None)
    return trace


@pytest.mark.slow
def test_a_document_comes_back_to_a_file_at_most_five_times(tmp_path, prose, in_this_thread):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"id": 1, "text": prose(1), "url": "https://steel.example/a"}) + "\n", encoding="utf-8"
    )
    out = {name: tmp_path / name for name in ("collect", "clean", "deduplicate", "select", "tokenize")}
    for folder in out.values():
        folder.mkdir()
    documents = {name: folder / "documents" for name, folder in out.items()}
    sources = CollectConfig.parse({"sources": [{"source": "files", "paths": "a.jsonl"}], "validation_share": 0})
    cleaning = CleanConfig.parse({"edit": ["repair", "pii"]})
    unique, limits = DeduplicateConfig.parse(["exact", "minhash"]), SelectConfig.parse({"keep": "all"})
    tokenizer = TokenizeConfig(vocab_size=300)
    traces = {
        "collect": traced(collect, sources, out["collect"], cache=tmp_path, folder=tmp_path),
        "clean": traced(clean, cleaning, documents["collect"], out["clean"]),
        "deduplicate": traced(deduplicate, unique, documents["clean"], out["deduplicate"]),
        "select": traced(select, limits, documents["deduplicate"], out["select"]),
        "tokenize": traced(tokenize, tokenizer, documents["select"], out["tokenize"], seed=1, progress=Silent()),
    }
    ways = "\n".join(f"{name}: {' > '.join(files)}" for name, trace in traces.items() for files in trace.passes)
    for name, trace in traces.items():
        assert any(trace.passes), f"{name} was not traced"
    assert sum(trace.returns for trace in traces.values()) <= 5, ways
    # a document that is read again begins a new pass: more readings do not hide more returns
    assert sum(len(trace.passes) for trace in traces.values()) <= 14, ways
