"""Which of several processes this one is, as `torchrun` and its like say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bessemer.core.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """This process's rank among `world_size`. Rank 0 hashes, locks and publishes; the others wait for what it made."""

    rank: int = 0
    world_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Ranks:
        """Read `RANK` and `WORLD_SIZE`; one process when they are absent. Raises ConfigError when they make no sense."""
        rank_text, world_text = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
        if not (rank_text.isdecimal() and world_text.isdecimal() and int(rank_text) < int(world_text)):
            raise ConfigError(f"the environment says RANK={rank_text} of WORLD_SIZE={world_text}, which is no rank")
        return cls(int(rank_text), int(world_text))
