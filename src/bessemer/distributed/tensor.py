"""Tensor parallelism (Shoeybi et al. 2019) with sequence parallelism (Korthikanti et al. 2022): the ranks of an axis share
every matrix, and between matrices the tokens.

Attention and feed-forward are y = f(x A) B, with f at work inside heads or channels. A is cut by columns, its outputs, and B by
the rows that meet them: f(x [A₁ A₂]) [B₁; B₂] = f(x A₁) B₁ + f(x A₂) B₂. A rank reads all tokens and works on its own heads or
channels; the sum of what the ranks give is split by tokens again, since norms and the residual stream look at one token at a
time: an all-gather before, a reduce-scatter after.

Embedding and head are cut over the vocabulary; the loss (`training/objectives.py`) never brings the logits together.
Experts are shared out whole: a rank computes the tokens that are routed to its own.

A model that is served is cut the same way but for the tokens: a step has any number of them, and nothing is kept of norms and
residuals. So every rank has all, and sums are given to all.

Nothing in the model knows of it: its modules see their parameters as plain tensors of this rank's size (`pieces`).
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

from bessemer.distributed.differentiable import all_reduce, gather, in_product_type, reduce_scatter, share_out
from bessemer.distributed.expert import visit_own
from bessemer.distributed.mesh import Mesh
from bessemer.distributed.pieces import distribute, distribute_whole, hide, piece, see_rows, split
from bessemer.model.attention import Attention
from bessemer.model.attention_backends import capped
from bessemer.model.attention_mask import AttentionMask
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Block, Decoder
from bessemer.model.delta_net import GatedDeltaNet
from bessemer.model.experts import SparseFeedForward
from bessemer.model.feed_forward import FeedForward
from bessemer.model.latent_attention import LatentAttention
from bessemer.model.mtp import MtpModule
from bessemer.model.norms import LayerNorm, RMSNorm
from bessemer.model.router import Routing

# Shapes: B batch, T time, D hidden, V vocabulary, N tokens, E experts, k experts of a token, M visits.

#: Which dimension is that of the tokens, in (B, T, D) and in (N, D).
_TOKENS = -2


class _Between(NamedTuple):
    """The ranks of the tensor axis, and how tokens lie between two matrices: shared out, or (`whole`) all on every rank."""

    axis: DeviceMesh
    whole: bool = False

    def all_of(self, tokens: Tensor, dim: int, *, gradient: Literal["whole", "partial"]) -> Tensor:
        """Every token, of what lies between two matrices."""
        return tokens if self.whole else gather(tokens, self.axis, dim, gradient=gradient)

    def summed(self, partial_: Tensor, dim: int) -> Tensor:
        """The sum over the ranks, as it lies between two matrices."""
        return all_reduce(partial_, self.axis) if self.whole else reduce_scatter(partial_, self.axis, dim)


def apply_tensor(model: Decoder, mesh: Mesh, *, whole: bool = False) -> None:
    """Cut a decoder over the mesh's tensor axis, in place; parameters become DTensors of that axis, names stay.

    Between its parts a rank holds its share of the tokens, (B, T / ranks, D): that is what embedding and blocks give, and what
    a stage of a pipeline sends on. `hidden` and `logits` give all, the same on every rank. A stage may lack embedding, head
    and layers. Experts that the expert axis cuts are left to it; they then meet this rank's tokens.

    whole: every rank has all tokens everywhere, to compute without gradients.
    """
    axis = mesh.tensor
    between = _Between(axis, whole)
    for name, part in model.named_children():
        if name == "embed_tokens":
            split(part, axis, "weight", 0)
            part.forward = partial(_embedded, part, between)
        elif name == "embed_positions":
            distribute_whole(part, axis)
            if not whole:
                part.register_forward_pre_hook(partial(_own_positions, axis))
        elif name == "lm_head":
            split(part, axis, "weight", 0)
        elif name == "norm":
            _cut_last_norm(part, between)
    model.logits = partial(_all_logits, model, axis)  # type: ignore[method-assign]
    for module in list(model.modules()):
        if isinstance(module, MtpModule):
            for part in (module.embedding_norm, module.hidden_norm, module.proj):
                distribute_whole(part, axis)
            _cut_last_norm(module.norm, between)
        elif isinstance(module, Block):
            _cut_block(module, mesh, between, model.config)


def _cut_block(block: Block, mesh: Mesh, between: _Between, config: ModelConfig) -> None:
    for part in block.children():
        if isinstance(part, Attention):
            _cut_attention(part, between)
        elif isinstance(part, LatentAttention):
            _cut_latent_attention(part, between)
        elif isinstance(part, GatedDeltaNet):
            _cut_delta_net(part, between)
        elif isinstance(part, FeedForward):
            _cut_feed_forward(part, between)
        elif isinstance(part, SparseFeedForward):
            _cut_sparse(part, mesh, between, config)
        else:
            assert isinstance(part, RMSNorm | LayerNorm | nn.Identity), type(part)
            distribute_whole(part, between.axis)


def _cut_last_norm(norm: nn.Module, between: _Between) -> None:
    """The head reads all tokens."""

    def all_tokens(norm: nn.Module, arguments: Any, hidden_BTD: Tensor) -> Tensor:
        return between.all_of(hidden_BTD, _TOKENS, gradient="whole")

    distribute_whole(norm, between.axis)
    norm.register_forward_hook(all_tokens)


# ---------------------------------------------------------------------------------------------------- the parts of a block


def _cut_attention(attention: Attention, between: _Between) -> None:
    axis = between.axis
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        _by_columns(linear, axis)
    _by_rows(attention.o_proj, between)
    distribute(attention, axis, sinks=0)
    if attention.qk_norm == "head":
        for norm in (attention.q_norm, attention.k_norm):
            distribute_whole(norm, axis)
    elif attention.qk_norm == "full":
        for norm in (attention.q_norm, attention.k_norm):
            norm = cast(RMSNorm | LayerNorm, norm)
            norm.forward = partial(_norm_over_ranks, norm, axis, norm.weight.shape[0])  # type: ignore[method-assign]
            distribute(norm, axis, weight=0, bias=0)
    attention.register_forward_pre_hook(partial(_all_tokens, between))


def _cut_latent_attention(attention: LatentAttention, between: _Between) -> None:
    """By heads; the latents, which all heads share, are made on every rank."""
    axis = between.axis
    for name, part in attention.named_children():
        if name in ("q_proj", "q_b_proj", "kv_b_proj"):
            _by_columns(part, axis)
        elif name != "o_proj":
            distribute_whole(part, axis)
    _by_rows(attention.o_proj, between)
    attention.heads //= axis.size()
    attention.register_forward_pre_hook(partial(_all_tokens, between))


def _cut_delta_net(delta_net: GatedDeltaNet, between: _Between) -> None:
    """By key heads, whose rows lie together. The convolution has all queries, then all keys, then all values: a rank holds
    its kernels whole, which are small, and uses those of its heads."""
    axis = between.axis
    rank, ranks = axis.get_local_rank(), axis.size()
    _by_columns(delta_net.in_proj_qkvz, axis)
    _by_columns(delta_net.in_proj_ba, axis)
    _by_rows(delta_net.out_proj, between)
    distribute(delta_net, axis, dt_bias=0, A_log=0)
    distribute_whole(delta_net.norm, axis)
    keys, values = delta_net.key_heads * delta_net.key_dim, delta_net.value_heads * delta_net.value_dim
    channels = torch.arange(2 * keys + values, device=delta_net.conv1d.weight.device).split((keys, keys, values))
    distribute_whole(delta_net.conv1d, axis)
    see_rows(delta_net.conv1d, "weight", torch.cat([part.chunk(ranks)[rank] for part in channels]))
    delta_net.key_heads //= ranks
    delta_net.value_heads //= ranks
    delta_net.register_forward_pre_hook(partial(_all_tokens, between, narrow=False))  # it computes in the type it is given


def _cut_feed_forward(feed_forward: FeedForward, between: _Between) -> None:
    _cut_matrices(feed_forward, between)
    feed_forward.register_forward_pre_hook(partial(_all_tokens, between))


def _cut_matrices(feed_forward: FeedForward, between: _Between, *, summed: bool = True) -> None:
    if feed_forward.gate_proj is not None:
        _by_columns(feed_forward.gate_proj, between.axis)
    _by_columns(feed_forward.up_proj, between.axis)
    _by_rows(feed_forward.down_proj, between, summed=summed)


def _cut_sparse(sparse: SparseFeedForward, mesh: Mesh, between: _Between, config: ModelConfig) -> None:
    """The router works on a rank's tokens; its losses and figures are of all."""
    axis = between.axis
    distribute_whole(sparse.router, axis)
    in_losses = bool(config.router_aux_loss_coef or config.router_z_loss_coef)
    sparse.register_forward_hook(partial(_remember_all, axis, in_losses))
    if sparse.shared_expert_gate is not None:
        distribute_whole(sparse.shared_expert_gate, axis)
    if mesh.layout.expert > 1:
        if sparse.shared_expert is not None:
            _cut_feed_forward(sparse.shared_expert, between)
        return
    if sparse.shared_expert is not None:
        _cut_matrices(sparse.shared_expert, between, summed=False)
    sparse.visit = partial(_visit_on_ranks, sparse, between)  # type: ignore[method-assign]
    sparse.experts.forward = partial(visit_own, sparse.experts, axis)  # type: ignore[method-assign]
    sparse.experts.count //= axis.size()
    distribute(sparse.experts, axis, gate_up_proj=0, down_proj=0, gate_up_bias=0, down_bias=0)


def _by_columns(linear: nn.Module, axis: DeviceMesh) -> None:
    """Outputs are this rank's."""
    distribute(linear, axis, weight=0, bias=0)


def _by_rows(linear: nn.Module, between: _Between, *, summed: bool = True) -> None:
    """Inputs are this rank's; outputs the sum over ranks, as it lies between. summed: else they are left partial."""

    def add_up(linear: nn.Module, arguments: Any, partial_: Tensor) -> Tensor:
        bias = piece(linear, "bias")
        if not summed:
            return partial_ if bias is None else partial_ + bias / between.axis.size()
        out = between.summed(partial_, _TOKENS)
        return out if bias is None else out + bias

    distribute(linear, between.axis, weight=1, bias=None)
    hide(linear, "bias")  # added once, not by every rank
    linear.register_forward_hook(add_up)


# ----------------------------------------------------------------------------------------------- what they do on many ranks


def _all_tokens(between: _Between, part: nn.Module, arguments: tuple[Any, ...], narrow: bool = True) -> tuple[Any, ...]:
    """Of a part that works on its own heads or channels: all tokens, and what its heads may see. narrow: in the type of the
    products that read them, which they would have there anyway."""
    hidden, *others = arguments
    others = [_of_own_heads(other, between.axis) if isinstance(other, AttentionMask) else other for other in others]
    hidden = between.all_of(in_product_type(hidden) if narrow else hidden, _TOKENS, gradient="partial")
    return hidden, *others


def _of_own_heads(mask: AttentionMask, axis: DeviceMesh) -> AttentionMask:
    """ALiBi's slopes differ by head, and a mask with them."""
    if mask.slopes_H is None:
        return mask
    rank, ranks = axis.get_local_rank(), axis.size()
    dense = None if mask.dense is None else mask.dense.chunk(ranks, 1)[rank]
    return mask._replace(slopes_H=mask.slopes_H.chunk(ranks)[rank], dense=dense)


def _norm_over_ranks(norm: RMSNorm | LayerNorm, axis: DeviceMesh, width: int, hidden: Tensor) -> Tensor:
    """A norm over all heads' channels, of which a rank has some; `width` in all."""
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


def _embedded(embedding: nn.Module, between: _Between, tokens_BT: Tensor) -> Tensor:
    """This rank's tokens, embedded: each rank looks up what lies in its part of the vocabulary, and the sum is split."""
    axis = between.axis
    weight_VD = cast(DTensor, embedding.weight).to_local()
    own_BT = tokens_BT - axis.get_local_rank() * weight_VD.shape[0]
    elsewhere_BT = (own_BT < 0) | (own_BT >= weight_VD.shape[0])
    found_BTD = functional.embedding(own_BT.masked_fill(elsewhere_BT, 0), weight_VD)
    return between.summed(found_BTD.masked_fill(elsewhere_BT[..., None], 0.0), _TOKENS)


def _own_positions(axis: DeviceMesh, embedding: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    return (arguments[0].chunk(axis.size(), -1)[axis.get_local_rank()],)


def _all_logits(model: Decoder, axis: DeviceMesh, hidden: Tensor) -> Tensor:
    """`Decoder.logits`, the whole vocabulary's on every rank. The loss does without."""
    weight_VD = cast(DTensor, model.head_weight).to_local()
    own = functional.linear(share_out(hidden, axis), weight_VD)
    return capped(gather(own, axis, -1, gradient="whole"), model.logit_softcap)


def fill_up_vocabulary(model: Decoder, ranks: int) -> None:
    """Add rows of zeros to a whole decoder's embedding and head until they divide; `logits_on_the_first` leaves them out."""
    missing = -model.config.vocab_size % ranks
    for part in {model.embed_tokens, model.head} if missing else ():
        weight = cast(nn.Parameter, part.weight)
        filled = functional.pad(weight.detach(), (0, 0, 0, missing))
        part.weight = nn.Parameter(filled, requires_grad=weight.requires_grad)


def logits_on_the_first(model: Decoder, mesh: Mesh) -> None:
    """Let a decoder, whole or cut over the tensor axis, give logits on rank 0 alone; none, (…, 0), on the others."""
    model.logits = partial(_logits_on_the_first, model, mesh)  # type: ignore[method-assign]


def _logits_on_the_first(model: Decoder, mesh: Mesh, hidden: Tensor) -> Tensor:
    rank, ranks = mesh.rank, mesh.layout.tensor
    if rank >= ranks:  # copies of the model have what the first has
        return hidden[..., :0]
    if ranks == 1:
        return Decoder.logits(model, hidden)
    if not hidden.numel():
        return hidden.new_empty(*hidden.shape[:-1], model.config.vocab_size)
    own = functional.linear(hidden, cast(DTensor, model.head_weight).to_local())
    pieces = None if rank else [torch.empty_like(own) for _ in range(ranks)]
    dist.gather(own, pieces, dst=0, group=mesh.tensor.get_group())
    return (
        own[..., :0] if pieces is None else capped(torch.cat(pieces, -1)[..., : model.config.vocab_size], model.logit_softcap)
    )


def _remember_all(
    axis: DeviceMesh, in_losses: bool, sparse: SparseFeedForward, arguments: tuple[Tensor], out_BTD: Tensor
) -> None:
    """What the router remembers, of all tokens; logits only where they are part of a loss, since nothing else reads them."""
    router, rows = sparse.router, len(out_BTD)
    if router.last is None or not router.training:
        return

    def of_all(own_NX: Tensor) -> Tensor:
        return gather(own_NX.unflatten(0, (rows, -1)), axis, 1, gradient="whole").flatten(0, 1)

    logits_NE, experts_Nk = router.last
    router.last = (of_all(logits_NE) if in_losses else logits_NE, of_all(experts_Nk))


def _visit_on_ranks(sparse: SparseFeedForward, between: _Between, hidden_ND: Tensor, routing: Routing) -> Tensor:
    """`SparseFeedForward.visit` of this rank's tokens, each visit made on the rank of its expert."""
    hidden_ND = between.all_of(in_product_type(hidden_ND), 0, gradient="partial")
    experts_Nk = between.all_of(routing.experts_Nk, 0, gradient="whole")
    weights_Nk = between.all_of(routing.weights_Nk, 0, gradient="partial")
    out_ND = SparseFeedForward.visit(sparse, hidden_ND, Routing(experts_Nk, weights_Nk))
    return between.summed(out_ND, 0)
