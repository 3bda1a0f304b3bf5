"""The ONNX file beside the decoder that it was written from, in ONNX Runtime on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.model.config import ModelConfig
from bessemer.model.formats import onnx
from bessemer.model.formats.onnx import all_experts, export_onnx, export_tensorrt
from bessemer.model.initialisation import initial_decoder
from bessemer.model.storage.folder import load_model, save_model
from tests.model.family_models import make
from tests.model.randomised import random_decoder

TOLERANCE = 1e-4
#: One layer of each kind, biases, grouped heads, two bases, a window: as much as one small graph can hold.
LIGHT = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=40,
    max_position_embeddings=64,
    layer_types=("sliding_attention", "full_attention"),
    sliding_window=5,
    rope_local_base_freq=500.0,
    attention_bias=True,
    final_logit_softcapping=3.0,
)


class Session:
    """A file in ONNX Runtime, called with tensors; the cache is carried along."""

    def __init__(self, path, config):
        runtime = pytest.importorskip("onnxruntime")
        self.session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.names = [one.name for one in self.session.get_inputs()]
        self.config = config

    def empty(self, rows):
        shape = (rows, self.config.num_key_value_heads, 0, self.config.head_dim)
        return [np.zeros(shape, np.float32)] * (2 * self.config.num_hidden_layers)

    def __call__(self, tokens_BT, mask_BS, past):
        positions_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
        given = [tokens_BT.numpy(), mask_BS.numpy(), positions_BS[:, -tokens_BT.shape[1] :].numpy(), *past]
        logits, *present = self.session.run(None, dict(zip(self.names, given, strict=True)))
        return torch.from_numpy(logits), present


def tokens(rows, length):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def equal_everywhere(model, path):
    """Prefill, cached pieces, a padded batch, and a greedy continuation."""
    session, whole_BT = Session(path, model.config), tokens(3, 20)
    expected_BTV = model(whole_BT)
    assert expected_BTV.std() > 0.1
    logits_BTV, _ = session(whole_BT, torch.ones_like(whole_BT), session.empty(3))
    assert (logits_BTV - expected_BTV).abs().max() < TOLERANCE

    past, start = session.empty(3), 0
    for length in (7, 1, 1, 5, 6):
        piece_BT, mask_BS = whole_BT[:, start : start + length], torch.ones(3, start + length, dtype=torch.int64)
        logits_BTV, past = session(piece_BT, mask_BS, past)
        assert (logits_BTV - expected_BTV[:, start : start + length]).abs().max() < TOLERANCE
        start += length

    lengths = (20, 11, 4)
    mask_BS = torch.stack([torch.cat((torch.zeros(20 - length), torch.ones(length))) for length in lengths]).long()
    padded_BT = torch.stack([whole_BT[row].roll(20 - length) for row, length in enumerate(lengths)]) * mask_BS
    logits_BTV, past = session(padded_BT, mask_BS, session.empty(3))
    for row, length in enumerate(lengths):
        assert (logits_BTV[row, 20 - length :] - expected_BTV[row, :length]).abs().max() < TOLERANCE

    chosen_B1 = logits_BTV[:, -1:].argmax(-1)
    texts = [whole_BT[row : row + 1, :length] for row, length in enumerate(lengths)]
    for _ in range(12):
        for row, text_1T in enumerate(texts):
            assert model(text_1T)[0, -1].argmax() == chosen_B1[row]
            texts[row] = torch.cat((text_1T, chosen_B1[row : row + 1]), dim=1)
        mask_BS = torch.cat((mask_BS, torch.ones_like(chosen_B1)), dim=1)
        logits_BTV, past = session(chosen_B1, mask_BS, past)
        chosen_B1 = logits_BTV.argmax(-1)


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("onnx")
    model = random_decoder(LIGHT)
    save_model(model, folder / "model", tokenizer=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "_EXTERNAL_ABOVE", 1000)
        assert export_onnx(folder / "model", folder / "out") == []
    return model, folder / "out"


def test_onnx_runtime_gives_the_decoders_logits_and_texts(light):
    model, folder = light
    equal_everywhere(model, folder / "model.onnx")


def test_inputs_and_outputs_are_named_as_optimum_names_them(light):
    _, folder = light
    session = Session(folder / "model.onnx", LIGHT).session
    assert session.get_inputs()[1].shape == ["batch_size", "past_sequence_length + sequence_length"]
    past = [f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert [one.name for one in session.get_inputs()] == ["input_ids", "attention_mask", "position_ids", *past]
    present = [name.replace("past_key_values", "present") for name in past]
    assert [one.name for one in session.get_outputs()] == ["logits", *present]
    assert session.get_inputs()[3].shape == ["batch_size", 2, "past_sequence_length", 8]


def test_large_weights_lie_beside_the_graph_and_nothing_else_is_left(light):
    _, folder = light
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.onnx", "model.onnx.data"]
    assert (folder / "model.onnx.data").stat().st_size > (folder / "model.onnx").stat().st_size / 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    (
        *("llama", "llama-biases-llama3-rope", "llama-multi-query", "mistral", "qwen2-windows", "qwen3", "qwen3-yarn"),
        *("smollm3", "olmo2", "olmo3", "gemma3", "gpt2", "gpt_oss", "mixtral", "qwen3_moe"),
    ),
)
def test_every_family_that_it_holds_runs_alike_in_onnx_runtime(case, tmp_path):
    make(case).save_pretrained(tmp_path / "model")
    export_onnx(tmp_path / "model", tmp_path / "model.onnx")
    equal_everywhere(load_model(tmp_path / "model"), tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("position_type", ["alibi", "sinusoidal", "none"])
def test_every_kind_of_positions_runs_alike_in_onnx_runtime(position_type, tmp_path):
    model = random_decoder(LIGHT.with_changes(position_type=position_type, rope_local_base_freq=None))
    save_model(model, tmp_path / "model", tokenizer=None)
    export_onnx(tmp_path / "model", tmp_path / "model.onnx")
    equal_everywhere(model, tmp_path / "model.onnx")


@pytest.mark.parametrize("inputs", [False, True], ids=["outputs weighted", "inputs weighted"])
@torch.no_grad()
def test_all_experts_weighted_by_their_choice_equal_the_chosen_ones(inputs):
    shape = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "expert_bias": True, "router_bias": True}
    shape["expert_input_scores"] = inputs
    mlp = random_decoder(LIGHT.with_changes(**shape)).blocks[0].mlp
    hidden_ND = torch.randn(11, 32, generator=torch.Generator().manual_seed(1))
    routing = mlp.router(hidden_ND)
    assert torch.allclose(all_experts(mlp.experts, hidden_ND, routing), mlp.experts(hidden_ND, routing), atol=1e-5)


@pytest.mark.parametrize(
    ("case", "named"),
    [("deepseek_v3", "latent attention"), ("qwen3_next", "linear attention"), ("llama-dynamic-rope", "dynamic rotary scaling")],
)
def test_what_onnx_cannot_hold_is_refused_by_name(case, named, tmp_path):
    make(case).save_pretrained(tmp_path / "model")
    with pytest.raises(ArtefactError, match=f"model: ONNX cannot hold .*{named}"):
        export_onnx(tmp_path / "model", tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_tensorrt_says_that_it_needs_a_card(tmp_path):
    save_model(initial_decoder(LIGHT, seed=1), tmp_path / "model", tokenizer=None)
    with pytest.raises(ConfigError, match="there is no NVIDIA card here"):
        export_tensorrt(tmp_path / "model", tmp_path / "engine")


def test_a_missing_package_is_named_with_the_way_to_install_it(tmp_path, monkeypatch):
    save_model(initial_decoder(LIGHT, seed=1), tmp_path / "model", tokenizer=None)
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"onnxscript: pip install .*\[onnx\]'"):
        export_onnx(tmp_path / "model", tmp_path / "model.onnx")
