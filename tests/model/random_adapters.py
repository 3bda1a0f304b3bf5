"""Adapters with random numbers, of which every one counts."""

from __future__ import annotations

import torch
from torch import nn

from bessemer.model.adapters import Adapter, Update
from bessemer.model.decoder import Decoder
from bessemer.model.quantisation.quantised_layers import QuantisedLinear


def random_adapter(
    model: Decoder,
    seed: int = 1,
    rank: int = 3,
    endings: tuple[str, ...] = ("proj", "proj_with_mqa"),
    *,
    magnitudes: bool = False,
) -> Adapter:
    """Updates of all linear layers in the blocks whose names end so, about half as large as their weights."""
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for name, module in model.named_modules():
        if name.startswith("layers.") and isinstance(module, (nn.Linear, QuantisedLinear)) and name.endswith(endings):
            down_RK = torch.randn(rank, module.in_features, generator=generator) * module.in_features**-0.5
            up_NR = torch.randn(module.out_features, rank, generator=generator) * rank**-0.5
            own_N = 0.5 + torch.rand(module.out_features, generator=generator) if magnitudes else None
            updates[name] = Update(down_RK, up_NR, 0.5, own_N)
    return Adapter(updates).to(model.device, model.dtype)


def merge(model: Decoder, adapter: Adapter) -> Decoder:
    """The model with W + s B A for every weight that the adapter changes, and the norms of its rows; in place."""
    with torch.no_grad():
        for name, (down_RK, up_NR, scale, magnitude_N) in adapter.updates.items():
            weight_NK = model.get_submodule(name).weight
            weight_NK += scale * up_NR @ down_RK
            if magnitude_N is not None:
                weight_NK *= (magnitude_N / weight_NK.square().sum(1).sqrt())[:, None]
    return model
