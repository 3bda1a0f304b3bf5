"""The registry of optimizers: how one is built, and what planning reads of it. Imports no PyTorch.

An optimizer is built by a function of the parameter groups (`optimizers.Group`) and the run's settings, which returns a
`torch.optim.Optimizer`, or a list of them that together update every parameter once. Another package adds one by an entry point
of the group `bessemer.optimizers`: an `OptimizerPlugin`, or a plain `Plugin` that says nothing of its costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from bessemer.core.registry import Plugin, Registry
from bessemer.core.usercode import is_user_function

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from bessemer.training.config import LoopConfig

#: Entry points of other packages' optimizers.
GROUP = "bessemer.optimizers"

#: From the groups of parameters and the settings of a run to what updates them.
OptimizerBuilder = Callable[[list[dict[str, Any]], "LoopConfig"], "Optimizer | Sequence[Optimizer]"]

#: Newton–Schulz iterations of Muon.
MUON_ITERATIONS = 5


@dataclass(frozen=True)
class OptimizerPlugin(Plugin[OptimizerBuilder]):
    """An optimizer and its costs.

    state_bytes: bytes of state per weight, by the settings and whether the weight is one of a block's matrix (or of another
    parameter); None: unknown. matrix_flops: FLOPs of the update of a tensor of matrices of a shape, which one rank computes
    whole; None: updates go weight by weight. constant: of an update, what has one size whatever the gradient's: its entries,
    its singular values, or nothing (then learning rates do not transfer between widths).
    """

    state_bytes: Callable[[LoopConfig, bool], float] | None = None
    matrix_flops: Callable[[tuple[int, ...]], float] | None = None
    constant: Literal["entries", "singular values", "nothing"] = "entries"


def newton_schulz_flops(shape: tuple[int, ...]) -> float:
    """FLOPs of orthogonalising a tensor of matrices: 4 m² n + 2 m³ an iteration and matrix, with m the shorter side (Jordan et
    al. 2024)."""
    short, long = sorted(shape[-2:])
    return prod(shape[:-2]) * MUON_ITERATIONS * (4.0 * short**2 * long + 2.0 * short**3)


def _adamw_bytes(config: LoopConfig, is_matrix: bool) -> float:
    """Two means: float32, or one byte each and a float32 scale for every 256."""
    return 2 * (1 + 4 / 256) if config.optimizer_bits == 8 else 8.0


def _muon_bytes(config: LoopConfig, is_matrix: bool) -> float:
    return 4.0 if is_matrix else _adamw_bytes(config, is_matrix)


_BUILD = "bessemer.training.optim.optimizers"

OPTIMIZERS: Registry[OptimizerBuilder] = Registry(
    "optimizer",
    GROUP,
    [
        OptimizerPlugin(
            "muon",
            "Muon for the matrices of the blocks and AdamW for the rest (Jordan et al. 2024)",
            f"{_BUILD}:muon",
            state_bytes=_muon_bytes,
            matrix_flops=newton_schulz_flops,
            constant="singular values",
        ),
        OptimizerPlugin(
            "adamw",
            "AdamW for all parameters (Loshchilov and Hutter 2019)",
            f"{_BUILD}:adamw",
            state_bytes=_adamw_bytes,
        ),
        OptimizerPlugin(
            "sgd",
            "SGD with momentum for all parameters",
            f"{_BUILD}:sgd",
            state_bytes=lambda config, is_matrix: 4.0 if config.momentum else 0.0,
            constant="nothing",
        ),
        OptimizerPlugin(
            "lion",
            "Lion for all parameters (Chen et al. 2023)",
            f"{_BUILD}:lion",
            state_bytes=lambda config, is_matrix: 4.0,
        ),
        OptimizerPlugin(
            "adafactor",
            "Adafactor for all parameters (Shazeer and Stern 2018)",
            f"{_BUILD}:adafactor",
            # two vectors in place of a matrix: almost nothing per parameter
            state_bytes=lambda config, is_matrix: 0.02,
            constant="nothing",
        ),
    ],
)


def find_optimizer(name: str) -> OptimizerPlugin:
    """The optimizer of a setting; a user's function, or a plugin that says nothing of its costs, without them. Raises
    ConfigError for an unknown name."""
    if is_user_function(name):
        return OptimizerPlugin(name, "a function of the user", name)
    plugin = OPTIMIZERS.find(name)
    if isinstance(plugin, OptimizerPlugin):
        return plugin
    return OptimizerPlugin(plugin.name, plugin.description, plugin.implementation)
