"""Ranks that share the tokens of a row compute what one process computes, by either method."""

from itertools import product
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bessemer.core.errors import ConfigError
from bessemer.distributed import context as ring
from bessemer.distributed import fused_ring
from bessemer.distributed.context import ContextParallelRows
from bessemer.distributed.layout import Layout, ParallelConfig
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.model.layers.attention_backends import Scores, explicit
from bessemer.model.layers.attention_mask import attention_mask
from bessemer.training.model_setup import prepare_model
from bessemer.training.objectives import next_token_loss
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from bessemer.training.trainer import Trainer
from tests.cases import slow_but

from .parity import DENSE, SETTINGS, TWO_LAYERS, RandomBatches, assert_equal, trained

EXACT = 1e-9
METHODS = ("all_gather", "ring")
#: Windows, a cap and sinks: what gpt-oss and Gemma do to scores.
WINDOWED = TWO_LAYERS | {
    "layer_types": ("sliding_attention", "full_attention"),
    "sliding_window": 5,
    "attention_sinks": True,
    "attn_logit_softcapping": 3.0,
    "rope_local_base_freq": 500.0,
}
SPARSE = TWO_LAYERS | {
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "router_aux_loss_coef": 0.1,
    "router_z_loss_coef": 0.05,
    "router_correction_bias": True,
    "router_bias_update_rate": 0.02,
    "first_k_dense_replace": 1,
}
LATENT = TWO_LAYERS | {
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}


CASES = {
    "dense": {"model": TWO_LAYERS},
    "packed": {"model": TWO_LAYERS, "packed": True, "settings": {"micro_batch_size": 3}},
    "windowed": {"model": WINDOWED},
    "windowed, packed": {"model": WINDOWED, "packed": True, "settings": {"activation_checkpointing": "full"}},
    "alibi": {"model": TWO_LAYERS | {"position_type": "alibi"}},
    "learned positions": {"model": TWO_LAYERS | {"position_type": "learned"}},
    "latent": {"model": LATENT},
    "experts": {"model": SPARSE, "settings": {"micro_batch_size": 3}},
}
#: Each method with masks of windows or documents; heads of two sizes travel in a way of their own.
USUAL = [("windowed, packed", "all_gather"), ("packed", "ring"), ("latent", "ring")]


@pytest.mark.parametrize("name, method", slow_but(USUAL, product(CASES, METHODS)))
def test_two_ranks_are_one(two, alone, name, method):
    parallel, options = {"context": 2, "context_method": method}, CASES[name]
    assert_equal(two.run(trained, parallel=parallel, **options)[0], alone(**options), EXACT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes, method",
    [
        ({"context": 4}, "ring"),
        ({"context": 2, "data_shard": 2}, "all_gather"),
        ({"context": 4}, "all_gather"),
        ({"context": 2, "data_shard": 2}, "ring"),
        ({"context": 2, "data_replicate": 2}, "all_gather"),
        ({"context": 2, "data_replicate": 2}, "ring"),
    ],
    ids=str,
)
def test_four_ranks_are_one(four, alone, method, sizes):
    options = {"model": WINDOWED, "packed": True}
    assert_equal(four.run(trained, parallel=sizes | {"context_method": method}, **options)[0], alone(**options), EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("other, method", slow_but([("pipeline", "ring")], product(("pipeline", "tensor"), METHODS)))
def test_another_axis_beside_it(four, alone, method, other):
    parallel = {"context": 2, other: 2, "context_method": method}
    options = {"model": SPARSE, "packed": True}
    assert_equal(four.run(trained, parallel=parallel, **options)[0], alone(**options), EXACT)


def test_two_partial_outputs_merge_into_the_whole():
    generator = torch.Generator().manual_seed(1)
    scores, values = (torch.randn(3, 7, *more, generator=generator, dtype=torch.float64) for more in ((), (5,)))
    parts = [
        ((scores[:, keys].softmax(-1)[..., None] * values[:, keys]).sum(1), scores[:, keys].logsumexp(-1))
        for keys in (slice(0, 2), slice(2, 7))
    ]
    out, log_sum = ring.merged(*parts[0], *parts[1])
    torch.testing.assert_close(out, (scores.softmax(-1)[..., None] * values).sum(1), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(log_sum, scores.logsumexp(-1), rtol=1e-14, atol=1e-14)


def test_a_part_in_which_nothing_was_seen_changes_nothing():
    out, log_sum = torch.randn(4, 3), torch.tensor([0.5, -2.0, 7.0, -torch.inf])
    out[3] = 0
    nothing = (torch.zeros(4, 3), torch.full((4,), -torch.inf))
    for parts in ((out, log_sum, *nothing), (*nothing, out, log_sum)):
        merged = ring.merged(*parts)
        assert torch.equal(merged[0], out) and torch.equal(merged[1], log_sum)


def all_ranks() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def attention(method=None, tile=3):
    """Attention over random tokens and its gradients: by the definition alone, or on this rank's part of the rows."""
    generator, length = torch.Generator().manual_seed(2), 48
    query, key, value, gradient = (
        torch.randn(2, heads, length, 6, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4)
    )
    documents_BT = torch.arange(length).expand(2, length) // torch.tensor([[20], [11]])
    sinks_H, slopes_H = torch.linspace(-1, 1, 4, dtype=torch.float64), torch.tensor([0.5, 0.1, 0.0, 0.02])
    options = {"window": 13, "slopes_H": slopes_H}
    if method is None:
        columns = slice(None)
        mask = attention_mask(length, length, torch.float64, torch.device("cpu"), documents_BT=documents_BT, **options)
    else:
        ring._TILE = tile
        rows = ContextParallelRows(all_ranks(), masks=method == "all_gather")
        columns = rows.local_rows(length // rows.ranks).places(torch.device("cpu"))
        count = len(columns)
        mask = rows.attention_mask(
            count, count, torch.float64, torch.device("cpu"), documents_BT=documents_BT[:, columns], **options
        )
    tensors = [tensor[:, :, columns].clone().requires_grad_() for tensor in (query, key, value)]
    tensors.append(sinks_H.clone().requires_grad_())
    scores = Scores(0.4, 2.0, tensors[3])
    if method is None:
        out = explicit(*tensors[:3], mask, scores)
    else:
        out = rows.ring(*tensors[:3], mask, scores) if method == "ring" else rows.gathered(explicit, *tensors[:3], mask, scores)
    out.backward(gradient[:, :, columns])
    return columns, [out.detach(), *(tensor.grad for tensor in tensors)]


@pytest.mark.parametrize("method", METHODS)
def test_attention_in_tiles_with_all_that_can_be_done_to_scores(four, method):
    _, whole = attention()
    found = four.run(attention, method=method)
    for columns, tensors in found:
        for tensor, expected in zip(tensors[:4], whole[:4], strict=True):
            torch.testing.assert_close(tensor, expected[:, :, columns], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(tensors[4] for _, tensors in found), whole[4], rtol=1e-12, atol=1e-12)


def fused(ranks):
    """Plain causal attention over rows of as many ranks, and its gradients: by the definition (0), or by fused kernels."""
    generator, length = torch.Generator().manual_seed(2), 64
    query, key, value, gradient = (
        torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4)
    )
    columns, calls = slice(None), []
    if ranks:
        rows = ContextParallelRows(all_ranks(), masks=False)
        columns = rows.local_rows(length // ranks).places(torch.device("cpu"))
    tensors = [tensor[:, :, columns].clone().requires_grad_() for tensor in (query, key, value)]
    if ranks:
        mask = rows.attention_mask(len(columns), len(columns), torch.float64, torch.device("cpu"))
        with patch.object(fused_ring, "_FUSED_DEVICES", ("cpu",)), patch.object(ring, "ring_attention", calls.append):
            out = rows.ring(*tensors, mask, Scores(0.4))
    else:
        out = explicit(*tensors, attention_mask(length, length, torch.float64, torch.device("cpu")), Scores(0.4))
    out.backward(gradient[:, :, columns])
    assert not calls
    return columns, [out.detach(), *(tensor.grad for tensor in tensors)]


def test_fused_kernels_that_pass_keys_round_give_the_attention_of_whole_rows(four):
    _, whole = fused(0)
    for columns, tensors in four.run(fused, ranks=4):
        for tensor, expected in zip(tensors, whole, strict=True):
            torch.testing.assert_close(tensor, expected[:, :, columns], rtol=1e-12, atol=1e-12)


def test_fused_kernels_are_for_plain_causal_attention_in_16_bits_on_a_gpu():
    heads = torch.empty(1, 2, 8, 16, dtype=torch.bfloat16, device="meta")
    plain = attention_mask(
        8, 32, torch.bfloat16, torch.device("cpu"), slots_BT=torch.arange(8)[None], aligned=False, dense=False
    )
    with patch.object(fused_ring, "_FUSED_DEVICES", ("meta",)):
        assert fused_ring.can_fuse(heads, heads, plain, Scores(0.4), 4)
        for mask, scores in (
            (plain._replace(window=31), Scores(0.4)),
            (plain._replace(slopes_H=torch.ones(2)), Scores(0.4)),
            (plain._replace(documents_BT=torch.zeros(1, 32)), Scores(0.4)),
            (plain, Scores(0.4, softcap=3.0)),
            (plain, Scores(0.4, None, torch.ones(2))),
        ):
            assert not fused_ring.can_fuse(heads, heads, mask, scores, 4)
    assert not fused_ring.can_fuse(heads, heads, plain, Scores(0.4), 4)


def test_every_rank_has_the_same_number_of_pairs_to_compute():
    """Under causal attention; rank 0 with the first quarter alone would have a seventh of the last one's."""
    for ranks in (2, 4, 8):
        pairs = []
        for rank in range(ranks):
            front, back = Layout(context=ranks).columns(rank, 64 * ranks)
            pairs.append(sum(place + 1 for part in (front, back) for place in range(part.start, part.stop)))
        assert len(set(pairs)) == 1


def validated(parallel=None):
    """The summed loss of a few rows under a layout."""
    config = PretrainConfig(**(SETTINGS | {"parallel": parallel or {}}))
    mesh = ALONE if parallel is None else Mesh.here(ParallelConfig(**parallel), "cpu")
    runtime = Runtime.of(config, torch.device("cpu"))
    model, _ = prepare_model(initial_decoder(ModelConfig(**WINDOWED), seed=3).double(), config, runtime, mesh)
    trainer = Trainer(model, [], next_token_loss, runtime, gradient_clip=1.0, mesh=mesh)
    batch = RandomBatches(8, 16, 96).batch(0)
    with runtime.evaluating(model):
        return trainer.negative_log_likelihood(batch.tokens_BT, batch.targets_BT)


def test_validation_is_that_of_one_process(two):
    assert two.run(validated, parallel={"context": 2}) == [pytest.approx(validated(), rel=1e-12)] * 2


@pytest.mark.parametrize(
    ("changes", "length", "named"),
    [
        ({"layer_types": ("linear_attention",) * 4}, 16, "linear_attention"),
        ({"num_nextn_predict_layers": 1}, 16, "num_nextn_predict_layers"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 16, "dynamic"),
        ({}, 18, "2 × context 4 does not divide context_length 18"),
    ],
    ids=["linear", "ahead", "dynamic", "length"],
)
def test_what_cannot_be_cut_is_refused(changes, length, named):
    with pytest.raises(ConfigError, match=named):
        Layout(context=2).check(ModelConfig(**(DENSE | changes)), length)
