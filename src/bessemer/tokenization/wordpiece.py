"""WordPiece as BERT has it (Schuster & Nakajima 2012; Devlin et al. 2019), trained with `tokenizers`.

Text is cut at white space and around punctuation and CJK characters; the rest of a word after its first piece is written
`##rest`. Encoding takes the longest piece that fits, from the left; a word that the vocabulary cannot spell, or of more than
100 characters, is `[UNK]`. White space and unknown words are lost: decoding does not give the text back.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from bessemer.core.errors import ConfigError
from bessemer.tokenization.parts import TokenizerParts

UNKNOWN = "[UNK]"
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
    words = count_words(texts)
    characters = _most_frequent_characters(words, int(size * _CHARACTER_SHARE) // 2)
    spelt = {word: count for word, count in sorted(words.items()) if characters.issuperset(word)}
    continuations = {CONTINUATION + character for word in spelt for character in word[1:]}
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        # left to itself the trainer numbers `##x` in the order of a hash table, and ties between pairs go by number: the
        # vocabulary would differ from run to run
        special_tokens=[UNKNOWN, *sorted(characters), *sorted(continuations)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_repeated(spelt), trainer)
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    if len(vocab) < size:
        raise ConfigError(
            f"tokenize.vocab_size: the corpus is too small for this vocabulary: {size:,} learned tokens are asked for and it "
            f"yields {len(vocab):,}; lower vocab_size by {size - len(vocab):,} or more, or give more text"
        )
    return TokenizerParts(
        size=size,
        model={
            "type": "WordPiece",
            "unk_token": UNKNOWN,
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
        unk_token=UNKNOWN,
    )


def count_words(texts: Iterable[str]) -> Counter[str]:
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
    return set(sorted(counts, key=lambda character: (-counts[character], character))[:limit])


def _repeated(words: dict[str, int]) -> Iterator[str]:
    """Every word as often as it was counted, since the trainer takes text and not counts."""
    for word, count in words.items():
        for start in range(0, count, _WORDS_PER_TEXT):
            yield " ".join([word] * min(_WORDS_PER_TEXT, count - start))
