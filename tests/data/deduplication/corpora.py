"""Small corpora for the tests, and what findings make of them."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pyarrow as pa

from bessemer.data.deduplication.corpus import Corpus, Documents
from bessemer.data.text.texts import hash_text


def stream(texts: dict[int, str], *, batch_rows: int = 3, order: Iterable[int] | None = None, **more: dict) -> Documents:
    """Documents by number, in batches, in any order; the number is the id, so that it is the rank as well."""
    numbers = list(order if order is not None else texts)
    columns = {
        "id": [f"{number:032x}" for number in numbers],
        "text": [texts[number] for number in numbers],
        "text_hash": [hash_text(texts[number]) for number in numbers],
        **{name: [values.get(number) for number in numbers] for name, values in more.items()},
    }
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    return lambda names: (
        table.select(list(names)).slice(i, batch_rows).to_batches()[0] for i in range(0, len(table), batch_rows)
    )


def corpus_of(texts: dict[int, str] | list[str], *, earlier: dict[int, str] | None = None, **settings) -> Corpus:
    """A corpus of texts by number, or of a list."""
    return Corpus.of(stream(numbered(texts), **settings), None if earlier is None else stream(earlier))


def numbered(texts: dict[int, str] | list[str]) -> dict[int, str]:
    return texts if isinstance(texts, dict) else dict(enumerate(texts))


def applied(finding, texts: dict[int, str] | list[str]) -> dict[int, tuple[str, str | None]]:
    """What a finding makes of documents: number to (text, reason)."""
    texts = numbered(texts)
    ids = pa.array([f"{number:032x}" for number in texts], pa.string())
    found, reasons = finding.apply(ids, pa.array(list(texts.values()), pa.string()))
    return dict(zip(texts, zip(found.to_pylist(), reasons.to_pylist(), strict=True), strict=True))


def dropped(finding, texts) -> dict[int, str]:
    """Numbers and reasons of the documents dropped, ids in reasons as numbers: `duplicate of 3`."""
    return {
        number: re.sub(r"\b0[0-9a-f]{31}\b", lambda found: str(int(found.group(), 16)), reason)
        for number, (_, reason) in applied(finding, texts).items()
        if reason is not None
    }
