"""Settings of a turn, and the principal: the caller on whose behalf a turn runs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from bessemer.core.config import Config, setting


@dataclass(frozen=True)
class Principal:
    """A user and their groups. key: the name of their API key, never the key itself."""

    user: str
    groups: frozenset[str] = frozenset()
    key: str = ""

    def is_in_any(self, groups: Collection[str] | None) -> bool:
        """Whether the user is in one of the groups; None stands for everybody."""
        return groups is None or not self.groups.isdisjoint(groups)


#: The user of this machine's terminal.
LOCAL = Principal("local")


class AssistantConfig(Config):
    """Limits of a turn, and the format of tool calls."""

    max_rounds: int = setting(8, "messages of the assistant in a turn; after all but the last the tools it calls are run", ge=1)
    max_retries: int = setting(2, "times that one message is generated again because a hook sent it back", ge=0)
    refusal: str = setting("I can't help with that.", "answer where every attempt was sent back", min_length=1)
    thinking_budget: int | None = setting(
        None,
        "tokens of a message after which its thinking is closed and the answer begins; none: no limit",
        unit="tokens",
        ge=0,
    )
    tool_format: str | None = setting(
        None, "how the model writes calls of tools; none: as its chat template says", plugins="bessemer.tool_formats"
    )
