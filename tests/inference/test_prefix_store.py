"""The prefix store: blocks that several requests had in common are found again by the next process."""

from __future__ import annotations

import os
import threading
import time

import pytest
from safetensors import safe_open

from bessemer.core.errors import ConfigError
from bessemer.inference import prefix_store
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.model.storage.folder import save_model
from tests.cases import slow
from tests.inference.models import small_decoder, small_tokenizer
from tests.model.tokenizers import write_small_tokenizer

BLOCK = 8
PARAMS = SamplingParams(temperature=0, max_tokens=12, logprobs=2, ignore_eos=True)
#: What an agent begins every conversation with, and what follows it.
PREFIX = [place * 7 % 250 for place in range(100)]
FIRST, SECOND, THIRD = [*PREFIX, 1, 2, 3], [*PREFIX, 9, 8], [*PREFIX, 4, 5, 6, 7]
#: Tokens of whole blocks that they have in common.
COMMON = len(PREFIX) // BLOCK * BLOCK


@pytest.fixture(autouse=True)
def short_prefixes(monkeypatch):
    """Prefixes of small models are worth a file."""
    monkeypatch.setattr(prefix_store, "LEAST_TOKENS", 4 * BLOCK)


@pytest.fixture
def folder_of(tmp_path):
    """Folders of small models, by architecture and seed of the weights."""

    def folder(name="dense", seed=0):
        place = tmp_path / f"{name}-{seed}"
        if not place.exists():
            save_model(small_decoder(name, seed), place, tokenizer=write_small_tokenizer(tmp_path / f"of-{name}-{seed}"))
        return place

    return folder


def answers(model, store, *prompts, **settings):
    """Completions of these prompts, one after the other, by an engine that is then closed. store: None for none."""
    config = EngineConfig(block_size=BLOCK, prefix_store=None if store is None else str(store), **settings)
    with Engine(model, device="cpu", config=config) as engine:
        return [engine.generate([prompt], PARAMS)[0] for prompt in prompts]


def files(store):
    return sorted(store.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dense", {}),
        slow("dense", {"kv_cache_dtype": "int8"}),
        ("dense", {"kv_cache_dtype": "int4"}),
        slow("dense", {"batch_invariant": True}),
        slow("windows", {}),
        ("windows only", {"cpu_kernels": "off"}),
        ("latent", {}),
    ],
    ids=["dense", "int8", "int4", "batch-invariant", "windows", "windows only", "latent"],
)
def test_the_next_process_finds_what_two_requests_had_in_common(name, settings, folder_of, tmp_path):
    model, store = folder_of(name), tmp_path / "store"
    *_, plain = answers(model, None, FIRST, SECOND, THIRD, **settings)
    answers(model, store, FIRST, **settings)
    assert not files(store), "one request has nothing in common"
    answers(model, store, FIRST, SECOND, **settings)
    assert len(files(store)) == 1
    (found,) = answers(model, store, THIRD, **settings)
    assert plain.cached_tokens == found.cached_tokens == COMMON and found == plain
    assert len(files(store)) == 1


def test_each_block_is_written_once_and_only_its_owner_reads_it(folder_of, tmp_path):
    store = tmp_path / "store"
    answers(folder_of(), store, FIRST, SECOND, FIRST, SECOND, FIRST)
    answers(folder_of(), store, SECOND, FIRST)
    keys = []
    for path in files(store):
        with safe_open(path, framework="pt") as file:
            keys += file.metadata()["keys"].replace("[", "").replace("]", "").split(", ")
    assert len(keys) == len(set(keys)) == COMMON // BLOCK
    if os.name == "posix":
        assert files(store)[0].parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("other", ["weights", "type of the cache", "size of a block"])
def test_blocks_of_another_model_or_type_are_not_found(other, folder_of, tmp_path):
    store = tmp_path / "store"
    answers(folder_of(), store, FIRST, SECOND)
    config = {"kv_cache_dtype": "float16"} if other == "type of the cache" else {}
    if other == "size of a block":
        with Engine(folder_of(), device="cpu", config=EngineConfig(block_size=4, prefix_store=str(store))) as engine:
            found = engine.generate([THIRD], PARAMS)[0]
    else:
        (found,) = answers(folder_of(seed=1 if other == "weights" else 0), store, THIRD, **config)
    assert found.cached_tokens == 0


def test_new_weights_neither_read_nor_write(folder_of, tmp_path):
    store = tmp_path / "store"
    config = EngineConfig(block_size=BLOCK, prefix_store=str(store))
    with Engine(folder_of(), device="cpu", config=config) as engine:
        engine.update_weights(small_decoder("dense", seed=3).state_dict())
        for prompt in (FIRST, SECOND):
            engine.generate([prompt], PARAMS)
    assert not files(store)


@pytest.mark.parametrize("harm", ["cut off", "emptied", "removed"])
def test_a_damaged_file_costs_nothing_but_its_prefix(harm, folder_of, tmp_path):
    store, model = tmp_path / "store", folder_of()
    (plain,) = answers(model, None, THIRD)
    answers(model, store, FIRST, SECOND)
    (path,) = files(store)
    config = EngineConfig(block_size=BLOCK, prefix_store=str(store))
    with Engine(model, device="cpu", config=config) as engine:
        # after the index was read
        if harm == "removed":
            path.unlink()
        else:
            os.truncate(path, 0 if harm == "emptied" else path.stat().st_size // 2)
        assert engine.generate([THIRD], PARAMS)[0] == plain
        assert engine.statistics.prefix_cache_hit_tokens == 0
    (found,) = answers(model, store, THIRD)
    assert found == plain and found.cached_tokens == 0


def test_what_was_used_longest_ago_goes_first(folder_of, tmp_path):
    store, model = tmp_path / "store", folder_of()
    answers(model, store, FIRST, SECOND)
    (old,) = files(store)
    size = old.stat().st_size
    other = [3, *PREFIX]
    answers(model, store, [*other, 1], [*other, 2], prefix_store_size=1.5 * size / 2**30)
    (new,) = files(store)
    assert new != old
    assert [answers(model, store, prompt)[0].cached_tokens for prompt in (THIRD, [*other, 5])] == [0, COMMON]


def test_a_folder_that_cannot_be_written_is_said_once_and_harms_nothing(folder_of, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prefix_store, "save_file", full)
    other = [3, *PREFIX]
    said: list[str] = []
    with Engine(
        folder_of(), device="cpu", config=EngineConfig(block_size=BLOCK, prefix_store=str(tmp_path / "store"))
    ) as engine:
        engine.generate([FIRST], PARAMS)
        # the thread that writes may fail after the next request has come
        until = time.monotonic() + 20
        while not said:
            assert time.monotonic() < until
            engine.generate([SECOND], PARAMS)
            said = [line for line in capsys.readouterr().err.splitlines() if "prefix_store" in line]
        for prompt in ([*other, 1], [*other, 2], THIRD):
            (found,) = engine.generate([prompt], PARAMS)
    assert found.cached_tokens == COMMON
    assert len(said) == 1 and "only read from now on" in said[0]
    assert "prefix_store" not in capsys.readouterr().err


def test_a_write_that_fails_behind_the_last_request_is_said_too(folder_of, tmp_path, capsys, monkeypatch):
    last = threading.Event()

    def full(*_, **__):
        last.wait(60)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prefix_store, "save_file", full)
    config = EngineConfig(block_size=BLOCK, prefix_store=str(tmp_path / "store"))
    with Engine(folder_of(), device="cpu", config=config) as engine:
        for prompt in (FIRST, SECOND):
            engine.generate([prompt], PARAMS)
        last.set()
    assert "only read from now on" in capsys.readouterr().err


def test_what_it_cannot_do_is_refused_at_the_start(folder_of, tmp_path):
    store = str(tmp_path / "store")
    with pytest.raises(ConfigError, match="not of one in memory"):
        Engine(small_decoder("dense"), small_tokenizer(tmp_path), config=EngineConfig(prefix_store=store))
    with pytest.raises(ConfigError, match="has linear attention"):
        answers(folder_of("linear"), store, FIRST)
    with pytest.raises(ConfigError, match="leave prefix_cache: false out"):
        EngineConfig.parse({"prefix_store": store, "prefix_cache": False}, str)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be used"):
        answers(folder_of(), tmp_path / "file", FIRST)
