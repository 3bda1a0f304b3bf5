"""Layers whose weights are kept by a quantisation scheme: linear, embedding, and experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from bessemer.model.layers.feed_forward import Experts
from bessemer.model.quantisation.base import BlockWeight, Codes, Scheme

# Shapes: N outputs, K inputs.

#: The tensors that the compiled CPU kernels pack, and give back.
PACKED_TENSORS = frozenset({"codes", "scales", "zeros", "offsets"})

#: Returns the codes that it stores in packed form: of the rows (…,) of a matrix, or of all rows when None.
Keeper = Callable[[Tensor | None], Codes]


class DeferredCodes(Protocol):
    """A matrix whose codes are still in a file: a keeper, and its blocks."""

    def __call__(self, rows: Tensor | None) -> Codes:
        """As any keeper."""

    def block_weight(self) -> BlockWeight:
        """The blocks, for the kernels to pack."""


class QuantisedWeight(nn.Module):
    """A weight, (N, K) or a stack (E, N, K), kept as the tensors of its scheme, which are buffers of their names.

    dtype: the type of what is read out of it, the model's; `.to(dtype)` changes that and never the codes or their scales.

    A packed copy may replace the codes (`release`): the buffers that it holds are None then, and `stored` reads them back from
    the copy on every access. A file may stand for them until they are packed (`defer`): `stored` reads the file.
    """

    def __init__(self, shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype) -> None:
        super().__init__()
        self.scheme = scheme
        self.dtype = dtype
        self.shape = tuple(shape)
        self.dequantised_weight: Tensor | None = None
        self._keeper: Keeper | None = None
        self._file: DeferredCodes | None = None
        for name, spec in scheme.tensors(*shape).items():
            self.register_buffer(name, torch.zeros(spec.shape, dtype=spec.dtype))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The scheme's tensors, without those that a packed copy has replaced."""
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    def take(self, stored: Codes) -> Self:
        """Store these codes; returns itself."""
        wanted = {name: (spec.shape, spec.dtype) for name, spec in self.scheme.tensors(*self.shape).items()}
        assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.tensors.items()} == wanted, stored.scheme
        for name, tensor in stored.tensors.items():
            setattr(self, name, tensor)
        self._keeper = self._file = None
        return self

    def release(self, keeper: Keeper, names: frozenset[str] = PACKED_TENSORS) -> None:
        """Drop the tensors of these names, which the kernels have packed; `keeper` reads all of them back."""
        self._keeper, self._file = keeper, None
        for name in self._buffers.keys() & names:
            setattr(self, name, None)

    def defer(self, file: DeferredCodes) -> None:
        """Hold no codes: the file's are read when they are asked for, in memory of their own each time."""
        self.release(file, frozenset(self._buffers))
        self._file = file

    def restore(self) -> None:
        """Read the codes back from the packed copy, or the file, and store them."""
        if self._keeper is not None:
            self.take(self.stored)

    @property
    def is_released(self) -> bool:
        """Whether a packed copy has replaced the codes."""
        return self._keeper is not None and self._file is None

    @property
    def deferred(self) -> DeferredCodes | None:
        """The file that has the codes still, if any."""
        return self._file

    @property
    def stored(self) -> Codes:
        """The codes and their scheme."""
        return Codes(self.scheme, self.tensors) if self._keeper is None else self._keeper(None)

    @property
    def device(self) -> torch.device:
        """Device of the codes. Packed copies and files are on the CPU only."""
        return torch.device("cpu") if self._keeper is not None else next(iter(self.tensors.values())).device

    @property
    def weight(self) -> Tensor:
        """The weight that the codes stand for. Dequantises on every access, except within `using_packed_matmuls`."""
        if self.dequantised_weight is not None:
            return self.dequantised_weight
        return self.stored.dequantised().to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self._file is not None:
            self.restore()
        before = self.tensors
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in self.tensors.items():
            if tensor.dtype != before[name].dtype:
                setattr(self, name, before[name].to(tensor.device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self.restore()
        super()._save_to_state_dict(*arguments)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*arguments, **options)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Text in torch's printed module."""
        return f"shape={self.shape}, {self.scheme}"


#: From inputs (…, K) to outputs (…, N), in the inputs' type.
Product = Callable[[Tensor], Tensor]
#: From visits sorted by expert (V, K) and the visits of each (E,) to outputs (V, N).
VisitsProduct = Callable[[Tensor, Tensor], Tensor]


class QuantisedLinear(QuantisedWeight):
    """`nn.Linear` with a quantised weight."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__((out_features, in_features), scheme, dtype)
        self.in_features = in_features
        self.out_features = out_features
        #: Replaces the product for a time, from the same codes (`using_packed_matmuls`).
        self.packed_matmul: Product | None = None
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, K) to (…, N), in the type of `hidden`."""
        return self.product(hidden)

    def product(self, hidden: Tensor) -> Tensor:
        """The product with the weight's transpose, and the bias."""
        if self.packed_matmul is not None:
            return self.packed_matmul(hidden)
        if hidden.requires_grad and torch.is_grad_enabled():
            stored = self.stored
            return _FrozenProduct.apply(hidden, self.bias, stored.scheme, tuple(stored.tensors), *stored.tensors.values())
        return self.scheme.product(hidden, self.stored, self.bias)

    def weight_rows(self, outputs: Tensor) -> Tensor:
        """The weights of some outputs (…,), dequantised, (…, K), in the model's type."""
        rows = self.stored[outputs] if self._keeper is None else self._keeper(outputs)
        return rows.dequantised().to(self.dtype)


class _FrozenProduct(torch.autograd.Function):
    """A product with codes that no gradient is taken of. What they stand for is computed in both passes, and kept in neither:
    kept for the backward pass it would be the model in floating point (Dettmers et al. 2023, section 3)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, bias: Tensor | None, scheme: Scheme, names: tuple[str, ...], *tensors: Tensor
    ) -> Tensor:
        ctx.scheme, ctx.names, ctx.dtype = scheme, names, hidden.dtype
        ctx.save_for_backward(*tensors)
        return scheme.product(hidden, Codes(scheme, dict(zip(names, tensors, strict=True))), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight_NK = Codes(ctx.scheme, dict(zip(ctx.names, ctx.saved_tensors, strict=True))).dequantised()
        nothing = (None,) * (3 + len(ctx.names))
        return (gradient @ weight_NK.to(gradient.dtype)).to(ctx.dtype), *nothing


class TakesPackedMatmul(Protocol):
    """A part whose matmul a packed one can replace: a layer, or a stack of matrices, which has a list of them."""

    packed_matmul: Any


@dataclass(frozen=True)
class PackedMatmuls:
    """Matmuls from the same codes that replace a model's own for a time: of layers, of each matrix of a stack, of all of a
    stack at once; and weights that were dequantised once."""

    products: Mapping[QuantisedLinear, Product]
    stacks: Mapping[Any, Sequence[Product]] = field(default_factory=dict)
    weights: Mapping[QuantisedLinear, Tensor] = field(default_factory=dict)
    grouped: Mapping[Any, VisitsProduct] = field(default_factory=dict)


@contextmanager
def using_packed_matmuls(matmuls: PackedMatmuls) -> Iterator[None]:
    """Replace the matmuls of these parts within the context, for example by those of a kernel that packed the codes."""
    parts: list[tuple[TakesPackedMatmul, Any]] = [*matmuls.products.items(), *matmuls.stacks.items()]
    # not by `setattr`: nn.Module's takes a fifth of a small model's step
    for part, product in parts:
        vars(part)["packed_matmul"] = product
    for stack, visits_product in matmuls.grouped.items():
        vars(stack)["grouped_matmul"] = visits_product
    for layer, weight in matmuls.weights.items():
        vars(layer)["dequantised_weight"] = weight
    try:
        yield
    finally:
        for part, _ in parts:
            vars(part)["packed_matmul"] = None
        for stack in matmuls.grouped:
            vars(stack)["grouped_matmul"] = None
        for layer in matmuls.weights:
            vars(layer)["dequantised_weight"] = None


class QuantisedEmbedding(QuantisedLinear):
    """A table of rows of codes, which is also the head's matrix where the two are tied."""

    def forward(self, tokens: Tensor) -> Tensor:
        """The rows of the tokens, (…, K), in the model's type. `product` is the head's."""
        return self.weight_rows(tokens)


def quantised_parts(module: nn.Module) -> dict[str, QuantisedWeight]:
    """Every quantised weight of a model by its name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, QuantisedWeight)}


def restore_codes(module: nn.Module) -> None:
    """Let every quantised weight of a model whose codes a packed copy replaced hold them again."""
    for part in module.modules():
        if isinstance(part, QuantisedWeight) and part.is_released:
            part.restore()


def read_deferred_codes(module: nn.Module) -> None:
    """Let every quantised weight of a model whose codes are still in a file hold them."""
    for part in module.modules():
        if isinstance(part, QuantisedWeight) and part.deferred is not None:
            part.restore()


def is_quantised(module: nn.Module) -> bool:
    """Whether any weight of a model is kept as codes."""
    return any(isinstance(part, QuantisedWeight) for part in module.modules())


# Shapes: V visits, D hidden, E experts, I width inside an expert, N outputs, K inputs.


class QuantisedStack(QuantisedWeight):
    """One matrix of every expert, (E, N, K)."""

    def __init__(self, shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype) -> None:
        super().__init__(shape, scheme, dtype)
        self._matrices: list[QuantisedLinear] = []
        #: Replaces the product of each matrix for a time, from the same codes (`using_packed_matmuls`).
        self.packed_matmul: Sequence[Product] | None = None
        #: Replaces the products of all matrices for a time.
        self.grouped_matmul: VisitsProduct | None = None

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

    def release_matrices(self, keepers: Sequence[Keeper], names: frozenset[str] = PACKED_TENSORS) -> None:
        """Drop the tensors of these names; each matrix has a keeper of its own."""

        def stacked(experts: Tensor | None) -> Codes:
            chosen = range(len(keepers)) if experts is None else experts.tolist()
            return Codes.stack([keepers[expert](None) for expert in chosen])

        for layer, keeper in zip(self.matrices, keepers, strict=True):
            layer.release(keeper, names)
        self.release(stacked, names)

    def take(self, stored: Codes) -> Self:
        """Store these codes; returns itself."""
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
        self.weighs_inputs = experts.weighs_inputs
        self.backend = experts.backend
        weight = experts.gate_up_proj
        self.gate_up_proj = QuantisedStack(tuple(weight.shape), gate_up, weight.dtype)  # type: ignore[assignment]
        self.down_proj = QuantisedStack(tuple(experts.down_proj.shape), down, weight.dtype)  # type: ignore[assignment]
        self.gate_up_bias = experts.gate_up_bias
        self.down_bias = experts.down_bias

    def visited(self, visits_VD: Tensor, sizes_E: Tensor) -> Tensor:
        """What the experts make of their visits, (V, D)."""
        assert isinstance(self.gate_up_proj, QuantisedStack) and isinstance(self.down_proj, QuantisedStack)
        if self.gate_up_proj.grouped_matmul is not None and self.down_proj.grouped_matmul is not None:
            inner = self.gate_up_proj.grouped_matmul(visits_VD, sizes_E)
            if self.gate_up_bias is None or self.down_bias is None:
                return self.down_proj.grouped_matmul(self.gate(inner), sizes_E)
            expert_V = torch.arange(len(sizes_E), device=sizes_E.device)
            expert_V = expert_V.repeat_interleave(sizes_E, output_size=len(visits_VD))
            inner = inner + self.gate_up_bias[expert_V].to(inner.dtype)
            out = self.down_proj.grouped_matmul(self.gate(inner), sizes_E)
            return out + self.down_bias[expert_V].to(out.dtype)
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
