"""The registry of optimizers: how one is built, and what planning reads of it; the settings of all. Imports no PyTorch.

An optimizer is built by a function of the parameter groups (`optimizers.Group`) and the run's settings, which returns a
`torch.optim.Optimizer`, or a list of them that together update every parameter once. Another package adds one by an entry point
of the group `bessemer.optimizers`: an `OptimizerPlugin`, or a plain `Plugin` that says nothing of its costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import field_validator, model_validator

from bessemer.core.config import Config, setting
from bessemer.core.errors import ConfigError
from bessemer.core.registry import Plugin, Registry
from bessemer.core.usercode import is_user_function

if TYPE_CHECKING:
    from torch.optim import Optimizer

#: Entry points of other packages' optimizers.
GROUP = "bessemer.optimizers"

#: From the groups of parameters and the settings of a run, a `LoopConfig`, to what updates them.
OptimizerBuilder = Callable[[list[dict[str, Any]], Any], "Optimizer | Sequence[Optimizer]"]

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

    state_bytes: Callable[[OptimizerSettings, bool], float] | None = None
    matrix_flops: Callable[[tuple[int, ...]], float] | None = None
    constant: Literal["entries", "singular values", "nothing"] = "entries"


def newton_schulz_flops(shape: tuple[int, ...]) -> float:
    """FLOPs of orthogonalising a tensor of matrices: 4 m² n + 2 m³ an iteration and matrix, with m the shorter side (Jordan et
    al. 2024)."""
    short, long = sorted(shape[-2:])
    return prod(shape[:-2]) * MUON_ITERATIONS * (4.0 * short**2 * long + 2.0 * short**3)


def _adamw_bytes(config: OptimizerSettings, is_matrix: bool) -> float:
    """Two means: float32, or one byte each and a float32 scale for every 256."""
    return 2 * (1 + 4 / 256) if config.optimizer_bits == 8 else 8.0


def _muon_bytes(config: OptimizerSettings, is_matrix: bool) -> float:
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


class OptimizerSettings(Config):
    """The update of the weights, and what of the loss is the optimizer's: clipping and the z-loss."""

    optimizer: str = setting(
        "muon",
        "muon: Muon for the matrices of the blocks and AdamW for the rest; adamw, sgd, lion, adafactor: that one for all; one "
        "that an installed package adds (entry points bessemer.optimizers); or your own file.py:function, which gets the "
        "groups of parameters and returns a torch Optimizer.",
        code=True,
        plugins=GROUP,
    )
    optimizer_bits: Literal[32, 8] = setting(
        32, "Bits of each number in AdamW's states; 8 (Dettmers et al. 2022) needs torchao.", unit="bits"
    )
    optimizer_paging: bool = setting(
        False,
        "Keep AdamW's states outside the device's memory: on a GPU in the host's, on a CPU in a mapped temporary file; in one "
        "process. The same weights, bit for bit.",
        affects_output=False,
    )
    learning_rate: float = setting(5e-3, "Peak learning rate.", gt=0)
    matrix_learning_rate: float | None = setting(
        None,
        "Peak learning rate for the matrices of the blocks; absent: learning_rate. Muon's updates are scaled to the size of "
        "AdamW's, so that one rate serves both.",
        gt=0,
    )
    mup_base_width: int | None = setting(
        None,
        "Hidden width at which the learning rate was tuned. At another one muP (Yang et al. 2022) scales the learning rate of "
        "each kind of weight and, in pretrain, the initial weights of a new model; for muon, adamw, lion. Absent: no scaling.",
        unit="channels",
        gt=0,
    )
    weight_decay: float = setting(
        0.1, "Weight decay of the matrices of the blocks, decoupled but in sgd; nothing else decays.", ge=0
    )
    beta1: float = setting(0.9, "AdamW's decay of the mean of gradients, and Lion's β₁.", ge=0, lt=1)
    beta2: float = setting(0.95, "AdamW's decay of the mean of squared gradients, and Lion's β₂, which wants 0.98.", ge=0, lt=1)
    momentum: float = setting(0.95, "Momentum of Muon and of SGD.", ge=0, lt=1)
    nesterov: bool = setting(True, "Nesterov momentum in Muon and SGD (Nesterov 1983).")
    freeze: list[str] = setting(
        description="Parameters that are not trained, by patterns of their names, as in embed_tokens.* or layers.[0-3].*; they "
        "have no gradients and no optimizer states, and checkpoints leave them out.",
        default_factory=list,
    )
    learning_rate_factors: dict[str, float] = setting(
        description="Factors of the learning rate by patterns of parameters' names, as in {layers.0.*: 0.1}; the first that "
        "matches counts.",
        default_factory=dict,
    )
    gradient_clip: float = setting(1.0, "Largest norm of the gradient; a longer one is scaled down to it.", gt=0)
    z_loss: float = setting(
        0.0,
        "Weight of the mean of (log Σ exp logits)² in the loss, which keeps logits from drifting (PaLM and OLMo 2: 1e-4). "
        "Validation leaves it out.",
        ge=0,
    )

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, name: str) -> str:
        if not is_user_function(name):
            try:
                OPTIMIZERS.find(name)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return name

    @field_validator("learning_rate_factors")
    @classmethod
    def _positive_factors(cls, factors: dict[str, float]) -> dict[str, float]:
        for pattern, factor in factors.items():
            if factor <= 0:
                raise ValueError(f"{pattern!r}: {factor:g} is no factor of a learning rate; freeze leaves parameters out")
        return factors

    @model_validator(mode="after")
    def _check_width(self) -> Self:
        if self.mup_base_width is not None and self.optimizer in ("sgd", "adafactor"):
            raise ValueError(
                "mup_base_width is for muon, adamw, lion and your own, whose updates do not depend on the gradient's size: not "
                f"{self.optimizer}"
            )
        return self

    @model_validator(mode="after")
    def _check_bits(self) -> Self:
        if self.optimizer_paging and (self.optimizer != "adamw" or self.optimizer_bits != 32):
            raise ValueError("optimizer_paging: of AdamW's states of 32 bits; set optimizer: adamw and optimizer_bits: 32")
        if self.optimizer_bits != 32 and self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"optimizer_bits: {self.optimizer_bits} is for AdamW's states, and {self.optimizer} has none")
        return self
