"""What a folder or a GGUF file says of its sizes and number types, however large or odd, is a model or one line."""

from __future__ import annotations

import json
import struct

import pytest

from bessemer.core.errors import BessemerError, ConfigError
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.model.formats.gguf_export import export_gguf
from bessemer.model.formats.gguf_open import open_gguf
from bessemer.model.storage.folder import save_model
from tests.cases import slow
from tests.inference.models import small_decoder, small_tokenizer
from tests.model.gguf_fuzz import read

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
PLAIN = EngineConfig(cpu_kernels="off")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("sizes")
    small_tokenizer(place)
    save_model(small_decoder("dense"), place / "model", tokenizer=place / "tokenizer")
    return place / "model"


@pytest.fixture
def changed(folder):
    """Opens the folder with one setting of its `config.json` changed."""
    path = folder / "config.json"
    before = path.read_text(encoding="utf-8")

    def opened(name, value):
        path.write_text(json.dumps(json.loads(before) | {name: value}), encoding="utf-8")
        return Engine(folder, None, "cpu", PLAIN)

    yield opened
    path.write_text(before, encoding="utf-8")


@pytest.mark.parametrize(("name", "value"), [(name, 2**63) for name in SIZES[:-1]] + [("num_hidden_layers", 2**40)])
def test_a_size_that_no_model_has_is_one_line(name, value, changed):
    with pytest.raises(BessemerError) as raised:
        changed(name, value)
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_a_context_of_two_to_the_63_takes_no_memory(changed):
    engine = changed("max_position_embeddings", 2**63)
    assert engine.longest < 2**40
    assert len(engine.generate("a", SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2


@pytest.mark.parametrize("name", ["kv_memory", "state_memory", "prefix_store_size"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e300, 2**63, -1])
def test_memory_that_no_machine_has_is_refused_in_one_line(name, value):
    with pytest.raises(ConfigError, match=name) as raised:
        EngineConfig.parse({name: value}, "serve")
    assert "\n" not in str(raised.value)


def type_fields(content):
    """Where the number type of each tensor stands."""
    return [at - 4 for at in read(content).offsets]


#: Types of GGUF and numbers that no type has.
NUMBERS = [*range(48), 2**16, 2**31, 2**32 - 1]


@pytest.mark.parametrize("dtype", ["f32", slow("q8_0"), slow("q4_k_m"), slow("q6_k"), slow("q4_0")])
def test_a_tensor_of_any_other_number_type_is_one_line_or_a_model(dtype, folder, tmp_path):
    whole, path = tmp_path / "whole.gguf", tmp_path / "x.gguf"
    export_gguf(folder, whole, dtype=dtype)
    content, refused = whole.read_bytes(), 0
    fields = type_fields(content)
    # an embedding, a matrix and a norm; by every number for the first, and by every fifth for the others
    for place, at in enumerate((fields[0], fields[len(fields) // 2], fields[-1])):
        for number in NUMBERS[:: 1 if place == 0 else 5]:
            path.write_bytes(content[:at] + struct.pack("<I", number) + content[at + 4 :])
            try:
                open_gguf(path)
            except BessemerError as error:
                refused += 1
                assert "\n" not in str(error), number
            except Exception as error:
                pytest.fail(f"type {number} at {at}: {type(error).__name__}: {error}")
    assert refused > 50
