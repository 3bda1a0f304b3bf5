"""What heads do: roles on patterns made by hand, and the loss without a head."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from bessemer.core.errors import RequestError
from bessemer.inspection.heads import ROLES, head_losses, head_roles, repeated_tokens, role_scores, strongest, without_heads
from bessemer.model.storage.folder import load_model
from tests.cases import slow
from tests.model.family_models import make

TOKENS = np.array([9, 1, 2, 3, 4, 1, 2, 3, 4])  # a begin token, then four tokens twice


def pattern(keys):
    """Weights (1, T, T) of a head whose query t looks at keys[t] alone."""
    return np.eye(len(keys))[keys][None]


@pytest.mark.parametrize(
    ("role", "keys"),
    [
        ("previous_token", [0, 0, 1, 2, 3, 4, 5, 6, 7]),
        ("same_token", [0, 0, 0, 0, 0, 1, 2, 3, 4]),
        ("induction", [0, 0, 0, 0, 0, 2, 3, 4, 5]),
        ("first_token", [0, 0, 0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_a_head_made_for_a_role_scores_one_in_it_and_low_in_others(role, keys):
    scores = role_scores(pattern(keys), TOKENS)
    assert scores[role] == 1
    assert all(scores[other] < 0.7 for other in ROLES if other != role)
    assert scores["induction" if role == "same_token" else "same_token"] in (0, 1)


def test_roles_that_no_query_can_play_are_not_numbers():
    scores = role_scores(pattern([0, 0, 1]), np.array([1, 2, 3]))
    assert np.isnan(scores["induction"]) and np.isnan(scores["same_token"]) and scores["previous_token"] == 1
    # of a token that stands twice in a row, the one after the first is the query itself
    assert np.isnan(role_scores(pattern([0, 1]), np.array([5, 5]))["induction"])


def test_repeated_tokens_come_twice_after_the_begin_token():
    texts = repeated_tokens(range(40), begin=[50], texts=3, length=10, seed=2)
    assert texts.shape == (3, 21) and (texts[:, 0] == 50).all()
    assert (texts[:, 1:11] == texts[:, 11:]).all()
    assert len(set(texts[0, 1:11])) == 10 and not (texts[0] == texts[1]).all()
    assert (texts == repeated_tokens(range(40), begin=[50], texts=3, length=10, seed=2)).all()


@pytest.fixture(scope="module", params=["llama", slow("deepseek_v3"), "qwen3_next"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make(request.param).save_pretrained(folder)
    return load_model(folder)


def test_roles_have_a_score_for_every_head_with_weights(model):
    scores = head_roles(model, repeated_tokens(range(90), length=12))
    linear = [kind == "linear_attention" for kind in model.config.types]
    for role in ROLES:
        assert scores[role].shape == (4, 4)
        assert (np.isnan(scores[role]).all(1) == linear).all()
        assert ((scores[role] >= 0) & (scores[role] <= 1) | np.isnan(scores[role])).all()
        assert not any(linear[layer] for layer, _, _ in strongest(scores[role], 16))


@torch.no_grad()
def test_a_head_left_out_is_a_head_whose_columns_of_the_output_projection_are_zero(model):
    tokens_T = np.random.default_rng(1).integers(3, 97, 15)
    tokens_BT = torch.from_numpy(tokens_T)[None]
    before = model(tokens_BT)
    whole, changes_LH = head_losses(model, tokens_T)
    assert whole == pytest.approx(float(functional.cross_entropy(before[0, :-1], tokens_BT[0, 1:])), abs=1e-6)
    for layer, block in enumerate(model.blocks):
        heads = changes_LH.shape[1]
        projection = block.attention.output[0]
        width = projection.in_features // heads
        for head in range(heads):
            with without_heads(model, [(layer, head)]):
                hooked = model(tokens_BT)
            kept = projection.weight.clone()
            projection.weight[:, head * width : (head + 1) * width] = 0
            zeroed = model(tokens_BT)
            projection.weight.copy_(kept)
            assert (hooked - zeroed).abs().max() < 1e-5
            assert (hooked - before).abs().max() > 1e-3
            loss = float(functional.cross_entropy(zeroed[0, :-1], tokens_BT[0, 1:]))
            assert changes_LH[layer, head] == pytest.approx(loss - whole, abs=1e-5)
    assert torch.equal(model(tokens_BT), before)


def test_a_head_that_is_not_there_cannot_be_left_out(model):
    for heads, message in (([(9, 0)], "no layer 9"), ([(0, 0), (3, 7)], "no head 7: layer 3 has 4")):
        with pytest.raises(RequestError, match=message), without_heads(model, heads):
            pass
    assert not any(module._forward_pre_hooks for module in model.modules())
