"""Token shards: a stream of token ids on disk, in files, with an index of its documents.

The stream is `[bos] document [bos] document … [bos]`: a document's begin token ends the one before, and one more ends
the last. The document that reaches the size of a file ends it, so no document spans two files; readers see one stream.
"""

from __future__ import annotations

import bisect
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
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

#: Folder of the training documents in the mixture for the end of training, a sibling of the splits' folders.
ANNEAL = "anneal"

#: Format of an interrupted writer's scratch files; files of another format are discarded.
_STATE_FORMAT = 1
_STATE_FILE = "state.json"
_ROWS_PER_GROUP = 1 << 16
_COUNTED_AT_ONCE = 1 << 20

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
    """The smallest dtype that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class EncodedDocuments:
    """A batch of documents and their tokens: document i has ids[offsets[i]:offsets[i+1]], without a begin token."""

    identifiers: Sequence[str] | pa.Array
    sources: Sequence[str] | pa.Array
    bytes: np.ndarray
    ids: np.ndarray
    offsets: np.ndarray


class _OpenShard:
    """The shard being written, and the index rows of its documents in a scratch file."""

    def __init__(self, path: Path, index_path: Path, dtype: np.dtype) -> None:
        self._path = path
        self._index_path = index_path
        self._dtype = dtype
        self.tokens = 0
        self.documents = 0
        self.bytes = 0
        self._stream = path.open("wb")
        self._index = pa.ipc.new_stream(str(index_path), _INDEX_SCHEMA)
        self._write_header()

    def append(self, tokens: np.ndarray) -> None:
        self._stream.write(tokens.data)
        self.tokens += len(tokens)

    def append_rows(self, rows: pa.Table, number: int, offsets: np.ndarray, text_bytes: int) -> None:
        """Index rows of documents in file `number`, whose begin tokens are at `offsets` in it."""
        rows = rows.set_column(1, _INDEX_SCHEMA.field("shard"), pa.array(np.full(rows.num_rows, number, np.int32)))
        self._index.write_table(rows.set_column(2, _INDEX_SCHEMA.field("offset"), pa.array(offsets)))
        self.documents += rows.num_rows
        self.bytes += text_bytes

    def close(self) -> dict[str, Any]:
        """Finish both files; returns the shard's entry in the state."""
        self._stream.seek(0)
        self._write_header()
        self._stream.close()
        self._index.close()
        return {
            "name": self._path.name,
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "hash": hash_file(self._path),
            "index_hash": hash_file(self._index_path),
        }

    def _write_header(self) -> None:
        """The header of np.save. The number of tokens is known only at the end, and does not change the header's length."""
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.tokens,)}
        np.lib.format.write_array_header_1_0(self._stream, header)


class ShardWriter:
    """Writes a shard folder document by document; memory holds one batch.

    With a `scratch` folder it can be killed at any moment: a new writer of the same `identity` resumes after the last complete
    shard, `documents` is the number of documents already written, and the result is the same, byte for byte. Files that have
    changed, or that have another identity, are written again.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tokenizer_hash: str,
        vocab_size: int,
        bos_id: int,
        shard_tokens: int,
        scratch: Path | None = None,
        identity: str = "",
    ) -> None:
        """identity: hash of everything that determines the documents and their order. scratch: None for no resume."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._tokenizer_hash = tokenizer_hash
        self._vocab_size = vocab_size
        self._bos_id = bos_id
        self._shard_tokens = shard_tokens
        self._dtype = token_dtype(vocab_size)
        self._keeps_scratch = scratch is not None
        self._scratch = scratch or folder / ".index"
        self._identity = hash_value([_STATE_FORMAT, identity, tokenizer_hash, vocab_size, bos_id, shard_tokens])
        self._shards: list[dict[str, Any]] = []
        self._ended = False
        if self._keeps_scratch:
            self._shards, self._ended = self._restored()
        self._clear_unknown()
        self._open: _OpenShard | None = None

    @property
    def tokens(self) -> int:
        """Tokens so far, begin tokens included."""
        return sum(shard["tokens"] for shard in self._shards) + (self._open.tokens if self._open else 0)

    @property
    def documents(self) -> int:
        """Documents so far, those of an interrupted writer included."""
        return sum(shard["documents"] for shard in self._shards) + (self._open.documents if self._open else 0)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the documents so far."""
        return sum(shard["bytes"] for shard in self._shards) + (self._open.bytes if self._open else 0)

    def add(self, batch: EncodedDocuments) -> None:
        """Append a batch of documents."""
        assert not self._ended, "the stream has ended"
        lengths = np.diff(batch.offsets) + 1
        with_bos = np.insert(batch.ids.astype(self._dtype), batch.offsets[:-1], self._bos_id)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        rows = pa.table(
            [batch.identifiers, np.zeros(len(lengths), np.int32), starts[:-1], lengths, batch.bytes, batch.sources],
            schema=_INDEX_SCHEMA,
        )
        first = 0
        while first < len(lengths):
            shard = self._open_shard()
            left = self._shard_tokens - shard.tokens
            # the document that reaches the size included
            end = min(int(np.searchsorted(starts, starts[first] + left)), len(lengths))
            offsets = shard.tokens + starts[first:end] - starts[first]
            shard.append(with_bos[starts[first] : starts[end]])
            shard.append_rows(rows.slice(first, end - first), len(self._shards), offsets, int(batch.bytes[first:end].sum()))
            if shard.tokens >= self._shard_tokens:
                self._close_shard()
            first = end

    def finish(self) -> dict[str, Any]:
        """End the stream, write the index of documents and `shards.json`; returns the content of the latter."""
        if not self._ended:
            if self.documents:
                self._open_shard().append(np.array([self._bos_id], self._dtype))
            self._ended = True
            if self._open:
                self._close_shard()
        self._join_index()
        description = {
            "format": SHARDS_FORMAT,
            "tokenizer_hash": self._tokenizer_hash,
            "vocab_size": self._vocab_size,
            "dtype": self._dtype.name,
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "shards": [{"name": shard["name"], "tokens": shard["tokens"]} for shard in self._shards],
        }
        description["fingerprint"] = hash_value([description, [shard["hash"] for shard in self._shards]])
        write_json(self._folder / SHARDS_FILE, description)
        if not self._keeps_scratch:
            shutil.rmtree(self._scratch)
        return description

    def _open_shard(self) -> _OpenShard:
        if self._open is None:
            number = len(self._shards)
            self._open = _OpenShard(self._folder / f"tokens-{number:05d}.npy", self._index_path(number), self._dtype)
        return self._open

    def _close_shard(self) -> None:
        assert self._open is not None
        self._shards.append(self._open.close())
        self._open = None
        if self._keeps_scratch:
            state = {"identity": self._identity, "ended": self._ended, "shards": self._shards}
            write_json(self._scratch / _STATE_FILE, state)

    def _join_index(self) -> None:
        """Write one Parquet file of all index rows, in row groups of a fixed length, whatever the batches and files."""
        with pq.ParquetWriter(self._folder / DOCUMENTS_FILE, _INDEX_SCHEMA, compression="zstd") as writer:
            pending = _INDEX_SCHEMA.empty_table()
            for number in range(len(self._shards)):
                with pa.memory_map(str(self._index_path(number))) as source:
                    for batch in pa.ipc.open_stream(source):
                        pending = pa.concat_tables([pending, pa.Table.from_batches([batch])])
                        while pending.num_rows >= _ROWS_PER_GROUP:
                            writer.write_table(pending.slice(0, _ROWS_PER_GROUP).combine_chunks())
                            pending = pending.slice(_ROWS_PER_GROUP)
                    pending = pending.combine_chunks()
            if pending.num_rows:
                writer.write_table(pending)

    def _index_path(self, number: int) -> Path:
        return self._scratch / f"index-{number:05d}.arrow"

    def _restored(self) -> tuple[list[dict[str, Any]], bool]:
        """The complete shards of an interrupted writer of this identity; none when a file has changed."""
        try:
            state = read_json(self._scratch / _STATE_FILE)
            if state["identity"] == self._identity and all(map(self._is_whole, range(len(state["shards"])), state["shards"])):
                return state["shards"], state["ended"]
        except (ArtefactError, KeyError, TypeError, OSError):
            pass
        return [], False

    def _is_whole(self, number: int, shard: dict[str, Any]) -> bool:
        hashes = hash_file(self._folder / shard["name"]), hash_file(self._index_path(number))
        return hashes == (shard["hash"], shard["index_hash"])

    def _clear_unknown(self) -> None:
        """Remove files of other writers: incomplete ones, and those of another identity."""
        known = {shard["name"] for shard in self._shards}
        if not known:
            shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(parents=True, exist_ok=True)
        for path in self._folder.glob("tokens-*.npy"):
            if path.name not in known:
                path.unlink()
        for path in (self._folder / SHARDS_FILE, self._folder / DOCUMENTS_FILE):
            path.unlink(missing_ok=True)


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
        self._names = [shard["name"] for shard in description["shards"]]
        self._maps = [self._map(shard["name"], shard["tokens"]) for shard in description["shards"]]
        self._starts = np.concatenate([[0], np.cumsum([len(tokens) for tokens in self._maps])]).astype(np.int64)

    def read(self, start: int, length: int) -> np.ndarray:
        """`length` token ids from `start` on, across files, in the shards' dtype; fewer at the end of the stream."""
        assert start >= 0 and length >= 0, (start, length)
        end = min(start + length, self.tokens)
        chunks = []
        shard = bisect.bisect_right(self._starts, start) - 1
        while start < end:
            offset = start - int(self._starts[shard])
            chunks.append(self._maps[shard][offset : offset + end - start])
            start += len(chunks[-1])
            shard += 1
        if len(chunks) == 1:
            return chunks[0]
        return np.concatenate(chunks) if chunks else np.empty(0, self.dtype)

    def usage(self) -> np.ndarray:
        """Number of occurrences of each id in the stream: int64 (vocab_size,)."""
        counts = np.zeros(self.vocab_size, np.int64)
        for name in self._names:
            # read, not mapped: mapped pages would count as this process's memory
            with (self.folder / name).open("rb") as stream:
                np.lib.format.read_magic(stream)
                np.lib.format.read_array_header_1_0(stream)
                while len(tokens := np.fromfile(stream, self.dtype, _COUNTED_AT_ONCE)):
                    counts += np.bincount(tokens, minlength=len(counts))
        return counts

    def text_tokens(self, documents: int) -> int:
        """Number of tokens of the first `documents` documents, without begin tokens."""
        counted = tokens = 0
        with pq.ParquetFile(self.folder / DOCUMENTS_FILE) as file:
            for batch in file.iter_batches(columns=["length"]):
                lengths = batch.column(0).to_numpy()[: documents - counted]
                counted += len(lengths)
                tokens += int(lengths.sum()) - len(lengths)
                if counted == documents:
                    break
        return tokens

    def lengths_and_sources(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The documents in the stream's order, a row group at a time: tokens of each, its begin token included, int64, and the
        index of its source in `sources`, int16. The stream's last begin token belongs to no document."""
        numbers = {name: number for number, name in enumerate(self.sources)}
        with pq.ParquetFile(self.folder / DOCUMENTS_FILE, read_dictionary=["source"]) as file:
            for number in range(file.num_row_groups):
                group = file.read_row_group(number, ["length", "source"])
                source = group.column("source").combine_chunks()
                codes = np.array([numbers[name] for name in source.dictionary.to_pylist()], np.int16)
                yield group.column("length").to_numpy(), codes[source.indices.to_numpy()]

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """The names of the documents' sources, sorted."""
        names: set[str] = set()
        with pq.ParquetFile(self.folder / DOCUMENTS_FILE, read_dictionary=["source"]) as file:
            for number in range(file.num_row_groups):
                names.update(file.read_row_group(number, ["source"]).column("source").unique().to_pylist())
        return tuple(sorted(names))

    def documents(self) -> pa.Table:
        """The index, one row per document in the stream's order: id, shard, offset, length, bytes, source."""
        return pq.read_table(self.folder / DOCUMENTS_FILE)

    def check_tokenizer(self, tokenizer_hash: str, what: str, extends: Sequence[str] = ()) -> None:
        """Raise ArtefactError when these shards were not encoded with the tokenizer of `what`, or with one of `extends`, which
        encode texts as it does (`extended_tokenizers`)."""
        if self.tokenizer_hash not in (tokenizer_hash, *extends):
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
