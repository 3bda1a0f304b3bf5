"""Byte-level BPE, trained with rustbpe.

Training starts from the 256 bytes and repeats: count the adjacent pairs of tokens inside the pieces that the split
regex makes, turn the most frequent pair into a new token (Sennrich et al. 2016; on bytes, Radford et al. 2019).
rustbpe gives the tokens with their ranks and not the pairs they came from, which `tokenizer.json` needs:
`merges_from_ranks` finds them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import rustbpe

from bessemer.core.errors import ConfigError
from bessemer.tokenization.byte_names import vocabulary_name
from bessemer.tokenization.config import BYTE_TOKENS
from bessemer.tokenization.parts import TokenizerParts
from bessemer.tokenization.split import pre_tokenizer

_TEXTS_PER_BATCH = 8192
#: rustbpe's regex engine keeps a stack entry per character of a run of spaces and gives up at a million.
_CHARACTERS_PER_TEXT = 1 << 16


def train_bpe(texts: Iterable[str], merges: int, split_regex: str) -> list[bytes]:
    """The tokens of a byte-level BPE with this many merges, by rank: the 256 bytes, then the merges in order.

    The same texts give the same tokens, on any number of threads. A text longer than 65,536 characters is cut there, so
    one piece in so many may be cut in two. Raises ConfigError when the texts hold fewer different pairs than `merges`.
    """
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(_cut(texts), BYTE_TOKENS + merges, _TEXTS_PER_BATCH, split_regex)
    tokens = [token for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda entry: entry[1])]
    reached = len(tokens) - BYTE_TOKENS
    if reached < merges:  # rustbpe says nothing
        raise ConfigError(
            f"tokenize.vocab_size: the corpus is too small for this vocabulary: {merges:,} merges are asked for and it "
            f"yields {reached:,}; lower vocab_size by {merges - reached:,} or more, or give more text"
        )
    return tokens


def _cut(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), _CHARACTERS_PER_TEXT):
            yield text[start : start + _CHARACTERS_PER_TEXT]


def merges_from_ranks(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The pair that each token after the 256 bytes was merged from, by rank.

    A token that training made at rank r falls into exactly its two parts when it is encoded with the merges before
    r: no merge crossed its borders where it was found, so what happened inside did not depend on what was outside.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    assert len(ranks) == len(tokens), "two merges made the same token"
    merges = []
    for rank in range(BYTE_TOKENS, len(tokens)):
        parts = encode_piece(tokens[rank], ranks, limit=rank)
        assert len(parts) == 2, f"token {tokens[rank]!r} is not a merge of two earlier ones"
        merges.append((parts[0], parts[1]))
    return merges


def encode_piece(piece: bytes, ranks: Mapping[bytes, int], limit: int) -> list[bytes]:
    """One piece of text as tokens of rank below `limit`: the adjacent pair of the lowest rank is merged, the leftmost
    first, until none is left. Quadratic in the piece's length: for short pieces."""
    parts = [piece[index : index + 1] for index in range(len(piece))]
    while len(parts) > 1:
        candidates = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        lowest = min(candidates)
        if lowest >= limit:
            break
        at = candidates.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def byte_level_bpe(tokens: Sequence[bytes], split: str) -> TokenizerParts:
    """The parts of a byte-level BPE with these tokens by rank (the 256 bytes first) and a named split regex.

    The normalizer is null: text that is not in NFC keeps its bytes.
    """
    return TokenizerParts(
        size=len(tokens),
        model={
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {vocabulary_name(token): rank for rank, token in enumerate(tokens)},
            "merges": [[vocabulary_name(left), vocabulary_name(right)] for left, right in merges_from_ranks(tokens)],
        },
        pre_tokenizer=pre_tokenizer(split),
        decoder={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    )
