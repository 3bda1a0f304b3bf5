"""Hugging Face's files: a folder, a `tokenizer.json` alone, or GPT-2's older `vocab.json` and `merges.txt`.

The folder's files name the token of each role: begin, end, unknown, padding.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bessemer.core.errors import ArtefactError
from bessemer.core.store import read_json, write_json
from bessemer.tokenization.control_tokens import END_OF_TEXT
from bessemer.tokenization.folder import (
    BYTE_LEVEL_DECODER,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    AddedToken,
    TokenizerContent,
    TokenizerParts,
    bpe_model,
    first_of,
    learned_size,
    read_chat_template,
    read_configuration,
    read_settings,
    token_text,
    tokenizer_config,
)
from bessemer.tokenization.split import pre_tokenizer
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.tokenization.vocabulary import byte_characters

VOCAB_FILE, MERGES_FILE, ADDED_TOKENS_FILE = "vocab.json", "merges.txt", "added_tokens.json"
#: Settings of a `tokenizer_config.json` that are kept on import: none that depends on the tokenizer's class.
_KEPT = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces")


def import_tokenizer_json(file: Path, folder: Path) -> list[str]:
    """Copy a `tokenizer.json` byte for byte, and write a `tokenizer_config.json` with which `AutoTokenizer` uses it as it is.

    Roles are those in the other files of its folder, or else the usual names. Returns what was left out, a sentence each.
    Raises ArtefactError when the tokenizer is damaged or of a kind that is not read.
    """
    # a file of another name has no files that belong to it
    source = file.parent if file.name == TOKENIZER_FILE else file
    folder.mkdir(parents=True, exist_ok=True)
    content = read_json(file, "tokenizer")
    shutil.copyfile(file, folder / TOKENIZER_FILE)
    config, roles, template = read_settings(source / TOKENIZER_CONFIG_FILE), read_roles(source), read_chat_template(source)
    entries = {entry["content"]: entry for entry in content.get("added_tokens", [])}
    vocabulary = {*entries, *_vocabulary(content["model"])}
    notes = [
        f"{role} {token!r} is not in the vocabulary and is left out"
        for role, token in roles.items()
        if token and token not in vocabulary
    ]
    roles = {role: token if token in vocabulary else None for role, token in roles.items()}
    kept = {name: config[name] for name in _KEPT if name in config}
    added = {entry["id"]: {key: value for key, value in entry.items() if key != "id"} for entry in entries.values()}
    write_json(folder / TOKENIZER_CONFIG_FILE, tokenizer_config(added, roles, template) | kept)
    # loading finds begin and end tokens that no file names
    tokenizer = load_tokenizer(folder)
    for role, id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_ids[0])):
        roles[role] = roles[role] or added[id]["content"]
    write_json(folder / TOKENIZER_CONFIG_FILE, tokenizer_config(added, roles, template) | kept)
    return notes


def _vocabulary(model: Mapping[str, Any]) -> list[str]:
    vocab = model.get("vocab", {})
    return list(vocab) if isinstance(vocab, Mapping) else [piece for piece, _ in vocab]


def import_vocab_and_merges(source: Path, split: str | None) -> TokenizerContent:
    """A byte-level BPE from `vocab.json` and `merges.txt`, GPT-2's split unless another is named.

    Raises ArtefactError when the two do not fit together, or the merges are not byte-level.
    """
    vocab: dict[str, int] = read_json(source / VOCAB_FILE, "vocabulary")
    added: dict[str, int] = read_settings(source / ADDED_TOKENS_FILE)
    vocab |= added
    lines = (source / MERGES_FILE).read_text(encoding="utf-8").splitlines()
    merges = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    alphabet = set(byte_characters())
    for merge in merges:
        if len(merge) != 2 or "".join(merge) not in vocab:
            raise ArtefactError(f"{source / MERGES_FILE}: the merge {' '.join(merge)!r} makes no token of {VOCAB_FILE}")
        if not alphabet.issuperset("".join(merge)):
            raise ArtefactError(
                f"{source / MERGES_FILE}: the merge {' '.join(merge)!r} is not byte-level, the only kind that is read"
            )
    roles = read_roles(source)
    names = {END_OF_TEXT, *added, *roles.values()} | {token for token in vocab if not alphabet.issuperset(token)}
    ids = {id: token for token, id in vocab.items()}
    tokens = [ids.get(id, f"<|unused_{id}|>") for id in range(max(ids) + 1)]
    controls = {id: AddedToken(id, token, True) for id, token in sorted(ids.items()) if token in names}
    size = learned_size(len(tokens), controls)
    eos = roles["eos_token"] or first_of([END_OF_TEXT, "</s>"], vocab)
    return TokenizerContent(
        parts=TokenizerParts(
            size=size,
            model=bpe_model(tokens[:size], merges),
            pre_tokenizer=pre_tokenizer(split or "gpt-2"),
            decoder=BYTE_LEVEL_DECODER,
        ),
        added=tuple(controls.values()),
        roles={
            "bos_token": roles["bos_token"] or eos,
            "eos_token": eos,
            "unk_token": roles["unk_token"],
            "pad_token": roles["pad_token"],
        },
        chat_template=read_chat_template(source),
    )


#: The roles that `tokenizer_config.json` names tokens for.
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def read_roles(folder: Path) -> dict[str, str | None]:
    """The token of each role as the folder's files name it; None where none does."""
    configuration = read_configuration(folder)
    return {role: token_text(configuration.get(role)) for role in ROLES}
