"""Optimizers by name, and which parameter is moved by which.

Muon moves a matrix by its orthogonalised momentum (Jordan et al. 2024), which makes sense for the matrices inside the
blocks and not for look-up tables; embeddings, head and norms are then AdamW's (Loshchilov and Hutter 2019). The other
optimizers move everything. Whatever the optimizer, only the matrices of the blocks decay.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from bessemer.core.errors import ConfigError
from bessemer.core.usercode import is_user_function, load_user_function
from bessemer.training.config import LoopConfig
from bessemer.training.optim.adafactor import Adafactor
from bessemer.training.optim.lion import Lion
from bessemer.training.optim.muon import Muon
from bessemer.training.optim.mup import rate_factor

#: What a parameter is to an optimizer: a matrix of a block; a stack of them (experts), or one of gates on up projections; the
#: kernels of a convolution; anything else (tables, head, norms, biases), which does not decay.
Role = Literal["matrices", "experts", "gated_experts", "kernels", "others"]

#: The roles that are matrices, with the number of them that lie above each other in one.
_PARTS: dict[Role, int] = {"matrices": 1, "experts": 1, "gated_experts": 2}

#: Parameters with what an optimizer needs to know of them: `params`, `role`, `lr`, `weight_decay`.
Group = dict[str, Any]


def role_of(name: str, parameter: Tensor) -> Role:
    """The role of a decoder's parameter, by its name and shape."""
    if not name.startswith(("layers.", "mtp.")) or name.endswith("bias") or parameter.ndim < 2:
        return "others"
    if parameter.ndim == 2:
        return "matrices"
    if ".experts." in name:
        return "gated_experts" if name.endswith("gate_up_proj") else "experts"
    return "kernels"


def parameter_groups(model: nn.Module, config: LoopConfig, width: float = 1.0) -> list[Group]:
    """The model's trained parameters by role, in the model's order, with their peak learning rates and decay.

    A tied tensor is counted once. width: times that at which the learning rate was tuned; a role whose parameters then want
    different rates makes several groups, and what a step decays stays as it was.
    """
    groups: dict[tuple[Role, float], Group] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = role_of(name, parameter)
        factor = rate_factor(name, parameter.ndim, width, orthogonal=config.optimizer == "muon")
        if (role, factor) not in groups:
            rate = (config.matrix_learning_rate if role in _PARTS else None) or config.learning_rate
            decay = 0.0 if role == "others" else config.weight_decay
            groups[role, factor] = {"params": [], "role": role, "lr": rate * factor, "weight_decay": decay / factor}
        groups[role, factor]["params"].append(parameter)
    return list(groups.values())


def build_optimizers(model: nn.Module, config: LoopConfig, folder: Path = Path(), *, width: float = 1.0) -> list[Optimizer]:
    """The optimizers of a run; each group keeps its peak learning rate as `initial_lr`.

    A user's `file.py:function` lies below `folder`. width: as for `parameter_groups`. Raises ConfigError when a user's function
    does not give optimizers of just these parameters, and when a library is missing that the settings need.
    """
    groups, betas = parameter_groups(model, config, width), (config.beta1, config.beta2)
    optimizers: list[Optimizer]
    if is_user_function(config.optimizer):
        optimizers = _users_optimizers(config.optimizer, groups, folder)
    elif config.optimizer == "muon":
        matrices = [group | {"parts": _PARTS[group["role"]]} for group in groups if group["role"] in _PARTS]
        others = [group for group in groups if group["role"] not in _PARTS]
        optimizers = [Muon(matrices, momentum=config.momentum, nesterov=config.nesterov)] if matrices else []
        optimizers += [_adamw(others, betas, config.optimizer_bits)] if others else []
    elif config.optimizer == "adamw":
        optimizers = [_adamw(groups, betas, config.optimizer_bits)]
    elif config.optimizer == "sgd":
        optimizers = [SGD(groups, momentum=config.momentum, nesterov=config.nesterov and config.momentum > 0)]
    elif config.optimizer == "lion":
        optimizers = [Lion(groups, betas=betas)]
    else:
        assert config.optimizer == "adafactor"
        optimizers = [Adafactor(groups)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = float(group["lr"])
    return optimizers


def _adamw(groups: list[Group], betas: tuple[float, float], bits: int) -> Optimizer:
    if bits == 32:
        return AdamW(groups, betas=betas, fused=True)
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise ConfigError("optimizer_bits: 8 needs torchao, which is not installed: pip install torchao") from None
    return AdamW8bit(groups, betas=betas)


def _users_optimizers(name: str, groups: list[Group], folder: Path) -> list[Optimizer]:
    """What a user's function makes of the groups: one optimizer, or several that share the parameters out."""
    wanted = {id(parameter) for group in groups for parameter in group["params"]}
    made = load_user_function(name, folder)(groups)
    optimizers: list[Any] = list(made) if isinstance(made, Sequence) else [made]
    wrong = [type(found).__name__ for found in optimizers if not isinstance(found, Optimizer)]
    if wrong:
        raise ConfigError(f"{name}: must return a torch.optim.Optimizer, or a list of them, not {wrong[0]}")
    moved = [id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
    if sorted(moved) != sorted(wanted):
        raise ConfigError(
            f"{name}: of the {len(wanted)} parameters that it was given, its optimizers move {len(wanted & set(moved))} "
            f"({len(moved)} counted with repeats); each must be moved by one optimizer"
        )
    return optimizers


def scale_learning_rates(optimizers: Sequence[Optimizer], factor: float) -> None:
    """Set every group's learning rate to its peak times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = group["initial_lr"] * factor
            if isinstance(group["lr"], Tensor):  # torchao's step is compiled and reads it from there
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def step_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Move the weights, then forget the gradients."""
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
