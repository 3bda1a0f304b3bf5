"""A decoder computed by batch-invariant kernels, with gradients: the bits of a token's states depend on its text alone.

PyTorch sums a row of a matmul in another order when there are other numbers of rows, and so do its norms, its softmax and,
at the ends of a vector, its activations. So a sampler, which computes a token at a time over a KV cache, and a trainer, which
computes packed rows at once, find different log-probabilities with the same weights (He and Thinking Machines Lab 2025,
"Defeating nondeterminism in LLM inference"). Here every operation of a block is a kernel of `cpu_kernels` whose sums have one
order for a row, whatever rows, documents, KV blocks and threads there are: the kernels of the engine's compiled step. The
engine's step, the same modules over a KV cache and the same modules over packed rows then agree to the last bit.

Within a block a `TorchFunctionMode` replaces what sums or approximates, lets pass what rounds each number by itself (sums and
products of two tensors, views, copies), and refuses every other function by name: what is not known to be exact never runs.
The backward pass is PyTorch's: products of gradients, and the derivative of the plain formula at the same inputs.

Shapes: B rows of a batch, T tokens of a row, N tokens of all rows, D hidden, K inputs, H query heads, K key-value heads where a
head follows, C channels of a head, R channels that are turned, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, handle_torch_function, resolve_name

from bessemer.core.errors import ConfigError
from bessemer.model import cpu_kernels as operators
from bessemer.model.attention.base import variants_in
from bessemer.model.config import ModelConfig
from bessemer.model.cpu_kernels import library, unavailable
from bessemer.model.cpu_kernels.packed import PackedMatrix
from bessemer.model.layers.attention_backends import Scores, explicit
from bessemer.model.layers.attention_mask import AttentionMask, attention_mask
from bessemer.model.layers.positions import Rotation, rotate, turned

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

#: As `Activation` of step.h and `Pointwise` of batch_invariant.h.
_SILU, _GELU, _GELU_TANH, _RELU, _TANH, _SIGMOID = range(6)


def unsupported(config: ModelConfig) -> str | None:
    """Why a model cannot be computed so, as the end of "because …"; None where it can."""
    if library() is None:
        return f"the compiled kernels are missing: {unavailable()}"
    reasons = {
        **{f"it has {variant.noun}": not variant.in_compiled_step for variant in variants_in(config)},
        "it has experts": any(config.is_sparse(layer) for layer in range(config.num_hidden_layers)),
        f"its positions are {config.position_type}": config.position_type not in ("rotary", "none", "learned"),
        "its rotary frequencies follow the length of the text": config.rope_scaling.rope_type == "dynamic",
        "it has a scalar head in place of the language head": bool(config.num_scores),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class _ByKernel(torch.autograd.Function):
    """What a kernel makes of some tensors, with the derivative of the plain formula at the same inputs."""

    @staticmethod
    def forward(context: Any, kernel: Callable[..., Tensor], formula: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        context.save_for_backward(*tensors)
        context.formula = formula
        return kernel(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needs = context.needs_input_grad[2:]
        tensors = [
            None if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip(context.saved_tensors, needs, strict=True)
        ]
        with torch.enable_grad():
            out = context.formula(*tensors)
        wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need and tensor is not None]
        gradients = iter(torch.autograd.grad(out, wanted, gradient))
        return None, None, *(next(gradients) if need else None for need in needs)


class _Linear(torch.autograd.Function):
    """x Wᵀ + b by a packed matrix; its derivative by products of the gradient."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, weight_NK: Tensor, bias_N: Tensor | None, packed: PackedMatrix) -> Tensor:
        context.save_for_backward(hidden, weight_NK)
        return packed.multiply(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight_NK = context.saved_tensors
        of_hidden, of_weight, of_bias, _ = context.needs_input_grad
        gradient_MN = gradient.flatten(0, -2)
        return (
            gradient @ weight_NK if of_hidden else None,
            gradient_MN.T @ hidden.flatten(0, -2) if of_weight else None,
            gradient_MN.sum(0) if of_bias else None,
            None,
        )


#: Packed weights that are kept between calls; None: each call packs the weights again, for they may have changed.
_KEPT: ContextVar[dict[Any, Any] | None] = ContextVar("_KEPT", default=None)


@contextmanager
def keeping_packed_weights(kept: dict[Any, Any]) -> Iterator[None]:
    """Keep the packed weights of parameters in `kept` while entered. The caller clears it when the weights change."""
    token = _KEPT.set(kept)
    try:
        yield
    finally:
        _KEPT.reset(token)


def _packed(weight_NK: Tensor, bias_N: Tensor | None) -> PackedMatrix:
    kept = _KEPT.get()
    # an adapter's numbers are no parameters here, and change in place
    if kept is None or not isinstance(weight_NK, nn.Parameter):
        return _pack(weight_NK, bias_N)
    key = weight_NK.data_ptr(), tuple(weight_NK.shape)
    if key not in kept:
        # the weight is held too, so that its address is not another's
        kept[key] = _pack(weight_NK, bias_N), weight_NK
    return cast(PackedMatrix, kept[key][0])


def _pack(weight_NK: Tensor, bias_N: Tensor | None) -> PackedMatrix:
    layer = nn.Linear(weight_NK.shape[1], weight_NK.shape[0], bias=bias_N is not None, device="meta")
    layer.weight = nn.Parameter(weight_NK.detach(), requires_grad=False)
    if bias_N is not None:
        layer.bias = nn.Parameter(bias_N.detach(), requires_grad=False)
    return PackedMatrix.of(layer)


def linear(hidden: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, (…, N): for each output one chain of fused multiplications and additions, from the first input to the last."""
    result: Tensor = _Linear.apply(hidden, weight_NK, bias_N, _packed(weight_NK, bias_N))
    return result


def _norm(
    hidden: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float | None, *, centres: bool
) -> Tensor:
    assert weight is not None and eps is not None

    def kernel(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return operators.norm_rows(hidden, weight, bias, eps, centres, torch.get_num_threads())

    def formula(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if centres:
            return functional.layer_norm(hidden, list(shape), weight, bias, eps)
        return functional.rms_norm(hidden, list(shape), weight, eps)

    result: Tensor = _ByKernel.apply(kernel, formula, hidden, weight, bias)
    return result


def rms_norm(hidden: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """As `functional.rms_norm`."""
    return _norm(hidden, shape, weight, None, eps, centres=False)


def layer_norm(
    hidden: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """As `functional.layer_norm`."""
    return _norm(hidden, shape, weight, bias, eps, centres=True)


def _pointwise(function: int, formula: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A function of single numbers."""

    def kernel(values: Tensor) -> Tensor:
        return operators.pointwise(values, function, torch.get_num_threads())

    def apply(values: Tensor, inplace: bool = False) -> Tensor:
        result: Tensor = _ByKernel.apply(kernel, formula, values)
        return result

    return apply


_tanh = _pointwise(_TANH, torch.tanh)
_GELUS = {
    "none": _pointwise(_GELU, functional.gelu),
    "tanh": _pointwise(_GELU_TANH, lambda values: functional.gelu(values, approximate="tanh")),
}


def gelu(values: Tensor, *, approximate: str = "none") -> Tensor:
    """As `functional.gelu`."""
    return _GELUS[approximate](values)


def rotated(heads_BHTC: Tensor, rotation: Rotation, interleave: bool = False) -> Tensor:
    """As `rotate`."""
    batch, heads, length, channels = heads_BHTC.shape

    def kernel(heads_BHTC: Tensor) -> Tensor:
        heads_NHC = heads_BHTC.transpose(1, 2).reshape(-1, heads, channels).clone()
        tables = (
            table.expand(batch, 1, length, -1).reshape(batch * length, -1).contiguous()
            for table in (rotation.cosine, rotation.signed_sine)
        )
        operators.rotate_rows_(heads_NHC, *tables, interleave, torch.get_num_threads())
        return heads_NHC.view(batch, length, heads, channels).transpose(1, 2)

    result: Tensor = _ByKernel.apply(kernel, lambda heads_BHTC: turned(heads_BHTC, rotation, interleave), heads_BHTC)
    return result


def _add_product_(out: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """As `Tensor.addmm_`, rounded as an adapter in training is: the product, its scale, the sum."""
    assert beta == 1
    return out.add_(linear(left, right.T) * alpha)


def _add_rows_(out: Tensor, dim: int, rows_M: Tensor, added: Tensor, *, alpha: float = 1) -> Tensor:
    """As `Tensor.index_add_`, of rows of which each comes once."""
    return out.index_add_(dim, rows_M, added * alpha)


def attention(query_BHTC: Tensor, key_BKSC: Tensor, value_BKSV: Tensor, mask: AttentionMask, scores: Scores) -> Tensor:
    """The attention backend of rows without a cache, (B, H, T, V): each document's keys are put into blocks, as the engine's KV
    cache has them, and the engine's kernel attends to them."""
    # so that the mode is off in what follows
    result: Tensor = handle_torch_function(attention, (query_BHTC,), query_BHTC, key_BKSC, value_BKSV, mask, scores)
    return result


def _attention(query_BHTC: Tensor, key_BKSC: Tensor, value_BKSV: Tensor, mask: AttentionMask, scores: Scores) -> Tensor:
    batch, _, length, _ = query_BHTC.shape
    documents = mask.keys
    assert documents is not None, "a model that computes by batch-invariant kernels makes them with its masks"

    def kernel(query_BHTC: Tensor, key_BKSC: Tensor, value_BKSV: Tensor, sinks_H: Tensor | None) -> Tensor:
        query_NHC = query_BHTC.transpose(1, 2).flatten(0, 1)[documents.order_N]
        attended_NHV = operators.paged_attention(
            query_NHC.contiguous(),
            documents.paged(key_BKSC),
            documents.paged(value_BKSV),
            None,
            None,
            documents.starts,
            documents.positions,
            documents.tables,
            sinks_H,
            scores.scale,
            scores.softcap or 0.0,
            mask.window or 0,
            torch.get_num_threads(),
        )
        return attended_NHV[documents.inverse_N].unflatten(0, (batch, length)).transpose(1, 2)

    def formula(query_BHTC: Tensor, key_BKSC: Tensor, value_BKSV: Tensor, sinks_H: Tensor | None) -> Tensor:
        dense = attention_mask(
            length,
            length,
            query_BHTC.dtype,
            query_BHTC.device,
            documents_BT=mask.documents_BT,
            visible_to_BT=mask.visible_to_BT,
            window=mask.window,
        )
        return explicit(query_BHTC, key_BKSC, value_BKSV, dense, scores._replace(sinks_H=sinks_H))

    result: Tensor = _ByKernel.apply(kernel, formula, query_BHTC, key_BKSC, value_BKSV, scores.sinks_H)
    return result


#: Rows whose logits are in memory at once.
_ROWS = 128


@torch.no_grad()
def target_log_probs(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, temperature: float, softcap: float | None
) -> Tensor:
    """log softmax(logits / temperature)[target] of states after the last norm, (N,) float32, in nats, without a gradient: the
    bits that the engine's sampler gives for the token. NaN where logits are not finite."""
    packed = _pack(weight_VD, None)
    values = [torch.empty(0)]
    for rows_RD, targets_R in zip(hidden_ND.split(_ROWS), targets_N.split(_ROWS), strict=True):
        logits_RV = _capped(packed.multiply(rows_RD), softcap)
        values.append(operators.target_log_probs(logits_RV, targets_R, temperature, torch.get_num_threads()))
    return torch.cat(values)


#: What is computed here in the place of PyTorch's functions.
_KERNELS: dict[Any, Callable[..., Any]] = {
    functional.linear: linear,
    functional.rms_norm: rms_norm,
    functional.layer_norm: layer_norm,
    functional.silu: _pointwise(_SILU, functional.silu),
    functional.gelu: gelu,
    functional.relu: _pointwise(_RELU, functional.relu),
    torch.tanh: _tanh,
    torch.sigmoid: _pointwise(_SIGMOID, torch.sigmoid),
    Tensor.addmm_: _add_product_,
    Tensor.index_add_: _add_rows_,
    rotate: rotated,
    attention: _attention,
}

#: Functions that round each number by itself, and those that move numbers or say how they lie, by the last part of their names.
_ROUNDING = {"add", "__add__", "__radd__", "__iadd__", "add_", "sub", "__sub__", "__rsub__", "mul", "__mul__", "__rmul__"}
_ROUNDING |= {"div", "__truediv__", "neg", "__neg__"}
_MOVING = {"to", "float", "type", "detach", "clone", "contiguous", "view", "view_as", "reshape", "flatten", "unflatten"}
_MOVING |= {"transpose", "squeeze", "unsqueeze", "expand", "expand_as", "chunk", "split", "unbind", "cat", "stack"}
_MOVING |= {"__getitem__", "index_select", "__get__", "__len__", "is_contiguous", "is_floating_point", "numel", "dim"}
_MOVING |= {"size", "stride", "requires_grad_", "new_empty", "new_zeros", "empty_like"}


class _BatchInvariant(TorchFunctionMode):
    """Replaces, passes or refuses each of PyTorch's functions."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        kernel = _KERNELS.get(function)
        if kernel is not None:
            return kernel(*arguments, **(named or {}))
        is_ours = isinstance(function, torch._ops.OpOverload) and function.namespace == "bessemer"
        name = getattr(function, "__name__", "")
        # with a factor a sum may be rounded once or twice
        if is_ours or name in _MOVING or (name in _ROUNDING and not named):
            return function(*arguments, **(named or {}))
        raise ConfigError(
            f"batch-invariant kernels: the model calls {resolve_name(function) or function}, whose sums have no fixed order "
            "here; train it without bitwise_consistent"
        )


def within_batch_invariance(compute: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function, of a block or a norm, that computes the same by the kernels of this module."""

    def computed(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        with _BatchInvariant():
            return compute(*arguments, **named)

    return computed


def logits(hidden: Tensor, weight_VD: Tensor, softcap: float | None) -> Tensor:
    """Logits of states after the last norm, (…, V)."""
    return _capped(linear(hidden, weight_VD), softcap)


def _capped(values: Tensor, softcap: float | None) -> Tensor:
    return values if softcap is None else softcap * _tanh(values / softcap)
