"""The models that a run starts from: the one that it trains, with the adapter that the settings ask for; those beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.core.errors import ConfigError
from bessemer.core.seeds import derive_seed
from bessemer.distributed.loading import load_shards
from bessemer.distributed.mesh import Mesh
from bessemer.distributed.sharding import product_matrices
from bessemer.model.decoder import Decoder
from bessemer.model.folder import load_model
from bessemer.model.folder_config import holds_codes, read_model_config, refuse_quantised, refuse_scorer
from bessemer.model.initialisation import empty_decoder
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.quantised_linear import quantised_parts
from bessemer.model.score_head import SCORE, load_scorer, new_head, scorer_config
from bessemer.model.stored_tensors import StoredTensors, find_tensors
from bessemer.model.trained_adapters import add_adapters, initial_tensors
from bessemer.training.config import LoopConfig
from bessemer.training.model_setup import PreparedModel

#: Gives a prepared model its weights.
Load = Callable[[PreparedModel], None]


class OpenedModel(NamedTuple):
    """A model that is to be prepared for training. load: of several processes, gives each its shards of the prepared model,
    which has no weights before; None: the model has them."""

    decoder: Decoder
    load: Load | None = None


class _Empty(NamedTuple):
    """A model without memory, where its tensors lie, and those that its folder does not hold."""

    decoder: Decoder
    stored: StoredTensors
    added: dict[str, Tensor]

    def opened(self, device: torch.device | str) -> OpenedModel:
        return OpenedModel(self.decoder, lambda prepared: load_shards(prepared.parts, self.stored, device, self.added))


#: How the weights of the blocks are held while an adapter is trained beside them.
_FROZEN = {
    "int8": QuantizeConfig(scheme="int8", head="none"),
    "int4": QuantizeConfig(scheme="int4", group_size=32, head="none"),
}


def check_start(config: LoopConfig, folder: Path, mesh: Mesh) -> None:
    """Raise ArtefactError or ConfigError for a model of codes where weights are trained, or where processes share them."""
    if config.low_rank is None or config.scores:
        refuse_quantised(folder)
    if config.low_rank is not None and not mesh.alone:
        if config.low_rank.quantize is not None or holds_codes(folder):
            raise ConfigError(
                f"adapter: a quantised model is trained beside in one process, and this job has {mesh.layout.world_size}; "
                "leave adapter.quantize out and take a model that is not quantised"
            )
        if config.low_rank.dropout:
            raise ConfigError("adapter.dropout: in one process; leave it out under a mesh")
        if config.low_rank.dora:
            raise ConfigError("adapter.dora: in one process; leave it out under a mesh")


def open_start(folder: Path, config: LoopConfig, device: torch.device | str, mesh: Mesh, seed: int) -> OpenedModel:
    """`starting_model` on each process of a mesh. Raises as that, and ArtefactError as `find_tensors`."""
    if mesh.alone:
        return OpenedModel(starting_model(folder, config, device, seed))
    empty = _empty(folder, head_seed(seed) if config.scores else None)
    empty.added.update(new_adapter(empty.decoder, config, seed))
    hold_frozen_matrices(empty.decoder, frozen_dtype(config, folder))
    return empty.opened(device)


def open_beside(folder: Path, device: torch.device | str, mesh: Mesh, *, seed_of_head: int | None = None) -> OpenedModel:
    """The model of a folder in float32, on each process of a mesh: a reference, a teacher, or with a scalar head a critic.

    seed_of_head: of a critic's new head, for a language model; None: the model predicts tokens. A quantised model is whole on
    every process. Raises ArtefactError as `load_model`.
    """
    if not mesh.alone and not holds_codes(folder):
        return _empty(folder, seed_of_head).opened(device)
    if seed_of_head is None:
        return OpenedModel(load_model(folder, device=device, dtype=torch.float32))
    return OpenedModel(load_scorer(folder, device, torch.float32, seed=seed_of_head))


def _empty(folder: Path, seed_of_head: int | None) -> _Empty:
    stored = find_tensors(folder, read_model_config(folder))
    shape, added = stored.config, {}
    if seed_of_head is None:
        refuse_scorer(shape, folder)
    elif not shape.num_scores:
        shape = scorer_config(shape)
        added[SCORE] = new_head(shape, seed_of_head)
    return _Empty(empty_decoder(shape), stored, added)


def frozen_dtype(config: LoopConfig, folder: Path) -> torch.dtype:
    """In which dtype the frozen matrices of a model's blocks lie beside an adapter: the one in which products read them.

    Autocast would make a copy of a matrix in every product and the backward pass keep it: a second model, in half precision.
    float32 where norms of the weights are trained (DoRA), and beside codes.
    """
    settings = config.low_rank
    is_half = config.dtype in ("bfloat16", "float16")
    if settings is None or not is_half or settings.dora or settings.quantize is not None or holds_codes(folder):
        return torch.float32
    found = getattr(torch, config.dtype)
    assert isinstance(found, torch.dtype)
    return found


def hold_frozen_matrices(model: Decoder, dtype: torch.dtype) -> None:
    """Hold those parameters of the blocks that only products read, and that are not trained, in a dtype; in place."""
    for parameter in product_matrices(model):
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def starting_model(folder: Path, config: LoopConfig, device: torch.device | str, seed: int) -> Decoder:
    """The model of a folder with a new adapter where the settings ask for one; whole on this process. With a scalar head where
    the settings train scores. In float32; beside an adapter what is frozen as `frozen_dtype` says, so that such a model is
    computed under autocast.

    Raises ConfigError for a base whose activations are quantised, and a pattern of layers that there are not.
    """
    settings = config.low_rank
    if (held := frozen_dtype(config, folder)) != torch.float32:
        # read into its memory, so that there is never a copy in float32
        empty = _empty(folder, head_seed(seed) if config.scores else None)
        empty.added.update(new_adapter(empty.decoder, config, seed))
        hold_frozen_matrices(empty.decoder, held)
        load_shards([empty.decoder], empty.stored, device, empty.added)
        return empty.decoder.eval()
    # to be quantised it is read as it is stored: in float32 the whole might not fit in memory
    dtype = None if settings is not None and settings.quantize is not None else torch.float32
    if config.scores:
        model = load_scorer(folder, device, dtype, seed=head_seed(seed))
    else:
        model = load_model(folder, device=device, dtype=dtype)
    if settings is not None and settings.quantize is not None:
        if not quantised_parts(model):
            quantise(model, _FROZEN[settings.quantize])
        # copied even where they are in float32: one tensor of a mapped file keeps the pages of all that were read
        model._apply(lambda tensor: tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor)
    if settings is None:
        return model
    coarse = next((part for part in quantised_parts(model).values() if not part.scheme.is_weight_only), None)
    if coarse is not None:
        raise ConfigError(
            f"{folder}: its activations are quantised too ({coarse.scheme.name}), through which no gradient flows; take int8 "
            "or int4"
        )
    model.load_state_dict(new_adapter(model, config, seed), strict=False)
    return model


def head_seed(seed: int) -> int:
    """Of the new scalar head of a run with this seed."""
    return derive_seed(seed, "score head")


def new_adapter(model: Decoder, config: LoopConfig, seed: int) -> dict[str, Tensor]:
    """Freeze a model, in place, but for its scalar head, and put the adapter that the settings ask for beside it; returns its
    first numbers by their names. Nothing is done, and nothing returned, where they ask for none."""
    settings = config.low_rank
    if settings is None:
        return {}
    add_adapters(
        model,
        rank=settings.rank,
        scale=settings.scale,
        dropout=settings.dropout,
        patterns=tuple(settings.modules),
        magnitude=settings.dora,
    )
    if config.scores:
        model.get_parameter(SCORE).requires_grad_(True)
    return initial_tensors(model, seed)
