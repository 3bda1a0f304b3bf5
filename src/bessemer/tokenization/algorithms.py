"""One way in for every algorithm that learns a vocabulary."""

from __future__ import annotations

from collections.abc import Iterable

from bessemer.tokenization.config import BYTE_TOKENS, TokenizeConfig
from bessemer.tokenization.parts import TokenizerParts


def train(config: TokenizeConfig, texts: Iterable[str]) -> TokenizerParts:
    """The tokenizer that `config.algorithm` learns from the texts, of `config.learned_tokens` tokens.

    The texts are read once and not kept: memory grows with the number of different words, not with the corpus. The same
    texts give the same tokenizer on any machine. The vocabulary of `word`, `character` and `byte` may be smaller than asked
    for. Raises ConfigError when the texts are too few for the vocabulary, or its size too small for their characters.
    """
    size, longest = config.learned_tokens, config.max_piece_length
    # each imported where it is used: a recipe that trains BPE does not need the sentencepiece library
    if config.algorithm == "bpe":
        from bessemer.tokenization.bpe import byte_level_bpe, train_bpe
        from bessemer.tokenization.split import SPLIT_REGEXES

        regex = SPLIT_REGEXES[config.split]
        tokens = train_bpe(texts, size - BYTE_TOKENS, regex, trainer=config.trainer, max_piece_length=longest)
        return byte_level_bpe(tokens, config.split)
    if config.algorithm in ("unigram", "sentencepiece_bpe"):
        from bessemer.tokenization import sentencepieces

        learn = sentencepieces.train_unigram if config.algorithm == "unigram" else sentencepieces.train_bpe
        return learn(texts, size, max_piece_length=longest)
    if config.algorithm == "wordpiece":
        from bessemer.tokenization.wordpiece import train_wordpiece

        return train_wordpiece(texts, size)
    from bessemer.tokenization import baselines

    if config.algorithm == "word":
        return baselines.word_level(texts, size)
    if config.algorithm == "character":
        return baselines.character_level(texts, size)
    return baselines.byte_level(config.split)
