from __future__ import annotations

from itertools import product

import gguf
import pytest
import torch
from gguf import GGUFReader, quants

from bessemer.core.errors import ArtefactError
from bessemer.model.folder import load_model, save_model
from bessemer.model.formats.exchange import packaged_smollm2
from bessemer.model.formats.gguf_export import export_gguf
from bessemer.model.formats.gguf_import import import_gguf
from bessemer.model.formats.gguf_open import open_gguf
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.quantised_linear import quantised_parts
from tests.cases import slow_but
from tests.model.family_models import ONE_OF_EACH, make
from tests.model.gguf_models import CASES, write_case
from tests.model.randomised import SHAPES, random_decoder, random_tokens

LLAMA = SHAPES["grouped"].with_changes(
    model_type="llama",
    qk_norm="none",
    vocab_size=96,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=256,
)


def logits(model, tokens_BT):
    with torch.no_grad():
        return model(tokens_BT)


def quantised_file(tmp_path, config=LLAMA, **settings):
    """A quantised model, and its GGUF file."""
    model = random_decoder(config)
    quantise(model, QuantizeConfig(**settings))
    save_model(model, tmp_path / "folder", tokenizer=None)
    export_gguf(tmp_path / "folder", tmp_path / "model.gguf")
    return model, tmp_path / "model.gguf"


@pytest.mark.parametrize(
    "settings",
    [{"scheme": "int8"}, {"scheme": "int4"}, {"scheme": "int4", "group_size": 32}, {"scheme": "int4", "head": "int4"}],
    ids=["int8", "int4 in groups of 128", "int4 in groups of 32", "int4, head too"],
)
def test_codes_go_out_to_gguf_and_come_back_without_a_change(settings, tmp_path):
    model, path = quantised_file(tmp_path, **settings)
    again = open_gguf(path).model
    parts = quantised_parts(again)
    for name, part in quantised_parts(model).items():
        assert torch.equal(parts[name].codes, part.codes), name
        assert torch.equal(parts[name].weight, part.weight), name
    tokens_BT = random_tokens(LLAMA, 2, 9)
    assert torch.equal(logits(again, tokens_BT), logits(model, tokens_BT))


def test_zeros_become_offsets_in_gguf(tmp_path):
    model, path = quantised_file(tmp_path, scheme="int4", symmetric=False)
    ours, theirs = model.layers[0].mlp.up_proj, open_gguf(path).model.layers[0].mlp.up_proj
    assert torch.equal(theirs.codes, ours.codes) and theirs.zeros is None
    # an offset is a float16: a relative error of 2^-11
    assert (theirs.weight - ours.weight).abs().max() <= ours.weight.abs().max() * 2**-10


def test_the_gguf_package_reads_the_weights_that_our_codes_stand_for(tmp_path):
    model, path = quantised_file(tmp_path, scheme="int4")
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    found = tensors["blk.1.ffn_down.weight"]
    assert found.tensor_type == gguf.GGMLQuantizationType.Q4_0
    weight = torch.from_numpy(quants.dequantize(found.data, found.tensor_type))
    assert torch.equal(weight, model.layers[1].mlp.down_proj.weight)
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0


TYPES = ["q4_0", "q4_1", "q8_0"]


@pytest.mark.parametrize(
    ("case", "dtype"), slow_but({*product(["llama"], TYPES), *product(ONE_OF_EACH, ["q4_1"])}, product(sorted(CASES), TYPES))
)
def test_a_file_opened_directly_computes_as_its_import_does(case, dtype, tmp_path):
    folder = write_case(case, tmp_path / "folder")
    export_gguf(folder, tmp_path / "model.gguf", dtype)
    direct = load_model(tmp_path / "model.gguf")
    import_gguf(tmp_path / "model.gguf", tmp_path / "imported")
    imported = load_model(tmp_path / "imported")
    assert bool(quantised_parts(direct))
    tokens_BT = random_tokens(direct.config, 1, 10)
    assert (logits(direct, tokens_BT) - logits(imported, tokens_BT)).abs().max() <= 1e-4


def test_a_quantised_model_is_exported_in_another_type_when_one_is_asked_for(tmp_path):
    model, _ = quantised_file(tmp_path, scheme="int4")
    export_gguf(tmp_path / "folder", tmp_path / "wide.gguf", "f32")
    wide = load_model(tmp_path / "wide.gguf")
    assert not quantised_parts(wide)
    assert torch.equal(wide.layers[0].self_attn.q_proj.weight, model.layers[0].self_attn.q_proj.weight)


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    _, path = quantised_file(tmp_path, scheme="int8")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ArtefactError, match="cut off"):
        load_model(path)


@pytest.mark.peer(name="smollm2")
def test_smollm2_opened_directly_computes_as_its_import_does(tmp_path):
    path = packaged_smollm2()
    opened = open_gguf(path)
    import_gguf(path, tmp_path / "imported")
    kinds = {part.scheme.zero for part in quantised_parts(opened.model).values()}
    assert "offset" in kinds  # Q4_1
    tokens_BT = torch.tensor([opened.tokenizer.encode("The capital of France is")])
    assert torch.equal(logits(opened.model, tokens_BT), logits(load_model(tmp_path / "imported"), tokens_BT))
    assert opened.end_tokens


def test_experts_of_a_gguf_file_keep_their_codes(tmp_path):
    make("mixtral").save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    config = model.config.with_changes(hidden_size=32, moe_intermediate_size=32, intermediate_size=32)
    model, path = quantised_file(tmp_path, config, scheme="int8", group_size=32)
    again = quantised_parts(load_model(path))
    name = "layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(again[name].codes, quantised_parts(model)[name].codes)
