"""A tokenizer as a Hugging Face folder, which `transformers`, vLLM and llama.cpp's converter read.

`TokenizerParts` is the result of training an algorithm, in the terms of `tokenizer.json`; `ForeignTokenizer` is a tokenizer
that was read from another format, with its ids kept.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.core.store import write_json
from bessemer.tokenization.chat_templates import CHAT_TEMPLATES
from bessemer.tokenization.control_tokens import END_OF_TEXT, control_tokens


@dataclass(frozen=True)
class TokenizerParts:
    """The sections of `tokenizer.json` that a trained algorithm fills; `folder.write_folder` adds the control tokens.

    The tokens of `model` have the ids 0 … size - 1, without control tokens except `unk_token`, the unknown token (None when
    there is none).
    """

    size: int
    model: dict[str, Any]
    pre_tokenizer: dict[str, Any] | None
    decoder: dict[str, Any] | None
    normalizer: dict[str, Any] | None = None
    unk_token: str | None = None


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


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in text as it is written, before anything is split or merged.

    special: a control token, which only templates write; not so, text that holds it is encoded with it.
    normalized: it is looked for in the text that the normalizer made, in which spaces may be U+2581.
    """

    id: int
    content: str
    special: bool
    normalized: bool = False

    def as_json(self) -> dict[str, Any]:
        """Its entry in `tokenizer.json`, without the id."""
        return {
            "content": self.content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": self.normalized,
            "special": self.special,
        }


@dataclass(frozen=True)
class ForeignTokenizer:
    """What a folder needs. `parts.model` holds every id below `learned_size`; the added tokens from there on follow it.

    bos, eos, unk, pad: the token that begins a text, ends one, stands for what cannot be written, fills batches.
    add_bos, add_eos: whether `AutoTokenizer` puts them around a text.
    notes: what the source said that the folder cannot do, a sentence each.
    """

    parts: TokenizerParts
    added: tuple[AddedToken, ...]
    bos: str | None = None
    eos: str | None = None
    unk: str | None = None
    pad: str | None = None
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | None = None
    notes: tuple[str, ...] = ()

    def write(self, folder: Path, *, compact: bool = False) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`. compact: into a folder that nobody reads but this process."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / TOKENIZER_FILE, self.tokenizer_json(), compact=compact)
        write_json(folder / TOKENIZER_CONFIG_FILE, self.tokenizer_config())

    def tokenizer_json(self) -> dict[str, Any]:
        """The content of `tokenizer.json`."""
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": token.id, **token.as_json()} for token in self.added],
            "normalizer": self.parts.normalizer,
            "pre_tokenizer": self.parts.pre_tokenizer,
            "post_processor": self._post_processor(),
            "decoder": self.parts.decoder,
            "model": self.parts.model,
        }

    def tokenizer_config(self) -> dict[str, Any]:
        """The content of `tokenizer_config.json`."""
        roles = {"bos_token": self.bos, "eos_token": self.eos, "unk_token": self.unk, "pad_token": self.pad}
        return foreign_tokenizer_config({token.id: token.as_json() for token in self.added}, roles, self.chat_template)

    def _post_processor(self) -> dict[str, Any] | None:
        before = [self.bos] if self.add_bos and self.bos else []
        after = [self.eos] if self.add_eos and self.eos else []
        if not before and not after:
            return None
        ids = {token.content: token.id for token in self.added}

        def around(*texts: str) -> list[dict[str, Any]]:
            special = ([{"SpecialToken": {"id": token, "type_id": 0}} for token in some] for some in (before, after))
            begin, end = special
            return begin + [{"Sequence": {"id": text, "type_id": 0}} for text in texts] + end

        return {
            "type": "TemplateProcessing",
            "single": around("A"),
            "pair": around("A", "B"),
            "special_tokens": {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in {*before, *after}},
        }


def foreign_tokenizer_config(
    added: Mapping[int, Mapping[str, Any]], roles: Mapping[str, str | None], chat_template: str | None
) -> dict[str, Any]:
    """The content of a `tokenizer_config.json` that makes `AutoTokenizer` take `tokenizer.json` as it is.

    added: entries of `tokenizer.json` by id. roles: `bos_token` and so on, to the token; those that are None are left out.
    Under a class of its own `transformers` would build some tokenizers anew, with other ids; `PreTrainedTokenizerFast`
    keeps the file.
    """
    named = {role: token for role, token in roles.items() if token is not None}
    special = [entry["content"] for entry in added.values() if entry["special"]]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "added_tokens_decoder": {str(id): dict(entry) for id, entry in added.items()},
        "additional_special_tokens": [token for token in special if token not in named.values()],
        **named,
        **({"chat_template": chat_template} if chat_template is not None else {}),
        "clean_up_tokenization_spaces": False,
    }


def first_of(names: Iterable[str], there: Container[str]) -> str | None:
    """The first of these names that is there."""
    return next((name for name in names if name in there), None)


def learned_size(count: int, added: Collection[int]) -> int:
    """How many of `count` ids the model of `tokenizer.json` must hold: all up to the added tokens that end the vocabulary.

    `tokenizers` gives an added token the id that the model has for it, else the next free one, whatever the file says.
    """
    while count - 1 in added:
        count -= 1
    return count
