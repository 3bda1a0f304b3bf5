"""Executor of a model that several processes share: every rank computes each batch with its shard; rank 0 gets the logits.

Rank 0 has the scheduler, the sampler and the callers. The other ranks are workers: each gets the calls of rank 0's executor
(numbers of rows, blocks and slots), and repeats them with its own heads, channels, experts and KV blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from bessemer.core.errors import LostProcessError
from bessemer.core.interrupts import DeferredInterrupts
from bessemer.inference.execution.batch import Batch
from bessemer.inference.execution.module_executor import ModuleExecutor
from bessemer.inference.execution.tensor_parallel.weights import exchange_piece, pieces_of

# Shapes: R wanted rows, V vocabulary.


#: The command to take a piece of a weight, whose numbers follow by a collective: a pipe would copy them for each worker.
_EXCHANGE = "exchange_piece"


class Command(NamedTuple):
    """A method of an executor, or `_EXCHANGE`, and its arguments."""

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


class ShardedExecutor:
    """Rank 0's executor: every rank makes each call."""

    own_threads = False

    def __init__(self, own: ModuleExecutor, workers: Workers) -> None:
        self.model = own.model
        self.invariant = own.invariant
        self._own = own
        self._workers = workers

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

    def replace_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Give every rank its shard of other weights, by the names and with the shapes of the unsharded model."""
        with self._together():
            for piece, values in pieces_of(self.model, weights):
                self._workers.tell(Command(_EXCHANGE, (piece,)))
                exchange_piece(self.model, piece, values)

    def _everywhere(self, method: str, *arguments: Any) -> Any:
        with self._together():
            self._workers.tell(Command(method, arguments))
            return getattr(self._own, method)(*arguments)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """A collective call. An interrupt in the middle would leave the workers waiting, and is delivered after it."""
        with DeferredInterrupts() as interrupts:
            with self._workers.together():
                yield
            if interrupts.received is not None:
                interrupts.deliver()


def run_worker(executor: ModuleExecutor, commands: Iterable[Command]) -> None:
    """A worker's loop: make each call, until the commands end."""
    for method, arguments in commands:
        if method == _EXCHANGE:
            exchange_piece(executor.model, *arguments)
        else:
            getattr(executor, method)(*arguments)
