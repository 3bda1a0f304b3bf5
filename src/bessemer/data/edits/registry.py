"""Edits: their settings, the columns that count their changes, and what they say.

Pure Python: a recipe is checked without the edits' code.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import field_validator

from bessemer.core.config import Config, nearest, setting
from bessemer.core.errors import ConfigError
from bessemer.core.registry import Registry
from bessemer.data.plugins import Column, EditFunction, EditPlugin, Limit

PersonalKind = Literal["email", "ip", "phone", "card", "iban"]
SecretKind = Literal["key", "private_key", "token", "password"]
_PERSONAL_MASKS = {kind: f"<{kind.upper()}>" for kind in get_args(PersonalKind)}
_SECRET_MASKS = {"key": "<API_KEY>", "private_key": "<PRIVATE_KEY>", "token": "<TOKEN>", "password": "<PASSWORD>"}


class PersonalData(Config):
    """Which personal data are masked, and by what."""

    kinds: tuple[PersonalKind, ...] = setting(
        get_args(PersonalKind),
        f"what is looked for: {', '.join(get_args(PersonalKind))}; others are neither masked nor counted",
    )
    masks: dict[str, str] = setting(
        default_factory=dict, description='what stands in the place of a kind: `{phone: ""}` cuts it out; `<KIND>` by default'
    )
    reserved: bool = setting(
        False, "also what is set aside for documentation and tests: user@example.com, 192.0.2.1, card 4111 1111 1111 1111"
    )
    private: bool = setting(False, "also addresses of private networks: 10.0.0.1, fe80::1")

    @field_validator("masks")
    @classmethod
    def _all_masks(cls, value: dict[str, str]) -> dict[str, str]:
        return _completed(value, _PERSONAL_MASKS)


class Secrets(Config):
    """Which secrets are masked, and by what."""

    kinds: tuple[SecretKind, ...] = setting(
        get_args(SecretKind), f"what is looked for: {', '.join(get_args(SecretKind))}; others are neither masked nor counted"
    )
    masks: dict[str, str] = setting(
        default_factory=dict, description="what stands in the place of a kind; `<API_KEY>` and the like by default"
    )

    @field_validator("masks")
    @classmethod
    def _all_masks(cls, value: dict[str, str]) -> dict[str, str]:
        return _completed(value, _SECRET_MASKS)


class Repair(Config):
    """What is repaired."""

    mojibake: bool = setting(True, "undo a reading in the wrong encoding")
    join_broken_words: bool = setting(
        False, "join words broken by a hyphen at a line's end: for PDFs; elsewhere `well-⏎known` would lose its hyphen"
    )


class Boilerplate(Config):
    """Which lines go as a page's furniture."""

    notices: bool = setting(True, "short lines that say what a notice says: cookies, rights, newsletters")
    buttons: bool = setting(True, "lines that are nothing but labels: `Share | Log in`")
    longest_notice: int = setting(400, "a longer line is no notice", unit="bytes", ge=1)
    longest_button: int = setting(100, "a longer line is no row of labels", unit="bytes", ge=1)
    repeats: int = setting(2, "of a line of prose that stands more often in a row, one stays", ge=1)


class C4Lines(Config):
    """C4's rules about lines (Raffel et al. 2020, section 2.2). `c4_terminal_lines` asks for their ends besides."""

    longest_word: int = setting(1000, "a line with a longer word goes", unit="characters", ge=1)
    fewest_words: int = setting(3, "a line with fewer words goes; blank lines are such unless this is 0", ge=0)
    javascript: bool = setting(True, "lines that speak of javascript go")
    policy: bool = setting(True, "lines with a phrase of policies and cookie notices go")
    every_script: bool = setting(
        False, "as the peers do: words and their length count in scripts without spaces too, and `. ? ! \" '` alone end a line"
    )
    citations: bool = setting(True, "`[1]`, `[]`, `[edit]` and `[citation needed]` are taken out")


def _completed(stated: dict[str, str], usual: dict[str, str]) -> dict[str, Any]:
    for name in stated:
        if name not in usual:
            raise ValueError(f"there is no kind {name!r}{nearest(name, list(usual))}")
    return usual | stated


#: As a preset of `select`, an edit keeps documents in which it changed nothing.
_NONE: Limit = (None, 0)

_REPAIR = EditPlugin(
    "repair",
    "wrong encodings, control and invisible characters, line ends, broken words",
    "bessemer.data.edits.repair:repair",
    Repair,
    columns={
        "repair_mojibake_lines": Column("lines read in the wrong encoding, put right", "int64"),
        "repair_control_characters": Column("control characters removed, NUL among them", "int64"),
        "repair_invisible_characters": Column("zero-width and direction marks and soft hyphens removed", "int64"),
        "repair_line_ends": Column("line ends other than a newline, made one", "int64"),
        "repair_joined_words": Column("words broken by a hyphen at a line's end, joined", "int64"),
        "repair_lost_characters": Column(
            "replacement characters (U+FFFD) left: bytes that an earlier reader could not decode", "int64"
        ),
    },
    section="repair",
)

_BOILERPLATE = EditPlugin(
    "boilerplate",
    "lines that are a page's furniture: cookie notices, buttons, repeated lines",
    "bessemer.data.edits.line_removal:boilerplate",
    Boilerplate,
    columns={
        "boilerplate_lines": Column(
            "lines removed that are a page's furniture: cookie notices, buttons, copyright lines", "int64"
        ),
        "boilerplate_repeated_lines": Column("lines removed that only repeat the line above", "int64"),
    },
    section="boilerplate",
)

_C4_COLUMNS = {
    "c4_lines_long_word": Column("lines removed for a word of more than 1,000 characters", "int64"),
    "c4_lines_unterminated": Column("lines removed that do not end like a sentence", "int64"),
    "c4_lines_few_words": Column("lines removed for fewer than three words", "int64"),
    "c4_lines_javascript": Column("lines removed that ask for JavaScript", "int64"),
    "c4_lines_policy": Column("lines removed that carry a policy or a notice", "int64"),
    "c4_lines_citations": Column("marks of citations removed", "int64"),
}
_C4_LINES = EditPlugin(
    "c4_lines",
    "C4's rules about lines (Raffel et al. 2020, section 2.2), without the one on their ends",
    "bessemer.data.edits.line_removal:c4_lines",
    C4Lines,
    columns=_C4_COLUMNS,
    section="c4_lines",
)
_C4_TERMINAL_LINES = EditPlugin(
    "c4_terminal_lines",
    "C4's rules about lines, with the one on their ends",
    "bessemer.data.edits.line_removal:c4_terminal_lines",
    C4Lines,
    columns=_C4_COLUMNS,
    section="c4_lines",
)

_PERSONAL_DATA = EditPlugin(
    "personal_data",
    "e-mail and IP addresses, telephone, card and bank account numbers, masked",
    "bessemer.data.edits.personal_data:personal_data",
    PersonalData,
    columns={
        "personal_data_emails": Column("e-mail addresses found", "int64", _NONE),
        "personal_data_ips": Column("public IPv4 and IPv6 addresses found", "int64", _NONE),
        "personal_data_phones": Column("telephone numbers found", "int64", _NONE),
        "personal_data_cards": Column("payment card numbers found (right issuer, length and check digit)", "int64", _NONE),
        "personal_data_ibans": Column("bank account numbers found (IBAN with right length and check digits)", "int64", _NONE),
    },
    section="personal_data",
)

_SECRETS = EditPlugin(
    "secrets",
    "keys, tokens and passwords, masked",
    "bessemer.data.edits.secrets:secrets",
    Secrets,
    columns={
        "secrets_keys": Column("API keys of known shapes found", "int64", _NONE),
        "secrets_private_keys": Column("private key blocks found", "int64", _NONE),
        "secrets_tokens": Column("signed tokens (JWT) found", "int64", _NONE),
        "secrets_passwords": Column("passwords in connection strings and assignments found", "int64", _NONE),
    },
    section="secrets",
)

OWN_EDITS = (_REPAIR, _BOILERPLATE, _C4_LINES, _C4_TERMINAL_LINES, _PERSONAL_DATA, _SECRETS)
EDITS: Registry[EditFunction] = Registry("edit", "bessemer.edits", OWN_EDITS)


def edit_plugin(name: str) -> EditPlugin:
    """The declaration of an edit, ours or another package's. Raises ConfigError when there is none."""
    plugin = EDITS.find(name)
    if not isinstance(plugin, EditPlugin):
        raise ConfigError(f"the entry point {name!r} of {EDITS.group} is not an EditPlugin")
    return plugin
