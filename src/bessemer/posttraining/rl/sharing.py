"""Rollouts of several processes: each tensor group completes its share of the prompts, and every process gets all groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bessemer.core.errors import BessemerError
from bessemer.distributed.mesh import Mesh
from bessemer.training.data.batches import Batch
from bessemer.training.trainee import Trainee

Value = TypeVar("Value")


@dataclass(frozen=True)
class Share:
    """What this process does of a rollout: the ranks that share every matrix are one group, which samples as one."""

    mesh: Mesh

    @property
    def groups(self) -> int:
        """Tensor groups of the job."""
        return self.mesh.layout.world_size // self.mesh.layout.tensor

    @property
    def places(self) -> slice:
        """The prompts of this group: every n-th of n groups."""
        return slice(self.mesh.rank // self.mesh.layout.tensor, None, self.groups)

    @property
    def leads(self) -> bool:
        """Whether this process judges for its group."""
        return self.mesh.rank % self.mesh.layout.tensor == 0

    def gathered(self, make: Callable[[], list[Value]]) -> list[Value]:
        """What `make` gives on each group's first rank for its places, in the order of all places, on every process.

        Every process calls this. An error of one is raised on all.
        """
        if self.mesh.alone:
            return make()
        report: tuple[list[Value], BessemerError | None] = ([], None)
        if self.leads:
            try:
                report = (make(), None)
            except BessemerError as error:
                report = ([], error)
        everyone: list[Any] = [None] * self.mesh.layout.world_size
        dist.all_gather_object(everyone, report)
        parts = everyone[:: self.mesh.layout.tensor]
        for _, failure in parts:
            if failure is not None:
                raise failure
        whole: list[Value] = [None] * sum(len(values) for values, _ in parts)  # type: ignore[list-item]
        for number, (values, _) in enumerate(parts):
            whole[number :: self.groups] = values
        return whole


def of_all_rows(trainee: Trainee, batch: Batch, compute: Callable[[Batch], Tensor]) -> Tensor:
    """Values of the tokens of all rows, (B, T), on every process: each computes those of the rows that it trains on.

    compute: of the rows of this process, (b, T), as `Trainee.per_token` gives it. Every process calls this.
    """
    mesh = trainee.mesh
    if mesh.alone:
        return compute(batch)
    layout = mesh.layout
    own_bT = compute(batch.rows(trainee.rows(batch.tokens_BT.shape[0])))
    everyone: list[Any] = [None] * layout.world_size
    dist.all_gather_object(everyone, own_bT.cpu())
    by_data_rank = {layout.data_rank(rank): values_bT for rank, values_bT in enumerate(everyone)}
    return torch.cat([by_data_rank[rank] for rank in range(layout.data_ranks)])
