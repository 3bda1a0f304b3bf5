"""One model over several processes: every rank computes each batch with its share, and the logits come together on rank 0.

Rank 0 has the scheduler, the sampler and whoever asks. The others follow: they are told what an executor is told, numbers of
rows, blocks and slots, and do the same with their heads, channels, experts and pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from bessemer.core.errors import LostProcessError
from bessemer.core.interrupts import DeferredInterrupts
from bessemer.inference.execution.batch import Batch
from bessemer.inference.execution.module_executor import ModuleExecutor

# Shapes: R wanted rows, V vocabulary.


class Command(NamedTuple):
    """A method of an executor, and what it is called with."""

    method: str
    arguments: tuple[Any, ...]


class Workers(Protocol):
    """The other ranks, as rank 0 sees them."""

    @property
    def failure(self) -> LostProcessError | None:
        """Why the model can compute no more; None while it can."""

    def tell(self, command: Command) -> None:
        """Let all do the same as this rank does now."""

    def together(self) -> AbstractContextManager[None]:
        """While something is done with them: what goes wrong is the end of all, and raised as LostProcessError."""


class ShardedExecutor:
    """Rank 0's executor; each call is every rank's."""

    own_threads = False

    def __init__(self, own: ModuleExecutor, workers: Workers) -> None:
        self.model, self.invariant = own.model, own.invariant
        self._own, self._workers = own, workers

    @property
    def arithmetic(self) -> str:
        return self._own.arithmetic

    def forward(self, batch: Batch) -> Tensor:
        logits_RV: Tensor = self._everywhere("forward", batch)
        return logits_RV

    def copy_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        self._everywhere("copy_blocks", copies)

    def restore_states(self, restored: Sequence[tuple[int, int]]) -> None:
        self._everywhere("restore_states", restored)

    def keep_states(self, kept: Sequence[tuple[int, int]]) -> None:
        if kept:
            self._everywhere("keep_states", kept)

    def weights_changed(self) -> None:
        self._everywhere("weights_changed")

    def _everywhere(self, method: str, *arguments: Any) -> Any:
        with DeferredInterrupts() as interrupts:  # who stops in the middle leaves the others waiting
            with self._workers.together():
                self._workers.tell(Command(method, arguments))
                found = getattr(self._own, method)(*arguments)
            if interrupts.received is not None:
                interrupts.deliver()
            return found


def run_worker(executor: ModuleExecutor, commands: Iterable[Command]) -> None:
    """What the other ranks do, until the commands end."""
    for method, arguments in commands:
        getattr(executor, method)(*arguments)
