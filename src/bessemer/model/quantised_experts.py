"""Mixture-of-experts layers with quantised matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from bessemer.model.experts import Experts
from bessemer.model.quantisation.schemes.base import Codes, Scheme
from bessemer.model.quantised_linear import Keeper, Product, QuantisedLinear, QuantisedWeight

# Shapes: V visits, D hidden, E experts, I width inside an expert, N outputs, K inputs.


class QuantisedStack(QuantisedWeight):
    """One matrix of every expert, (E, N, K)."""

    def __init__(self, shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype) -> None:
        super().__init__(shape, scheme, dtype)
        self._matrices: list[QuantisedLinear] = []
        #: Replaces the product of each matrix for a time, from the same codes (`using_packed_matmuls`).
        self.packed_matmul: Sequence[Product] | None = None

    def product(self, expert: int, hidden: Tensor) -> Tensor:
        """The product with one expert's matrix, (…, K) to (…, N)."""
        return (self.matrices if self.packed_matmul is None else self.packed_matmul)[expert](hidden)

    @property
    def matrices(self) -> list[QuantisedLinear]:
        """Each expert's matrix as a layer of its own, without its bias; the memory is the stack's."""
        if not self._matrices:
            outputs, inputs = self.shape[-2:]
            for expert in range(self.shape[0]):
                with torch.device("meta"):
                    layer = QuantisedLinear(inputs, outputs, self.scheme, dtype=self.dtype)
                self._matrices.append(layer.take(self.stored[expert]))
        return self._matrices

    def release_matrices(self, keepers: Sequence[Keeper]) -> None:
        """Hold the codes no longer: each matrix has a keeper of its own."""

        def stacked(experts: Tensor | None) -> Codes:
            chosen = range(len(keepers)) if experts is None else experts.tolist()
            return Codes.stack([keepers[expert](None) for expert in chosen])

        for layer, keeper in zip(self.matrices, keepers, strict=True):
            layer.release(keeper)
        self.release(stacked)

    def take(self, stored: Codes) -> Self:
        """Hold these codes; returns itself."""
        self._matrices = []
        return super().take(stored)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._matrices = []
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self._matrices = []


class QuantisedExperts(Experts):
    """`Experts` with quantised matrices; one expert is computed after the other, and only those that are visited."""

    def __init__(self, experts: Experts, gate_up: Scheme, down: Scheme) -> None:
        nn.Module.__init__(self)
        self.count = experts.count
        self.activation = experts.activation
        self.limit = experts.limit
        self.backend = experts.backend
        weight = experts.gate_up_proj
        self.gate_up_proj = QuantisedStack(tuple(weight.shape), gate_up, weight.dtype)  # type: ignore[assignment]
        self.down_proj = QuantisedStack(tuple(experts.down_proj.shape), down, weight.dtype)  # type: ignore[assignment]
        self.gate_up_bias = experts.gate_up_bias
        self.down_bias = experts.down_bias

    def visited(self, visits_VD: Tensor, sizes_E: Tensor) -> Tensor:
        """What the experts make of their visits, (V, D)."""
        assert isinstance(self.gate_up_proj, QuantisedStack) and isinstance(self.down_proj, QuantisedStack)
        outputs = []
        for expert, tokens in enumerate(visits_VD.split(sizes_E.tolist())):
            if not len(tokens):
                continue
            inner = self.gate_up_proj.product(expert, tokens)
            if self.gate_up_bias is not None:
                inner = inner + self.gate_up_bias[expert].to(inner.dtype)
            out = self.down_proj.product(expert, self.gate(inner))
            if self.down_bias is not None:
                out = out + self.down_bias[expert].to(out.dtype)
            outputs.append(out)
        return torch.cat(outputs) if outputs else visits_VD
