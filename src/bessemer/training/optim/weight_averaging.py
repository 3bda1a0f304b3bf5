"""Weight averaging: an exponential moving average during training, and the mean of several checkpoints.

At a high learning rate the weights oscillate around a minimum; their mean has a lower loss than any of them (Polyak and
Juditsky 1992; Izmailov et al. 2018). An average shows during a run what a decay of the learning rate gains at its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bessemer.distributed.mesh import local
from bessemer.distributed.sharding import release_gathered


class MovingAverage:
    """a ← β a + (1 − β) w after each step, of every trained parameter, in float32.

    After n steps β is min(`decay`, (1 + n) / (10 + n)): so the average forgets the initial weights, and covers about the last
    ninth of the steps until `decay` is smaller. The average of a sharded parameter is sharded alike, and stored by the
    parameter's name, so that a checkpoint of it can be read under any layout.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Starts at the present weights of `model`, which is already sharded."""
        assert 0 <= decay < 1
        self._decay = decay
        self._model = model
        # kept here, because `named_parameters` gives gathered parameters while FSDP has gathered them
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._average: dict[str, Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """Start again at the present weights."""
        self._steps = 0
        for name, weight in self._weights.items():
            self._average[name] = weight.detach().clone().to(torch.promote_types(weight.dtype, torch.float32))

    @torch.no_grad()
    def update(self) -> None:
        """Include the weights after a step."""
        self._steps += 1
        decay = min(self._decay, self._steps / (9 + self._steps))
        averages = [local(average) for average in self._average.values()]
        weights = [local(weight.detach()) for weight in self._weights.values()]
        torch._foreach_lerp_(averages, [w.to(a.dtype) for w, a in zip(weights, averages, strict=True)], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While entered, the model's weights are the average; afterwards its own, to the bit.

        In training use `Trainer.averaged`, which also refreshes the copies of a pipeline.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # the next forward pass must gather the new weights
        release_gathered(self._model)
        for name, weight in self._weights.items():
            here, average = local(weight.detach()), local(self._average[name])
            current = here.clone()
            here.copy_(average)
            average.copy_(current)

    def state_dict(self) -> dict[str, Any]:
        """The average by parameter name, and the number of steps in it."""
        return {"weights": dict(self._average), "steps": self._steps}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = state["steps"]
        for name, average in self._average.items():
            average.copy_(state["weights"][name])


def mean_weights(checkpoints: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor over checkpoints with the same names and shapes (Izmailov et al. 2018, eq. 1), in its own dtype,
    accumulated in float32 at least. Tensors of integers are those of the last checkpoint.

    Reads one checkpoint at a time. Raises ValueError when there is none, or they do not agree in names and shapes.
    """
    means: dict[str, Tensor] = {}
    types: dict[str, torch.dtype] = {}
    for count, weights in enumerate(checkpoints, start=1):
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        if count > 1 and shapes != {name: tensor.shape for name, tensor in means.items()}:
            raise ValueError("the checkpoints differ in names or shapes of their tensors")
        for name, tensor in weights.items():
            if not tensor.is_floating_point():
                means[name] = tensor
                continue
            types[name] = tensor.dtype
            wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
            means[name] = wide.clone() if count == 1 else means[name].lerp_(wide, 1 / count)
    if not means:
        raise ValueError("there is no checkpoint to average")
    return {name: mean.to(types.get(name, mean.dtype)) for name, mean in means.items()}
