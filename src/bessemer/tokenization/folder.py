"""The tokenizer as a Hugging Face folder that `transformers`, vLLM and llama.cpp's converter read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bessemer.core.store import write_json
from bessemer.tokenization.bpe import merges_from_ranks
from bessemer.tokenization.chat import CHATML
from bessemer.tokenization.special import END_OF_TEXT, IM_END, IM_START, SPECIAL_TOKENS
from bessemer.tokenization.split import SPLIT_REGEXES

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


@cache
def byte_characters() -> tuple[str, ...]:
    """The character that stands for each byte in the vocabulary, GPT-2's table: a printable byte is itself, the
    others are the characters from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


def vocabulary_name(token: bytes) -> str:
    """A token's bytes as they are written in the vocabulary."""
    return "".join(map(byte_characters().__getitem__, token))


def token_from_name(name: str) -> bytes:
    """A vocabulary entry's bytes. Raises KeyError when it is not written in bytes' characters."""
    return bytes(map(_bytes_of_characters().__getitem__, name))


@cache
def _bytes_of_characters() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(byte_characters())}


def write_folder(folder: Path, tokens: Sequence[bytes], split: str) -> None:
    """Write the folder of a byte-level BPE: `tokens` by rank (the 256 bytes first), then the control tokens.

    The normalizer is null and the class is `PreTrainedTokenizerFast`: under another class `transformers` builds
    the tokenizer anew, with NFC, and text that is not in that form would get other ids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / TOKENIZER_FILE, tokenizer_json(tokens, split))
    write_json(folder / TOKENIZER_CONFIG_FILE, tokenizer_config(len(tokens)))


def tokenizer_json(tokens: Sequence[bytes], split: str) -> dict[str, Any]:
    """The content of `tokenizer.json`."""
    end_of_text = len(tokens)
    begin = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": end_of_text + index, "content": token, **_SPECIAL} for index, token in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT_REGEXES[split]}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [end_of_text], "tokens": [END_OF_TEXT]}},
        },
        "decoder": byte_level,
        "model": {
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
    }


_SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def tokenizer_config(first_special: int) -> dict[str, Any]:
    """The content of `tokenizer_config.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(first_special + index): {"content": token, **_SPECIAL} for index, token in enumerate(SPECIAL_TOKENS)
        },
        "additional_special_tokens": [IM_START, IM_END],
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
    }
