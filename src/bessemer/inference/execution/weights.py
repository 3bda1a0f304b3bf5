"""A served model's weights and low-rank adapters: loaded, replaced, and exchanged between processes that share the model.

`WeightsStamp` notices changes, which make keys and packed weights stale. Rank 0 broadcasts whole tensors in pieces, and every
rank keeps its shard of each. An adapter's update is sharded as the layer that it changes is:

    outputs sharded:  y_r = W_r x + s · B_r (A x)          inputs sharded:  y = Σ_r [W_r x_r + s · B (A_r x_r)]

So the rows of B follow those of W, or the columns of A do, and what the ranks add up is the layer's own sum: an adapter adds
no collective to a step. Layers that every rank has whole have their updates whole.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from bessemer.core.errors import RequestError
from bessemer.distributed.mesh import as_dtensor, local, sharded_dim
from bessemer.model.adapters import Adapter, Update
from bessemer.model.adapters.fingerprints import WeightSample, fingerprinted_tensors, rounded, sampled_places
from bessemer.model.adapters.folder import adaptable_layers
from bessemer.model.adapters.trained import LowRankUpdate
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.initialisation import tensor_shapes


class WeightsStamp:
    """The weights of a model as they are now: which tensors, where in memory, and how often each was changed in place.

    References are weak, so that weights which were replaced are freed; unlike addresses they are never used again. What is
    written through `.data` leaves no trace.
    """

    def __init__(self, model: Decoder) -> None:
        self._stamps = [(weakref.ref(weight), _state(weight)) for weight in _weights(model)]

    def is_of(self, model: Decoder) -> bool:
        """Whether no weight was changed, moved or replaced since."""
        weights = _weights(model)
        return len(weights) == len(self._stamps) and all(
            reference() is weight and state == _state(weight)
            for (reference, state), weight in zip(self._stamps, weights, strict=True)
        )


def replace_weights(model: Decoder, weights: Mapping[str, Tensor]) -> None:
    """Copy other weights into a model's own, by the names of its `state_dict`.

    Raises RequestError for a name or a shape that the model does not have, and changes nothing then.
    """
    own = model.state_dict()
    check_weights(weights, {name: tuple(tensor.shape) for name, tensor in own.items()})
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)


def check_weights(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise RequestError for a weight whose name or shape is none of a model's, given by name."""
    for name, tensor in weights.items():
        if name not in shapes:
            raise RequestError(f"the model has no weight {name!r}")
        if shapes[name] != tuple(tensor.shape):
            raise RequestError(f"weight {name!r} has shape {shapes[name]}, not {tuple(tensor.shape)}")


def _weights(model: Decoder) -> list[Tensor]:
    """Parameters and codes of quantised layers, but no tables that are computed, no codes that were released, and no adapter in
    training that is switched off."""
    parts = [module for module in model.modules() if not isinstance(module, LowRankUpdate) or module.is_on]
    parameters = dict.fromkeys(weight for part in parts for weight in part._parameters.values() if weight is not None)
    buffers = [
        buffer
        for module in parts
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
    return [*parameters, *buffers]


def _state(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version


#: Most bytes of a piece, unless a single row has more.
PIECE_BYTES = 64 << 20


class WeightPiece(NamedTuple):
    """Neighbouring rows of a whole tensor: `start` and `shape`, (rows, …)."""

    name: str
    start: int
    shape: tuple[int, ...]


def check_whole_weights(config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """Raise RequestError for a name or a shape that the unsharded model does not have."""
    check_weights(weights, tensor_shapes(config))


def pieces_of(model: Decoder, weights: Mapping[str, Tensor]) -> Iterator[tuple[WeightPiece, Tensor]]:
    """Whole tensors in pieces of at most `PIECE_BYTES`, where the model's weights lie and in their types."""
    for name, whole in weights.items():
        dtype = held_weight(model, name).dtype
        rows = max(1, PIECE_BYTES // max(1, whole[0].numel() * dtype.itemsize))
        for start, part in zip(range(0, len(whole), rows), whole.split(rows), strict=True):
            yield WeightPiece(name, start, tuple(part.shape)), part.detach().to(model.device, dtype).contiguous()


@torch.no_grad()
def exchange_piece(model: Decoder, piece: WeightPiece, values: Tensor | None = None) -> None:
    """Copy a piece into this rank's shard. All ranks call it with the same piece; values: on rank 0, what it holds."""
    own = held_weight(model, piece.name)
    shard = local(own)
    if values is None:
        values = torch.empty(piece.shape, dtype=shard.dtype, device=shard.device)
    # as bytes: of any type
    dist.broadcast(values.view(torch.uint8), src=0)
    start, stop = piece.start, piece.start + piece.shape[0]
    sharded, dim = as_dtensor(own), sharded_dim(own)
    if sharded is not None and dim is not None:
        assert sharded.device_mesh.ndim == 1, "a weight is sharded over one axis"
        rank = sharded.device_mesh.get_local_rank()
        if dim == 0:
            # the last rows of a padded vocabulary belong to no token
            first = rank * len(shard)
            begin, end = max(start, first), min(stop, first + len(shard))
            if begin < end:
                shard[begin - first : end - first] = values[begin - start : end - start]
            return
        values = values.chunk(sharded.device_mesh.size(), dim)[rank]
    shard[start:stop] = values


def held_weight(model: Decoder, name: str) -> Tensor:
    """A weight as this rank holds it, by its name in `state_dict`."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    parameter = module._parameters.get(leaf)
    held = module._buffers[leaf] if parameter is None else parameter
    assert held is not None, "names were checked"
    return held


class LoadedAdapter(NamedTuple):
    """An adapter; salt: keeps its KV blocks apart from others', and from those of an earlier adapter of the same name."""

    adapter: Adapter
    salt: str


class LoadedAdapters:
    """Names and their adapters. A request keeps the adapter that it began with, or what that was updated to."""

    def __init__(self) -> None:
        self._loaded: dict[str, LoadedAdapter] = {}
        self._default: LoadedAdapter | None = None
        self._generations = count()
        self._updates: WeakKeyDictionary[Adapter, LoadedAdapter] = WeakKeyDictionary()
        #: Adapters of DoRA that a name or a request still has.
        self._with_gains: WeakSet[Adapter] = WeakSet()

    @property
    def names(self) -> tuple[str, ...]:
        """The names that are loaded."""
        return tuple(self._loaded)

    def load(self, name: str, adapter: Adapter) -> None:
        """Give a name to an adapter; one that has the name already is replaced."""
        self._loaded[name] = self._with_salt(f"adapter {name}", adapter)

    def _with_salt(self, what: str, adapter: Adapter) -> LoadedAdapter:
        if adapter.gains:
            self._with_gains.add(adapter)
        return LoadedAdapter(adapter, f"{what} {next(self._generations)}")

    def load_default(self, adapter: Adapter) -> None:
        """Take an adapter for the requests that name none."""
        self._default = self._with_salt("default adapter", adapter)

    def update(self, name: str, adapter: Adapter) -> tuple[Adapter, LoadedAdapter]:
        """Put an adapter in the place of one; the one before, and the new one. Raises RequestError for a name not loaded."""
        before = self.find(name).adapter
        self.load(name, adapter)
        self._updates[before] = self._loaded[name]
        return before, self._loaded[name]

    def updated(self, adapter: Adapter) -> LoadedAdapter | None:
        """What an adapter was updated to last; None where it was not."""
        newest = None
        while (newer := self._updates.get(adapter)) is not None:
            newest, adapter = newer, newer.adapter
        return newest

    def refit(self, model: Decoder) -> None:
        """Fit the adapters to weights that have changed; those of requests whose name has another adapter now, too."""
        for adapter in self._with_gains:
            adapter.refit(model)

    def unload(self, name: str) -> None:
        """Remove a name. Raises RequestError where it is not loaded."""
        self.find(name)
        del self._loaded[name]

    def of(self, name: str | None) -> LoadedAdapter | None:
        """The adapter of a request: of the name that it has, or the default one. Raises RequestError as `find`."""
        return self._default if name is None else self.find(name)

    def find(self, name: str) -> LoadedAdapter:
        """The adapter of a name. Raises RequestError where it is not loaded."""
        if name not in self._loaded:
            known = f"loaded: {', '.join(self._loaded)}" if self._loaded else "none is loaded"
            raise RequestError(f"unknown adapter {name!r}; {known}")
        return self._loaded[name]


def copied_adapter(adapter: Adapter, model: Decoder) -> Adapter:
    """An adapter in memory as one of its own for a model: where its weights lie, in their type, and no longer the caller's.

    Raises RequestError for an update of a layer that an adapter of the model cannot change, or of another shape.
    """
    layers = adaptable_layers(model)
    if not adapter.updates:
        raise RequestError("the adapter has no update of any layer")
    for name, (down_RK, up_NR, _, magnitude_N) in adapter.updates.items():
        if name not in layers:
            raise RequestError(f"the adapter changes {name!r}, which is no layer of this model that an adapter can change")
        outputs, inputs = layers[name]
        rank = len(down_RK)
        if (tuple(down_RK.shape), tuple(up_NR.shape)) != ((rank, inputs), (outputs, rank)):
            raise RequestError(
                f"the update of {name!r} has shapes {tuple(down_RK.shape)} and {tuple(up_NR.shape)}, "
                f"not (rank, {inputs}) and ({outputs}, rank)"
            )
        if magnitude_N is not None and tuple(magnitude_N.shape) != (outputs,):
            raise RequestError(f"the magnitudes of {name!r} have shape {tuple(magnitude_N.shape)}, not ({outputs},)")
    copied = Adapter({name: update.each(lambda tensor: tensor.detach().clone()) for name, update in adapter.updates.items()})
    return copied.fitted(model).to(model.device, model.dtype)


# Shapes: N outputs, K inputs, R rank, P places of a tensor that are sampled.

#: Below every number of 16 bits: a place that no rank has filled.
_NOTHING = -(1 << 16)


class UpdateShape(NamedTuple):
    """The update of one layer of the unsharded model, without its numbers."""

    name: str
    rank: int
    outputs: int
    inputs: int
    scale: float


def shapes_of(adapter: Adapter) -> list[UpdateShape]:
    """An adapter's updates without their numbers."""
    return [
        UpdateShape(name, len(down_RK), up_NR.shape[0], down_RK.shape[1], scale)
        for name, (down_RK, up_NR, scale, _) in adapter.updates.items()
    ]


@torch.no_grad()
def exchange_adapter(
    model: Decoder, shapes: Sequence[UpdateShape], whole: Adapter | None = None, *, axis: DeviceMesh | None = None
) -> Adapter:
    """This rank's shard of an adapter. All ranks of the axis call it with the same shapes.

    whole: on the first rank, the adapter where the model lies and in its type. axis: None: all processes of the job.
    """
    updates, group = {}, _group_of(axis)
    for name, rank, outputs, inputs, scale in shapes:
        if whole is None:
            down_RK = torch.empty(rank, inputs, dtype=model.dtype, device=model.device)
            up_NR = torch.empty(outputs, rank, dtype=model.dtype, device=model.device)
        else:
            down_RK, up_NR, *_ = whole.updates[name]
            down_RK, up_NR = down_RK.contiguous(), up_NR.contiguous()
        for matrix in (down_RK, up_NR):
            # as bytes: of any type
            dist.broadcast(matrix.view(torch.uint8), group=group, group_src=0)
        updates[name] = _shard_of(model, name, Update(down_RK, up_NR, scale))
    return Adapter(updates)


def _group_of(axis: DeviceMesh | None) -> ProcessGroup | None:
    return None if axis is None else axis.get_group()


def _shard_of(model: Decoder, name: str, update: Update) -> Update:
    """The part of a layer's update that this rank's part of the layer computes."""
    weight = model.get_submodule(name)._parameters["weight"]
    assert weight is not None, name
    sharded, dim = as_dtensor(weight), sharded_dim(weight)
    if sharded is None or dim is None:
        return update
    rank, ranks = sharded.device_mesh.get_local_rank(), sharded.device_mesh.size()
    down_RK, up_NR, scale, _ = update
    # a copy: a view would keep the whole in memory
    if dim == 0:
        return Update(down_RK, up_NR.chunk(ranks)[rank].clone(), scale)
    return Update(down_RK.chunk(ranks, 1)[rank].clone(memory_format=torch.contiguous_format), up_NR, scale)


class AdapterNumbers:
    """Rank 0's numbers of adapters: commands name them by these, and the workers look up their shards."""

    def __init__(self) -> None:
        self._numbers: weakref.WeakKeyDictionary[Adapter, int] = weakref.WeakKeyDictionary()
        self._next = count()
        # filled by whichever thread drops an adapter last
        self._freed: deque[int] = deque()

    def next(self) -> int:
        """A number that no adapter had."""
        return next(self._next)

    def assign(self, number: int, adapter: Adapter) -> None:
        """Give an adapter its number, until it is gone."""
        self._numbers[adapter] = number
        weakref.finalize(adapter, self._freed.append, number)

    def of(self, adapter: Adapter) -> int:
        """The number of an adapter."""
        return self._numbers[adapter]

    def take_freed(self) -> list[int]:
        """The numbers of adapters that are gone since the last call: the workers may drop their shards."""
        return [self._freed.popleft() for _ in range(len(self._freed))]


@torch.no_grad()
def gather_weight_samples(model: Decoder, axis: DeviceMesh | None = None) -> dict[str, WeightSample]:
    """The samples by which an adapter knows its base, of the unsharded model. All ranks of the axis call it.

    One all-reduce.
    """
    own = fingerprinted_tensors(model)
    shapes = {name: torch.Size(shape) for name, shape in tensor_shapes(model.config).items()}
    samples = torch.cat([_own_sample(tensor, shapes[name]) for name, tensor in own.items()], dim=1)
    dist.all_reduce(samples, dist.ReduceOp.MAX, group=_group_of(axis))
    numbers = samples.cpu().to(torch.int16).view(torch.bfloat16)
    lengths = [len(sampled_places(shapes[name].numel())) for name in own]
    parts = numbers.split(lengths, dim=1)
    return {name: WeightSample(tuple(shapes[name]), part) for name, part in zip(own, parts, strict=True)}


def _own_sample(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The sampled numbers that this rank's shard of a tensor holds, `rounded`, as the bits of bfloat16 in int32, (2, P);
    `_NOTHING` elsewhere.

    shape: of the whole tensor.
    """
    shard = local(tensor.detach())
    places = torch.tensor(sampled_places(shape.numel()), device=shard.device)
    held = torch.ones_like(places, dtype=torch.bool)
    sharded, dim = as_dtensor(tensor), sharded_dim(tensor)
    if sharded is not None and dim is not None:
        size = shard.shape[dim]
        inner = shape[dim + 1 :].numel()
        # a place as its index before, along and behind the sharded dimension
        before, along, behind = places // (inner * shape[dim]), places // inner % shape[dim], places % inner
        along = along - sharded.device_mesh.get_local_rank() * size
        held = (along >= 0) & (along < size)
        places = (before * size + along) * inner + behind
    numbers_2P = rounded(shard.flatten()[places[held]])
    bits_2P = torch.full((2, *places.shape), _NOTHING, dtype=torch.int32, device=shard.device)
    bits_2P[:, held] = numbers_2P.view(torch.int16).to(torch.int32)
    return bits_2P
