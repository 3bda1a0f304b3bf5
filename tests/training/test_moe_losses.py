from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.objectives import next_token_loss
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.routing import balance_experts, router_losses, routing_metrics, visits_by_layer
from bessemer.training.runtime import Runtime
from bessemer.training.trainer import Trainer

SPARSE = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=40,
    num_experts=4,
    moe_intermediate_size=16,
    router_aux_loss_coef=0.01,
    router_z_loss_coef=0.001,
    router_correction_bias=True,
    router_bias_update_rate=0.01,
)


def batch(seed=0):
    tokens_BT = torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:])


def test_router_losses_are_added_and_reach_the_router():
    model = initial_decoder(SPARSE, 1).train()
    loss = next_token_loss(model, batch())
    plain = functional.cross_entropy(model(batch().tokens_BT).flatten(0, 1), batch().targets_BT.flatten())
    assert loss.item() == pytest.approx(plain.item() + float(router_losses(model, batch().targets_BT)), abs=1e-5)
    loss.backward()
    assert all(block.mlp.router.weight.grad.abs().sum() > 0 for block in model.blocks)


def test_a_step_moves_the_biases_of_all_routers_once():
    model = initial_decoder(SPARSE, 1).train()
    next_token_loss(model, batch())
    balance_experts(model, visits_by_layer(model))
    for block in model.blocks:
        moved = block.mlp.router.correction_bias.abs()
        assert moved.sum() > 0
        assert torch.allclose(moved[moved > 0], torch.tensor(0.01))


def test_routing_is_described():
    model = initial_decoder(SPARSE, 1).train()
    assert routing_metrics(visits_by_layer(model)) == {}
    next_token_loss(model, batch())
    figures = routing_metrics(visits_by_layer(model))
    assert figures["expert_load_min"] <= 1 <= figures["expert_load_max"]


def test_visits_are_those_of_all_micro_batches_of_a_step():
    model = initial_decoder(SPARSE, 1).train()
    config = PretrainConfig(dtype="float32", compile=False, steps=1)
    options = {"gradient_clip": 1.0, "micro_batch_size": 1}
    trainer = Trainer(model, [], next_token_loss, Runtime.of(config, torch.device("cpu")), **options)
    expected_LE = torch.zeros(2, 4)
    for row in range(2):
        next_token_loss(model, batch().rows(slice(row, row + 1)))
        expected_LE += visits_by_layer(model)
    for _ in range(2):
        trainer.gradients(batch())
        assert torch.equal(trainer.visits_LE.float(), expected_LE)
    assert expected_LE.sum(1).tolist() == [2 * 2 * 16] * 2
    # with a routing the autograd graph of its logits would stay, which holds FSDP's state of the model
    assert all(block.mlp.router.last is None for block in model.blocks)


def test_router_losses_of_a_batch_are_those_of_its_rows_weighed_by_their_targets():
    model, targets_BT = initial_decoder(SPARSE, 1).double().train(), batch().targets_BT.clone()
    targets_BT[0, :11] = IGNORE_INDEX
    whole = replace(batch(), targets_BT=targets_BT)
    model.hidden(whole.tokens_BT)
    together = float(router_losses(model, whole.targets_BT))
    apart = 0.0
    for row, share in ((0, 5 / 21), (1, 16 / 21)):
        part = whole.rows(slice(row, row + 1))
        model.hidden(part.tokens_BT)
        apart += share * float(router_losses(model, part.targets_BT))
    assert together == pytest.approx(apart, rel=1e-12)


def test_a_dense_model_has_no_routing():
    model = initial_decoder(ModelConfig(vocab_size=50), 1)
    assert router_losses(model, batch().targets_BT) == 0.0 and routing_metrics(visits_by_layer(model)) == {}


@pytest.mark.slow
def test_a_sparse_model_trains_in_compiled_blocks_in_bfloat16():
    model = initial_decoder(SPARSE, 1).train()
    for block in model.blocks:
        block.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = next_token_loss(model, batch())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
