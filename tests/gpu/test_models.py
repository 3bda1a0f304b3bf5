"""Models on a card: where they lie, and that they compute what they compute on the processor."""

from __future__ import annotations

import pytest
import torch

from bessemer.core.errors import ConfigError
from bessemer.inspection.inspect import inspect
from bessemer.model.config import ModelConfig
from bessemer.model.device import choose_device
from bessemer.model.formats.gguf_export import export_gguf
from bessemer.model.layers.attention_backends import BACKENDS, Scores, explicit, flex
from bessemer.model.layers.attention_mask import attention_mask
from bessemer.model.layers.feed_forward import SparseFeedForward, grouped, one_by_one
from bessemer.model.storage.folder import load_model, save_model
from tests.gpu.comparison import KINDS, relative_difference
from tests.inference.models import ARCHITECTURES, BASE, small_decoder
from tests.model.randomised import random_decoder, random_tokens

pytestmark = pytest.mark.gpu


def logits(model, tokens_BT, **options):
    """On the processor, wherever the model lies."""
    options = {name: tensor.to(model.device) for name, tensor in options.items()}
    with torch.no_grad():
        return model(tokens_BT.to(model.device), **options).cpu()


def test_the_card_is_taken_where_no_device_is_named(device):
    assert choose_device("auto").type == device.type


def test_a_card_that_is_not_here_is_refused():
    with pytest.raises(ConfigError, match="is not on this machine"):
        choose_device(f"cuda:{torch.cuda.device_count()}")


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_is_opened_on_the_card_whole(name, device, tmp_path):
    decoder = small_decoder(name)
    save_model(decoder, tmp_path, tokenizer=None)
    opened = load_model(tmp_path, device)
    lying = {place: tensor.device.type for place, tensor in (*opened.named_parameters(), *opened.named_buffers())}
    assert "rotary.cosines" in lying and set(lying.values()) == {device.type}
    weights = opened.state_dict()
    assert all(torch.equal(weights[place].cpu(), tensor) for place, tensor in decoder.state_dict().items())


def test_a_gguf_file_is_opened_on_the_card(tokenizer, device, tmp_path):
    save_model(small_decoder("dense"), tmp_path / "model", tokenizer=tokenizer.folder)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    tokens_BT = random_tokens(BASE, 2, 40)
    here, there = load_model(tmp_path / "model.gguf", device), load_model(tmp_path / "model.gguf")
    assert here.device.type == device.type
    assert (logits(here, tokens_BT) - logits(there, tokens_BT)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_the_processor(name, device):
    decoder = small_decoder(name)
    tokens_BT = random_tokens(decoder.config, 3, 90)
    expected = logits(decoder, tokens_BT)
    assert (logits(decoder.to(device), tokens_BT) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", KINDS)
def test_logits_of_packed_documents_are_those_of_the_processor(name, device):
    decoder = small_decoder(name)
    tokens_BT = random_tokens(decoder.config, 2, 80)
    columns_BT = torch.arange(80).expand(2, -1)
    packed = {"positions_BT": columns_BT % 27, "document_ids_BT": columns_BT // 27}
    expected = logits(decoder, tokens_BT, **packed)
    assert (logits(decoder.to(device), tokens_BT, **packed) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", KINDS)
def test_in_bfloat16_logits_are_near(name, device):
    decoder = small_decoder(name)
    tokens_BT = random_tokens(decoder.config, 2, 60)
    expected = logits(decoder, tokens_BT)
    # by the mean: where a rounding sends a token to another expert, its logits are far off
    difference = (logits(decoder.to(device, torch.bfloat16), tokens_BT).float() - expected).abs().mean()
    assert 0 < difference < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_attention_backend_gives_the_logits_of_the_definition(backend, device):
    decoder = random_decoder(BASE.with_changes(head_dim=16, **ARCHITECTURES["windows"]))
    tokens_BT = random_tokens(decoder.config, 2, 60)
    decoder.set_attention_backend("explicit")
    expected = logits(decoder, tokens_BT)
    decoder.set_attention_backend(backend)
    assert (logits(decoder.to(device), tokens_BT) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("attend", [torch.compile(flex, dynamic=False), flex], ids=["in a block", "by itself"])
def test_compiled_flex_attention_has_the_gradients_of_the_definition(attend, device):
    """Rows of several numbers and lengths, one after the other."""
    generator = torch.Generator().manual_seed(0)
    for rows, length in ((2, 128), (3, 200), (5, 333), (1, 260)):
        given = [torch.randn(rows, heads, length, 16, generator=generator).to(device) for heads in (4, 2, 2)]
        documents_BT = (torch.arange(length, device=device) // 50).expand(rows, -1)
        mask = attention_mask(length, length, torch.float32, device, documents_BT=documents_BT, window=40)
        results = []
        for compute in (attend, explicit):
            inputs = [tensor.clone().requires_grad_() for tensor in given]
            attended = compute(*inputs, mask, Scores(0.25, softcap=5.0))
            attended.square().sum().backward()
            results.append([attended, *(tensor.grad for tensor in inputs)])
        for found, expected in zip(*results, strict=True):
            assert relative_difference(found, expected) < 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_grouped_experts_equal_one_after_the_other_gradients_included(dtype, tolerance, device):
    """In bfloat16 on Hopper and later the two products are one kernel each."""
    config = ModelConfig(vocab_size=9, hidden_size=32, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24)
    made = SparseFeedForward(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    hidden = torch.randn(3, 7, 32, generator=generator).to(device, dtype)
    made.to(device, dtype)
    results = []
    for backend in (grouped, one_by_one):
        made.experts.backend = backend
        made.zero_grad()
        inputs = hidden.clone().requires_grad_()
        out = made(inputs)
        out.float().square().sum().backward()
        results.append([out, inputs.grad, *(parameter.grad for parameter in made.parameters())])
    for found, expected in zip(*results, strict=True):
        assert relative_difference(found, expected) < tolerance


def test_what_inspection_finds_is_what_it_finds_on_the_processor(tokenizer, device):
    decoder = small_decoder("experts")
    expected = inspect(decoder, tokenizer, "in the end").arrays()
    found = inspect(decoder.to(device), tokenizer, "in the end").arrays()
    assert found.keys() == expected.keys()
    for name in ("attention_0", "lens_probabilities_LTk", "head_changes", "expert_weights_1"):
        assert abs(found[name] - expected[name]).max() < 1e-4
