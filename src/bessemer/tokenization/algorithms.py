"""Training of a vocabulary by the algorithm of a name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from bessemer.tokenization.config import BYTE_TOKENS, Algorithm
from bessemer.tokenization.parts import TokenizerParts


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
    # each imported where it is used: a recipe that trains BPE does not need the sentencepiece library
    if algorithm == "bpe":
        from bessemer.tokenization.bpe import byte_level_bpe, train_bpe
        from bessemer.tokenization.split import SPLIT_REGEXES

        regex = SPLIT_REGEXES[split]
        tokens = train_bpe(texts, size - BYTE_TOKENS, regex, trainer=trainer, max_piece_length=max_piece_length)
        return byte_level_bpe(tokens, split)
    if algorithm in ("unigram", "sentencepiece_bpe"):
        from bessemer.tokenization import sentencepieces

        learn = sentencepieces.train_unigram if algorithm == "unigram" else sentencepieces.train_bpe
        return learn(texts, size, max_piece_length=max_piece_length)
    if algorithm == "wordpiece":
        from bessemer.tokenization.wordpiece import train_wordpiece

        return train_wordpiece(texts, size)
    from bessemer.tokenization import baselines

    if algorithm == "word":
        return baselines.word_level(texts, size)
    if algorithm == "character":
        return baselines.character_level(texts, size)
    return baselines.byte_level(split)
