"""Micro-batches through the stages of a pipeline, forward and backward, in the orders that PyTorch's schedules give.

Shapes: B rows of a micro-batch, T tokens of a row, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, schedules

from bessemer.distributed.gradients import local
from bessemer.distributed.mesh import Mesh
from bessemer.distributed.sharding import release_gathered
from bessemer.distributed.stages import Rows, Stage, needs_embedding

_SCHEDULES: dict[str, Any] = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
}

Outcome = TypeVar("Outcome")


class Pipeline:
    """The stages that this rank holds, and how it passes states on to the ranks that hold the others.

    Every rank of the pipeline axis is given the same rows and makes the same calls.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        mesh: Mesh,
        schedule: str,
        micro_batches: int,
        *,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        auxiliary: Callable[[Stage, Any], Tensor | float] | None = None,
    ) -> None:
        """autocast: what the stages run in. auxiliary: the losses of a stage's layers and of those before it in a micro-batch,
        where layers have losses of their own; they travel with the states."""
        self.stages, self.micro_batches = stages, micro_batches
        self._device, self._autocast, self._auxiliary = device, autocast, auxiliary
        self._group, count = mesh.pipeline.get_group(), mesh.layout.stages
        wrapped = [
            _Numbered(stage, stage.number, count, device, group=self._group, dw_builder=_whole_backward_of(stage))
            for stage in stages
        ]
        made = _SCHEDULES[schedule]
        single = issubclass(made, schedules.PipelineScheduleSingle)
        self.schedule = made(wrapped[0] if single else wrapped, micro_batches, loss_fn=_itself, scale_grads=False)
        #: Ranks of the pipeline's group by the stages that they hold.
        self._ranks: dict[int, int] = wrapped[0].stage_index_to_group_rank
        self._rank = dist.get_rank(self._group)
        self._copied = needs_embedding(stages[0])
        #: Whether the last stage's copy of the embedding may be older than the first stage's.
        self._stale = True

    def gradients(
        self,
        pieces: Sequence[Rows],
        loss: Callable[[Stage, int], Tensor],
        factors: Sequence[float],
        look: Callable[[Stage, int], None] = lambda stage, number: None,
    ) -> list[Tensor]:
        """Add the gradients of Σ factor · loss over the micro-batches to the parameters'.

        pieces: `micro_batches` of one shape. Returns their losses in order where the last stage is, nothing elsewhere.
        look: called after every forward pass of a stage, with the number of the micro-batch; in the first step that of number
        0 is run once more than the others, to learn the shapes.
        """
        assert len(pieces) == self.micro_batches, (len(pieces), self.micro_batches)
        values: dict[int, Tensor] = {}

        def weighed(stage: Stage, number: int) -> Tensor:
            value = loss(stage, number)
            values[number] = value.detach()
            return value if factors[number] == 1.0 else value * factors[number]

        self._refresh_copy()
        self._prepare(pieces, weighed, self._auxiliary, look)
        self.schedule.step(target=torch.arange(len(pieces)), return_outputs=False)
        self._return_copys_gradient()
        self._stale = True  # an optimizer will move the embedding
        return [values[number] for number in sorted(values)]

    def weights_changed(self) -> None:
        """Say that something else than an optimizer, after `gradients`, has changed the weights."""
        self._stale = True

    @torch.no_grad()
    def outcomes(self, pieces: Sequence[Rows], finish: Callable[[Stage, int], Outcome]) -> list[Outcome]:
        """What `finish` makes of every micro-batch, from the last stage and its number, without gradients; nothing where that
        stage is not.

        pieces: any number, of one shape.
        """
        self._refresh_copy()
        self._prepare(pieces, finish, None)
        sends: list[tuple[dist.Work | None, Tensor]] = []
        carried: Iterable[Any] = ()
        for stage in self.stages:
            before, after = self._ranks.get(stage.number - 1), self._ranks.get(stage.number + 1)
            if before not in (None, self._rank):
                carried = self._received(before, len(pieces))
            inputs, made = iter(carried), []
            for number in range(len(pieces)):
                received = () if stage.is_first else (next(inputs),)
                stage.micro_batch = number
                made.append(stage(*received))
                if after not in (None, self._rank):
                    if number == 0:
                        dist.send_object_list([(made[0].shape, made[0].dtype)], group=self._group, group_dst=after)
                    sent = made[-1].contiguous()
                    sends.append((dist.isend(sent, group=self._group, group_dst=after), sent))
            carried = made
        for work, _ in sends:
            assert work is not None
            work.wait()
        for stage in self.stages:
            release_gathered(stage)
        return list(carried) if self.stages[-1].is_last else []

    def _received(self, source: int, count: int) -> Iterator[Tensor]:
        """The states of every micro-batch from the stage before, of whose shape and type the first message tells."""
        told: list[Any] = [None]
        dist.recv_object_list(told, group=self._group, group_src=source)
        shape, dtype = told[0]
        for _ in range(count):
            hidden_BTD = torch.empty(shape, dtype=dtype, device=self._device)
            dist.recv(hidden_BTD, group=self._group, group_src=source)
            yield hidden_BTD

    def _prepare(
        self,
        pieces: Sequence[Rows],
        finish: Callable[[Stage, int], Any],
        auxiliary: Callable[[Stage, Any], Tensor | float] | None,
        look: Callable[[Stage, int], None] = lambda stage, number: None,
    ) -> None:
        """Tell the stages what to do with the micro-batches."""

        def work(stage: Stage, received: tuple[Tensor, ...], number: int) -> Any:
            with self._autocast():
                stage.begin(pieces[number], received)
                made = finish(stage, number) if stage.is_last else stage.carry()
                look(stage, number)
                if stage.is_last or auxiliary is None:
                    return made
                return made, torch.as_tensor(auxiliary(stage, pieces[number]), device=made.device)

        for stage in self.stages:
            stage.work = work

    def _refresh_copy(self) -> None:
        """Give the last stage the first one's embedding, where it has a copy of it that may be old."""
        if not (self._copied and self._stale):
            return
        first, last = self.stages[0], self.stages[-1]
        source, target = self._ranks[0], self._ranks[len(self._ranks) - 1]
        with torch.no_grad():
            if first.is_first and last.is_last:
                local(last.embed_tokens.weight).copy_(local(first.embed_tokens.weight))
            elif first.is_first:
                dist.send(local(first.embed_tokens.weight).contiguous(), group=self._group, group_dst=target)
            elif last.is_last:
                dist.recv(local(last.embed_tokens.weight), group=self._group, group_src=source)
        self._stale = False

    def _return_copys_gradient(self) -> None:
        """Add the gradient of the last stage's copy of the embedding to that of the first stage's."""
        if not self._copied:
            return
        first, last = self.stages[0], self.stages[-1]
        source, target = self._ranks[len(self._ranks) - 1], self._ranks[0]
        if last.is_last:
            weight = last.embed_tokens.weight
            gradient = torch.zeros_like(local(weight)) if weight.grad is None else local(weight.grad).contiguous()
            weight.grad = None
            if not first.is_first:
                dist.send(gradient, group=self._group, group_dst=target)
        if first.is_first:
            weight = first.embed_tokens.weight
            if not last.is_last:
                gradient = torch.empty_like(local(weight))
                dist.recv(gradient, group=self._group, group_src=source)
            assert weight.grad is not None
            local(weight.grad).add_(gradient)


class _Numbered(PipelineStage):
    """Tells a stage which micro-batch it works on: each rank has the rows of all, so they need not be passed on."""

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        stage = self.submod
        assert isinstance(stage, Stage)
        stage.micro_batch = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *arguments, **options)


def _whole_backward_of(stage: Stage) -> Callable[[], Callable[[], None]] | None:
    """For a stage whose backward pass PyTorch cannot split: what is left to do when all is done at once.

    Blocks that predict further ahead each read the embedding besides the states, and it would free what two of them share.
    """
    return (lambda: lambda: None) if stage.is_last and stage.config.num_nextn_predict_layers else None


def _itself(output: Tensor, target: Tensor) -> Tensor:
    """The loss is what the last stage computes; it knows its targets itself."""
    return output
