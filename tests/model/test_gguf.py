from __future__ import annotations

import resource
import struct
import sys

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bessemer.core.errors import ArtefactError, BessemerError, ConfigError
from bessemer.core.store import read_json
from bessemer.model.families import FAMILIES
from bessemer.model.formats import find_model
from bessemer.model.formats.gguf_blocks import BLOCK_TYPES, dequantise
from bessemer.model.formats.gguf_export import GGUF_DTYPES, export_gguf
from bessemer.model.formats.gguf_families import BY_MODEL_TYPE
from bessemer.model.formats.gguf_import import import_gguf
from bessemer.model.formats.gguf_open import open_gguf
from bessemer.model.storage.folder import load_model, save_model
from bessemer.model.storage.model_config import read_end_tokens
from bessemer.tokenization.formats.gguf_metadata import read_head
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.cases import slow_but
from tests.model.gguf_fuzz import changed_files
from tests.model.gguf_models import CASES, write_case
from tests.model.randomised import SHAPES, random_decoder

#: What a file does not say, because it is of training alone.
TRAINING = {"bos_token_id": None, "eos_token_id": None, "router_aux_loss_coef": 0.0}


def numbers(kind, rng, blocks):
    """Random blocks whose scales are finite numbers."""
    raw = rng.integers(0, 256, blocks * kind.bytes, dtype=np.uint8)
    fields = raw.view(kind.layout)
    for name in kind.layout.names:
        if kind.layout[name] in (np.dtype("<f2"), np.dtype("<f4")):
            fields[name] = rng.normal(size=blocks)
    if kind.name == "BF16":
        fields["d"] &= 0xBFFF  # below 2, so no infinities
    if kind.name == "MXFP4":
        fields["e"] = rng.integers(100, 150, blocks)
    if kind.name == "NVFP4":
        fields["e"] = rng.integers(40, 80, (blocks, 4))
    if kind.name == "IQ1_M":
        fields["scales"][:, 7] &= 0x3F  # the exponent of the scale, which lies in the highest bits of four numbers
    return raw


@pytest.mark.parametrize("number", BLOCK_TYPES, ids=[kind.name for kind in BLOCK_TYPES.values()])
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_blocks_are_decoded_as_by_the_gguf_package(number, seed):
    kind, name = BLOCK_TYPES[number], gguf.GGMLQuantizationType(number)
    assert (kind.name, (kind.values, kind.bytes)) == (name.name, gguf.GGML_QUANT_SIZES[name])
    raw = numbers(kind, np.random.default_rng(seed), blocks=12)
    plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    expected = raw.view(plain).astype(np.float32) if plain else quants.dequantize(raw, name)
    assert np.array_equal(dequantise(raw.tobytes(), kind), expected)


def test_blocks_made_by_hand():
    half = np.array(0.5, "<f2").tobytes()
    q4_0 = half + bytes([0xF0, 0x08] + [0x88] * 14)  # value i in the low half of byte i, i + 16 in the high half
    expected = np.zeros(32)
    expected[[0, 16, 1, 17]] = [0.5 * (0 - 8), 0.5 * (15 - 8), 0.5 * (8 - 8), 0.5 * (0 - 8)]
    assert np.array_equal(dequantise(q4_0, BLOCK_TYPES[2]), expected)
    scales = bytes([1, 2, 3, 0xC4, 5, 6, 7, 0x48, 0x21, 0x43, 0x65, 0x87])
    q4_k = half + half + scales + bytes(128)  # all q are 0: minus m times each part's minimum
    minima = [5, 6, 7, 8, 2, 4, 6, 8 + (1 << 4)]
    assert np.array_equal(dequantise(q4_k, BLOCK_TYPES[12]).reshape(8, 32)[:, 0], [-0.5 * minimum for minimum in minima])


@pytest.fixture(scope="module", params=sorted(CASES))
def written(request, tmp_path_factory):
    """A family's folder and its GGUF file."""
    folder = write_case(request.param, tmp_path_factory.mktemp("folder"))
    path = folder.parent / f"{folder.name}.gguf"
    export_gguf(folder, path)
    return folder, path


@pytest.mark.parametrize("written", slow_but([case for case in CASES if "-" not in case], sorted(CASES)), indirect=True)
def test_a_family_comes_back_as_it_went_out(written, tmp_path):
    folder, path = written
    import_gguf(path, tmp_path / "back")
    ours, back = load_model(folder), load_model(tmp_path / "back")
    tokens_BT = torch.randint(3, 250, (2, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert (ours(tokens_BT) - back(tokens_BT)).abs().max() < 1e-5
    assert ours.state_dict().keys() == back.state_dict().keys()
    for name, tensor in back.state_dict().items():
        assert (tensor - ours.state_dict()[name]).abs().max() <= 1e-6, name  # Gemma's norms go out with 1 added
    if ours.config.model_type != "mistral":  # whose window llama.cpp has not
        assert back.config.with_changes(**TRAINING) == ours.config.with_changes(**TRAINING)
    assert load_tokenizer(tmp_path / "back").encode("in the theatre") == load_tokenizer(folder).encode("in the theatre")


def stored_tensor(path, name):
    return next(torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)


def test_tensors_lie_as_llama_cpp_reads_them(tmp_path):
    """Rotary pairs side by side in llama, Gemma's norms with 1 added, DeepSeek's latent cut into keys and values."""
    for case in ("llama", "gemma3", "deepseek_v3"):
        export_gguf(write_case(case, tmp_path / case), tmp_path / f"{case}.gguf")
    ours = load_model(tmp_path / "llama").state_dict()["layers.1.self_attn.k_proj.weight"].view(2, 8, 32)
    theirs = stored_tensor(tmp_path / "llama.gguf", "blk.1.attn_k.weight").view(2, 8, 32)
    assert all(torch.equal(theirs[:, 2 * pair + half], ours[:, pair + 4 * half]) for pair in range(4) for half in (0, 1))
    norm = load_model(tmp_path / "gemma3").state_dict()["layers.2.self_attn.q_norm.weight"]
    assert torch.equal(stored_tensor(tmp_path / "gemma3.gguf", "blk.2.attn_q_norm.weight"), norm + 1)
    both = load_model(tmp_path / "deepseek_v3").state_dict()["layers.1.self_attn.kv_b_proj.weight"].view(4, 8 + 12, 16)
    assert torch.equal(stored_tensor(tmp_path / "deepseek_v3.gguf", "blk.1.attn_k_b.weight"), both[:, :8].transpose(1, 2))
    assert torch.equal(stored_tensor(tmp_path / "deepseek_v3.gguf", "blk.1.attn_v_b.weight"), both[:, 8:])


def test_a_name_is_not_taken_for_that_of_phi3(tmp_path):
    """llama.cpp opens no model whose name has `phi3` or `phi-3` in it and whose vocabulary lacks that model's tokens."""
    for name, written_as in (("my-Phi-3-tuned", "my-Phi 3-tuned"), ("phi3", "phi 3"), ("phi-4", "phi-4")):
        export_gguf(write_case("llama", tmp_path / name), tmp_path / f"{name}.gguf")
        assert gguf.GGUFReader(tmp_path / f"{name}.gguf").get_field("general.name").contents() == written_as


@pytest.mark.peer(name="llama-cpp")
def test_llama_cpp_computes_the_same_of_every_family(written):
    """Log-probabilities of the whole vocabulary; GELU is looked up in a half-precision table there."""
    from benchmarks.llama_cpp_models import LlamaCpp

    folder, path = written
    ours = load_model(folder)
    server = LlamaCpp(path, context=64)
    for length in (1, 7, 30):
        tokens = torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        with torch.no_grad():
            expected = ours(torch.tensor([tokens]))[0, -1].log_softmax(-1)
        difference = (torch.tensor(server.log_probs(tokens)) - expected).abs().max()
        assert difference < (1e-2 if ours.config.hidden_act.startswith("gelu") else 1e-4)


def test_every_family_is_tested_or_refused_by_name(tmp_path):
    assert {case.split("-")[0].replace("gemma3", "gemma3_text") for case in CASES} == set(BY_MODEL_TYPE)
    from tests.model.family_models import make

    assert set(FAMILIES) - set(BY_MODEL_TYPE) == {"glm", "llama4_text", "qwen3_next", "bessemer"}
    make("qwen3_next").save_pretrained(tmp_path)
    with pytest.raises(
        ArtefactError,
        match="a qwen3_next model cannot be exported to GGUF; families that can: llama, mistral",
    ):
        export_gguf(tmp_path, tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("case", "changes", "setting"),
    [
        ("llama-dynamic-rope", {}, "rope_scaling"),
        ("qwen2-windows", {}, "layer_types, sliding_window"),
        ("qwen3-yarn", {}, "attention_bias"),
        ("qwen3_moe-unnormed", {}, "norm_topk_prob"),
        ("qwen3_moe", {}, "mlp_only_layers"),
        ("smollm3", {}, "no_rope_layers"),
        ("olmo2", {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ("gemma3", {}, "query_pre_attn_scalar, layer_types"),
        ("gpt_oss", {}, "swiglu_limit"),
        ("deepseek_v3", {}, "rope_scaling"),
        ("deepseek_v3-plain-query", {}, "latent query"),
    ],
)
def test_settings_that_llama_cpp_has_no_place_for_are_named(case, changes, setting, tmp_path):
    from tests.model.family_models import make

    make(case, **changes).save_pretrained(tmp_path)
    with pytest.raises(ArtefactError) as caught:
        export_gguf(tmp_path, tmp_path / "x.gguf")
    assert all(part in str(caught.value) for part in setting.split(", ")) and not (tmp_path / "x.gguf").exists()


@pytest.fixture
def qwen(tmp_path):
    """A folder of a Qwen3 without a tokenizer, its rows whole blocks, and its file."""
    save_model(random_decoder(SHAPES["grouped"]), tmp_path / "model", tokenizer=None)
    export_gguf(tmp_path / "model", tmp_path / "x.gguf")
    return tmp_path / "model", tmp_path / "x.gguf"


@pytest.mark.parametrize(("dtype", "most"), [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 7e-3), ("q4_0", 0.13), ("q4_1", 0.08)])
def test_a_file_of_each_type_is_near_the_model(qwen, dtype, most, tmp_path):
    """most: the relative error of all matrices together. Blocks are as the `gguf` package makes them."""
    folder, _ = qwen
    export_gguf(folder, tmp_path / "typed.gguf", dtype)
    kinds = {info.name: BLOCK_TYPES[info.type].name for info in read_head(tmp_path / "typed.gguf")[1]}
    asked = GGUF_DTYPES[dtype]
    assert kinds["blk.0.ffn_up.weight"] == asked.matrices and kinds["token_embd.weight"] == asked.embedding
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    import_gguf(tmp_path / "typed.gguf", tmp_path / "back")
    ours, back = load_model(folder), load_model(tmp_path / "back")
    assert back.head_weight.dtype == {"f16": torch.float16, "bf16": torch.bfloat16}.get(dtype, torch.float32)
    name = "layers.1.mlp.down_proj.weight"
    error = (back.state_dict()[name] - ours.state_dict()[name]).norm() / ours.state_dict()[name].norm()
    assert 0 < error < most
    weights = gguf.GGUFReader(tmp_path / "typed.gguf").tensors
    stored = next(tensor for tensor in weights if tensor.name == "blk.1.ffn_down.weight")
    expected = quants.dequantize(stored.data, stored.tensor_type)
    assert np.array_equal(back.state_dict()[name].float().numpy(), expected)


def test_rows_that_are_no_whole_blocks_stay_halves(tmp_path):
    save_model(random_decoder(SHAPES["multi-head, untied"]), tmp_path / "m", tokenizer=None)
    notes = export_gguf(tmp_path / "m", tmp_path / "x.gguf", "q4_0")
    assert any("16 tensors have rows that are no multiple of 32 and are kept in F16" in note for note in notes), notes


def test_half_precision_that_overflows_is_named(tmp_path):
    model = random_decoder(SHAPES["grouped"])
    with torch.no_grad():
        model.embed_tokens.weight[3, 3] = 1e5
    save_model(model, tmp_path / "m", tokenizer=None)
    with pytest.raises(
        ArtefactError, match=r"'token_embd.weight' holds values that half precision cannot; choose --dtype bf16"
    ):
        export_gguf(tmp_path / "m", tmp_path / "x.gguf", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_type_that_is_not_known_is_named(qwen, tmp_path):
    with pytest.raises(ConfigError, match=r"--dtype: there is no 'q4'; did you mean 'q4_\d'"):
        export_gguf(qwen[0], tmp_path / "y.gguf", "q4")


def test_the_embedding_may_have_more_rows_than_there_are_tokens(tmp_path):
    case, _ = CASES["llama"]
    from tests.model.family_models import make
    from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

    make(case, vocab_size=VOCAB_SIZE + 9).save_pretrained(tmp_path / "m")
    write_small_tokenizer(tmp_path / "m")
    export_gguf(tmp_path / "m", tmp_path / "x.gguf")
    assert len(read_head(tmp_path / "x.gguf")[0]["tokenizer.ggml.tokens"]) == VOCAB_SIZE + 9
    import_gguf(tmp_path / "x.gguf", tmp_path / "back")
    assert load_model(tmp_path / "back").config.vocab_size == VOCAB_SIZE + 9


def rewritten(path, out, change_keys=lambda keys: None, change_tensors=lambda tensors: None, **writing):
    """A copy of a file with other keys or tensors. writing: options of the writer."""
    keys, _ = read_head(path)
    tensors = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}
    change_keys(keys)
    change_tensors(tensors)
    writer = gguf.GGUFWriter(out, keys.pop("general.architecture"), **writing)
    for key, value in keys.items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add.get(type(value), writer.add_array)(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.architecture": "mamba"}, "the architecture 'mamba' is not supported; supported: llama, granite, qwen2"),
        ({"qwen3.block_count": ...}, "the key 'qwen3.block_count' is missing"),
        ({"qwen3.block_count": 5}, "tensor 'blk.4.attn_norm.weight' is missing"),
        ({"qwen3.block_count": 3}, r"unexpected tensor 'blk.3.\w+.weight'; the file's keys describe no such part"),
        ({"qwen3.block_count": 10**9}, "1,000,000,000 layers, and 46 tensors"),
        ({"qwen3.block_count": "four"}, "the key 'qwen3.block_count' should be a whole number, got 'four'"),
        ({"qwen3.attention.head_count": 8}, r"tensor 'blk.0.attn_q.weight' has the shape \(128, 128\), its keys ask for \(256"),
        ({"qwen3.attention.head_count": 3}, r"num_attention_heads \(3\) must be a multiple"),
        ({"qwen3.attention.head_count": [4, 4, 2, 4]}, "'qwen3.attention.head_count' differs from layer to layer"),
        ({"qwen3.rope.scaling.type": "longrope"}, "rotary scaling of the kind 'longrope'; supported: linear, yarn"),
        ({"split.count": 3}, "one of 3 files of a model; name the first"),
        ({"split.count": "three"}, "one of three files of a model; name the first"),
    ],
)
def test_keys_that_do_not_fit_are_named(qwen, keys, message, tmp_path):
    def change(there):
        there.update(keys)
        for key in [key for key, value in keys.items() if value is ...]:
            del there[key]

    path = rewritten(qwen[1], tmp_path / "changed.gguf", change_keys=change)
    with pytest.raises(ArtefactError, match=message) as caught:
        import_gguf(path, tmp_path / "out")
    assert str(path) in str(caught.value) and not (tmp_path / "out").exists()


@pytest.fixture
def parts(qwen, tmp_path):
    """The files of a model that was split, in order."""
    rewritten(qwen[1], tmp_path / "parts.gguf", split_max_tensors=12)
    return sorted(tmp_path.glob("parts-0*.gguf"))


def test_a_model_in_several_files_is_that_in_one(qwen, parts, tmp_path):
    assert len(parts) == 4
    import_gguf(parts[0], tmp_path / "out")
    whole, split = load_model(qwen[0]).state_dict(), load_model(tmp_path / "out").state_dict()
    assert whole.keys() == split.keys() and all(torch.equal(whole[name], split[name]) for name in whole)


def test_parts_that_do_not_belong_together_are_named(qwen, parts, tmp_path):
    with pytest.raises(ArtefactError, match=r"00002-of-00004\.gguf: this is one of 4 files of a model; name the first"):
        import_gguf(parts[1], tmp_path / "out")
    third = parts[2].read_bytes()
    parts[2].write_bytes(parts[3].read_bytes())
    with pytest.raises(ArtefactError, match=r"00003-of-00004\.gguf: this is no part of the model in parts-00001"):
        import_gguf(parts[0], tmp_path / "out")
    parts[2].write_bytes(third[:-64])
    with pytest.raises(ArtefactError, match=r"00003-of-00004\.gguf: .* it is cut off"):
        import_gguf(parts[0], tmp_path / "out")
    parts[2].unlink()
    with pytest.raises(ArtefactError, match=r"00003-of-00004\.gguf: missing; parts-00001-of-00004\.gguf is the first of 4"):
        import_gguf(parts[0], tmp_path / "out")
    alone = parts[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(ArtefactError, match="name the first"):
        import_gguf(alone, tmp_path / "out")


def test_tensors_that_do_not_fit_are_named(qwen, tmp_path):
    norm = "blk.1.attn_norm.weight"

    def without(tensors):
        del tensors[norm]

    def extra(tensors):
        tensors["blk.1.more.weight"] = tensors[norm]

    def unknown(tensors):
        tensors[norm] = (np.zeros(128, np.int8), gguf.GGMLQuantizationType.I8)

    for change, message in [
        (without, f"tensor '{norm}' is missing"),
        (extra, "unexpected tensor 'blk.1.more.weight'"),
        (unknown, f"tensor '{norm}' has the type I8; supported: F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K"),
    ]:
        path = rewritten(qwen[1], tmp_path / f"{change.__name__}.gguf", change_tensors=change)
        with pytest.raises(ArtefactError, match=message):
            import_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", [0, 3, 20, 700, 3000, -1])
def test_a_file_that_is_cut_off_is_named(qwen, kept, tmp_path):
    path = tmp_path / "cut.gguf"
    whole = qwen[1].read_bytes()
    path.write_bytes(whole[: len(whole) - 128 if kept < 0 else kept])
    with pytest.raises(ArtefactError, match=r"cut.gguf: (this is not a whole GGUF file|tensor .* it is cut off)"):
        import_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory):
    """The file of a small model."""
    root = tmp_path_factory.mktemp("small")
    save_model(random_decoder(SHAPES["one layer, narrow heads"]), root / "m", tokenizer=None)
    export_gguf(root / "m", root / "x.gguf")
    return root / "x.gguf"


@settings(max_examples=60)
@given(at=st.integers(0, 2400), word=st.integers(0, 2**32 - 1))
@example(at=781, word=0x80)  # a dimension of 2^63 and more beside one of 0
@example(at=521, word=0x80000000)  # a context of 2^31 tokens
def test_no_damage_to_the_head_is_more_than_an_error(small_gguf, tmp_path_factory, at, word):
    root = tmp_path_factory.mktemp("damaged")
    content = bytearray(small_gguf.read_bytes())
    content[at : at + 4] = struct.pack("<I", word)
    (root / "x.gguf").write_bytes(content)
    try:
        import_gguf(root / "x.gguf", root / "out")
    except ArtefactError:
        assert not (root / "out").exists()


# all of them take half a minute
@pytest.mark.parametrize(
    ("step", "least"), [(8, 75), pytest.param(1, 150, marks=pytest.mark.slow)], ids=["every eighth", "all"]
)
def test_a_value_of_another_type_or_size_is_one_line_or_a_model(step, least, tmp_path):
    """Every value of the metadata, and every 64-bit number of the head, changed to others."""
    export_gguf(write_case("llama-yarn", tmp_path / "m"), tmp_path / "whole.gguf")
    path, refused, before = tmp_path / "x.gguf", 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for place, (key, word, content) in enumerate(changed_files(tmp_path / "whole.gguf")):
        if place % step:
            continue
        path.write_bytes(content)
        try:
            open_gguf(path)
        except BessemerError as error:
            refused += 1
            assert "\n" not in str(error), (key, word)
        except Exception as error:
            pytest.fail(f"{key} changed to {word}: {type(error).__name__}: {error}")
    assert refused > least
    # in KiB, on macOS in bytes: what a file of 200 kB says makes nobody take a gigabyte
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert taken < (1 << 29 if sys.platform == "darwin" else 1 << 19)


def test_layers_of_multi_token_prediction_are_left_out(tmp_path):
    folder = write_case("deepseek_v3", tmp_path / "m")
    export_gguf(folder, tmp_path / "x.gguf")

    def count(keys):
        keys["deepseek2.block_count"] += 1
        keys["deepseek2.nextn_predict_layers"] = 1

    def extra(tensors):
        tensors["blk.4.attn_norm.weight"] = tensors["blk.3.attn_norm.weight"]

    path = rewritten(tmp_path / "x.gguf", tmp_path / "y.gguf", count, extra)
    assert "1 tensors of multi-token prediction are left out" in import_gguf(path, tmp_path / "back")
    assert load_model(tmp_path / "back").config.num_hidden_layers == load_model(folder).config.num_hidden_layers


@pytest.mark.peer(name="smollm2")
def test_smollm2_is_imported_whole(tmp_path):
    source = find_model("smollm2")
    import_gguf(source.path, tmp_path / "smollm2")
    model, tokenizer = load_model(tmp_path / "smollm2"), load_tokenizer(tmp_path / "smollm2")
    assert model.config.parameters() == 134_515_008 and model.config.model_type == "llama"
    assert read_end_tokens(tmp_path / "smollm2") == {2} and tokenizer.chat_template
    tokens = tokenizer.encode("The capital of France is", add_bos=False)
    with torch.no_grad():
        assert tokenizer.decode([int(model(torch.tensor([tokens]))[0, -1].argmax())]) == " Paris"
    assert read_json(tmp_path / "smollm2" / "config.json")["dtype"] == "float32"
