"""Settings of the `tokenize` stage."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import field_validator, model_validator

from bessemer.core.config import Config, nearest, setting
from bessemer.tokenization.special import SPECIAL_TOKENS
from bessemer.tokenization.split import SPLIT_REGEXES

#: Raised whenever the stage's output changes; a golden hash in the tests sees to it.
TOKENIZE_VERSION = 1

#: Every byte is a token, so that any text can be encoded.
BYTE_TOKENS = 256


class TokenizeConfig(Config):
    """How the tokenizer is trained and the documents are encoded."""

    algorithm: Literal["bpe"] = setting("bpe", "algorithm: byte-level byte-pair encoding")
    vocab_size: int = setting(
        4096, "size of the vocabulary: the 256 bytes, the merges and the control tokens", unit="tokens", le=1 << 24
    )
    split: str = setting("qwen2", "named regex that cuts the text before merging: qwen2, llama-bpe or gpt-2")
    chat_template: Literal["chatml"] = setting("chatml", "chat template stored in the tokenizer's folder")
    training_bytes: int = setting(
        200_000_000,
        "train on at most about this much text, drawn from the training documents by hash",
        unit="bytes of UTF-8",
        ge=1,
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

    @model_validator(mode="after")
    def _room_for_bytes(self) -> Self:
        smallest = BYTE_TOKENS + len(SPECIAL_TOKENS)
        if self.vocab_size < smallest:
            raise ValueError(
                f"vocab_size must be at least {smallest} (256 bytes and {len(SPECIAL_TOKENS)} control tokens), "
                f"got {self.vocab_size}"
            )
        return self
