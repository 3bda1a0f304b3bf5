"""The stage `forgetting`: rows of texts to forget and to keep, from a corpus, which `preference` with `loss: npo` reads.

A row is {prompt, completion, label}: the first words of a text, what follows them, and false for what is to be forgotten.
Copies of a text give one row, and near-copies one each, since each may be what a model knows.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bessemer.core.errors import SourceError
from bessemer.core.hashing import hash_value
from bessemer.data.corpus.reader import TRAIN, iterate_documents
from bessemer.data.sources.canaries import alike_canaries, settings_in
from bessemer.data.sources.registry import CanariesSource
from bessemer.posttraining.data.made import write_rows
from bessemer.posttraining.synthetic.config import ForgettingConfig

#: The file of rows.
FORGETTING_FILE = "forgetting.jsonl"
_WORD = re.compile(r"\s*\S+")


def forgetting(config: ForgettingConfig, documents: Path, out: Path, *, seed: int) -> dict[str, Any]:
    """Write `forgetting.jsonl` from the training documents of a folder; returns the numbers of its rows.

    Raises SourceError for an id or a source that no document has, and for documents that are all to be forgotten.
    """
    wanted, sources = set(config.ids), set(config.sources)
    met: set[str] = set()
    forget: dict[str, None] = {}
    drawn: list[tuple[str, str]] = []
    planted: CanariesSource | None = None
    for batch in iterate_documents(documents, ["id", "source", "text", "metadata"], TRAIN):
        for row in batch.to_pylist():
            if row["id"] in wanted or row["source"] in sources:
                met |= {row["id"], row["source"]}
                planted = planted or settings_in(dict(row["metadata"] or ()))
                forget.setdefault(row["text"])
            else:
                drawn.append((hash_value([seed, row["id"]]), row["text"]))
        drawn = heapq.nsmallest(config.keep, drawn)
    missing = sorted((wanted | sources) - met)
    if missing:
        raise SourceError(f"{documents}: no document to train on has the id or the source {missing[0]!r}")
    if config.alike and planted is None:
        raise SourceError(f"{documents}: alike makes texts of the form of canaries, and none is to be forgotten; leave it out")
    alike = [] if planted is None else [canary.text for canary in alike_canaries(planted, config.alike)]
    rows = [text for whole in forget for text in _texts(whole, config)]
    others = [*(whole for _, whole in drawn if whole not in forget), *alike]
    kept = [text for whole in others for text in list(_texts(whole, config))[:1]]
    if not rows or not kept:
        raise SourceError(f"{documents}: the documents to {'keep' if rows else 'forget'} have too few words")
    write_rows(
        out / FORGETTING_FILE,
        [
            {"prompt": prompt, "completion": completion, "label": label}
            for label, some in ((False, rows), (True, kept))
            for prompt, completion in some
        ],
    )
    return {"documents": len(forget), "forget": len(rows), "keep": len(kept)}


def _texts(document: str, config: ForgettingConfig) -> Iterator[tuple[str, str]]:
    """(first words, the rest) of the pieces of a document; the space between belongs to the rest."""
    words = _WORD.findall(document)
    for start in range(0, len(words), config.words):
        piece = words[start : start + config.words]
        prompt, completion = "".join(piece[: config.prompt_words]).lstrip(), "".join(piece[config.prompt_words :])
        if completion:
            yield prompt, completion
