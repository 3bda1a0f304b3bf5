"""Which of several processes this one is, as `torchrun` and its like say it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from bessemer.core.errors import ConfigError
from bessemer.distributed.config import ParallelConfig


@dataclass(frozen=True)
class Ranks:
    """This process's rank among `world_size`, and among those of its host. Rank 0 hashes, locks and publishes; in a stage that
    trains all take part, in any other they wait for what rank 0 makes."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.world_size == 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Ranks:
        """Read `RANK`, `WORLD_SIZE` and `LOCAL_RANK`; one process when they are absent. Raises ConfigError when they make no
        sense."""
        rank_text, world_text = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
        if not (rank_text.isdecimal() and world_text.isdecimal() and int(rank_text) < int(world_text)):
            raise ConfigError(f"the environment says RANK={rank_text} of WORLD_SIZE={world_text}, which is no rank")
        local_text = environment.get("LOCAL_RANK", "0")
        return cls(int(rank_text), int(world_text), int(local_text) if local_text.isdecimal() else 0)

    def device(self, name: str) -> str:
        """The device of this process where the recipe says `name`: of several GPUs, the one of its number."""
        if self.alone or name not in ("auto", "cuda"):
            return name
        import torch

        return f"cuda:{self.local_rank}" if torch.cuda.is_available() else name

    @contextmanager
    def joined(self, device: str, config: ParallelConfig) -> Iterator[None]:
        """While entered, the processes can talk; nothing for one alone, and where they can already."""
        if self.alone:
            yield
            return
        import torch.distributed as dist

        from bessemer.distributed.mesh import joined
        from bessemer.model.device import choose_device

        if dist.is_initialized():
            yield
            return
        with joined(choose_device(device), config.timeout):
            yield
