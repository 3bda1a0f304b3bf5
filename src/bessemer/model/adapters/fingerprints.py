"""Fingerprints of a model: hashes of a few numbers of each tensor, by which an adapter knows its base.

Shapes: P places of a tensor that are sampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.core.hashing import hash_bytes
from bessemer.model.adapters import is_of_adapter
from bessemer.model.decoder import Decoder
from bessemer.model.families.layout import Stored, whole
from bessemer.model.quantisation.quantised_layers import is_quantised
from bessemer.model.storage.model_config import holds_codes, read_model_config
from bessemer.model.storage.weights import WeightsFile, find_tensors, opening

#: Numbers of each tensor that enter the fingerprint of a base model.
_SAMPLE = 4096
#: Suffix of the fingerprints that a float16 copy of the base has as well.
FLOAT16 = "_float16"


class WeightSample(NamedTuple):
    """Some numbers of a tensor: the whole one's shape, and (up to `_SAMPLE`) numbers spread over it, `rounded`."""

    shape: tuple[int, ...]
    numbers_2P: Tensor


def fingerprints(model: Decoder, samples: Mapping[str, WeightSample] | None = None) -> dict[str, str]:
    """Hashes by which an adapter knows its base: of the norms, and of all weights where none is quantised.

    Quantisation leaves norms as they are (where it folds scales into them, the adapter would not fit either). Each tensor
    gives some thousand numbers, spread over it and `rounded` in two ways: so it is quick, and copies in other types are known.
    samples: of the whole model, where `model` holds shards of it, or by `samples_of_folder`.
    """
    if samples is None:
        samples = {name: _sample(tensor) for name, tensor in fingerprinted_tensors(model).items()}
    hashes = {}
    for way, ending in enumerate(("", FLOAT16)):
        hashes[f"norms{ending}"] = _hash_of((sample for name, sample in samples.items() if "norm" in name), way)
        if not is_quantised(model):
            hashes[f"weights{ending}"] = _hash_of(samples.values(), way)
    return hashes


def fingerprinted_tensors(model: Decoder) -> dict[str, Tensor]:
    """The tensors of a model that `fingerprints` samples, in their order: without those of an adapter in training."""
    tensors = sorted(model.state_dict().items())
    return {name: tensor for name, tensor in tensors if not name.startswith("mtp.") and not is_of_adapter(name)}


def rounded(numbers_P: Tensor) -> Tensor:
    """Numbers in bfloat16 in two ways, (2, P): rounded at once, and through float16, as a copy of the model in float16 gives
    them."""
    return torch.stack([numbers_P.to(torch.bfloat16), numbers_P.to(torch.float16).to(torch.bfloat16)])


def sampled_places(numel: int) -> range:
    """Which numbers of a tensor, row after row, are sampled."""
    return range(0, numel, max(1, numel // _SAMPLE))[:_SAMPLE]


def samples_of_folder(folder: Path) -> dict[str, WeightSample] | None:
    """What `fingerprints` samples of the model in a folder, read tensor by tensor: the file's pages do not stay in memory, as
    those of an opened model do. None for a quantised model, and where several tensors of the file are one of ours."""
    if holds_codes(folder):
        return None
    stored = find_tensors(folder, read_model_config(folder))
    samples: dict[str, WeightSample] = {}
    for path, tensors in stored.files.items():
        with opening(path):
            file = WeightsFile(path)
            for disk_name, one in tensors.items():
                assert isinstance(one, Stored), one
                if any(view.name in samples for view in one.views):
                    return None
                values = file.passing(disk_name)
                if len(one.views) == 1 and one.views[0].view is whole and one.shape is None:
                    ours = {one.views[0].name: values}
                else:
                    ours = {view.name: torch.empty(stored.shapes[view.name], dtype=values.dtype) for view in one.views}
                    one.unpack(values, ours)
                samples |= {name: _sample(tensor) for name, tensor in ours.items() if not name.startswith("mtp.")}
    return dict(sorted(samples.items()))


def _sample(tensor: Tensor) -> WeightSample:
    places = sampled_places(tensor.numel())
    numbers_P = tensor.detach().flatten()[places.start : places.stop : places.step]
    return WeightSample(tuple(tensor.shape), rounded(numbers_P.cpu()))


def _hash_of(samples: Iterable[WeightSample], way: int) -> str:
    """way: of `rounded`."""
    parts = []
    for shape, numbers_2P in samples:
        parts += [str(shape).encode(), numbers_2P[way].view(torch.int16).numpy().tobytes()]
    return hash_bytes(*parts)
