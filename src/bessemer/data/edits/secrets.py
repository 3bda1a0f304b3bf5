"""Edit `secrets`: keys, tokens and passwords, masked and counted.

One pass over the bytes finds the literals with which secrets begin (`AKIA`, `ghp_`, `-----BEGIN`) and the words that
announce one (`password`, `api_key`); a regular expression anchored there decides. What is plainly a placeholder
(`sk-xxxx…`, `<your token>`, `${TOKEN}`, AWS's `…EXAMPLE`) stays: it teaches how code is written and opens nothing.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from bessemer.data.edits.registry import Secrets
from bessemer.data.text.texts import Span, Texts, masked
from bessemer.data.word_lists.automaton import Literals

_COLUMN = {
    "key": "secrets_keys",
    "private_key": "secrets_private_keys",
    "token": "secrets_tokens",
    "password": "secrets_passwords",
}


class _Shape(NamedTuple):
    """A secret that begins with a literal; `rest` matches what follows the literal, and is what gets judged."""

    kind: str
    literal: bytes
    rest: re.Pattern[bytes]


def _shapes(kind: str, rows: list[tuple[str, str]]) -> list[_Shape]:
    return [_Shape(kind, literal.encode(), re.compile(rest.encode())) for literal, rest in rows]


_END = r"(?![A-Za-z0-9_-])"
_SHAPES = (
    *_shapes(
        "key",
        [
            # Amazon
            ("AKIA", rf"[A-Z2-7]{{16}}{_END}"),
            ("ASIA", rf"[A-Z2-7]{{16}}{_END}"),
            # GitHub, GitLab
            *((f"gh{letter}_", rf"[A-Za-z0-9]{{36,251}}{_END}") for letter in "pousr"),
            ("github_pat_", rf"[A-Za-z0-9_]{{60,300}}{_END}"),
            *((f"gl{name}-", rf"[A-Za-z0-9_-]{{20,300}}{_END}") for name in ("pat", "ptt", "dt", "rt", "cbt", "soat")),
            # Slack, Discord, Telegram's bots have no literal: assignments find them
            *((f"xox{letter}-", rf"[A-Za-z0-9-]{{20,300}}{_END}") for letter in "abeoprs"),
            ("hooks.slack.com/services/", r"T[A-Z0-9]{6,64}/B[A-Z0-9]{6,64}/[A-Za-z0-9]{20,64}"),
            # Google, Stripe, OpenAI, Anthropic, Hugging Face
            ("AIza", rf"[A-Za-z0-9_-]{{35}}{_END}"),
            ("ya29.", rf"[A-Za-z0-9_-]{{40,300}}{_END}"),
            ("GOCSPX-", rf"[A-Za-z0-9_-]{{28}}{_END}"),
            *((f"{side}k_{mode}_", rf"[A-Za-z0-9]{{16,300}}{_END}") for side in "sr" for mode in ("live", "test")),
            ("whsec_", rf"[A-Za-z0-9+/=]{{32,300}}{_END}"),
            ("sk-", rf"(?:proj-|svcacct-|admin-|ant-(?:api|admin)\d\d-)?[A-Za-z0-9_-]{{32,300}}{_END}"),
            ("hf_", rf"[A-Za-z]{{34}}{_END}"),
            # registries of packages and images
            ("npm_", rf"[A-Za-z0-9]{{36}}{_END}"),
            ("pypi-", rf"AgE[A-Za-z0-9_-]{{50,300}}{_END}"),
            ("dckr_pat_", rf"[A-Za-z0-9_-]{{27}}{_END}"),
            ("dop_v1_", rf"[a-f0-9]{{64}}{_END}"),
            # mail, shops, telephony, others
            ("SG.", rf"[A-Za-z0-9_-]{{16,32}}\.[A-Za-z0-9_-]{{16,64}}{_END}"),
            ("shpat_", rf"[a-f0-9]{{32}}{_END}"),
            ("key-", rf"[a-f0-9]{{32}}{_END}"),
            ("EAACEdEose0cBA", rf"[A-Za-z0-9]{{10,300}}{_END}"),
            ("sq0csp-", rf"[A-Za-z0-9_-]{{43}}{_END}"),
            ("lin_api_", rf"[A-Za-z0-9]{{40}}{_END}"),
            ("glsa_", rf"[A-Za-z0-9]{{32}}_[A-Fa-f0-9]{{8}}{_END}"),
            ("AccountKey=", r"[A-Za-z0-9+/]{86}=="),
        ],
    ),
    *_shapes("token", [("eyJ", rf"[A-Za-z0-9_-]{{8,400}}\.eyJ[A-Za-z0-9_-]{{8,4000}}\.[A-Za-z0-9_-]{{16,700}}{_END}")]),
)
_PRIVATE_KEY = b"-----BEGIN "
_KEY_BEGINS = re.compile(rb"(?:[A-Z]{2,10} ){0,2}PRIVATE KEY(?: BLOCK)?-----")
_KEY_ENDS = re.compile(rb"-----END (?:[A-Z]{2,10} ){0,2}PRIVATE KEY(?: BLOCK)?-----")
#: A line of a key's body; a header without one is no key.
_KEY_BODY = re.compile(rb"[A-Za-z0-9+/=]{24}")
_LONGEST_KEY = 20_000
#: A literal that may stand in the middle of an address.
_IN_ADDRESSES = b"hooks.slack.com/services/"
_CONNECTION = b"://"
_USER_AND_PASSWORD = re.compile(rb"[A-Za-z0-9._%+-]{0,64}:([^\s:/@\"'<>{}$\[\]]{3,128})@[A-Za-z0-9\[]")
#: What manuals write for a password; `scott:tiger` is in every one about databases, `guest:guest` about queues.
_NO_PASSWORDS = (b"pass", b"pwd", b"pw", b"tiger", b"guest", b"repo")
_SCHEME = re.compile(rb"(?<![A-Za-z0-9])[A-Za-z][A-Za-z0-9+.-]{1,30}\Z")

#: Words after which a value is a secret, and whether that value is a password (else a key, which is longer and random).
_PASSWORD_NAMES = b"password passwd passphrase pwd"
_KEY_NAMES = b"""
    secret secret_key secretkey api_key api-key apikey access_key accesskey private_key auth_token authtoken access_token
    client_secret token
"""
_NAMES = dict.fromkeys(_PASSWORD_NAMES.split(), True) | dict.fromkeys(_KEY_NAMES.split(), False)
_QUOTED = re.compile(rb"""(?:["']?\]?\s{0,4}(?::=|=>|[:=])\s{0,4}|=)[a-z]?(["'])([!#-&(-;=?-\[\]-z|~]{6,200})\1""")
#: As in a file of environment variables or of settings: alone on its line, without blanks or brackets.
_BARE = re.compile(rb"[=:][ \t]?()([A-Za-z0-9+/=_.~!@#^&*-]{12,200})[ \t]*(?=\n|\r|\Z)")
_PLACEHOLDER = re.compile(
    rb"(?i)x{4}|\*{3}|\.{3}|0{8}|1234567|abcdef|example|sample|dummy|placeholder|change.?me|redacted|fake|your|insert"
    rb"|todo|some|test|secret|passw|token|none|null|true|false|string|[<>{}$%]|getpass|prompt"
    # short words are parts of random values too, and mean something as words of their own alone
    rb"|(?<![a-z0-9])(?:my|foo(?:bar|baz)?|bar|env)(?:[0-9]{0,4}(?![a-z0-9])|[_-])|key\Z"
)
_LITERALS = tuple(dict.fromkeys([*(shape.literal for shape in _SHAPES), _PRIVATE_KEY, _CONNECTION]))
#: Bits per character below which a value is a word, a name or a path.
_KEY_ENTROPY = 3.3
_SHORTEST_KEY = 16


def secrets(texts: Texts, settings: Secrets | None = None) -> tuple[pa.Array, dict[str, pa.Array]]:
    """The texts with secrets masked, and how many of each kind were found in each. Of connection strings and assignments only
    the value is masked."""
    settings = settings or Secrets()

    def find(batch: Texts) -> Iterator[Span]:
        return (span for span in find_secrets(batch) if span.kind in settings.kinds)

    return masked(texts, find, settings.masks, _COLUMN)


def find_secrets(texts: Texts) -> Iterator[Span]:
    """Everything found, in no order; spans may overlap."""
    buffer = texts.data.data
    known, names = _automata()
    for begin, number, first, last in _places(known, texts):
        literal = _LITERALS[number]
        if literal == _CONNECTION:
            span = _connection_password(buffer, begin + len(literal), first, last)
        elif literal == _PRIVATE_KEY:
            span = _private_key(buffer, begin, last)
        else:
            span = _of_known_shape(buffer, literal, begin, first, last)
        if span:
            yield span
    spellings = list(_NAMES)
    for begin, number, _, last in _places(names, texts):
        span = _assigned(buffer, begin + len(spellings[number]), last, password=_NAMES[spellings[number]])
        if span:
            yield span


def _places(automaton: Literals, texts: Texts) -> Iterator[tuple[int, int, int, int]]:
    """Where literals begin: the place, the literal's number, and the two ends of the text that it begins in. One that reaches
    into the next text matches nothing, since what follows it is looked for up to its own text's end."""
    first, last = int(texts.offsets[0]), int(texts.offsets[-1])
    ends, numbers = automaton.find(texts.data[first:last])
    begins = ends + first - automaton.lengths[numbers]
    owners = np.searchsorted(texts.offsets, begins, side="right") - 1
    columns = (begins, numbers, texts.offsets[owners], texts.offsets[owners + 1])
    yield from zip(*(column.tolist() for column in columns), strict=True)


def _of_known_shape(buffer: memoryview, literal: bytes, begin: int, first: int, last: int) -> Span | None:
    if begin > first and _joined(buffer[begin - 1]) and literal != _IN_ADDRESSES:
        return None
    shape = _BY_LITERAL[literal]
    match = shape.rest.match(buffer, begin + len(literal), last)
    return Span(begin, match.end(), shape.kind) if match and not _looks_made_up(match.group()) else None


def _private_key(buffer: memoryview, begin: int, last: int) -> Span | None:
    header = _KEY_BEGINS.match(buffer, begin + len(_PRIVATE_KEY), last)
    if not header:
        return None
    content = bytes(buffer[header.end() : min(last, header.end() + _LONGEST_KEY)])
    body = content.partition(b"-----")[0]
    footer = _KEY_ENDS.match(content, len(body))
    return Span(begin, header.end() + footer.end(), "private_key") if footer and _KEY_BODY.search(body) else None


def _connection_password(buffer: memoryview, begin: int, first: int, last: int) -> Span | None:
    match = _USER_AND_PASSWORD.match(buffer, begin, min(last, begin + 260))
    scheme = _SCHEME.search(bytes(buffer[max(first, begin - 3 - 32) : begin - 3]))
    if not match or not scheme or _PLACEHOLDER.search(match.group(1)) or match.group(1).lower() in _NO_PASSWORDS:
        return None
    return Span(match.start(1), match.end(1), "password")


def _assigned(buffer: memoryview, behind: int, last: int, *, password: bool) -> Span | None:
    match = _QUOTED.match(buffer, behind, min(last, behind + 240)) or _BARE.match(buffer, behind, min(last, behind + 240))
    if not match:
        return None
    value = match.group(2)
    quoted = bool(match.group(1))
    if _PLACEHOLDER.search(value):
        return None
    kinds = sum(bool(re.search(kind, value)) for kind in (rb"[a-z]", rb"[A-Z]", rb"[0-9]", rb"[^A-Za-z0-9]"))
    if kinds < 2 or not re.search(rb"[0-9]", value):
        return None
    if password and quoted:
        plain = bool(_IDENTIFIER.fullmatch(value))
    else:
        plain = len(value) < _SHORTEST_KEY or _entropy(value) < _KEY_ENTROPY or bool(_WORDS.search(value))
    if plain:
        return None
    return Span(match.start(2), match.end(2), "password")


#: `user_2`, `field.name`: names in code, which differ from passwords in being words joined by marks.
_IDENTIFIER = re.compile(rb"[A-Za-z]+(?:[._-][A-Za-z]+)+\d?|[a-z]+[._-]?\d")
#: Three words in a row are a name or a path, however long.
_WORDS = re.compile(rb"(?:[A-Za-z][a-z]{2,}[._/ -]){2}[A-Za-z][a-z]{2,}")


def _entropy(value: bytes) -> float:
    """Shannon's entropy of a value's characters, in bits per character; rounded, since the last digits of a logarithm differ
    between processors and a limit is compared with it."""
    return round(-sum(count / len(value) * math.log2(count / len(value)) for count in Counter(value).values()), 6)


def _looks_made_up(value: bytes) -> bool:
    """Whether a value of a key's shape was typed by hand to show where the key goes."""
    plain = value.lower()
    return len(set(value)) < 8 or bool(
        re.search(rb"x{4}|\.{3}|example|your|abcdefgh|12345678|0{8}|placeholder|dummy|fake", plain)
    )


def _joined(byte: int) -> bool:
    return byte == 95 or (byte < 128 and chr(byte).isalnum())


_BY_LITERAL = {shape.literal: shape for shape in _SHAPES}
assert len(_BY_LITERAL) == len(_SHAPES)


@cache
def _automata() -> tuple[Literals, Literals]:
    return Literals(_LITERALS), Literals(list(_NAMES), fold_case=True)
