"""Tensor parallelism: a model sharded over processes that serve it together, and the commands that rank 0 gives the others.

Rank 0 has the scheduler, the sampler and the callers. The other ranks are workers: each gets the calls of rank 0's runner
(numbers of rows, blocks and slots), and repeats them with its own heads, channels, experts and KV blocks.

Commands go through a pipe to each worker process, because a pipe can be waited on for days; a collective that a process does
not join is an error after some minutes. Through a second pipe a worker reports that it is ready, or what went wrong. A process
that is gone closes both, so that rank 0 does not wait for it.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, NamedTuple, Protocol

import torch
from torch.distributed.device_mesh import DeviceMesh

from bessemer.core.concurrency import DeferredInterrupts
from bessemer.core.environment import usable_cores
from bessemer.core.errors import BessemerError, ConfigError, LostProcessError, ending_of_process
from bessemer.core.store import read_json
from bessemer.distributed.layout import Layout, ParallelConfig
from bessemer.distributed.mesh import Mesh, Seat, abort, as_dtensor, joined
from bessemer.inference.config import EngineConfig, ParallelInferenceConfig
from bessemer.inference.execution.batch import Batch
from bessemer.inference.execution.weights import AdapterNumbers
from bessemer.model.adapters import Adapter
from bessemer.model.decoder import Decoder
from bessemer.model.device import choose_device, served_dtype
from bessemer.model.quantisation.storage import read_settings
from bessemer.model.storage.folder import load_model
from bessemer.model.storage.model_config import CONFIG, read_model_config, refuse_scorer


class Command(NamedTuple):
    """A method of a runner, and its arguments. to_draft: of the draft model's runner, where the processes share one."""

    method: str
    arguments: tuple[Any, ...]
    to_draft: bool = False


class _CommandMessage(NamedTuple):
    """An encoded command. adapters: by sequence, the number of the adapter that was taken out of its batch. freed: numbers of
    adapters that are gone."""

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
    message = _CommandMessage(command._replace(arguments=tuple(arguments)), named, numbers.take_freed())
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


def decode(message: bytes, adapters: dict[int, Adapter]) -> Command:
    """The inverse of `encode`, with this rank's shards of the adapters, by number; drops those that are gone."""
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

    #: Numbers of the adapters that the workers hold shards of.
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


#: Command line of a worker process; a JSON argument follows.
PROGRAM = (sys.executable, "-m", "bessemer.inference.execution.tensor_parallel.worker")
#: Seconds that a process gets to end by itself.
_GRACE_SECONDS = 5
#: Seconds to wait for the report of the process that broke a collective.
_REPORT_SECONDS = 3


class WorkerProcesses:
    """Ranks 1, 2, …; `settings` is what `bessemer.inference.execution.tensor_parallel.worker` is given, with its rank."""

    def __init__(
        self, ranks: int, settings: Mapping[str, Any], threads: int | None, interrupt: Callable[[], None] | None = None
    ) -> None:
        """threads: of PyTorch in each; its own choice when None. interrupt: called, on another thread, when one was lost."""
        self.numbers = AdapterNumbers()
        self._interrupt = interrupt
        environment = dict(os.environ)
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        self._changed = threading.Condition()
        self._ready = 0
        self._failures: list[tuple[bool, LostProcessError]] = []
        self._closed = False
        self._processes = [self._start(dict(settings) | {"rank": rank}, environment) for rank in range(1, ranks)]
        self._watchers = [
            threading.Thread(target=self._watch, args=(rank, process), name=f"worker {rank}", daemon=True)
            for rank, process in enumerate(self._processes, start=1)
        ]
        for watcher in self._watchers:
            watcher.start()

    @staticmethod
    def _start(settings: dict[str, Any], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*PROGRAM, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            # Ctrl-C is for rank 0, which then ends the workers
            start_new_session=True,
        )

    @property
    def failure(self) -> LostProcessError | None:
        """Why the model can compute no more; None while it can."""
        with self._changed:
            # a worker that died without a report is the cause; reports of a lost connection are its consequence
            return min(self._failures, key=lambda failure: failure[0])[1] if self._failures else None

    def wait_until_ready(self) -> None:
        """Wait until all have read the model. Raises LostProcessError, with what a worker reported."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready == len(self._processes) or self._failures)
        if (failure := self.failure) is not None:
            raise failure

    def tell(self, command: Command) -> None:
        """Send a command to all workers."""
        message = pickle.dumps(encode(command, self.numbers))
        for process in self._processes:
            _stream(process.stdin).write(message)
            _stream(process.stdin).flush()

    @contextmanager
    def together(self) -> Iterator[None]:
        """A collective call: an error within it ends all workers, and is raised as LostProcessError.

        The ranks would no longer be at the same call, so nothing is computed after it.
        """
        if self._closed and self.failure is None:
            raise LostProcessError("the engine is closed; open the model again")
        try:
            if (failure := self.failure) is not None:
                raise failure
            yield
        except BaseException as error:
            failure = self._cause_of(error)
            self.close(grace=0)
            if isinstance(error, Exception) and not isinstance(error, BessemerError):
                raise failure from error
            raise

    def close(self, grace: float = _GRACE_SECONDS) -> None:
        """End the processes, after `grace` seconds those that do not end by themselves."""
        self.close_commands()
        for process in self._processes:
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for watcher in self._watchers:
            watcher.join()

    def close_commands(self) -> None:
        """Close the commands: the workers end."""
        self._closed = True
        for process in self._processes:
            # the process may be gone, with a command unread
            with suppress(OSError):
                _stream(process.stdin).close()

    # -- inside

    def _cause_of(self, error: BaseException) -> LostProcessError:
        """The process that ended, where that broke the call; else the error itself, which leaves the workers waiting."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._failures, 0 if isinstance(error, BessemerError) else _REPORT_SECONDS):
                self._failures.append((True, LostProcessError(f"process 0 of the model failed: {one_line(error)}")))
        failure = self.failure
        assert failure is not None
        return failure

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        reported = None
        for line in _stream(process.stdout):
            message = json.loads(line)
            if message == "ready":
                with self._changed:
                    self._ready += 1
                    self._changed.notify_all()
            else:
                reported = message
        code = process.wait()
        if reported is None:
            self._note(False, LostProcessError(f"process {rank} of the model ended with {ending_of_process(code)}; all stop"))
        else:
            self._note(True, LostProcessError(f"process {rank} of the model failed: {reported}"))

    def _note(self, is_reported: bool, failure: LostProcessError) -> None:
        with self._changed:
            if not self._closed:
                self._failures.append((is_reported, failure))
            self._changed.notify_all()
        if not self._closed and self._interrupt is not None:
            self._interrupt()


def _stream(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None, "both are pipes"
    return stream


def one_line(error: BaseException) -> str:
    """The text of an error in one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


class ShardedModel:
    """Rank 0's shard of a model, and the worker processes that hold the others."""

    def __init__(self, model: Decoder, mesh: Mesh, workers: Workers, held: ExitStack, axis: DeviceMesh | None = None) -> None:
        """held: contexts that are left at the end. axis: the processes, where they are not all of the job; every one of them
        then changes the weights of its own shard."""
        self.model = model
        self.mesh = mesh
        self.workers = workers
        self.axis = axis
        self._held = held

    @classmethod
    def open(cls, folder: Path, device: str, config: EngineConfig) -> ShardedModel:
        """Start the worker processes, and read a model's folder in all. Raises as `check_sharding` and `load_model`, and
        LostProcessError when one of them ends."""
        check_sharding(folder, device, config)
        assert config.parallel is not None
        if torch.distributed.is_initialized():
            raise ConfigError("parallel: this process is one of a job already, or has such a model open; open it elsewhere")
        own = device_of(device, 0, config.processes)
        threads = config.threads or max(1, usable_cores() // config.processes) if own.type == "cpu" else None
        with ExitStack() as held:
            file = Path(held.enter_context(TemporaryDirectory())) / "job"
            settings = {
                "folder": str(folder.resolve()),
                "device": device,
                # what is not given hangs on the device, and is found there again
                "config": config.model_dump(mode="json", exclude_unset=True),
                "file": str(file),
            }
            workers = WorkerProcesses(config.processes, settings, threads, abort if own.type == "cuda" else None)
            held.callback(workers.close)
            model = load_model(folder)
            workers.wait_until_ready()
            if threads is not None:
                held.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(threads)
            with workers.together():
                held.enter_context(joined(own, config.parallel.timeout, Seat(0, config.processes, file)))
                # all leave at once
                held.callback(workers.close_commands)
                mesh = mesh_of(config.parallel, own)
                return cls(shard_model(model, mesh, own, config), mesh, workers, held.pop_all())

    def close(self) -> None:
        """End the worker processes, and leave their process group."""
        self._held.close()


def check_sharding(folder: Path, device: str, config: EngineConfig) -> None:
    """Raise ConfigError for a model or a machine that cannot be shared as the settings say, before any process is started."""
    assert config.parallel is not None
    if folder.suffix == ".gguf":
        raise ConfigError(
            f"parallel: {folder} is a GGUF file, which one process opens; make a folder of it with bessemer import"
        )
    if not folder.is_dir():
        # raises the error that fits
        load_model(folder)
    model = read_model_config(folder)
    refuse_scorer(model, folder)
    if read_settings(read_json(folder / CONFIG), folder / CONFIG):
        raise ConfigError(f"parallel: {folder} is quantised, and codes are not cut; share the model that it was made from")
    layout_of(config.parallel).check(model, None)
    for rank in range(config.processes):
        device_of(device, rank, config.processes)


def device_of(name: str, rank: int, processes: int) -> torch.device:
    """The device of a rank where the setting says `name`: of GPUs the one of its number, or the processor.

    Raises ConfigError where there are fewer than processes.
    """
    device = choose_device(name)
    if device.type == "mps" or device.index is not None:
        raise ConfigError(f"parallel: every process needs a device of its own, and {name!r} is one; use cuda or cpu")
    if device.type == "cpu":
        if processes > usable_cores():
            raise ConfigError(f"parallel: {processes} processes, but this machine has {usable_cores()} cores; take fewer")
        return device
    if processes > torch.cuda.device_count():
        raise ConfigError(f"parallel: {processes} processes, but this machine has {torch.cuda.device_count()} GPUs; take fewer")
    return torch.device("cuda", rank)


def layout_of(config: ParallelInferenceConfig) -> Layout:
    """The layout of the settings."""
    return Layout.of(_axes(config), config.processes)


def mesh_of(config: ParallelInferenceConfig, device: torch.device) -> Mesh:
    """The mesh of the process group that this process has joined."""
    return Mesh.here(_axes(config), device.type)


def shard_model(model: Decoder, mesh: Mesh, device: torch.device, config: EngineConfig | None = None) -> Decoder:
    """Keep of a model, in place, the shard that this rank computes, and move it to its device, in the dtype of the settings.

    Of a folder that is mapped into memory, little else has been read.
    """
    # PyTorch's modules for it take seconds to load, and one process needs none of them
    from bessemer.distributed.parallelize import parallelize_for_inference

    parallelize_for_inference(model, mesh)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # a DTensor is on its device already
            if as_dtensor(parameter) is None:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().to(device), requires_grad=False)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    dtype = model.dtype if config is None else served_dtype(config.dtype, model.dtype, device)
    return model if dtype == model.dtype else model.to(dtype)


def _axes(config: ParallelInferenceConfig) -> ParallelConfig:
    """The axes as training names them. Ranks that share experts and not matrices are copies of the rest, with the same rows."""
    return ParallelConfig(tensor=config.tensor, expert=config.expert, timeout=config.timeout)
