"""Collective engine: every rank of a training job samples, from the weights that the ranks train.

The job's processes are a trainer's, so an engine can neither start nor end them. They come to each of its calls together, and
leave it together: with a result, or with the first error that any of them had. Rank 0 commands the others by broadcasts.

The training shards of a rank's tensor group are those that inference takes, so a weight is gathered over FSDP's axes alone, one
after the other; without FSDP nothing travels. No rank has the whole model, unless one tensor rank is the whole.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from bessemer.core.errors import BessemerError, ConfigError, LostProcessError
from bessemer.distributed.collectives import redistributed
from bessemer.distributed.layout import Layout
from bessemer.distributed.mesh import ALONE, Mesh, agree, local, new_group
from bessemer.distributed.parallelize import parallelize_for_inference
from bessemer.distributed.sharding import release_gathered
from bessemer.inference.build import worker_runners
from bessemer.inference.config import EngineConfig
from bessemer.inference.engine import Engine
from bessemer.inference.execution.runner import run_worker
from bessemer.inference.execution.tensor_parallel.sharded_model import Command, ShardedModel, encode, one_line
from bessemer.inference.execution.weights import AdapterNumbers, held_weight
from bessemer.inference.offline import Rollouts
from bessemer.inference.request import Completion, Prompts
from bessemer.inference.sampling.params import SamplingParams
from bessemer.inference.scores import Score, ScoreItem
from bessemer.model.adapters import Adapter
from bessemer.model.adapters.trained import merge_into
from bessemer.model.decoder import Decoder
from bessemer.model.vision.trained import VisionDecoder, empty_like
from bessemer.tokenization.tokenizer import Tokenizer

Result = TypeVar("Result")


class _Report(NamedTuple):
    """The `order`-th error of the job. is_final: the ranks of the group are no longer at the same call."""

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

    # -- called on the first rank

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

    # -- called on all ranks

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
        group = new_group(members)
        if mesh.rank in members:
            own = DeviceMesh.from_group(group, mesh.tensor.device_type, mesh_dim_names=("tensor",))
    return Mesh(Layout(tensor=ranks), mesh.place.tensor, own, processes_here=mesh.processes_here)


def _as_failure(error: BaseException, rank: int) -> LostProcessError:
    if isinstance(error, LostProcessError):
        return error
    return LostProcessError(f"process {rank} of the job failed: {one_line(error)}")


def serving_copy(trained: Decoder, mesh: Mesh, dtype: torch.dtype | None) -> Decoder:
    """A decoder for inference of this rank's shard, on the device of a model in training; `copy_trained` gives it values.

    mesh: of the tensor axis alone. dtype: of its weights; None: as in training.
    """
    model = empty_like(trained)
    if not mesh.alone:
        parallelize_for_inference(model, mesh)
    device, dtype = trained.device, dtype or trained.dtype

    def placed(tensor: Tensor) -> Tensor:
        if tensor.device.type != "meta":
            return tensor.to(device)
        return torch.empty_like(tensor, device=device, dtype=dtype if tensor.is_floating_point() else None)

    # tables of positions have values already, and stay in their type
    model._apply(placed)
    if trained.is_batch_invariant:
        model.use_batch_invariant_kernels()
    return model.requires_grad_(False).eval()


@torch.no_grad()
def copy_trained(trained: Decoder, model: Decoder) -> None:
    """Copy a trained model's weights into its `serving_copy`. All ranks of the job call it.

    Temporary device memory: one weight of this rank's shard, gathered.
    """
    release_gathered(trained)
    for own, source in _pairs(trained, model):
        local(own).copy_(_as_held(source, own))


def _pairs(trained: Decoder, model: Decoder) -> Iterator[tuple[Tensor, Tensor]]:
    for name in model.state_dict():
        yield held_weight(model, name), held_weight(trained, name)


def _as_held(source: Tensor, own: Tensor) -> Tensor:
    """The part of a trained weight that a rank of inference holds."""
    shard = source
    if isinstance(source, DTensor):
        axes = source.device_mesh.mesh_dim_names or ()
        kept = [placement if axis == "tensor" else Replicate() for axis, placement in zip(axes, source.placements, strict=True)]
        shard = local(redistributed(source, kept))
    if shard.shape == local(own).shape:
        return shard
    # experts that an expert axis has spread are whole here
    assert isinstance(own, DTensor), (shard.shape, own.shape)
    (cut,) = own.placements
    assert isinstance(cut, Shard), (shard.shape, own.shape)
    return shard.chunk(own.device_mesh.size(), cut.dim)[own.device_mesh.get_local_rank()]


class CollectiveEngine:
    """An engine inside a distributed job. All ranks of the job make each call together (SPMD), as they make a training step.

    Each tensor group (the ranks that share every matrix) serves the prompts that its first rank gives, none if it gives none:
    that rank schedules, the others repeat its steps with their shard, and all of the group get the result. Ranks of other axes
    have prompts of their own. Without a seed in the parameters each group draws other numbers.

    An error of one rank is raised on all, at the end of the call; after one in the middle of a step the engine is closed.
    A call waits for the slowest group, and for no longer than the job's timeout.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        mesh: Mesh,
        config: EngineConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Serve a model that is trained on a mesh, by a copy of this rank's tensor shard in `dtype` (None: the model's own).

        Raises ConfigError for a pipeline, whose ranks have some layers only, settings that one process alone can do, and where
        the memory holds no KV blocks.
        """
        if mesh.layout.pipeline > 1:
            raise ConfigError(
                f"parallel: pipeline {mesh.layout.pipeline}: each rank trains some layers, and an engine needs all; "
                "take tensor or data_shard"
            )
        if mesh.layout.tensor > 1 and isinstance(model, VisionDecoder):
            raise ConfigError(
                f"parallel: tensor {mesh.layout.tensor}: ranks that share matrices sample no answers about pictures; take "
                "data_shard"
            )
        config = config or EngineConfig()
        if config.parallel is not None:
            raise ConfigError("parallel: the mesh of the job says which processes share the model; leave it out")
        if mesh.layout.tensor > 1:
            config = config.with_changes(parallel={"tensor": mesh.layout.tensor})
        self._trained = model
        self._group = JobGroup(mesh)
        shard = serving_copy(model, self._group.mesh, dtype)
        copy_trained(model, shard)
        self._shard = shard
        self._engine: Engine | None = None
        if mesh.layout.tensor == 1:
            self._engine = Engine(shard, tokenizer, config=config)
        elif self._group.leads:
            sharded = ShardedModel(shard, self._group.mesh, self._group, ExitStack(), axis=self._group.mesh.tensor)
            self._engine = Engine(sharded, tokenizer, config=config)
        else:
            self._runner, self._draft = worker_runners(shard, config, self._group.mesh, self._group.mesh.tensor)
        self._version = 0

    @property
    def weight_version(self) -> int:
        """As `Engine.weight_version`."""
        return self._version

    def rollouts(self, prompts: Prompts, n: int, params: SamplingParams | Sequence[SamplingParams], **options: Any) -> Rollouts:
        """`Engine.rollouts` of this group's prompts."""
        return self._together(lambda engine: engine.rollouts(prompts, n, params, **options))

    def generate(self, prompts: Prompts, params: SamplingParams | Sequence[SamplingParams], **options: Any) -> list[Completion]:
        """`Engine.generate` of this group's prompts."""
        return self._together(lambda engine: engine.generate(prompts, params, **options))

    def score_items(self, items: Sequence[ScoreItem], **options: Any) -> list[list[Score]]:
        """`Engine.score_items` of this group's items."""
        return self._together(lambda engine: engine.score_items(items, **options))

    def update_weights(self, *, version: int | None = None, adapter: Adapter | None = None) -> None:
        """Take the weights that the trained model has now. version: as in `Engine.update_weights`. adapter: a whole one that is
        merged into them, where no ranks share a matrix."""
        self._check_open()
        copy_trained(self._trained, self._shard)
        if adapter is not None:
            assert self._group.mesh.layout.tensor == 1
            merge_into(self._shard, adapter)

        def note(engine: Engine) -> int:
            engine.update_weights(version=version)
            return engine.weight_version

        self._version = self._together(note)

    def load_adapter(self, name: str, adapter: Path | str | Adapter) -> None:
        """`Engine.load_adapter`; in each group of the adapter that its first rank gives."""
        self._together(lambda engine: engine.load_adapter(name, adapter))

    def update_adapter(self, name: str, adapter: Adapter, *, version: int | None = None) -> None:
        """`Engine.update_adapter`, as `load_adapter`."""

        def update(engine: Engine) -> int:
            engine.update_adapter(name, adapter, version=version)
            return engine.weight_version

        self._version = self._together(update)

    def unload_adapter(self, name: str) -> None:
        """`Engine.unload_adapter`."""
        self._together(lambda engine: engine.unload_adapter(name))

    def sleep(self) -> None:
        """`Engine.sleep`, of every group."""
        self._together(lambda engine: engine.sleep())

    def wake(self) -> None:
        """`Engine.wake`, of every group."""
        self._together(lambda engine: engine.wake())

    def close(self) -> None:
        """Leave the groups of the engine; the job's own stay. No rank may be in a call."""
        self._group.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside

    def _together(self, call: Callable[[Engine], Result]) -> Result:
        """The result of a call of this group's engine, on all its ranks. Raises the first error of any rank of the job."""
        self._check_open()
        result: Result | None = None
        failure: Exception | None = None
        try:
            if self._engine is None:
                self._follow()
            else:
                try:
                    result = call(self._engine)
                finally:
                    self._group.release()
        except Exception as error:
            failure = error
        self._group.end_call(failure)
        return self._group.share(result)

    def _follow(self) -> None:
        """Repeat the steps of the group's first rank until its call ends."""
        try:
            run_worker(self._runner, self._group.messages(), self._draft)
        except Exception as error:
            self._group.abandon(error)
            raise

    def _check_open(self) -> None:
        if self._group.failure is not None:
            raise self._group.failure
