"""Weights that travel over HTTP: a model's tensors, or an adapter's, in pieces of a few MiB that are put together on the other
side.

A piece is the bytes of a safetensors file, whose tensors are neighbouring rows of whole ones. Its metadata has a JSON object
under `rows`: for each tensor its first row, and the number of rows of the whole. A tensor without a dimension has one row.

An adapter's tensors are named `LAYER/down` (R, K), `LAYER/up` (N, R) and `LAYER/magnitude` (N,), R its rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from bessemer.core.errors import RequestError
from bessemer.inference.execution.weights import check_weights
from bessemer.model.adapters import Adapter, Update
from bessemer.model.adapters.folder import adaptable_layers
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.initialisation import tensor_shapes

#: Bytes of a piece, unless a single row has more: below the body that a server reads by default.
PIECE_BYTES = 4 << 20
#: Key of a piece's metadata.
_ROWS = "rows"
_PARTS = ("down", "up", "magnitude")


def pieces_of(tensors: Mapping[str, Tensor], piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
    """Whole tensors as pieces, in their types; small ones share a piece."""
    piece: dict[str, Tensor] = {}
    places: dict[str, tuple[int, int]] = {}
    held = 0
    for name, tensor in tensors.items():
        whole = tensor.detach().to("cpu").reshape(-1, *tensor.shape[1:]).contiguous()
        rows = len(whole)
        step = max(1, piece_bytes // max(1, whole[:1].nbytes))
        for start in range(0, rows, step):
            part = whole[start : start + step]
            if held and held + part.nbytes > piece_bytes:
                yield _encoded(piece, places)
                piece, places, held = {}, {}, 0
            piece[name], places[name] = part, (start, rows)
            held += part.nbytes
            if rows > step:
                yield _encoded(piece, places)
                piece, places, held = {}, {}, 0
    if piece:
        yield _encoded(piece, places)


def _encoded(piece: Mapping[str, Tensor], places: Mapping[str, tuple[int, int]]) -> bytes:
    # a part in the middle of a tensor would be written with the whole
    encoded: bytes = save({name: part.clone() for name, part in piece.items()}, {_ROWS: json.dumps(places)})
    return encoded


def adapter_tensors(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, float]]:
    """An adapter's tensors by the names that they travel under, and the scale of each layer's update."""
    tensors: dict[str, Tensor] = {}
    for name, update in adapter.updates.items():
        parts = zip(_PARTS, (update.down_RK, update.up_NR, update.magnitude_N), strict=True)
        tensors |= {f"{name}/{part}": tensor for part, tensor in parts if tensor is not None}
    return tensors, {name: update.scale for name, update in adapter.updates.items()}


class StagedWeights:
    """Pieces that have come so far, put together on the host. Every name and shape is checked when its first piece comes.

    A whole update takes as much memory here as its tensors.
    """

    def __init__(self, model: Decoder, scales: Mapping[str, float] | None = None) -> None:
        """model: that the weights are for. scales: of the layers of an adapter; None: the update is of the weights."""
        self._config: ModelConfig = model.config
        self._shapes = tensor_shapes(model.config) if scales is None else {}
        self._layers = adaptable_layers(model) if scales is not None else {}
        self._scales = scales
        self._tensors: dict[str, Tensor] = {}
        #: Rows of each tensor that are still to come.
        self._missing: dict[str, int] = {}

    def add(self, piece: bytes) -> None:
        """Take a piece. Raises RequestError for one that cannot be read, or does not belong to this model; nothing is
        taken then."""
        parts, places = _decoded(piece)
        for name, part in parts.items():
            start, rows = places[name]
            shape = (rows, *part.shape[1:])
            known = self._tensors.get(name)
            if known is None:
                self._check(name, shape)
            elif tuple(known.shape) != shape or known.dtype != part.dtype:
                raise RequestError(f"the pieces of {name!r} are of different tensors")
            if not 0 <= start <= rows - len(part):
                raise RequestError(f"a piece of {name!r} has the rows {start} to {start + len(part)} of {rows}")
        for name, part in parts.items():
            start, rows = places[name]
            if name not in self._tensors:
                self._tensors[name] = torch.empty((rows, *part.shape[1:]), dtype=part.dtype)
                self._missing[name] = rows
            self._tensors[name][start : start + len(part)] = part
            self._missing[name] -= len(part)

    def weights(self) -> dict[str, Tensor]:
        """The whole tensors, by the names of the model. Raises RequestError where some have not come."""
        self._check_complete()
        return {name: tensor.reshape(self._shapes[name]) for name, tensor in self._tensors.items()}

    def adapter(self) -> Adapter:
        """The adapter. Raises RequestError where a tensor of it has not come, or one does not fit another."""
        assert self._scales is not None
        self._check_complete()
        updates = {}
        for name, scale in self._scales.items():
            down_RK, up_NR, magnitude_N = (self._tensors.get(f"{name}/{part}") for part in _PARTS)
            if down_RK is None or up_NR is None:
                raise RequestError(f"the update of {name!r} has not come whole; send its down and up matrices")
            updates[name] = Update(down_RK, up_NR, scale, magnitude_N)
        return Adapter(updates)

    def _check_complete(self) -> None:
        if not self._tensors:
            raise RequestError("no tensor has come")
        if incomplete := next((name for name, rows in self._missing.items() if rows), None):
            raise RequestError(f"{incomplete!r} has not come whole: {self._missing[incomplete]:,} rows are missing")

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if self._scales is None:
            own = {of: tuple(its_shape) or (1,) for of, its_shape in self._shapes.items()}
            check_weights({name: torch.empty(shape, device="meta")}, own)
            return
        layer, _, part = name.rpartition("/")
        if layer not in self._layers or layer not in self._scales or part not in _PARTS:
            raise RequestError(f"the adapter changes {name!r}, which is no layer of this model that an adapter can change")
        outputs, inputs = self._layers[layer]
        fits = {
            "down": shape[1:] == (inputs,) and shape[0] <= min(outputs, inputs),
            "up": shape[:1] == (outputs,) and len(shape) == 2 and shape[1] <= min(outputs, inputs),
            "magnitude": shape == (outputs,),
        }
        if not fits[part]:
            raise RequestError(f"{name!r} has shape {shape}, and the layer goes from {inputs} to {outputs} channels")


def _decoded(piece: bytes) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
    """The tensors of a piece, and their first row and whole number of rows."""
    try:
        parts = load(piece)
        places: Any = json.loads(_metadata(piece)[_ROWS])
        read = {name: (int(places[name][0]), int(places[name][1])) for name in parts}
    except (SafetensorError, ValueError, LookupError, TypeError) as error:
        raise RequestError(f"the piece is no safetensors file with its rows: {str(error) or type(error).__name__}") from None
    if scalar := next((name for name, part in parts.items() if not part.ndim), None):
        raise RequestError(f"{scalar!r} has no rows")
    return parts, read


def _metadata(piece: bytes) -> Mapping[str, str]:
    """The metadata of a safetensors file's bytes: its header is JSON, after 8 bytes that give its length."""
    length = int.from_bytes(piece[:8], "little")
    header: Any = json.loads(piece[8 : 8 + length])
    metadata: Mapping[str, str] = header["__metadata__"]
    return metadata
