from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.store import write_json
from bessemer.model.config import ModelConfig
from bessemer.model.device import choose_device
from bessemer.model.storage import weights as weights_file
from bessemer.model.storage.folder import load_model, save_model
from bessemer.model.storage.model_config import read_end_tokens, read_model_config
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.model.randomised import SHAPES, random_decoder, random_tokens
from tests.model.tokenizers import write_small_tokenizer

GROUPED = SHAPES["grouped"]


@pytest.fixture
def saved(tmp_path):
    """A decoder's folder."""
    save_model(random_decoder(GROUPED), tmp_path / "model", tokenizer=None)
    return tmp_path / "model"


def change_config(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}), encoding="utf-8")


def change_weights(folder, **changes):
    weights = load_file(folder / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_transformers_reads_our_folder(config, tmp_path):
    decoder = random_decoder(config)
    save_model(decoder, tmp_path, tokenizer=None)
    twin, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    tokens_BT = random_tokens(config, 2, 30)
    with torch.no_grad():
        assert (decoder(tokens_BT) - twin(tokens_BT).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["1GB", "40KB"])
def test_we_read_a_folder_of_transformers(tied, shard_size, tmp_path):
    config = Qwen3Config(
        vocab_size=90,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=48,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
        eos_token_id=[5, 7],
    )
    theirs = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "40KB")
    ours = load_model(tmp_path)
    assert (ours.config.rope_theta, ours.config.eos_token_id) == (50_000.0, 5)
    tokens_BT = random_tokens(ours.config, 2, 30)
    with torch.no_grad():
        assert (ours(tokens_BT) - theirs(tokens_BT).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_a_round_trip_through_transformers_changes_nothing(config, tmp_path):
    decoder = random_decoder(config)
    save_model(decoder, tmp_path / "ours", tokenizer=None)
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = load_model(tmp_path / "theirs")
    assert back.config == config.with_changes(model_type="qwen3")
    assert all(torch.equal(tensor, decoder.state_dict()[name]) for name, tensor in back.state_dict().items())


#: In a process of its own: one that has trained keeps what it frees, and nothing seems to grow there.
MEASURED = """
import gc, json, sys
from pathlib import Path
import torch
from bessemer.model.storage.folder import load_model

def own_memory():
    "Bytes of this process that are no file's."
    gc.collect()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

load_model(Path(sys.argv[1]))  # what the libraries take once
before = own_memory()
model = load_model(Path(sys.argv[1]))
mapped = own_memory() - before
converted = load_model(Path(sys.argv[1]), dtype=torch.bfloat16)
assert converted.head_weight.dtype == torch.bfloat16
size = sum(tensor.nbytes for tensor in model.state_dict().values())
print(json.dumps([size, mapped, own_memory() - before]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's count of memory")
def test_weights_are_mapped_and_not_copied(tmp_path):
    """Memory of the process's own grows by far less than the model."""
    config = ModelConfig(vocab_size=20_000, hidden_size=512, num_hidden_layers=1, intermediate_size=512)
    save_model(random_decoder(config), tmp_path, tokenizer=None)
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    size, mapped, with_converted = json.loads(done.stdout)
    assert size > 40e6 and mapped < size / 5
    assert size / 3 < with_converted < size * 0.7


def test_a_tied_table_is_stored_once(saved):
    names = load_file(saved / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_the_same_model_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save_model(random_decoder(GROUPED), tmp_path / name, tokenizer=None)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_stored_type_is_kept_unless_another_is_asked_for(tmp_path):
    save_model(random_decoder(GROUPED).to(torch.bfloat16), tmp_path, tokenizer=None)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    assert load_model(tmp_path).head_weight.dtype == torch.bfloat16
    assert load_model(tmp_path, dtype=torch.float32).head_weight.dtype == torch.float32


def test_a_model_can_be_saved_where_it_was_loaded_from(saved):
    decoder = load_model(saved)
    with torch.no_grad():
        decoder.norm.weight.fill_(3.0)
    save_model(decoder, saved, tokenizer=saved)
    assert load_model(saved).norm.weight.eq(3.0).all()


def test_loaded_weights_train(saved):
    decoder = load_model(saved)
    decoder(random_tokens(GROUPED, 1, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_the_tokenizer_travels_with_the_model(tmp_path):
    tokenizer = write_small_tokenizer(tmp_path / "tokenizer")
    save_model(random_decoder(GROUPED), tmp_path / "model", tokenizer=tokenizer)
    save_model(random_decoder(GROUPED), tmp_path / "next", tokenizer=tmp_path / "model")
    for name in ("model", "next"):
        ours = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))["bessemer"]
        assert ours["tokenizer_hash"] == load_tokenizer(tokenizer).hash
        assert AutoTokenizer.from_pretrained(tmp_path / name)("the end").input_ids == load_tokenizer(tokenizer).encode(
            "the end"
        )


def test_old_config_keys_are_read(saved):
    change_config(saved, rope_parameters=..., rope_theta=777.0, rope_scaling=None, dtype=..., bessemer=...)
    assert read_model_config(saved).rope_theta == 777.0


def test_weights_are_untied_where_a_config_does_not_say(saved):
    change_config(saved, tie_word_embeddings=...)
    assert not read_model_config(saved).tie_word_embeddings
    assert not Qwen3Config.from_pretrained(saved).tie_word_embeddings


def test_a_repeated_tied_head_is_accepted_only_if_it_is_the_table(saved):
    table = load_file(saved / "model.safetensors")["model.embed_tokens.weight"]
    change_weights(saved, **{"lm_head.weight": table.clone()})
    load_model(saved)
    change_weights(saved, **{"lm_head.weight": table + 1})
    with pytest.raises(ArtefactError, match=r"'lm_head.weight' differs from the embedding"):
        load_model(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "unknown architecture 'mamba'; supported: qwen3"),
        ({"model_type": ...}, "unknown architecture None"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, r"asks to run code that comes with the model \('auto_map'\)"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_act": "swish"}, "hidden_act: input should be 'silu'"),
        ({"attention_bias": True}, "self_attn.k_proj.bias' and 15 more is missing"),
        (
            {"layer_types": ["full_attention", "odd"] * 2, "sliding_window": 4},
            "layer_types.1: input should be 'full_attention'",
        ),
        ({"layer_types": ["sliding_attention"], "sliding_window": 4}, "layer_types names 1 layers and there are 4"),
        (
            {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
            "rope_scaling.rope_type: input should be 'default'",
        ),
        ({"rope_parameters": ..., "rope_scaling": {"type": "linear"}}, "'factor' is missing"),
        ({"head_dim": ...}, "'head_dim' is missing"),
        ({"head_dim": 3}, r"head_dim \(3\) must be even"),
        ({"hidden_size": "wide"}, "hidden_size: input should be a valid integer"),
        ({"bessemer": {"format": 99}}, "has format 99, newer than the 1"),
        ({"hidden_size": 64}, r"has shape \(199, 128\), config.json asks for \(199, 64\)"),
        ({"num_hidden_layers": 5}, r"tensor 'model.layers.4.input_layernorm.weight' and \d+ more is missing"),
        ({"num_hidden_layers": 3}, "unexpected tensor 'model.layers.3."),
        ({"tie_word_embeddings": False}, "tensor 'lm_head.weight' is missing"),
    ],
)
def test_a_config_that_does_not_fit_is_named(saved, changes, message):
    change_config(saved, **changes)
    with pytest.raises(ArtefactError, match=message) as caught:
        load_model(saved)
    assert "\n" not in str(caught.value) and str(saved) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, "tensor 'model.norm.weight' is missing from the weights"),
        ({"model.extra": torch.zeros(1)}, "unexpected tensor 'model.extra'"),
        ({"model.norm.weight": torch.zeros(127)}, r"'model.norm.weight' has shape \(127,\), config.json asks for \(128,\)"),
        ({"model.norm.weight": torch.zeros(128, dtype=torch.int64)}, "'model.norm.weight' has type I64; supported: F32"),
    ],
)
def test_weights_that_do_not_fit_are_named(saved, changes, message):
    change_weights(saved, **changes)
    with pytest.raises(ArtefactError, match=message):
        load_model(saved)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_named(saved, kept):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ArtefactError, match=r"model.safetensors: this is not a whole safetensors file"):
        load_model(saved)


def test_a_damaged_config_is_named(saved):
    (saved / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ArtefactError, match=r"config.json: this model config is damaged"):
        load_model(saved)
    (saved / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ArtefactError, match="not a mapping"):
        load_model(saved)


def test_what_is_not_there_is_named(saved, tmp_path):
    with pytest.raises(ArtefactError, match="nowhere: no such model folder"):
        load_model(tmp_path / "nowhere")
    (saved / "model.safetensors").unlink()
    with pytest.raises(ArtefactError, match="holds no weights"):
        load_model(saved)
    write_json(saved / "model.safetensors.index.json", {"weight_map": {"model.norm.weight": "model-1.safetensors"}})
    with pytest.raises(ArtefactError, match=r"model-1.safetensors: missing; model.safetensors.index.json names it"):
        load_model(saved)


def test_an_index_cannot_lead_out_of_the_folder(saved):
    (saved / "model.safetensors").rename(saved.parent / "outside.safetensors")
    write_json(saved / "model.safetensors.index.json", {"weight_map": {"model.norm.weight": "../outside.safetensors"}})
    with pytest.raises(ArtefactError, match="missing"):
        load_model(saved)


def test_a_pickle_is_not_opened(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(ArtefactError, match="pickle, which may run code and is not opened"):
        load_model(saved)


def test_a_failed_save_leaves_the_old_model(saved, monkeypatch):
    before = (saved / "model.safetensors").read_bytes()

    def full_disk(path, entries, tensors):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_file, "_write_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(random_decoder(GROUPED, seed=5), saved, tokenizer=None, shard_bytes=50_000)
    assert (saved / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_a_model_in_shards_is_the_same_model(saved):
    whole = load_model(saved)
    save_model(whole, saved, tokenizer=None, shard_bytes=100_000)
    shards = sorted(saved.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    largest = max(tensor.nbytes for tensor in whole.state_dict().values())
    assert all(path.stat().st_size < max(largest, 100_000) + 10_000 for path in shards)
    twin, loading = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    again = load_model(saved)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in whole.state_dict().items())
    with torch.no_grad():
        tokens_BT = random_tokens(GROUPED, 1, 9)
        assert (twin(tokens_BT).logits - whole(tokens_BT)).abs().max() < 1e-4
    save_model(again, saved, tokenizer=None)  # what the shards held is in one file again, and nothing is left of them
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(load_model(saved).head_weight, whole.head_weight)


@pytest.mark.parametrize(("value", "expected"), [(3, {3}), ([3, 4], {3, 4}), (None, set())])
def test_end_tokens_are_read_in_each_form(tmp_path, value, expected):
    assert read_end_tokens(tmp_path) == frozenset()
    write_json(tmp_path / "generation_config.json", {"eos_token_id": value})
    assert read_end_tokens(tmp_path) == expected


def test_reading_a_config_executes_nothing(saved):
    change_config(saved, auto_map={"AutoConfig": "evil.Config"}, bessemer=...)
    (saved / "evil.py").write_text(f"open({str(saved / 'executed')!r}, 'w').close()", encoding="utf-8")
    with pytest.raises(ArtefactError):
        read_model_config(saved)
    assert not (saved / "executed").exists()


def test_devices_are_checked():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ConfigError, match="unknown device 'tpu'; known: auto"):
        choose_device("tpu")
    with pytest.raises(ConfigError, match="not on this machine"):
        choose_device("cuda:99")
