"""Training state: everything that the rest of a run depends on, as values that any layout can read from a checkpoint.

Besides weights and optimizer states of the policy: random generators, other trained models, and the state of a source of
batches.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from bessemer.core.errors import CheckpointError
from bessemer.distributed.mesh import Mesh
from bessemer.model.adapters.trained import adapters_of, is_trained_by_adapter
from bessemer.training.data.batches import BatchSource
from bessemer.training.optim.optimizers import keeping_hyperparameters

#: Optimizer states by parameter name, so that ranks with other parameters can read the same checkpoint.
_BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True, strict=False)


#: Name, among the `others` of a state, of the moving average of the weights.
AVERAGE = "average"
#: Name, in a state, of the states of each rank's random generators.
RANDOM_STATES = "random_states"


class Stateful(Protocol):
    """State of a step besides weights and optimizers: a window of losses, a loss scale, a moving average."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


@dataclass
class TrainingState:
    """Everything that the rest of a run depends on. `others`: by their names in the checkpoint."""

    model: nn.Module
    optimizers: Sequence[Optimizer]
    others: Mapping[str, Stateful] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0

    def read(self) -> dict[str, Any]:
        """The state as nested plain values and tensors, by parameter name."""
        return {
            **model_state(self.model, self.optimizers),
            "others": {name: other.state_dict() for name, other in self.others.items()},
            "random": torch.get_rng_state(),
            RANDOM_STATES: _random_states(self.model),
            "step": self.step,
            "seconds": self.seconds,
        }

    def write(self, values: dict[str, Any]) -> None:
        """Restore a state that `read` returned, and those of `others` that it holds."""
        restore_model(self.model, self.optimizers, values)
        for name, other in self.others.items():
            if name in values["others"]:
                other.load_state_dict(values["others"][name])
        torch.set_rng_state(values["random"])
        _restore_random_states(self.model, values.get(RANDOM_STATES, {}))
        self.step = values["step"]
        self.seconds = values["seconds"]


def model_state(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Weights and optimizer states by parameter name, as `model` and `optimizer`; those of frozen parameters are left out, and
    with an adapter all that is not trained with it."""
    weights, states = get_state_dict(model, optimizers, options=_BY_NAME)
    if adapters_of(model):
        whole = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        weights = {name: tensor for name, tensor in weights.items() if name in whole or is_trained_by_adapter(name)}
    return {"model": weights, "optimizer": states}


def restore_model(model: nn.Module, optimizers: Sequence[Optimizer], values: Mapping[str, Any]) -> None:
    """Restore what `model_state` returned. Learning rates, decay, betas and momentum stay those that the optimizers were built
    with."""
    with keeping_hyperparameters(optimizers):
        set_state_dict(
            model, optimizers, model_state_dict=values["model"], optim_state_dict=values["optimizer"], options=_BY_NAME
        )


def _random_states(model: nn.Module) -> dict[str, Tensor]:
    """The states of this rank's generators by device and rank, as `cuda-3`: where a layer draws random numbers, ranks with
    other layers or another part of a batch draw others. `random` is for ranks that the checkpoint knows nothing of."""
    states = {f"cpu-{_rank()}": torch.get_rng_state()}
    device = _accelerator(model)
    if device is not None:
        states[f"{device.type}-{_rank()}"] = torch.get_device_module(device).get_rng_state(device)
    return states


def _restore_random_states(model: nn.Module, states: Mapping[str, Tensor]) -> None:
    """Restore those of this rank's generators that a checkpoint holds; the others stay as they are."""
    if (state := states.get(f"cpu-{_rank()}")) is not None:
        torch.set_rng_state(state)
    device = _accelerator(model)
    if device is not None and (state := states.get(f"{device.type}-{_rank()}")) is not None:
        torch.get_device_module(device).set_rng_state(state, device)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _accelerator(model: nn.Module) -> torch.device | None:
    """The device that a model computes on; None for the CPU."""
    device = next((parameter.device for parameter in model.parameters() if parameter.device.type != "cpu"), None)
    if device is None and torch.cuda.is_initialized():
        # offloaded weights lie in host memory
        device = torch.device("cuda", torch.cuda.current_device())
    return device


class HostCopies:
    """Copies of nested values in host memory, which training does not change.

    The memory is kept for the next copy. Of tensors on a GPU it is pinned: the host goes on at once, and `wait` waits.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._pins = False
        self._copied: torch.cuda.Event | None = None

    def copy(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values with copies of their tensors; those of the call before are gone."""
        copies: dict[str, Any] = self._copy(values, "")
        if self._pins:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copies

    def wait(self) -> None:
        """Wait until the copies hold their values."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, values: Any, name: str) -> Any:
        if isinstance(values, Mapping):
            return {key: self._copy(value, f"{name}.{key}") for key, value in values.items()}
        if isinstance(values, (list, tuple)):
            return type(values)(self._copy(value, f"{name}.{place}") for place, value in enumerate(values))
        if isinstance(values, DTensor):
            kept: Any = self._kept_copy(values.to_local(), name)
            return DTensor(kept, values._spec, requires_grad=False)
        return self._kept_copy(values, name) if isinstance(values, Tensor) else values

    def _kept_copy(self, tensor: Tensor, name: str) -> Tensor:
        if type(tensor) not in (Tensor, nn.Parameter):
            # states in codes, as of torchao
            return tensor.detach().cpu() if tensor.device.type != "cpu" else tensor.detach().clone()
        kept, tensor, is_cuda = self._kept.get(name), tensor.detach(), tensor.device.type == "cuda"
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_cuda)
            self._kept[name] = kept
        self._pins = self._pins or is_cuda
        return kept.copy_(tensor, non_blocking=is_cuda)


class ModelState:
    """Weights and optimizer states of a model that is trained beside the policy."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._model = model
        self._optimizers = optimizers

    def state_dict(self) -> dict[str, Any]:
        return model_state(self._model, self._optimizers)

    def load_state_dict(self, values: dict[str, Any]) -> None:
        restore_model(self._model, self._optimizers, values)


class SourceState:
    """State of a source of batches on every data rank, as one value that each rank writes and reads whole.

    Tensors of a rollout have other shapes at every checkpoint, so the states are stored as bytes. They are opened without
    running code.
    """

    def __init__(self, source: BatchSource, mesh: Mesh) -> None:
        self._source = source
        self._mesh = mesh

    def state_dict(self) -> dict[str, Any]:
        """The states by data rank. Every process calls this."""
        layout = self._mesh.layout
        states: list[Any] = [self._source.state_dict()]
        if not self._mesh.alone:
            everyone: list[Any] = [None] * layout.world_size
            dist.all_gather_object(everyone, states[0])
            by_rank = {layout.data_rank(rank): state for rank, state in reversed([*enumerate(everyone)])}
            states = [by_rank[rank] for rank in range(layout.data_ranks)]
        stream = io.BytesIO()
        torch.save(states, stream)
        return {"states": stream.getvalue()}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Restore the state of this data rank. Raises CheckpointError when the run had another number of them."""
        states = torch.load(io.BytesIO(values["states"]), weights_only=True)
        layout = self._mesh.layout
        if len(states) != layout.data_ranks:
            raise CheckpointError(
                f"the checkpoint holds batches under way of {len(states)} data-parallel ranks, and this run has "
                f"{layout.data_ranks}; resume with as many"
            )
        self._source.load_state_dict(states[layout.data_rank(self._mesh.rank)])
