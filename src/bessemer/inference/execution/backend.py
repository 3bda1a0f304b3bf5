"""What a `Runner` asks of a device: the matmuls of a model's weights, attention over its pages, and steps in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from bessemer.inference.execution.batch import Batch
from bessemer.inference.execution.step_inputs import StepInputs
from bessemer.inference.sampling.device_sampler import SampledRows
from bessemer.model.cache import Cache
from bessemer.model.quantised_linear import PackedMatmuls

# Shapes: R wanted rows, V vocabulary, S tokens of a row.


class StepBeside(NamedTuple):
    """What a step has beside its batch: where its numbers are put; the tokens of the step before, of which the batch may have
    some pending; and the rows that are sampled from, whose numbers are copied with the step's where those are copied."""

    inputs: StepInputs
    sampled_R: Tensor
    rows: SampledRows | None = None


class Linear(Protocol):
    """The matmuls of a model's weights in one storage form."""

    @property
    def arithmetic(self) -> Sequence[str]:
        """How it multiplies, in words, where that is not as the model's modules do."""

    @property
    def matmuls(self) -> PackedMatmuls:
        """Of the layers that are not multiplied as their modules do."""

    @property
    def own_threads(self) -> bool:
        """Whether it has threads of its own. PyTorch's threads spin for a while after their work, and take the cores from
        them."""

    def is_soon_done(self, rows: int, *, invariant: bool) -> bool:
        """Whether PyTorch's part of a step of some rows is too little for several threads."""

    def weights_changed(self) -> None:
        """Store the model's weights again: they are no longer those that were stored."""


class Attention(Protocol):
    """Writes a step's keys and values into pages, and attends to them."""

    @property
    def arithmetic(self) -> Sequence[str]:
        """How it computes, in words, where that is not by PyTorch."""

    def cache(self, batch: Batch, inputs: StepInputs) -> Cache:
        """The decoder's cache for one forward pass over a batch. It puts its numbers into `inputs`, which are copied before
        the pass."""


class WholeSteps(Protocol):
    """Steps in one call, of the sequences that it can compute."""

    @property
    def arithmetic(self) -> Sequence[str] | None:
        """How it computes, in words; None where that is as the modules do."""

    #: As of `Linear`.
    own_threads: bool
    #: The hidden states that the last batch wanted to keep (`Batch.states`), by layer, a row for each of its rows.
    states: dict[int, Tensor]
    #: Whether a row's logits are the same bits whatever else is in the batch, and however a prompt is cut.
    invariant: bool

    def takes(self, batch: Batch) -> Sequence[int]:
        """The sequences of a batch that it computes: all, some or none."""

    def forward(self, batch: Batch, beside: StepBeside) -> Tensor:
        """As `Runner.forward`, for a batch of such sequences."""

    def weights_changed(self) -> None:
        """As of `Linear`."""


class TokenGenerator(Protocol):
    """Several tokens of each sequence in one call."""

    def generate(self, batch: Batch, uniforms_RS: Tensor, temperatures_R: Tensor) -> tuple[Tensor, Tensor]:
        """As `Runner.generate`."""


@dataclass(frozen=True)
class Backend:
    """What computes the steps of one model on its device.

    whole: None where every step goes through the model's modules. samples: whether tokens are sampled where the logits lie
    (`Runner.sample`), so that the next step is scheduled beside the current one. generator: None where each token is a step of
    its own.
    """

    linear: Linear
    attention: Attention
    whole: WholeSteps | None = None
    samples: bool = False
    generator: TokenGenerator | None = None
