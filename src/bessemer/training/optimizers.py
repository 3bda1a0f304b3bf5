"""Optimizers, and which parameter is moved by which.

Muon moves a matrix by its orthogonalised momentum (Jordan et al. 2024), which makes sense for the matrices inside the
blocks and not for look-up tables; embeddings, head and norms are AdamW's (Loshchilov and Hutter 2019). With the
adjustment of Liu et al. 2025 ("Muon is scalable for LLM training", eq. 4) an update of Muon is as large as one of
AdamW's, so one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from bessemer.model.decoder import Decoder
from bessemer.training.config import LoopConfig


def split_parameters(model: Decoder) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices of the blocks, everything else) of a decoder, in the model's order; a tied tensor is counted once."""
    blocks = {id(parameter) for block in model.blocks for parameter in block.parameters()}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if id(parameter) in blocks and parameter.ndim == 2]
    chosen = {id(parameter) for parameter in matrices}
    return matrices, [parameter for parameter in parameters if id(parameter) not in chosen]


def build_optimizers(model: Decoder, config: LoopConfig) -> list[Optimizer]:
    """The optimizers of a run; each group keeps its peak learning rate as `initial_lr`."""
    matrices, others = split_parameters(model)
    matrix_rate = config.matrix_learning_rate or config.learning_rate
    betas = (config.beta1, config.beta2)
    decayed = {"params": matrices, "lr": matrix_rate, "weight_decay": config.weight_decay}
    stacked = [parameter for parameter in others if parameter.ndim > 2]  # experts' matrices, which Muon cannot take
    undecayed = {"params": [parameter for parameter in others if parameter.ndim <= 2], "lr": config.learning_rate}
    undecayed["weight_decay"] = 0.0
    groups = [undecayed]
    if stacked:
        groups.append({"params": stacked, "lr": config.learning_rate, "weight_decay": config.weight_decay})
    optimizers: list[Optimizer]
    if config.optimizer == "muon":
        optimizers = [
            Muon([decayed], momentum=config.momentum, adjust_lr_fn="match_rms_adamw"),
            AdamW(groups, betas=betas, fused=True),
        ]
    else:
        optimizers = [AdamW([decayed, *groups], betas=betas, fused=True)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def scale_learning_rates(optimizers: Sequence[Optimizer], factor: float) -> None:
    """Set every group's learning rate to its peak times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def step_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Move the weights, then forget the gradients."""
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
