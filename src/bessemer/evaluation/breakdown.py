"""Bits per byte of the held-out text by source, by domain, and by the position in a document.

A document's bits are those of its tokens and of the token that ends it, so the parts of each breakdown add up to the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from bessemer.data.corpus.reader import VALIDATION, iterate_documents
from bessemer.tokenization.shards import TokenShards
from bessemer.tokenization.tokenizer import Tokenizer

# Shapes: N scored tokens, D documents.

#: Tokens of a document before a token: the first of each bucket. The last has no end.
POSITIONS = (0, 16, 64, 256, 1024, 4096)
#: Domains with the most text are named; the others are one row.
MOST_DOMAINS = 20
OTHERS = "others"


@dataclass(frozen=True)
class ScoredDocuments:
    """The scored documents, in the stream's order.

    ends_D: of each, the number of scored tokens up to its end. bytes_D: of its text. sources, domains: of each; a document
    without a URL has the domain "". bytes_N: of the text that each scored token stands for, 0 for one that ends a document;
    None where the tokenizer does not give texts back.
    """

    ends_D: np.ndarray
    bytes_D: np.ndarray
    sources: Sequence[str]
    domains: Sequence[str]
    bytes_N: np.ndarray | None


def scored_documents(shards: TokenShards, documents: Path, count: int, tokenizer: Tokenizer) -> ScoredDocuments:
    """The first `count` documents of the split `validation`, in whose order the shards are. documents: their folder."""
    index = shards.documents().slice(0, count)
    urls = islice(
        (url for batch in iterate_documents(documents, ["url"], split=VALIDATION) for url in batch["url"].to_pylist()), count
    )
    ends_D = np.cumsum(index["length"].to_numpy())
    bytes_N = None
    if tokenizer.lossless:
        sizes = np.array(
            [0 if tokenizer.is_special(id) else len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size)], np.int32
        )
        bytes_N = sizes[shards.read(1, int(ends_D[-1]))]
    return ScoredDocuments(
        ends_D,
        index["bytes"].to_numpy(),
        index["source"].to_pylist(),
        [_domain(url) for url in urls],
        bytes_N,
    )


def _domain(url: str | None) -> str:
    try:
        return (urlsplit(url).hostname or "") if url else ""
    except ValueError:
        return ""


def breakdown(scored: ScoredDocuments, nats: Mapping[str, np.ndarray]) -> dict[str, list[dict[str, Any]]]:
    """Of each breakdown its rows, those with the most text first, positions in their order.

    nats: by model, what each scored token costs it, (N,). A row has its `name`, or the `first` position of its bucket; its
    `bytes`, and `documents` where it is made of whole ones; and by model `bits_per_byte`. `domain` is left out where no
    document has one, `position` where the tokenizer does not give texts back.
    """
    starts_D = np.concatenate(([0], scored.ends_D[:-1]))
    bits_D = {model: np.add.reduceat(of_model.astype(np.float64), starts_D) / math.log(2) for model, of_model in nats.items()}
    found = {"source": _by_name(scored.sources, scored.bytes_D, bits_D)}
    if any(scored.domains):
        found["domain"] = _by_name(_largest(scored.domains, scored.bytes_D), scored.bytes_D, bits_D)
    if scored.bytes_N is not None:
        lengths_D = scored.ends_D - starts_D
        positions_N = np.arange(scored.ends_D[-1]) - np.repeat(starts_D, lengths_D)
        buckets_N = np.searchsorted(POSITIONS, positions_N, side="right") - 1
        bytes_by_bucket = np.bincount(buckets_N, scored.bytes_N, len(POSITIONS))
        bits = {model: np.bincount(buckets_N, of_model, len(POSITIONS)) / math.log(2) for model, of_model in nats.items()}
        found["position"] = [
            {
                "first": first,
                "bytes": int(size),
                "bits_per_byte": {model: float(of[number] / size) for model, of in bits.items()},
            }
            for number, (first, size) in enumerate(zip(POSITIONS, bytes_by_bucket, strict=True))
            if size
        ]
    return found


def _largest(names: Sequence[str], bytes_D: np.ndarray) -> list[str]:
    """The names, but those behind the first MOST_DOMAINS in text are `others`."""
    sizes: dict[str, int] = {}
    for name, size in zip(names, bytes_D.tolist(), strict=True):
        sizes[name] = sizes.get(name, 0) + size
    kept = set(sorted(sizes, key=lambda name: (-sizes[name], name))[:MOST_DOMAINS])
    return [name if name in kept else OTHERS for name in names]


def _by_name(names: Sequence[str], bytes_D: np.ndarray, bits_D: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    known = sorted(set(names))
    numbers_D = np.searchsorted(known, names)
    sizes = np.bincount(numbers_D, bytes_D, len(known))
    bits = {model: np.bincount(numbers_D, of_model, len(known)) for model, of_model in bits_D.items()}
    rows = [
        {
            "name": name,
            "documents": int((numbers_D == number).sum()),
            "bytes": int(sizes[number]),
            "bits_per_byte": {model: float(of_model[number] / sizes[number]) for model, of_model in bits.items()},
        }
        for number, name in enumerate(known)
        if sizes[number]
    ]
    return sorted(rows, key=lambda row: (-row["bytes"], row["name"]))
