"""Experts in training: the losses that spread the tokens over them, the bias that does it without a loss, and figures.

Shapes: L layers, B rows, T tokens of a row, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.distributed.stages import Stage
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.router import Router, balance_loss, router_z_loss, update_correction_bias, visits, visits_by_row
from bessemer.training.data.batches import IGNORED


def has_router_losses(config: ModelConfig) -> bool:
    """Whether routing adds to a model's loss."""
    return bool(config.num_experts and (config.router_aux_loss_coef or config.router_z_loss_coef))


def router_losses(model: Decoder, targets_BT: Tensor) -> Tensor | float:
    """What the last forward's routing adds to the loss: the weighted means over the sparse layers of the load-balancing loss
    and of the z-loss; 0 for a dense model. In a stage of a pipeline, with the share of the layers before it.

    Means over the tokens that have a target, as cross-entropy is, and balance within each row: so they are the same however
    a batch is cut, into micro-batches, over processes, or between the processes that share a row.
    """
    config = model.config
    total: Tensor | float = model.earlier_losses if isinstance(model, Stage) else 0.0
    found = [router.last for router in routers(model).values() if router.last is not None] if has_router_losses(config) else []
    if not found:
        return total
    counted_BT = targets_BT != IGNORED
    choices = [experts_Nk.unflatten(0, counted_BT.shape) for _, experts_Nk in found]
    visits_LBE = model.rows.total(torch.stack([visits_by_row(each, counted_BT, config.num_experts) for each in choices]))
    balance, z = config.router_aux_loss_coef / sparse_layers(config), config.router_z_loss_coef / sparse_layers(config)
    for (logits_NE, _), visits_BE in zip(found, visits_LBE, strict=True):
        logits_BTE = logits_NE.unflatten(0, counted_BT.shape)
        total = total + balance * balance_loss(logits_BTE, visits_BE, counted_BT) + z * router_z_loss(logits_BTE, counted_BT)
    return total


def sparse_layers(config: ModelConfig) -> int:
    """Layers with experts, those of the blocks that predict further ahead included, which are made as the last one is."""
    layers = [*range(config.num_hidden_layers), *[config.num_hidden_layers - 1] * config.num_nextn_predict_layers]
    return sum(config.is_sparse(layer) for layer in layers)


def routers(model: Decoder) -> dict[int, Router]:
    """The routers of a model, or of a part of it, by the number of their layer in the whole; the blocks that predict further
    ahead are counted after the last layer. None in a dense model."""
    found = {}
    for name, module in model.named_modules() if model.config.num_experts else ():
        if isinstance(module, Router):
            kind, number = name.split(".")[:2]
            found[int(number) + (model.config.num_hidden_layers if kind == "mtp" else 0)] = module
    return found


@torch.no_grad()
def visits_by_layer(model: Decoder) -> Tensor:
    """How many tokens visited each expert of each layer in the last forward in training, (L, E) int64; zero for layers that
    have no experts or are not here."""
    config = model.config
    found = {layer: router.last[1] for layer, router in routers(model).items() if router.last is not None}
    device = next((experts_Nk.device for experts_Nk in found.values()), None)
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    visits_LE = torch.zeros(layers, config.num_experts, dtype=torch.int64, device=device)
    for layer, experts_Nk in found.items():
        visits_LE[layer] = visits(experts_Nk, config.num_experts)
    return visits_LE


@torch.no_grad()
def balance_experts(model: Decoder, visits_LE: Tensor) -> None:
    """After an optimizer step: move the correction biases towards an even load, where the model's settings ask for it.

    visits_LE: those of the whole step, over all its micro-batches and processes.
    """
    rate = model.config.router_bias_update_rate
    for layer, router in routers(model).items() if rate else ():
        update_correction_bias(router, visits_LE[layer], rate)


def routing_figures(visits_LE: Tensor) -> dict[str, float]:
    """Of a step's visits: the load of the busiest and of the idlest expert over an even one's, and the share of experts
    that nobody visited; means over the sparse layers. Empty for a dense model."""
    visits_LE = visits_LE[visits_LE.sum(1) > 0].double()
    if not visits_LE.numel():
        return {}
    loads_LE = visits_LE / visits_LE.mean(1, keepdim=True)
    return {
        "expert_load_max": round(loads_LE.amax(1).mean().item(), 4),
        "expert_load_min": round(loads_LE.amin(1).mean().item(), 4),
        "experts_idle": round((loads_LE == 0).double().mean().item(), 4),
    }
