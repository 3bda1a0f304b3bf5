from __future__ import annotations

from itertools import product

import pytest
import torch

from bessemer.model.quantisation.awq import apply, folds_of, round_with_clips
from bessemer.model.quantisation.calibration import Statistics, fed_blocks, gather, steps_of
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.integers import round_to_nearest
from bessemer.model.quantisation.quantise import gptq, quantise
from bessemer.model.quantisation.quantised_layers import quantised_parts
from bessemer.model.quantisation.schemes import Int4, Int8
from bessemer.model.storage.folder import load_model
from tests.cases import slow_but
from tests.model.family_models import CASES, OF_EACH_KIND, make
from tests.model.randomised import SHAPES, random_decoder, random_tokens

PLAIN = SHAPES["grouped"].with_changes(
    vocab_size=102, hidden_size=64, num_hidden_layers=2, num_key_value_heads=2, head_dim=16, intermediate_size=96
)


def logits(model, tokens_BT):
    with torch.no_grad():
        return model(tokens_BT)


def correlated_inputs(count, width, seed=0):
    """Inputs that share a few directions, some of them large."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(8, width, generator=generator) * torch.rand(width, generator=generator).pow(4) * 4
    return torch.randn(count, 8, generator=generator) @ mixing + 0.3 * torch.randn(count, width, generator=generator)


def statistics_of(inputs):
    found = Statistics(inputs.shape[1], torch.device("cpu"))
    found.add(inputs)
    return found


def output_error(codes, weight, inputs):
    return float((inputs @ (codes.dequantised() - weight).T).square().mean())


@pytest.mark.parametrize("scheme", [Int4(32), Int4(32, "code"), Int8()], ids=["int4", "int4 with zeros", "int8"])
@pytest.mark.parametrize("ordered", [True, False])
def test_gptq_leaves_half_of_the_output_error_of_rounding(scheme, ordered):
    inputs, weight = correlated_inputs(2000, 64), torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    codes = gptq(weight, statistics_of(inputs), scheme, damping=0.01, activation_order=ordered)
    unseen = correlated_inputs(500, 64, seed=0)
    assert output_error(codes, weight, unseen) <= 0.5 * output_error(round_to_nearest(weight, scheme), weight, unseen)


def test_gptq_of_inputs_that_have_nothing_in_common_is_rounding():
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    statistics = Statistics(64, torch.device("cpu"))
    statistics.squares_KK, statistics.count = torch.eye(64), 1
    scheme = Int4(32)
    codes = gptq(weight, statistics, scheme, damping=0.01, activation_order=False)
    assert torch.equal(codes.tensors["codes"], round_to_nearest(weight, scheme, search_clip=True).tensors["codes"])


def test_gptq_keeps_weights_whose_input_is_never_there():
    inputs, weight = correlated_inputs(500, 64), torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    inputs[:, 5] = 0
    codes = gptq(weight, statistics_of(inputs), Int8(), damping=0.01, activation_order=True)
    assert (codes.dequantised()[:, 5] - weight[:, 5]).abs().max() <= codes.tensors["scales"].max()


def test_the_clips_of_awq_leave_a_smaller_output_error_than_plain_rounding():
    inputs, weight = correlated_inputs(2000, 64), torch.randn(24, 64, generator=torch.Generator().manual_seed(1)) ** 3
    scheme = Int4(32)
    codes = round_with_clips(weight, statistics_of(inputs), scheme)
    assert output_error(codes, weight, inputs) < 0.8 * output_error(round_to_nearest(weight, scheme), weight, inputs)


@pytest.mark.parametrize("case", slow_but(OF_EACH_KIND, CASES))
def test_folded_scales_leave_the_logits_as_they_are(case, tmp_path):
    make(case).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    tokens_BT, generator = random_tokens(model.config, 2, 12), torch.Generator().manual_seed(0)
    before = logits(model, tokens_BT)
    with torch.no_grad():
        folds = [(block, fold) for block in model.blocks for fold in folds_of(block)]
        for block, fold in folds:
            apply(fold, block, torch.rand(fold.channels, generator=generator) * 2 + 0.3)
    assert len(folds) >= 2 * len(model.blocks)
    assert (logits(model, tokens_BT) - before).abs().max() <= 1e-4


METHODS = ["gptq", "awq"]
#: Of each kind of block one family.
FAMILIES = ["qwen3", "gemma3", "olmo2", "gpt2", "deepseek_v3", "qwen3_next", "qwen3_moe", "gpt_oss"]


# AWQ, which searches, takes longest; what it folds is tested with every family above
@pytest.mark.parametrize(
    ("case", "method"),
    slow_but({("qwen3", "awq"), ("gpt2", "gptq")}, product(FAMILIES, METHODS)),
)
def test_calibrated_codes_change_the_logits_less_than_rounding(case, method, tmp_path):
    make(case).save_pretrained(tmp_path)
    rows_RT = random_tokens(load_model(tmp_path).config, 48, 32, seed=1)
    errors = {}
    for name in ("rtn", method):
        model = load_model(tmp_path)
        tokens_BT = random_tokens(model.config, 8, 32)
        before = logits(model, tokens_BT)
        quantise(model, QuantizeConfig(scheme="int4", group_size=32, method=name, head="none"), rows_RT)
        errors[name] = float((logits(model, tokens_BT) - before).square().mean())
    # where widths are no multiples of 32, matrices have 8 bits
    assert 0 < errors[method] < errors["rtn"]


def test_an_expert_that_hardly_any_token_visits_is_rounded_and_named(tmp_path):
    make("qwen3_moe").save_pretrained(tmp_path)
    model = load_model(tmp_path)
    notes = quantise(model, QuantizeConfig(scheme="int8", method="gptq"), random_tokens(model.config, 1, 6))
    assert any("hardly any calibration token visits" in note for note in notes)


def test_the_steps_of_a_block_are_what_reads_one_input_in_the_order_of_use():
    model = random_decoder(PLAIN)
    fed = next(fed_blocks(model, random_tokens(PLAIN, 4, 8)))
    names = [f"layers.0.self_attn.{part}_proj" for part in "qkvo"] + [f"layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")]
    steps = [[name.rpartition(".")[2] for name in step] for step in steps_of(fed, names)]
    assert steps == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_a_block_is_fed_what_the_model_feeds_it():
    model, rows_RT = random_decoder(PLAIN), random_tokens(PLAIN, 4, 8)
    with torch.no_grad():
        last = list(fed_blocks(model, rows_RT))[-1]
        assert torch.allclose(model.logits(model.norm(torch.cat(last.run()))), model(rows_RT), atol=1e-5)


def test_statistics_are_the_sums_over_all_inputs():
    model, rows_RT = random_decoder(PLAIN), random_tokens(PLAIN, 4, 8)
    seen = []
    model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].flatten(0, 1)))
    with torch.no_grad():
        found = gather(next(fed_blocks(model, rows_RT)), ["layers.0.mlp.down_proj"], Statistics)["layers.0.mlp.down_proj"][0]
    inputs = seen[-1]
    assert found.count == 32 and torch.allclose(found.squares_KK, inputs.T @ inputs, atol=1e-4)
    assert torch.allclose(found.magnitudes_K, inputs.abs().sum(0), atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_calibration_text_gives_the_same_codes(method):
    config, found = PLAIN.with_changes(num_hidden_layers=1), []
    for _ in range(2):
        model = random_decoder(config)
        quantise(model, QuantizeConfig(scheme="int4", group_size=32, method=method), random_tokens(config, 4, 16))
        found.append({name: part.codes for name, part in quantised_parts(model).items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
