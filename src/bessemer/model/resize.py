"""Enlarges a model's vocabulary: new rows in the embedding and the head, the old ones untouched.

A new row starts as the mean of the old ones (Hewitt 2021, "Initializing new word embeddings for pretrained language
models"): the new token is then about as likely as an average one, and with n tokens the others lose at most a factor of
1 + 1/n. Rows drawn at random can be likelier than every token that the model would have said.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.new_folder import new_folder, refuse_full
from bessemer.model.decoder import Decoder
from bessemer.model.folder import load_model, save_model
from bessemer.model.folder_config import GENERATION_CONFIG, refuse_quantised
from bessemer.tokenization.extend import Extension, add_tokens
from bessemer.tokenization.tokenizer import load_tokenizer

#: How a new token's row starts: the mean of all rows, or of the rows of the tokens that it was written with before.
Init = Literal["mean", "subtokens"]

# Shapes: V old vocabulary, N new vocabulary, D hidden.


def resize_embeddings(
    model: Decoder,
    vocab_size: int,
    *,
    init: Init = "mean",
    subtokens: Mapping[int, Sequence[int]] | None = None,
    known: int | None = None,
) -> Decoder:
    """The model with rows for `vocab_size` tokens in its embedding and, where it has its own, its head. Changes `model`.

    The rows of old ids keep every bit, so their logits do too. subtokens: for init="subtokens", the old ids that each new
    one was written with; a new id that has none there gets the mean. known: how many ids have a token, where the table is
    longer (padded): the rows after them are new as well. Raises ConfigError when `vocab_size` is smaller than the vocabulary.
    """
    old_size = model.config.vocab_size
    known = old_size if known is None else known
    if vocab_size < max(old_size, known):
        raise ConfigError(f"the vocabulary cannot shrink from {old_size:,} to {vocab_size:,} tokens: ids would lose their rows")
    written_with = dict(subtokens or {}) if init == "subtokens" else {}
    with torch.no_grad():
        embedding = nn.Embedding.from_pretrained(_resized(model.embed_tokens.weight, vocab_size, known, written_with))
        embedding.weight.requires_grad_(model.embed_tokens.weight.requires_grad)
        model.embed_tokens = embedding
        if not model.config.tie_word_embeddings:
            weight = _resized(model.lm_head.weight, vocab_size, known, written_with)
            model.lm_head = nn.Linear(weight.shape[1], vocab_size, bias=False, device="meta")
            model.lm_head.weight = nn.Parameter(weight, requires_grad=embedding.weight.requires_grad)
    model.config = model.config.model_copy(update={"vocab_size": vocab_size})
    return model


def _resized(weight_VD: Tensor, vocab_size: int, known: int, written_with: Mapping[int, Sequence[int]]) -> Tensor:
    """(N, D): the first `known` rows as they are, the others means, taken in float32 at least."""
    wide = torch.promote_types(weight_VD.dtype, torch.float32)
    mean_D = weight_VD[:known].to(wide).mean(0).to(weight_VD.dtype)
    weight_ND = mean_D.repeat(vocab_size, 1)
    weight_ND[:known] = weight_VD[:known]
    for id, parts in written_with.items():
        if parts and id >= known:
            weight_ND[id] = weight_VD[list(parts)].to(wide).mean(0).to(weight_VD.dtype)
    return weight_ND


def extend_model(
    folder: Path, out: Path, tokens: Sequence[str] = (), special_tokens: Sequence[str] = (), *, init: Init = "mean"
) -> Extension:
    """Write the model in `folder` to `out` with more tokens in its tokenizer and a row for each (see `add_tokens`).

    `out` must be another folder: a model's files fit together only as a whole. Raises ConfigError for a token that cannot
    be added, ArtefactError when `folder` holds no model with a tokenizer or `out` is not empty.
    """
    refuse_full(out)
    refuse_quantised(folder)
    model = load_model(folder)
    before = load_tokenizer(folder)
    if before.vocab_size > model.config.vocab_size:
        raise ArtefactError(
            f"{folder}: its tokenizer has {before.vocab_size:,} tokens and its model {model.config.vocab_size:,}; they do not "
            "belong together"
        )
    with new_folder(out) as unfinished:
        extension = add_tokens(folder, unfinished, tokens, special_tokens)
        size = max(model.config.vocab_size, extension.size + len(extension.added))
        subtokens = {id: before.encode(token, add_bos=False) for id, token in extension.added.items()}
        resize_embeddings(model, size, init=init, subtokens=subtokens, known=before.vocab_size)
        if (folder / GENERATION_CONFIG).exists():
            shutil.copyfile(folder / GENERATION_CONFIG, unfinished / GENERATION_CONFIG)
        save_model(model, unfinished, tokenizer=unfinished)
    return extension
