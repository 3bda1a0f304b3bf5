"""What the formulas say a forward pass keeps is what it keeps."""

import pytest
import torch

from bessemer.model.activations import block_activations, final_norm_activations
from bessemer.model.initialisation import initial_decoder
from bessemer.model.parts import Numerics, StoredActivations
from bessemer.training.model_setup import recompute_activations
from bessemer.training.routing import routers
from tests.cases import in_turn

from .live_memory import LiveMemory
from .models import MODELS

ROWS, LENGTH = 2, 128


def measured(config, recompute, autocast):
    """Bytes a token that are alive after the forward pass, besides weights, their copies in bfloat16, and masks."""
    model = initial_decoder(config, seed=1).train()
    recompute_activations(model, recompute)
    tokens_BT = torch.randint(0, config.vocab_size, (ROWS, LENGTH))
    with LiveMemory([*model.parameters(), *model.buffers()]) as memory:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            kept = model.hidden(tokens_BT).sum()
        for router in routers(model).values():
            router.last = None
        assert kept.requires_grad
        live = memory.live
    if autocast and recompute == "none":
        matrices = [tensor for name, tensor in model.named_parameters() if tensor.ndim > 1 and "embed" not in name]
        live -= 2 * sum(tensor.numel() for tensor in matrices if tensor.shape != (config.num_experts, config.hidden_size))
    masks = len(set(config.types) & {"sliding_attention"}) * LENGTH**2 * (2 if autocast else 4)
    return (live - masks) / (ROWS * LENGTH)


def counted(config, recompute, autocast):
    numerics = Numerics(2 if autocast else 4, fused_norms=False)
    layers = range(config.num_hidden_layers)
    blocks = [block_activations(config, layer, LENGTH, numerics, recompute, fused=False) for layer in layers]
    return sum(blocks, final_norm_activations(config, numerics)).per_token()


@pytest.mark.parametrize(("name", "recompute"), in_turn(MODELS, ["none", "selective", "full"]))
def test_a_forward_pass_keeps_what_is_counted(name, recompute):
    for autocast in (False, True):
        config = MODELS[name]
        expected = measured(config, recompute, autocast)
        assert counted(config, recompute, autocast) == pytest.approx(expected, rel=0.04), autocast


def test_the_tensor_axis_cuts_all_but_the_inputs_of_products():
    assert StoredActivations(sequence=8, heads=4, inputs=2).per_token(tensor=4) == 5


def test_a_block_of_gpt3_in_half_precision_by_hand():
    """GPT-3 XL, 2,048 wide, 24 heads of 128 channels, inner 8,192; norms of one kernel, no scores."""
    config = MODELS["gpt2"].with_changes(
        hidden_size=2048, num_attention_heads=16, num_key_value_heads=16, head_dim=128, intermediate_size=8192
    )
    norms = 2 * (2048 + 2) * 4
    attention = 3 * 2048 * 2 + 4 * 2048 * 2 + 16 * 4
    feed_forward = 2048 * 2 + 2 * 8192 * 2
    assert block_activations(config, 0, 2048, Numerics()).per_token() == norms + attention + feed_forward
