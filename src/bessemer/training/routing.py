"""Mixtures of experts in training: load-balancing and router z-losses, the balancing bias, and load metrics.

Shapes: B rows, T time, L layers, E experts, N tokens, k experts of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.distributed.stages import DecoderStage
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.device import in_float64
from bessemer.model.layers.feed_forward import (
    Router,
    balance_loss,
    router_z_loss,
    update_correction_bias,
    visits,
    visits_by_row,
)
from bessemer.training.data.batch import IGNORE_INDEX


def has_router_losses(config: ModelConfig) -> bool:
    """Whether a model has router losses."""
    return bool(config.num_experts and (config.router_aux_loss_coef or config.router_z_loss_coef))


def router_losses(model: Decoder, targets_BT: Tensor) -> Tensor | float:
    """Router losses of the last forward pass: the weighted means over the sparse layers of the load-balancing loss and the
    z-loss; 0 for a dense model. In a pipeline stage, with those of the layers before it.

    Both are means over the tokens that have a target, as cross-entropy is, and load is balanced within each row: so they do not
    depend on how a batch is split into micro-batches, over processes, or over the ranks that share a row.
    """
    config = model.config
    total: Tensor | float = model.earlier_losses if isinstance(model, DecoderStage) else 0.0
    if not has_router_losses(config):
        return total
    routings = [router.last for router in routers(model).values() if router.last is not None]
    if not routings:
        return total
    counted_BT = targets_BT != IGNORE_INDEX
    choices = [experts_Nk.unflatten(0, counted_BT.shape) for _, experts_Nk in routings]
    visits_LBE = model.rows.total(torch.stack([visits_by_row(each, counted_BT, config.num_experts) for each in choices]))
    balance, z = config.router_aux_loss_coef / sparse_layers(config), config.router_z_loss_coef / sparse_layers(config)
    for (logits_NE, _), visits_BE in zip(routings, visits_LBE, strict=True):
        logits_BTE = logits_NE.unflatten(0, counted_BT.shape)
        total = total + balance * balance_loss(logits_BTE, visits_BE, counted_BT) + z * router_z_loss(logits_BTE, counted_BT)
    return total


def sparse_layers(config: ModelConfig) -> int:
    """Number of layers with experts, multi-token prediction blocks included, which are built as the last layer is."""
    layers = [*range(config.num_hidden_layers), *[config.num_hidden_layers - 1] * config.num_nextn_predict_layers]
    return sum(config.is_sparse(layer) for layer in layers)


def routers(model: Decoder) -> dict[int, Router]:
    """The routers of a model, or of a part of it, by the number of their layer in the whole; multi-token prediction blocks are
    counted after the last layer. Empty for a dense model."""
    by_layer = {}
    for name, module in model.named_modules() if model.config.num_experts else ():
        if isinstance(module, Router):
            kind, number = name.split(".")[:2]
            by_layer[int(number) + (model.config.num_hidden_layers if kind == "mtp" else 0)] = module
    return by_layer


@torch.no_grad()
def visits_by_layer(model: Decoder) -> Tensor:
    """Tokens routed to each expert of each layer in the last forward pass in training, (L, E) int64; zero for layers without
    experts and layers of other ranks."""
    config = model.config
    routings = {layer: router.last[1] for layer, router in routers(model).items() if router.last is not None}
    device = next((experts_Nk.device for experts_Nk in routings.values()), None)
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    visits_LE = torch.zeros(layers, config.num_experts, dtype=torch.int64, device=device)
    for layer, experts_Nk in routings.items():
        visits_LE[layer] = visits(experts_Nk, config.num_experts)
    return visits_LE


def forget_routings(model: Decoder) -> None:
    """Forget the routings of the last forward pass, once its losses and metrics are made.

    Their autograd graph holds what FSDP knows of the model, and the model holds them: neither would ever be freed.
    """
    for router in routers(model).values():
        router.last = None


@torch.no_grad()
def balance_experts(model: Decoder, visits_LE: Tensor) -> None:
    """Move the correction biases of routers that are trained towards an even load after an optimizer step, where the model's
    settings ask for it.

    visits_LE: tokens routed in the whole step, over all its micro-batches and processes.
    """
    rate = model.config.router_bias_update_rate
    for layer, router in routers(model).items() if rate else ():
        if any(parameter.requires_grad for parameter in router.parameters()):
            update_correction_bias(router, visits_LE[layer], rate)


def routing_metrics(visits_LE: Tensor) -> dict[str, float]:
    """Load metrics of a step: the largest and the smallest expert load over an even one, and the fraction of experts without a
    token; means over the sparse layers. Empty for a dense model."""
    visits_LE = in_float64(visits_LE[visits_LE.sum(1) > 0])
    if not visits_LE.numel():
        return {}
    loads_LE = visits_LE / visits_LE.mean(1, keepdim=True)
    return {
        "expert_load_max": round(loads_LE.amax(1).mean().item(), 4),
        "expert_load_min": round(loads_LE.amin(1).mean().item(), 4),
        "experts_idle": round((loads_LE == 0).double().mean().item(), 4),
    }
