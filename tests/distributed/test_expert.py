"""Ranks that share the experts of every layer compute what one process computes."""

import gc

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from bessemer.core.errors import ConfigError
from bessemer.distributed.expert import dispatch_visits
from bessemer.distributed.layout import Layout
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.layers.feed_forward import ExpertWeights, one_by_one
from tests.cases import slow

from .parity import TWO_LAYERS, assert_equal, trained
from .test_resume import assert_same_end, run

EXACT = 1e-9
SPARSE = TWO_LAYERS | {
    "num_experts": 4,
    "moe_intermediate_size": 12,
    "router_aux_loss_coef": 0.1,
    "router_z_loss_coef": 0.05,
    "router_correction_bias": True,
    "router_bias_update_rate": 0.02,
    "first_k_dense_replace": 1,
}
GPT_OSS = TWO_LAYERS | {
    "num_experts": 4,
    "moe_intermediate_size": 12,
    "expert_bias": True,
    "router_bias": True,
    "swiglu_limit": 0.5,
    "shared_expert_intermediate_size": 10,
    "shared_expert_gate": True,
}


@pytest.mark.parametrize(
    "options",
    [
        {"settings": {"micro_batch_size": 3}},
        {"model": GPT_OSS, "packed": True, "settings": {"activation_checkpointing": "selective"}},
        slow({"settings": {"optimizer": "muon", "activation_checkpointing": "full"}}),
    ],
    ids=["micro-batches", "biases", "muon"],
)
def test_two_ranks_are_one(two, alone, options):
    options = {"model": SPARSE} | options
    assert_equal(two.run(trained, parallel={"expert": 2}, **options)[0], alone(**options), EXACT)


@pytest.mark.parametrize(
    "parallel",
    [
        slow({"expert": 2, "tensor": 2}),
        slow({"expert": 2}),
        slow({"expert": 4}),
        slow({"expert": 2, "data_replicate": 2}),
        slow({"expert": 2, "context": 2}),
        slow({"expert": 2, "pipeline": 2}),
    ],
    ids=str,
)
def test_four_ranks_are_one(four, alone, parallel):
    assert_equal(four.run(trained, parallel=parallel, model=SPARSE)[0], alone(model=SPARSE), EXACT)


def decoders_here() -> int:
    return sum(isinstance(each, Decoder) for each in gc.get_objects())


def test_a_sharded_model_is_freed_after_its_training(four):
    # a routing or an output that is kept would hold it by the autograd graph, where Python sees no cycle
    four.run(trained, parallel={"data_shard": 2, "pipeline": 2}, model=SPARSE)
    assert four.run(decoders_here) == [0, 0, 0, 0]


@pytest.mark.parametrize("optimizer", ["adamw", slow("muon")])
def test_fewer_experts_than_ranks_that_share_them(four, alone, optimizer):
    """Each pair of ranks has one expert, which FSDP cannot cut between experts."""
    options = {"model": SPARSE | {"num_experts": 2}, "settings": {"optimizer": optimizer}}
    assert_equal(four.run(trained, parallel={"expert": 2}, **options)[0], alone(**options), EXACT)


@pytest.mark.parametrize("parallel", [{"data_shard": 2}, slow({"tensor": 2})], ids=str)
def test_without_the_axis_balance_is_the_same_on_every_layout_too(two, alone, parallel):
    assert_equal(two.run(trained, parallel=parallel, model=SPARSE)[0], alone(model=SPARSE), EXACT)


def visited(choices=None):
    """What four experts make of 12 visits by each of two processes, and the gradients: `choices`, which experts each asks for;
    by this process alone without."""
    draw = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()

    visits, weights = random(2, 12, 6), ExpertWeights(random(4, 10, 6), random(4, 6, 5), random(4, 10), random(4, 6))
    everyone = torch.tensor(choices).sort().values
    if not torch.distributed.is_initialized():
        outs = [one_by_one(visits[rank], everyone[rank].bincount(minlength=4), weights, half) for rank in range(2)]
        torch.stack(outs).cos().sum().backward()
        return [torch.stack(outs).detach(), visits.grad, *(weight.grad for weight in weights)]
    axis, rank = init_device_mesh("cpu", (2,)), torch.distributed.get_rank()
    held = ExpertWeights(*(weight[2 * rank : 2 * rank + 2] for weight in weights))
    out = dispatch_visits(one_by_one, axis, visits[rank], everyone[rank].bincount(minlength=4), held, half)
    out.cos().sum().backward()
    return [out.detach(), visits.grad[rank], *(weight.grad[2 * rank : 2 * rank + 2] for weight in weights)]


def half(inner):
    return inner[..., :5] * inner[..., 5:].sigmoid()


@pytest.mark.parametrize(
    "choices",
    [[[0, 1, 2, 3] * 3, [3, 3, 3, 1] * 3], [[0] * 12, [1] * 12], [[3] * 12, [0] * 12]],
    ids=["uneven", "all to one rank", "all to the other"],
)
def test_every_visit_is_made_and_comes_back(two, choices):
    whole = visited(choices)
    found = two.run(visited, choices=choices)
    for number, expected in enumerate(whole):
        parts = [tensors[number] for tensors in found]
        together = torch.stack(parts) if number < 2 else torch.cat(parts)
        torch.testing.assert_close(together, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_ranks_that_share_experts(two, four, tmp_path):
    options = {"model": SPARSE, "ema": 0.9}
    expected = run(tmp_path / "whole", **options)
    out = tmp_path / "moved"
    assert four.run(run, out=out, parallel={"expert": 2}, stop_after=1, **options)[0] == "stopped"
    assert two.run(run, out=out, parallel={"expert": 2}, stop_after=2, **options)[0] == "stopped"
    assert run(out, **options) == pytest.approx(expected, rel=EXACT)
    assert_same_end(out, tmp_path / "whole")


@pytest.mark.parametrize(
    ("layout", "changes", "named"),
    [
        ({"data_shard": 2, "expert": 2}, {"num_experts": 0}, "no experts"),
        ({"data_shard": 3, "expert": 3}, {}, "expert 3 does not divide num_experts 4"),
        ({"data_shard": 2, "expert": 2, "tensor": 4}, {}, "expert × tensor 8 does not divide num_experts 4"),
        ({"data_shard": 10, "expert": 2}, {}, "data_shard × context / expert 5 does not divide hidden_size 32"),
    ],
    ids=["dense", "experts", "tensor", "shards"],
)
def test_what_cannot_be_cut_is_refused(layout, changes, named):
    with pytest.raises(ConfigError, match=named):
        Layout(**layout).check(ModelConfig(**(SPARSE | {"num_attention_heads": 4, "num_key_value_heads": 4} | changes)), 16)
