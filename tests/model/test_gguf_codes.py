from __future__ import annotations

import subprocess
import sys
from itertools import product

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader, quants

from bessemer.core.errors import ArtefactError
from bessemer.model.cpu_kernels import library, unavailable
from bessemer.model.cpu_kernels.packed_matmuls import packed_products
from bessemer.model.decoder import Decoder
from bessemer.model.formats import gguf_blocks as gguf_codes
from bessemer.model.formats import gguf_open, packaged_smollm2
from bessemer.model.formats.gguf_blocks import BLOCK_TYPES, dequantise, encode_blocks, encode_values, is_quantised_type
from bessemer.model.formats.gguf_export import export_gguf
from bessemer.model.formats.gguf_import import import_gguf
from bessemer.model.initialisation import empty_decoder, fill, tensor_shapes
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.integers import BLOCK
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.quantisation.quantised_layers import quantised_parts, read_deferred_codes
from bessemer.model.storage.folder import load_model, save_model
from tests.cases import slow, slow_but
from tests.model.family_models import OF_EACH_KIND, make
from tests.model.gguf_models import CASES, write_case
from tests.model.randomised import SHAPES, random_decoder, random_tokens
from tests.model.test_gguf import numbers, rewritten
from tests.model.tokenizers import write_small_tokenizer

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
    again = gguf_open.open_gguf(path).model
    parts = quantised_parts(again)
    for name, part in quantised_parts(model).items():
        assert torch.equal(parts[name].codes, part.codes), name
        assert torch.equal(parts[name].weight, part.weight), name
    tokens_BT = random_tokens(LLAMA, 2, 9)
    assert torch.equal(logits(again, tokens_BT), logits(model, tokens_BT))


def test_zeros_become_offsets_in_gguf(tmp_path):
    model, path = quantised_file(tmp_path, scheme="int4", symmetric=False)
    ours, theirs = model.layers[0].mlp.up_proj, gguf_open.open_gguf(path).model.layers[0].mlp.up_proj
    assert torch.equal(theirs.codes, ours.codes) and "zeros" not in theirs.tensors
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
    ("case", "dtype"), slow_but({*product(["llama"], TYPES), *product(OF_EACH_KIND, ["q4_1"])}, product(sorted(CASES), TYPES))
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
    opened = gguf_open.open_gguf(path)
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


QUANTISED = [number for number, kind in BLOCK_TYPES.items() if is_quantised_type(kind.name)]
each_type = pytest.mark.parametrize("number", QUANTISED, ids=[BLOCK_TYPES[number].name for number in QUANTISED])


def encoded(raw, kind):
    codes = np.empty(len(raw) // kind.bytes * kind.values, np.int8)
    scales = np.empty(len(codes) // BLOCK, np.float32)
    encode_blocks(raw, kind.name, codes, scales)
    return codes, scales


@pytest.mark.parametrize(
    ("number", "compiled"),
    slow_but({*product(QUANTISED, [True]), *product(QUANTISED[::4], [False])}, product(QUANTISED, [True, False])),
    ids=[f"{BLOCK_TYPES[number].name}-{how}" for number, how in product(QUANTISED, ["kernels", "numpy"])],
)
def test_blocks_are_encoded_in_the_nearest_codes_of_8_bits(number, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(gguf_codes, "library", lambda: None)
    elif library() is None:
        pytest.skip(unavailable())
    kind = BLOCK_TYPES[number]
    raw = numbers(kind, np.random.default_rng(number), blocks=4000)
    if kind.name == "MXFP4":
        raw.view(kind.layout)["e"] -= 30  # within float16
    values = dequantise(raw, kind)
    codes, scales = encoded(raw, kind)
    assert all(map(np.array_equal, (codes, scales), encode_values(values)))
    most = np.abs(values.reshape(-1, BLOCK)).max(1)
    errors = np.abs(values.reshape(-1, BLOCK) - codes.reshape(-1, BLOCK) * scales[:, None]).max(1)
    # half a step, and a scale that float16 holds
    assert (errors <= most * (0.5 / 127 + 2**-11) + 127 * 2**-25).all()


def test_a_group_that_is_not_finite_has_a_scale_that_shows_it():
    raw = numbers(BLOCK_TYPES[12], np.random.default_rng(0), blocks=3)
    raw.view(BLOCK_TYPES[12].layout)["d"][1] = np.inf
    shown = np.isnan(encoded(raw, BLOCK_TYPES[12])[1]).reshape(3, 8)
    assert shown.any(1).tolist() == [False, True, False]


WIDE = LLAMA.with_changes(hidden_size=256, head_dim=64, intermediate_size=512)


def in_types(tmp_path, model, most=12, others=14):
    """A file as llama.cpp's Q4_K_M is: random blocks, some matrices in Q6_K; or in other types, by llama.cpp's numbers."""
    save_model(model, tmp_path / "folder", tokenizer=None)
    export_gguf(tmp_path / "folder", tmp_path / "wide.gguf", "f16")
    draws = np.random.default_rng(0)

    def blocks_of(tensor, number):
        kind = BLOCK_TYPES[number]
        raw = numbers(kind, draws, blocks=tensor.size // kind.values)
        for name in {"d", "m"} & set(kind.layout.names):
            raw.view(kind.layout)[name] *= 1e-3 if kind.values > 32 else 1e-2
        if kind.name == "MXFP4":
            raw.view(kind.layout)["e"] -= 30  # within float16
        return raw.reshape(len(tensor), -1), gguf.GGMLQuantizationType(number)

    def change(tensors):
        for name, (tensor, _) in tensors.items():
            if tensor.ndim == 2:
                tensors[name] = blocks_of(tensor, others if name.endswith(("ffn_down.weight", "token_embd.weight")) else most)

    rewritten(tmp_path / "wide.gguf", tmp_path / "model.gguf", change_tensors=change)
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_file_in_k_types_is_opened_with_its_own_blocks_and_has_the_logits_of_transformers(tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    path = in_types(tmp_path, random_decoder(WIDE.with_changes(tie_word_embeddings=tied)))
    opened = gguf_open.open_gguf(path)
    assert opened.encoded is None
    assert {part.scheme.kind for part in quantised_parts(opened.model).values()} == {"Q4_K", "Q6_K"}
    tokens_BT = random_tokens(WIDE, 2, 9)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    expected = logits(lambda tokens_BT: theirs(tokens_BT).logits, tokens_BT)
    torch.testing.assert_close(logits(opened.model, tokens_BT), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "number", [6, 7, 12, 13, 14, 20, 23, 39], ids=["Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"]
)
def test_blocks_of_a_file_go_through_the_engines_pack_and_out_to_gguf_again_without_a_change(number, tmp_path):
    path = in_types(tmp_path, random_decoder(WIDE), number, number)
    model = load_model(path)
    before = {name: part.codes.clone() for name, part in quantised_parts(model).items()}
    if library() is not None:
        matmuls = packed_products(model, 1, release=True)
        assert matmuls.products and all(part.is_released for part in matmuls.products)
    save_model(model, tmp_path / "again", tokenizer=None)
    export_gguf(tmp_path / "again", tmp_path / "again.gguf")
    again = quantised_parts(load_model(tmp_path / "again.gguf"))
    assert before and all(torch.equal(again[name].codes, codes) for name, codes in before.items())


@pytest.mark.skipif(library() is None, reason=str(unavailable()))
@pytest.mark.parametrize("number", [2, 3, 8, 12], ids=["Q4_0", "Q4_1", "Q8_0", "Q4_K"])
def test_codes_that_stay_in_the_file_until_they_are_packed_are_the_same(number, tmp_path):
    path = in_types(tmp_path, random_decoder(WIDE), number, number)
    at_once = gguf_open.open_gguf(path).model
    expected = {name: part.stored for name, part in quantised_parts(at_once).items()}

    def opened() -> Decoder:
        model = gguf_open.open_gguf(path, deferred=True).model
        parts = quantised_parts(model)
        later = {name for name, part in parts.items() if part.deferred is not None}
        # blocks of K types lie in the file as they are kept, but for rows in another order
        assert later == {name for name in expected if number != 12 or name.endswith(("q_proj", "k_proj"))}
        assert not any(parts[name].tensors or parts[name].is_released for name in later)
        return model

    def check(model: Decoder) -> None:
        for name, part in quantised_parts(model).items():
            for tensor, codes in expected[name].tensors.items():
                assert torch.equal(part.stored.tensors[tensor], codes), (name, tensor)

    model, hidden = opened(), torch.randn(3, WIDE.hidden_size)
    check(model)
    # rows of an embedding, and a model's own modules
    tokens_BT = random_tokens(WIDE, 2, 5)
    assert torch.equal(model.embed_tokens(tokens_BT), at_once.embed_tokens(tokens_BT))
    assert torch.equal(logits(model, tokens_BT), logits(at_once, tokens_BT))
    # packed: the same products, and the codes come back from the packed copy
    packed, before = packed_products(model, 1, release=True), packed_products(at_once, 1)
    assert len(packed.products) == len(before.products) > 1
    for mine, other in zip(packed.products.items(), before.products.items(), strict=True):
        (layer, product), (_, known) = mine, other
        x = hidden if layer.in_features == WIDE.hidden_size else torch.randn(3, layer.in_features)
        assert layer.is_released and torch.equal(product(x), known(x))
    check(model)
    # read at last, moved to another type, and written
    for change in (read_deferred_codes, lambda model: model.to(torch.float16), lambda model: model.state_dict()):
        model = opened()
        change(model)
        assert not any(part.deferred is not None for part in quantised_parts(model).values())
        check(model)


@pytest.mark.parametrize("number", [10, 11, 40], ids=["Q2_K", "Q3_K", "NVFP4"])
def test_a_file_in_a_type_without_a_scheme_is_opened_in_codes_of_8_bits_and_says_so(number, tmp_path):
    path = in_types(tmp_path, random_decoder(WIDE), number, number)
    opened = gguf_open.open_gguf(path)
    import_gguf(path, tmp_path / "imported")
    exact = load_model(tmp_path / "imported").state_dict()
    for name, part in quantised_parts(opened.model).items():
        assert part.scheme.bits == 8
        weight = exact[f"{name}.weight"]
        assert (part.weight - weight).abs().max() <= weight.abs().max() * 0.005, name
    assert opened.encoded.startswith(f"{len(quantised_parts(opened.model))} matrices are held in codes of 8 bits (")


def test_a_setting_that_names_the_scheme_of_files_is_refused():
    with pytest.raises(ValueError, match="gguf is what GGUF files hold; to make one: bessemer export"):
        QuantizeConfig(scheme="gguf")


def test_a_model_that_does_not_fit_into_memory_is_refused_before_a_tensor_is_read(tmp_path, monkeypatch):
    path = in_types(tmp_path, random_decoder(WIDE))
    monkeypatch.setattr(gguf_open, "free_memory_bytes", lambda: 400_000)
    monkeypatch.setattr(gguf_open.GgufFile, "read_codes", None)
    with pytest.raises(ArtefactError, match=r"opened it takes 0\.0 GB of memory, and 0\.0 GB are free"):
        load_model(path)


_PEAK = """
import sys
from pathlib import Path
from bessemer.core.environment import peak_memory_bytes, reset_peak_memory
from bessemer.inference.engine import Engine, EngineConfig
from bessemer.tokenization.tokenizer import load_tokenizer
tokenizer, *files = map(Path, sys.argv[1:])
for file in files:  # the first brings in what is imported on the way
    reset_peak_memory()
    before = peak_memory_bytes()
    engine = Engine(file, load_tokenizer(tokenizer), config=EngineConfig(kv_memory=0.002))
print(peak_memory_bytes() - before)
"""


@pytest.mark.parametrize("form", [slow("K types"), slow("q8_0"), slow("q4_0")])
def test_opening_a_file_takes_little_more_memory_than_its_codes(form, tmp_path):
    if library() is None:
        pytest.skip(unavailable())
    config = WIDE.with_changes(hidden_size=1024, head_dim=256, intermediate_size=2048, vocab_size=16_000)
    shapes = tensor_shapes(config)
    zeros = fill(empty_decoder(config), {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()})
    path, small = in_types(tmp_path, zeros), in_types(tmp_path / "small", random_decoder(WIDE))
    if form != "K types":
        export_gguf(tmp_path / "folder", path, form)
    write_small_tokenizer(tmp_path / "tokenizer")
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, tmp_path / "tokenizer", small, path], capture_output=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == 0, done.stderr
    codes = path.stat().st_size
    assert codes < int(done.stdout) < 2 * codes + 5e6
