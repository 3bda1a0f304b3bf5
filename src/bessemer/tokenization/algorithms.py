"""Training of a vocabulary by the name of its algorithm; WordPiece, and baselines of words, characters and bytes.

WordPiece as BERT has it (Schuster & Nakajima 2012; Devlin et al. 2019), trained with `tokenizers`: text is cut at white space
and around punctuation and CJK characters; the rest of a word after its first piece is written `##rest`. Encoding takes the
longest piece that fits, from the left; a word that the vocabulary cannot spell, or of more than 100 characters, is `[UNK]`.
White space and unknown words are lost: decoding does not give the text back.
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
    """The tokenizer that an algorithm learns from the texts, of `size` tokens without the control tokens.

    split, trainer: of byte-level BPE, as in `TokenizeConfig`. max_piece_length: characters after which a run is cut. The texts
    are read once and not kept: memory grows with the number of different words, not with the corpus. The same texts give the
    same tokenizer on any machine. The vocabulary of `word`, `character` and `byte` may be smaller than `size`. Raises
    ConfigError when the texts are too few for the vocabulary, or its size too small for their characters.
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

    Of equally frequent words the one that sorts first is taken.
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
    """The 256 bytes: byte-level BPE without a merge. The split regex changes nothing but names the tokenizer in GGUF."""
    return byte_level_bpe([bytes([byte]) for byte in range(BYTE_TOKENS)], split)


def _most_frequent(counts: Counter[str], limit: int) -> list[str]:
    return sorted(counts, key=lambda entry: (-counts[entry], entry))[:limit]


WORDPIECE_UNKNOWN = "[UNK]"
CONTINUATION = "##"
MAX_WORD_CHARACTERS = 100

#: At most this share of the vocabulary goes to single characters, with and without `##`; words with others are `[UNK]`.
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
        # left to itself the trainer numbers `##x` in the order of a hash table, and ties between pairs go by number: the
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
    """Counts of BERT's words, without those too long to be encoded."""
    between_spaces: Counter[str] = Counter()
    for text in texts:
        between_spaces.update(text.split(" "))
    normalizer = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for run, count in between_spaces.items():
        # what BERT does to a text it does between any two spaces of it
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
    """Every word as often as it was counted, since the trainer takes text and not counts."""
    for word, count in words.items():
        for start in range(0, count, _WORDS_PER_TEXT):
            yield " ".join([word] * min(_WORDS_PER_TEXT, count - start))
