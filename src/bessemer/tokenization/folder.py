"""A tokenizer as a Hugging Face folder, which `transformers`, vLLM and llama.cpp's converter read.

`TokenizerParts` is what an algorithm learns, in the terms of `tokenizer.json`. `TokenizerContent` adds the rest of the folder:
added tokens, roles and chat template, of a trained tokenizer or of one read from another format.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from bessemer.core.errors import ArtefactError
from bessemer.core.hashing import hash_bytes
from bessemer.core.store import read_json, write_json
from bessemer.tokenization.chat_templates import CHAT_TEMPLATES
from bessemer.tokenization.control_tokens import END_OF_TEXT, TURN_ENDS, control_tokens

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
#: Other files in published folders. What `tokenizer_config.json` says takes precedence over the map.
SPECIAL_TOKENS_MAP_FILE = "special_tokens_map.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
#: Where older processors of pictures keep the template that has places for them.
PROCESSOR_TEMPLATE_FILE = "chat_template.json"
GENERATION_CONFIG_FILE = "generation_config.json"

#: Usual names of begin and end tokens, for a folder that names none.
BEGIN_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", END_OF_TEXT, "[CLS]")
END_NAMES = ("<|end_of_text|>", END_OF_TEXT, "</s>", "<eos>", "[SEP]")

#: The `decoder` section of a byte-level tokenizer.
BYTE_LEVEL_DECODER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


@dataclass(frozen=True)
class TokenizerParts:
    """The sections of `tokenizer.json` that an algorithm learns.

    The tokens of `model` have the ids 0 … size - 1. Control tokens are not among them, except `unk_token`, the unknown token
    (None when there is none).
    """

    size: int
    model: dict[str, Any]
    pre_tokenizer: dict[str, Any] | None
    decoder: dict[str, Any] | None
    normalizer: dict[str, Any] | None = None
    unk_token: str | None = None


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched literally, before the text is split or merged.

    special: a control token, which only templates write. An ordinary added token is also matched in typed text.
    normalized: matched in the normalizer's output, in which spaces may be U+2581, instead of the original text.
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
class TokenizerContent:
    """The content of a tokenizer's folder. `parts.model` holds all ids below `learned_size`; the added tokens follow.

    roles: the token of each role (`bos_token`, `eos_token`, …), None where there is none.
    add_bos, add_eos: whether `AutoTokenizer` puts the begin token before a text, and the end token after it.
    notes: how the folder differs from the format that it was read from, a sentence each.
    """

    parts: TokenizerParts
    added: tuple[AddedToken, ...]
    roles: Mapping[str, str | None]
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | None = None
    notes: tuple[str, ...] = ()

    def write(self, folder: Path, *, compact: bool = False) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`. compact: for a folder that only this process reads."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / TOKENIZER_FILE, self._tokenizer_json(), compact=compact)
        added = {token.id: token.as_json() for token in self.added}
        write_json(folder / TOKENIZER_CONFIG_FILE, tokenizer_config(added, self.roles, self.chat_template))

    def _tokenizer_json(self) -> dict[str, Any]:
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

    def _post_processor(self) -> dict[str, Any] | None:
        bos, eos = self.roles.get("bos_token"), self.roles.get("eos_token")
        before = [bos] if self.add_bos and bos else []
        after = [eos] if self.add_eos and eos else []
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


def write_folder(
    folder: Path,
    parts: TokenizerParts,
    chat_template: str = "chatml",
    reserved: int = 0,
    fill_in_the_middle: bool = False,
) -> None:
    """Write the folder of a trained tokenizer: the algorithm's tokens, then the control tokens. The begin token stands before
    every text."""
    controls = control_tokens(chat_template, reserved, fill_in_the_middle)
    TokenizerContent(
        parts,
        tuple(AddedToken(id, token, special=True) for id, token in enumerate(controls, start=parts.size)),
        {**dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT), "unk_token": parts.unk_token},
        add_bos=True,
        chat_template=CHAT_TEMPLATES[chat_template],
    ).write(folder)


def tokenizer_config(
    added: Mapping[int, Mapping[str, Any]], roles: Mapping[str, str | None], chat_template: str | None
) -> dict[str, Any]:
    """The content of `tokenizer_config.json`. added: entries of `tokenizer.json` by id. roles: as in `TokenizerContent`.

    The class is `PreTrainedTokenizerFast`, which takes `tokenizer.json` as it is. Other classes of `transformers` rebuild some
    tokenizers with a normalizer of their own, and text gets other ids.
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


def bpe_model(
    tokens: Sequence[str],
    merges: Iterable[Iterable[str]],
    *,
    unk_token: str | None = None,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """The `model` section of a `tokenizer.json` with BPE: tokens by id, merges by rank.

    With byte fallback, the unknown token stands only for what the byte tokens cannot write.
    """
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unk_token is not None,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": {token: id for id, token in enumerate(tokens)},
        "merges": [list(merge) for merge in merges],
    }


def first_of(names: Iterable[str], known: Container[str]) -> str | None:
    """The first of the names that is known; None when none is."""
    return next((name for name in names if name in known), None)


def learned_size(count: int, added: Collection[int]) -> int:
    """How many of `count` ids the model of `tokenizer.json` must hold: all but the added tokens at the end.

    `tokenizers` gives an added token the id that the model has for it, else the next free one, whatever the file says.
    """
    while count - 1 in added:
        count -= 1
    return count


def read_settings(path: Path) -> dict[str, Any]:
    """The content of one of the folder's JSON files; empty when there is no such file. Raises ArtefactError when it is
    damaged."""
    content = read_json(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise ArtefactError(f"{path}: this file is damaged (not a mapping)")
    return content


def read_configuration(folder: Path) -> dict[str, Any]:
    """The settings of `special_tokens_map.json` and `tokenizer_config.json` together, without those that are null."""
    files = (SPECIAL_TOKENS_MAP_FILE, TOKENIZER_CONFIG_FILE)
    return {name: value for file in files for name, value in read_settings(folder / file).items() if value is not None}


def read_chat_template(folder: Path) -> str | None:
    """The chat template of a folder: the one in its own file, else that of a processor of pictures, else the one in
    `tokenizer_config.json`, where several may be listed by name and `default` is taken."""
    path = folder / CHAT_TEMPLATE_FILE
    if path.exists():
        return path.read_text(encoding="utf-8")
    template: Any = read_settings(folder / PROCESSOR_TEMPLATE_FILE).get("chat_template")
    if not isinstance(template, str):
        template = read_settings(folder / TOKENIZER_CONFIG_FILE).get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


def template_hash(template: str) -> str:
    """Hash of a chat template, but for white space around it."""
    return hash_bytes(template.strip().encode())


def token_text(token: Any) -> Any:
    """The text of a special token in these files: a string, or an object that holds it."""
    return token.get("content") if isinstance(token, Mapping) else token


def mark_special(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Make tokens that the configuration names as special (`[UNK]`, say) control tokens, as `transformers` does."""
    named = [value for name, value in config.items() if name.endswith("_token")]
    for several in ("additional_special_tokens", "extra_special_tokens"):
        values = config.get(several, [])
        named += values.values() if isinstance(values, Mapping) else values
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    contents = [content for content in map(token_text, named) if isinstance(content, str) and content not in known]
    tokenizer.add_special_tokens([content for content in contents if tokenizer.token_to_id(content) is not None])


def begin_and_ends(folder: Path, tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any]) -> tuple[int, list[int]]:
    """The token that begins a text, and those that end one: the end token, the begin token that follows a document in
    our shards, the ends of turns, and what the model's generation settings list."""
    special = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    bos, eos = (special.get(token_text(config.get(name))) for name in ("bos_token", "eos_token"))
    if bos is None and eos is None:
        bos, eos = (special.get(first_of(names, special) or "") for names in (BEGIN_NAMES, END_NAMES))
    if bos is None:
        bos = special.get(END_OF_TEXT, eos)
    if eos is None:
        eos = bos
    if bos is None or eos is None:
        raise ArtefactError(
            f"{folder / TOKENIZER_CONFIG_FILE}: names no begin or end token that is in the vocabulary; add "
            '"bos_token" and "eos_token" to it, each one of the special tokens of tokenizer.json'
        )
    turn_ends = [special[token] for token in TURN_ENDS if token in special]
    return bos, [eos, bos, *turn_ends, *_listed_ends(folder, tokenizer.get_vocab_size())]


def _listed_ends(folder: Path, vocab_size: int) -> list[int]:
    listed = read_settings(folder / GENERATION_CONFIG_FILE).get("eos_token_id", [])
    ids = listed if isinstance(listed, list) else [listed]
    return [id for id in ids if isinstance(id, int) and 0 <= id < vocab_size]
