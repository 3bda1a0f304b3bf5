"""The mesh of processes: this process's rank and groups, the collectives of the training loop, its shards of tensors.

A tensor of which this process holds a shard is recognised without loading `torch.distributed.tensor`, which takes seconds:
where that module is not loaded, there is no such tensor.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _abort_process_group

from bessemer.distributed.layout import Layout, ParallelConfig, RankCoordinates
from bessemer.model.device import widest_float

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


#: PyTorch 2.15 has renamed this function.
_SET_TIMEOUT: Any = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout

_MODULE = "torch.distributed.tensor"


def as_dtensor(tensor: Tensor) -> DTensor | None:
    """The tensor where it is a DTensor; None where it is a plain one."""
    module = sys.modules.get(_MODULE)
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; a plain tensor itself."""
    sharded = as_dtensor(tensor)
    return tensor if sharded is None else sharded.to_local()


def sharded_dim(tensor: Tensor) -> int | None:
    """The dimension along which a DTensor is cut by its first axis; None where it is whole there, or a plain tensor."""
    sharded = as_dtensor(tensor)
    if sharded is None or not sharded.placements[0].is_shard():
        return None
    return int(sharded.placements[0].dim)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Mesh:
    """A layout, this process's rank in it, and the groups of its axes (None for one process, which needs none).

    Three views of the same ranks, since FSDP wants its axis and the tensor axis of a parameter in one mesh:
    `dense`: pipeline, data_replicate, shard (data_shard × context), tensor. `sequence`: the same with data_shard and context
    apart. `sparse`: shard cut into what replicates the experts and what shares them: shard_outer, expert; there the tensor axis
    is a part of the expert axis.
    `processes_here`: how many of the ranks run on this host.
    """

    layout: Layout
    rank: int = 0
    dense: DeviceMesh | None = None
    sequence: DeviceMesh | None = None
    sparse: DeviceMesh | None = None
    processes_here: int = 1

    @classmethod
    def of(cls, layout: Layout, device_type: str) -> Mesh:
        """The groups of a layout; every process of the job calls this, in the same order."""
        if layout.world_size == 1:
            return cls(layout)
        assert dist.get_world_size() == layout.world_size, (dist.get_world_size(), layout)

        timeout = job_timeout()

        def view(**axes: int) -> DeviceMesh:
            made = init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))
            if timeout is not None:
                for group in made.get_all_groups():
                    _SET_TIMEOUT(timeout, group)
            return made

        outer = {"pipeline": layout.pipeline, "data_replicate": layout.data_replicate}
        dense = view(**outer, shard=layout.shard_ranks, tensor=layout.tensor)
        sequence = sparse = None
        if layout.context > 1:
            sequence = view(**outer, data_shard=layout.data_shard, context=layout.context, tensor=layout.tensor)
        if layout.expert > 1:
            sparse = view(**outer, shard_outer=layout.ranks_of_an_expert, expert=layout.expert_ranks)
        hosts: list[Any] = [None] * layout.world_size
        dist.all_gather_object(hosts, socket.gethostname())
        return cls(layout, dist.get_rank(), dense, sequence, sparse, hosts.count(socket.gethostname()))

    @classmethod
    def here(cls, config: ParallelConfig, device_type: str) -> Mesh:
        """The mesh of the job that this process has joined, or of one process. Raises ConfigError, as `Layout.of`."""
        return cls.of(Layout.of(config, dist.get_world_size() if dist.is_initialized() else 1), device_type)

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.layout.world_size == 1

    @property
    def leads(self) -> bool:
        """Whether this process, rank 0, writes the run's files."""
        return self.rank == 0

    @property
    def place(self) -> RankCoordinates:
        """This process's index on every axis."""
        return self.layout.place(self.rank)

    @property
    def data(self) -> DeviceMesh:
        """The axes that FSDP works on: copies, and the ranks that share one."""
        assert self.dense is not None
        return self.dense["data_replicate", "shard"]

    @property
    def tensor(self) -> DeviceMesh:
        """The ranks that share every matrix with this one."""
        assert self.dense is not None
        return self.dense["tensor"]

    @property
    def pipeline(self) -> DeviceMesh:
        """The ranks that hold the other layers of what this one holds."""
        assert self.dense is not None
        return self.dense["pipeline"]

    @property
    def context(self) -> DeviceMesh:
        """The ranks that share this one's rows."""
        assert self.sequence is not None
        return self.sequence["context"]

    @property
    def experts(self) -> DeviceMesh:
        """The ranks that share the experts of a layer with this one."""
        assert self.sparse is not None
        return self.sparse["expert"]

    @property
    def data_of_experts(self) -> DeviceMesh:
        """The axes that FSDP works on for experts: ranks that have the same ones as this."""
        assert self.sparse is not None
        return self.sparse["data_replicate", "shard_outer"]

    def sum(self, values: Tensor, copies: int = 1) -> Tensor:
        """The sum over all processes, on every process, in float64. copies: how many of them hold each summand.

        On the device of the values, or on the CPU where that has no float64."""
        values = _own(values)
        if not self.alone:
            dist.all_reduce(values)
        return values / copies

    def largest(self, values: Tensor) -> Tensor:
        """The elementwise maximum over all processes, on every process, in float64; its device as that of `sum`."""
        values = _own(values)
        if not self.alone:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether any process raises it; the same on every process."""
        if self.alone:
            return list(flags)
        return [bool(count) for count in self.sum(torch.tensor(flags, dtype=torch.float64))]

    def wait(self) -> None:
        """A barrier of all processes."""
        if not self.alone:
            dist.barrier()


def _own(values: Tensor) -> Tensor:
    """A float64 copy without gaps: a collective writes into what it is given, and gloo reads past strides. On the CPU where the
    device of the values has no float64."""
    values = values.detach()
    if widest_float(values.device) != torch.float64:
        values = values.cpu()
    return values.to(torch.float64, memory_format=torch.contiguous_format, copy=True)


def job_timeout() -> timedelta | None:
    """Timeout of a collective of the joined job; None for a fake group. Later groups must be given it: PyTorch's default is 10
    or 30 minutes."""
    world = dist.group.WORLD
    assert world is not None
    options = getattr(world._get_backend(torch.device("cpu")), "options", None)
    return None if options is None else options._timeout


def new_group(ranks: Sequence[int] | None = None, **settings: Any) -> dist.ProcessGroup:
    """`dist.new_group` with the timeout of the job. Processes that are not among its ranks may make it, and must not use it."""
    return cast(dist.ProcessGroup, dist.new_group(ranks, timeout=job_timeout(), **settings))


def agree(value: Any) -> Any:
    """Rank 0's value on every rank of the joined job; a barrier too. For small values: they are pickled."""
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


#: The mesh of a single process.
ALONE = Mesh(Layout())


class Seat(NamedTuple):
    """A rank of a job on this machine, whose processes rendezvous through a file."""

    rank: int
    processes: int
    file: Path


@contextmanager
def joined(device: torch.device, timeout_seconds: float, seat: Seat | None = None) -> Iterator[None]:
    """While entered, this process belongs to a job: the seat's, or the one of the environment (`RANK`, `WORLD_SIZE`,
    `MASTER_ADDR`, as torchrun sets them).

    A collective that a rank does not join within the timeout ends the process with an error, so that the others do not wait for
    a rank that hangs or dies. Objects are exchanged through gloo on the CPU also where tensors use NCCL.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    place: dict[str, Any] = {}
    if seat is not None:
        store = dist.FileStore(str(seat.file), seat.processes)  # type: ignore[attr-defined]
        place = {"store": store, "rank": seat.rank, "world_size": seat.processes}
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds), **place)
    try:
        yield
    finally:
        # the group is gone after `abort`
        if dist.is_initialized():
            dist.destroy_process_group()


def abort() -> None:
    """Abort the process group from any thread, and with it pending collectives: NCCL kernels do not notice a dead process and
    would wait for the timeout."""
    _abort_process_group()
