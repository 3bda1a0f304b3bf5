"""The documents of a token stream: their shuffled order, their sources, and fill-in-the-middle.

Order: a Feistel permutation with cycle walking (Black and Rogaway 2002, method 3), a pure function of (seed, step) that needs
no stored list.

Fill-in-the-middle (Bavarian et al. 2022): a document is split at two random positions, and some documents are reordered to

    PSM    <prefix> prefix <suffix> suffix <middle> middle
    SPM    <prefix> <suffix> suffix <middle> prefix middle

The begin token stays in front, the next document's ends the middle, and every token has a loss. Documents are split between
tokens, since shards hold no text; the order is a hash of (seed, epoch, the document's position in the stream).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from bessemer.core.hashing import derive_seed, hash_value
from bessemer.tokenization.prompts import FimTokens
from bessemer.tokenization.shards import TokenShards

_ROUNDS = 6


def permuted(positions: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The images of `positions` under a pseudorandom permutation of range(`size`), chosen by `seed`.

    positions: integers in [0, size), any shape. Returns int64 of the same shape; distinct positions stay distinct.
    """
    assert size >= 1 and (positions.size == 0 or (positions.min() >= 0 and positions.max() < size))
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = [np.uint64(derive_seed(seed, "feistel", number)) for number in range(_ROUNDS)]
    values = _feistel(positions.astype(np.uint64), half_bits, keys)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], half_bits, keys)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: int, keys: list[np.uint64]) -> np.ndarray:
    """The Feistel network on numbers of 2 × half_bits bits."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (mix(right + key) & mask)
    return (left << shift) | right


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def memmapped_arrays(
    folder: Path | None, key: str, dtypes: Mapping[str, DTypeLike], chunks: Iterable[Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The one-dimensional arrays named in `dtypes`, each the concatenation of its chunks.

    With a folder they are memory-mapped files below `folder/key`; an existing one holds the same chunks, and `chunks` is not
    read. It is renamed into place when complete, so that several processes may compute it at once.
    """
    if folder is None:
        parts: dict[str, list[np.ndarray]] = {name: [np.empty(0, dtype)] for name, dtype in dtypes.items()}
        for chunk in chunks:
            for name, dtype in dtypes.items():
                parts[name].append(chunk[name].astype(dtype))
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}
    place = folder / key
    if not place.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=folder))
        with ExitStack() as files:
            streams = {name: files.enter_context((unfinished / name).open("wb")) for name in dtypes}
            for chunk in chunks:
                for name, dtype in dtypes.items():
                    streams[name].write(np.ascontiguousarray(chunk[name], dtype).data)
        try:
            unfinished.rename(place)
        except OSError:
            if not place.is_dir():
                raise
            # another process has written the file meanwhile
            shutil.rmtree(unfinished)
    return {name: _mapped(place / name, np.dtype(dtype)) for name, dtype in dtypes.items()}


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if not path.stat().st_size:
        # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


class DocumentSources:
    """The sources of a stream's documents by position. Ten bytes a document."""

    def __init__(self, shards: TokenShards, scratch: Path | None = None) -> None:
        """Read the index of documents; with a folder `scratch`, once, memory-mapped from there on."""
        #: Names by source number.
        self.names = shards.sources
        dtypes = {"starts": np.int64, "sources": np.int16}
        arrays = memmapped_arrays(scratch, f"sources-{shards.fingerprint}", dtypes, _chunks(shards))
        self._starts = arrays["starts"]
        self._sources = arrays["sources"]

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The sources' numbers, int16, of the documents that hold these positions of the stream; any shape."""
        return self._sources[np.searchsorted(self._starts, positions, side="right") - 1]

    def between(self, start: int, length: int) -> np.ndarray:
        """The sources' numbers of `length` tokens of the stream from `start` on: int16 (length,)."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        end = int(np.searchsorted(self._starts, start + length))
        borders = np.concatenate([[start], self._starts[first + 1 : end], [start + length]])
        return np.repeat(self._sources[first:end], np.diff(borders))


def _chunks(shards: TokenShards) -> Iterator[dict[str, np.ndarray]]:
    start = 0
    for lengths, sources in shards.lengths_and_sources():
        ends = start + np.cumsum(lengths)
        yield {"starts": ends - lengths, "sources": sources}
        start = int(ends[-1])


#: Control tokens that rearranging adds to a document.
ADDED_TOKENS = 3
#: A document with fewer tokens is not rearranged: it cannot be split into three parts.
_LEAST_TOKENS = 3


@dataclass(frozen=True)
class FillInTheMiddle:
    """Rearranges documents. rate: fraction of documents; spm_rate: of these, the fraction in SPM order; sources: numbers of the
    sources whose documents may be rearranged, None: all."""

    tokens: FimTokens
    begin_id: int
    rate: float
    spm_rate: float
    seed: int
    sources: Collection[int] | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines the result."""
        sources = None if self.sources is None else sorted(self.sources)
        return hash_value([vars(self.tokens), self.begin_id, self.rate, self.spm_rate, self.seed, sources])

    def window(
        self, window: np.ndarray, start: int, epoch: int, document_sources: DocumentSources | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A window of the stream from `start` on with its documents rearranged, of the same length.

        Each segment of a document is rearranged by itself ("context-level", section 3.4 of the paper), and the window is cut at
        its end by the number of added tokens. Returns the tokens and, of each segment, its position in the stream and its
        length in the result. document_sources: needed where only some sources may be rearranged.
        """
        begins = np.flatnonzero(window == self.begin_id)
        offsets = begins if len(begins) and begins[0] == 0 else np.concatenate([[0], begins])
        chosen, draws = self._chosen(start + offsets, epoch)
        if self.sources is not None:
            assert document_sources is not None
            chosen &= np.isin(document_sources.at(start + offsets), list(self.sources))
        parts: list[np.ndarray] = []
        lengths: list[int] = []
        free = len(window)
        for segment, is_chosen, draw in zip(np.split(window, offsets[1:]), chosen, draws, strict=True):
            lead = int(segment[0] == self.begin_id)
            body = segment[lead : max(lead, free - ADDED_TOKENS)]
            if is_chosen and len(body) >= _LEAST_TOKENS:
                parts += [segment[:lead], self._rearranged(body, draw)]
                lengths.append(lead + len(body) + ADDED_TOKENS)
            else:
                parts.append(segment[:free])
                lengths.append(len(parts[-1]))
            free -= lengths[-1]
            if not free:
                break
        return np.concatenate(parts), start + offsets[: len(lengths)], np.array(lengths)

    def document(self, tokens: np.ndarray, start: int, epoch: int, source: int) -> np.ndarray:
        """A segment of a document from `start` on and the token after it, rearranged or unchanged.

        Where the token after it begins the next document, it ends the rearranged one too; else it is dropped.
        """
        chosen, draws = self._chosen(np.array([start]), epoch)
        lead, ended = int(tokens[0] == self.begin_id), int(tokens[-1] == self.begin_id)
        body = tokens[lead:-1]
        allowed = self.sources is None or source in self.sources
        if not (allowed and chosen[0] and len(body) >= _LEAST_TOKENS):
            return tokens
        return np.concatenate([tokens[:lead], self._rearranged(body, draws[0]), tokens[len(tokens) - ended :]])

    def _chosen(self, positions: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Whether each document is rearranged, (P,), and four uniform numbers in [0, 1) for it, (P, 4)."""
        key = np.uint64(derive_seed(self.seed, "fill in the middle", epoch))
        four = np.arange(4, dtype=np.uint64) << np.uint64(60)
        draws = mix(mix(positions.astype(np.uint64) ^ key)[:, None] ^ four) / 2.0**64
        return draws[:, 0] < self.rate, draws

    def _rearranged(self, body: np.ndarray, draw: np.ndarray) -> np.ndarray:
        first, second = sorted((draw[2:] * (len(body) + 1)).astype(np.int64).tolist())
        prefix, middle, suffix = body[:first], body[first:second], body[second:]
        begin_prefix, begin_suffix, begin_middle = (
            np.array([id], body.dtype) for id in (self.tokens.prefix, self.tokens.suffix, self.tokens.middle)
        )
        if draw[1] < self.spm_rate:
            return np.concatenate([begin_prefix, begin_suffix, suffix, begin_middle, prefix, middle])
        return np.concatenate([begin_prefix, prefix, begin_suffix, suffix, begin_middle, middle])
