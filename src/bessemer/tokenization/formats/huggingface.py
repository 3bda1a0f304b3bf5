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
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    AddedToken,
    ForeignTokenizer,
    TokenizerParts,
    first_of,
    foreign_tokenizer_config,
    learned_size,
)
from bessemer.tokenization.formats.gguf_import import bpe_model
from bessemer.tokenization.split import pre_tokenizer
from bessemer.tokenization.tokenizer import CHAT_TEMPLATE_FILE, SPECIAL_TOKENS_MAP_FILE, load_tokenizer
from bessemer.tokenization.vocabulary import byte_characters

VOCAB_FILE, MERGES_FILE, ADDED_TOKENS_FILE = "vocab.json", "merges.txt", "added_tokens.json"
#: What of a `tokenizer_config.json` is kept as it is: nothing that a class of its own would act upon.
_KEPT = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces")


def import_tokenizer_json(file: Path, folder: Path) -> list[str]:
    """Copy a `tokenizer.json` byte for byte, and write a `tokenizer_config.json` with which `AutoTokenizer` keeps to it.

    The files that lie beside it say which token has which role; where there are none, the names that are usual. Returns
    what was left out. Raises ArtefactError when the tokenizer is damaged or of a kind that is not read.
    """
    # any other name stands alone
    source = file.parent if file.name == TOKENIZER_FILE else file
    folder.mkdir(parents=True, exist_ok=True)
    content = read_json(file, "tokenizer")
    shutil.copyfile(file, folder / TOKENIZER_FILE)
    config, roles, template = read_config(source), read_roles(source), read_chat_template(source)
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
    write_json(folder / TOKENIZER_CONFIG_FILE, foreign_tokenizer_config(added, roles, template) | kept)
    # which finds the tokens that no file names
    tokenizer = load_tokenizer(folder)
    for role, id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_ids[0])):
        roles[role] = roles[role] or added[id]["content"]
    write_json(folder / TOKENIZER_CONFIG_FILE, foreign_tokenizer_config(added, roles, template) | kept)
    return notes


def _vocabulary(model: Mapping[str, Any]) -> list[str]:
    vocab = model.get("vocab", {})
    return list(vocab) if isinstance(vocab, Mapping) else [piece for piece, _ in vocab]


def import_vocab_and_merges(source: Path, split: str | None) -> ForeignTokenizer:
    """A byte-level BPE from `vocab.json` and `merges.txt`, GPT-2's split unless another is named.

    Raises ArtefactError when the two do not fit together, or the merges are not written in bytes' characters.
    """
    vocab: dict[str, int] = read_json(source / VOCAB_FILE, "vocabulary")
    added_file = source / ADDED_TOKENS_FILE
    added: dict[str, int] = read_json(added_file, "list of added tokens") if added_file.exists() else {}
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
    return ForeignTokenizer(
        parts=TokenizerParts(
            size=size,
            model=bpe_model(tokens[:size], merges),
            pre_tokenizer=pre_tokenizer(split or "gpt-2"),
            decoder={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        ),
        added=tuple(controls.values()),
        bos=roles["bos_token"] or eos,
        eos=eos,
        unk=roles["unk_token"],
        pad=roles["pad_token"],
        chat_template=read_chat_template(source),
    )


#: The roles that `tokenizer_config.json` names tokens for.
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def read_roles(folder: Path) -> dict[str, str | None]:
    """The token of each role as the folder's files name it, the newer file before the older; None where none does."""
    config = read_config(folder)
    older = folder / SPECIAL_TOKENS_MAP_FILE
    named = (read_json(older, "map of special tokens") if older.exists() else {}) | config
    return {role: content(named.get(role)) for role in ROLES}


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `tokenizer_config.json`, nothing when there is no such file."""
    path = folder / TOKENIZER_CONFIG_FILE
    config: dict[str, Any] = read_json(path, "tokenizer configuration") if path.exists() else {}
    return config


def read_chat_template(folder: Path) -> str | None:
    """The chat template, from its own file or from the configuration; the one named `default` where there are several."""
    path = folder / CHAT_TEMPLATE_FILE
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = read_config(folder).get("chat_template")
    if isinstance(template, list):
        by_name = {entry["name"]: entry["template"] for entry in template}
        template = by_name.get("default")
    return template


def content(token: Any) -> str | None:
    """A special token in these files is a string, or an object that holds it."""
    return token.get("content") if isinstance(token, Mapping) else token
