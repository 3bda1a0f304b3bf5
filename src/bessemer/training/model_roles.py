"""The models of a training run, by role: those that are trained, and frozen ones beside them.

Shapes: B rows of a batch, T tokens of a row, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from bessemer.core.errors import ConfigError
from bessemer.distributed.collectives import whole_tensors
from bessemer.distributed.context import whole_rows
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.model.adapters import Adapter
from bessemer.model.adapters.trained import adapter_of, adapters_of, is_of_adapter
from bessemer.model.decoder import Decoder
from bessemer.training.config import LoopConfig
from bessemer.training.data.batch import Batch
from bessemer.training.head import target_log_probs
from bessemer.training.model_setup import Load, PreparedModel
from bessemer.training.runtime import Runtime

#: The role of the model that a run is about.
POLICY = "policy"
#: The role of the model that a policy must not drift from.
REFERENCE = "reference"

Value = TypeVar("Value")


@dataclass(frozen=True)
class OtherModel:
    """A model beside the policy: trained with it, as a critic, or frozen, as a reference or a teacher.

    load: gives it its weights once it is prepared, where it has none before. settings: of its optimizer; None: the run's.
    """

    role: str
    decoder: Decoder
    load: Load | None = None
    trained: bool = False
    settings: LoopConfig | None = None


class ModelRoles:
    """The models of a run by their roles, on this process of a mesh: an objective's `annotate` computes with them."""

    def __init__(
        self,
        trained: Mapping[str, PreparedModel],
        runtime: Runtime,
        *,
        mesh: Mesh = ALONE,
        frozen: Mapping[str, PreparedModel] | None = None,
        micro_batch_size: int | None = None,
        without_adapters: Callable[[Decoder], AbstractContextManager[None]] | None = None,
    ) -> None:
        """trained: the first is the policy. without_adapters: a context in which the policy's adapters are off; the reference
        is then the policy in it, and needs no weights of its own."""
        self.trained = dict(trained)
        self.frozen = dict(frozen or {})
        self.runtime = runtime
        self.mesh = mesh
        #: Number of finished steps; weights change only with it.
        self.version = 0
        self._micro_batch_size = micro_batch_size
        self._without_adapters = without_adapters
        self._device = torch.device(runtime.device)
        for prepared in self.frozen.values():
            prepared.model.requires_grad_(False)

    @property
    def policy(self) -> PreparedModel:
        """The model that the run is about."""
        return next(iter(self.trained.values()))

    @property
    def shares_prefixes(self) -> bool:
        """Whether documents of a row may share a prefix: the trained models support it, and no context axis splits
        the rows, whose masks know a row's documents but not what these share."""
        return self.mesh.layout.context == 1 and all(one.model.config.shares_prefixes for one in self.trained.values())

    @contextmanager
    def prepared(self, role: str) -> Iterator[PreparedModel]:
        """While entered, the model of a role in evaluation mode, without gradients.

        Raises ConfigError when the run has no such model.
        """
        model = (self.trained | self.frozen).get(role)
        if model is not None:
            with self._evaluating(model):
                yield model
            return
        if role != REFERENCE or self._without_adapters is None:
            raise ConfigError(f"this run has no {role}; it has {', '.join(self.trained | self.frozen)}")
        with self._evaluating(self.policy), self._without_adapters(self.policy.model):
            yield self.policy

    @contextmanager
    def _evaluating(self, prepared: PreparedModel) -> Iterator[None]:
        stages = prepared.pipeline.stages if prepared.pipeline is not None else []
        training = [stage.training for stage in stages]
        with self.runtime.evaluating(prepared.model):
            for stage in stages:
                stage.eval()
            try:
                yield
            finally:
                for stage, was in zip(stages, training, strict=True):
                    stage.train(was)

    def rows(self, batch_size: int) -> slice:
        """The rows of a batch that this process reads."""
        return self.mesh.layout.rows(self.mesh.rank, batch_size)

    def cut(self, batch: Batch) -> Batch:
        """This process's tokens of its rows, where the ranks of a context axis share rows."""
        layout = self.mesh.layout
        return batch if layout.context == 1 else batch.columns(layout.columns(self.mesh.rank, batch.tokens_BT.shape[1]))

    def micro_batches(self, batch: Batch, prepared: PreparedModel) -> list[Batch]:
        """A cut batch in the micro-batches of a step, on the host.

        Raises ConfigError when that would separate sequences that belong together.
        """
        size = self._micro_batch_size
        if prepared.pipeline is not None:
            size = batch.tokens_BT.shape[0] // prepared.pipeline.micro_batches
        return micro_batches_of(batch, size)

    def for_each_micro_batch(
        self, prepared: PreparedModel, batch: Batch, compute: Callable[[Decoder, Batch], Value]
    ) -> list[Value]:
        """`compute(model, micro_batch)` of a cut batch; of a pipeline in its last stage, and an empty list elsewhere.

        A pipeline splits as in training, where the rows divide so. The caller switches gradients off.
        """
        size = self._micro_batch_size
        if prepared.pipeline is not None:
            rows = batch.tokens_BT.shape[0]
            size = rows // math.gcd(rows, prepared.pipeline.micro_batches)
        micro_batches = [micro_batch.to(self._device) for micro_batch in micro_batches_of(batch, size)]
        if prepared.pipeline is not None:
            return prepared.pipeline.forward(micro_batches, lambda stage, number: compute(stage, micro_batches[number]))
        return [compute(prepared.model, micro_batch) for micro_batch in micro_batches]

    def per_token(self, role: str, batch: Batch, compute: Callable[[Decoder, Batch], Tensor]) -> Tensor:
        """Values of the tokens of this rank's whole rows, (B, T), on the batch's device, the same on all ranks that have these
        rows. In float32, or in float64 for a model in float64.

        compute: of a model and a micro-batch, (b, t), or under data axes alone (b, t, …). In evaluation mode and without
        gradients.
        """
        with self.prepared(role) as prepared:
            parts = self.for_each_micro_batch(prepared, self.cut(batch), compute)
            rows, columns = batch.tokens_BT.shape
            shape = (rows, columns // self.mesh.layout.context)
            dtype = torch.promote_types(next(prepared.model.parameters()).dtype, torch.float32)
            values_BT = torch.cat(parts).to(dtype) if parts else torch.empty(shape, dtype=dtype, device=self._device)
            if prepared.pipeline is not None:
                values_BT = prepared.pipeline.from_last_stage(values_BT)
        if self.mesh.layout.context > 1:
            values_BT = whole_rows(values_BT, self.mesh)
        return values_BT.to(batch.tokens_BT.device)

    def log_probs(self, batch: Batch, role: str = REFERENCE, *, temperature: float = 1.0) -> Tensor:
        """log p of each target under the model of a role, in nats, (B, T) as in `per_token`; 0 where there is no target."""

        def of_targets(model: Decoder, micro_batch: Batch) -> Tensor:
            hidden_BTD = model.hidden(**micro_batch.inputs)
            return target_log_probs(model, hidden_BTD, micro_batch.targets_BT, temperature=temperature)[0]

        return self.per_token(role, batch, of_targets)

    def adapter(self, role: str = POLICY) -> Adapter:
        """The whole adapter of a trained model, on every process: what `Engine.update_adapter` takes, so that a quantised base
        is never merged with it. Every process calls this. Tensors are shared with the model where nothing is sharded."""
        model = self.trained[role].model
        own = {name: parameter for name, parameter in model.named_parameters() if is_of_adapter(name)}
        return adapter_of(model, whole_tensors(own, self.mesh))

    def full_weights(self, role: str = POLICY) -> dict[str, Tensor]:
        """The whole weights of a trained model by name, on every process: for an engine that samples from it.

        Every process calls this. Tensors are shared with the model where nothing is sharded. A model that is trained by an
        adapter has that beside its weights: see `adapter`.
        """
        assert not adapters_of(self.trained[role].model), "the weights without their adapter are the model before training"
        return whole_tensors(dict(self.trained[role].model.named_parameters()), self.mesh)


def micro_batches_of(batch: Batch, size: int | None) -> list[Batch]:
    """A batch's rows in micro-batches of `size` rows, the last one possibly smaller; the batch itself when None.

    Raises ConfigError when that would separate sequences that belong together.
    """
    rows = batch.tokens_BT.shape[0]
    if size is None or size >= rows:
        return [batch]
    if size % batch.rows_together:
        raise ConfigError(
            f"micro_batch_size {size} would separate sequences that are judged together, {batch.rows_together} at a time; "
            f"take a multiple of {batch.rows_together}"
        )
    return [batch.rows(slice(start, start + size)) for start in range(0, rows, size)]
