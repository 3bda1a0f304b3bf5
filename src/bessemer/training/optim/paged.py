"""AdamW whose means lie in pages outside the device's memory (Dettmers et al. 2023, QLoRA, section 3: paged optimizers).

Two float32 numbers for each trained weight are half of what full tuning takes, and a step touches each of them once. On a card
they lie in pinned memory of the host, and each tensor's come to the device for its update and go back: memory for two tensors
instead of two models, at the price of the bus. On a processor they lie in a temporary file that is mapped into memory: the
system writes its pages out and takes them back where memory is short, and keeps them where it is not. The update is PyTorch's
fused kernel, tensor by tensor: the same weights, bit for bit.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.adamw import adamw as adamw_update

from bessemer.core.errors import ConfigError

#: The names of a weight's two means in the optimizer's state.
_MEANS = ("exp_avg", "exp_avg_sq")


class PagedAdamW(AdamW):
    """AdamW with its means in pages. Raises ConfigError for weights that are sharded over processes."""

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float]) -> None:
        super().__init__(groups, betas=betas, fused=True)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if any(isinstance(parameter, DTensor) for parameter in parameters):
            raise ConfigError("optimizer_paging: in one process; of several, offload: true keeps states in the host's memory")
        #: Mapped pages by their address, so that a state that was loaded since is known as not in a page.
        self._pages: dict[int, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, one after the other."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        means = []
        for name in _MEANS:
            if not self._is_paged(state.get(name), parameter):
                state[name] = self._page(parameter, state.get(name))
            means.append(state[name].to(parameter.device, non_blocking=True))
        beta1, beta2 = group["betas"]
        adamw_update(
            [parameter],
            [gradient],
            [means[0]],
            [means[1]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for name, mean in zip(_MEANS, means, strict=True):
            if mean is not state[name]:
                state[name].copy_(mean, non_blocking=True)

    def _is_paged(self, mean: Tensor | None, parameter: Tensor) -> bool:
        if mean is None or mean.device.type != "cpu":
            return False
        return mean.is_pinned() if parameter.device.type == "cuda" else mean.data_ptr() in self._pages

    def _page(self, parameter: Tensor, mean: Tensor | None) -> Tensor:
        """A mean in a page: zeros, or what a checkpoint had. An empty parameter has none."""
        if parameter.device.type == "cuda":
            page = torch.empty(parameter.shape, dtype=torch.float32, device="cpu", pin_memory=True)
        else:
            page = _mapped(parameter.numel()).view(parameter.shape)
            self._pages[page.data_ptr()] = page
        return page.zero_() if mean is None else page.copy_(mean)


def _mapped(count: int) -> Tensor:
    """float32 numbers in a temporary file of no name, which goes with the tensor."""
    if not count:
        return torch.empty(0)
    with tempfile.NamedTemporaryFile(prefix="bessemer-optimizer-") as file:
        file.truncate(4 * count)
        return torch.from_file(file.name, shared=True, size=count, dtype=torch.float32)
