"""Writing a tokenizer as a Hugging Face folder, which `transformers`, vLLM and llama.cpp's converter read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bessemer.core.store import write_json
from bessemer.tokenization.chat_templates import CHAT_TEMPLATES
from bessemer.tokenization.parts import TokenizerParts
from bessemer.tokenization.special import END_OF_TEXT, control_tokens

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

_SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def write_folder(
    folder: Path,
    parts: TokenizerParts,
    chat_template: str = "chatml",
    reserved: int = 0,
    fill_in_the_middle: bool = False,
) -> None:
    """Write the folder of a tokenizer: the algorithm's tokens, then the control tokens.

    The class is `PreTrainedTokenizerFast`: under another one `transformers` builds the tokenizer anew, with a normalizer
    of its own, and text would get other ids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    controls = control_tokens(chat_template, reserved, fill_in_the_middle)
    write_json(folder / TOKENIZER_FILE, tokenizer_json(parts, controls))
    write_json(folder / TOKENIZER_CONFIG_FILE, tokenizer_config(parts, controls, CHAT_TEMPLATES[chat_template]))


def tokenizer_json(parts: TokenizerParts, controls: Sequence[str]) -> dict[str, Any]:
    """The content of `tokenizer.json`. The begin token stands before every text."""
    begin = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
    end_of_text = parts.size + controls.index(END_OF_TEXT)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": token, **_SPECIAL} for id, token in _control_ids(parts, controls)],
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [end_of_text], "tokens": [END_OF_TEXT]}},
        },
        "decoder": parts.decoder,
        "model": parts.model,
    }


def tokenizer_config(parts: TokenizerParts, controls: Sequence[str], chat_template: str) -> dict[str, Any]:
    """The content of `tokenizer_config.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "added_tokens_decoder": {str(id): {"content": token, **_SPECIAL} for id, token in _control_ids(parts, controls)},
        "additional_special_tokens": [token for token in controls if token != END_OF_TEXT],
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        **({"unk_token": parts.unk_token} if parts.unk_token else {}),
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
    }


def _control_ids(parts: TokenizerParts, controls: Sequence[str]) -> list[tuple[int, str]]:
    return list(enumerate(controls, start=parts.size))
