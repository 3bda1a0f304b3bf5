"""GGUF in K mixtures: encoding, importance matrices, types of tensors, adapters; beside llama.cpp where it is installed."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import quants

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.progress import Silent
from bessemer.model.adapters.folder import read_adapter, write_adapter
from bessemer.model.config import ModelConfig
from bessemer.model.formats.gguf_adapter import export_adapter
from bessemer.model.formats.gguf_blocks import BLOCK_TYPES, dequantise
from bessemer.model.formats.gguf_export import as_llama_cpp, export_gguf
from bessemer.model.formats.gguf_imatrix import (
    Entry,
    ImportanceMatrix,
    compute_importance,
    matrices_of,
    read_importance,
    write_importance,
)
from bessemer.model.formats.gguf_mixtures import GGUF_DTYPES, TensorTypes
from bessemer.model.formats.gguf_quantise import quantise_rows
from bessemer.model.storage.folder import load_model, save_model
from bessemer.tokenization.formats.gguf_metadata import read_head
from tests.model.gguf_models import write_case
from tests.model.random_adapters import random_adapter
from tests.model.randomised import SHAPES, random_decoder

BLOCKS = {kind.name: (number, kind) for number, kind in BLOCK_TYPES.items()}
#: Rows of 256, so that all types fit.
WIDE = ModelConfig(
    vocab_size=64,
    hidden_size=256,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=256,
    max_position_embeddings=64,
    model_type="llama",
    qk_norm="none",
)


def values(rows=32, inputs=512):
    """Weights with heavy tails, a row of zeros, a block of zeros, a row without negative values."""
    rng = np.random.default_rng(0)
    drawn = (rng.standard_t(5, size=(rows, inputs)) * 0.03).astype(np.float32)
    drawn[3], drawn[4, :256], drawn[5] = 0, 0, np.abs(drawn[5])
    return drawn, rng.gamma(0.7, size=inputs).astype(np.float32)


def decoded(raw, kind, like):
    return dequantise(raw.tobytes(), BLOCKS[kind][1]).reshape(like.shape)


@pytest.mark.parametrize(("kind", "bits", "group"), [("Q4_K", 4, 32), ("Q5_K", 5, 32), ("Q6_K", 6, 16)])
def test_k_types_lose_less_than_plain_rounding_and_are_read_by_the_gguf_package(kind, bits, group):
    weights, _ = values()
    raw = quantise_rows(weights, kind)
    ours = decoded(raw, kind, weights)
    theirs = quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(ours, theirs.reshape(weights.shape))
    parts = weights.reshape(-1, group)
    # evenly spaced values from a part's least to its largest (of Q6_K around zero), with exact scales: a fitted one is as good
    low, high = np.minimum(parts.min(1), 0)[:, None], parts.max(1)[:, None]
    if kind == "Q6_K":
        high = np.abs(parts).max(1)[:, None]
        low = -high
    step = np.where(high > low, (high - low) / (2**bits - 1), 1)
    plain = np.rint((parts - low) / step) * step + low
    assert not ours[3].any() and not ours[4, :256].any()
    assert ((ours - weights) ** 2).sum() < 1.05 * ((plain - parts) ** 2).sum()


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_codes_chosen_by_importance_lose_less_where_it_counts(kind):
    weights, importance_K = values()
    errors = [
        float((importance_K * (decoded(quantise_rows(weights, kind, used), kind, weights) - weights) ** 2).sum())
        for used in (importance_K, None)
    ]
    assert errors[0] < errors[1]


def llama_cpp_library():
    """The function of llama.cpp that encodes rows; skips where it is not installed."""
    spec = importlib.util.find_spec("llama_cpp")
    found = sorted(Path(spec.origin).parent.glob("lib/libggml-base.*")) if spec and spec.origin else []
    if not found:
        pytest.skip("llama-cpp-python is not installed")
    encode = ctypes.CDLL(str(found[0])).ggml_quantize_chunk
    encode.restype = ctypes.c_size_t
    encode.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return encode


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("weighed", [False, True])
def test_blocks_are_those_of_llama_cpp(kind, weighed):
    """But for ties of rounding, where sums are taken in another order: the error is then the same."""
    encode = llama_cpp_library()
    weights, importance_K = values()
    number, block = BLOCKS[kind]
    expected = np.zeros((len(weights), weights.shape[1] // block.values * block.bytes), np.uint8)
    given = importance_K.ctypes.data if weighed else None
    encode(number, weights.ctypes.data, expected.ctypes.data, 0, *weights.shape, given)
    ours = quantise_rows(weights, kind, importance_K if weighed else None)
    equal = (ours.reshape(-1, block.bytes) == expected.reshape(-1, block.bytes)).all(1)
    assert equal.mean() > 0.9
    error, theirs = (
        float(((importance_K if weighed else 1) * (decoded(raw, kind, weights) - weights) ** 2).sum())
        for raw in (ours, expected)
    )
    assert error == pytest.approx(theirs, rel=5e-3)


# ---------------------------------------------------------------------------------------------------------- mixtures


def test_a_mixture_gives_more_bits_to_values_and_second_matrices_of_some_layers():
    """As `llama-quantize` counts them, for 8 layers: the first eighth, the last eighth, and every third between."""
    medium, small = (TensorTypes(GGUF_DTYPES[name], 8, is_tied=False) for name in ("q4_k_m", "q4_k_s"))
    shape = (64, 256)
    finer = [layer for layer in range(8) if medium.of(f"blk.{layer}.ffn_down.weight", shape)[0] == "Q6_K"]
    assert finer == [0, 3, 6, 7] == [layer for layer in range(8) if medium.of(f"blk.{layer}.attn_v.weight", shape)[0] == "Q6_K"]
    assert [layer for layer in range(8) if small.of(f"blk.{layer}.attn_v.weight", shape)[0] == "Q5_K"] == [0, 1, 2, 3]
    assert [layer for layer in range(8) if small.of(f"blk.{layer}.ffn_down.weight", shape)[0] == "Q5_K"] == [0]
    assert medium.of("blk.1.attn_q.weight", shape) == ("Q4_K", None)
    assert medium.of("output.weight", shape)[0] == "Q6_K" and medium.of("token_embd.weight", shape)[0] == "Q4_K"
    assert medium.of("blk.1.attn_q.weight", (64, 96)) == ("Q5_0", "Q4_K")
    assert medium.of("blk.1.attn_norm.weight", (256,))[0] == "F32"
    tied = TensorTypes(GGUF_DTYPES["q4_k_m"], 8, is_tied=True)
    assert tied.of("token_embd.weight", shape)[0] == "Q6_K" and tied.of("token_embd.weight", (64, 96))[0] == "Q8_0"


@pytest.mark.parametrize("dtype", ["q4_k_m", "q4_k_s", "q5_k_m", "q6_k"])
def test_an_export_has_the_types_that_llama_cpp_gives_the_same_file(dtype, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    save_model(random_decoder(WIDE), tmp_path / "model", tokenizer=None)
    export_gguf(tmp_path / "model", tmp_path / "f32.gguf", "f32")
    export_gguf(tmp_path / "model", tmp_path / "ours.gguf", dtype)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = GGUF_DTYPES[dtype].file_type, 1
    paths = [str(tmp_path / name).encode() for name in ("f32.gguf", "theirs.gguf")]
    if llama_cpp.llama_model_quantize(*paths, ctypes.byref(params)):
        pytest.skip("llama.cpp does not read a file without a tokenizer")
    ours, theirs = ({info.name: info.type for info in read_head(tmp_path / f"{name}.gguf")[1]} for name in ("ours", "theirs"))
    assert ours == theirs


def test_a_mixture_is_read_back_near_the_model(tmp_path):
    """A random model of eight layers amplifies errors of rounding more than a trained one."""
    model, tokens = random_decoder(WIDE), torch.arange(24)[None]
    save_model(model, tmp_path / "model", tokenizer=None)
    for dtype, least in (("q4_k_m", 0.9), ("q6_k", 0.99)):
        notes = export_gguf(tmp_path / "model", tmp_path / f"{dtype}.gguf", dtype)
        assert not any("multiple" in note for note in notes)
        with torch.no_grad():
            logits = [one.float()(tokens).flatten() for one in (model, load_model(tmp_path / f"{dtype}.gguf"))]
        assert torch.nn.functional.cosine_similarity(*logits, dim=0) > least


# -------------------------------------------------------------------------------------------------------- importance


def importance_of(model, folder, tokens=None):
    _, family, _ = as_llama_cpp(model.config, folder)
    rows = (
        torch.randint(model.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(0))
        if tokens is None
        else tokens
    )
    return compute_importance(model, family, rows, dataset="text", progress=Silent()), family


def test_importance_is_the_mean_square_of_what_a_weight_reads(tmp_path):
    save_model(random_decoder(WIDE), tmp_path / "model", tokenizer=None)
    model, rows = load_model(tmp_path / "model"), torch.arange(48).view(3, 16)
    seen = []
    model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].flatten(0, -2)))
    with torch.no_grad():
        model(rows)
    inputs = torch.cat(seen)
    seen.clear()
    matrix, _ = importance_of(model, tmp_path / "model", rows)
    found = matrix.of("blk.2.ffn_down.weight", 1, 256)
    assert found is not None and np.allclose(found[0], inputs.square().mean(0).numpy(), rtol=1e-4)
    assert "token_embd.weight" not in matrix.entries and len(matrix.entries) == 8 * 7
    assert np.array_equal(matrix.of("blk.2.attn_q.weight", 1, 256), matrix.of("blk.2.attn_k.weight", 1, 256))


@pytest.mark.parametrize("name", ["x.gguf", "x.dat"])
def test_both_formats_give_an_importance_matrix_back(name, tmp_path):
    entries = {
        "blk.0.ffn_down.weight": Entry(np.array([[4.0, 8.0]], np.float32), np.array([2.0], np.float32)),
        "blk.0.ffn_up_exps.weight": Entry(np.array([[3.0, 6.0], [0.0, 0.0]], np.float32), np.array([3.0, 0.0], np.float32)),
    }
    write_importance(ImportanceMatrix(entries, ("text",), 5, 16), tmp_path / name)
    back = read_importance(tmp_path / name, {"blk.0.ffn_up_exps.weight": 2})
    assert back.of("blk.0.ffn_down.weight", 1, 2).tolist() == [[2.0, 4.0]]
    assert back.of("blk.0.ffn_up_exps.weight", 2, 2).tolist() == [[1.0, 2.0], [1.0, 1.0]], "an expert without tokens weighs 1"
    assert (back.datasets, back.chunks) == (("text",), 5)
    assert back.of("blk.1.ffn_down.weight", 1, 2) is None
    with pytest.raises(ArtefactError, match="it is of another model"):
        back.of("blk.0.ffn_down.weight", 1, 3)
    if name.endswith("gguf"):
        reader = gguf.GGUFReader(tmp_path / name)
        assert {tensor.name: tuple(tensor.shape) for tensor in reader.tensors} == {
            "blk.0.ffn_down.weight.in_sum2": (2, 1),
            "blk.0.ffn_down.weight.counts": (1, 1),
            "blk.0.ffn_up_exps.weight.in_sum2": (2, 2),
            "blk.0.ffn_up_exps.weight.counts": (1, 2),
        }
        assert reader.fields["general.type"].contents() == "imatrix" and "general.architecture" not in reader.fields


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\x01\x00\x00\x00\x03\x00\x00\x00abc", b"x" * 64])
def test_a_damaged_importance_matrix_is_one_line(content, tmp_path):
    (tmp_path / "x.dat").write_bytes(content)
    with pytest.raises(ArtefactError) as refused:
        read_importance(tmp_path / "x.dat", {})
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_an_export_by_importance_loses_less_of_what_the_model_computes(tmp_path):
    """Some channels are a hundred times as strong as others, as in trained models."""
    decoder = random_decoder(WIDE)
    with torch.no_grad():
        for block in decoder.layers:
            block.post_attention_layernorm.weight[::16] *= 20
    save_model(decoder, tmp_path / "model", tokenizer=None)
    model = load_model(tmp_path / "model")
    matrix, _ = importance_of(model, tmp_path / "model")
    errors = {}
    for name, importance in (("plain", None), ("weighed", matrix)):
        notes = export_gguf(tmp_path / "model", tmp_path / f"{name}.gguf", "q4_k_s", importance=importance)
        weight = load_model(tmp_path / f"{name}.gguf").layers[1].mlp.up_proj.weight.float()
        change = weight - model.layers[1].mlp.up_proj.weight
        used = torch.from_numpy(matrix.of("blk.1.ffn_up.weight", 1, 256)[0])
        errors[name] = float((used * change.square()).sum())
    assert any("codes of 56 tensors are chosen by the importance" in note for note in notes)
    assert errors["weighed"] < 0.9 * errors["plain"]


def test_experts_have_an_importance_each(tmp_path):
    folder = write_case("qwen3_moe", tmp_path)
    model = load_model(folder)
    matrix, family = importance_of(model, folder)
    counts = matrices_of(as_llama_cpp(model.config, folder)[0], family)
    names = [name for name in matrix.entries if "_exps" in name]
    assert names and all(len(matrix.entries[name].counts_E) == counts[name] > 1 for name in names)


# ----------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("shape", ["llama", "grouped"])
def test_an_adapter_file_is_the_update_of_the_bases_file(shape, tmp_path):
    """B A of the file, added to the base's file, is the merged model's file: rows turned for rotary pairs included."""
    model = random_decoder(WIDE if shape == "llama" else SHAPES["grouped"])
    save_model(model, tmp_path / "model", tokenizer=None)
    model = load_model(tmp_path / "model")
    write_adapter(random_adapter(model), model, tmp_path / "adapter")
    notes = export_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "lora.gguf")
    assert "--lora lora.gguf" in notes[0]
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    fields = {name: reader.fields[name].contents() for name in ("general.type", "adapter.type", "general.architecture")}
    assert fields == {
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.architecture": "llama" if shape == "llama" else "qwen3",
    }
    alpha = reader.fields["adapter.lora.alpha"].contents()
    parts = {tensor.name: tensor.data for tensor in reader.tensors}
    adapter = read_adapter(tmp_path / "adapter", model)
    with torch.no_grad():
        for name, update in adapter.updates.items():
            model.get_submodule(name).weight.copy_(update.on(model.get_submodule(name).weight))
    export_gguf(tmp_path / "model", tmp_path / "base.gguf", "f32")
    save_model(model, tmp_path / "merged", tokenizer=None)
    export_gguf(tmp_path / "merged", tmp_path / "merged.gguf", "f32")
    base, merged = ({t.name: t.data for t in gguf.GGUFReader(tmp_path / f"{n}.gguf").tensors} for n in ("base", "merged"))
    changed = {name.rpartition(".lora_")[0] for name in parts}
    assert {name for name in base if not np.array_equal(base[name], merged[name])} == changed
    for name in changed:
        down, up = parts[f"{name}.lora_a"], parts[f"{name}.lora_b"]
        np.testing.assert_allclose(base[name] + alpha / up.shape[1] * up @ down, merged[name], rtol=1e-4, atol=1e-5)


def test_an_adapter_that_llama_cpp_cannot_hold_is_refused(tmp_path):
    model = random_decoder(SHAPES["grouped"])
    save_model(model, tmp_path / "model", tokenizer=None)
    model = load_model(tmp_path / "model")
    write_adapter(random_adapter(model, magnitudes=True), model, tmp_path / "dora")
    with pytest.raises(ArtefactError, match="DoRA's magnitudes have no place"):
        export_adapter(tmp_path / "model", tmp_path / "dora", tmp_path / "lora.gguf")
    with pytest.raises(ConfigError, match="an adapter is written in f32 or f16, not 'q8_0'"):
        export_adapter(tmp_path / "model", tmp_path / "dora", tmp_path / "lora.gguf", "q8_0")
