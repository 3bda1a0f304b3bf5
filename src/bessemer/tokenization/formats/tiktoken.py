"""tiktoken's files: one line a token, its bytes in base64 and its rank, which is its id.

tiktoken joins the two neighbours that form the token of lowest rank, and writes a piece that is a token as that token. A file
holds neither the split regex nor the control tokens; the caller gives them.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.store import read_json, write_text
from bessemer.tokenization.bpe import encode_piece
from bessemer.tokenization.folder import (
    BEGIN_NAMES,
    BYTE_LEVEL_DECODER,
    END_NAMES,
    TOKENIZER_FILE,
    AddedToken,
    TokenizerContent,
    TokenizerParts,
    bpe_model,
    first_of,
    learned_size,
)
from bessemer.tokenization.split import SPLIT_REGEXES, pre_tokenizer, split_name
from bessemer.tokenization.vocabulary import token_from_name, vocabulary_name


def read_ranks(path: Path) -> dict[bytes, int]:
    """The rank of every token in a file. Raises ArtefactError that names the first malformed line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ArtefactError(
                f"{path}, line {number}: this is no token of a tiktoken file (base64, a space, a rank)"
            ) from None
    if len(set(ranks.values())) != len(ranks) or min(ranks.values(), default=-1) < 0:
        raise ArtefactError(f"{path}: this tiktoken file gives a rank twice, or none")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ArtefactError(f"{path}: this tiktoken file lacks the byte 0x{missing[0]:02X}; some texts could not be encoded")
    return ranks


def import_tiktoken(path: Path, split: str | None, special_tokens: Sequence[str] | Mapping[str, int]) -> TokenizerContent:
    """A tokenizer with the ids of `tiktoken.Encoding` on this file, split regex and control tokens.

    split: a name of `SPLIT_REGEXES`. special_tokens: with their ids, or in order, numbered after the file's ids. An id that the
    file leaves out gets a token that no text produces. Raises ConfigError when one of the two is missing.
    """
    if split is None:
        raise ConfigError(
            f"{path}: a tiktoken file does not hold its split regex; give its name with --split: {', '.join(SPLIT_REGEXES)}"
        )
    ranks = read_ranks(path)
    if not isinstance(special_tokens, Mapping):
        special_tokens = {token: id for id, token in enumerate(special_tokens, start=max(ranks.values()) + 1)}
    controls = {id: token for token, id in special_tokens.items()}
    eos = first_of(END_NAMES, special_tokens) or next(iter(special_tokens), None)
    if eos is None:
        raise ConfigError(
            f"{path}: a tiktoken file does not hold its control tokens; give them with --special, <|endoftext|> say"
        )
    for id, token in controls.items():
        if id in ranks.values() or len(controls) != len(special_tokens):
            raise ConfigError(f"{path}: the id {id} of the control token {token!r} is taken; give it another")
    learned = {rank: vocabulary_name(token) for token, rank in ranks.items()} | controls
    names = [learned.get(id, f"<|unused_{id}|>") for id in range(max(learned) + 1)]
    size = learned_size(len(names), controls)
    merges, whole = _merges(ranks)
    return TokenizerContent(
        parts=TokenizerParts(
            size=size,
            model=bpe_model(names[:size], merges, ignore_merges=whole),
            pre_tokenizer=pre_tokenizer(split),
            decoder=BYTE_LEVEL_DECODER,
        ),
        added=tuple(AddedToken(id, token, True) for id, token in sorted(controls.items())),
        roles={"bos_token": first_of(BEGIN_NAMES, special_tokens) or eos, "eos_token": eos},
    )


def _merges(ranks: Mapping[bytes, int]) -> tuple[list[tuple[str, str]], bool]:
    """The merges by rank, and whether some tokens are written only where they are a whole piece.

    Encoding a trained token with lower ranks gives two parts, its merge (see `bpe.merges_from_ranks`). A token that was added
    by hand may give more; then every pair of tokens that forms it is a merge.
    """
    merges: list[tuple[bytes, bytes]] = []
    whole = False
    for token, rank in sorted(ranks.items(), key=lambda entry: entry[1]):
        if len(token) == 1:
            continue
        parts = encode_piece(token, ranks, limit=rank)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
        else:
            whole = True
            merges += [(token[:cut], token[cut:]) for cut in _cuts(token, ranks)]
    return [(vocabulary_name(left), vocabulary_name(right)) for left, right in merges], whole


def _cuts(token: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    return [cut for cut in range(1, len(token)) if token[:cut] in ranks and token[cut:] in ranks]


def write_tiktoken(folder: Path, path: Path) -> list[str]:
    """Write the ranks of a folder's byte-level BPE. Returns what `tiktoken.Encoding` needs besides the file, a sentence each.

    Raises ArtefactError, with the reason, for a tokenizer that tiktoken would encode differently.
    """
    place = folder / TOKENIZER_FILE
    content = read_json(place, "tokenizer")
    model, refusal = content["model"], f"{place}: this tokenizer cannot be exported to tiktoken: "
    split = split_name(content["pre_tokenizer"])
    if model["type"] != "BPE" or split is None:
        raise ArtefactError(f"{refusal}only byte-level BPE with one of the named splits can ({', '.join(SPLIT_REGEXES)})")
    if content["normalizer"] is not None:
        raise ArtefactError(
            f"{refusal}it changes text before splitting ({content['normalizer']['type']}), and tiktoken does not"
        )
    added = {token["content"]: token for token in content["added_tokens"]}
    ranks = {token_from_name(name): id for name, id in model["vocab"].items() if name not in added}
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ArtefactError(f"{refusal}its vocabulary lacks the byte 0x{missing[0]:02X}")
    ours = {tuple(merge.split(" ") if isinstance(merge, str) else merge): rank for rank, merge in enumerate(model["merges"])}
    theirs, whole = _merges(ranks)
    places = [ours.get(pair, -1) for pair in theirs]
    if whole and not model.get("ignore_merges"):
        raise ArtefactError(f"{refusal}it has tokens that no merges make, which tiktoken writes and this tokenizer does not")
    wrong = next((at for at, place in enumerate(places) if place < 0 or (at and place < places[at - 1])), None)
    if wrong is not None:
        left, right = theirs[wrong]
        raise ArtefactError(f"{refusal}its merges are not in the order of its ids ({left} {right}), by which tiktoken merges")
    lines = (f"{base64.b64encode(token).decode()} {id}\n" for token, id in sorted(ranks.items(), key=lambda entry: entry[1]))
    write_text(path, "".join(lines))
    special = {token: entry["id"] for token, entry in added.items() if entry["special"]}
    notes = [f"the file holds neither regex nor control tokens: give tiktoken.Encoding the split {split} and {special}"]
    if len(ours) > len(theirs):
        notes.append(f"{len(ours) - len(theirs):,} merges make a token a second time: tiktoken makes it at its own rank")
    if ordinary := [token for token, entry in added.items() if not entry["special"]]:
        notes.append(f"tiktoken finds added tokens in text only as special ones: {', '.join(ordinary[:5])}")
    return notes
