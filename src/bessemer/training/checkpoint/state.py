"""What the rest of a run depends on, as values that a checkpoint holds and any layout can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

#: Optimizer states by the parameter's name, so that ranks that hold other parameters read the same checkpoint.
_BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


#: Name, among the `others` of a state, of the moving average of the weights.
AVERAGE = "average"


class Remembers(Protocol):
    """Something beside weights and optimizers that a step depends on: a window of losses, a scale, an average."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


@dataclass
class TrainingState:
    """Everything that the rest of a run depends on. `others`: by a name that stays."""

    model: nn.Module
    optimizers: Sequence[Optimizer]
    others: Mapping[str, Remembers] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0

    def read(self) -> dict[str, Any]:
        """The state as nested plain values and tensors, in the names of the model's parameters."""
        model_state, optimizer_state = get_state_dict(self.model, self.optimizers, options=_BY_NAME)
        return {
            "model": model_state,
            "optimizer": optimizer_state,
            "others": {name: other.state_dict() for name, other in self.others.items()},
            "random": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
        }

    def write(self, values: dict[str, Any]) -> None:
        """Put a state that `read` gave back in place. Of `others`, those that it has."""
        set_state_dict(
            self.model,
            self.optimizers,
            model_state_dict=values["model"],
            optim_state_dict=values["optimizer"],
            options=_BY_NAME,
        )
        for name, other in self.others.items():
            if name in values["others"]:
                other.load_state_dict(values["others"][name])
        torch.set_rng_state(values["random"])
        self.step, self.seconds = values["step"], values["seconds"]


def copied(values: Any) -> Any:
    """Nested values whose tensors are copies on the processor, which training no longer changes."""
    if isinstance(values, Mapping):
        return {name: copied(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(copied(value) for value in values)
    if isinstance(values, Tensor):
        return values.detach().cpu().clone() if values.device.type == "cpu" else values.detach().cpu()
    return values
