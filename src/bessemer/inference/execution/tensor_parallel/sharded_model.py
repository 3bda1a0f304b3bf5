"""A model sharded over processes that serve it together: which layouts there can be, and each process's weights."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.distributed.device_mesh import DeviceMesh

from bessemer.core.environment import usable_cores
from bessemer.core.errors import ConfigError
from bessemer.core.store import read_json
from bessemer.distributed.config import ParallelConfig
from bessemer.distributed.layout import Layout
from bessemer.distributed.mesh import Mesh, Seat, abort, joined
from bessemer.distributed.shards import as_dtensor
from bessemer.inference.config import EngineConfig, ParallelInferenceConfig
from bessemer.inference.execution.tensor_parallel.commands import Workers
from bessemer.inference.execution.tensor_parallel.worker_processes import WorkerProcesses
from bessemer.model.decoder import Decoder
from bessemer.model.device import choose_device
from bessemer.model.folder import load_model
from bessemer.model.folder_config import CONFIG, read_model_config, refuse_scorer
from bessemer.model.quantisation.settings import read_settings


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
                "config": config.model_dump(mode="json"),
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
                held.callback(workers.let_go)
                mesh = mesh_of(config.parallel, own)
                return cls(shard_model(model, mesh, own), mesh, workers, held.pop_all())

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
        # it says what is wrong
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


def shard_model(model: Decoder, mesh: Mesh, device: torch.device) -> Decoder:
    """Keep of a model, in place, the shard that this rank computes, and move it to its device.

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
    return model


def _axes(config: ParallelInferenceConfig) -> ParallelConfig:
    """The axes as training names them. Ranks that share experts and not matrices are copies of the rest, with the same rows."""
    return ParallelConfig(tensor=config.tensor, expert=config.expert, timeout=config.timeout)
