"""Attention, residual stream and experts as recorded: the model's results stay, the numbers are those of `transformers`."""

import numpy as np
import pytest
import torch

from bessemer.core.errors import RequestError
from bessemer.inspection.heads import open_head
from bessemer.inspection.inspect import analogy, neighbours, planar
from bessemer.inspection.recording import lens_logits, logit_lens, record, recording
from bessemer.model.config import ModelConfig
from bessemer.model.layers.cache import DecoderCache
from bessemer.model.storage.folder import load_model
from tests.cases import slow_but
from tests.model.family_models import make
from tests.model.randomised import random_decoder

TOLERANCE = 1e-5
#: Grouped heads; windows and two norms a head; sinks and experts; latent attention and groups of experts; linear attention and
#: a gate; learned positions.
FAMILIES = ("llama", "gemma3", "gpt_oss", "deepseek_v3", "qwen3_next", "gpt2")


@pytest.fixture(scope="module", params=slow_but(("llama", "deepseek_v3", "qwen3_next"), FAMILIES))
def case(request, tmp_path_factory):
    """A `transformers` model, ours from its folder, a text, what was recorded of ours."""
    theirs = make(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    ours = load_model(folder)
    tokens_T = np.random.default_rng(3).integers(3, 97, 14)
    return theirs, ours, tokens_T, record(ours, tokens_T)


@torch.no_grad()
def test_weights_are_those_of_transformers(case):
    theirs, _, tokens_T, found = case
    attentions = theirs(torch.from_numpy(tokens_T)[None], output_attentions=True).attentions
    attentions = [weights for weights in attentions if weights is not None]  # linear attention has none
    assert len(attentions) == len(found.heads) > 0
    for record_of_layer, expected in zip(found.heads.values(), attentions, strict=True):
        assert np.abs(record_of_layer.weights_BHTT - expected.numpy()).max() < TOLERANCE


def test_rows_of_weights_sum_to_one_less_the_share_of_the_sink(case):
    *_, found = case
    for layer, heads in found.heads.items():
        sums_HT = heads.weights_BHTT[0].sum(-1)
        shares_HT = np.array([[open_head(found, layer, head, t).sink_share for t in range(14)] for head in range(len(sums_HT))])
        assert np.abs(sums_HT + shares_HT - 1).max() < TOLERANCE
        assert (shares_HT.min() > 0) == (heads.scores.sinks_H is not None)


def test_steps_of_a_head_lead_to_the_weights_and_the_output_of_the_layer(case):
    *_, found = case
    for layer, heads in found.heads.items():
        for head in range(heads.query_BHTC.shape[1]):
            opened = open_head(found, layer, head, 9)
            assert np.abs(opened.weights_T - heads.weights_BHTT[0, head, 9]).max() < TOLERANCE
            assert np.abs(opened.output_V - heads.attended_BHTV[0, head, 9]).max() < TOLERANCE
            assert np.isinf(opened.masked_T[10:]).all() and not np.isnan(opened.capped_T).any()


@torch.no_grad()
def test_recording_leaves_the_results_and_the_model_as_they_were(case):
    _, ours, tokens_T, _ = case
    tokens_BT = torch.from_numpy(tokens_T)[None]
    before, backends = ours(tokens_BT), [getattr(block, "self_attn", None) and block.self_attn.backend for block in ours.blocks]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in ours.modules()]
    with recording(ours):
        assert torch.equal(ours(tokens_BT), before)
        cache = DecoderCache(ours.config, 1, 14)
        assert (ours(tokens_BT, cache=cache) - before).abs().max() < 1e-4
    assert backends == [getattr(block, "self_attn", None) and block.self_attn.backend for block in ours.blocks]
    assert (
        hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in ours.modules()] == [0] * len(hooks)
    )


@torch.no_grad()
def test_last_layer_of_the_lens_is_the_model_and_the_others_are_transformers_hidden_states(case):
    theirs, ours, tokens_T, found = case
    logits_TV = ours(torch.from_numpy(tokens_T)[None])[0]
    assert torch.equal(lens_logits(ours, found.residual[-1][0]), logits_TV)
    states = theirs(torch.from_numpy(tokens_T)[None], output_hidden_states=True).hidden_states[:-1]  # the last is normed
    for ours_BTD, theirs_BTD in zip(found.residual[:-1], states, strict=True):
        assert np.abs(ours_BTD - theirs_BTD.numpy()).max() < 1e-4
    lens = logit_lens(ours, found, tokens_T, top=97)
    probabilities_TV = logits_TV.softmax(-1).numpy()
    expected = probabilities_TV[np.arange(13), tokens_T[1:]]
    assert np.allclose(lens.next_probability_LT[-1], expected)
    # the rank says where the token stands among the likeliest
    assert (np.take_along_axis(lens.tokens_LTk[:, :-1], lens.next_rank_LT[..., None] - 1, -1)[..., 0] == tokens_T[1:]).all()


def test_experts_are_those_whose_outputs_make_the_layer(case):
    """The recorded choice, put in the router's place, gives the same feed-forward."""
    _, ours, _, found = case
    config = ours.config
    assert list(found.experts) == [layer for layer in range(config.num_hidden_layers) if config.is_sparse(layer)]
    for layer, (experts_BTk, weights_BTk) in found.experts.items():
        assert experts_BTk.shape == weights_BTk.shape == (1, 14, config.num_experts_per_tok)
        assert (np.diff(weights_BTk) <= 0).all()
        block = ours.blocks[layer]
        hidden_TD = torch.randn(14, config.hidden_size)
        with recording(ours) as again, torch.no_grad():
            out = block.mlp(hidden_TD[None])
            from bessemer.model.layers.feed_forward import Routing

            recorded = again.experts[layer]
            routing = Routing(torch.from_numpy(recorded.experts_BTk[0]), torch.from_numpy(recorded.weights_BTk[0]))
            rebuilt = block.mlp.experts(hidden_TD, routing)
            if block.mlp.shared_expert is not None:
                shared = block.mlp.shared_expert(hidden_TD)
                gate = block.mlp.shared_expert_gate
                rebuilt = rebuilt + (shared if gate is None else shared * torch.sigmoid(gate(hidden_TD)))
        assert (out[0] - rebuilt).abs().max() < 1e-4


@pytest.mark.parametrize("changes", [{"position_type": "alibi"}, {"attn_logit_softcapping": 0.7, "qk_norm": "full"}])
@pytest.mark.parametrize("backend", ["sdpa", "tiled"])
def test_steps_hold_for_penalties_and_caps_under_any_backend(changes, backend):
    model = random_decoder(ModelConfig(vocab_size=50, num_hidden_layers=2, **changes))
    model.set_attention_backend(backend)
    found = record(model, np.arange(12))
    for layer in range(2):
        for head in range(4):
            opened = open_head(found, layer, head, -1)
            assert np.abs(opened.weights_T - found.heads[layer].weights_BHTT[0, head, -1]).max() < TOLERANCE
            assert np.abs(opened.output_V - found.heads[layer].attended_BHTV[0, head, -1]).max() < TOLERANCE


def test_what_is_not_there_is_named(case):
    _, ours, _, found = case
    last = list(found.heads)[-1]
    with pytest.raises(RequestError, match="there is no layer 9"):
        open_head(found, 9, 0, 0)
    with pytest.raises(RequestError, match=f"there is no head 4: layer {last} has 4"):
        open_head(found, last, 4, 0)
    with pytest.raises(RequestError, match="there is no position 14"):
        open_head(found, last, 0, 14)
    for layer in set(range(ours.config.num_hidden_layers)) - set(found.heads):
        with pytest.raises(RequestError, match=f"layer {layer} is linear attention"):
            open_head(found, layer, 0, 0)
    with pytest.raises(RequestError, match=r"has 65 tokens and the model reads 64|token id"):
        record(ours, np.arange(65) if ours.config.max_position_embeddings == 64 else [97])


def test_neighbours_and_analogies_are_those_of_the_cosines():
    model = random_decoder(ModelConfig(vocab_size=300, num_hidden_layers=1))
    table = model.embed_tokens.weight.detach().numpy().astype(np.float64)
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    nearest = neighbours(model, 7, count=12)
    expected = [id for id in np.argsort(-(unit @ unit[7])) if id != 7][:12]
    assert nearest.tokens.tolist() == expected
    assert np.allclose(nearest.cosines, (unit @ unit[7])[expected], atol=1e-6)
    with torch.no_grad():
        model.embed_tokens.weight[9] = torch.from_numpy(3 * (unit[1] - unit[2] + unit[3]))
    found = analogy(model, 1, 2, 3)
    assert found.tokens[0] == 9 and abs(found.cosines[0] - 1) < 1e-6
    assert not {1, 2, 3} & set(found.tokens.tolist())


def test_map_keeps_the_plane_that_points_lie_in_and_its_signs():
    generator = np.random.default_rng(0)
    plane = np.linalg.qr(generator.normal(size=(8, 2)))[0]
    flat_N2 = generator.normal(size=(20, 2)) * [5, 1]
    points = flat_N2 @ plane.T + generator.normal(size=8)
    coordinates, share = planar(points)
    assert share > 1 - 1e-9
    distances = [np.linalg.norm(x[:, None] - x[None], axis=-1) for x in (coordinates, flat_N2)]
    assert np.allclose(*distances)
    assert np.allclose(coordinates, planar(points[::-1])[0][::-1])
    for _ in range(8):  # the largest entry of each direction is positive
        points = generator.normal(size=(12, 8))
        directions = (points - points.mean(0)).T @ planar(points)[0]
        assert (np.take_along_axis(directions, np.abs(directions).argmax(0)[None], 0) > 0).all()
