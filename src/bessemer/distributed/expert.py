"""Expert parallelism (Lepikhin et al. 2021): each rank of an axis holds some of the experts, and tokens are dispatched to the
ranks of their experts.

In training each rank has its own tokens. It sends every visit, a token at one of its experts, to the rank of that expert,
computes the visits that arrive, and sends them back: two uneven all-to-alls forward, two backward. No token is dropped or
padded.

In inference all ranks have the same tokens and send none: each computes the visits of its own experts, and an all-reduce adds
them up.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from bessemer.distributed.collectives import all_reduce, all_to_all, to_autocast_dtype
from bessemer.distributed.mesh import Mesh
from bessemer.distributed.sharding import shard_parameters
from bessemer.model.layers.feed_forward import ExpertBackend, Experts, ExpertWeights, Gate, Routing

# Shapes: D hidden, E experts of this rank, R ranks of the axis, V visits that this rank asks for, A visits that arrive here,
# N tokens, k experts of a token, M visits to this rank's experts.


def apply_expert_parallel(model: nn.Module, mesh: Mesh) -> None:
    """Shard the experts of a model, or of a stage of it, over the mesh's expert axis, in place; their parameters become
    DTensors of that axis, names stay."""
    axis = mesh.experts
    for experts in [module for module in model.modules() if isinstance(module, Experts)]:
        _shard_experts(experts, axis)
        experts.backend = partial(dispatch_visits, experts.backend, axis)


def apply_expert_parallel_for_inference(model: nn.Module, mesh: Mesh) -> None:
    """`apply_expert_parallel` for ranks that have the same tokens, without gradients."""
    axis = mesh.experts
    for experts in [module for module in model.modules() if isinstance(module, Experts)]:
        _shard_experts(experts, axis)
        experts.count //= axis.size()
        experts.forward = partial(_visit_local_and_sum, experts, axis)  # type: ignore[method-assign]


def _shard_experts(experts: Experts, axis: DeviceMesh) -> None:
    shard_parameters(experts, axis, gate_up_proj=0, down_proj=0, gate_up_bias=0, down_bias=0)


def _visit_local_and_sum(experts: Experts, axis: DeviceMesh, hidden_ND: Tensor, routing: Routing) -> Tensor:
    return all_reduce(visit_local_experts(experts, axis, hidden_ND, routing), axis)


# not compiled: the number of visits differs from step to step
@torch.compiler.disable
def visit_local_experts(experts: Experts, axis: DeviceMesh, hidden_ND: Tensor, routing: Routing) -> Tensor:
    """`Experts.forward` restricted to this rank's `experts.count` experts; zero for tokens that visit none of them."""
    own_Nk = routing.experts_Nk - axis.get_local_rank() * experts.count
    tokens_M, places_M = ((own_Nk >= 0) & (own_Nk < experts.count)).nonzero(as_tuple=True)
    visits = Routing(own_Nk[tokens_M, places_M, None], routing.weights_Nk[tokens_M, places_M, None])
    out_MD = Experts.forward(experts, hidden_ND[tokens_M], visits)
    return out_MD.new_zeros(hidden_ND.shape).index_add(0, tokens_M, out_MD)


# not compiled: the number of arriving visits differs from step to step
@torch.compiler.disable
def dispatch_visits(
    inner: ExpertBackend, axis: DeviceMesh, visits_VD: Tensor, sizes: Tensor, weights: ExpertWeights, gate: Gate
) -> Tensor:
    """Outputs of all ranks' experts for this rank's visits, (V, D), `sizes` of each expert; every rank of the axis calls this.

    weights: of this rank's experts, which `inner` applies to the arriving visits.
    """
    sizes_RE = sizes.view(axis.size(), -1)
    arriving_RE = torch.empty_like(sizes_RE)
    dist.all_to_all_single(arriving_RE, sizes_RE.contiguous(), group=axis.get_group())
    sent, received = torch.stack((sizes_RE.sum(1), arriving_RE.sum(1))).tolist()
    arrived_AD = all_to_all(to_autocast_dtype(visits_VD), axis, sent, received)
    # arriving visits are ordered by rank, then by expert
    expert_A = torch.arange(arriving_RE.shape[1], device=sizes.device).repeat(axis.size())
    expert_A = expert_A.repeat_interleave(arriving_RE.flatten(), output_size=len(arrived_AD))
    by_expert_A = expert_A.argsort(stable=True)
    output_AD = inner(arrived_AD[by_expert_A], arriving_RE.sum(0), weights, gate)
    return all_to_all(torch.empty_like(output_AD).index_copy(0, by_expert_A, output_AD), axis, received, sent)
