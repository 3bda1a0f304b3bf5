"""Optimizers that the setting `optimizer` may name: our own, and those of other packages. Imports no PyTorch.

An implementation gets the parameter groups (`bessemer.training.optim.build.Group`) and the run's settings, and returns a
`torch.optim.Optimizer` or a list of them that together update every parameter once. Another package adds one by an entry point
of the group `bessemer.optimizers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bessemer.core.registry import Plugin, Registry

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from bessemer.training.config import LoopConfig

#: Entry points of other packages' optimizers.
GROUP = "bessemer.optimizers"

#: From the groups of parameters and the settings of a run to what updates them.
OptimizerBuilder = Callable[[list[dict[str, Any]], "LoopConfig"], "Optimizer | Sequence[Optimizer]"]

_BUILD = "bessemer.training.optim.build"

OPTIMIZERS: Registry[OptimizerBuilder] = Registry(
    "optimizer",
    GROUP,
    [
        Plugin("muon", "Muon for the matrices of the blocks and AdamW for the rest (Jordan et al. 2024)", f"{_BUILD}:muon"),
        Plugin("adamw", "AdamW for all parameters (Loshchilov and Hutter 2019)", f"{_BUILD}:adamw"),
        Plugin("sgd", "SGD with momentum for all parameters", f"{_BUILD}:sgd"),
        Plugin("lion", "Lion for all parameters (Chen et al. 2023)", f"{_BUILD}:lion"),
        Plugin("adafactor", "Adafactor for all parameters (Shazeer and Stern 2018)", f"{_BUILD}:adafactor"),
    ],
)
