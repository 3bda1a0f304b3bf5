"""Low-rank adapters of one model merged into one: weighted sums of their updates δᵢ = sᵢ Bᵢ Aᵢ.

exact       Σ wᵢ δᵢ = [w₁ s₁ B₁ | w₂ s₂ B₂ | …] [A₁; A₂; …]: the ranks add up, nothing is lost
to a rank   the best approximation of that rank (Eckart & Young 1936). For a sum no whole matrix is made: B = Q₁ R₁,
            Aᵀ = Q₂ R₂, and the SVD of the small R₁ R₂ᵀ
TIES, DARE  change entries of δᵢ, so their merged difference has full rank, and is approximated
factors     Σ √|wᵢsᵢ| Bᵢ and Σ ±√|wᵢsᵢ| Aᵢ apart, as peft's `linear` has it: the products of one adapter's B with another's
            A come in too, so it is rough; for adapters that must keep their rank, and so their speed
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.core.errors import ConfigError
from bessemer.core.hashing import derive_seed
from bessemer.core.progress import Progress
from bessemer.core.store import new_folder
from bessemer.model.adapters import Adapter, Update
from bessemer.model.adapters.folder import read_adapter, write_adapter
from bessemer.model.merging.config import METHODS, MergeConfig, value_at
from bessemer.model.merging.methods import DeltaOptions, merge_deltas
from bessemer.model.storage.folder import load_model

# Shapes: N outputs, K inputs, R rank.

#: Methods of merging adapters into one, with a line about each.
ADAPTER_METHODS: Mapping[str, str] = {
    "task_arithmetic": "weighted sum of the updates, exact",
    "linear": "the same, divided by the sum of the weights",
    "ties": METHODS["ties"].summary,
    "dare_linear": METHODS["dare_linear"].summary,
    "dare_ties": METHODS["dare_ties"].summary,
    "factors": "A and B summed apart, as peft's linear: rough, at the adapters' own rank",
}


class AdapterOptions(NamedTuple):
    """rank: of the merged adapter; None: the sum of the ranks for sums, the largest rank for TIES and DARE. options: of TIES
    and DARE, given the name of a module."""

    method: str
    rank: int | None
    options: Callable[[str], DeltaOptions]


def merged_adapter_folder(
    base: Path,
    adapters: Sequence[Path],
    config: MergeConfig,
    method: str,
    out: Path,
    *,
    rank: int | None,
    seed: int,
    progress: Progress,
) -> Adapter:
    """Write the merge of adapters of one model as an adapter's folder, which is there whole or not at all.

    config: the adapters' weights and densities in `models`, and the settings of the method. Raises ArtefactError for an
    adapter that is not of the model, ConfigError for one with magnitudes (DoRA).
    """
    model = load_model(base, scores=True)
    opened = [read_adapter(folder, model, dtype=torch.float32) for folder in adapters]
    for folder, adapter in zip(adapters, opened, strict=True):
        if adapter.has_magnitudes:
            raise ConfigError(
                f"{folder}: DoRA's magnitudes do not add up; merge such adapters into the model: leave out --as-adapter"
            )
    layers = model.config.num_hidden_layers

    def weights(name: str) -> list[float]:
        depth = _depth(name, layers)
        return [value_at(one.weight, [name], depth, f"weight of {one.model}") for one in config.models]

    def options(name: str) -> DeltaOptions:
        depth = _depth(name, layers)
        shares = [config.density if one.density is None else one.density for one in config.models]
        densities = [value_at(share, [name], depth, "density") for share in shares]

        def generator(index: int) -> torch.Generator:
            return torch.Generator().manual_seed(derive_seed(seed, "merge", index, name))

        return DeltaOptions(densities, config.normalizes, config.rescaling, config.factor, generator)

    names = dict.fromkeys(name for adapter in opened for name in adapter.updates)
    updates = {}
    with new_folder(out) as partial, progress.task("merge", total=len(names), unit="layers") as task:
        for name in names:
            present = [
                (one.updates[name], weight) for one, weight in zip(opened, weights(name), strict=True) if name in one.updates
            ]
            updates[name] = merge_updates(present, AdapterOptions(method, rank, options), name)
            task.advance()
        merged = Adapter(updates)
        write_adapter(merged, model, partial)
    return merged


def _depth(name: str, layers: int) -> float:
    parts = name.split(".")
    return int(parts[1]) / (layers - 1) if layers > 1 and parts[0] == "layers" else 0.0


@torch.no_grad()
def merge_updates(weighted: Sequence[tuple[Update, float]], options: AdapterOptions, name: str = "") -> Update:
    """One update from several of one layer, each with its weight; its scale is 1.

    name: the layer's, by which DARE's random numbers are chosen. Without a rank of its own, a sum has the sum of the ranks.
    """
    updates, weights = [update for update, _ in weighted], [weight for _, weight in weighted]
    if options.method == "factors":
        return _by_factors(updates, weights)
    if options.method in ("task_arithmetic", "linear"):
        given = options.options(name)
        total = math.fsum(weights) if options.method == "linear" or given.normalize else 1.0
        if abs(total) < 1e-8:
            raise ConfigError("the weights add up to 0; set normalize: false for sums")
        factor = given.factor / total
        up_NR = torch.cat([update.up_NR * (update.scale * weight * factor) for update, weight in weighted], dim=1)
        down_RK = torch.cat([update.down_RK for update in updates])
        if options.rank is None or options.rank >= len(down_RK):
            return Update(down_RK, up_NR, 1.0)
        return _reduced(up_NR, down_RK, options.rank)
    deltas = [update.scale * update.up_NR @ update.down_RK for update in updates]
    delta_NK = merge_deltas(options.method, deltas, weights, options.options(name))
    return _approximated(delta_NK, options.rank or max(len(update.down_RK) for update in updates))


def _by_factors(updates: Sequence[Update], weights: Sequence[float]) -> Update:
    ranks = {len(update.down_RK) for update in updates}
    if len(ranks) > 1:
        raise ConfigError(f"factors: adapters of one rank are summed, and these have {', '.join(map(str, sorted(ranks)))}")
    down_RK, up_NR = torch.zeros_like(updates[0].down_RK), torch.zeros_like(updates[0].up_NR)
    for update, weight in zip(updates, weights, strict=True):
        whole = weight * update.scale
        down_RK += update.down_RK * math.copysign(math.sqrt(abs(whole)), whole)
        up_NR += update.up_NR * math.sqrt(abs(whole))
    return Update(down_RK, up_NR, 1.0)


def _reduced(up_NR: Tensor, down_RK: Tensor, rank: int) -> Update:
    """The best approximation of a product with `rank` ranks, without the product."""
    left_NR, upper_RR = torch.linalg.qr(up_NR)
    right_KR, lower_RR = torch.linalg.qr(down_RK.T)
    middle = _approximated(upper_RR @ lower_RR.T, rank)
    return Update(middle.down_RK @ right_KR.T, left_NR @ middle.up_NR, 1.0)


def _approximated(delta_NK: Tensor, rank: int) -> Update:
    """The best approximation of a matrix with `rank` ranks; the singular values are on B's side."""
    up_NS, values_S, down_SK = torch.linalg.svd(delta_NK, full_matrices=False)
    return Update(down_SK[:rank].contiguous(), up_NS[:, :rank] * values_S[:rank], 1.0)
