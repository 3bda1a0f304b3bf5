"""The ranks of a running job that share a model with this one, commanded by broadcasts.

The job's processes are a trainer's, so an engine can neither start nor end them. They come to each of its calls together, and
leave it together: with a result, or with the first error that any of them had.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from bessemer.core.errors import BessemerError, LostProcessError
from bessemer.distributed.layout import Layout
from bessemer.distributed.mesh import ALONE, Mesh, agree, job_timeout
from bessemer.inference.execution.tensor_parallel.adapters import AdapterNumbers
from bessemer.inference.execution.tensor_parallel.commands import Command, encode

Result = TypeVar("Result")


class _Report(NamedTuple):
    """An error of a rank: the `order`-th of the job. is_final: its group's ranks are no longer at the same call."""

    order: int
    rank: int
    error: BessemerError
    is_final: bool


class JobGroup:
    """The tensor group of this rank, with a process group of the engine's own; the `Workers` of its first rank.

    mesh: of the group alone. leads: whether this is its first rank, which schedules. failure: why nothing more is computed.
    """

    def __init__(self, mesh: Mesh) -> None:
        """mesh: the job's. All its ranks call this."""
        self.numbers = AdapterNumbers()
        self.failure: LostProcessError | None = None
        self.mesh = tensor_group_mesh(mesh)
        self.leads = self.mesh.rank == 0
        self._is_job = not mesh.alone
        self._rank = mesh.rank
        self._key = f"engine {agree(secrets.token_hex(8))}: errors" if self._is_job else ""
        self._order = 0
        self._ended = False

    # -- of the first rank

    def tell(self, command: Command) -> None:
        """Send a command to the other ranks."""
        self._send(encode(command, self.numbers))

    def release(self) -> None:
        """Let the other ranks leave the call."""
        if not self.mesh.alone and not self._ended:
            self._send(None)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A collective call: an error within it is final, since the ranks are no longer at the same call."""
        if self.failure is not None:
            raise self.failure
        try:
            yield
        except BaseException as error:
            self.abandon(error)
            raise

    # -- of the others

    def messages(self) -> Iterator[bytes]:
        """Commands, encoded, until the first rank releases this one."""
        while True:
            holder: list[bytes | None] = [None]
            dist.broadcast_object_list(holder, group=self._axis.get_group(), group_src=0)
            if holder[0] is None:
                return
            yield holder[0]

    # -- of all

    def abandon(self, error: BaseException) -> None:
        """After an error in the middle of a call: close the connections to the group, so that no rank waits for this one."""
        self.failure = _as_failure(error, self._rank)
        # before the others have one because of it
        self._take_order()
        self.close()

    def close(self) -> None:
        """End the group. The other ranks' collectives in it fail from now on."""
        if self.mesh.alone or self._ended:
            return
        self._ended = True
        group = self._axis.get_group()
        # a connection is closed with the last reference to its group, and the mesh has one
        getattr(self._axis, "_pg_registry", {}).clear()
        dist.destroy_process_group(group)

    def end_call(self, error: Exception | None) -> None:
        """Leave a call together with all ranks of the job. Raises the first error that one of them had, on all.

        An error that no user can mend is a LostProcessError with its text on the other ranks. After a final one no rank
        computes anything more.
        """
        if not self._is_job:
            if error is not None:
                raise error
            return
        report = None
        if error is not None:
            shown = error if isinstance(error, BessemerError) else _as_failure(error, self._rank)
            report = _Report(self._take_order(), self._rank, shown, self.failure is not None)
        reports: list[_Report | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reports, report)
        self._order = 0
        errors = [each for each in reports if each is not None]
        if not errors:
            return
        first = min(errors, key=lambda each: each.order)
        if any(each.is_final for each in errors):
            self.failure = _as_failure(first.error, first.rank)
            self.close()
        raise error if error is not None and first.rank == self._rank else first.error

    def share(self, result: Result | None) -> Result:
        """The first rank's result on every rank of the group."""
        holder: list[Any] = [result]
        if not self.mesh.alone:
            dist.broadcast_object_list(holder, group=self._axis.get_group(), group_src=0)
        shared: Result = holder[0]
        return shared

    # -- inside

    @property
    def _axis(self) -> DeviceMesh:
        return self.mesh.tensor

    def _send(self, message: bytes | None) -> None:
        dist.broadcast_object_list([message], group=self._axis.get_group(), group_src=0)

    def _take_order(self) -> int:
        """The place of this rank's error among those of the job."""
        if not self._order and self._is_job:
            self._order = dist.distributed_c10d._get_default_store().add(self._key, 1)
        return self._order


def tensor_group_mesh(mesh: Mesh) -> Mesh:
    """The mesh of the ranks that share every matrix with this one, with a process group of its own.

    All ranks of the job call it.
    """
    ranks = mesh.layout.tensor
    if ranks == 1:
        return ALONE if mesh.alone else Mesh(ALONE.layout, processes_here=mesh.processes_here)
    own = None
    # the tensor axis is the innermost: its groups are neighbours
    for first in range(0, mesh.layout.world_size, ranks):
        members = list(range(first, first + ranks))
        group = dist.new_group(members, timeout=job_timeout())
        if mesh.rank in members:
            own = DeviceMesh.from_group(group, mesh.tensor.device_type, mesh_dim_names=("tensor",))
    return Mesh(Layout(tensor=ranks), mesh.place.tensor, own, processes_here=mesh.processes_here)


def _as_failure(error: BaseException, rank: int) -> LostProcessError:
    if isinstance(error, LostProcessError):
        return error
    return LostProcessError(f"process {rank} of the job failed: {' '.join(str(error).split()) or type(error).__name__}")
