"""Keys: hashed at rest, changed while a server runs."""

from __future__ import annotations

import asyncio
import stat

import pytest

from bessemer.assistant.conversation import LOCAL
from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import hash_bytes
from bessemer.serving.runtime import clients
from bessemer.serving.runtime.bodies import ApiError
from bessemer.serving.runtime.clients import (
    Allowance,
    Caller,
    Client,
    KeyRecord,
    Keys,
    hash_key,
    new_key,
    read_keys,
    write_keys,
)
from tests.cli.test_main import bessemer


def test_an_allowance_refills_evenly_and_may_be_overdrawn_once():
    now = [0.0]
    allowance = Allowance(60, clock=lambda: now[0])
    assert allowance.wait == 0
    allowance.spend(60)
    assert allowance.wait == pytest.approx(1)
    now[0] = 1.0
    assert allowance.wait == 0
    allowance.spend(31)
    assert allowance.wait == pytest.approx(31)
    now[0] = 1000.0
    allowance.spend(59)
    assert allowance.wait == 0, "a minute's worth is the most that is saved up"
    allowance.spend(1)
    assert allowance.wait > 0


def test_a_request_takes_one_of_its_minute():
    client = KeyRecord(name="ann", hash=hash_key("ann"), requests_per_minute=2).client()
    client.take_request()
    client.take_request()
    with pytest.raises(ApiError, match="may use 2 requests a minute; try again in 30 s") as refused:
        client.take_request()
    assert refused.value.status == 429 and refused.value.headers["Retry-After"] == "30"


@pytest.mark.parametrize("name", ["requests", "tokens"])
def test_less_than_a_second_is_waited_for_too(name):
    allowance = Allowance(120, clock=lambda: 0.0)
    client = Client(LOCAL, **{name: allowance})
    allowance.spend(119)
    client.take_request()
    allowance.spend(1)
    with pytest.raises(ApiError, match=f"may use 120 {name} a minute; try again in 1 s"):
        client.take_request()


def test_tokens_of_prompt_and_answer_are_counted_together():
    told = []
    caller = Caller(Client(LOCAL, tokens=Allowance(100, clock=lambda: 0.0)), on_spend=lambda: told.append(1))
    caller.spend(prompt=30)
    caller.spend(prompt=1, completion=79)
    assert (caller.prompt_tokens, caller.completion_tokens, len(told)) == (31, 79, 2)
    assert caller.client.tokens.wait == pytest.approx(11 * 60 / 100)
    free = Caller(Client(LOCAL))
    free.spend(completion=2)
    assert (free.prompt_tokens, free.completion_tokens) == (0, 2)


def test_a_request_before_others_is_an_admins_or_of_a_server_without_keys():
    assert Client(LOCAL).priority(-1) == Client(LOCAL, "boss", is_admin=True).priority(-1) == -1
    ann = KeyRecord(name="ann", hash=hash_key("ann")).client()
    assert (ann.priority(0), ann.priority(2)) == (0, 2)
    with pytest.raises(ApiError) as refused:
        ann.priority(-1)
    assert (refused.value.status, refused.value.parameter) == (403, "priority")


def test_a_clients_salt_is_part_of_every_salt():
    everybody, ann = Caller(Client(LOCAL)), Caller(Client(LOCAL, salt="ann"))
    assert [everybody.salt(None), everybody.salt("s"), ann.salt(None)] == [None, "s", "ann"]
    assert ann.salt("s") == hash_bytes(b"ann", b"s")


def test_a_key_has_256_random_bits_and_a_client_no_more_rights_than_are_said():
    assert len(new_key()) == len("bsk-") + 43 and new_key() != new_key()
    client = KeyRecord(name="a", hash=hash_key("a")).client()
    assert not client.is_admin and not Client(LOCAL).is_admin and client.principal.user == "a"
    assert client.requests is None and client.tokens is None
    with pytest.raises(ConfigError, match="name"):
        KeyRecord.parse({"name": "", "hash": hash_key("a")}, "key")


def test_a_single_key_needs_no_file():
    keys = Keys(single="secret")
    keys.refresh()
    assert keys.client(["guess", "secret"]).id == hash_key("secret") and keys.client(["guess"]) is None
    assert Keys().client(["secret"]) is None


@pytest.mark.parametrize("name", ["requests_per_minute", "tokens_per_minute"])
def test_one_a_minute_is_the_least(name):
    values = {"name": "ann", "hash": hash_key("ann")}
    assert getattr(KeyRecord.parse(values | {name: 1}, "key"), name) == 1
    with pytest.raises(ConfigError, match=name):
        KeyRecord.parse(values | {name: 0}, "key")


def test_the_file_holds_hashes_and_is_its_owners_alone(tmp_path, capsys):
    path = tmp_path / "keys.json"
    _, key, _ = bessemer(capsys, "keys", "add", path, "ann", "--requests-per-minute", 60, "--admin")
    assert key.startswith("bsk-") and key.strip() not in path.read_text(encoding="utf-8")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Keys(path).client([key.strip()]).principal.key == "ann"
    assert bessemer(capsys, "keys", "list", path)[1] == "ann · user ann · admin · 60 requests a minute\n"
    code, _, said = bessemer(capsys, "keys", "add", path, "ann")
    assert code == 2 and "has a key 'ann' already" in said
    bessemer(capsys, "keys", "revoke", path, "ann")
    assert read_keys(path) == []
    code, _, said = bessemer(capsys, "keys", "revoke", path, "ann")
    assert code == 2 and "has no key 'ann'" in said


def test_a_changed_file_changes_who_is_let_in(tmp_path):
    async def change():
        path = tmp_path / "keys.json"
        ann, bob = (KeyRecord(name=name, hash=hash_key(name)) for name in ("ann", "bob"))
        write_keys(path, [ann])
        keys = Keys(path)
        first = keys.client(["ann"])
        write_keys(path, [ann.with_changes(admin=True, tokens_per_minute=5), bob])
        keys.refresh()
        assert keys.client(["wrong", "bob"]).principal.user == "bob"
        # a client whose limits change stays who it is
        assert keys.client(["ann"]) is first and first.is_admin and first.tokens.per_minute == 5
        path.write_text("{", encoding="utf-8")
        keys.refresh()
        assert keys.client(["ann"]) is first, "a damaged file changes nothing"
        write_keys(path, [bob])
        keys.refresh()
        assert keys.client(["ann"]) is None and first.revoked.is_set()

    asyncio.run(change())


def test_who_did_not_change_keeps_allowances_and_a_file_that_did_not_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "new" / "folder" / "keys.json"
    ann = KeyRecord(name="ann", hash=hash_key("ann"), tokens_per_minute=5)
    write_keys(path, [ann])
    keys = Keys(path)
    tokens = keys.client(["ann"]).tokens
    write_keys(path, [ann, KeyRecord(name="bob", hash=hash_key("bob"))])
    keys.refresh()
    assert keys.client(["ann"]).tokens is tokens and not keys.client(["ann"]).revoked.is_set()
    monkeypatch.setattr(clients, "read_keys", None)
    keys.refresh()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "not a file of API keys"),
        ('{"format": 2, "keys": []}', "not a file of API keys"),
        ('{"format": 1, "keys": {}}', "not a file of API keys"),
        ('{"format": 1, "keys": [{"name": "a", "hash": "x"}]}', "keys.0"),
        (
            f'{{"format": 1, "keys": [{{"name": "a", "hash": "{"0" * 64}"}}, {{"name": "a", "hash": "{"1" * 64}"}}]}}',
            "two keys",
        ),
    ],
)
def test_a_file_of_something_else_is_one_line(tmp_path, text, said):
    path = tmp_path / "keys.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        Keys(path)
    path.unlink()
    with pytest.raises(ArtefactError, match="no such file of API keys"):
        Keys(path)
