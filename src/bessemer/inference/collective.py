"""An engine of the processes that train a model: every rank of the job samples, from the weights that the ranks train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from bessemer.core.errors import ConfigError
from bessemer.distributed.mesh import Mesh
from bessemer.inference.build import worker_runners
from bessemer.inference.config import EngineConfig
from bessemer.inference.engine import Engine
from bessemer.inference.execution.tensor_parallel.commands import run_worker
from bessemer.inference.execution.tensor_parallel.job_group import JobGroup
from bessemer.inference.execution.tensor_parallel.sharded_model import ShardedModel
from bessemer.inference.execution.tensor_parallel.trained_shards import copy_trained, serving_copy
from bessemer.inference.request import Completion, Prompts
from bessemer.inference.rollouts import Rollouts
from bessemer.inference.sampling.params import SamplingParams
from bessemer.inference.scores import Score, ScoreItem
from bessemer.model.adapters import Adapter
from bessemer.model.decoder import Decoder
from bessemer.tokenization.tokenizer import Tokenizer

Result = TypeVar("Result")


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

    def update_weights(self, *, version: int | None = None) -> None:
        """Take the weights that the trained model has now. version: as in `Engine.update_weights`."""
        self._check_open()
        copy_trained(self._trained, self._shard)

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

    def close(self) -> None:
        """Leave the groups of the engine; the job's own stay. No rank may be in a call."""
        self._group.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside

    def _together(self, call: Callable[[Engine], Result]) -> Result:
        """What a call gives of this group's engine, on all its ranks. Raises the first error of any rank of the job."""
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
