"""muP: learning rates and initial weights that transfer from the width at which they were tuned to another.

Yang et al. 2022 ("Tensor Programs V", tables 3 and 8) for optimizers whose updates have entries of one size; Yang, Simon and
Bernstein 2023 ("A Spectral Condition for Feature Learning") for Muon, whose updates have singular values of one size. With m
the width over the one at which the learning rate was tuned, the factors are:

    weights                     initial scale    AdamW, Lion    Muon
    embeddings, norms, biases   1                1              1
    matrices inside blocks      1 / √m           1 / m          1 / √m
    routers and gates           1 / m            1 / m          1 / m
    the last norm               1 / m            1 / m          1 / m

The weights of the last norm carry the factor 1 / m on the logits that tied and untied heads both need: since the updates of
these optimizers do not depend on the size of a weight, a factor in front of it equals a weight and a learning rate that are
smaller by that factor. So a stored model needs no factor, and its architecture does not change.

All widths grow together: more heads of the same size and wider feed-forwards, not more experts. The scale of the attention
scores, 1 / √head_dim, then stays; where heads are widened instead, `query_pre_attn_scalar` makes it 1 / head_dim.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from bessemer.distributed.mesh import ALONE, Mesh, local
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.training.optim.registry import OptimizerSettings

#: Kind of a weight, by which of its dimensions grow with the width: one (a vector or a table), both, only the inputs; the last
#: norm is a kind of its own.
Kind = Literal["vector", "matrix", "output", "last_norm"]

_OUTPUTS = ("router.weight", "shared_expert_gate.weight")
#: Matrices of a block that are not used in a matmul: kernels of a convolution, one per channel.
_VECTORS = ("conv1d.weight",)


def width_ratio(config: OptimizerSettings, model: ModelConfig) -> float:
    """The model's width over `mup_base_width`; 1 where it is not set."""
    return 1.0 if config.mup_base_width is None else model.hidden_size / config.mup_base_width


def kind_of(name: str, dimensions: int) -> Kind:
    """The kind of a decoder parameter, by its name and number of dimensions."""
    parts = name.split(".")
    if parts[0] == "norm" or (parts[0] == "mtp" and parts[2] == "norm"):
        return "last_norm"
    if not name.startswith(("layers.", "mtp.")) or dimensions < 2 or name.endswith(("bias", *_VECTORS)):
        return "vector"
    return "output" if name.endswith(_OUTPUTS) else "matrix"


def rate_factor(name: str, dimensions: int, ratio: float, *, orthogonal: bool) -> float:
    """The factor on a parameter's learning rate at `ratio` times the width. orthogonal: whether Muon updates the matrices."""
    kind = kind_of(name, dimensions)
    if kind == "matrix" and orthogonal:
        return 1 / math.sqrt(ratio)
    return 1.0 if kind == "vector" else 1 / ratio


@torch.no_grad()
def scale_initial_weights(model: Decoder, ratio: float, mesh: Mesh = ALONE) -> bool:
    """Scale a new model's weights, in place, for `ratio` times the width; returns whether it was new.

    A model is new while its last norm has its initial weights; a trained model is not changed. mesh: of the processes between
    which the model is sharded, which all call this.
    """
    unmoved = 0.0 if model.config.norm_offset else 1.0
    weights = {name: local(parameter) for name, parameter in model.named_parameters()}
    last = weights.get("norm.weight")
    (trained,) = mesh.any(last is not None and not torch.equal(last, torch.full_like(last, unmoved)))
    if trained:
        return False
    for name, weight in weights.items():
        kind = kind_of(name, weight.ndim)
        if kind == "matrix":
            weight.mul_(1 / math.sqrt(ratio))
        elif kind == "output":
            weight.mul_(1 / ratio)
        elif kind == "last_norm" and name.endswith("weight"):
            weight.fill_(1 / ratio - (1.0 - unmoved))
    return True
