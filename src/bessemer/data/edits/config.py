"""Settings of the edits. Checking a recipe loads no edit."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import field_validator

from bessemer.core.config import Config, nearest, setting

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
