"""Keys: hashed at rest, changed while a server runs."""

from __future__ import annotations

import asyncio
import stat

import pytest

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.serving.runtime.bodies import ApiError
from bessemer.serving.runtime.clients import Allowance, KeyRecord, Keys, hash_key, read_keys, write_keys
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "not a file of API keys"),
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
