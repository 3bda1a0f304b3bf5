"""The secrets here are random and put together when the tests run, so that no scanner of repositories stumbles over them."""

from __future__ import annotations

import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.data.edits.registry import edit_plugin
from bessemer.data.edits.secrets import Secrets, secrets
from bessemer.data.plugins import arrow_types
from bessemer.data.text.texts import Texts

ALPHANUMERIC = string.ascii_letters + string.digits


def drawn(alphabet, count, seed=1):
    return "".join(random.Random(seed).choices(alphabet, k=count))


UPPER32 = string.ascii_uppercase + "234567"
HEX = "0123456789abcdef"
KEYS = [
    "AK" + "IA" + drawn(UPPER32, 16),
    "gh" + "p_" + drawn(ALPHANUMERIC, 36),
    "github" + "_pat_" + drawn(ALPHANUMERIC, 22) + "_" + drawn(ALPHANUMERIC, 59),
    "gl" + "pat-" + drawn(ALPHANUMERIC, 20),
    "xo" + "xb-" + drawn(string.digits, 12) + "-" + drawn(string.digits, 12) + "-" + drawn(ALPHANUMERIC, 24),
    "AI" + "za" + drawn(ALPHANUMERIC + "-_", 34) + "Q",
    "sk" + "_live_" + drawn(ALPHANUMERIC, 24),
    "sk" + "-" + drawn(ALPHANUMERIC, 48),
    "sk" + "-proj-" + drawn(ALPHANUMERIC + "-_", 80) + "A",
    "sk" + "-ant-api03-" + drawn(ALPHANUMERIC + "-_", 93) + "A",
    "hf" + "_" + drawn(string.ascii_letters, 34),
    "np" + "m_" + drawn(ALPHANUMERIC, 36),
    "py" + "pi-AgE" + drawn(ALPHANUMERIC, 80),
    "S" + "G." + drawn(ALPHANUMERIC, 22) + "." + drawn(ALPHANUMERIC, 43),
    "key" + "-" + drawn(HEX, 32),
]
JWT = "ey" + "J" + drawn(ALPHANUMERIC, 20) + ".ey" + "J" + drawn(ALPHANUMERIC, 30) + "." + drawn(ALPHANUMERIC, 43)
BODY = "\n".join(drawn(ALPHANUMERIC + "+/", 64, seed) for seed in range(5))
BLOCK = f"-----BEGIN RSA PRIVATE {'KEY'}-----\n{BODY}\n-----END RSA PRIVATE {'KEY'}-----"


def masked(text):
    return secrets(Texts.of([text]))[0][0].as_py()


@pytest.mark.parametrize("key", KEYS, ids=[key[:8] for key in KEYS])
def test_keys_of_known_shapes_are_masked(key):
    assert masked(f"use {key}.") == "use <API_KEY>."
    assert masked(f'TOKEN="{key}"\n').count("<") == 1
    assert masked(f"x{key}") == f"x{key}"  # the tail of something longer


def test_other_kinds_are_masked():
    assert masked(f"Authorization: Bearer {JWT}\n") == "Authorization: Bearer <TOKEN>\n"
    assert masked(f"a\n{BLOCK}\nb") == "a\n<PRIVATE_KEY>\nb"
    assert masked("postgresql://ann:" + "Tr0ub4dor@db.steel.org/x") == "postgresql://ann:<PASSWORD>@db.steel.org/x"


@pytest.mark.parametrize(
    ("before", "value", "behind"),
    [
        ('password = "', "hunter2-and-3", '"'),
        ("'passwd': '", "9Xy!kk20", "',"),
        ("api_key: '", drawn(ALPHANUMERIC, 32), "'"),
        ("export SECRET_KEY=", drawn(ALPHANUMERIC, 40), "\n"),
        ("client_secret=", drawn(HEX, 32), ""),
    ],
)
def test_only_the_value_of_an_assignment_is_masked(before, value, behind):
    assert masked(before + value + behind) == before + "<PASSWORD>" + behind


@pytest.mark.parametrize(
    "text",
    [
        "AKIAIOSFODNN7EXAMPLE and sk-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx and ghp_" + "x" * 36,
        "sk-learn, sk-ssh-ed25519@openssh.com, disk-usage-of-all-the-folders-of-this-machine",
        f"-----BEGIN PRIVATE {'KEY'}-----\n...\n-----END PRIVATE {'KEY'}-----",
        f"-----BEGIN PUBLIC {'KEY'}-----\n{BODY}\n-----END PUBLIC {'KEY'}-----",
        "postgresql://scott:tiger@localhost/test, ://user:password@host, ://u:${PASS}@h, ://u:***@h",
        "password = os.environ['PASSWORD']; password: str; password=None; password = getpass()",
        'password = "your-password-1", password="<password>", passwd = "changeme1"',
        'token = "self_attention.weight.1", api_key="my_api_key_12345", secret = "short1"',
        "token: 1234567890123456789012",
        "the password is: something, and token = the_next_token_of_the_sequence_1",
        "tokens = [1, 2, 3]; token_id = 50256",
        "https://host.org:8080/a@b, http://[::1]:80/",
        "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "commit 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b",
    ],
)
def test_placeholders_and_code_stay(text):
    assert masked(text) == text


def test_kinds_are_counted_and_chosen():
    texts = Texts.of([f"{KEYS[0]} {KEYS[1]}", "", JWT])
    out, found = secrets(texts)
    assert out.to_pylist() == ["<API_KEY> <API_KEY>", "", "<TOKEN>"]
    assert found["secrets_keys"].to_pylist() == [2, 0, 0]
    assert {name: column.type for name, column in found.items()} == arrow_types(edit_plugin("secrets").columns)
    assert secrets(texts, Secrets(kinds=("token",)))[0].to_pylist() == [f"{KEYS[0]} {KEYS[1]}", "", "<TOKEN>"]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.sampled_from([*KEYS, JWT, BLOCK, 'password="', "aB3$xyz9", '"', "=", "://u:", "@h.org", " "]) | st.text(max_size=5),
        max_size=6,
    )
)
def test_any_text_is_masked_once_and_for_all(parts):
    once = masked("".join(parts))
    assert masked(once) == once


def test_a_secret_does_not_reach_into_the_next_text():
    half = len(KEYS[1]) // 2
    texts = [KEYS[1][:half], KEYS[1][half:], "gh", "p_" + KEYS[1][4:], "passw", "ord = 'aB3$xyz9'", "password =", " 'aB3$xyz9'"]
    texts += [BLOCK[:100], BLOCK[100:], "postgresql://ann:Tr0ub4dor", "@db.steel.org"]
    assert secrets(Texts.of(texts))[0].to_pylist() == texts


@pytest.mark.parametrize(
    "text",
    [
        "sk-" * 100_000,
        "eyJ-" * 100_000,
        ("-----BEGIN PRIVATE " + "KEY-----\nAAAA\n") * 20_000,
        "://a:b" * 50_000,
        "password=" * 50_000,
    ],
)
def test_long_rows_of_beginnings_are_no_secrets(text):
    """Each is bounded: tried against the whole rest of the text from every beginning, these would take hours."""
    assert masked(text) == text
