"""A head computed a chunk of tokens at a time: logits by one matmul, what follows in float32, block by block.

The logits of a chunk are in the dtype of the matmul, bfloat16 under autocast. Each block of them is copied to float32, where
softcap, softmax and gradient are computed; float32 logits are changed in place. On a CPU a block is a chunk, on a GPU a part.

Shapes: N tokens, C tokens of a chunk, B tokens of a block, D hidden, V vocabulary, of this rank where it is sharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from bessemer.distributed.collectives import copy_to_ranks
from bessemer.model.cpu_kernels import library
from bessemer.training.logit_chunks import chunk_size


@dataclass(frozen=True)
class Head:
    """Settings of the map from hidden states to logits: dtype of the matmuls, softcap c·tanh(logits / c), division by a
    temperature after it, and this rank's shard of the vocabulary, which is the whole one where `group` is None."""

    dtype: torch.dtype
    softcap: float | None = None
    temperature: float = 1.0
    group: dist.ProcessGroup | None = None
    first_id: int = 0
    device: str = "cpu"

    @staticmethod
    def of(
        hidden_ND: Tensor, weight_VD: Tensor, softcap: float | None, temperature: float = 1.0
    ) -> tuple[Head, Tensor, Tensor]:
        """The head of a weight, the hidden states and the rank's rows of the weight: all, or those of a DTensor sharded by rows
        over one axis. Backward, the gradients of the hidden states are summed over that axis.

        Raises ValueError for a temperature that is not positive.
        """
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        kind = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_VD.dtype
        head = Head(dtype, softcap, temperature, device=kind)
        if not isinstance(weight_VD, DTensor):
            return head, hidden_ND, weight_VD
        axis, (placement,) = weight_VD.device_mesh, weight_VD.placements
        assert placement.is_shard(0), placement
        local_VD = weight_VD.to_local()
        head = replace(head, group=axis.get_group(), first_id=axis.get_local_rank() * local_VD.shape[0])
        return head, copy_to_ranks(hidden_ND, axis), local_VD

    @property
    def is_compiled(self) -> bool:
        """Whether the compiled CPU kernels turn its logits into a loss and a gradient (`cross_entropy_`)."""
        plain = self.softcap is None and self.temperature == 1 and self.group is None
        return plain and self.device == "cpu" and self.dtype == torch.bfloat16 and library() is not None

    @property
    def is_plain(self) -> bool:
        """Whether it is whole on this rank, multiplies in the dtype of the softmax, and has no softcap."""
        return self.group is None and self.softcap is None and self.dtype == self.float_dtype

    @property
    def float_dtype(self) -> torch.dtype:
        """The dtype of everything but the matmuls: float32, or float64 for float64 weights."""
        return torch.promote_types(self.dtype, torch.float32)

    def zeros(self, count: int, hidden_ND: Tensor) -> Tensor:
        """(count, N, 1)."""
        return hidden_ND.new_zeros(count, len(hidden_ND), 1, dtype=self.float_dtype)

    def all_reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Sum, or another reduction, over the ranks of the vocabulary; in place."""
        if self.group is not None:
            dist.all_reduce(values, operation, self.group)
        return values

    def transform_(self, logits_BV: Tensor, tanh_BV: Tensor | None = None) -> None:
        """Softcap and temperature, in place. tanh_BV: receives the softcap's tanh, where there is one."""
        if self.softcap is not None:
            tanh_BV = torch.tanh(logits_BV.div_(self.softcap), out=logits_BV if tanh_BV is None else tanh_BV)
            torch.mul(tanh_BV, self.softcap, out=logits_BV)
        if self.temperature != 1:
            logits_BV.div_(self.temperature)

    def log_softmax_(self, logits_BV: Tensor, probs_BV: Tensor) -> Tensor:
        """Log softmax over the whole vocabulary, in place, and the softmax in probs_BV. Returns log Σ exp(logits), (B, 1)."""
        largest_B1 = self.all_reduce(logits_BV.amax(-1, keepdim=True), dist.ReduceOp.MAX)
        torch.exp(logits_BV.sub_(largest_B1), out=probs_BV)
        sum_B1 = self.all_reduce(probs_BV.sum(-1, keepdim=True))
        log_sum_B1 = sum_B1.log()
        logits_BV.sub_(log_sum_B1)
        probs_BV.div_(sum_B1)
        return largest_B1 + log_sum_B1

    def softmax_of_others(
        self, logits_BV: Tensor, ids_B1: Tensor, is_local_B1: Tensor, probs_BV: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Softmax over the whole vocabulary into probs_BV, but 0 at the targets. Returns log Σ exp(logits) and the log-odds of
        the target, log p − log(1 − p), both (B, 1). 1 − p is summed over the others, so it keeps its digits as p nears 1.

        With m the largest logit, log Σ exp(logits) is m − log p[argmax], exact because p[argmax] ≥ 1/V.
        """
        largest_B1 = self.all_reduce(logits_BV.amax(-1, keepdim=True), dist.ReduceOp.MAX)
        # from the largest on
        target_B1, zeros_B1 = logits_BV.gather(1, ids_B1) - largest_B1, torch.zeros_like(largest_B1)
        if self.group is None:
            torch.softmax(logits_BV, -1, out=probs_BV)
            log_largest_B1 = probs_BV.amax(-1, keepdim=True).log()
            self.put_(probs_BV, ids_B1, zeros_B1, is_local_B1)
            return largest_B1 - log_largest_B1, target_B1 + log_largest_B1 - probs_BV.sum(-1, keepdim=True).log()
        torch.sub(logits_BV, largest_B1, out=probs_BV).exp_()
        self.put_(probs_BV, ids_B1, zeros_B1, is_local_B1)
        target_B1 = target_B1.where(is_local_B1, 0)
        others_B1, target_B1 = self.all_reduce(torch.stack((probs_BV.sum(-1, keepdim=True), target_B1)))
        sum_B1 = others_B1 + target_B1.exp()
        probs_BV.div_(sum_B1)
        return largest_B1 + sum_B1.log(), target_B1 - others_B1.log()

    def local_ids(self, targets_N1: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        """Row of each target in this rank's shard of the weight, and whether it is in the shard; row 0 where it is not, or
        there is no target."""
        ids_N1 = targets_N1 - self.first_id
        is_local_N1 = (ids_N1 >= 0) & (ids_N1 < vocab_size)
        return ids_N1.where(is_local_N1, 0), is_local_N1

    def put_(self, values_BV: Tensor, ids_B1: Tensor, new_B1: Tensor, is_local_B1: Tensor) -> None:
        """Overwrite the value of each token's target, where it is on this rank."""
        if self.group is not None:
            new_B1 = new_B1.where(is_local_B1, values_BV.gather(1, ids_B1))
        values_BV.scatter_(1, ids_B1, new_B1)


def through_softcap_(grad_BV: Tensor, tanh_BV: Tensor | None) -> None:
    """Turn the gradient by capped logits into that by logits, in place: times 1 − tanh². Overwrites the tanh."""
    if tanh_BV is not None:
        grad_BV.addcmul_(grad_BV, tanh_BV.square_(), value=-1)


class Workspace:
    """Memory for one chunk of logits and for blocks in float32, allocated once and overwritten by every chunk: new memory from
    the system costs as much as the matmuls."""

    def __init__(self, head: Head, weight_VD: Tensor, count: int, float_dtype: torch.dtype | None = None) -> None:
        """weight_VD: in the dtype of the matmuls. count: tokens. float_dtype: of blocks, where it is not the head's."""
        size, vocab_size = chunk_size(weight_VD.device.type), len(weight_VD)
        self._weight_VD, self._count = weight_VD, count
        self._float_dtype, self._softcap = float_dtype or head.float_dtype, head.softcap
        self._rows = max(1, min(count, size.tokens(vocab_size)))
        self._block_rows = min(self._rows, size.block_tokens(vocab_size, sharded=head.group is not None))
        self._logits_CV = weight_VD.new_empty(self._rows, vocab_size)
        self._buffers: dict[str, Tensor] = {}

    def chunks(self) -> Iterator[slice]:
        """Chunks of the tokens."""
        return _slices(self._count, self._rows)

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """(C, V), valid until the next call."""
        return torch.mm(hidden_CD, self._weight_VD.T, out=self.memory(len(hidden_CD)))

    def memory(self, count: int) -> Tensor:
        """(count, V), of a chunk's logits, which are overwritten by what is put there."""
        return self._logits_CV[:count]

    def blocks(self, chunk: slice, logits_CV: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The tokens of each block of a chunk, its logits, and the same in float32: a copy that the next block overwrites, or
        where they are float32 the logits themselves."""
        for block in _slices(len(logits_CV), self._block_rows):
            tokens, logits_BV = slice(chunk.start + block.start, chunk.start + block.stop), logits_CV[block]
            if logits_CV.dtype == self._float_dtype:
                yield tokens, logits_BV, logits_BV
            else:
                yield tokens, logits_BV, self.buffer("logits", logits_BV).copy_(logits_BV)

    def tanh(self, like_BV: Tensor) -> Tensor | None:
        """Memory for the tanh of a block's softcap; None where the head has none."""
        return self.buffer("tanh", like_BV) if self._softcap is not None else None

    def buffer(self, name: str, like_BV: Tensor) -> Tensor:
        """Memory in float32 for a block, the same at every call with this name."""
        if name not in self._buffers:
            self._buffers[name] = like_BV.new_empty(self._block_rows, like_BV.shape[1], dtype=self._float_dtype)
        return self._buffers[name][: len(like_BV)]


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class HeadGradients:
    """Gradients of hidden states and weight, from those of the logits, chunk by chunk; None for what needs none.

    That of the weight is summed over the chunks in float32.
    """

    def __init__(self, head: Head, hidden_ND: Tensor, weight_VD: Tensor, *, of_hidden: bool, of_weight: bool) -> None:
        """hidden_ND, weight_VD: in the dtype of the matmuls."""
        self._hidden_ND, self._weight_VD = hidden_ND, weight_VD
        self.hidden_ND = torch.empty_like(hidden_ND) if of_hidden else None
        self.weight_VD = torch.zeros_like(weight_VD, dtype=head.float_dtype) if of_weight else None
        self._of_chunk_VD: Tensor | None = None

    def add(self, chunk: slice, grad_CV: Tensor) -> None:
        """Take the gradient of a chunk's logits."""
        if self.hidden_ND is not None:
            torch.mm(grad_CV, self._weight_VD, out=self.hidden_ND[chunk])
        if self.weight_VD is None:
            return
        if grad_CV.dtype == self.weight_VD.dtype:
            self.weight_VD.addmm_(grad_CV.T, self._hidden_ND[chunk])
            return
        if self._of_chunk_VD is None:
            self._of_chunk_VD = torch.empty_like(self._weight_VD)
        self.weight_VD += torch.mm(grad_CV.T, self._hidden_ND[chunk], out=self._of_chunk_VD)

    def as_dtypes(self, of_hidden: torch.dtype, of_weight: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Both, as an autograd function returns them."""
        return (
            None if self.hidden_ND is None else self.hidden_ND.to(of_hidden),
            None if self.weight_VD is None else self.weight_VD.to(of_weight),
        )


#: Device types on which tokens without a target are dropped. Elsewhere the host would have to wait for their number.
_DROPPING = frozenset({"cpu"})


def without_masked(counted_N: Tensor, *tensors_N: Tensor) -> tuple[Tensor, ...]:
    """`counted_N` and the rows of the tokens that count; or, on a GPU, all rows, zero for the others."""
    if counted_N.device.type not in _DROPPING:
        filled = (tensor_N.masked_fill(~counted_N.view(-1, *[1] * (tensor_N.ndim - 1)), 0) for tensor_N in tensors_N)
        return counted_N, *filled
    if bool(counted_N.all()):
        return counted_N, *tensors_N
    return tuple(tensor_N[counted_N] for tensor_N in (counted_N, *tensors_N))


def spread(values_M: Tensor, counted_N: Tensor) -> Tensor:
    """Values of the rows that `without_masked` gives, (N,), zero for the other tokens."""
    if len(values_M) == len(counted_N):
        return values_M.masked_fill(~counted_N, 0)
    return values_M.new_zeros(len(counted_N)).masked_scatter(counted_N, values_M)
