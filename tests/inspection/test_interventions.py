"""Silenced, patched and steered models, beside hooks on whole blocks that read the text without a cache; shares in a logit."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch

from bessemer.core.errors import RequestError
from bessemer.inspection.forward_pass import layer_parts, layer_shares, logit_shares, shares_of_norm
from bessemer.inspection.heads import without_heads
from bessemer.inspection.interventions import Changes, Patch, Steering, continuation, state_behind, steering_between
from bessemer.inspection.recording import record
from bessemer.model.storage.folder import load_model
from tests.cases import slow_but
from tests.model.family_models import make

#: Grouped heads; norms behind each part; experts and sinks; latent attention; linear attention; LayerNorm and biases.
FAMILIES = ("llama", "gemma3", "gpt_oss", "deepseek_v3", "qwen3_next", "gpt2")
TOKENS, OTHER, COUNT = [5, 9, 33, 7, 61, 12], [70, 9, 33, 7, 61, 12], 4
LAYER = 1


@pytest.fixture(scope="module", params=slow_but(("llama", "qwen3_next"), FAMILIES))
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make(request.param).save_pretrained(folder)
    return load_model(folder).float().eval()


@torch.no_grad()
def read_on(model, tokens, behind):
    """The likeliest tokens and their probabilities, each time from the whole text; behind: layer → what is done to the states
    behind it, (T, D), in place."""
    tokens, found = list(tokens), []
    with ExitStack() as hooks:
        for layer, change in behind.items():

            def changed(block, given, out_BTD, change=change):
                out_BTD = out_BTD.clone()
                change(given[0][0], out_BTD[0])
                return out_BTD

            hooks.callback(model.blocks[layer].register_forward_hook(changed).remove)
        for _ in range(COUNT):
            share_V = model(torch.tensor([tokens]))[0, -1].softmax(-1)
            tokens.append(int(share_V.argmax()))
            found.append((tokens[-1], float(share_V.max())))
    return found


def compared(model, changes, behind, tokens=TOKENS):
    found = [(one.id, one.probability) for one in continuation(model, tokens, COUNT, changes)]
    expected = read_on(model, tokens, behind)
    assert [id for id, _ in found] == [id for id, _ in expected]
    assert [share for _, share in found] == pytest.approx([share for _, share in expected], abs=2e-5)
    return found


def test_a_text_goes_on_as_the_model_reads_it(model):
    compared(model, None, {})


def test_a_silenced_layer_passes_its_input_on(model):
    def pass_on(given_TD, out_TD):
        out_TD.copy_(given_TD)

    silenced = compared(model, Changes(layers=[LAYER]), {LAYER: pass_on})
    assert silenced != compared(model, None, {})


def test_a_silenced_head_is_that_of_the_other_measures(model):
    with without_heads(model, [(LAYER, 0)]):
        expected = read_on(model, TOKENS, {})
    found = [(one.id, one.probability) for one in continuation(model, TOKENS, COUNT, Changes(heads=[(LAYER, 0)]))]
    assert [id for id, _ in found] == [id for id, _ in expected]


def test_a_patch_is_the_other_prompts_state_at_the_last_token_and_there_alone(model):
    state_D = state_behind(model, LAYER, OTHER)
    assert np.abs(state_D.numpy() - record(model, OTHER).residual[LAYER + 1][0, -1]).max() < 1e-4

    def patch(given_TD, out_TD):
        out_TD[len(TOKENS) - 1] = state_D

    compared(model, Changes(patch=Patch(LAYER, state_D)), {LAYER: patch})
    # behind the last layer nothing else decides the next token
    last = len(model.blocks) - 1
    patched = next(continuation(model, TOKENS, 1, Changes(patch=Patch(last, state_behind(model, last, OTHER)))))
    assert dict(patched.likeliest) == pytest.approx(dict(next(continuation(model, OTHER, 1)).likeliest), abs=1e-5)


def test_steering_adds_the_difference_of_means_from_the_last_token_on(model):
    steering = steering_between(model, LAYER, [[5, 6], [8]], [[40, 41, 42]], 3.0)
    means = [
        np.mean([state_behind(model, LAYER, one).numpy() for one in some], axis=0) for some in ([[5, 6], [8]], [[40, 41, 42]])
    ]
    assert np.allclose(steering.direction_D.numpy(), 3 * (means[0] - means[1]), atol=1e-4)

    def steer(given_TD, out_TD):
        out_TD[len(TOKENS) - 1 :] += steering.direction_D

    steered = compared(model, Changes(steering=steering), {LAYER: steer})
    assert steered != compared(model, None, {})
    assert not any(hooks for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks))
    nothing = Steering(LAYER, torch.zeros_like(steering.direction_D))
    compared(model, Changes(steering=nothing), {})


def test_what_the_model_has_not_is_one_line(model):
    for changes in (Changes(layers=[99]), Changes(heads=[(0, 99)]), Changes(patch=Patch(-1, torch.zeros(1)))):
        with pytest.raises(RequestError, match=r"there is no (layer|head)"):
            next(continuation(model, TOKENS, 1, changes))


@torch.no_grad()
def test_shares_sum_to_the_logit_and_a_layers_parts_to_its_share(model):
    states_LD = torch.from_numpy(np.concatenate([states[:, -1] for states in record(model, TOKENS).residual]))
    token = 17
    shares = layer_shares(model, states_LD, token)
    bias = getattr(model.norm, "bias", None)
    constant = 0.0 if bias is None else float(model.norm.multiplier * bias @ model.head_weight[token])
    logit = float(model.norm(states_LD[-1]) @ model.head_weight[token])
    assert sum(shares) + constant == pytest.approx(logit, abs=1e-3)
    reached = []
    parts = list(layer_parts(model, TOKENS, token, lambda layer, _: reached.append(layer)))
    assert reached == list(range(len(model.blocks) + 1)) and [one.layer for one in parts] == reached[:-1]
    for one, block, share in zip(parts, model.blocks, shares[1:], strict=True):
        assert one.attention + one.feed_forward == pytest.approx(share, abs=1e-3)
        projection, count = block.attention.output
        assert len(one.heads_H) == count
        if projection.bias is None:
            assert sum(one.heads_H) == pytest.approx(one.attention, abs=1e-3)
        else:
            of_bias = logit_shares(model, projection.bias[None], states_LD[-1], token)[0]
            assert sum(one.heads_H) + of_bias == pytest.approx(one.attention, abs=1e-3)


def test_a_norm_with_its_scale_held_is_linear(model):
    part_ND, at_D = torch.randn(3, model.config.hidden_size), torch.randn(model.config.hidden_size)
    shares_ND = shares_of_norm(model.norm, part_ND, at_D)
    assert torch.allclose(shares_of_norm(model.norm, part_ND.sum(0)[None], at_D)[0], shares_ND.sum(0), atol=1e-4)
    bias = getattr(model.norm, "bias", torch.zeros(1)) * getattr(model.norm, "multiplier", 1)
    assert torch.allclose(shares_of_norm(model.norm, at_D[None], at_D)[0] + bias, model.norm(at_D), atol=1e-4)
