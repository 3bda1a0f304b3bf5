"""Commands of a model that several processes share: what rank 0's runner does, every rank's runner does with its shard.

Rank 0 has the scheduler, the sampler and the callers. The other ranks are workers: each gets the calls of rank 0's runner
(numbers of rows, blocks and slots), and repeats them with its own heads, channels, experts and KV blocks.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from bessemer.core.errors import LostProcessError
from bessemer.core.interrupts import DeferredInterrupts
from bessemer.inference.execution.batch import Batch
from bessemer.inference.execution.tensor_parallel.adapters import AdapterNumbers
from bessemer.model.adapters import Adapter

if TYPE_CHECKING:
    from bessemer.inference.execution.runner import Runner


class Command(NamedTuple):
    """A method of a runner, and its arguments. to_draft: of the draft model's runner, where the processes share one."""

    method: str
    arguments: tuple[Any, ...]
    to_draft: bool = False


class _Message(NamedTuple):
    """A command whose batch has no adapters, their numbers by sequence, and the numbers that are gone."""

    command: Command
    adapters: list[int | None]
    freed: list[int]


def encode(command: Command, numbers: AdapterNumbers) -> bytes:
    """A command for the workers; its batch names adapters by their numbers."""
    named: list[int | None] = []
    arguments = list(command.arguments)
    for place, argument in enumerate(arguments):
        if isinstance(argument, Batch) and any(adapter is not None for adapter in argument.adapters):
            named = [None if adapter is None else numbers.of(adapter) for adapter in argument.adapters]
            arguments[place] = replace(argument, adapters=[None] * len(named))
    message = _Message(command._replace(arguments=tuple(arguments)), named, numbers.take_freed())
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


def decode(message: bytes, adapters: dict[int, Adapter]) -> Command:
    """What `encode` was given, with this rank's shards of the adapters, by number; those that are gone are dropped."""
    command, named, freed = pickle.loads(message)
    assert isinstance(command, Command)
    for number in freed:
        del adapters[number]
    for argument in command.arguments if named else ():
        if isinstance(argument, Batch):
            argument.adapters = [None if number is None else adapters[number] for number in named]
    return command


class Workers(Protocol):
    """The workers, as rank 0 sees them."""

    #: Of the adapters that they hold shards of.
    numbers: AdapterNumbers

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


class DraftWorkers:
    """The workers, as the draft model's runner on rank 0 sees them."""

    def __init__(self, workers: Workers) -> None:
        self.numbers = workers.numbers
        self._workers = workers

    @property
    def failure(self) -> LostProcessError | None:
        """As of the workers."""
        return self._workers.failure

    def tell(self, command: Command) -> None:
        """Send a command for the draft model's runner to all workers."""
        self._workers.tell(command._replace(to_draft=True))

    def together(self) -> AbstractContextManager[None]:
        """As of the workers."""
        return self._workers.together()


def run_worker(runner: Runner, messages: Iterable[bytes], draft: Runner | None = None) -> None:
    """A worker's loop: make each call, until the commands end. draft: the runner of the draft model that it has a shard of."""
    for message in messages:
        command = decode(message, runner.adapters)
        addressed = draft if command.to_draft else runner
        getattr(addressed, command.method)(*command.arguments)
