"""Unigram and BPE as SentencePiece has them, trained by its library (Kudo 2018; Kudo & Richardson 2018).

A space is written `▁` (U+2581), and a character that the vocabulary lacks is written as its UTF-8 bytes. Nothing is normalised
and no space is put before the text, so decoding restores the text, except that a `▁` in it becomes a space.

The library gets words with their counts instead of the text, which it would hold in memory to count them. `WORD` cuts where
SentencePiece lets no piece cross (before spaces, around digits, between a letter and punctuation). So BPE gives the same
merges as from the text, except for the order of equally frequent pairs; Unigram starts from other seed pieces, see
`_sentences`. The trained tokenizer cuts text at the same places, which makes encoding faster and changes no id.
"""

from __future__ import annotations

import base64
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from bessemer.core.errors import ConfigError
from bessemer.tokenization.bpe import too_small_corpus
from bessemer.tokenization.config import BYTE_TOKENS
from bessemer.tokenization.folder import TokenizerParts, bpe_model
from bessemer.tokenization.vocabulary import SPACE_MARK, byte_name

UNKNOWN_PIECE = "<unk>"

_LETTER = rf"[^\x00-\x40\x5B-\x60\x7B-\x7F{SPACE_MARK}]"
_SYMBOL = r"[\x00-\x2F\x3A-\x40\x5B-\x60\x7B-\x7F]"
#: What a piece cannot reach beyond, spaces already written `▁`: spaces, then letters (with everything that is not ASCII), or a
#: single digit, or ASCII punctuation and control characters. SentencePiece cuts at these places too, because no piece of it
#: crosses scripts; only here punctuation is also cut between ASCII and other. Spaces at the end of a text have a branch of
#: their own: without it the regex would try a long run from each of its spaces.
WORD = rf"{SPACE_MARK}*(?:{_LETTER}+|[0-9]|{_SYMBOL}+)|{SPACE_MARK}+"

#: Characters that are always in the vocabulary, so that code and JSON need no byte tokens, whatever the corpus.
_REQUIRED = "\t\n" + "".join(map(chr, range(0x21, 0x7F)))
#: Characters that the library cannot learn: it drops a sentence with U+2585, takes a tab for a separator and loses line ends.
#: Characters of the private use area that the corpus lacks stand in for them.
_STAND_INS = "\t\n\r\u2585"
_PRIVATE_USE = range(0xE000, 0xF8FF)
#: Largest corpus for Unigram. To find seed pieces the library repeats each word as often as it was counted, and needs 13 bytes
#: of memory a character.
_SEED_CHARACTERS = 10_000_000
#: Seed pieces, as a multiple of the vocabulary: with more (the library takes up to a million) training is slower, not better.
_SEEDS_PER_TOKEN = 10
#: Rounds of expectation and maximisation between two prunings. The library's default, two, takes half as long again for the
#: same quality.
_ROUNDS_PER_PRUNING = 1
#: Fixed, because the last bits of the library's sums depend on the number of threads.
_THREADS = 16
#: Scores are multiples of this, so that the float32 sums of sentencepiece and the float64 sums of tokenizers are the same
#: number up to 2¹⁸ nats (some 30,000 tokens) and the two find the same segmentation, ties included.
_SCORE_STEP = 2.0**-6

#: Steps of a normalizer that leave one space of a run, and none around the text.
MERGE_SPACES: tuple[dict[str, Any], ...] = (
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    {"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""},
)

_Type = Literal["unigram", "bpe"]


def train_unigram(texts: Iterable[str], size: int, *, max_piece_length: int = 256) -> TokenizerParts:
    """A Unigram model with byte fallback of `size` tokens: `<unk>`, the 256 bytes, then pieces by falling probability.

    A run of letters, of punctuation or of spaces is cut after `max_piece_length` characters; pieces have at most 16. From a
    corpus of more than 10 million characters the words' counts are scaled down to that many, rare words kept by their hash.
    The same texts give the same tokens on any number of cores. Raises ConfigError when the vocabulary is too large for the
    texts, or too small for their characters.
    """
    return unigram_parts([(piece, _rounded(score)) for piece, score in _train("unigram", texts, size, max_piece_length)])


def train_sentencepiece_bpe(texts: Iterable[str], size: int, *, max_piece_length: int = 256) -> TokenizerParts:
    """SentencePiece's BPE with byte fallback, of `size` tokens: `<unk>`, the 256 bytes, merges in their order, characters.

    As `train_unigram` in everything else.
    """
    return bpe_parts([piece for piece, _ in _train("bpe", texts, size, max_piece_length)])


def unigram_parts(pieces: Sequence[tuple[str, float]]) -> TokenizerParts:
    """The parts of a Unigram model with `<unk>` at 0, the bytes at 1 to 256, and these pieces with their scores after them.

    `tokenizers` also matches the names of byte tokens in the text. A typed `<0x41>` is still written by its characters, because
    `WORD` cuts it.
    """
    names = [UNKNOWN_PIECE, *map(byte_name, range(BYTE_TOKENS))]
    vocab = [[piece, score] for piece, score in (*((name, 0.0) for name in names), *pieces)]
    return _parts({"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": True})


def bpe_parts(pieces: Sequence[str]) -> TokenizerParts:
    """The parts of a BPE with `<unk>` at 0, the bytes at 1 to 256, and these pieces, the first to be merged first."""
    vocab = [UNKNOWN_PIECE, *map(byte_name, range(BYTE_TOKENS)), *pieces]
    return _parts(bpe_model(vocab, merges_of(pieces), unk_token=UNKNOWN_PIECE, byte_fallback=True))


def merges_of(pieces: Sequence[str]) -> list[list[str]]:
    """All pairs of pieces that together are a piece, in the order of the pieces they form.

    SentencePiece has no list of merges: any two neighbours that form a piece may be joined, the best piece first, then the
    leftmost. Of several pairs for one piece, the pair with the longer left part comes first.
    """
    known = set(pieces)
    return [
        [piece[:cut], piece[cut:]]
        for piece in pieces
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in known and piece[cut:] in known
    ]


def _parts(model: dict[str, Any]) -> TokenizerParts:
    return TokenizerParts(
        size=len(model["vocab"]),
        model=model,
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Metaspace", "replacement": SPACE_MARK, "prepend_scheme": "never", "split": False},
                {"type": "Split", "pattern": {"Regex": WORD}, "behavior": "Isolated", "invert": False},
            ],
        },
        decoder=meta_to_spaces(prefix=False),
    )


def spaces_to_meta(*, prefix: bool, merge: bool = False, charsmap: bytes | None = None) -> dict[str, Any]:
    """The `normalizer` of a published SentencePiece model: spaces become U+2581.

    prefix: a space is put before the text. merge: runs of spaces become one space, and spaces around the text are dropped.
    charsmap: SentencePiece's compiled table of normalisations.
    """
    steps: list[dict[str, Any]] = []
    if charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    if merge:
        steps += MERGE_SPACES
    if prefix:
        steps.append({"type": "Prepend", "prepend": SPACE_MARK})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK})
    return {"type": "Sequence", "normalizers": steps} if len(steps) > 1 else steps[0]


def meta_to_spaces(*, prefix: bool) -> dict[str, Any]:
    """The `decoder` of a SentencePiece model: U+2581 becomes a space, and byte tokens become their bytes. prefix: the space
    that the normalizer put before the text is removed."""
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _rounded(score: float) -> float:
    return round(score / _SCORE_STEP) * _SCORE_STEP


def _train(kind: _Type, texts: Iterable[str], size: int, max_piece_length: int) -> list[tuple[str, float]]:
    """The pieces after the bytes with their scores, as the library returns them."""
    import sentencepiece

    counts = count_sentencepiece_words(texts, max_piece_length)
    if not counts:
        raise ConfigError("tokenize: the training texts hold nothing to learn a vocabulary from; give more text")
    if kind == "unigram":
        counts = _scaled(counts, _SEED_CHARACTERS)
    there = _stand_ins(counts)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"{text.translate(there)}\t{count}" for text, count in _sentences(counts)),
            input_format="tsv",
            model_writer=model,
            model_type=kind,
            vocab_size=size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            required_chars=_REQUIRED.translate(there),
            unk_id=0,
            unk_piece=UNKNOWN_PIECE,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            seed_sentencepiece_size=_SEEDS_PER_TOKEN * size,
            num_sub_iterations=_ROUNDS_PER_PRUNING,
            num_threads=_THREADS,
            max_sentence_length=1 << 30,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(error, size) from None
    back = {ord(private): own for own, private in there.items()}
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    first = BYTE_TOKENS + 1
    return [(processor.id_to_piece(id).translate(back), processor.get_score(id)) for id in range(first, size)]


def count_sentencepiece_words(texts: Iterable[str], max_piece_length: int) -> Counter[str]:
    """Counts of words (`WORD`), spaces written `▁`, longer runs cut, without NUL and lone surrogates."""
    limit = f"{{1,{max_piece_length}}}"
    letter, symbol = _LETTER.replace(SPACE_MARK, rf"{SPACE_MARK}\uD800-\uDFFF"), _SYMBOL.replace(r"\x00", r"\x01")
    spaces = f"{SPACE_MARK}{{0,{max_piece_length}}}"
    words = re.compile(f"{spaces}(?:{letter}{limit}|[0-9]|{symbol}{limit})|{SPACE_MARK}{limit}")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(words.findall(text.replace(" ", SPACE_MARK)))
    return counts


def _sentences(counts: Counter[str]) -> Iterator[tuple[str, int]]:
    """Texts with their counts that hold each word as often as it was counted.

    A string becomes a seed piece of the Unigram trainer only if two of its occurrences continue differently, which a word that
    always stands alone never does. So each repeated word is followed once by another word, whose own count falls by one. The
    library cuts the two apart again at the space.
    """
    left = Counter(counts)
    followers = sorted((word for word in counts if word[0] == SPACE_MARK), key=lambda word: (-counts[word], word))
    spare = (word for word in followers for _ in range(counts[word] // 2))
    for word in sorted(counts):
        if counts[word] > 1 and word[-1] != SPACE_MARK and (follower := next(spare, None)):
            left[word] -= 1
            left[follower] -= 1
            yield word + follower, 1
    yield from sorted((word, count) for word, count in left.items() if count)


def _scaled(counts: Counter[str], characters: int) -> Counter[str]:
    """The counts, scaled down in proportion to a corpus of about this many characters.

    A fraction is rounded up or down by the word's hash, so that some rare words stay.
    """
    total = sum(len(word) * count for word, count in counts.items())
    if total <= characters:
        return counts
    share = characters / total
    scaled = {word: int(count * share + zlib.crc32(word.encode()) / 2**32) for word, count in counts.items()}
    return Counter({word: count for word, count in scaled.items() if count})


def _stand_ins(words: Iterable[str]) -> dict[int, str]:
    """A private-use character that no word has, for each character of `_STAND_INS`."""
    used: set[str] = set()
    for word in words:
        used.update(word)
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    return {ord(own): private for own, private in zip(_STAND_INS, free, strict=False)}


def _explained(error: RuntimeError, size: int) -> ConfigError:
    """The library's error as a ConfigError that says by how much to change the vocabulary size."""
    if match := re.search(r"set it to a value <= (\d+)", str(error)):
        return too_small_corpus("learned tokens", size, int(match[1]))
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        least = int(match[1])
        return ConfigError(
            f"tokenize.vocab_size: the characters of the corpus alone make {least:,} learned tokens, bytes included, and "
            f"{size:,} are asked for; raise vocab_size by {least - size:,} or more"
        )
    return ConfigError(f"tokenize: the sentencepiece library cannot learn from these texts: {error}")
