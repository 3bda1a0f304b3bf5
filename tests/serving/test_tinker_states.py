"""Saved weights of the Tinker server: whole or absent, of one owner, gone when they expire."""

from __future__ import annotations

import json
import time

import pytest
import torch

from bessemer.core.errors import ArtefactError, RequestError
from bessemer.serving.tinker.states import Address, RunRecord, StateStore
from bessemer.serving.tinker.training import LoraSettings

RUN = f"{'0a' * 16}:train:0"
STATE = {"layer.adapter.down": torch.arange(6.0).view(2, 3)}


@pytest.fixture
def store(tmp_path):
    return StateStore(tmp_path / "states")


@pytest.fixture
def record(store):
    record = RunRecord(RUN, "anna", "tiny", LoraSettings(2, 7), {"purpose": "test"}, time.time(), time.time())
    store.add_run(record)
    return record


def save(store, record, name="a", value=0.0, **more):
    tensors = {key: tensor + value for key, tensor in STATE.items()}
    return store.save_state(record, name, tensors, **{"steps": 3, "overwrite": False, **more})


def test_what_was_saved_is_found_by_another_server(store, record):
    saved = save(store, record, user_metadata={"note": "first"})
    assert str(saved.address) == f"tinker://{RUN}/weights/a"
    other = StateStore(store.folder)
    found = other.find(Address.parse(f"tinker://{RUN}/weights/a"))
    assert found == saved and (found.steps, found.lora, found.user_metadata) == (3, LoraSettings(2, 7), {"note": "first"})
    assert torch.equal(other.load_state(found.address)["layer.adapter.down"], STATE["layer.adapter.down"])
    assert other.run(RUN, "anna") == record and other.runs("anna") == [record]


def test_another_owner_finds_nothing(store, record):
    with pytest.raises(RequestError, match="there is no training run"):
        store.run(RUN, "bert")
    assert store.runs("bert") == []


def test_a_name_is_given_twice_only_where_the_client_says_so(store, record):
    save(store, record)
    with pytest.raises(RequestError, match="there are such weights already"):
        save(store, record, value=1.0)
    saved = save(store, record, value=1.0, overwrite=True)
    assert torch.equal(store.load_state(saved.address)["layer.adapter.down"], STATE["layer.adapter.down"] + 1)
    assert [each.address.name for each in store.checkpoints(RUN)] == ["a"]


def test_weights_that_are_not_whole_are_not_there(store, record, monkeypatch):
    save(store, record)
    monkeypatch.setattr("bessemer.serving.tinker.states.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("power")))
    for name in ("a", "b"):
        with pytest.raises(OSError, match="power"):
            save(store, record, name, overwrite=True)
    # those that there were are still whole
    assert [each.address.name for each in store.checkpoints(RUN)] == ["a"]
    assert list(store.load_state(Address(RUN, "weights", "a"))) == list(STATE)


def test_new_weights_that_had_no_name_yet_get_it_at_the_next_start(store, record, monkeypatch):
    save(store, record)
    monkeypatch.setattr(StateStore, "_put", lambda self, new, final: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(store, record, value=1.0, overwrite=True)
    monkeypatch.undo()
    restarted = StateStore(store.folder)
    found = restarted.load_state(Address(RUN, "weights", "a"))
    assert torch.equal(found["layer.adapter.down"], STATE["layer.adapter.down"] + 1)


def test_expired_weights_are_not_found_and_then_deleted(store, record):
    saved = save(store, record)
    store.set_expiry(saved.address, time.time() - 1)
    kept = save(store, record, "kept", expires=time.time() + 1000)
    with pytest.raises(RequestError, match="have expired"):
        store.find(saved.address)
    assert store.remove_expired() == 1 and not store.path(saved.address).exists()
    store.set_expiry(kept.address, None)
    assert store.find(kept.address).expires is None


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "a\\b", "a" * 129, "ä"])
def test_a_name_is_never_a_path(store, record, name):
    with pytest.raises(RequestError, match="no name of weights"):
        save(store, record, name)


@pytest.mark.parametrize(
    "text", ["", f"tinker://{RUN}", "tinker://../x/weights/a", f"tinker://{RUN}/other/a", f"tinker://{RUN}/weights/.."]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(RequestError, match="is no address of weights"):
        Address.parse(text)


def test_weights_of_a_newer_version_or_damaged_ones_say_so(store, record):
    saved = save(store, record)
    path = store.path(saved.address) / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"format": 99}), encoding="utf-8")
    with pytest.raises(ArtefactError, match="update bessemer"):
        store.find(saved.address)
    (store.path(saved.address) / "state.safetensors").write_bytes(b"no")
    with pytest.raises(ArtefactError, match="this state is damaged"):
        store.load_state(saved.address)
