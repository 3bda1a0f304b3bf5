"""State of a run beside the policy's: other trained models, and what a source of batches has under way."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from bessemer.core.errors import CheckpointError
from bessemer.distributed.mesh import Mesh
from bessemer.training.checkpoint.state import model_state, restore_model
from bessemer.training.data.batches import BatchSource


class ModelState:
    """Weights and optimizer states of a model that is trained beside the policy."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._model = model
        self._optimizers = optimizers

    def state_dict(self) -> dict[str, Any]:
        """By parameter name."""
        return model_state(self._model, self._optimizers)

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        restore_model(self._model, self._optimizers, values)


class SourceState:
    """What a source of batches has under way on every data rank, as one value that each rank writes and reads whole.

    Tensors of a rollout have other shapes at every checkpoint, so the states are stored as bytes. They are opened without
    running code.
    """

    def __init__(self, source: BatchSource, mesh: Mesh) -> None:
        self._source = source
        self._mesh = mesh

    def state_dict(self) -> dict[str, Any]:
        """The states by data rank. Every process calls this."""
        layout = self._mesh.layout
        states: list[Any] = [self._source.state_dict()]
        if not self._mesh.alone:
            everyone: list[Any] = [None] * layout.world_size
            dist.all_gather_object(everyone, states[0])
            by_rank = {layout.data_rank(rank): state for rank, state in reversed([*enumerate(everyone)])}
            states = [by_rank[rank] for rank in range(layout.data_ranks)]
        stream = io.BytesIO()
        torch.save(states, stream)
        return {"states": stream.getvalue()}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Restore the state of this data rank. Raises CheckpointError when the run had another number of them."""
        states = torch.load(io.BytesIO(values["states"]), weights_only=True)
        layout = self._mesh.layout
        if len(states) != layout.data_ranks:
            raise CheckpointError(
                f"the checkpoint holds batches under way of {len(states)} data-parallel ranks, and this run has "
                f"{layout.data_ranks}; resume with as many"
            )
        self._source.load_state_dict(states[layout.data_rank(self._mesh.rank)])
