"""Fill-in-the-middle: training documents rearranged so that a model learns to infill (Bavarian et al. 2022).

A document is split at two random positions into prefix, middle and suffix, and some documents are reordered:

    PSM    <prefix> prefix <suffix> suffix <middle> middle
    SPM    <prefix> <suffix> suffix <middle> prefix middle

with control tokens for the words in angle brackets. The begin token stays before them, and the next document's begin token ends
the middle, so that an infilling model stops by itself. Every token has a loss, as before. Documents are split between tokens,
not inside of them, since shards hold no text.

The order is a function of document and epoch: a hash of (seed, epoch, the document's position in the stream).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from bessemer.core.hashing import hash_value
from bessemer.core.seeds import derive_seed
from bessemer.tokenization.infill import FimTokens
from bessemer.training.data.document_sources import DocumentSources
from bessemer.training.data.shuffle import mix

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
