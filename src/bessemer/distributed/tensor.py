"""Tensor parallelism (Shoeybi et al. 2019) with sequence parallelism (Korthikanti et al. 2022): every matrix is sharded over an
axis, and between matrices the tokens are.

Attention and feed-forward are y = f(x A) B, with f inside heads or channels. A is sharded by columns, its outputs, and B by
the matching rows: f(x [A₁ A₂]) [B₁; B₂] = f(x A₁) B₁ + f(x A₂) B₂. A rank reads all tokens and computes its own heads or
channels; the sum over the ranks is sharded by tokens again, since norms and the residual stream work on one token at a time:
an all-gather before, a reduce-scatter after.

Embedding and head are sharded over the vocabulary; the loss (`training/head.py`) never gathers the logits. Whole experts
are assigned to ranks: a rank computes the tokens that are routed to its own.

In inference the tokens are not sharded: a step has any number of them, and no activations are stored. So every rank has all
tokens, and sums are all-reduced.

The model is unaware of it: its modules see their parameters as plain tensors of this rank's size (`sharding`).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional

from bessemer.distributed.collectives import all_gather, all_reduce, copy_to_ranks, reduce_scatter, to_autocast_dtype
from bessemer.distributed.expert import visit_local_experts
from bessemer.distributed.mesh import Mesh
from bessemer.distributed.sharding import (
    hide_parameter,
    local_shard,
    replicate_parameters,
    shard_parameter,
    shard_parameters,
    use_rows,
)
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.layers.attention import AttentionLayer
from bessemer.model.layers.attention_backends import capped
from bessemer.model.layers.attention_mask import AttentionMask
from bessemer.model.layers.block import Block, MtpModule
from bessemer.model.layers.feed_forward import FeedForward, Routing, SparseFeedForward
from bessemer.model.layers.norms import LayerNorm, RMSNorm

# Shapes: B batch, T time, D hidden, V vocabulary, N tokens, E experts, k experts of a token, M visits.

#: The dimension of the tokens in (B, T, D) and in (N, D).
_TOKENS = -2


class AxisSharder(NamedTuple):
    """Shards modules over the tensor axis (the model's `TensorSharder`). whole: tokens between two matrices are replicated, and
    not sharded as well."""

    axis: DeviceMesh
    whole: bool = False

    def gather_tokens(self, tokens: Tensor, dim: int, *, gradient: Literal["whole", "partial"]) -> Tensor:
        """All tokens of activations between two matrices."""
        return tokens if self.whole else all_gather(tokens, self.axis, dim, gradient=gradient)

    def reduce(self, partial_: Tensor, dim: int) -> Tensor:
        """The sum over the ranks, in the layout between two matrices."""
        return all_reduce(partial_, self.axis) if self.whole else reduce_scatter(partial_, self.axis, dim)

    @property
    def rank(self) -> int:
        return self.axis.get_local_rank()

    @property
    def ranks(self) -> int:
        return self.axis.size()

    def shard_outputs(self, *linears: nn.Module) -> None:
        for linear in linears:
            shard_parameters(linear, self.axis, weight=0, bias=0)

    def shard_inputs(self, linear: nn.Module, *, reduce: bool = True) -> None:
        """The outputs are summed over ranks, or with `reduce=False` left partial."""

        def reduce_outputs(linear: nn.Module, arguments: Any, partial_: Tensor) -> Tensor:
            bias = local_shard(linear, "bias")
            if not reduce:
                return partial_ if bias is None else partial_ + bias / self.ranks
            out = self.reduce(partial_, _TOKENS)
            return out if bias is None else out + bias

        shard_parameters(linear, self.axis, weight=1, bias=None)
        # the bias is added once, not by every rank
        hide_parameter(linear, "bias")
        linear.register_forward_hook(reduce_outputs)

    def shard_parameters(self, module: nn.Module, **dims: int | None) -> None:
        shard_parameters(module, self.axis, **dims)

    def replicate(self, *modules: nn.Module) -> None:
        for module in modules:
            replicate_parameters(module, self.axis)

    def use_rows(self, module: nn.Module, name: str, rows: Tensor) -> None:
        use_rows(module, name, rows)

    def norm_over_ranks(self, *norms: nn.Module) -> None:
        for norm in norms:
            assert isinstance(norm, RMSNorm | LayerNorm)
            norm.forward = partial(_norm_over_ranks, norm, self.axis, norm.weight.shape[0])  # type: ignore[method-assign]
            shard_parameters(norm, self.axis, weight=0, bias=0)

    def gather_inputs(self, module: nn.Module, *, cast: bool = True) -> None:
        module.register_forward_pre_hook(partial(_all_tokens, self, cast=cast))


def apply_tensor_parallel(model: Decoder, mesh: Mesh, *, whole: bool = False) -> None:
    """Shard a decoder over the mesh's tensor axis, in place; parameters become DTensors of that axis, names stay.

    Between its modules a rank holds a shard of the tokens, (B, T / ranks, D): embedding and blocks return it, and a pipeline
    stage sends it. `hidden` and `logits` return all tokens, the same on every rank. A stage may lack embedding, head and
    layers. With expert parallelism the experts are left to it, and get this rank's tokens. An encoder of pictures is
    replicated.

    whole: every rank has all tokens everywhere, without gradients, for inference.
    """
    axis = mesh.tensor
    sharder = AxisSharder(axis, whole)
    for name, part in model.named_children():
        if name == "embed_tokens":
            shard_parameter(part, axis, "weight", 0)
            part.forward = partial(_embedded, part, sharder)
        elif name == "embed_positions":
            replicate_parameters(part, axis)
            if not whole:
                part.register_forward_pre_hook(partial(_own_positions, axis))
        elif name == "lm_head":
            shard_parameter(part, axis, "weight", 0)
        elif name == "score":
            replicate_parameters(part, axis)
            model.scores = partial(_all_scores, model, axis)  # type: ignore[method-assign]
        elif name == "norm":
            _replicate_last_norm(part, sharder)
        elif name == "vision":
            # a rank encodes the pictures of its own tokens, so that gradients are partial as those of norms
            replicate_parameters(part, axis)
            if not whole:
                cast(Any, model).own_tokens = partial(_own_columns, axis)
    if not model.config.num_scores:
        model.logits = partial(_all_logits, model, axis)  # type: ignore[method-assign]
    for module in list(model.modules()):
        if isinstance(module, MtpModule):
            for part in (module.embedding_norm, module.hidden_norm, module.proj):
                replicate_parameters(part, axis)
            _replicate_last_norm(module.norm, sharder)
        elif isinstance(module, Block):
            _shard_block(module, mesh, sharder, model.config)


def _shard_block(block: Block, mesh: Mesh, sharder: AxisSharder, config: ModelConfig) -> None:
    for part in block.children():
        if isinstance(part, AttentionLayer):
            part.shard(sharder)
        elif isinstance(part, FeedForward):
            _shard_feed_forward(part, sharder)
        elif isinstance(part, SparseFeedForward):
            _shard_sparse(part, mesh, sharder, config)
        else:
            assert isinstance(part, RMSNorm | LayerNorm | nn.Identity), type(part)
            replicate_parameters(part, sharder.axis)


def _replicate_last_norm(norm: nn.Module, sharder: AxisSharder) -> None:
    """Replicate the last norm, and gather all tokens after it for the head."""

    def all_tokens(norm: nn.Module, arguments: Any, hidden_BTD: Tensor) -> Tensor:
        return sharder.gather_tokens(hidden_BTD, _TOKENS, gradient="whole")

    replicate_parameters(norm, sharder.axis)
    norm.register_forward_hook(all_tokens)


# ---------------------------------------------------------------------------------------------------- the parts of a block


def _shard_feed_forward(feed_forward: FeedForward, sharder: AxisSharder) -> None:
    _shard_matrices(feed_forward, sharder)
    sharder.gather_inputs(feed_forward)


def _shard_matrices(feed_forward: FeedForward, sharder: AxisSharder, *, reduce: bool = True) -> None:
    if feed_forward.gate_proj is not None:
        sharder.shard_outputs(feed_forward.gate_proj)
    sharder.shard_outputs(feed_forward.up_proj)
    sharder.shard_inputs(feed_forward.down_proj, reduce=reduce)


def _shard_sparse(sparse: SparseFeedForward, mesh: Mesh, sharder: AxisSharder, config: ModelConfig) -> None:
    """Shard experts; the router works on this rank's tokens, and its losses and metrics are of all tokens."""
    axis = sharder.axis
    replicate_parameters(sparse.router, axis)
    in_losses = bool(config.router_aux_loss_coef or config.router_z_loss_coef)
    sparse.register_forward_hook(partial(_gather_routing, axis, in_losses))
    if sparse.shared_expert_gate is not None:
        replicate_parameters(sparse.shared_expert_gate, axis)
    if mesh.layout.expert > 1:
        if sparse.shared_expert is not None:
            _shard_feed_forward(sparse.shared_expert, sharder)
        return
    if sparse.shared_expert is not None:
        _shard_matrices(sparse.shared_expert, sharder, reduce=False)
    sparse.visit = partial(_visit_on_ranks, sparse, sharder)  # type: ignore[method-assign]
    sparse.experts.forward = partial(visit_local_experts, sparse.experts, axis)  # type: ignore[method-assign]
    sparse.experts.count //= axis.size()
    shard_parameters(sparse.experts, axis, gate_up_proj=0, down_proj=0, gate_up_bias=0, down_bias=0)


# --------------------------------------------------------------------------------------- forward computation on many ranks


def _all_tokens(sharder: AxisSharder, part: nn.Module, arguments: tuple[Any, ...], *, cast: bool) -> tuple[Any, ...]:
    """Inputs of a module that computes its own heads or channels: all tokens, and the mask of its heads. cast: in autocast's
    dtype, in which its matmuls read them anyway."""
    hidden, *others = arguments
    others = [_of_own_heads(other, sharder.axis) if isinstance(other, AttentionMask) else other for other in others]
    hidden = sharder.gather_tokens(to_autocast_dtype(hidden) if cast else hidden, _TOKENS, gradient="partial")
    return hidden, *others


def _of_own_heads(mask: AttentionMask, axis: DeviceMesh) -> AttentionMask:
    """ALiBi's slopes differ by head, and a mask with them."""
    if mask.slopes_H is None:
        return mask
    rank, ranks = axis.get_local_rank(), axis.size()
    dense = None if mask.dense is None else mask.dense.chunk(ranks, 1)[rank]
    return mask._replace(slopes_H=mask.slopes_H.chunk(ranks)[rank], dense=dense)


def _norm_over_ranks(norm: RMSNorm | LayerNorm, axis: DeviceMesh, width: int, hidden: Tensor) -> Tensor:
    """A norm over the channels of all heads, `width` of them, which are sharded over the ranks."""
    weight: Tensor = norm.weight
    bias: Tensor | None = getattr(norm, "bias", None)
    hidden = hidden.to(weight.dtype)
    if isinstance(norm, LayerNorm):
        hidden = hidden - all_reduce(hidden.sum(-1, keepdim=True), axis) / width
    elif norm.offset:
        weight = weight + 1
    mean_square = all_reduce(hidden.square().sum(-1, keepdim=True), axis) / width
    normed = hidden * torch.rsqrt(mean_square + norm.eps) * weight
    return normed if bias is None else normed + bias


def _embedded(embedding: nn.Module, sharder: AxisSharder, tokens_BT: Tensor) -> Tensor:
    """Embeddings of this rank's tokens: each rank looks up its shard of the vocabulary, and the sum is reduce-scattered."""
    axis = sharder.axis
    weight_VD = cast(DTensor, embedding.weight).to_local()
    own_BT = tokens_BT - axis.get_local_rank() * weight_VD.shape[0]
    elsewhere_BT = (own_BT < 0) | (own_BT >= weight_VD.shape[0])
    found_BTD = functional.embedding(own_BT.masked_fill(elsewhere_BT, 0), weight_VD)
    return sharder.reduce(found_BTD.masked_fill(elsewhere_BT[..., None], 0.0), _TOKENS)


def _own_positions(axis: DeviceMesh, embedding: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    return (_own_columns(axis, arguments[0]),)


def _own_columns(axis: DeviceMesh, values_BT: Tensor) -> Tensor:
    return values_BT.chunk(axis.size(), -1)[axis.get_local_rank()]


def _all_logits(model: Decoder, axis: DeviceMesh, hidden: Tensor) -> Tensor:
    """`Decoder.logits` of the whole vocabulary on every rank. The loss does not use it."""
    weight_VD = cast(DTensor, model.head_weight).to_local()
    own = functional.linear(copy_to_ranks(hidden, axis), weight_VD)
    return capped(all_gather(own, axis, -1, gradient="whole"), model.logit_softcap)


def _all_scores(model: Decoder, axis: DeviceMesh, hidden_BTD: Tensor) -> Tensor:
    """`Decoder.scores` on every rank, each of which computes those of its tokens: so the head's gradient is a sum over ranks,
    as that of every replicated parameter."""
    weight = cast(Tensor, local_shard(model.score, "weight"))
    with torch.autocast(hidden_BTD.device.type, enabled=False):
        own_BTD = hidden_BTD.chunk(axis.size(), _TOKENS)[axis.get_local_rank()].to(weight.dtype)
        return all_gather(functional.linear(own_BTD, weight), axis, _TOKENS, gradient="whole")


def pad_vocabulary(model: Decoder, ranks: int) -> None:
    """Pad a whole decoder's embedding and head with rows of zeros until they divide; `logits_on_rank_0` drops them."""
    missing = -model.config.vocab_size % ranks
    for part in {model.embed_tokens, model.head} if missing else ():
        weight = cast(nn.Parameter, part.weight)
        filled = functional.pad(weight.detach(), (0, 0, 0, missing))
        part.weight = nn.Parameter(filled, requires_grad=weight.requires_grad)


def logits_on_rank_0(model: Decoder, mesh: Mesh) -> None:
    """Make a decoder, sharded over the tensor axis or not, return logits only on rank 0, and (…, 0) on the others."""
    model.logits = partial(_logits_on_rank_0, model, mesh)  # type: ignore[method-assign]


def _logits_on_rank_0(model: Decoder, mesh: Mesh, hidden: Tensor) -> Tensor:
    rank, ranks = mesh.rank, mesh.layout.tensor
    if rank >= ranks:
        # replicas of the ranks of the first tensor group
        return hidden[..., :0]
    if ranks == 1:
        return Decoder.logits(model, hidden)
    if not hidden.numel():
        return hidden.new_empty(*hidden.shape[:-1], model.config.vocab_size)
    own = functional.linear(hidden, cast(DTensor, model.head_weight).to_local())
    shards = None if rank else [torch.empty_like(own) for _ in range(ranks)]
    dist.gather(own, shards, group=mesh.tensor.get_group(), group_dst=0)
    return (
        own[..., :0] if shards is None else capped(torch.cat(shards, -1)[..., : model.config.vocab_size], model.logit_softcap)
    )


def _gather_routing(
    axis: DeviceMesh, in_losses: bool, sparse: SparseFeedForward, arguments: tuple[Tensor], out_BTD: Tensor
) -> None:
    """Gather the router's last routing over all tokens; its logits only where a loss reads them."""
    router, rows = sparse.router, len(out_BTD)
    if router.last is None or not router.training:
        return

    def gather_tokens(own_NX: Tensor) -> Tensor:
        return all_gather(own_NX.unflatten(0, (rows, -1)), axis, 1, gradient="whole").flatten(0, 1)

    logits_NE, experts_Nk = router.last
    router.last = (gather_tokens(logits_NE) if in_losses else logits_NE, gather_tokens(experts_Nk))


def _visit_on_ranks(sparse: SparseFeedForward, sharder: AxisSharder, hidden_ND: Tensor, routing: Routing) -> Tensor:
    """`SparseFeedForward.visit` of this rank's tokens, each visit computed on the rank of its expert."""
    hidden_ND = sharder.gather_tokens(to_autocast_dtype(hidden_ND), 0, gradient="partial")
    experts_Nk = sharder.gather_tokens(routing.experts_Nk, 0, gradient="whole")
    weights_Nk = sharder.gather_tokens(routing.weights_Nk, 0, gradient="partial")
    out_ND = SparseFeedForward.visit(sparse, hidden_ND, Routing(experts_Nk, weights_Nk))
    return sharder.reduce(out_ND, 0)
