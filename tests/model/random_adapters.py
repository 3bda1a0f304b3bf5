"""Adapters with random numbers, of which every one counts."""

from __future__ import annotations

import torch
from torch import nn

from bessemer.model.adapters import Adapter, Update
from bessemer.model.decoder import Decoder
from bessemer.model.quantised_linear import QuantisedLinear


def random_adapter(
    model: Decoder, seed: int = 1, rank: int = 3, endings: tuple[str, ...] = ("proj", "proj_with_mqa")
) -> Adapter:
    """Updates of all linear layers in the blocks whose names end so, about half as large as their weights."""
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for name, module in model.named_modules():
        if name.startswith("layers.") and isinstance(module, (nn.Linear, QuantisedLinear)) and name.endswith(endings):
            down_RK = torch.randn(rank, module.in_features, generator=generator) * module.in_features**-0.5
            up_NR = torch.randn(module.out_features, rank, generator=generator) * rank**-0.5
            updates[name] = Update(down_RK, up_NR, 0.5)
    return Adapter(updates).to(model.device, model.dtype)


def merge(model: Decoder, adapter: Adapter) -> Decoder:
    """The model with W + s B A for every weight that the adapter changes; in place."""
    with torch.no_grad():
        for name, (down_RK, up_NR, scale) in adapter.updates.items():
            model.get_submodule(name).weight += scale * up_NR @ down_RK
    return model
