"""Which replica has which beginnings of prompts in its cache, as far as the entrance can tell."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator

#: Characters of a block: some 64 tokens.
_BLOCK = 256
#: Blocks that are remembered; those that were not seen for the longest time go first.
_MOST_BLOCKS = 100_000


class PrefixMemory:
    """The replicas that prompts were sent to, by their beginnings in whole blocks. What a replica has dropped since is not
    known here: a wrong guess costs a prefill and nothing else."""

    def __init__(self, block: int = _BLOCK, most: int = _MOST_BLOCKS) -> None:
        self._block = block
        self._most = most
        self._replicas: OrderedDict[int, set[str]] = OrderedDict()

    def matches(self, prompt: str, replicas: Collection[str]) -> dict[str, float]:
        """The share of a prompt's blocks, from its beginning, that each replica has seen; those that have seen none are left
        out."""
        chains = list(self._chains(prompt))
        matched: dict[str, int] = {}
        staying = set(replicas)
        for place, chain in enumerate(chains, 1):
            staying &= self._replicas.get(chain, set())
            if not staying:
                break
            matched |= dict.fromkeys(staying, place)
        return {replica: blocks / len(chains) for replica, blocks in matched.items()}

    def remember(self, prompt: str, replica: str) -> None:
        """A prompt was sent to a replica."""
        for chain in self._chains(prompt):
            self._replicas.setdefault(chain, set()).add(replica)
            self._replicas.move_to_end(chain)
        while len(self._replicas) > self._most:
            self._replicas.popitem(last=False)

    def keep(self, replicas: Collection[str]) -> None:
        """Forget all replicas but these."""
        living = set(replicas)
        for chain in list(self._replicas):
            self._replicas[chain] &= living
            if not self._replicas[chain]:
                del self._replicas[chain]

    def _chains(self, prompt: str) -> Iterator[int]:
        """A hash of each beginning in whole blocks."""
        chain = 0
        for start in range(0, len(prompt) - self._block + 1, self._block):
            chain = hash((chain, prompt[start : start + self._block]))
            yield chain
