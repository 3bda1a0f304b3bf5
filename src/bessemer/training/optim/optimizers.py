"""Optimizers of a run: parameter groups by role, AdamW, SGD, Lion and Adafactor; Muon has a file of its own.

Muon updates a matrix by its orthogonalised momentum (Jordan et al. 2024), which suits the matrices inside the blocks and not
look-up tables; embeddings, head and norms are then updated by AdamW (Loshchilov and Hutter 2019). The other optimizers update
every parameter: Lion (Chen et al. 2023, algorithm 2), Adafactor (Shazeer and Stern 2018, algorithm 4), SGD. With any
optimizer, only the matrices of the blocks decay.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import SGD, AdamW, Optimizer

from bessemer.core.config import nearest
from bessemer.core.errors import ConfigError
from bessemer.core.usercode import is_user_function, load_user_function
from bessemer.distributed.collectives import redistributed
from bessemer.training.config import LoopConfig
from bessemer.training.optim.muon import Muon
from bessemer.training.optim.mup import rate_factor
from bessemer.training.optim.paged import PagedAdamW
from bessemer.training.optim.registry import OptimizerSettings, find_optimizer


class Lion(Optimizer):
    """Updates each weight by the learning rate times the sign of a mean of gradients; half the state of AdamW.

        c = β₁ m + (1 − β₁) g;    w ← w (1 − ηλ) − η sign(c);    m ← β₂ m + (1 − β₂) g

    An entry of an update is ±1 where AdamW's are about 0.2: learning rates should be 3 to 10 times lower than AdamW's, and
    weight decay as much higher (section 5). The paper's language models use β = (0.95, 0.98), its default is (0.9, 0.99).
    """

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
            averages = [self.state[parameter]["exp_avg"] for parameter in parameters]
            beta1, beta2 = group["betas"]
            directions = torch._foreach_lerp(averages, gradients, 1 - beta1)
            torch._foreach_sign_(directions)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, directions, alpha=-group["lr"])
            torch._foreach_lerp_(averages, gradients, 1 - beta2)


#: Exponent of β₂ = 1 − t^−0.8 (section 7.2), and the smallest root mean square of a weight that updates are relative to.
_DECAY, _SMALLEST_WEIGHT = -0.8, 1e-3
#: Largest root mean square of an update before it is scaled by the learning rate (section 6).
_LARGEST_UPDATE = 1.0


class Adafactor(Optimizer):
    """W ← W (1 − ηλ) − ρ max(10⁻³, RMS(W)) U,  U = G / √V clipped to RMS 1,  ρ = min(η, 1 / √t).

    V is the mean of squared gradients; of a matrix only its means over rows and columns are kept, R and C, and
    V = R C / mean(R). Each matrix of a stack has its own R and C, and the stack one RMS of the update. The learning rate is
    relative to the size of the weights, so it is larger than AdamW's: about 0.01 to 0.3.
    """

    def __init__(self, params: Any, lr: float = 1e-2, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, eps = self.state[parameter], torch.finfo(parameter.dtype).eps
        if not state:
            state["step"] = torch.zeros(())
        state["step"] += 1
        step, rate = float(state["step"]), group["lr"]
        new = step**_DECAY
        squares = gradient.square()
        if gradient.ndim > 1:
            rows, columns = _mean(squares, -1), _mean(squares, -2)
            if "row_var" not in state:
                state["row_var"], state["col_var"] = torch.zeros_like(rows), torch.zeros_like(columns)
            rows, columns = state["row_var"].lerp_(rows, new), state["col_var"].lerp_(columns, new)
            variance = _sharded_like(rows / _mean(rows, -2).clamp(min=eps) * columns, parameter)
        else:
            if "variance" not in state:
                state["variance"] = torch.zeros_like(squares)
            variance = state["variance"].lerp_(squares, new)
        update = gradient * variance.clamp(min=eps**2).rsqrt()
        size = _root_mean_square(parameter).clamp(min=_SMALLEST_WEIGHT) * min(rate, step**-0.5)
        size = size / (_root_mean_square(update) / _LARGEST_UPDATE).clamp(min=1.0)
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.sub_(update * size)


def _mean(values: Tensor, dim: int) -> Tensor:
    """The mean along a dimension, kept with size 1; reduced over the ranks that shard it."""
    sums = values.sum(dim, keepdim=True)
    if isinstance(sums, DTensor):
        whole = [Replicate() if placement.is_partial() else placement for placement in sums.placements]
        sums = redistributed(sums, whole)
    return sums / values.shape[dim]


def _sharded_like(values: Tensor, other: Tensor) -> Tensor:
    """The same values, sharded as another tensor; no communication."""
    if isinstance(values, DTensor) and isinstance(other, DTensor):
        return values.redistribute(placements=other.placements)
    return values


def _root_mean_square(values: Tensor) -> Tensor:
    """The root mean square of all values, on every rank."""
    total = values.square().sum()
    if isinstance(total, DTensor):
        total = redistributed(total, [Replicate()] * total.device_mesh.ndim).to_local()
    return (total / values.numel()).sqrt()


#: Role of a parameter: a matrix of a block; a stack of them (experts), or one of gate over up projections; the kernels of a
#: convolution; anything else (embeddings, head, norms, biases), which does not decay.
Role = Literal["matrices", "experts", "gated_experts", "kernels", "others"]

#: The roles of matrices, with the number of matrices that are stacked along the rows of one.
_PARTS: dict[Role, int] = {"matrices": 1, "experts": 1, "gated_experts": 2}

#: A parameter group of `torch.optim`: `params`, `role`, `lr`, `weight_decay`.
Group = dict[str, Any]

#: Keys of a group whose values are settings of the run. Other keys are state of an optimizer, such as a count of steps.
_HYPERPARAMETERS = ("lr", "initial_lr", "weight_decay", "betas", "momentum", "nesterov")


def role_of(name: str, parameter: Tensor) -> Role:
    """The role of a decoder's parameter, by its name and shape."""
    if (
        not name.startswith(("layers.", "mtp.", "vision.encoder.encoder.layers."))
        or name.endswith("bias")
        or parameter.ndim < 2
    ):
        return "others"
    if parameter.ndim == 2:
        return "matrices"
    if ".experts." in name:
        return "gated_experts" if name.endswith("gate_up_proj") else "experts"
    return "kernels"


def parameter_groups(model: nn.Module, config: OptimizerSettings, width: float = 1.0) -> list[Group]:
    """The model's trained parameters by role, in the model's order, with their peak learning rates and decay.

    A tied tensor is counted once. A parameter's learning rate is multiplied by its factor of the settings. width: the model's
    width over the one at which the learning rate was tuned; a role whose parameters then need different rates makes several
    groups, and learning rate times decay stays the same.
    """
    is_orthogonal = find_optimizer(config.optimizer).constant == "singular values"
    groups: dict[tuple[Role, float, float], Group] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = role_of(name, parameter)
        factor = rate_factor(name, parameter.ndim, width, orthogonal=is_orthogonal)
        own = next((own for pattern, own in config.learning_rate_factors.items() if fnmatchcase(name, pattern)), 1.0)
        if (role, factor, own) not in groups:
            rate = (config.matrix_learning_rate if role in _PARTS else None) or config.learning_rate
            decay = 0.0 if role == "others" else config.weight_decay
            groups[role, factor, own] = {"params": [], "role": role, "lr": rate * factor * own, "weight_decay": decay / factor}
        groups[role, factor, own]["params"].append(parameter)
    return list(groups.values())


def freeze_parameters(model: nn.Module, config: OptimizerSettings) -> None:
    """Freeze the parameters that the settings name, before the model is sharded.

    Raises ConfigError when a pattern of `freeze` or `learning_rate_factors` matches none, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for setting, patterns in (("freeze", config.freeze), ("learning_rate_factors", list(config.learning_rate_factors))):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                known = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
                raise ConfigError(f"{setting}: no parameter is called {pattern!r}{nearest(pattern, known)}")
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in config.freeze):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"freeze: {', '.join(config.freeze)} leaves no parameter to train")


def build_optimizers(model: nn.Module, config: LoopConfig, folder: Path = Path(), *, width: float = 1.0) -> list[Optimizer]:
    """The optimizers of a run; each group keeps its peak learning rate as `initial_lr`.

    A user's `file.py:function` lies below `folder`. width: as for `parameter_groups`. Raises ConfigError when a user's function
    or another package's optimizer does not update each parameter once, and when a library that the settings need is missing.
    """
    groups = parameter_groups(model, config, width)
    if is_user_function(config.optimizer):
        built = load_user_function(config.optimizer, folder)(groups)
    else:
        built = find_optimizer(config.optimizer).load()(groups, config)
    optimizers = _checked(config.optimizer, built, groups)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = float(group["lr"])
    return optimizers


def muon(groups: list[Group], config: LoopConfig) -> list[Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices = [group | {"parts": _PARTS[group["role"]]} for group in groups if group["role"] in _PARTS]
    others = [group for group in groups if group["role"] not in _PARTS]
    optimizers: list[Optimizer] = []
    if matrices:
        dtype = _orthogonalisation_dtype(config, matrices[0]["params"][0].device)
        optimizers.append(Muon(matrices, momentum=config.momentum, nesterov=config.nesterov, dtype=dtype))
    if others:
        optimizers.append(adamw(others, config))
    return optimizers


def _orthogonalisation_dtype(config: LoopConfig, device: torch.device) -> torch.dtype:
    """The dtype of Muon's products: on a GPU bfloat16, as published; elsewhere that of the run's matmuls, which was measured
    there, since not every processor has a fast product in bfloat16."""
    return torch.bfloat16 if device.type == "cuda" or config.dtype == "bfloat16" else torch.float32


def adamw(groups: list[Group], config: LoopConfig) -> Optimizer:
    """AdamW, with states of 32 or 8 bits. Raises ConfigError when 8 bits are asked for without torchao."""
    betas = config.beta1, config.beta2
    if config.optimizer_paging:
        return PagedAdamW(groups, betas=betas)
    if config.optimizer_bits == 32:
        return AdamW(groups, betas=betas, fused=True)
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise ConfigError("optimizer_bits: 8 needs torchao, which is not installed: pip install torchao") from None
    return AdamW8bit(groups, betas=betas)


def sgd(groups: list[Group], config: LoopConfig) -> Optimizer:
    """SGD with (Nesterov) momentum."""
    return SGD(groups, momentum=config.momentum, nesterov=config.nesterov and config.momentum > 0)


def lion(groups: list[Group], config: LoopConfig) -> Optimizer:
    """Lion."""
    return Lion(groups, betas=(config.beta1, config.beta2))


def adafactor(groups: list[Group], config: LoopConfig) -> Optimizer:
    """Adafactor."""
    return Adafactor(groups)


def _checked(name: str, built: Any, groups: list[Group]) -> list[Optimizer]:
    """The optimizers that an implementation built, as a list. Raises ConfigError unless it updates each parameter once."""
    given = {id(parameter) for group in groups for parameter in group["params"]}
    optimizers: list[Any] = list(built) if isinstance(built, Sequence) else [built]
    wrong = [type(each).__name__ for each in optimizers if not isinstance(each, Optimizer)]
    if wrong:
        raise ConfigError(f"{name}: must return a torch.optim.Optimizer, or a list of them, not {wrong[0]}")
    updated = [id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
    if sorted(updated) != sorted(given):
        raise ConfigError(
            f"{name}: of the {len(given)} parameters that it was given, its optimizers move {len(given & set(updated))} "
            f"({len(updated)} counted with repeats); each must be moved by one optimizer"
        )
    return optimizers


def scale_learning_rates(optimizers: Sequence[Optimizer], factor: float) -> None:
    """Set every group's learning rate to its peak times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = group["initial_lr"] * factor
            if isinstance(group["lr"], Tensor):
                # torchao's compiled step reads the rate from a tensor
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


@contextmanager
def keeping_hyperparameters(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """While entered, optimizers may be given the groups of a checkpoint; afterwards they have their own hyperparameters again,
    and the peaks of their learning rates.

    The groups of a checkpoint hold the settings of the run that wrote it, and this run may have others.
    """
    own = [
        {name: group[name] for name in _HYPERPARAMETERS if name in group}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    yield
    # loading a state replaces the group dictionaries
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, values in zip(groups, own, strict=True):
        group.update(values)
    # a rate in a tensor is loaded in place
    scale_learning_rates(optimizers, 1.0)


def step_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Update the weights, then drop the gradients."""
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
