"""Token shards: one long stream of token ids on disk, cut into files, with an index of its documents.

The stream is `[bos] document [bos] document … [bos]`: a document's begin token ends the one before, and one more ends
the last. A file is closed by the document that reaches its size, so no document lies in two files; readers see one
stream all the same.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bessemer.core.errors import ArtefactError
from bessemer.core.hashing import hash_file, hash_value
from bessemer.core.store import check_format, read_json, write_json

#: Format number of `shards.json`; raised when the shape of a shard folder changes.
SHARDS_FORMAT = 1
SHARDS_FILE = "shards.json"
DOCUMENTS_FILE = "documents.parquet"

_INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("shard", pa.int32()),  # number of the file
        ("offset", pa.int64()),  # of the begin token, in that file
        ("length", pa.int64()),  # tokens, the begin token included
        ("bytes", pa.int64()),  # of the text's UTF-8
        ("source", pa.string()),
    ]
)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class EncodedDocuments:
    """A batch of documents and their tokens: document i has ids[offsets[i]:offsets[i+1]], without a begin token."""

    identifiers: Sequence[str]
    sources: Sequence[str]
    bytes: np.ndarray
    ids: np.ndarray
    offsets: np.ndarray


@dataclass
class _OpenShard:
    """The file being filled: pieces of the stream, and its rows of the index."""

    pieces: list[np.ndarray] = field(default_factory=list)
    tokens: int = 0


class ShardWriter:
    """Writes a shard folder document by document, holding one file's tokens in memory."""

    def __init__(self, folder: Path, *, tokenizer_hash: str, vocab_size: int, bos_id: int, shard_tokens: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._tokenizer_hash, self._vocab_size, self._bos_id = tokenizer_hash, vocab_size, bos_id
        self._shard_tokens = shard_tokens
        self._dtype = token_dtype(vocab_size)
        self._open = _OpenShard()
        self._shards: list[dict[str, Any]] = []
        self._index = pq.ParquetWriter(folder / DOCUMENTS_FILE, _INDEX_SCHEMA, compression="zstd")
        self.tokens = self.documents = self.bytes = 0

    def add(self, batch: EncodedDocuments) -> None:
        """Append a batch of documents."""
        lengths = np.diff(batch.offsets) + 1
        with_bos = np.insert(batch.ids.astype(self._dtype), batch.offsets[:-1], self._bos_id)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        first = 0
        shard_numbers, shard_offsets = np.empty(len(lengths), np.int32), np.empty(len(lengths), np.int64)
        while first < len(lengths):
            room = self._shard_tokens - self._open.tokens
            end = min(int(np.searchsorted(starts, starts[first] + room)), len(lengths))  # the document that reaches it is in
            shard_numbers[first:end] = len(self._shards)
            shard_offsets[first:end] = self._open.tokens + starts[first:end] - starts[first]
            self._append(with_bos[starts[first] : starts[end]])
            if self._open.tokens >= self._shard_tokens:
                self._close_shard()
            first = end
        self.documents += len(lengths)
        self.bytes += int(batch.bytes.sum())
        self._index.write_table(
            pa.table(
                [batch.identifiers, shard_numbers, shard_offsets, lengths, batch.bytes, batch.sources], schema=_INDEX_SCHEMA
            )
        )

    def finish(self) -> dict[str, Any]:
        """End the stream, write `shards.json` and return its content."""
        self._index.close()
        if self.documents:
            self._append(np.array([self._bos_id], self._dtype))
        if self._open.tokens:
            self._close_shard()
        description = {
            "format": SHARDS_FORMAT,
            "tokenizer_hash": self._tokenizer_hash,
            "vocab_size": self._vocab_size,
            "dtype": self._dtype.name,
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "shards": self._shards,
        }
        hashes = [hash_file(self._folder / shard["name"]) for shard in self._shards]
        description["fingerprint"] = hash_value([description, hashes])
        write_json(self._folder / SHARDS_FILE, description)
        return description

    def _append(self, tokens: np.ndarray) -> None:
        self._open.pieces.append(tokens)
        self._open.tokens += len(tokens)
        self.tokens += len(tokens)

    def _close_shard(self) -> None:
        name = f"tokens-{len(self._shards):05d}.npy"
        np.save(self._folder / name, np.concatenate(self._open.pieces))
        self._shards.append({"name": name, "tokens": self._open.tokens})
        self._open = _OpenShard()


class TokenShards:
    """A shard folder, read as one memory-mapped stream of token ids."""

    def __init__(self, folder: Path | str) -> None:
        """Open a folder. Raises ArtefactError when it is missing, damaged or of another format."""
        self.folder = Path(folder)
        place = self.folder / SHARDS_FILE
        description = read_json(place, "index of token shards")
        check_format(description.get("format"), SHARDS_FORMAT, place, "index of token shards")
        self.tokens: int = description["tokens"]
        self.bytes: int = description["bytes"]
        self.vocab_size: int = description["vocab_size"]
        self.tokenizer_hash: str = description["tokenizer_hash"]
        self.fingerprint: str = description["fingerprint"]
        self.dtype = np.dtype(description["dtype"])
        self.document_count: int = description["documents"]
        self._maps = [self._map(shard["name"], shard["tokens"]) for shard in description["shards"]]
        self._starts = np.concatenate([[0], np.cumsum([len(tokens) for tokens in self._maps])]).astype(np.int64)

    def read(self, start: int, length: int) -> np.ndarray:
        """`length` token ids from `start` on, across files, in the shards' type; fewer at the end of the stream."""
        assert start >= 0 and length >= 0, (start, length)
        end = min(start + length, self.tokens)
        pieces = []
        shard = bisect.bisect_right(self._starts, start) - 1
        while start < end:
            offset = start - int(self._starts[shard])
            pieces.append(self._maps[shard][offset : offset + end - start])
            start += len(pieces[-1])
            shard += 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def documents(self) -> pa.Table:
        """The index, a row per document in the stream's order: id, shard, offset, length, bytes, source."""
        return pq.read_table(self.folder / DOCUMENTS_FILE)

    def check_tokenizer(self, tokenizer_hash: str, what: str) -> None:
        """Raise ArtefactError when these shards were not made with the tokenizer of `what`."""
        if tokenizer_hash != self.tokenizer_hash:
            raise ArtefactError(
                f"{self.folder}: these tokens were made with another tokenizer than {what}'s "
                f"({self.tokenizer_hash[:12]} and {tokenizer_hash[:12]}); tokenize the documents again with its tokenizer"
            )

    def _map(self, name: str, tokens: int) -> np.ndarray:
        path = self.folder / name
        try:
            mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ArtefactError(f"{path}: this token shard is missing or damaged ({error})") from None
        if mapped.dtype != self.dtype or mapped.shape != (tokens,):
            raise ArtefactError(f"{path}: holds {mapped.shape} {mapped.dtype}, where the index says {tokens} {self.dtype}")
        return mapped
