import pytest
import torch

from bessemer.model.config import ModelConfig
from bessemer.model.layers.feed_forward import (
    SparseFeedForward,
    balance_loss,
    grouped,
    one_by_one,
    router_z_loss,
    update_correction_bias,
    visits,
    visits_by_row,
)


def layer(**settings):
    config = ModelConfig(
        vocab_size=9,
        hidden_size=16,
        **{"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8, **settings},
    )
    made = SparseFeedForward(config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3, generator=draw)
    return made


VARIANTS = [
    {},
    {"norm_topk_prob": False},
    {"expert_bias": True, "router_bias": True, "swiglu_limit": 0.5},
    {"scoring_func": "sigmoid", "router_correction_bias": True, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5},
    {"shared_expert_intermediate_size": 12, "shared_expert_gate": True},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_grouped_experts_equal_one_after_the_other_gradients_included(settings):
    made = layer(**settings)
    hidden = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(2))
    results = []
    for backend in (grouped, one_by_one):
        made.experts.backend = backend
        made.zero_grad()
        inputs = hidden.clone().requires_grad_()
        out = made(inputs)
        (out * torch.arange(16)).sum().backward()
        results.append([out, inputs.grad, *(parameter.grad for parameter in made.parameters())])
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).abs().max() < 1e-4


def test_no_token_is_dropped_when_all_choose_the_same_expert():
    made = layer(num_experts_per_tok=1)
    with torch.no_grad():
        made.router.weight.zero_()
        made.router.weight[4] = 5.0
    hidden = torch.rand(50, 16) + 0.1  # all prefer expert 4
    made.train()
    out = made(hidden[None])[0]
    assert made.router.last is not None and visits(made.router.last[1], 6).tolist() == [0, 0, 0, 0, 50, 0]
    assert (out.abs().sum(-1) > 0).all()


def test_an_expert_without_tokens_has_no_gradient_and_breaks_nothing():
    made = layer(num_experts_per_tok=1)
    made(torch.randn(1, 1, 16)).sum().backward()
    assert made.experts.down_proj.grad is not None
    assert (made.experts.down_proj.grad.abs().sum((1, 2)) > 0).sum() == 1


def test_the_correction_bias_steers_the_choice_and_not_the_weights():
    made = layer(scoring_func="sigmoid", router_correction_bias=True, norm_topk_prob=False)
    hidden = torch.randn(40, 16, generator=torch.Generator().manual_seed(3))
    made.router.correction_bias[2] = 100.0
    experts, weights = made.router(hidden)
    assert (experts == 2).any(1).all()
    scores = (hidden @ made.router.weight.T).sigmoid().gather(1, experts)
    assert torch.allclose(weights, scores)


def test_a_token_chooses_only_within_its_best_groups():
    made = layer(scoring_func="sigmoid", router_correction_bias=True, n_group=3, topk_group=1)
    experts, _ = made.router(torch.randn(40, 16))
    assert (experts // 2 == experts[:, :1] // 2).all()


def test_the_balance_loss_is_1_when_even_and_largest_when_all_go_to_one():
    even = torch.zeros(60, 6)
    turns = torch.arange(60)[:, None] % 6
    assert balance_of_row(even, turns).item() == pytest.approx(1.0)
    one = torch.full((60, 6), -20.0).index_fill(1, torch.tensor([3]), 20.0)
    assert balance_of_row(one, torch.full((60, 1), 3)).item() == pytest.approx(6.0)


def test_balance_is_within_each_row_and_of_the_tokens_that_count():
    """One row all to expert 0, one all to expert 1: even over the batch, uneven in each; tokens that do not count are even."""
    logits = torch.full((2, 4, 2), -20.0)
    logits[0, :, 0] = logits[1, :, 1] = 20.0
    logits[:, 3] = 0.0
    experts = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 0]])[..., None]
    counted = torch.tensor([[True, True, True, False]] * 2)
    visits_BE = visits_by_row(experts, counted, 2)
    assert visits_BE.tolist() == [[3, 0], [0, 3]]
    assert balance_loss(logits, visits_BE, counted).item() == pytest.approx(2.0)


def balance_of_row(logits_NE, experts_Nk):
    """The loss of one row all of whose tokens count."""
    counted_BT = torch.ones(1, len(logits_NE), dtype=torch.bool)
    return balance_loss(logits_NE[None], visits_by_row(experts_Nk[None], counted_BT, logits_NE.shape[1]), counted_BT)


def test_the_z_loss_by_hand():
    assert router_z_loss(torch.zeros(1, 4, 8), torch.ones(1, 4)).item() == pytest.approx(
        torch.tensor(8.0).log().square().item()
    )


def test_the_bias_moves_up_for_idle_experts_and_down_for_busy_ones():
    made = layer(router_correction_bias=True)
    update_correction_bias(made.router, torch.tensor([9, 1, 5, 5, 5, 5]), 0.1)
    assert made.router.correction_bias.tolist() == pytest.approx([-0.1, 0.1, 0, 0, 0, 0])


@pytest.mark.parametrize("method", ["loss", "bias"])
def test_both_methods_even_the_load_in_a_short_training(method):
    """Tokens that all prefer two experts; after training the busiest expert has lost most of its surplus."""
    made = layer(router_correction_bias=method == "bias", scoring_func="sigmoid" if method == "bias" else "softmax")
    hidden = torch.randn(400, 16, generator=torch.Generator().manual_seed(4)) + 1.0
    made.train()
    with torch.no_grad():
        made.router.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(5))
        made.router.weight[:2] += 0.1
    optimizer = torch.optim.Adam([made.router.weight], lr=0.02)
    busiest = []
    for _ in range(120):
        made.router(hidden)
        logits, experts = made.router.last
        busiest.append(visits(experts, 6).max().item() / experts.numel())
        if method == "loss":
            optimizer.zero_grad()
            balance_of_row(logits, experts).backward()
            optimizer.step()
        else:
            update_correction_bias(made.router, experts.flatten().bincount(minlength=6), 0.01)
    assert busiest[0] > 0.35
    assert busiest[-1] < 0.22  # even is 1/6
