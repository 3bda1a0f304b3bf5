"""The stage `model`: a decoder with its weights before training, new ones or those of an existing model.

An existing model keeps its shape and its tokenizer; settings of positions may differ, so that it reads a longer context.
`extend_model` enlarges its vocabulary: a new row of the embedding and the head starts as the mean of the old ones (Hewitt 2021,
"Initializing new word embeddings for pretrained language models"). The new token is then about as likely as an average one, and
with n tokens the others lose at most a factor of 1 + 1/n; a row drawn at random can be likelier than all of them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import hash_file
from bessemer.core.progress import Progress, Silent
from bessemer.core.store import follow, new_folder, refuse_nonempty, write_json
from bessemer.model.config import ImportConfig, ModelConfig, ModelStageConfig, model_metrics
from bessemer.model.decoder import Decoder
from bessemer.model.initialisation import empty_decoder, fill
from bessemer.model.storage.folder import load_model, save_initial_model, save_model
from bessemer.model.storage.library import import_advice
from bessemer.model.storage.model_config import CONFIG, GENERATION_CONFIG, read_model_config, refuse_quantised
from bessemer.tokenization.existing import Extension, add_tokens
from bessemer.tokenization.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from bessemer.model.formats import ModelSource

#: Settings that may differ from the existing model's: the weights fit any value, or only training reads them.
CHANGEABLE = (
    "max_position_embeddings",
    "rope_scaling",
    "rope_theta",
    "rope_local_base_freq",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_bias_update_rate",
)


def existing_model(path: str, folder: Path) -> Path:
    """The folder of `model.init_from`; a relative path starts from `folder`, the recipe's. A run's or a stage's will do.

    Raises ConfigError when it holds no model.
    """
    place = Path(os.path.normpath(folder.resolve() / path))
    for model_folder in (follow(place), follow(place / "model")):
        if (model_folder / CONFIG).is_file():
            refuse_quantised(model_folder)
            return model_folder
    if not follow(place).exists():
        raise ConfigError(f"model.init_from: {path}: no such folder{import_advice(path)}")
    raise ConfigError(f"model.init_from: {path}: not a model's folder (it has no {CONFIG})")


def existing_fingerprint(config: ModelStageConfig, folder: Path) -> dict[str, Any]:
    """What the stage's output depends on beside its settings: the hashes of the model's files, and which settings were given.

    Raises as `existing_model` and `changed_config` do, so that a mismatch is found before anything runs.
    """
    assert config.init_from is not None
    model_folder = existing_model(config.init_from, folder)
    changed_config(config, read_model_config(model_folder))
    files = [model_folder / CONFIG, *sorted(model_folder.glob("*.safetensors"))]
    return {"files": {path.name: hash_file(path) for path in files}, "given": config.given}


def changed_config(config: ModelStageConfig, existing: ModelConfig) -> ModelConfig:
    """The existing model's config with the settings that were given.

    A scaling that counts from the old context takes it from the model where it is not given. Raises ConfigError when a
    setting differs that the weights were made for.
    """
    given = config.given
    own = existing.model_dump(mode="json")
    for name, value in given.items():
        if value != own[name] and name not in CHANGEABLE:
            raise ConfigError(
                f"model.{name}: {value!r} is not the {own[name]!r} of {config.init_from}; with init_from, only settings of "
                f"positions may differ: {', '.join(CHANGEABLE[:4])}"
            )
    further = given.get("max_position_embeddings", existing.max_position_embeddings)
    if further != existing.max_position_embeddings and existing.position_type == "learned":
        raise ConfigError(
            f"model.max_position_embeddings: {config.init_from} has learned positions, {existing.max_position_embeddings:,} of "
            "them, and none beyond"
        )
    scaling = given.get("rope_scaling", {})
    if scaling.get("rope_type") in ("yarn", "llama3") and scaling["original_max_position_embeddings"] is None:
        before = existing.rope_scaling.original_max_position_embeddings or existing.max_position_embeddings
        given["rope_scaling"] = {**scaling, "original_max_position_embeddings": before}
    return existing.with_changes(**given)


def check_tokenizer(config: ModelStageConfig, tokenizer: Path, folder: Path) -> Path:
    """The folder of the model of `init_from`. Raises ConfigError when its tokenizer is not the one in `tokenizer`."""
    assert config.init_from is not None
    model_folder = existing_model(config.init_from, folder)
    if load_tokenizer(model_folder).hash != load_tokenizer(tokenizer).hash:
        raise ConfigError(
            f"model.init_from: {config.init_from} has another tokenizer than the recipe's; {_encode_with(config, folder)}"
        )
    return model_folder


def check_vocabulary(config: ModelStageConfig, vocab_size: int, folder: Path) -> None:
    """Raise ConfigError when a tokenizer that is still to be trained cannot come out as that of the model of `init_from`: of at
    most `vocab_size` tokens."""
    assert config.init_from is not None
    own = read_model_config(existing_model(config.init_from, folder)).vocab_size
    if own > vocab_size:
        raise ConfigError(
            f"model.init_from: {config.init_from} reads {own:,} tokens, and the recipe trains a new vocabulary of "
            f"{vocab_size:,}, which means nothing to it; {_encode_with(config, folder)}"
        )


def _encode_with(config: ModelStageConfig, folder: Path) -> str:
    assert config.init_from is not None
    inner = "" if (follow(folder / config.init_from) / CONFIG).is_file() else "/model"
    return f"encode with the model's own tokenizer: tokenize: {{tokenizer: {config.init_from}{inner}}}"


def existing_decoder(config: ModelStageConfig, tokenizer: Path, folder: Path) -> Decoder:
    """The model of `init_from` with the settings that were given, in the type that it is stored in.

    Raises ConfigError when its tokenizer is not the one in `tokenizer`.
    """
    model = load_model(check_tokenizer(config, tokenizer, folder))
    return fill(empty_decoder(changed_config(config, model.config)), model.state_dict())


#: Initial row of a new token: the mean of all rows, or of the rows of the tokens that encoded it before.
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
    refuse_nonempty(out)
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


def build_model(
    config: ModelStageConfig,
    tokenizer: Path | None,
    out: Path,
    *,
    seed: int,
    folder: Path = Path(),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `model/` below `out`: config, weights, and the tokenizer's files. Returns the model's figures.

    Weights are drawn from the seed, or taken from `init_from`, a path that starts from `folder`; the tokenizer too where none
    is given. Raises ConfigError when that model does not go with the tokenizer or with a setting.
    """
    if tokenizer is None:
        assert config.init_from is not None
        tokenizer = existing_model(config.init_from, folder)
    vocabulary, say = load_tokenizer(tokenizer), (progress or Silent()).say
    made = out / "model"
    if config.init_from is None:
        model_config = config.model_for(vocabulary.vocab_size, vocabulary.bos_id, vocabulary.bos_id)
        save_initial_model(model_config, seed, made, tokenizer=tokenizer)
    else:
        decoder = existing_decoder(config, tokenizer, folder)
        model_config = decoder.config
        say(f"  weights of {config.init_from}")
        save_model(decoder, made, tokenizer=tokenizer)
    ends = {"bos_token_id": vocabulary.bos_id, "eos_token_id": list(vocabulary.eos_ids), "pad_token_id": vocabulary.bos_id}
    write_json(made / GENERATION_CONFIG, ends)
    metrics = model_metrics(model_config)
    say(
        f"  {metrics['parameters']:,} parameters, {metrics['embedding_share']:.0%} of them in the embedding; "
        f"context of {metrics['context_length']:,} tokens"
    )
    return metrics if config.init_from is None else {"init_from": config.init_from, **metrics}


def import_stage(config: ImportConfig, out: Path, *, folder: Path = Path(), progress: Progress | None = None) -> dict[str, Any]:
    """Write `model/` below `out`: somebody's model in our form. Returns its figures. A relative path starts from `folder`.

    Raises ConfigError where nothing is called so, ArtefactError for a model that cannot be read.
    """
    from bessemer.model.formats import import_model

    for note in import_model(_source_of(config, folder), out / "model", dtype=config.dtype):
        (progress or Silent()).say(f"  {note}")
    return {"import": config.source, **model_metrics(read_model_config(out / "model"))}


def import_fingerprint(config: ImportConfig, folder: Path) -> Any:
    """The hashes of the model's files, or its id on the hub. Raises as `import_stage`."""
    source = _source_of(config, folder)
    if source.kind == "hub":
        return source.name
    if source.kind == "package":
        from bessemer.model.formats import packaged_smollm2

        return hash_file(packaged_smollm2())
    paths = [source.path] if source.kind == "gguf" else [source.path / CONFIG, *sorted(source.path.glob("*.safetensors"))]
    return {path.name: hash_file(path) for path in paths}


def _source_of(config: ImportConfig, folder: Path) -> ModelSource:
    from bessemer.model.formats import find_model

    near = folder / config.source
    source = find_model(str(near) if near.exists() else config.source)
    if source is None:
        raise ConfigError(f"import.source: {config.source}: no model is here, and none is called so")
    return source
