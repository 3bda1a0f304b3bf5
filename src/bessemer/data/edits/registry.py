"""Declarations of the edits: of each its settings, the columns that count its changes, and what they say.

Pure Python: a recipe is checked without the edits' code.
"""

from __future__ import annotations

from bessemer.core.errors import ConfigError
from bessemer.core.registry import Registry
from bessemer.data.edits.config import Boilerplate, C4Lines, PersonalData, Repair, Secrets
from bessemer.data.plugins import Column, EditFunction, EditPlugin, Limit

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
    "bessemer.data.edits.boilerplate:boilerplate",
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
    "bessemer.data.edits.c4_lines:c4_lines",
    C4Lines,
    columns=_C4_COLUMNS,
    section="c4_lines",
)
_C4_TERMINAL_LINES = EditPlugin(
    "c4_terminal_lines",
    "C4's rules about lines, with the one on their ends",
    "bessemer.data.edits.c4_lines:c4_terminal_lines",
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
