"""Exact duplicates: documents with the same text or the same address, of which the preferred one stays."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.hashing import hash_bytes
from bessemer.data.deduplication.corpus import Corpus, parse_ids
from bessemer.data.deduplication.removals import DuplicateRemovals
from bessemer.data.deduplication.spill import first_of_groups


def exact_duplicates(corpus: Corpus) -> DuplicateRemovals:
    """Documents with equal `text_hash`; reasons `duplicate of ID`."""
    return _first_of_equal(corpus, "text_hash", lambda hashes: hashes, "duplicate")


def url_duplicates(corpus: Corpus) -> DuplicateRemovals:
    """Documents whose `url` is the same once normalised; reasons `duplicate url of ID`. Those without one all stay."""

    def hashes(urls: pa.Array) -> pa.Array:
        normalised = (url and normalise_url(url) for url in urls.to_pylist())
        return pa.array([hash_bytes(url.encode()) if url else None for url in normalised], pa.string())

    return _first_of_equal(corpus, "url", hashes, "duplicate url")


def _first_of_equal(corpus: Corpus, column: str, hashes: Callable[[pa.Array], pa.Array], wording: str) -> DuplicateRemovals:
    """16 bytes of hash and 8 of number for each document are all that is gathered."""
    numbers, keys = [np.zeros(0, dtype=np.int64)], [np.zeros((0, 2), dtype=np.uint64)]
    for batch_numbers, batch in corpus.batches([column]):
        found = hashes(batch.column(column))
        numbers.append(batch_numbers[pc.is_valid(found).to_numpy(zero_copy_only=False)])
        keys.append(parse_ids(found.drop_null()))
    number, key = np.concatenate(numbers), np.concatenate(keys)
    order = np.lexsort((number, key[:, 1], key[:, 0]))
    number, key = number[order], key[order]
    change = np.zeros(len(key), dtype=np.int64)
    change[1:] = (key[1:] != key[:-1]).any(axis=1)
    first = number[first_of_groups(np.cumsum(change))]
    copies = np.flatnonzero(number != first)
    copies = copies[np.argsort(number[copies])]
    return DuplicateRemovals.of(wording, corpus, number[copies], first[copies])


#: Parameters that say how a reader came, not what is read.
_TRACKING = re.compile(r"utm_\w+|[a-z]{1,2}clid|dclid|fbclid|msclkid|mc_[ce]id|igshid|_ga|_gl|ref_src|spm", re.IGNORECASE)
_PORTS = {"http": 80, "https": 443, "ftp": 21}


def normalise_url(url: str) -> str | None:
    """What addresses of the same page have in common; None for what is not an address with a host.

    Without scheme, user, `www.`, the scheme's own port, tracking parameters, a slash at the end, an index page, and a fragment
    but one that begins with `!`, which names a page; the host in lower case; what is left of the parameters sorted;
    percent-encoding only where it is needed.
    """
    try:
        parts = urlsplit(url.strip())
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        return None
    if not host or re.search(r"\s", host) or parts.scheme not in _PORTS:
        return None
    path = re.sub(r"/(index|default)\.(html?|php|aspx?)$", "/", re.sub(r"/{2,}", "/", parts.path))
    path = quote(unquote(path, errors="surrogateescape"), safe="/:@!$&'()*+,;=~-._", errors="surrogateescape").rstrip("/")
    parameters = [pair for pair in parse_qsl(parts.query, keep_blank_values=True) if not _TRACKING.fullmatch(pair[0])]
    query = urlencode(sorted(parameters))
    return (
        re.sub(r"^(www\.)+", "", host)
        + (f":{port}" if port not in (None, _PORTS[parts.scheme]) else "")
        + path
        + (f"?{query}" if query else "")
        + (f"#{unquote(parts.fragment)}" if parts.fragment.startswith("!") else "")
    )
