"""Commands of a model that several processes share: what rank 0's runner does, every rank's runner does with its shard.

Rank 0 has the scheduler, the sampler and the callers. The other ranks are workers: each gets the calls of rank 0's runner
(numbers of rows, blocks and slots), and repeats them with its own heads, channels, experts and KV blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from bessemer.core.errors import LostProcessError
from bessemer.core.interrupts import DeferredInterrupts

if TYPE_CHECKING:
    from bessemer.inference.execution.runner import Runner


class Command(NamedTuple):
    """A method of a runner, and its arguments."""

    method: str
    arguments: tuple[Any, ...]


class Workers(Protocol):
    """The workers, as rank 0 sees them."""

    @property
    def failure(self) -> LostProcessError | None:
        """Why the model can compute no more; None while it can."""

    def tell(self, command: Command) -> None:
        """Send a command to all workers."""

    def together(self) -> AbstractContextManager[None]:
        """A collective call: an error within it ends all workers, and is raised as LostProcessError."""


@contextmanager
def together(workers: Workers) -> Iterator[None]:
    """A collective call. An interrupt in the middle would leave the workers waiting, and is delivered after it."""
    with DeferredInterrupts() as interrupts:
        with workers.together():
            yield
        if interrupts.received is not None:
            interrupts.deliver()


def run_worker(runner: Runner, commands: Iterable[Command]) -> None:
    """A worker's loop: make each call, until the commands end."""
    for method, arguments in commands:
        getattr(runner, method)(*arguments)
