"""AWQ (Lin et al. 2023, arXiv 2306.00978): inputs with large activations get larger weights before rounding.

Dividing an input by s and multiplying its weights by s changes nothing, but the weights' rounding error then counts 1 / s. For
each input s = (mean |x|)^α, or that over (mean |w|)^(1 - α), which also evens out the weights of a group. α minimises the error
of the block's outputs, with each group of weights rounded within the range that does so for its part of the matrix's.

Scales are folded (`layers/folds.py`) into a norm's weight and the projections that read it, the values and the output
projection, the gated feed-forward's `up` and `down`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bessemer.model.layers.block import Block
from bessemer.model.layers.feed_forward import FeedForward, SparseFeedForward
from bessemer.model.layers.norms import Fold, after_norm, divide_outputs
from bessemer.model.quantisation.base import Codes
from bessemer.model.quantisation.calibration import Fed, Statistics
from bessemer.model.quantisation.integers import Grid, IntegerScheme, as_codes, best_grid, find_grid, in_groups

# Shapes: K channels of the activations (inputs of what reads them), P channels of what makes them, E experts.


def folds_of(block: Block) -> Iterator[Fold]:
    """The folds of a block, in the order of the forward pass."""
    attention_norm, inner_norm = block.input_layernorm, block.post_attention_layernorm
    for fold in block.attention.folds(attention_norm):
        yield fold.below(block.variant.attribute)
    if isinstance(block.mlp, SparseFeedForward):
        yield from _of_experts(block.mlp, inner_norm)
    else:
        yield from after_norm(inner_norm, tuple(f"mlp.{name}" for name in _entries(block.mlp)))
        yield from _up_to_down(block.mlp, "mlp")


def _entries(feed_forward: FeedForward) -> tuple[str, ...]:
    return ("up_proj",) if feed_forward.gate_proj is None else ("gate_proj", "up_proj")


def _up_to_down(feed_forward: FeedForward, name: str) -> Iterator[Fold]:
    """The product of gate and up before `down_proj`; none without a gate, since an activation stands between."""
    if feed_forward.gate_proj is not None:
        up = feed_forward.up_proj
        yield Fold(up.out_features, lambda scales: divide_outputs(up, scales), (f"{name}.down_proj",))


def _of_experts(mlp: SparseFeedForward, norm: nn.Module) -> Iterator[Fold]:
    """The norm before the router and all experts. Inside an expert nothing is scaled: few tokens visit each."""
    readers, others = ["mlp.experts.gate_up_proj"], ["mlp.router"]
    if mlp.shared_expert is not None:
        readers += [f"mlp.shared_expert.{part}" for part in _entries(mlp.shared_expert)]
    if mlp.shared_expert_gate is not None:
        others.append("mlp.shared_expert_gate")
    yield from after_norm(norm, tuple(readers), tuple(others))
    if mlp.shared_expert is not None:
        yield from _up_to_down(mlp.shared_expert, "mlp.shared_expert")


def weight_in(block: Block, name: str) -> nn.Parameter:
    """The weight that a name of a `Fold` stands for, (N, K) or (E, N, K)."""
    module = block.get_submodule(name.rpartition(".")[0])
    last = getattr(module, name.rpartition(".")[2])
    weight = last if isinstance(last, nn.Parameter) else last.weight
    assert isinstance(weight, nn.Parameter), name
    return weight


def apply(fold: Fold, block: Block, scales_P: Tensor) -> Tensor:
    """Divide what makes the activations by the scales and multiply what reads them, in place; returns the scales (K)."""
    scales_K = fold.spread(fold.divide(scales_P))
    for name in (*fold.readers, *fold.others):
        weight = weight_in(block, name)
        weight.data = (weight.data.to(torch.float32) * scales_K).to(weight.dtype)
    return scales_K


# Shapes: N outputs, K inputs, P channels of what makes them, G groups of a row, S weights of a group.

_EXPONENTS = tuple(step / 10 for step in range(11))
#: Tokens of calibration text on which a block is run for every exponent.
_TOKENS = 8192
#: Fractions of a group's range that are tried for every exponent, and for the final rounding.
_FEW_CLIPS = (1.0, 0.9, 0.8)
_MANY_CLIPS = tuple(sign * (1.06 - step / 100) for step in range(51) for sign in (1, -1))


def scale_activations(
    fed: Fed, schemes: Mapping[str, IntegerScheme], statistics: Mapping[str, list[Statistics]]
) -> dict[str, list[Statistics]]:
    """Scale a block's activations wherever that makes the error of the block's outputs smaller, in place.

    schemes and statistics: of its matrices, by their names in the model. Returns the statistics of the inputs as they are now.
    """
    updated = dict(statistics)
    some = fed._replace(inputs=fed.inputs[: max(1, _TOKENS // fed.inputs[0].shape[:2].numel())])
    wanted = some.run()
    for fold in folds_of(fed.block):
        readers = [f"{fed.name}.{reader}" for reader in fold.readers]
        if all(reader in schemes for reader in readers):
            matrices = [
                _Reader(weight_in(fed.block, local), schemes[name], updated[name])
                for local, name in zip(fold.readers, readers, strict=True)
            ]
            scales_K = apply(fold, fed.block, _best_scales(fold, matrices, some, wanted))
            updated |= {name: [one.divided(scales_K) for one in updated[name]] for name in readers}
    return updated


class _Reader(NamedTuple):
    """A matrix that reads activations, or every expert's, (E, N, K), with the statistics of what each reads."""

    weight: nn.Parameter
    scheme: IntegerScheme
    statistics: list[Statistics]

    @property
    def matrices(self) -> Tensor:
        """(E, N, K), float32; E is 1 where there are no experts."""
        weight = self.weight.detach().to(torch.float32)
        return weight if weight.ndim == 3 else weight[None]

    def rounded(self, scales_K: Tensor) -> Tensor:
        """The weight after rounding with scaled columns, divided by the scales again."""
        parts = []
        for matrix_NK, statistics in zip(self.matrices * scales_K, self.statistics, strict=True):
            grid = _clipped(matrix_NK, statistics.divided(scales_K), self.scheme, _FEW_CLIPS)
            parts.append(grid.rounded(in_groups(matrix_NK, self.scheme), self.scheme).flatten(-2) / scales_K)
        return torch.stack(parts).view(self.weight.shape).to(self.weight.dtype)


def _best_scales(fold: Fold, readers: Sequence[_Reader], fed: Fed, wanted: Sequence[Tensor]) -> Tensor:
    """The scales (P), over all exponents, with the smallest error of the block's outputs. wanted: the outputs before."""
    seen = [statistics for reader in readers for statistics in reader.statistics]
    total = torch.stack([statistics.magnitudes_K for statistics in seen]).sum(0)
    activations_P = fold.gathered(total / max(sum(statistics.count for statistics in seen), 1)).clamp(min=1e-4)
    rows_NK = torch.cat([reader.matrices.flatten(0, 1) for reader in readers])
    weights_P = fold.gathered(rows_NK.abs().mean(0)).clamp(min=1e-6)
    candidates = [activations_P**exponent for exponent in _EXPONENTS]
    candidates += [activations_P**exponent / weights_P ** (1 - exponent) for exponent in _EXPONENTS]
    before = [reader.weight.data for reader in readers]
    best_P, least = torch.ones_like(activations_P), math.inf
    for scales_P in candidates:
        scales_P = scales_P / (scales_P.max() * scales_P.min()).sqrt()
        for reader, weight in zip(readers, before, strict=True):
            reader.weight.data = weight
            reader.weight.data = reader.rounded(fold.spread(scales_P))
        error = sum(float((now - then).float().square().sum()) for now, then in zip(fed.run(), wanted, strict=True))
        if error < least:
            best_P, least = scales_P, error
    for reader, weight in zip(readers, before, strict=True):
        reader.weight.data = weight
    return best_P


def round_with_clips(weight_NK: Tensor, statistics: Statistics, scheme: IntegerScheme) -> Codes:
    """Round to nearest; for each group of weights, within the range that leaves the smallest error of the outputs."""
    grid = _clipped(weight_NK, statistics, scheme, _MANY_CLIPS, sweeps=2)
    return as_codes(grid.codes(in_groups(weight_NK, scheme), scheme), grid, scheme)


def _clipped(weight_NK: Tensor, statistics: Statistics, scheme: IntegerScheme, clips: Sequence[float], sweeps: int = 0) -> Grid:
    """The grid (N, G, 1) whose groups have the range with the smallest error of the outputs.

    First each group alone: its error δ_g gives the outputs δ_g H_gg δ_gᵀ. In every sweep, one group after the other beside the
    errors that the others now have: δ_g H_gg δ_gᵀ + 2 δ_g Σ_h H_gh δ_hᵀ.
    """
    groups_NGS = in_groups(weight_NK, scheme)
    count, size = groups_NGS.shape[1:]
    squares_GSGS = statistics.squares_KK.view(count, size, count, size)
    parts: list[Grid] = []
    error_NGS = torch.zeros_like(groups_NGS)
    for sweep in range(sweeps + 1):
        for group in range(count):
            weight_NS, squares_SS = groups_NGS[:, group], squares_GSGS[group, :, group]
            beside_NS = torch.zeros_like(weight_NS)
            if sweep:
                everywhere_NS = torch.einsum("ngs,gst->nt", error_NGS, squares_GSGS[:, :, group])
                beside_NS = everywhere_NS - error_NGS[:, group] @ squares_SS
            error_of = partial(_error_beside, weight_NS, squares_SS, beside_NS, scheme)
            best = best_grid((find_grid(weight_NS, scheme, clip=clip) for clip in clips), error_of)
            parts[group : group + 1] = [best]
            error_NGS[:, group] = best.rounded(weight_NS, scheme) - weight_NS
        if count == 1:
            break
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return Grid(torch.stack([part.scales for part in parts], 1), torch.stack(zeros, 1) if zeros else None)


def _error_beside(weight_NS: Tensor, squares_SS: Tensor, beside_NS: Tensor, scheme: IntegerScheme, grid: Grid) -> Tensor:
    """Error of the outputs due to a group's rounding, (N, 1), given the error of the other groups, `beside_NS`."""
    difference_NS = grid.rounded(weight_NS, scheme) - weight_NS
    return ((difference_NS @ squares_SS + 2 * beside_NS) * difference_NS).sum(-1, keepdim=True)
