"""Training of a vocabulary by any algorithm; WordPiece, and the baselines word, character and byte.

WordPiece is BERT's (Schuster & Nakajima 2012; Devlin et al. 2019), trained with `tokenizers`. Text is cut at white space and
around punctuation and CJK characters. Pieces after the first of a word begin with `##`. Encoding takes the longest piece that
fits, from the left; a word that the vocabulary cannot spell, or of more than 100 characters, is `[UNK]`. It is lossy: white
space and unknown words cannot be decoded.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from bessemer.tokenization.bpe import byte_level_bpe, too_small_corpus, train_bpe
from bessemer.tokenization.config import BYTE_TOKENS, Algorithm
from bessemer.tokenization.folder import TokenizerParts, bpe_model
from bessemer.tokenization.sentencepieces import UNKNOWN_PIECE, train_sentencepiece_bpe, train_unigram
from bessemer.tokenization.split import SPLIT_REGEXES
from bessemer.tokenization.vocabulary import byte_name


def train_vocabulary(
    texts: Iterable[str],
    algorithm: Algorithm,
    size: int,
    *,
    split: str = "qwen2",
    trainer: Literal["rustbpe", "tokenizers"] = "rustbpe",
    max_piece_length: int = 256,
) -> TokenizerParts:
    """Train a tokenizer of `size` tokens, control tokens not counted.

    split, trainer: settings of byte-level BPE, as in `TokenizeConfig`. max_piece_length: longer runs are cut, in characters.
    The texts are streamed: memory grows with the number of different words, not with the corpus. The same texts give the same
    tokenizer on any machine. The vocabulary of `word`, `character` and `byte` may be smaller than `size`. Raises ConfigError
    when the texts are too few for the vocabulary, or its size is too small for their characters.
    """
    if algorithm == "bpe":
        regex = SPLIT_REGEXES[split]
        tokens = train_bpe(texts, size - BYTE_TOKENS, regex, trainer=trainer, max_piece_length=max_piece_length)
        return byte_level_bpe(tokens, split)
    if algorithm in ("unigram", "sentencepiece_bpe"):
        learn = train_unigram if algorithm == "unigram" else train_sentencepiece_bpe
        return learn(texts, size, max_piece_length=max_piece_length)
    if algorithm == "wordpiece":
        return train_wordpiece(texts, size)
    if algorithm == "word":
        return word_level(texts, size)
    if algorithm == "character":
        return character_level(texts, size)
    return byte_level(split)


_WHITE_SPACE = re.compile(r"\s+")


def word_level(texts: Iterable[str], size: int) -> TokenizerParts:
    """The most frequent words between white space; any other word is `<unk>`, and white space decodes as one space.

    Equally frequent words are taken in sorted order.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word in _WHITE_SPACE.split(text) if word)
    counts.pop(UNKNOWN_PIECE, None)
    vocab = [UNKNOWN_PIECE, *_most_frequent(counts, size - 1)]
    return TokenizerParts(
        size=len(vocab),
        model={"type": "WordLevel", "vocab": {word: id for id, word in enumerate(vocab)}, "unk_token": UNKNOWN_PIECE},
        pre_tokenizer={"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Removed", "invert": False},
        decoder=None,
        unk_token=UNKNOWN_PIECE,
    )


def character_level(texts: Iterable[str], size: int) -> TokenizerParts:
    """The 256 bytes and the most frequent characters; any other character is written as its UTF-8 bytes."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    vocab = [*map(byte_name, range(BYTE_TOKENS)), *_most_frequent(counts, size - BYTE_TOKENS)]
    return TokenizerParts(
        size=len(vocab),
        model=bpe_model(vocab, [], byte_fallback=True),
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
    )


def byte_level(split: str) -> TokenizerParts:
    """The 256 bytes: byte-level BPE without merges. The split has no effect on ids; GGUF stores its name."""
    return byte_level_bpe([bytes([byte]) for byte in range(BYTE_TOKENS)], split)


def _most_frequent(counts: Counter[str], limit: int) -> list[str]:
    return sorted(counts, key=lambda entry: (-counts[entry], entry))[:limit]


WORDPIECE_UNKNOWN = "[UNK]"
CONTINUATION = "##"
MAX_WORD_CHARACTERS = 100

#: Largest share of the vocabulary for single characters, with and without `##`. Words with rarer ones are `[UNK]`.
_CHARACTER_SHARE = 0.5
_WORDS_PER_TEXT = 4096


def train_wordpiece(texts: Iterable[str], size: int) -> TokenizerParts:
    """A WordPiece vocabulary of `size` tokens: `[UNK]`, the characters, `##` and characters, then pieces by falling frequency.

    Nothing is lower-cased and no accent is stripped. The trainer joins the most frequent pair of pieces, as BPE does, and not
    the one that raises the likelihood most, as Schuster & Nakajima describe. The same texts give the same vocabulary. Raises
    ConfigError when the texts hold too few different pairs.
    """
    words = count_bert_words(texts)
    characters = _most_frequent_characters(words, int(size * _CHARACTER_SHARE) // 2)
    spelt = {word: count for word, count in sorted(words.items()) if characters.issuperset(word)}
    continuations = {CONTINUATION + character for word in spelt for character in word[1:]}
    tokenizer = Tokenizer(models.WordPiece(unk_token=WORDPIECE_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        # given because the trainer would number `##x` in the order of a hash table, and it breaks ties by number: the
        # vocabulary would differ from run to run
        special_tokens=[WORDPIECE_UNKNOWN, *sorted(characters), *sorted(continuations)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_repeated(spelt), trainer)
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    if len(vocab) < size:
        raise too_small_corpus("learned tokens", size, len(vocab))
    return TokenizerParts(
        size=size,
        model={
            "type": "WordPiece",
            "unk_token": WORDPIECE_UNKNOWN,
            "continuing_subword_prefix": CONTINUATION,
            "max_input_chars_per_word": MAX_WORD_CHARACTERS,
            "vocab": vocab,
        },
        pre_tokenizer={"type": "BertPreTokenizer"},
        decoder={"type": "WordPiece", "prefix": CONTINUATION, "cleanup": False},
        normalizer={
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": False,
            "lowercase": False,
        },
        unk_token=WORDPIECE_UNKNOWN,
    )


def count_bert_words(texts: Iterable[str]) -> Counter[str]:
    """Counts of the words that BERT's pre-tokenizer makes, without those too long to be encoded."""
    between_spaces: Counter[str] = Counter()
    for text in texts:
        between_spaces.update(text.split(" "))
    normalizer = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for run, count in between_spaces.items():
        # BERT always cuts at spaces, so each run between spaces is normalised and cut once, whatever stands around it
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(run)):
            if len(word) <= MAX_WORD_CHARACTERS:
                counts[word] += count
    return counts


def _most_frequent_characters(words: Counter[str], limit: int) -> set[str]:
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    return set(_most_frequent(counts, limit))


def _repeated(words: dict[str, int]) -> Iterator[str]:
    """Each word as often as it was counted: the trainer takes text, not counts."""
    for word, count in words.items():
        for start in range(0, count, _WORDS_PER_TEXT):
            yield " ".join([word] * min(_WORDS_PER_TEXT, count - start))
