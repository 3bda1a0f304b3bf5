"""Fill-in-the-middle: a model of code learns to write between what stands before and after (Bavarian et al. 2022).

A document is cut at two random places into prefix, middle and suffix, and some documents are shown in another order:

    PSM    <prefix> prefix <suffix> suffix <middle> middle
    SPM    <prefix> <suffix> suffix <middle> prefix middle

with control tokens for the words in angle brackets. The begin token stays before them, and the next document's ends the
middle, so that a model that is asked to fill stops by itself. The loss is taken on every token, as it was. The documents
are cut between tokens, not inside of them, since shards hold no text.

Where the order is decided: per document and epoch, by a hash of (seed, epoch, the document's place in the stream).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_value
from bessemer.core.seeds import derive_seed
from bessemer.tokenization.special import FILL_IN_THE_MIDDLE_SPELLINGS
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.data.document_sources import DocumentSources
from bessemer.training.data.shuffle import mix

#: What rearranging adds to a document.
ADDED_TOKENS = 3
#: A document with fewer tokens stays as it is: it has no three parts.
_LEAST_TOKENS = 3


@dataclass(frozen=True)
class MiddleTokens:
    """The control tokens, by what they stand before."""

    prefix: int
    suffix: int
    middle: int


def middle_tokens(tokenizer: Tokenizer) -> MiddleTokens:
    """The tokenizer's control tokens for filling in, in one of the spellings of published models.

    Raises ConfigError when it has none.
    """
    for spelling in FILL_IN_THE_MIDDLE_SPELLINGS:
        ids = [tokenizer.control_id(token) for token in spelling]
        if None not in ids:
            return MiddleTokens(*(id for id in ids if id is not None))
    names = ", ".join(FILL_IN_THE_MIDDLE_SPELLINGS[0])
    raise ConfigError(
        f"fim_rate needs the control tokens {names}, which this tokenizer lacks; train it with "
        "tokenize.fim_tokens, or add them to it with `bessemer extend --special`"
    )


@dataclass(frozen=True)
class FillInTheMiddle:
    """Rearranges documents. rate: share of them; spm_rate: of these, the share in the order SPM; sources: the numbers of
    those whose documents may be rearranged, None: all."""

    tokens: MiddleTokens
    begin_id: int
    rate: float
    spm_rate: float
    seed: int
    sources: Collection[int] | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides what is done."""
        sources = None if self.sources is None else sorted(self.sources)
        return hash_value([vars(self.tokens), self.begin_id, self.rate, self.spm_rate, self.seed, sources])

    def window(
        self, window: np.ndarray, start: int, epoch: int, origins: DocumentSources | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A window of the stream from `start` on with the documents in it rearranged, of the same length.

        Each part of a document is taken as a whole of its own ("context-level", section 3.4 of the paper), and the
        tokens that are added are taken off the window's end. Returns the tokens and, of each part of a document, its place
        in the stream and its length in the result. origins: tells the sources, where only some may be rearranged.
        """
        begins = np.flatnonzero(window == self.begin_id)
        places = begins if len(begins) and begins[0] == 0 else np.concatenate([[0], begins])
        chosen, draws = self._chosen(start + places, epoch)
        if self.sources is not None:
            assert origins is not None
            chosen &= np.isin(origins.at(start + places), list(self.sources))
        parts: list[np.ndarray] = []
        lengths: list[int] = []
        room = len(window)
        for piece, is_chosen, draw in zip(np.split(window, places[1:]), chosen, draws, strict=True):
            lead = int(piece[0] == self.begin_id)
            body = piece[lead : max(lead, room - ADDED_TOKENS)]
            if is_chosen and len(body) >= _LEAST_TOKENS:
                parts += [piece[:lead], self._rearranged(body, draw)]
                lengths.append(lead + len(body) + ADDED_TOKENS)
            else:
                parts.append(piece[:room])
                lengths.append(len(parts[-1]))
            room -= lengths[-1]
            if not room:
                break
        return np.concatenate(parts), start + places[: len(lengths)], np.array(lengths)

    def document(self, tokens: np.ndarray, start: int, epoch: int, source: int) -> np.ndarray:
        """A piece of a document from `start` on, and the token that follows it, rearranged or as they are.

        Where the token that follows begins the next document, it ends this one in the new order too; else it is left out.
        """
        chosen, draws = self._chosen(np.array([start]), epoch)
        lead, ended = int(tokens[0] == self.begin_id), int(tokens[-1] == self.begin_id)
        body = tokens[lead:-1]
        allowed = self.sources is None or source in self.sources
        if not (allowed and chosen[0] and len(body) >= _LEAST_TOKENS):
            return tokens
        return np.concatenate([tokens[:lead], self._rearranged(body, draws[0]), tokens[len(tokens) - ended :]])

    def _chosen(self, places: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Whether each document is rearranged, (P,), and four numbers in [0, 1) for it, (P, 4)."""
        key = np.uint64(derive_seed(self.seed, "fill in the middle", epoch))
        four = np.arange(4, dtype=np.uint64) << np.uint64(60)
        draws = mix(mix(places.astype(np.uint64) ^ key)[:, None] ^ four) / 2.0**64
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
