from __future__ import annotations

import json
import math
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bessemer.core.hashing import hash_value
from bessemer.core.progress import Silent
from bessemer.model.config import MODEL_VERSION, ModelConfig, ModelStageConfig
from bessemer.model.initialisation import initial_decoder, initial_weight, initial_weights
from bessemer.model.stage import build_model
from bessemer.model.storage.folder import load_model, save_initial_model, save_model
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.golden import checksum
from tests.model.randomised import SHAPES
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

SMALL = ModelStageConfig.parse({"preset": "qwen3-1m", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48})
#: Settings of models whose tensors are stored as they are, an expert each, and several as one.
STREAMED = {
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24},
    "gpt2": {
        "position_type": "learned",
        "norm_type": "layer",
        "qk_norm": "none",
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_act": "gelu_new",
        "gated_mlp": False,
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
    },
}
SIZE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "head_dim": 8}


def build(tmp_path, name="out", seed=7):
    tokenizer = tmp_path / "tokenizer"
    if not tokenizer.exists():
        write_small_tokenizer(tokenizer)
    (tmp_path / name).mkdir()
    metrics = build_model(SMALL, tokenizer, tmp_path / name, seed=seed, progress=Silent())
    return tmp_path / name / "model", metrics


def test_golden_output(tmp_path):
    """When this fails because the output was meant to change, raise MODEL_VERSION and renew the figures."""
    folder, _ = build(tmp_path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["bessemer"]["tokenizer_hash"]  # another room's
    decoder = load_model(folder)
    sums = [checksum(tensor) for tensor in (decoder.head_weight, *decoder.blocks[1].parameters())]
    assert (MODEL_VERSION, hash_value(config, bits=64)) == (2, "b704ef51c9498b7e")
    assert sums == pytest.approx(
        [
            0.160479,
            0.587578,
            1.101494,
            -0.238907,
            -0.410191,
            0.2561,
            0.587578,
            0.587578,
            0.587578,
            0.495774,
            -0.876252,
            0.129461,
        ],
        abs=1e-5,
    )


def test_the_folder_opens_in_transformers(tmp_path):
    folder, _ = build(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    assert tokenizer("in the end").input_ids == ours.encode("in the end")
    assert model.config.vocab_size == len(tokenizer) == VOCAB_SIZE
    assert model.config.bos_token_id == model.config.eos_token_id == ours.bos_id
    assert model.generation_config.eos_token_id == list(ours.eos_ids)


def test_metrics_describe_the_model(tmp_path):
    folder, metrics = build(tmp_path)
    assert metrics["parameters"] == sum(parameter.numel() for parameter in load_model(folder).parameters())
    assert json.loads(json.dumps(metrics)) == metrics


def test_weights_are_a_function_of_the_seed_alone(tmp_path):
    torch.manual_seed(1)
    first, _ = build(tmp_path, "first")
    torch.manual_seed(2)
    torch.rand(3)
    again, _ = build(tmp_path, "again")
    other, _ = build(tmp_path, "other", seed=8)
    read = [(folder / "model.safetensors").read_bytes() for folder in (first, again, other)]
    assert read[0] == read[1] != read[2]


def test_building_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    initial_decoder(SHAPES["grouped"], seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_residual_projections_are_scaled_by_depth():
    config = SHAPES["grouped"].with_changes(num_hidden_layers=8, vocab_size=2000)
    for name, tensor in initial_weights(config, seed=3).items():
        if name.endswith("norm.weight"):
            assert tensor.eq(1).all()
        else:
            expected = 0.02 / math.sqrt(16) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert tensor.std().item() == pytest.approx(expected, rel=0.03), name


def test_layers_begin_different():
    weights = initial_weights(SHAPES["grouped"], seed=3)
    assert not torch.equal(weights["layers.0.mlp.up_proj.weight"], weights["layers.1.mlp.up_proj.weight"])


def test_a_new_model_knows_nothing():
    config = SHAPES["grouped"]
    tokens_BT = torch.randint(0, config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        log_probs = initial_decoder(config, seed=1)(tokens_BT[:, :-1]).log_softmax(-1)
    loss = -log_probs.gather(-1, tokens_BT[:, 1:, None]).mean().item()
    assert loss == pytest.approx(math.log(config.vocab_size), rel=0.02)


@pytest.mark.parametrize("name", STREAMED)
def test_a_new_model_is_written_as_it_is_drawn(name, tmp_path, monkeypatch):
    config, drawn, most = ModelConfig(**SIZE, **STREAMED[name]), [], 0
    save_model(initial_decoder(config, seed=3), tmp_path / "whole", tokenizer=None)

    def counted(*arguments):
        nonlocal most
        tensor = initial_weight(*arguments)
        drawn.append(weakref.ref(tensor))
        most = max(most, sum(one() is not None for one in drawn))
        return tensor

    monkeypatch.setattr("bessemer.model.storage.folder.initial_weight", counted)
    save_initial_model(config, 3, tmp_path / "streamed", tokenizer=None)
    assert len(drawn) == len(initial_weights(config, 3))
    assert most == (3 if name == "gpt2" else 1)  # queries, keys and values are stored as one
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "streamed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
