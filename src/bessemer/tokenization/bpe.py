"""Byte-level BPE, trained with rustbpe or with Hugging Face's `tokenizers`.

Training starts from the 256 bytes and repeats: count the adjacent pairs of tokens inside the pieces that the split
regex makes, turn the most frequent pair into a new token (Sennrich et al. 2016; on bytes, Radford et al. 2019). The two
trainers differ only where two pairs are equally frequent. rustbpe is faster but returns tokens and ranks only;
`merges_from_ranks` recovers the pairs, which `tokenizer.json` needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import rustbpe
import tokenizers

from bessemer.core.errors import ConfigError
from bessemer.tokenization.config import BYTE_TOKENS
from bessemer.tokenization.folder import BYTE_LEVEL_DECODER, TokenizerParts, bpe_model
from bessemer.tokenization.split import APPROXIMATED_REGEXES, SPLIT_REGEXES, pre_tokenizer
from bessemer.tokenization.vocabulary import token_from_name, vocabulary_name

#: Texts whose pieces are counted at once: at most 64 MB in memory, with the length below.
_TEXTS_PER_BATCH = 1024
_CHARACTERS_PER_TEXT = 1 << 16

#: What `\s` matches in the engines that run split regexes: Unicode's White_Space. Python's `\s` adds U+001C to U+001F.
_WHITE_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


def train_bpe(
    texts: Iterable[str],
    merges: int,
    split_regex: str,
    *,
    trainer: Literal["rustbpe", "tokenizers"] = "rustbpe",
    max_piece_length: int = 256,
) -> list[bytes]:
    """The tokens of a byte-level BPE with this many merges, by rank: the 256 bytes, then the merges in order.

    The same texts give the same tokens, on any number of threads. Runs without white space, and runs of it, are cut after
    every `max_piece_length` characters (`cut_runs`), so that a blob of base64 costs little and makes no long tokens. Texts
    stream through; memory grows with the distinct pieces only.

    Raises ConfigError when the texts hold fewer different pairs than `merges`.
    """
    texts = cut_texts(cut_runs(texts, min(max_piece_length, _CHARACTERS_PER_TEXT)), _CHARACTERS_PER_TEXT)
    tokens = (_train_rustbpe if trainer == "rustbpe" else _train_tokenizers)(texts, merges, split_regex)
    reached = len(tokens) - BYTE_TOKENS
    if reached < merges:
        # both libraries return fewer tokens without an error
        raise too_small_corpus("merges", merges, reached)
    return tokens


def too_small_corpus(unit: str, wanted: int, reached: int) -> ConfigError:
    """The error for a corpus that yields `reached` learned units (tokens, merges) of the `wanted` ones."""
    return ConfigError(
        f"tokenize.vocab_size: the corpus is too small for this vocabulary: {wanted:,} {unit} are asked for and it "
        f"yields {reached:,}; lower vocab_size by {wanted - reached:,} or more, or give more text"
    )


def _train_rustbpe(texts: Iterator[str], merges: int, split_regex: str) -> list[bytes]:
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts, BYTE_TOKENS + merges, _TEXTS_PER_BATCH, without_lookahead_first(split_regex))
    return [token for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda entry: entry[1])]


def without_lookahead_first(split_regex: str) -> str:
    """A named split's regex, grouped so that rustbpe makes the same cuts in a quarter less time.

    Its engine tries alternatives one by one when any of them has a lookahead, and a group without one all at once.
    """
    if split_regex not in (SPLIT_REGEXES | APPROXIMATED_REGEXES).values():
        return split_regex
    before, lookahead, after = split_regex.partition(r"|\s+(?!")
    return f"(?:{before}){lookahead}{after}"


def _train_tokenizers(texts: Iterator[str], merges: int, split_regex: str) -> list[bytes]:
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(split_regex), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=BYTE_TOKENS + merges, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    pairs = json.loads(trained.to_str())["model"]["merges"]
    return [bytes([byte]) for byte in range(BYTE_TOKENS)] + [token_from_name(left + right) for left, right in pairs]


def cut_runs(texts: Iterable[str], longest: int) -> Iterator[str]:
    """The texts, with every run of white space and every run without it cut after `longest` characters.

    A piece of a split regex then has at most `longest + 1` characters (a word may take the space before it), or
    `2 * longest + 1` where the regex adds line ends to punctuation. No token is longer than a piece.
    """
    over = longest + 1
    long_run = re.compile(
        f"(?<![^{_WHITE_SPACE}])[^{_WHITE_SPACE}]{{{over},}}|(?<![{_WHITE_SPACE}])[{_WHITE_SPACE}]{{{over},}}"
    )
    for text in texts:
        start = 0
        if _may_have_run(text, over):
            for run in long_run.finditer(text):
                for cut in range(run.start() + longest, run.end(), longest):
                    yield text[start:cut]
                    start = cut
        yield text[start:] if start else text


def _may_have_run(text: str, length: int) -> bool:
    """False only when no run has this many characters. Such a run covers a whole block of half its length, so it is enough to
    look for a space in each block: twenty times faster than the regex."""
    block = (length + 1) // 2
    for start in range(0, len(text) - block + 1, block):
        part = text[start : start + block]
        if (" " not in part and "\n" not in part) or part.isspace():
            return True
    return False


def cut_texts(texts: Iterable[str], longest: int) -> Iterator[str]:
    """The texts in parts of at most `longest` characters. Cuts come before a space that follows a word, where every split regex
    cuts too; without such a space, at `longest`."""
    for text in texts:
        start = 0
        while len(text) - start > longest:
            cut = text.rfind(" ", start + 1, start + longest + 1)
            while cut > 0 and text[cut - 1].isspace():
                cut = text.rfind(" ", start + 1, cut)
            if cut < 0:
                cut = start + longest
            yield text[start:cut]
            start = cut
        yield text[start:] if start else text


def merges_from_ranks(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The pair that each token after the 256 bytes was merged from, by rank.

    Encoding the token of rank r with the merges before r gives exactly its two parts: in training no earlier merge crossed
    its borders, so the text around it made no difference.
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
        model=bpe_model(list(map(vocabulary_name, tokens)), (map(vocabulary_name, pair) for pair in merges_from_ranks(tokens))),
        pre_tokenizer=pre_tokenizer(split),
        decoder=BYTE_LEVEL_DECODER,
    )
