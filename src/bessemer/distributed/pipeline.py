"""Pipeline parallelism: micro-batches through the stages, forward and backward, under PyTorch's schedules.

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

from bessemer.distributed.mesh import Mesh, local
from bessemer.distributed.sharding import release_gathered
from bessemer.distributed.stages import DecoderStage, StageRows, needs_embedding

_SCHEDULES: dict[str, Any] = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
}

Value = TypeVar("Value")


class Pipeline:
    """The pipeline stages of this rank, and the exchange of hidden states with the ranks of the other stages.

    Every rank of the pipeline axis gets the same rows and makes the same calls.
    """

    def __init__(
        self,
        stages: Sequence[DecoderStage],
        mesh: Mesh,
        schedule: str,
        micro_batches: int,
        *,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        auxiliary: Callable[[DecoderStage, Any], Tensor | float] | None = None,
    ) -> None:
        """autocast: the context that stages run in. auxiliary: the accumulated losses of a stage's layers and of those before
        it in a micro-batch, where layers have losses of their own; they are sent along with the hidden states."""
        self.stages = stages
        self.micro_batches = micro_batches
        self._device = device
        self._autocast = autocast
        self._auxiliary = auxiliary
        self._group = mesh.pipeline.get_group()
        count = mesh.layout.stages
        wrapped = [
            _NumberedStage(stage, stage.number, count, device, group=self._group, dw_builder=_unsplit_backward(stage))
            for stage in stages
        ]
        schedule_class = _SCHEDULES[schedule]
        single = issubclass(schedule_class, schedules.PipelineScheduleSingle)
        self.schedule = schedule_class(wrapped[0] if single else wrapped, micro_batches, loss_fn=_identity, scale_grads=False)
        #: Ranks of the pipeline's group by stage.
        self._ranks: dict[int, int] = wrapped[0].stage_index_to_group_rank
        self._rank = dist.get_rank(self._group)
        self._copied = needs_embedding(stages[0])
        outer = [stage for stage in stages if stage.is_first or stage.is_last]
        self._embedding_trained = not self._copied or all(stage.embed_tokens.weight.requires_grad for stage in outer)
        #: Whether the last stage's copy of the embedding may be older than the first stage's.
        self._stale = True

    def gradients(
        self,
        micro_batches: Sequence[StageRows],
        loss: Callable[[DecoderStage, int], Tensor],
        after_forward: Callable[[DecoderStage, int], None] = lambda stage, number: None,
    ) -> None:
        """Add the gradients of Σ loss over the micro-batches to those of the parameters.

        micro_batches: `self.micro_batches` of one shape. loss: called on the rank of the last stage with the number of the
        micro-batch. after_forward: called after every forward pass of a stage and its losses; the first step runs number 0 once
        more than the others, to infer the shapes.
        """
        assert len(micro_batches) == self.micro_batches, (len(micro_batches), self.micro_batches)
        self._refresh_embedding_copy()
        self._set_forward(micro_batches, loss, self._auxiliary, after_forward)
        self.schedule.step(target=torch.arange(len(micro_batches)), return_outputs=False)
        self._forget_forward()
        self._reduce_embedding_gradient()
        # the optimizer is about to change the embedding
        self._stale = True

    def weights_changed(self) -> None:
        """Note that something other than an optimizer step after `gradients` changed the weights."""
        self._stale = True

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[StageRows], finish: Callable[[DecoderStage, int], Value]) -> list[Value]:
        """`finish(last stage, number)` of every micro-batch, without gradients; an empty list on ranks without the last stage.

        micro_batches: any number, of one shape.
        """
        self._refresh_embedding_copy()
        self._set_forward(micro_batches, finish, None)
        sends: list[tuple[dist.Work | None, Tensor]] = []
        hidden: Iterable[Any] = ()
        for stage in self.stages:
            before, after = self._ranks.get(stage.number - 1), self._ranks.get(stage.number + 1)
            if before not in (None, self._rank):
                hidden = self._receive(before, len(micro_batches))
            inputs, outputs = iter(hidden), []
            for number in range(len(micro_batches)):
                received = () if stage.is_first else (next(inputs),)
                stage.micro_batch = number
                outputs.append(stage(*received))
                if after not in (None, self._rank):
                    if number == 0:
                        dist.send_object_list([(outputs[0].shape, outputs[0].dtype)], group=self._group, group_dst=after)
                    sent = outputs[-1].contiguous()
                    sends.append((dist.isend(sent, group=self._group, group_dst=after), sent))
            hidden = outputs
        for work, _ in sends:
            assert work is not None
            work.wait()
        for stage in self.stages:
            release_gathered(stage)
        self._forget_forward()
        return list(hidden) if self.stages[-1].is_last else []

    def from_last_stage(self, values: Tensor) -> Tensor:
        """The values of the rank of the last stage on every rank of the pipeline, which pass tensors of the same shape and
        dtype."""
        values = values.contiguous()
        dist.broadcast(values, group=self._group, group_src=self._ranks[len(self._ranks) - 1])
        return values

    def _receive(self, source: int, count: int) -> Iterator[Tensor]:
        """The hidden states of every micro-batch from the previous stage, whose first message holds their shape and dtype."""
        header: list[Any] = [None]
        dist.recv_object_list(header, group=self._group, group_src=source)
        shape, dtype = header[0]
        for _ in range(count):
            hidden_BTD = torch.empty(shape, dtype=dtype, device=self._device)
            dist.recv(hidden_BTD, group=self._group, group_src=source)
            yield hidden_BTD

    def _set_forward(
        self,
        micro_batches: Sequence[StageRows],
        finish: Callable[[DecoderStage, int], Any],
        auxiliary: Callable[[DecoderStage, Any], Tensor | float] | None,
        after_forward: Callable[[DecoderStage, int], None] = lambda stage, number: None,
    ) -> None:
        """Set the forward computation of the stages on these micro-batches."""

        def compute(stage: DecoderStage, received: tuple[Tensor, ...], number: int) -> Any:
            with self._autocast():
                stage.begin(micro_batches[number], received)
                output = finish(stage, number) if stage.is_last else stage.hidden_states()
                if not stage.is_last and auxiliary is not None:
                    output = output, torch.as_tensor(auxiliary(stage, micro_batches[number]), device=output.device)
                after_forward(stage, number)
                return output

        for stage in self.stages:
            stage.compute = compute

    def _forget_forward(self) -> None:
        """Forget what the stages computed, which holds the batch and, through the autograd graph of the outputs that PyTorch
        keeps, the stages themselves."""
        for stage in self.stages:
            stage.compute = None

    def _refresh_embedding_copy(self) -> None:
        """Copy the first stage's embedding to the last stage, where that has a copy that may be stale."""
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

    def _reduce_embedding_gradient(self) -> None:
        """Add the gradient of the last stage's copy of the embedding to that of the first stage's."""
        if not self._copied or not self._embedding_trained:
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


class _NumberedStage(PipelineStage):
    """Sets a stage's micro-batch number: each rank has the rows of all micro-batches, so they are not sent."""

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        stage = self.submod
        assert isinstance(stage, DecoderStage)
        stage.micro_batch = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *arguments, **options)


def _unsplit_backward(stage: DecoderStage) -> Callable[[], Callable[[], None]] | None:
    """`dw_builder` of a stage whose backward pass PyTorch cannot split: it runs whole, and no weight gradients are left.

    Multi-token prediction blocks each read the embedding besides the hidden states; the split would free what they share.
    """
    return (lambda: lambda: None) if stage.is_last and stage.config.num_nextn_predict_layers else None


def _identity(output: Tensor, target: Tensor) -> Tensor:
    """The schedule's loss function: the last stage's output is already the loss."""
    return output
