"""Experts in training: the losses that spread the tokens over them, the bias that does it without a loss, and figures."""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.distributed.stages import Stage
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.router import Router, balance_loss, load, router_z_loss, update_correction_bias


def routers(model: Decoder) -> list[Router]:
    """The routers of a model's sparse layers, in order; none in a dense model."""
    if not model.config.num_experts:
        return []
    return [module for module in model.modules() if isinstance(module, Router)]


def has_router_losses(config: ModelConfig) -> bool:
    """Whether routing adds to a model's loss."""
    return bool(config.num_experts and (config.router_aux_loss_coef or config.router_z_loss_coef))


def router_losses(model: Decoder) -> Tensor | float:
    """What the last forward's routing adds to the loss: the weighted means over layers of the load-balancing loss and of
    the z-loss; 0 for a dense model. In a stage of a pipeline, with the share of the layers before it."""
    config, total = model.config, model.earlier_losses if isinstance(model, Stage) else 0.0
    if not has_router_losses(config):
        return total
    layers = [*range(config.num_hidden_layers), *[config.num_hidden_layers - 1] * config.num_nextn_predict_layers]
    sparse = sum(config.is_sparse(layer) for layer in layers)
    balance, z = config.router_aux_loss_coef, config.router_z_loss_coef
    for logits_NE, experts_Nk in (router.last for router in routers(model) if router.last is not None):
        total = total + (balance * balance_loss(logits_NE, experts_Nk) + z * router_z_loss(logits_NE)) / sparse
    return total


@torch.no_grad()
def balance_experts(model: Decoder) -> None:
    """After an optimizer step: move the correction biases towards an even load, where the model's settings ask for it."""
    rate = model.config.router_bias_update_rate
    for router in routers(model) if rate else []:
        if router.last is not None:
            visits_E = load(router.last[1], model.config.num_experts) * router.last[1].numel()
            update_correction_bias(router, visits_E, rate)


@torch.no_grad()
def routing_figures(model: Decoder) -> dict[str, float]:
    """Of the last forward: the load of the busiest and of the idlest expert over an even one's, and the share of experts
    that nobody visited; means over the sparse layers. Empty for a dense model."""
    loads = [load(router.last[1], model.config.num_experts) for router in routers(model) if router.last is not None]
    if not loads:
        return {}
    loads_LE = torch.stack(loads) * model.config.num_experts
    return {
        "expert_load_max": round(loads_LE.amax(1).mean().item(), 4),
        "expert_load_min": round(loads_LE.amin(1).mean().item(), 4),
        "experts_idle": round((loads_LE == 0).float().mean().item(), 4),
    }
