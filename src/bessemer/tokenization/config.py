"""Settings of the stage `tokenize`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import field_validator, model_validator

from bessemer.core.config import Config, nearest, setting
from bessemer.tokenization.control_tokens import control_tokens
from bessemer.tokenization.split import SPLIT_REGEXES

#: Raised whenever the stage's output changes; a golden hash in the tests guards it.
TOKENIZE_VERSION = 3

#: Algorithms that learn a vocabulary.
Algorithm = Literal["bpe", "unigram", "sentencepiece_bpe", "wordpiece", "word", "character", "byte"]

#: Every byte is a token, so that any text can be encoded.
BYTE_TOKENS = 256


class TokenizeConfig(Config):
    """Settings of training a tokenizer and encoding documents with it."""

    algorithm: Algorithm = setting(
        "bpe",
        "bpe (byte-level), unigram, sentencepiece_bpe, wordpiece; and for comparison word, character and byte, whose "
        "vocabulary may come out smaller than vocab_size",
    )
    vocab_size: int = setting(
        4096, "size of the vocabulary, control tokens and reserved ones included", unit="tokens", le=1 << 24
    )
    split: str = setting(
        "qwen2",
        "bpe only: regex that cuts the text before merging, by llama.cpp's name: qwen2, qwen35, llama-bpe, smollm or gpt-2",
    )
    trainer: Literal["rustbpe", "tokenizers"] = setting(
        "rustbpe", "bpe only: library that trains it; they differ where two pairs are equally frequent"
    )
    chat_template: Literal["chatml", "llama3", "plain"] = setting(
        "chatml", "chat template stored in the tokenizer's folder; its control tokens end the vocabulary"
    )
    reserved_tokens: int = setting(0, "free control tokens at the vocabulary's end, <|reserved_0|> and on", unit="tokens", ge=0)
    fim_tokens: bool = setting(
        False, "control tokens for fill-in-the-middle (`pretrain.fim_rate`): <|fim_prefix|>, <|fim_suffix|>, <|fim_middle|>"
    )
    tokenizer: str | None = setting(
        None,
        "folder of a tokenizer to encode with, instead of training one (its files, not its place, enter the stage's key)",
        affects_output=False,
    )
    training_bytes: int = setting(
        200_000_000,
        "train on at most about this much text, drawn from the training documents by hash",
        unit="bytes of UTF-8",
        ge=1,
    )
    source_weights: dict[str, float] = setting(
        description="how much of a source's text is drawn for training, relative to the others (1 where not named)",
        default_factory=dict,
    )
    max_piece_length: int = setting(
        256, "in training, a run without white space, or of it, is cut after this length", unit="characters", ge=1
    )
    shard_tokens: int = setting(
        1 << 25, "a shard of tokens is closed by the document that reaches this length", unit="tokens", ge=1
    )

    @field_validator("split")
    @classmethod
    def _known_split(cls, name: str) -> str:
        if name not in SPLIT_REGEXES:
            raise ValueError(f"no split regex is named {name!r}{nearest(name, list(SPLIT_REGEXES))}")
        return name

    @field_validator("source_weights")
    @classmethod
    def _weights(cls, weights: dict[str, float]) -> dict[str, float]:
        for source, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"the weight of {source!r} must be a number of at least 0, got {weight}")
        return weights

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The control tokens of the tokenizer to be trained, reserved ones included, in the order of their ids."""
        return control_tokens(self.chat_template, self.reserved_tokens, self.fim_tokens)

    @property
    def learned_tokens(self) -> int:
        """Size of the learned vocabulary, without control tokens; the 256 bytes included."""
        return self.vocab_size - len(self.control_tokens)

    @model_validator(mode="after")
    def _room_for_bytes(self) -> Self:
        smallest = BYTE_TOKENS + len(self.control_tokens)
        if self.vocab_size < smallest:
            raise ValueError(
                f"vocab_size must be at least {smallest} (256 bytes and {len(self.control_tokens)} control tokens), "
                f"got {self.vocab_size}"
            )
        return self
