"""The models of a run, opened from their folders.

The model that a run starts from gets a new adapter and a new scalar head where the settings ask for them. Of several processes
each reads its shards of a model, once that is prepared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from bessemer.core.errors import ConfigError
from bessemer.core.hashing import derive_seed
from bessemer.distributed.mesh import Mesh
from bessemer.distributed.parallelize import load_shards
from bessemer.distributed.sharding import product_matrices
from bessemer.model.adapters.trained import add_adapters, initial_tensors, train_whole
from bessemer.model.decoder import Decoder
from bessemer.model.families.layout import Stored
from bessemer.model.initialisation import empty_decoder, fill
from bessemer.model.quantisation.base import Codes
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import plan, quantise, take_codes
from bessemer.model.quantisation.quantised_decoder import weight_name
from bessemer.model.quantisation.quantised_layers import quantised_parts
from bessemer.model.storage.folder import SCORE, load_scorer, new_head, scorer_config
from bessemer.model.storage.model_config import holds_codes, read_model_config, refuse_quantised, refuse_scorer
from bessemer.model.storage.weights import EMBEDDING, StoredTensors, WeightsFile, find_tensors, opening
from bessemer.model.vision.folder import find_vision_tensors, is_vision_folder, read_vision_language
from bessemer.model.vision.trained import VisionDecoder, load_trained_decoder
from bessemer.training.config import LoopConfig
from bessemer.training.config_parts import AdapterConfig
from bessemer.training.model_setup import Load


class UnpreparedModel(NamedTuple):
    """A model that is to be prepared for training. load: of several processes, gives each its shards of the prepared model,
    which has no weights before; None: the model has them."""

    decoder: Decoder
    load: Load | None = None


class _Empty(NamedTuple):
    """A model without memory, where its tensors lie, and those that its folder does not hold."""

    decoder: Decoder
    stored: StoredTensors
    added: dict[str, Tensor]

    def opened(self, device: torch.device | str) -> UnpreparedModel:
        return UnpreparedModel(self.decoder, lambda prepared: load_shards(prepared.parts, self.stored, device, self.added))


#: Quantisation of the blocks' frozen weights, by the adapter's setting `quantize`.
FROZEN = {
    "int8": QuantizeConfig(scheme="int8", head="none"),
    "int4": QuantizeConfig(scheme="int4", group_size=32, head="none"),
    "nf4": QuantizeConfig(scheme="nf4", head="none"),
}


@dataclass(frozen=True)
class StartingModel:
    """The model that a run starts from: a folder's weights, with a new adapter or head.

    adapter: trained in place of the weights; None: these are trained. scores: with a scalar head in place of the language head.
    dtype: of matmuls. seed: of a new head and a new adapter.
    """

    folder: Path
    adapter: AdapterConfig | None
    scores: bool
    dtype: str
    seed: int

    @classmethod
    def of(cls, folder: Path, config: LoopConfig, seed: int) -> Self:
        """The starting model of a run's settings."""
        return cls(folder, config.low_rank, config.scores, config.dtype, seed)

    def check(self, mesh: Mesh) -> None:
        """Raise ArtefactError or ConfigError for a model of codes where weights are trained, or where processes share them."""
        adapter = self.adapter
        if self.reads_pictures:
            self._check_pictures(mesh)
        elif adapter is None or self.scores:
            refuse_quantised(self.folder)
        if adapter is None or mesh.alone:
            return
        if adapter.quantize is not None or holds_codes(self.folder):
            raise ConfigError(
                f"adapter: a quantised model is trained beside in one process, and this job has {mesh.layout.world_size}; "
                "leave adapter.quantize out and take a model that is not quantised"
            )
        for name, is_set in (
            ("dropout", adapter.dropout),
            ("dora", adapter.dora),
            ("modules_to_save", adapter.modules_to_save),
        ):
            if is_set:
                raise ConfigError(f"adapter.{name}: in one process; leave it out under a mesh")

    @property
    def reads_pictures(self) -> bool:
        """Whether the folder's model reads pictures."""
        return is_vision_folder(self.folder)

    def _check_pictures(self, mesh: Mesh) -> None:
        if self.scores:
            raise ConfigError(f"{self.folder}: a model that reads pictures gets no scalar head")
        if mesh.layout.context > 1 and read_vision_language(self.folder).is_bidirectional:
            raise ConfigError(
                f"parallel: context cuts rows, and the tokens of a picture see each other in {self.folder}; take data_shard, "
                "tensor or pipeline instead"
            )
        if self.adapter is not None and self.adapter.quantize is not None:
            raise ConfigError("adapter.quantize: a model that reads pictures is trained beside whole weights; leave it out")
        if self.adapter is not None and not self.adapter.merge:
            raise ConfigError("adapter.merge: false: a model that reads pictures is written with its adapter merged")

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Dtype in which the blocks' frozen matrices are stored beside an adapter: that of matmuls.

        Autocast would make a copy of a matrix in every product and the backward pass keep it: a second model, in half
        precision. float32 where norms of the weights are trained (DoRA), and beside codes.
        """
        adapter, is_half = self.adapter, self.dtype in ("bfloat16", "float16")
        if (
            adapter is None
            or not is_half
            or self.reads_pictures
            or adapter.dora
            or adapter.quantize is not None
            or holds_codes(self.folder)
        ):
            return torch.float32
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def open(self, device: torch.device | str, mesh: Mesh) -> UnpreparedModel:
        """The model on each process of a mesh. Raises as `whole`, and ArtefactError as `find_tensors`."""
        if mesh.alone:
            return UnpreparedModel(self.whole(device))
        return self._empty().opened(device)

    def whole(self, device: torch.device | str) -> Decoder:
        """The whole model on this process. In float32; beside an adapter what is frozen as `frozen_dtype` says, so that such a
        model is computed under autocast.

        Raises ConfigError for a base whose activations are quantised, and a pattern of layers that there are not.
        """
        adapter = self.adapter
        quantize = None if adapter is None else adapter.quantize
        if self.frozen_dtype != torch.float32:
            # the weights are read straight into half precision: there is never a float32 copy
            empty = self._empty()
            load_shards([empty.decoder], empty.stored, device, empty.added)
            return empty.decoder.eval()
        # a model that will be quantised is read as stored, since it may not fit in memory in float32
        dtype = torch.float32 if quantize is None else None
        if self.scores:
            model = load_scorer(self.folder, device, dtype, seed=head_seed(self.seed))
        elif quantize is not None and not holds_codes(self.folder):
            model = read_quantised(self.folder, FROZEN[quantize], device)
        else:
            model = load_trained_decoder(self.folder, device, dtype)
        if quantize is not None:
            if not quantised_parts(model):
                quantise(model, FROZEN[quantize])
            # copied even if already float32: a single tensor of a memory-mapped file keeps all its pages in memory
            model._apply(lambda tensor: tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor)
        if adapter is None:
            return model
        coarse = next((part for part in quantised_parts(model).values() if not part.scheme.is_weight_only), None)
        if coarse is not None:
            raise ConfigError(
                f"{self.folder}: its activations are quantised too ({coarse.scheme.name}), through which no gradient flows; "
                "take int8, int4 or nf4"
            )
        model.load_state_dict(self._add_adapter(model), strict=False)
        return model

    def _empty(self) -> _Empty:
        empty = _empty(self.folder, head_seed(self.seed) if self.scores else None)
        empty.added.update(self._add_adapter(empty.decoder))
        dtype = self.frozen_dtype
        for parameter in product_matrices(empty.decoder):
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        return empty

    def _add_adapter(self, model: Decoder) -> dict[str, Tensor]:
        """Freeze a model, in place, but for its scalar head, and put the adapter beside it; returns its first numbers by their
        names. Nothing is done, and nothing returned, without an adapter."""
        adapter = self.adapter
        if adapter is None:
            return {}
        add_adapters(
            model,
            rank=adapter.rank,
            scale=adapter.scale,
            dropout=adapter.dropout,
            patterns=tuple(adapter.modules),
            magnitude=adapter.dora,
        )
        train_whole(model, adapter.modules_to_save)
        if self.scores:
            model.get_parameter(SCORE).requires_grad_(True)
        return initial_tensors(model, self.seed)


@torch.no_grad()
def read_quantised(folder: Path, config: QuantizeConfig, device: torch.device | str) -> Decoder:
    """The model of a folder with its blocks' matrices quantised as they are read, one after the other: memory is that of the
    codes and of a few matrices, not of the model. What is not quantised keeps the type that it is stored in.

    The same as `quantise(load_model(folder))`. Raises ArtefactError as `find_tensors`.
    """
    stored = find_tensors(folder, read_model_config(folder))
    model = empty_decoder(stored.config)
    schemes = {weight_name(module): (module, scheme) for module, scheme in plan(model, config).schemes.items()}
    codes: dict[str, Codes] = {}
    rest: dict[str, Tensor] = {}
    packed: dict[str, Tensor] = {}

    def take(name: str, tensor: Tensor) -> None:
        if name not in schemes:
            rest[name] = tensor.to(device, copy=True)
            return
        module, scheme = schemes[name]
        codes[module] = scheme.quantise(tensor.to(device), search_clip=config.search_clip)

    for path, tensors in stored.files.items():
        with opening(path):
            file = WeightsFile(path)
            for disk_name, one in tensors.items():
                assert isinstance(one, Stored), disk_name
                tensor = file.passing(disk_name)
                if one.is_whole:
                    take(one.views[0].name, tensor)
                    continue
                for place in one.views:
                    if place.name not in packed:
                        packed[place.name] = torch.empty(stored.shapes[place.name], dtype=tensor.dtype)
                one.unpack(tensor, packed)
    for name in list(packed):
        take(name, packed.pop(name))
    if stored.second_head is not None:
        stored.check_second_head(rest[EMBEDDING])
    take_codes(model, codes)
    weights = {f"{module}.{part}": tensor for module, one in codes.items() for part, tensor in one.tensors.items()}
    # moves the tables of rotary positions as well
    return fill(model, rest | weights).to(device)


def head_seed(seed: int) -> int:
    """Seed of the new scalar head of a run."""
    return derive_seed(seed, "score head")


def open_beside(folder: Path, device: torch.device | str, mesh: Mesh, *, seed_of_head: int | None = None) -> UnpreparedModel:
    """The model of a folder in float32, on each process of a mesh: a reference, a teacher, or with a scalar head a critic.

    seed_of_head: of a critic's new head, for a language model; None: the model predicts tokens. A quantised model is whole on
    every process. Raises ArtefactError as `load_model`.
    """
    if not mesh.alone and not holds_codes(folder):
        return _empty(folder, seed_of_head).opened(device)
    if seed_of_head is None:
        return UnpreparedModel(load_trained_decoder(folder, device, torch.float32))
    return UnpreparedModel(load_scorer(folder, device, torch.float32, seed=seed_of_head))


def _empty(folder: Path, seed_of_head: int | None) -> _Empty:
    if seed_of_head is None and is_vision_folder(folder):
        config = read_vision_language(folder)
        return _Empty(VisionDecoder.empty(config), find_vision_tensors(folder, config), {})
    stored = find_tensors(folder, read_model_config(folder))
    shape, added = stored.config, {}
    if seed_of_head is None:
        refuse_scorer(shape, folder)
    elif not shape.num_scores:
        shape = scorer_config(shape)
        added[SCORE] = new_head(shape, seed_of_head)
    return _Empty(empty_decoder(shape), stored, added)
