"""Expert parallelism (Lepikhin et al. 2021): each rank of an axis holds some of the experts, and tokens travel to those that
they chose.

The ranks have other tokens each. A rank sends every visit to the rank of its expert, makes the visits that came, and sends them
back: two all-to-alls of uneven parts forward, two backward. No token is dropped, and nothing is padded.

Ranks that all have the same tokens, as those that serve a model together, send none: each makes the visits to its own experts,
and the sum over the ranks is everybody's.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from bessemer.distributed.differentiable import all_reduce, exchange, in_product_type
from bessemer.distributed.mesh import Mesh
from bessemer.distributed.pieces import distribute
from bessemer.model.experts import ExpertBackend, Experts, ExpertWeights, Gate
from bessemer.model.router import Routing

# Shapes: D hidden, E experts of this rank, R ranks of the axis, V visits that this rank asks for, A visits that arrive here,
# N tokens, k experts of a token, M visits to this rank's experts.


def share_experts(model: nn.Module, mesh: Mesh) -> None:
    """Deal the experts of a model, or of a stage of it, out over the mesh's expert axis, in place; their parameters become
    DTensors of that axis, names stay."""
    axis = mesh.experts
    for experts in [module for module in model.modules() if isinstance(module, Experts)]:
        _deal_out(experts, axis)
        experts.backend = partial(visit_everywhere, experts.backend, axis)


def share_experts_of_all(model: nn.Module, mesh: Mesh) -> None:
    """`share_experts` where all ranks have the same tokens, to compute without gradients."""
    axis = mesh.experts
    for experts in [module for module in model.modules() if isinstance(module, Experts)]:
        _deal_out(experts, axis)
        experts.count //= axis.size()
        experts.forward = partial(_visit_and_sum, experts, axis)  # type: ignore[method-assign]


def _deal_out(experts: Experts, axis: DeviceMesh) -> None:
    distribute(experts, axis, gate_up_proj=0, down_proj=0, gate_up_bias=0, down_bias=0)


def _visit_and_sum(experts: Experts, axis: DeviceMesh, hidden_ND: Tensor, routing: Routing) -> Tensor:
    return all_reduce(visit_own(experts, axis, hidden_ND, routing), axis)


@torch.compiler.disable  # how many visits there are differs from step to step
def visit_own(experts: Experts, axis: DeviceMesh, hidden_ND: Tensor, routing: Routing) -> Tensor:
    """`Experts.forward`, of all tokens' visits to this rank's experts, `experts.count` of them; the rest is zero."""
    own_Nk = routing.experts_Nk - axis.get_local_rank() * experts.count
    tokens_M, places_M = ((own_Nk >= 0) & (own_Nk < experts.count)).nonzero(as_tuple=True)
    visits = Routing(own_Nk[tokens_M, places_M, None], routing.weights_Nk[tokens_M, places_M, None])
    out_MD = Experts.forward(experts, hidden_ND[tokens_M], visits)
    return out_MD.new_zeros(hidden_ND.shape).index_add(0, tokens_M, out_MD)


@torch.compiler.disable  # how many visits arrive differs from step to step
def visit_everywhere(
    inner: ExpertBackend, axis: DeviceMesh, visits_VD: Tensor, sizes: Tensor, weights: ExpertWeights, gate: Gate
) -> Tensor:
    """What all ranks' experts make of this rank's visits, (V, D), `sizes` of each expert; every rank of the axis calls this.

    weights: of this rank's experts, which `inner` applies to the visits that arrive.
    """
    sizes_RE = sizes.view(axis.size(), -1)
    arriving_RE = torch.empty_like(sizes_RE)
    dist.all_to_all_single(arriving_RE, sizes_RE.contiguous(), group=axis.get_group())
    sent, received = torch.stack((sizes_RE.sum(1), arriving_RE.sum(1))).tolist()
    arrived_AD = exchange(in_product_type(visits_VD), axis, sent, received)
    # they come rank by rank, and of each rank expert by expert
    expert_A = torch.arange(arriving_RE.shape[1], device=sizes.device).repeat(axis.size())
    expert_A = expert_A.repeat_interleave(arriving_RE.flatten(), output_size=len(arrived_AD))
    by_expert_A = expert_A.argsort(stable=True)
    made_AD = inner(arrived_AD[by_expert_A], arriving_RE.sum(0), weights, gate)
    return exchange(torch.empty_like(made_AD).index_copy(0, by_expert_A, made_AD), axis, received, sent)
